"""Heartbeat scheduler for all connections of one manager.

The liveness objects of the connections are in a heap, by the time of their next check. One event loop timer waits for
the first of them. An idle connection costs a heap entry, but no task and no timer.
"""

from __future__ import annotations

import logging
import random
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import HeartbeatType, WebSocketConfig
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.scheduling import DeadlineHeap, LoopBudget
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode
from fastapi_ws_stabilizer.wire.text_ping import PING

MAX_TIMER_LAG: Final = 0.5
"""Timer delay in seconds above which the event loop counts as blocked. Pongs may then be unread in the sockets, so no
connection is closed before the server had time to read them."""

MAX_COALESCE_DELAY: Final = 0.1
"""Seconds that a check may wait for others, but at most a fiftieth of the interval. Waking the event loop costs more
than a ping."""

GRACE_AFTER_LAG: Final = 1.0
"""Seconds that the server has after such a delay to read the pongs."""

MIN_UPLOAD_RATE: Final = 4096
"""Minimum upload rate, in bytes per second, of a client that is sending one message. A client that sends a byte now and
then, but never completes a message, is closed when the largest message would have arrived at this rate."""


LARGE_BACKLOG_BYTES: Final = 16 * 1024
"""Queued bytes ahead of a ping at which the server starts to track progress: about 1 s of a slow link."""


class UnansweredPing:
    """Record of a ping that a client has not answered while bytes show that it is alive.

    Attributes:
        since: Time of the ping.
        progress: Bytes that the client's TCP stack had accepted at the last check; `None` if few bytes were queued
            before the ping.
        before_ping: Value of `progress` at which all bytes before the ping are accepted.
    """

    __slots__ = ("before_ping", "progress", "since")

    def __init__(self, since: float, progress: int | None = None, unsent: int = 0) -> None:
        self.since = since
        self.progress = progress
        self.before_ping = unsent + (progress or 0)

    def has_progressed(self, connection: Connection) -> bool:
        """Whether the client has accepted bytes before the ping since the last check."""
        if self.progress is None or self.progress >= self.before_ping:
            return False
        before, now = self.progress, connection.server_transport.progress()
        if now is None or now <= before:
            return False
        self.progress = now
        return True


