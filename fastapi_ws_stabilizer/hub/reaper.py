"""Connections that have lasted long enough, and those that nobody uses.

Platforms cut what lasts for an hour, or for a day, all at once and without a word. Each connection that is closed
before that, at a moment of its own and with a code that says so, comes back unnoticed.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import math
import random
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.hub.recipient import Recipient
from fastapi_ws_stabilizer.scheduling import LoopBudget

JITTER: Final = 0.1
"""By which part of `max_lifetime` a connection may be closed early, so that those which came together go apart."""

LOOKS: Final = 4
"""How often in an `idle_timeout` a connection is looked at. So it may be idle for a quarter longer."""

DRAIN_LEAD: Final = 1.0
"""Seconds for which a client is waited for that was asked to leave by itself."""

TOGETHER: Final = 0.1
"""Seconds by which one may be late, so that many are dealt with in one turn of the event loop."""


class _Deadline:
    """Of one connection: until when it lasts, and when it was used.

    Attributes:
        due: When it is looked at next, on the monotonic clock.
        ends: When it is closed whatever it does.
        used: When it was last seen to be used.
        asked: Whether its client was asked to leave.
        member: The connection; `None` when it is over.
    """

    __slots__ = ("asked", "due", "ends", "member", "used")

    def __init__(self, member: Recipient, now: float, ends: float) -> None:
        self.due = ends
        self.ends = ends
        self.used = now
        self.asked = False
        self.member: Recipient | None = member

    def __lt__(self, other: _Deadline) -> bool:
        """Whether it is looked at first: terms stand in a heap."""
        return self.due < other.due


class ConnectionReaper:
    """Closes connections after `max_lifetime`, and those that carry no message for `idle_timeout`.

    One timer waits for all of them. Where neither option is set, this costs nothing.
    """

    def __init__(self, config: WebSocketConfig) -> None:
        self._max_lifetime = config.max_lifetime
        self._idle_timeout = config.idle_timeout
        self._lead = min(DRAIN_LEAD, (config.max_lifetime or 0.0) * JITTER)  # for who is asked to leave
        self._on = self._max_lifetime is not None or self._idle_timeout is not None
        self._terms: dict[str, _Deadline] = {}
        self._heap: list[_Deadline] = []
        self._context = contextvars.copy_context()  # not that of the connection that happens to set the timer
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0

    def __len__(self) -> int:
        return len(self._terms)

    def add(self, member: Recipient) -> None:
        """A connection has begun."""
        if not self._on:
            return
        now = monotonic()
        ends = math.inf
        if self._max_lifetime is not None:
            early = random.uniform(0.0, JITTER) * self._max_lifetime  # noqa: S311 (spreads load)
            ends = now + self._max_lifetime - early - self._lead
        term = self._terms[member.connection_id] = _Deadline(member, now, ends)
        if self._idle_timeout is not None:
            term.due = min(ends, now + self._idle_timeout / LOOKS)
        heapq.heappush(self._heap, term)
        self._arm()

    def remove(self, member: Recipient) -> None:
        """A connection is over: let go of it at once."""
        term = self._terms.pop(member.connection_id, None)
        if term is None:
            return
        term.member = None
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._terms):
            self._heap = [one for one in self._heap if one.member is not None]
            heapq.heapify(self._heap)

    def stop(self) -> None:
        """Let go of all of them, and of the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._terms.clear()
        self._heap.clear()

    def _look(self, term: _Deadline, member: Recipient, now: float) -> None:
        """Look at a connection, and say in `due` when to look again."""
        if now >= term.ends:
            if term.asked or not member.request_drain(0.0, self._lead, DisconnectReason.LIFETIME):
                member.close(DisconnectReason.LIFETIME)
                return
            term.asked = True
            term.ends = now + self._lead
        term.due = term.ends
        if self._idle_timeout is None:
            return
        if member.consume_activity():
            term.used = now
        idle_at = term.used + self._idle_timeout
        if now >= idle_at:
            member.close(DisconnectReason.IDLE)
            return
        term.due = min(term.ends, idle_at, now + self._idle_timeout / LOOKS)

    def _arm(self) -> None:
        if not self._heap:
            return
        due = self._heap[0].due
        if self._timer is not None:
            if self._timer_due <= due + TOGETHER:
                return
            self._timer.cancel()
        self._timer_due = due + TOGETHER
        self._timer = asyncio.get_running_loop().call_later(
            max(0.0, self._timer_due - monotonic()), self._on_timer, context=self._context
        )

    def _on_timer(self) -> None:
        self._timer = None
        now = monotonic()
        hold = LoopBudget()
        try:
            while self._heap and self._heap[0].due <= now and not hold.exceeded():
                term = heapq.heappop(self._heap)
                if term.member is None:
                    continue
                self._look(term, term.member, now)
                if term.member is not None:  # it is taken out when its end begins
                    heapq.heappush(self._heap, term)
        finally:
            self._arm()  # whatever one of them raised, the others have their time too
