"""What is held for clients, as a running sum, and who goes when it is too much.

Every queue, log and dict that keeps something of a client's adds to one sum and takes away from it, so reading it costs
nothing. A message that many hold is there once, and counts once: the first who holds it adds it, the last who lets go
takes it away. What is queued and sent in the same turn of the event loop is held by nobody.

Clients stand in the order in which they would go. First what connections that have ended still hold, then those that
are away, the one that left first before all others. Then those that are here, by policy:

- `lru`: whose last message came longest ago. Answers to pings are no messages.
- `fifo`: who has come first. Who comes back comes anew.
- `oldest`: to whom the last message was delivered longest ago.

Only who holds something stands in line: nobody goes whose end would free nothing. The line is a heap that is put right
when it is looked at. Whoever speaks or is sent something is only given a new moment, and who is found to hold nothing
leaves the line until `holds` is called for it, so each look is paid for by what has happened since the one before.
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
"""Seconds of measuring, or of letting clients go, before the event loop gets a turn."""

_ENDED: Final = 0
_DETACHED: Final = 1
_HERE: Final = 2

_MAX_STALE: Final = 64
"""Entries of the line that mean nothing any more, if they are more than half of it, before it is made anew."""


FRAME_OVERHEAD_BYTES: Final = 256
"""What a message takes beside its payload: its object, the heads of its strings, its places in queues."""

UNREAD_OVERHEAD_BYTES: Final = 72
"""The same of one that waits to be read."""


class SharedMessage(Protocol):
    """A message that several may hold."""

    size: int
    refcount: int


class Evictable(Protocol):
    """Who holds something: a connection, a session, or what a client has left."""

    @property
    def connection_id(self) -> str:
        """Its id: no other has the same."""

    @property
    def memory_usage(self) -> int:
        """Bytes that are held for it."""

    def evict(self) -> None:
        """End it now, because room is needed. It leaves the ledger by that, and lets go of what it holds."""

    def on_limit_exceeded(self, held: int) -> None:
        """It holds more than one client may: end it."""


class Remeasurable(Protocol):
    """A dict of a client's, which may have grown inside without telling."""

    owner: Evictable | None
    """For whom it is kept."""
    counted_bytes: int
    """How much of it is in the sum."""

    def flush_accounting(self) -> int:
        """How much more it holds than is in the sum, where it is from now on. On the event loop only."""

    def remeasure(self) -> Iterator[None]:
        """Measure it anew, one entry at each step, and put the sums right."""


class _EvictionEntry:
    """Where a client would stand.

    Attributes:
        client: Who it is.
        rank: Whether it has ended, is away or is here.
        moment: What the policy asks for: the lower it is, the earlier it goes.
        item: By what it stands in line; `None` while it holds nothing. Its moment may be an old one.
    """

    __slots__ = ("client", "heap_item", "moment", "rank")

    def __init__(self, client: Evictable) -> None:
        self.client = client
        self.rank = self.moment = 0
        self.heap_item: tuple[int, int, _EvictionEntry] | None = None