class HeartbeatScheduler:
    """Scheduler that pings each connection once per interval and closes silent ones.

    The first ping of a connection comes after a random part of the interval, so that clients that connect together are
    not pinged together.
    """

    def __init__(self, config: WebSocketConfig, events: EventBus) -> None:
        self._interval = config.heartbeat_interval
        self._timeout = config.heartbeat_timeout
        self._require_pong = config.require_pong
        self._payload = config.heartbeat_payload
        self._enabled = config.heartbeat_type is not HeartbeatType.OFF
        self._max_upload_time = config.max_message_size / MIN_UPLOAD_RATE
        self._unanswered: dict[Liveness, UnansweredPing] = {}
        self._constant: EncodedMessage | None = None
        if config.heartbeat_type is HeartbeatType.PING:
            self._constant = PING
        elif self._enabled and not callable(self._payload):
            self._constant = encode(self._payload)
        self._events = events
        coalesce = min(MAX_COALESCE_DELAY, config.heartbeat_interval / 50)
        self._deadlines: DeadlineHeap[Liveness] = DeadlineHeap(self._on_due, coalesce)

    def __len__(self) -> int:
        return len(self._deadlines)

    def add(self, connection: Connection) -> None:
        """Start the heartbeat of a connection."""
        if not self._enabled:
            return
        now = monotonic()
        connection.liveness.next_ping = now + random.uniform(0.0, self._interval)  # noqa: S311 (spreads load, guards nothing)
        self._push(connection, connection.liveness.next_ping)
        self._deadlines.arm()

    def remove(self, connection: Connection) -> None:
        """Stop the heartbeat of a connection and drop the reference to it."""
        self._unanswered.pop(connection.liveness, None)
        if connection.liveness.recipient is not None:
            self._deadlines.remove(connection.liveness)

    def stop(self) -> None:
        """Drop all connections and the timer."""
        self._deadlines.stop()
        self._unanswered.clear()

    def run_due(self, now: float, late: float = 0.0) -> None:
        """Run all checks that are due at `now`.

        Args:
            now: Time on the monotonic clock.
            late: Delay of this call in seconds.
        """
        loop_budget = LoopBudget()
        while not loop_budget.exceeded():  # the timer is set again at once, so the rest runs after the loop was free
            liveness = self._deadlines.pop(now)
            if liveness is None:
                break
            connection: Connection = liveness.recipient
            liveness.recipient = None
            due = self._check(connection, now, late)
            if due is not None:
                self._push(connection, due)

    def _check(self, connection: Connection, now: float, late: float) -> float | None:
        """Check one connection and return when to check it again; `None` if it is closing."""
        if connection.close_info is not None:
            return None
        liveness = connection.liveness
        if connection.pause is not None or connection.outbox.is_stalled:
            # The pong may be unread, or the ping not sent yet.
            liveness.clear_deadline()
        deadline = self._deadline(connection)
        if deadline is not None and now >= deadline and not self._has_progress(connection, now):
            if late < MAX_TIMER_LAG:
                self._close_silent(connection, now)
                return None
            liveness.awaiting_since = now - self._timeout + min(GRACE_AFTER_LAG, self._timeout)
        if now >= liveness.next_ping:
            self._ping(connection, now)
            liveness.next_ping = now + self._interval
            if connection.close_info is not None:  # the payload function closed the connection
                return None
        deadline = self._deadline(connection)
        return liveness.next_ping if deadline is None else min(liveness.next_ping, deadline)

    def _deadline(self, connection: Connection) -> float | None:
        liveness = connection.liveness
        enforced = (
            liveness.has_ponged or connection.protocol.pings_are_answered(connection)
            if self._require_pong == "auto"
            else self._require_pong
        )
        if not enforced or liveness.awaiting_since is None:
            return None
        return liveness.awaiting_since + self._timeout

    def _has_progress(self, connection: Connection, now: float) -> bool:
        """Whether bytes moved in either direction since the ping; if so, restart its timeout.

        A pong waits behind a large message that the client is sending, and a ping behind one that it is reading.
        """
        liveness = connection.liveness
        since = last_progress = liveness.awaiting_since or 0.0
        unanswered = self._unanswered.setdefault(liveness, UnansweredPing(since))
        silent = connection.server_transport.seconds_since_received()
        received = liveness.last_seen if silent is None else max(liveness.last_seen, now - silent)
        if received > since:
            liveness.last_seen = received
            last_progress = min(received, unanswered.since + self._max_upload_time)
        if unanswered.has_progressed(connection):
            last_progress = now
        if last_progress + self._timeout <= now:
            return False
        liveness.awaiting_since = last_progress
        return True

    def _check_queue(self, connection: Connection, now: float) -> None:
        """Record the client's progress before a ping is queued, if much is queued before it."""
        liveness = connection.liveness
        since = liveness.awaiting_since
        unanswered = self._unanswered.get(liveness)
        if since is None and unanswered is not None:  # the client has answered
            del self._unanswered[liveness]
            unanswered = None
        if unanswered is not None:
            if unanswered.has_progressed(connection):
                liveness.awaiting_since = now
            return
        unsent = connection.server_transport.unsent_bytes()
        if unsent is not None and unsent >= LARGE_BACKLOG_BYTES:
            self._unanswered[liveness] = UnansweredPing(
                now if since is None else since, connection.server_transport.progress(), unsent
            )

    def _close_silent(self, connection: Connection, now: float) -> None:
        silent = now - connection.liveness.last_seen
        self._events.emit(
            "heartbeat_timeout",
            logging.INFO,
            client_id=connection.client_id,
            connection_id=connection.connection_id,
            silent_seconds=silent,
        )
        connection.close(DisconnectReason.HEARTBEAT_TIMEOUT)

    def _ping(self, connection: Connection, now: float) -> None:
        frame = self._constant
        if frame is PING and connection.protocol.pings_are_answered(connection):
            frame = None
        elif frame is None:
            try:
                context = connection.context
                value = (
                    self._payload(connection.socket)
                    if context is None
                    else context.run(self._payload, connection.socket)
                )
                frame = encode(value)
            except Exception as error:  # the user's function or its result; the next ping tries again
                name = (
                    "heartbeat_payload_invalid" if isinstance(error, MessageEncodeError) else "heartbeat_payload_failed"
                )
                self._events.emit_exception(
                    name, error, client_id=connection.client_id, connection_id=connection.connection_id
                )
                return
        if connection.close_info is None:  # else the function has closed the connection, and no record of it may remain
            self._check_queue(connection, now)
        if connection.protocol.ping(connection, frame, now):
            self._events.counters.pings_sent += 1  # else the outbox is full; a stall closes a client that does not read

    def _push(self, connection: Connection, due: float) -> None:
        liveness = connection.liveness
        liveness.due = due
        liveness.recipient = connection
        self._deadlines.push(liveness)

    def _on_due(self, now: float, late: float) -> None:
        if late >= MAX_TIMER_LAG:
            self._events.emit("event_loop_blocked", logging.WARNING, blocked_seconds=late)
        self.run_due(now, late)
