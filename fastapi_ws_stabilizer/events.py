"""How the core tells what happened: counters that cost an addition, and reports that listeners hear.

Logs are the first listener; metrics and traces can be others. The core never formats a sentence and never knows who
listens.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.metrics.timings import Timings

logger = logging.getLogger("fastapi_ws_stabilizer")

THROTTLE_INTERVAL: Final = 60.0
"""Seconds in which one report of a kind that clients can cause at will is told at its level, and others at DEBUG."""

MAX_THROTTLED_KINDS: Final = 64
"""Kinds of such an event that are told apart. Some are named by what the application has chosen, a close code say."""


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        event: Its name, a fixed word such as `connection_opened`.
        level: How much it matters, as a level of the `logging` module.
        fields: What is known of it: plain values, `connection_id` and `client_id` among them where one is concerned.
        error: The exception, where the report is about one.
    """

    event: str
    level: int
    fields: Mapping[str, Any]
    error: BaseException | None = None


Listener = Callable[[Event], None]


@dataclass
class Counters:
    """What a manager has counted since it was made. Plain integers: hot paths add to them directly."""

    connections_opened: int = 0
    messages_received: int = 0
    messages_sent: int = 0
    messages_discarded: int = 0
    """Messages that were received and never read, queued and never sent, or, in a session, never acknowledged, because
    their connection or session ended."""
    messages_dropped: int = 0
    """Messages that `outbox_overflow` threw away because a client was slow."""
    messages_coalesced: int = 0
    """Messages in whose place a newer one with the same `coalesce_key` was sent."""
    slow_clients: Counter[str] = field(default_factory=Counter)
    """How often clients have become slow, by `SlowConsumer`."""
    messages_refused: int = 0
    """Messages of clients that sent more than they may."""
    bad_messages: int = 0
    broadcasts: int = 0
    pings_sent: int = 0
    sessions_resumed: int = 0
    """Sessions whose client came back and got everything that it had missed."""
    session_gaps: int = 0
    """Sessions whose client came back too late for what it had missed, and was told so."""
    sessions_lost: int = 0
    """Clients that came back for a session which is not here any more."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Handshakes that were turned away, by the option that said so, else by the close code that means the same."""
    evictions: int = 0
    """Connections, and what was kept for clients that are away, that went because memory was short."""
    endings: Counter[DisconnectReason] = field(default_factory=Counter)


class EventBus:
    """The interface between the core and everybody who wants to know.

    Attributes:
        counters: The counters.
        timings: How long things took; `None` if nobody wants to know.
    """

    __slots__ = ("_listeners", "_throttled", "counters", "timings")

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._throttled: dict[str, dict[str, tuple[float, int]]] = {}  # of each event by kind: when, and how many since
        self.counters: Counters = Counters()
        self.timings: Timings | None = None

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every report from now on; call what is returned to stop that."""
        self._listeners.append(listener)

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unsubscribe

    def emit(self, event: str, level: int, *, error: BaseException | None = None, **fields: Any) -> None:
        """Hand one report to all listeners. A listener that fails is logged and hurts nobody else."""
        report = Event(event, level, fields, error)
        for listener in tuple(self._listeners):
            try:
                listener(report)
            except Exception:
                logger.exception("a listener of reports failed", extra={"event": "listener_failed"})

    def emit_throttled(self, event: str, level: int, kind: str, **fields: Any) -> bool:
        """Report something that a client can cause as often as it likes, so that one of them cannot fill the log.

        One of a kind is told at its level in `THROTTLE_INTERVAL` seconds, the others at DEBUG. The next one that is
        told says how many those were, as `more`.

        Args:
            event: Its name.
            level: How much it matters.
            kind: What sort of this event it is.
            fields: What is known of it.

        Returns:
            Whether it was told at its level.
        """
        told = self._throttled.setdefault(event, {})
        if kind not in told and len(told) >= MAX_THROTTLED_KINDS:
            kind = ""
        now = monotonic()
        at, left_out = told.get(kind, (-math.inf, 0))
        due = now - at >= THROTTLE_INTERVAL
        told[kind] = (now, 0) if due else (at, left_out + 1)
        if due and left_out:
            fields["more"] = left_out
        self.emit(event, level if due else logging.DEBUG, **fields)
        return due

    def emit_exception(self, event: str, error: BaseException, **fields: Any) -> None:
        """Report an error that somebody has to mend, with its traceback."""
        self.emit(event, logging.ERROR, error=error, **fields)
