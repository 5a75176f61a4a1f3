"""Drain of a manager: reject new connections, and spread the closes of the open ones over a window.

Closing thousands of connections at once would make all clients reconnect at once, to a server that has just started. So
each connection gets its own time. A `stabilizer.v1.json` client leaves at that time. The server closes the connection
of a plain client then.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.server_transport import FLUSH_GRACE
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handshake.admission import AdmissionController
from fastapi_ws_stabilizer.hub.reaper import DRAIN_LEAD
from fastapi_ws_stabilizer.limits.connections import shutdown_error
from fastapi_ws_stabilizer.node import Node
from fastapi_ws_stabilizer.scheduling import LoopBudget
from fastapi_ws_stabilizer.servers.detect import exits_on_signal
from fastapi_ws_stabilizer.shutdown.signals import SignalHandler
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all, wait_for_first

CLOSES_PER_SECOND: Final = 100.0
"""Minimum rate of closes, so that a drain of few connections does not take the whole window."""

CLOSE_WINDOW_FRACTION: Final = 0.6
"""Maximum fraction of the timeout over which closes are spread. The rest is for hooks and slow clients."""

POLL_INTERVAL: Final = 0.25
"""Seconds between two checks for clients that do not read."""


@dataclass
class ShutdownReport:
    """Report of a drain or shutdown.

    Attributes:
        closed_count: Connections that ended in time: close frame sent, hooks run, endpoint finished.
        failed_count: Connections that did not end in time and were aborted.
        duration_seconds: Duration in seconds.
        forced_count: Connections that were aborted because their client read nothing or the timeout expired.
        resumable_count: Sessions that clients could resume at the end. They are in the memory of this process, and end
            with it.
    """

    closed_count: int = 0
    failed_count: int = 0
    duration_seconds: float = 0.0
    forced_count: int = 0
    resumable_count: int = 0


async def close_all(connections: Iterable[Connection], timeout: float) -> ShutdownReport:
    """Close all connections with 1012 at the same time, and wait at most `timeout` seconds for their end.

    Then the transports of unfinished connections are aborted and their endpoints cancelled. The call also waits for
    connections that were already closing, but counts them only if it aborts them.
    """
    started = monotonic()
    connections = list(connections)
    closed_here = []
    loop_budget = LoopBudget()
    for connection in connections:
        if connection.close(DisconnectReason.SERVER_SHUTDOWN):
            closed_here.append(connection)
        if loop_budget.exceeded():
            await loop_budget.yield_to_loop()
    await wait_for_all([connection.closed for connection in connections], timeout)
    late = [connection for connection in connections if not connection.is_closed]
    for connection in late:
        connection.abort()
        connection.endpoint.cancel()
    closed = sum(1 for connection in closed_here if connection.is_closed)
    return ShutdownReport(closed, len(late), monotonic() - started, forced_count=len(late))


class Drain:
    """One drain of one manager.

    Args:
        events: Event bus for the events of the drain.
        window: Maximum seconds over which the closes are spread.
        timeout: Maximum seconds of the whole drain. Then the connections that are left are aborted.
        resumable: Function that returns the number of sessions that clients can resume.
    """

    def __init__(self, events: EventBus, window: float, timeout: float, resumable: Callable[[], int]) -> None:
        self._events = events
        self._window = window
        self._resumable = resumable
        self._started = monotonic()
        self._until = self._started + timeout
        self._woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._cancelled = False

    def shorten(self, timeout: float) -> None:
        """End at most `timeout` seconds from now. A longer timeout changes nothing."""
        until = monotonic() + timeout
        if until < self._until:
            self._until = until
            self._wake()

    async def wait_for_others(
        self, connections: Iterable[Connection], own_connections: Set[Connection]
    ) -> ShutdownReport:
        """Wait for all connections except those of the calling code, which end only after this call returns.

        Args:
            connections: The connections that are open or in teardown.
            own_connections: The connections of the calling code. The call waits for their close frames only.
        """
        others = [connection for connection in connections if connection not in own_connections]
        closing = [connection.closing for connection in own_connections]
        await wait_for_all([*(connection.closed for connection in others), *closing], self._remaining_seconds)
        await wait_for_all([connection.outbox.done for connection in own_connections], self._remaining_seconds)
        closed = sum(connection.is_closed for connection in others)
        return ShutdownReport(closed, 0, monotonic() - self._started, resumable_count=self._resumable())

    def cancel(self) -> None:
        """Cancel the drain. Connections that are still open stay open."""
        self._cancelled = True
        self._wake()

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    @property
    def _remaining_seconds(self) -> float:
        return max(0.0, self._until - monotonic())

    async def run(
        self, connections: Iterable[Connection], handshakes: AdmissionController | None = None
    ) -> ShutdownReport:
        """Close all connections, and wait for their hooks, endpoints and dependencies.

        Args:
            connections: The connections that are open or in teardown.
            handshakes: The handshakes in progress. They are already rejected, and are aborted after the timeout.
        """
        connections = list(connections)
        open_ones = [connection for connection in connections if connection.close_info is None]
        window = min(self._window, self._remaining_seconds * CLOSE_WINDOW_FRACTION, len(open_ones) / CLOSES_PER_SECOND)
        self._events.emit("drain_started", logging.INFO, connections=len(open_ones), window_seconds=window)
        random.shuffle(open_ones)
        closed = await self._close_on_schedule(await self._announce(open_ones, window))
        forced = await self._wait_for_close_handshakes(closed)
        if handshakes is not None:
            await self._wait_for_handshakes(handshakes)
        report = ShutdownReport()
        if not self._cancelled:
            report = await close_all(connections, self._remaining_seconds)
        report.closed_count += sum(connection.is_closed for connection in closed)
        report.forced_count += sum(connection.is_closed for connection in forced)  # close_all counted the others
        report.resumable_count = self._resumable()
        report.duration_seconds = monotonic() - self._started
        return report

    async def _wait_for_handshakes(self, handshakes: AdmissionController) -> None:
        """Wait until no handshake is in progress, and abort those that are left after the timeout."""
        while not self._cancelled and not await handshakes.wait_until_empty(
            min(POLL_INTERVAL, self._remaining_seconds)
        ):
            if self._remaining_seconds <= 0:
                handshakes.abort()
                break

    async def _announce(self, connections: list[Connection], window: float) -> list[tuple[float, Connection]]:
        """Give each connection a time in the window, and ask `stabilizer.v1.json` clients to leave at that time.

        Returns:
            The connections with the seconds until each is closed, sorted by time. A client that was asked to leave has
            `DRAIN_LEAD` more.
        """
        step = window / len(connections) if connections else 0.0
        loop_budget = LoopBudget()
        schedule = []
        for number, connection in enumerate(connections):
            after = step * (number + 0.5)
            if connection.request_drain(after, after + DRAIN_LEAD, DisconnectReason.SERVER_SHUTDOWN):
                after += DRAIN_LEAD
            schedule.append((after, connection))
            if loop_budget.exceeded():
                await loop_budget.yield_to_loop()
        schedule.sort(key=lambda entry: entry[0])
        return schedule

    async def _close_on_schedule(self, schedule: list[tuple[float, Connection]]) -> list[Connection]:
        """Close each connection at its time, if it is still open, and return all of them."""
        loop_budget = LoopBudget()
        done = []
        for after, connection in schedule:
            await self._wait_until(after, connection)
            if self._cancelled:
                break
            text = shutdown_error(self._window).reason  # each has its own random delay
            connection.close(DisconnectReason.SERVER_SHUTDOWN, reason=text)
            done.append(connection)
            if loop_budget.exceeded():
                await loop_budget.yield_to_loop()
        return done

    async def _wait_until(self, after: float, connection: Connection) -> None:
        """Wait for the time of a connection or for its end, but at most until the end of the close window."""
        while connection.close_info is None and not self._cancelled:
            latest = self._started + (self._until - self._started) * CLOSE_WINDOW_FRACTION
            wait = min(self._started + after, latest) - monotonic()
            if wait <= 0:
                return
            if self._woken.done():
                self._woken = asyncio.get_running_loop().create_future()
            await wait_for_first([connection.closing, self._woken], wait)

    async def _wait_for_close_handshakes(self, closed: list[Connection]) -> list[Connection]:
        """Wait for the end of closed connections. Abort and return those of clients that do not read."""
        waiting, forced = closed, []
        while waiting := [connection for connection in waiting if not connection.is_closed]:
            if self._remaining_seconds <= 0 or self._cancelled:
                break
            timeout = min(POLL_INTERVAL, self._remaining_seconds)
            await wait_for_all([connection.closed for connection in waiting], timeout)
            for connection in waiting:
                if connection.outbox.blocked_seconds >= FLUSH_GRACE and connection not in forced:
                    forced.append(connection)
                    connection.abort()
        return forced


class NodeShutdown:
    """Drain and stop of one node. A node is drained once until it accepts connections again.

    Args:
        node: The node.
        config: Options of the manager.
        events: Event bus for the events of the drain.
        signals: Signal handler, whose previous handlers are restored before the node stops.

    Attributes:
        has_begun: Whether the node drains or is stopped, so that it rejects new connections.
    """

    def __init__(self, node: Node, config: WebSocketConfig, events: EventBus, signals: SignalHandler) -> None:
        self._node = node
        self._config = config
        self._events = events
        self._signals = signals
        self._context = contextvars.copy_context()
        self._tasks = TaskSet(lambda _, __: None)  # the code that awaits the task gets its failure
        self._drain: Drain | None = None
        self._running: asyncio.Task[ShutdownReport] | None = None
        self.has_begun = False

    def cancel(self) -> None:
        """Cancel the drain, and let the node accept connections again."""
        if self._drain is not None:
            self._drain.cancel()
        self._drain = self._running = None
        self.has_begun = False
        self._node.resume_accepting()

    async def drain(self, timeout: float | None) -> ShutdownReport:
        """Drain the node over `drain_window`, or join the drain that runs. Cancelling ends the wait, but not the drain.

        Args:
            timeout: Maximum seconds for the whole drain. `None` means `drain_timeout`.
        """
        own_connections = self._node.connections_of_current_task()
        return await self._drain_within(timeout, self._config.drain_window, own_connections)

    async def drain_before_exit(self) -> ShutdownReport:
        """Drain because of a signal, without a window if the server exits at once.

        Without a window, more clients get a close frame before the process exits. Cancelling ends the wait, but not the
        drain.
        """
        # A signal can interrupt the code of any connection. The drain still waits for that connection.
        return await self._drain_within(None, self._exit_window)

    async def stop(self, timeout: float | None) -> ShutdownReport:
        """Drain the node, and then stop it. Cancelling ends the wait, but not the drain.

        Args:
            timeout: Maximum seconds for the whole shutdown. `None` means `drain_timeout`.
        """
        timeout = self._config.drain_timeout if timeout is None else timeout
        until = monotonic() + timeout
        own_connections = self._node.connections_of_current_task()
        try:
            report = await self._drain_within(timeout, self._exit_window, own_connections)
        finally:
            self._signals.restore()
            if own_connections:  # waiting here would abort the connection of the calling code
                self._tasks.spawn(self._stop_after_drain(until), name="ws-stop")
            else:
                await self._node.stop(max(1.0, until - monotonic()))
        self._events.emit("shutdown", logging.INFO, **vars(report))
        return report

    @property
    def _exit_window(self) -> float:
        """Seconds over which the closes are spread before the process exits."""
        return 0.0 if exits_on_signal() else self._config.drain_window

    async def _stop_after_drain(self, until: float) -> None:
        if self._running is not None:
            await wait_for_all([self._running], max(0.0, until - monotonic()))
        await self._node.stop(max(1.0, until - monotonic()))

    async def _drain_within(
        self, timeout: float | None, window: float, own_connections: Set[Connection] = frozenset()
    ) -> ShutdownReport:
        timeout = self._config.drain_timeout if timeout is None else timeout
        self.has_begun = True
        self._node.stop_accepting()
        running = self._running
        if self._drain is None or running is None or (running.done() and (running.cancelled() or running.exception())):
            self._drain = Drain(self._events, window, timeout, self._node.sessions.__len__)
            work = self._drain.run(self._node.connections, self._node.admission)
            running = self._running = self._tasks.spawn(work, name="ws-drain", context=self._context.copy())
        else:
            self._drain.shorten(timeout)
        if own_connections and not running.done():
            return await self._drain.wait_for_others(self._node.connections, own_connections)
        await wait_for_all([running], None)
        return running.result()
