"""Pacing of CPython's garbage collector while many connections are open.

CPython runs a full collection whenever the objects of the process have grown by a quarter. It visits every object, so
with thousands of open connections it blocks the event loop for hundreds of milliseconds, several times while clients
connect. Open connections are not garbage, so these visits find nothing.

The pacer freezes (`gc.freeze`) what a young collection leaves, so that automatic collections visit new objects only.
That costs nothing. The young collections stay as frequent as they are: with higher thresholds each takes longer, and
all together take longer too, because their objects have left the CPU's cache.

Garbage with cycles among frozen objects needs a full collection of everything. The pacer runs it when memory has grown
and the event loop is quiet, or has grown by a bound.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic, thread_cpu
from fastapi_ws_stabilizer.events import EventBus

MIN_CONNECTIONS: Final = 100
"""Open connections of the process from which the collector is paced. With half of them, the pacing ends."""

CHECK_INTERVAL: Final = 1.0
"""Seconds between two checks of the growth, while the collector is paced."""

MIN_GROWTH: Final = 200_000
"""Growth of memory, in blocks of about 100 bytes, up to which no full collection runs. The interpreter's free lists can
hold a quarter of it."""

MAX_GROWTH: Final = 0.5
"""Growth of memory, as a fraction of what the last full collection left, from which the next one is not delayed."""

MAX_BLOCKS_PER_CONNECTION: Final = 1000
"""Growth by each new connection that is allowed in addition, in blocks. A connection of an empty endpoint has
250 to 330 blocks."""

QUIET_GROWTH: Final = 0.5
"""Fraction of the allowed growth from which a full collection runs if the event loop is quiet."""

QUIET_CHECKS: Final = 2
"""Checks in a row that have to find little load until the event loop is quiet."""

MAX_QUIET_LOAD: Final = 0.1
"""Load of the event loop's thread, in CPU seconds per second, up to which it is little."""

MAX_QUIET_DELAY: Final = 0.02
"""Seconds by which a check may be late while the load is little. A process that gets no CPU has little load too."""

MAX_FREEZES: Final = 500
"""Young collections between two checks that the pacer follows. If the event loop is blocked for longer, the interpreter
collects as usual. A storm of connects has about 100 per second."""

MAX_FROZEN_BY_INTERPRETER: Final = 1000
"""Frozen objects at the start from which the application has frozen its own. CPython 3.12 starts with 375."""

_THRESHOLDS: Final = {(3, 10): (700, 10, 10), (3, 11): (700, 10, 10), (3, 12): (700, 10, 10), (3, 13): (2000, 10, 10)}
"""Default thresholds of the versions of CPython on which the pacing is measured. 3.14 has another collector."""

_YOUNGEST: Final = 0
_OLDEST: Final = 2

_IS_MEASURED: Final = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
_DEFAULT_THRESHOLDS: Final = _THRESHOLDS.get(sys.version_info[:2]) if _IS_MEASURED else None


