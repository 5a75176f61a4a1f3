"""Reaper: closes connections that reach `max_lifetime`, and idle ones.

Some platforms cut all connections after an hour or a day, without a close frame. The reaper closes each connection
earlier, at a different time and with a close code, so that its client reconnects smoothly.
"""

from __future__ import annotations

import math
import random
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.scheduling import DeadlineHeap, LoopBudget

JITTER: Final = 0.1
"""Fraction of `max_lifetime` by which a connection may be closed early, so that simultaneous connections do not close
together."""

CHECKS_PER_TIMEOUT: Final = 4
"""Checks of a connection per `idle_timeout`. A connection may therefore be idle for a quarter longer."""

DRAIN_LEAD: Final = 1.0
"""Seconds that a client has to leave after the server has asked it to reconnect."""

COALESCE_DELAY: Final = 0.1
"""Seconds that a check may be late, so that one event loop iteration handles many."""


class _Deadline:
    """Lifetime and last use of one connection.

    Attributes:
        due: Time of the next check, on the monotonic clock.
        ends: Time at which it is closed even if it is in use.
        used_at: Time of the last check at which it had been used.
        drain_requested: Whether its client was asked to reconnect.
        recipient: The connection; `None` once it is closed.
    """

    __slots__ = ("drain_requested", "due", "ends", "recipient", "used_at")

    def __init__(self, recipient: Connection, now: float, ends: float) -> None:
        self.due = ends
        self.ends = ends
        self.used_at = now
        self.drain_requested = False
        self.recipient: Connection | None = recipient

    def __lt__(self, other: _Deadline) -> bool:
        """Whether this deadline is checked first, for the heap."""
        return self.due < other.due


class ConnectionReaper:
    """Closer of connections that reach `max_lifetime` or carry no message for `idle_timeout`.

    One timer serves all connections.

    Attributes:
        enabled: Whether one of the options is set. Otherwise no connection is added.
    """

    def __init__(self, config: WebSocketConfig) -> None:
        self._max_lifetime = config.max_lifetime
        self._idle_timeout = config.idle_timeout
        self._drain_lead = min(DRAIN_LEAD, (config.max_lifetime or 0.0) * JITTER)  # before `ends`
        self.enabled = self._max_lifetime is not None or self._idle_timeout is not None
        self._deadlines: dict[str, _Deadline] = {}
        self._heap: DeadlineHeap[_Deadline] = DeadlineHeap(self._on_due, COALESCE_DELAY)

    def __len__(self) -> int:
        return len(self._deadlines)

    def add(self, recipient: Connection) -> None:
        """Start watching a connection."""
        now = monotonic()
        ends = math.inf
        if self._max_lifetime is not None:
            early = random.uniform(0.0, JITTER) * self._max_lifetime  # noqa: S311 (spreads load)
            ends = now + self._max_lifetime - early - self._drain_lead
        deadline = self._deadlines[recipient.connection_id] = _Deadline(recipient, now, ends)
        if self._idle_timeout is not None:
            deadline.due = min(ends, now + self._idle_timeout / CHECKS_PER_TIMEOUT)
        self._heap.push(deadline)
        self._heap.arm()

    def remove(self, recipient: Connection) -> None:
        """Stop watching a connection and drop the reference to it."""
        deadline = self._deadlines.pop(recipient.connection_id, None)
        if deadline is not None and deadline.recipient is not None:
            self._heap.remove(deadline)

    def stop(self) -> None:
        """Drop all connections and the timer."""
        self._deadlines.clear()
        self._heap.stop()

    def _check(self, deadline: _Deadline, recipient: Connection, now: float) -> None:
        """Check a connection, and set `due` to the time of the next check."""
        if now >= deadline.ends:
            if deadline.drain_requested or not recipient.request_drain(
                0.0, self._drain_lead, DisconnectReason.LIFETIME
            ):
                recipient.close(DisconnectReason.LIFETIME)
                return
            deadline.drain_requested = True
            deadline.ends = now + self._drain_lead
        deadline.due = deadline.ends
        if self._idle_timeout is None:
            return
        if recipient.protocol.consume_activity(recipient):
            deadline.used_at = now
        idle_at = deadline.used_at + self._idle_timeout
        if now >= idle_at:
            recipient.close(DisconnectReason.IDLE)
            return
        deadline.due = min(deadline.ends, idle_at, now + self._idle_timeout / CHECKS_PER_TIMEOUT)

    def _on_due(self, now: float, _: float) -> None:
        loop_budget = LoopBudget()
        while not loop_budget.exceeded() and (deadline := self._heap.pop(now)) is not None:
            recipient, deadline.recipient = deadline.recipient, None
            assert recipient is not None  # noqa: S101 (the heap returns no removed entry)
            self._check(deadline, recipient, now)
            if recipient.connection_id in self._deadlines:  # it is removed when its close begins
                deadline.recipient = recipient
                self._heap.push(deadline)
