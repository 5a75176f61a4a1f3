"""Memory budget: a running sum of the bytes held for clients, and the eviction order.

Each queue, buffer and dict that holds something for a client adds to one sum and subtracts from it, so reading the sum
costs nothing. A shared message counts once: the first holder adds it, and the last one to release it subtracts it. A
message that is queued and sent in the same event loop iteration is not counted.

Memory of closed connections is evicted first. Then come detached clients, the one that detached first before the
others. Connected clients come last, by policy:

- `lru`: the client with the oldest last message first. Replies to pings do not count as messages.
- `fifo`: the client that connected first. A reconnect counts as a new connection.
- `oldest`: the client with the oldest last delivery first.

A client that holds no memory is not in the order, because its eviction would free nothing. The order is a heap that is
corrected when it is read. A message only changes the client's `moment`, and a client found to hold nothing leaves the
heap until `on_nonzero` is called for it. So the cost of a read is proportional to the number of changes since the last
read.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from typing import Final, Literal, Protocol

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.errors import MemoryLimitExceededError

Policy = Literal["lru", "fifo", "oldest"]

SLICE: Final = 0.005
"""Seconds of measuring or evicting before yielding to the event loop."""

_CLOSED: Final = 0
_DETACHED: Final = 1
_ATTACHED: Final = 2

_MAX_STALE: Final = 64
"""Stale heap entries above which the heap is rebuilt, if they are also more than half of it."""


FRAME_OVERHEAD_BYTES: Final = 256
"""Bytes of a message beside its payload: object, string headers and queue entries."""

UNREAD_OVERHEAD_BYTES: Final = 72
"""Bytes of a message beside its payload while it waits to be read."""


class SharedMessage(Protocol):
    """Message that several queues may hold."""

    size: int
    refcount: int


class Evictable(Protocol):
    """Holder of memory: a connection, a session or a detached state."""

    @property
    def connection_id(self) -> str:
        """Its unique id."""

    @property
    def memory_usage(self) -> int:
        """Bytes that are held for it."""

    def evict(self) -> None:
        """End it now to free memory. This removes it from the budget and releases what it holds."""

    def on_limit_exceeded(self, held: int) -> None:
        """End it, because it holds more memory than one client may."""


class Remeasurable(Protocol):
    """Dict of a client that may have grown inside its values without a notification."""

    owner: Evictable | None
    """Client that it belongs to."""
    counted_bytes: int
    """Bytes of it that are in the budget."""

    def flush_accounting(self) -> int:
        """Move its uncounted bytes into the budget; return their number. Event loop only."""

    def remeasure(self) -> Iterator[None]:
        """Measure it again, one entry per step, and correct the budget."""


class _EvictionEntry:
    """Position of a client in the eviction order.

    Attributes:
        client: The client.
        rank: Whether it is closed, detached or connected.
        moment: Value of the policy. The lowest is evicted first.
        heap_item: Its heap item, perhaps with an old moment; `None` while it holds no memory.
    """

    __slots__ = ("client", "heap_item", "moment", "rank")

    def __init__(self, client: Evictable) -> None:
        self.client = client
        self.rank = self.moment = 0
        self.heap_item: tuple[int, int, _EvictionEntry] | None = None


class MemoryBudget:
    """Memory sum, limits and eviction order of one manager on one event loop.

    Args:
        max_total: Maximum bytes held for all clients.
        max_each: Maximum bytes held for one client.
        policy: Eviction policy.
        check_interval: Seconds between two measurements of values that may have grown without a notification.

    Attributes:
        total: Bytes that are held.
        max_each: As above.
        limit: `max_total`, or infinity.
        evicts: Whether clients may be evicted, because there is a `max_total`.
        watches_input: Whether `on_inbound` must be called.
        output_counts: Whether `on_delivered` must be called.
        described: Bytes of presence metadata, by the connection id of the recipient that holds them.
    """

    def __init__(
        self,
        max_total: int | None = None,
        max_each: int | None = None,
        policy: Policy = "lru",
        check_interval: float = 60.0,
    ) -> None:
        self.total = 0
        self.described: dict[str, int] = {}
        self.limit: float = math.inf if max_total is None else max_total
        self.max_each = max_each
        self.evicts = max_total is not None
        self.watches_input = self.evicts or max_each is not None
        self._input_counts = self.evicts and policy == "lru"
        self.output_counts = self.evicts and policy == "oldest"
        self._entries: dict[object, _EvictionEntry] = {}
        self._heap: list[tuple[int, int, _EvictionEntry]] = []
        self._moments = itertools.count(1)
        self._pinned: Counter[Evictable] = Counter()
        self._measured: dict[int, Remeasurable] = {}
        self._interval = check_interval
        self._timer: asyncio.TimerHandle | None = None
        self._measurement: Iterator[None] | None = None  # iterator of the unfinished measurement
        self._eviction: asyncio.Handle | None = None
        self._context = contextvars.copy_context()  # not the context of the connection that sets the timer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0

    def bind_loop(self) -> None:
        """Bind to the running event loop. Called for each connection, always on the same loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    @property
    def is_other_thread(self) -> bool:
        """Whether this is another thread, in which nothing of the event loop may be touched."""
        return threading.get_ident() != self._thread

    # ── held bytes ──

    def retain(self, message: SharedMessage) -> None:
        """Add one holder to a message."""
        if not message.refcount:
            self.total += message.size + FRAME_OVERHEAD_BYTES
            if self.total > self.limit:
                self.schedule_eviction()
        message.refcount += 1

    def release(self, message: SharedMessage) -> None:
        """Remove one holder from a message."""
        message.refcount -= 1
        if not message.refcount:
            self.total -= message.size + FRAME_OVERHEAD_BYTES

    def add(self, size: int) -> None:
        """Add bytes that only one client holds, or subtract them if `size` is negative."""
        self.total += size
        if self.total > self.limit:
            self.schedule_eviction()

    def describe(self, member_id: str, size: int) -> None:
        """Add bytes to a recipient's presence metadata, or subtract them if `size` is negative."""
        self.described[member_id] = held = self.described.get(member_id, 0) + size
        if not held:
            del self.described[member_id]
        self.add(size)

    # ── eviction order ──

    def attach(self, client: Evictable) -> None:
        """Rank a client as connected."""
        self._rank(client, _ATTACHED)

    def detach(self, client: Evictable) -> None:
        """Rank a client as detached."""
        self._rank(client, _DETACHED)

    def mark_closed(self, client: Evictable) -> None:
        """Rank what a closed connection still holds before all other clients."""
        self._rank(client, _CLOSED)

    def remove(self, client: Evictable) -> None:
        """Remove an ended client. Does nothing if it is not there."""
        entry = self._entries.pop(client, None)
        if entry is not None:
            entry.heap_item = None

    def on_nonzero(self, client: object) -> None:
        """Add a client to the eviction order, because it may hold memory now."""
        entry = self._entries.get(client)
        if entry is not None and entry.heap_item is None:
            self._push(entry)

    def on_inbound(self, client: Evictable) -> None:
        """Record a message from a client, and check its limit. Hot path."""
        if self.evicts:
            entry = self._entries.get(client)
            if entry is not None and entry.rank == _ATTACHED:
                if self._input_counts:
                    entry.moment = next(self._moments)
                if entry.heap_item is None:
                    self._push(entry)
        if self.max_each is not None:
            self.check_limit(client)

    def on_delivered(self, client: Evictable) -> None:
        """Record a delivery to a client."""
        entry = self._entries.get(client)
        if entry is not None and entry.rank == _ATTACHED:
            entry.moment = next(self._moments)

    @contextmanager
    def pinned(self, client: Evictable | None) -> Iterator[None]:
        """Protect a client from eviction while it resumes."""
        if client is None:
            yield
            return
        self._pinned[client] += 1
        try:
            yield
        finally:
            self._pinned[client] -= 1
            if not self._pinned[client]:
                del self._pinned[client]

    def _rank(self, client: Evictable, rank: int) -> None:
        if not self.evicts:
            return
        entry = self._entries.get(client)
        if entry is None:
            entry = self._entries[client] = _EvictionEntry(client)
        entry.rank, entry.moment, entry.heap_item = rank, next(self._moments), None
        if client.memory_usage:
            self._push(entry)

    def _push(self, entry: _EvictionEntry) -> None:
        entry.heap_item = entry.rank, entry.moment, entry
        if len(self._heap) > 2 * len(self._entries) + _MAX_STALE:
            self._heap = [one.heap_item for one in self._entries.values() if one.heap_item is not None]
            heapify(self._heap)
        else:
            heappush(self._heap, entry.heap_item)

    # ── the limits ──

    def check_limit(self, client: Evictable) -> None:
        """End a client if it holds more than one client may."""
        if self.max_each is not None and (held := client.memory_usage) > self.max_each:
            client.on_limit_exceeded(held)

    def ensure_room(self, client: Evictable | None, size: int) -> None:
        """Make room for bytes that a client is going to hold. Evicts other clients, never this one.

        Raises:
            MemoryLimitExceededError: The bytes exceed the limit of one client, or no eviction makes enough room.
        """
        if size <= 0:
            return
        held = 0 if client is None else client.memory_usage
        if self.max_each is not None and held + size > self.max_each:
            raise MemoryLimitExceededError("max_memory_per_connection", self.max_each, held + size)
        if self.total + size <= self.limit:
            return
        if self.is_other_thread and held + size <= self.limit:
            return  # the event loop counts it, and makes room there
        pinned_bytes = sum(one.memory_usage for one in self._pinned if one is not client)
        if held + pinned_bytes + size <= self.limit:  # else no eviction could make enough room
            self._evict_until_free(size, client)
        if self.total + size > self.limit:
            raise MemoryLimitExceededError("max_total_memory", int(self.limit), self.total + size)

    def schedule_eviction(self) -> None:
        """Evict clients at the end of this event loop iteration if the limit is still exceeded then."""
        if self._eviction is None and self._loop is not None:
            self._eviction = self._loop.call_soon(self._evict_now, context=self._context)

    def _evict_now(self) -> None:
        self._eviction = None
        self._evict_until_free(0, None, until=monotonic() + SLICE)

    def _evict_until_free(self, size: int, excluded: Evictable | None, until: float = math.inf) -> None:
        """Evict clients until there is room for `size` bytes or no client holds memory.

        After the time `until`, the next event loop iteration continues.
        """
        while self.total + size > self.limit:
            client = self._pop_first(excluded)
            if client is None:
                return
            self.remove(client)
            client.evict()
            if monotonic() >= until:
                self.schedule_eviction()
                return

    def _pop_first(self, excluded: Evictable | None) -> Evictable | None:
        """Remove and return the first client that holds memory."""
        heap, skipped = self._heap, []
        found = None
        while heap and found is None:
            item = heappop(heap)
            entry = item[2]
            if item is not entry.heap_item:
                continue  # it was removed or ranked again
            if entry.client is excluded or entry.client in self._pinned:
                skipped.append(item)
            elif not entry.client.memory_usage:
                entry.heap_item = None
            elif item[1] != entry.moment:
                entry.heap_item = item[0], entry.moment, entry
                heappush(heap, entry.heap_item)
            else:
                found = entry.client
        for item in skipped:
            heappush(heap, item)
        return found

    # ── growth without notification ──

    def changed(self, measured: Remeasurable) -> None:
        """Count the change of a dict. Can be called from any thread."""
        if not self.is_other_thread:
            self._flush_accounting(measured)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._schedule_accounting, measured, context=self._context)

    def _schedule_accounting(self, measured: Remeasurable) -> None:
        """Count what a thread has written, and evict other clients than the writer if needed."""
        self._flush_accounting(measured)
        self._evict_until_free(0, measured.owner)

    def _flush_accounting(self, measured: Remeasurable) -> None:
        self.add(measured.flush_accounting())
        if self.evicts and measured.owner is not None:
            self.on_nonzero(measured.owner)
        if not measured.counted_bytes:  # it is empty, or was detached since a thread wrote to it
            self._measured.pop(id(measured), None)
            return
        self._measured[id(measured)] = measured
        if self._timer is None:
            self._set_timer(self._interval)

    def _set_timer(self, delay: float) -> None:
        if self._loop is not None:
            self._timer = self._loop.call_later(delay, self._on_timer, context=self._context)

    def _on_timer(self) -> None:
        """Measure for up to `SLICE` seconds, and schedule the rest."""
        measurement, self._measurement = self._measurement or self._measure_all(), None
        until = monotonic() + SLICE
        for _ in measurement:
            if monotonic() >= until:
                self._measurement = measurement
                self._set_timer(0.0)
                return
        self._timer = None  # a timer that is still set here stops `_flush_accounting` from setting another one
        if self._measured:
            self._set_timer(self._interval)

    def _measure_all(self) -> Iterator[None]:
        for measured in list(self._measured.values()):
            if id(measured) in self._measured:
                yield from measured.remeasure()

    def stop(self) -> None:
        """Drop the timers and all clients."""
        for timer in (self._timer, self._eviction):
            if timer is not None:
                timer.cancel()
        self._timer = self._eviction = self._measurement = None
        self._entries.clear()
        self._heap.clear()
        self._measured.clear()