class PacedConnections:
    """Open connections of one manager, for the pacer of the process.

    Args:
        events: Event bus of the manager.
        count: Function that returns the number of open connections. Any thread may call it.
        enabled: Whether the collector is paced for them. Otherwise full collections are measured only.

    Attributes:
        loop: Event loop of the manager, from the start on.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, events: EventBus, count: Callable[[], int], *, enabled: bool) -> None:
        self.events = events
        self.count = count
        self._enabled = enabled

    def start(self) -> None:
        """Take part in the pacing on the running event loop. Further calls change nothing."""
        loop = asyncio.get_running_loop()
        if getattr(self, "loop", None) is not loop:  # the previous one has ended
            PACER.remove(self)
            self.loop = loop
        PACER.add(self)

    def stop(self) -> None:
        """Leave the pacing. The last manager that leaves gives the collector back as it was found."""
        PACER.remove(self)

    @property
    def is_paced(self) -> bool:
        """Whether the collector is paced for these connections. It is not once their event loop has ended."""
        return self._enabled and not self.loop.is_closed()


class CollectorPacer:
    """Pacer of the garbage collector for all managers of the process.

    It has no timer below `MIN_CONNECTIONS` open connections, and does nothing for a connection: the collector itself
    calls it. That happens in any thread, at any moment, so `_on_collection` takes no lock and emits nothing.

    Attributes:
        full_collections: Number of full collections since the first manager started, by whatever started them.
        full_seconds: Seconds that they took together.
    """

    def __init__(self) -> None:
        self.full_collections = 0
        self.full_seconds = 0.0
        self._lock = threading.Lock()
        self._members: tuple[weakref.ref[PacedConnections], ...] = ()
        self._is_suited = False
        self._collection_began = 0.0
        self._host: PacedConnections | None = None  # runs the checks on its event loop; None while nothing is paced
        self._timer: asyncio.TimerHandle | None = None
        self._freezes_left = 0
        self._live_blocks = 0  # after the last full collection, or when the pacing started
        self._live_connections = 0
        self._most_connections = 0  # since then
        self._checked_at = 0.0
        self._cpu = 0.0
        self._quiet_checks = 0

    def add(self, member: PacedConnections) -> None:
        """Add the connections of a manager. Nothing happens if they are added already."""
        with self._lock:
            members = [one for one in self._members if one() not in (None, member)]
            self._members = (*members, weakref.ref(member))
            if self._on_collection not in gc.callbacks:
                has_own_frozen = gc.get_freeze_count() > MAX_FROZEN_BY_INTERPRETER
                self._is_suited = not has_own_frozen and sys.getallocatedblocks() > 0  # 0: another allocator is set
                gc.callbacks.append(self._on_collection)

    def remove(self, member: PacedConnections) -> None:
        """Remove the connections of a manager, from its event loop. Nothing happens if they are not added."""
        with self._lock:
            self._members = tuple(one for one in self._members if one() not in (None, member))
            if self._host is member:
                self._end()
            if not self._members and self._on_collection in gc.callbacks:
                gc.callbacks.remove(self._on_collection)

    def _paced(self) -> list[PacedConnections]:
        return [member for one in self._members if (member := one()) is not None and member.is_paced]

    def _has_default_collector(self) -> bool:
        """Return whether the application leaves the collector to the interpreter."""
        return self._is_suited and gc.isenabled() and gc.get_threshold() == _DEFAULT_THRESHOLDS and not gc.get_debug()

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        """Handle the start and the end of a collection."""
        generation = info["generation"]
        if generation == _YOUNGEST:
            return
        if phase == "start":
            self._collection_began = monotonic()
            return
        if generation == _OLDEST:
            self.full_collections += 1
            self.full_seconds += monotonic() - self._collection_began
        host = self._host
        if host is not None and not host.is_paced:  # its event loop has ended without a shutdown
            self._end()
            host = None
        if host is not None:
            if self._freezes_left and self._has_default_collector():
                self._freezes_left -= 1
                self._freeze()
        elif self._has_default_collector():
            paced = self._paced()
            if sum(member.count() for member in paced) >= MIN_CONNECTIONS:
                self._start(paced[0])

    def _start(self, host: PacedConnections) -> None:
        self._host = host  # first, because the event loop of another thread may begin before the call returns
        self._freezes_left = MAX_FREEZES
        try:
            host.loop.call_soon_threadsafe(self._begin, host, context=contextvars.Context())
        except RuntimeError:  # the event loop has just been closed
            self._host = None
            return
        self._freeze()

    def _freeze(self) -> None:
        gc.freeze()
        if self._host is None:  # the pacing has just ended in another thread
            gc.unfreeze()

    def _begin(self, host: PacedConnections) -> None:
        """Begin the checks, on the event loop of a manager."""
        if self._host is host:
            self._quiet_checks = 0
            self._note_live()
            self._arm(host)
            host.events.emit_throttled("gc_pacing_started", logging.INFO, "", connections=self._live_connections)

    def _end(self) -> None:
        gc.unfreeze()
        host, self._host = self._host, None
        timer, self._timer = self._timer, None
        if host is not None and timer is not None and not host.loop.is_closed():
            timer.cancel()

    def _arm(self, host: PacedConnections) -> None:
        self._checked_at, self._cpu = monotonic(), thread_cpu()
        self._timer = host.loop.call_later(CHECK_INTERVAL, self._check, host, context=contextvars.Context())

    def _check(self, host: PacedConnections) -> None:
        self._timer = None
        self._freezes_left = MAX_FREEZES
        paced = self._paced()
        if host not in paced or not self._has_default_collector():
            self._end()
            return
        self._note_load()
        is_quiet = self._quiet_checks >= QUIET_CHECKS
        connections = sum(member.count() for member in paced)
        self._most_connections = max(connections, self._most_connections)
        grown = sys.getallocatedblocks() - self._live_blocks
        # While many connections close, their memory counts as theirs until it is free or the event loop is quiet.
        if grown > self._allowed_growth(self._most_connections) or (
            is_quiet and grown > QUIET_GROWTH * self._allowed_growth(connections)
        ):
            self._collect(host)
        if is_quiet and connections < MIN_CONNECTIONS / 2:
            self._end()
            host.events.emit("gc_pacing_ended", logging.DEBUG, connections=connections)
        elif self._host is host:  # a listener of `gc_collected` may have stopped the manager
            self._arm(host)

    def _note_load(self) -> None:
        elapsed = monotonic() - self._checked_at
        has_little_load = thread_cpu() - self._cpu <= MAX_QUIET_LOAD * elapsed
        is_late = elapsed - CHECK_INTERVAL > MAX_QUIET_DELAY
        self._quiet_checks = self._quiet_checks + 1 if has_little_load and not is_late else 0

    def _allowed_growth(self, connections: int) -> float:
        """Return the blocks by which memory may grow before a full collection, with a number of open connections."""
        new_connections = max(0, connections - self._live_connections)
        allowed = MAX_GROWTH * self._live_blocks + MAX_BLOCKS_PER_CONNECTION * new_connections
        return max(MIN_GROWTH / QUIET_GROWTH, allowed)

    def _collect(self, host: PacedConnections) -> None:
        """Run a full collection of all objects. If another thread is collecting, leave it to the next check."""
        gc.unfreeze()
        before, began = self.full_collections, monotonic()
        found = gc.collect()  # `_on_collection` freezes what is left
        seconds = monotonic() - began
        if self.full_collections == before:
            return
        self._note_live()
        host.events.emit("gc_collected", logging.DEBUG, seconds=seconds, found=found)

    def _note_live(self) -> None:
        self._live_blocks = sys.getallocatedblocks()
        self._live_connections = self._most_connections = sum(member.count() for member in self._paced())


PACER: Final = CollectorPacer()
"""The pacer of this process, because a process has one collector."""