class MemoryBudget:
    """The sum, the order and the limits of one manager on one event loop.

    Args:
        max_total: Most bytes that are held for all.
        max_each: Most bytes that are held for one.
        policy: Who goes first.
        check_interval: Seconds between two looks into what may have grown without telling.

    Attributes:
        total: Bytes that are held.
        max_each: As above.
        limit: `max_total`, or infinity.
        orders: Whether anybody may have to go for others.
        watches_input: Whether `heard` is to be called.
        described: Bytes of presence metadata, by the connection id of the member that they belong to.
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
        self._line: list[tuple[int, int, _EvictionEntry]] = []
        self._moments = itertools.count(1)
        self._spared: Counter[Evictable] = Counter()
        self._measured: dict[int, Remeasurable] = {}
        self._interval = check_interval
        self._timer: asyncio.TimerHandle | None = None
        self._looking: Iterator[None] | None = None  # the look that is not finished yet
        self._due: asyncio.Handle | None = None
        self._context = contextvars.copy_context()  # not that of the connection that happens to set the timer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0

    def begin(self) -> None:
        """Work on the running event loop. Called whenever somebody comes; it is always the same one."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    @property
    def is_elsewhere(self) -> bool:
        """Whether we are in a thread of a user's function, where nothing of the event loop may be touched."""
        return threading.get_ident() != self._thread

    # ── what is held ──

    def retain(self, message: SharedMessage) -> None:
        """Somebody holds a message."""
        if not message.refcount:
            self.total += message.size + FRAME_OVERHEAD_BYTES
            if self.total > self.limit:
                self.schedule_eviction()
        message.refcount += 1

    def release(self, message: SharedMessage) -> None:
        """Somebody lets a message go."""
        message.refcount -= 1
        if not message.refcount:
            self.total -= message.size + FRAME_OVERHEAD_BYTES

    def add(self, size: int) -> None:
        """Something is held that nobody else holds; or let go, where `size` is negative."""
        self.total += size
        if self.total > self.limit:
            self.schedule_eviction()

    def describe(self, member_id: str, size: int) -> None:
        """A member holds so much more presence metadata; or less, where `size` is negative."""
        self.described[member_id] = held = self.described.get(member_id, 0) + size
        if not held:
            del self.described[member_id]
        self.add(size)

    # ── who stands where ──

    def attach(self, client: Evictable) -> None:
        """A client has come, or has come back."""
        self._stand(client, _HERE)

    def detach(self, client: Evictable) -> None:
        """A client is away, and something is kept for it."""
        self._stand(client, _DETACHED)

    def mark_closed(self, client: Evictable) -> None:
        """What is left of a connection that has ended goes before everybody else."""
        self._stand(client, _ENDED)

    def remove(self, client: Evictable) -> None:
        """A client is over. Nothing happens if it was."""
        entry = self._entries.pop(client, None)
        if entry is not None:
            entry.heap_item = None

    def on_nonzero(self, client: object) -> None:
        """A client that may have held nothing holds something."""
        entry = self._entries.get(client)
        if entry is not None and entry.heap_item is None:
            self._line_up(entry)

    def on_inbound(self, client: Evictable) -> None:
        """A message has come from a client. Hot path."""
        if self.evicts:
            entry = self._entries.get(client)
            if entry is not None and entry.rank == _HERE:
                if self._input_counts:
                    entry.moment = next(self._moments)
                if entry.heap_item is None:
                    self._line_up(entry)
        if self.max_each is not None:
            self.check_limit(client)

    def on_delivered(self, client: Evictable) -> None:
        """A message was delivered to a client."""
        entry = self._entries.get(client)
        if entry is not None and entry.rank == _HERE:
            entry.moment = next(self._moments)

    @contextmanager
    def pinned(self, client: Evictable | None) -> Iterator[None]:
        """Let a client not go for others meanwhile: it is on its way back."""
        if client is None:
            yield
            return
        self._spared[client] += 1
        try:
            yield
        finally:
            self._spared[client] -= 1
            if not self._spared[client]:
                del self._spared[client]

    def _stand(self, client: Evictable, rank: int) -> None:
        if not self.evicts:
            return
        entry = self._entries.get(client)
        if entry is None:
            entry = self._entries[client] = _EvictionEntry(client)
        entry.rank, entry.moment, entry.heap_item = rank, next(self._moments), None
        if client.memory_usage:
            self._line_up(entry)

    def _line_up(self, entry: _EvictionEntry) -> None:
        entry.heap_item = entry.rank, entry.moment, entry
        if len(self._line) > 2 * len(self._entries) + _MAX_STALE:
            self._line = [one.heap_item for one in self._entries.values() if one.heap_item is not None]
            heapify(self._line)
        else:
            heappush(self._line, entry.heap_item)

    # ── the limits ──

    def check_limit(self, client: Evictable) -> None:
        """End a client if more is held for it than may be."""
        if self.max_each is not None and (held := client.memory_usage) > self.max_each:
            client.on_limit_exceeded(held)

    def reserve(self, client: Evictable | None, size: int) -> None:
        """Make room for something that a client is going to hold. Others go for it, if they must; it never does.

        Raises:
            MemoryLimitExceededError: It is more than one client may hold, or there is no room, whoever goes.
        """
        if size <= 0:
            return
        held = 0 if client is None else client.memory_usage
        if self.max_each is not None and held + size > self.max_each:
            raise MemoryLimitExceededError("max_memory_per_connection", self.max_each, held + size)
        if self.total + size <= self.limit:
            return
        if self.is_elsewhere and held + size <= self.limit:
            return  # it is counted on the event loop, and room is made there
        stay = sum(one.memory_usage for one in self._spared if one is not client)
        if held + stay + size <= self.limit:  # else nobody needs to go for what cannot be
            self._relieve(size, client)
        if self.total + size > self.limit:
            raise MemoryLimitExceededError("max_total_memory", int(self.limit), self.total + size)

    def schedule_eviction(self) -> None:
        """Let somebody go at the end of this turn of the event loop, if more is held then than may be."""
        if self._due is None and self._loop is not None:
            self._due = self._loop.call_soon(self._relieve_now, context=self._context)

    def _relieve_now(self) -> None:
        self._due = None
        self._relieve(0, None, until=monotonic() + SLICE)

    def _relieve(self, size: int, spared: Evictable | None, until: float = math.inf) -> None:
        """Let clients go until there is room for `size` bytes, or nobody is left who holds anything.

        What is not done by a moment is done in the next turn.
        """
        while self.total + size > self.limit:
            client = self._first(spared)
            if client is None:
                return
            self.remove(client)
            client.evict()
            if monotonic() >= until:
                self.schedule_eviction()
                return

    def _first(self, spared: Evictable | None) -> Evictable | None:
        """Who goes first of those that hold something."""
        line, aside = self._line, []
        found = None
        while line and found is None:
            item = heappop(line)
            entry = item[2]
            if item is not entry.heap_item:
                continue  # it has left, or stands elsewhere
            if entry.client is spared or entry.client in self._spared:
                aside.append(item)
            elif not entry.client.memory_usage:
                entry.heap_item = None
            elif item[1] != entry.moment:
                entry.heap_item = item[0], entry.moment, entry
                heappush(line, entry.heap_item)
            else:
                found = entry.client
        for item in aside:
            heappush(line, item)
        return found

    # ── what grows without telling ──

    def changed(self, measured: Remeasurable) -> None:
        """A dict has grown, or shrunk. Can be called from any thread."""
        if not self.is_elsewhere:
            self._flush_accounting(measured)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._schedule_accounting, measured, context=self._context)

    def _schedule_accounting(self, measured: Remeasurable) -> None:
        """A thread has written, for which room could not be made there: the writer is spared here too."""
        self._flush_accounting(measured)
        self._relieve(0, measured.owner)

    def _flush_accounting(self, measured: Remeasurable) -> None:
        self.add(measured.flush_accounting())
        if self.evicts and measured.owner is not None:
            self.on_nonzero(measured.owner)
        if not measured.counted_bytes:  # it is empty, or was let go since a thread has written
            self._measured.pop(id(measured), None)
            return
        self._measured[id(measured)] = measured
        if self._timer is None:
            self._set_timer(self._interval)

    def _set_timer(self, delay: float) -> None:
        if self._loop is not None:
            self._timer = self._loop.call_later(delay, self._on_timer, context=self._context)

    def _on_timer(self) -> None:
        """Measure for a while, and go on later with what is left."""
        looking, self._looking = self._looking or self._measure_all(), None
        until = monotonic() + SLICE
        for _ in looking:
            if monotonic() >= until:
                self._looking = looking
                self._set_timer(0.0)
                return
        self._timer = None  # until here it keeps those whose size has changed from setting another one
        if self._measured:
            self._set_timer(self._interval)

    def _measure_all(self) -> Iterator[None]:
        for measured in list(self._measured.values()):
            if id(measured) in self._measured:
                yield from measured.remeasure()

    def stop(self) -> None:
        """Let go of the timer and of everybody."""
        for timer in (self._timer, self._due):
            if timer is not None:
                timer.cancel()
        self._timer = self._due = self._looking = None
        self._entries.clear()
        self._line.clear()
        self._measured.clear()
