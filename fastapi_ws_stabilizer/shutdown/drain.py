"""Going away well: no new connections, a word to each client when to come back, closes spread over a while.

All at once, thousands of clients would be back in the same instant, on a server that has just begun. So each is told a
moment of its own: a client of `stabilizer.v1.json` leaves by itself at it, a plain one is closed then.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Set
from typing import Final, Protocol

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.server_transport import FLUSH_GRACE
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.hub.reaper import DRAIN_LEAD
from fastapi_ws_stabilizer.limits.connections import shutdown_error
from fastapi_ws_stabilizer.scheduling import LoopBudget
from fastapi_ws_stabilizer.shutdown.close_all import ShutdownReport, close_all
from fastapi_ws_stabilizer.tasks import wait_for_all, wait_for_first

CLOSES_PER_SECOND: Final = 100.0
"""Closes are spread no wider than this, so that nobody waits ten seconds for a handful of connections."""

CLOSE_WINDOW_FRACTION: Final = 0.6
"""The part of the whole time that the closes may be spread over. The rest is for hooks, and for who is slow."""

POLL_INTERVAL: Final = 0.25
"""Seconds between two looks for clients that take nothing."""


class Handshakes(Protocol):
    """What it needs of the handshakes in progress."""

    async def wait_until_empty(self, timeout: float) -> bool:
        """Wait until all are over; tell whether they are."""

    def abort(self) -> None:
        """Cut their connections."""


class Drain:
    """One drain of one manager.

    Args:
        events: Where it is told.
        window: Seconds that the closes are spread over at most.
        timeout: Seconds that all of it may take. What is not done by then is cut.
        resumable: Counts the sessions that clients can come back to.
    """

    def __init__(self, events: EventBus, window: float, timeout: float, resumable: Callable[[], int]) -> None:
        self._events = events
        self._window = window
        self._resumable = resumable
        self._started = monotonic()
        self._until = self._started + timeout
        self._sooner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._abandoned = False

    def shorten(self, timeout: float) -> None:
        """Be done in so many seconds from now, if that is sooner."""
        until = monotonic() + timeout
        if until < self._until:
            self._until = until
            self._wake()

    async def wait_for_others(self, everyone: Iterable[Connection], mine: Set[Connection]) -> ShutdownReport:
        """Wait for all connections but those whose own code has called this: they cannot end before it returns.

        Args:
            everyone: The connections that are open or ending.
            mine: Those whose code has called this. Their close frames are waited for.
        """
        others = [connection for connection in everyone if connection not in mine]
        await wait_for_all([*(one.finished for one in others), *(one.closing for one in mine)], self._departed)
        await wait_for_all([one.outbox.done for one in mine], self._departed)
        closed = sum(connection.is_finished for connection in others)
        return ShutdownReport(closed, 0, monotonic() - self._started, resumable_count=self._resumable())

    def cancel(self) -> None:
        """Leave alone who has not been closed yet."""
        self._abandoned = True
        self._wake()

    def _wake(self) -> None:
        if not self._sooner.done():
            self._sooner.set_result(None)

    @property
    def _departed(self) -> float:
        return max(0.0, self._until - monotonic())

    async def run(self, connections: Iterable[Connection], handshakes: Handshakes | None = None) -> ShutdownReport:
        """Close all connections, and wait for their ends: hooks, endpoints, dependencies.

        Args:
            connections: Those that are open or ending.
            handshakes: Those that are in progress: they have been refused, and are cut when the time is over.
        """
        everyone = list(connections)
        open_ones = [connection for connection in everyone if connection.close_info is None]
        window = min(self._window, self._departed * CLOSE_WINDOW_FRACTION, len(open_ones) / CLOSES_PER_SECOND)
        self._events.emit("drain_started", logging.INFO, connections=len(open_ones), window_seconds=window)
        random.shuffle(open_ones)
        closed = await self._close_in_turn(await self._announce(open_ones, window))
        forced = await self._wait_for_close_handshakes(closed)
        if handshakes is not None:
            await self._wait_for_refusals(handshakes)
        report = ShutdownReport()
        if not self._abandoned:
            report = await close_all(everyone, self._departed)
        report.closed_count += sum(connection.is_finished for connection in closed)
        report.forced_count += sum(connection.is_finished for connection in forced)  # the others are counted there
        report.resumable_count = self._resumable()
        report.duration_seconds = monotonic() - self._started
        return report

    async def _wait_for_refusals(self, handshakes: Handshakes) -> None:
        """Wait until no handshake is in progress; cut those that are when the time is over."""
        while not self._abandoned and not await handshakes.wait_until_empty(min(POLL_INTERVAL, self._departed)):
            if self._departed <= 0:
                handshakes.abort()
                break

    async def _announce(self, everyone: list[Connection], window: float) -> list[tuple[float, Connection]]:
        """Give each its moment, evenly, and tell those that can be told."""
        step = window / len(everyone) if everyone else 0.0
        hold = LoopBudget()
        moments = []
        for number, connection in enumerate(everyone):
            after = step * (number + 0.5)
            if connection.request_drain(after, after + DRAIN_LEAD, DisconnectReason.SERVER_SHUTDOWN):
                after += DRAIN_LEAD
            moments.append((after, connection))
            if hold.exceeded():
                await hold.yield_to_loop()
        moments.sort(key=lambda one: one[0])
        return moments

    async def _close_in_turn(self, moments: list[tuple[float, Connection]]) -> list[Connection]:
        """Close each at its moment, unless it has left; return those that were closed or have left."""
        hold = LoopBudget()
        done = []
        for after, connection in moments:
            await self._wait_until(after, connection)
            if self._abandoned:
                break
            text = shutdown_error(self._window).reason
            connection.close(DisconnectReason.SERVER_SHUTDOWN, text=text)
            done.append(connection)
            if hold.exceeded():
                await hold.yield_to_loop()
        return done

    async def _wait_until(self, after: float, connection: Connection) -> None:
        """Wait for the moment of a connection, or for its end; but no longer than leaves time for what comes then."""
        while connection.close_info is None and not self._abandoned:
            latest = self._started + (self._until - self._started) * CLOSE_WINDOW_FRACTION
            wait = min(self._started + after, latest) - monotonic()
            if wait <= 0:
                return
            if self._sooner.done():
                self._sooner = asyncio.get_running_loop().create_future()
            await wait_for_first([connection.closing, self._sooner], wait)

    async def _wait_for_close_handshakes(self, closed: list[Connection]) -> list[Connection]:
        """Wait until all is over; cut, on the way, whose client takes nothing, not even the goodbye. Return those."""
        waiting, forced = closed, []
        while waiting := [connection for connection in waiting if not connection.is_finished]:
            if self._departed <= 0 or self._abandoned:
                break
            await wait_for_all([connection.finished for connection in waiting], min(POLL_INTERVAL, self._departed))
            for connection in waiting:
                if connection.outbox.blocked_seconds >= FLUSH_GRACE and connection not in forced:
                    forced.append(connection)
                    connection.abort()
        return forced
