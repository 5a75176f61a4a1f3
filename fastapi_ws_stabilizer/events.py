"""Events and counters: the core emits events to listeners, and adds to plain integers on hot paths.

The log is the first listener. Metrics and traces can be further ones. The core formats no text and does not know its
listeners.
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
"""Seconds in which one throttled event of a kind is emitted at its own level. Further ones are emitted at DEBUG."""

MAX_THROTTLED_KINDS: Final = 64
"""Maximum kinds of one event that are throttled separately. The application can choose some, such as close codes."""


@dataclass(frozen=True)
class Event:
    """One event of a manager.

    Attributes:
        event: Name of the event, a fixed word such as `connection_opened`.
        level: Severity, as a level of the `logging` module.
        fields: Plain values by name. An event about one connection has `connection_id` and `client_id`.
        error: The exception of an event about a failure.
    """

    event: str
    level: int
    fields: Mapping[str, Any]
    error: BaseException | None = None


Listener = Callable[[Event], None]


def _any_level(_: int) -> bool:
    return True


@dataclass
class Counters:
    """Counters of a manager since it was created. They are plain integers, because hot paths add to them directly."""

    connections_opened: int = 0
    messages_received: int = 0
    messages_sent: int = 0
    messages_discarded: int = 0
    """Messages not yet read, sent or acknowledged when their connection or session ended."""
    messages_dropped: int = 0
    """Messages dropped by `outbox_overflow` because their client is slow."""
    messages_coalesced: int = 0
    """Queued messages replaced by a newer message with the same `coalesce_key`."""
    slow_clients: Counter[str] = field(default_factory=Counter)
    """Slow consumer events, by `SlowConsumer`."""
    messages_refused: int = 0
    """Messages rejected because their client exceeded a rate limit."""
    bad_messages: int = 0
    broadcasts: int = 0
    pings_sent: int = 0
    sessions_resumed: int = 0
    """Sessions resumed without a gap, and states of plain clients restored."""
    session_gaps: int = 0
    """Sessions resumed too late to replay every missed message. The client is informed of the gap."""
    sessions_lost: int = 0
    """Resumes that failed because the session or its token is unknown or expired."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Handshakes rejected, by the option that rejected them, or by the equivalent close code."""
    evictions: int = 0
    """Connections, sessions and detached states removed because memory was short."""
    endings: Counter[DisconnectReason] = field(default_factory=Counter)
    """Connections closed, by reason."""


class EventBus:
    """Interface between the core and its listeners.

    Attributes:
        counters: The counters.
        timings: Histograms of durations; `None` with `enable_metrics=False`.
    """

    __slots__ = ("_listeners", "_throttled", "counters", "timings")

    def __init__(self) -> None:
        self._listeners: list[tuple[Listener, Callable[[int], bool]]] = []
        # Event → kind → time of the last event at its own level, and the number of events at DEBUG since then.
        self._throttled: dict[str, dict[str, tuple[float, int]]] = {}
        self.counters: Counters = Counters()
        self.timings: Timings | None = None

    def subscribe(self, listener: Listener, *, takes: Callable[[int], bool] = _any_level) -> Callable[[], None]:
        """Call `listener` with every further event. The returned function unsubscribes it.

        Args:
            listener: Function that gets the events.
            takes: Function that returns whether the listener takes events of a level. It is asked at each event, which
                is not created if no listener takes it.
        """
        subscription = listener, takes
        self._listeners.append(subscription)

        def unsubscribe() -> None:
            if subscription in self._listeners:
                self._listeners.remove(subscription)

        return unsubscribe

    def emit(self, event: str, level: int, *, error: BaseException | None = None, **fields: Any) -> None:
        """Pass one event to all listeners. If a listener raises, this is logged and the other listeners still run."""
        emitted: Event | None = None
        for listener, takes in tuple(self._listeners):
            try:
                if takes(level):
                    if emitted is None:
                        emitted = Event(event, level, fields, error)
                    listener(emitted)
            except Exception:
                logger.exception("an event listener failed", extra={"event": "listener_failed"})

    def emit_throttled(self, event: str, level: int, kind: str, **fields: Any) -> bool:
        """Emit an event that a client can cause without limit, so that one client cannot fill the log.

        In `THROTTLE_INTERVAL` seconds, one event of a kind is emitted at `level`, and the others at DEBUG. The next one
        at `level` has their number as the field `more`.

        Args:
            event: Name of the event.
            level: Severity.
            kind: Kind of the event. Each kind is throttled separately.
            fields: Plain values by name.

        Returns:
            Whether the event was emitted at `level`.
        """
        kinds = self._throttled.setdefault(event, {})
        if kind not in kinds and len(kinds) >= MAX_THROTTLED_KINDS:
            kind = ""
        now = monotonic()
        last_at, suppressed = kinds.get(kind, (-math.inf, 0))
        due = now - last_at >= THROTTLE_INTERVAL
        kinds[kind] = (now, 0) if due else (last_at, suppressed + 1)
        if due and suppressed:
            fields["more"] = suppressed
        self.emit(event, level if due else logging.DEBUG, **fields)
        return due

    def emit_exception(self, event: str, error: BaseException, **fields: Any) -> None:
        """Emit an exception that needs a fix, at ERROR and with its traceback."""
        self.emit(event, logging.ERROR, error=error, **fields)
