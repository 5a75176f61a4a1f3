"""Work for many connections, cut into pieces, so that the turns of the event loop stay short.

On one event loop sharding is about latency and not about locks: everything runs in one thread anyway, but what runs
without a pause delays everybody else's messages, pongs and HTTP requests. Each connection belongs to a shard. Work is
done shard by shard, and when the loop has been held for longer than `MAX_BLOCK` the rest waits for the next turn. More
shards mean finer cuts; with one shard there are none. A shard of very many is cut too, where the clock is looked at.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from asyncio import _get_running_loop as running_loop  # None where no loop runs, and no exception
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, Protocol, TypeVar

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.errors import WrongLoopError
from fastapi_ws_stabilizer.events import EventBus

MIN_COMPACTED: Final = 64
"""Entries of a deadline heap below which removed ones stay in it."""

MAX_BLOCK: Final = 0.005
"""Seconds after which the event loop gets a turn between two shards."""


CHECK_INTERVAL: Final = 256
"""Workers of a shard between two looks at the clock."""


class Flushable(Protocol):
    """Something that has work to do soon."""

    def flush_now(self) -> None:
        """Do it. Must not wait."""


class FlushScheduler:
    """Runs the work of connections in the next turns of the event loop.

    What is queued for one client within one turn is sent together at its end: that is what makes a burst cheap.

    Args:
        num_shards: How many shards there are.
        events: Where a worker that fails is reported. The others go on.
        loop: The event loop that all this happens on; `None` where nothing is checked.

    Attributes:
        loop: That event loop.
        sends: How many times user code has sent something.
    """

    __slots__ = ("_context", "_divided", "_events", "_ready", "_scheduled", "_shards", "_turned_at", "loop", "sends")

    def __init__(self, num_shards: int, events: EventBus, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop
        self.sends = 0
        self._shards: tuple[list[Flushable], ...] = tuple([] for _ in range(num_shards))
        self._divided = num_shards > 1
        self._ready: list[list[Flushable]] = []  # the shards in which somebody waits, in the order in which it began
        self._events = events
        self._context = contextvars.copy_context()  # not that of the connection that happens to book a turn first
        self._scheduled = False
        self._turned_at = monotonic()  # when the event loop is known to have turned

    def check_loop(self) -> None:
        """Raise unless this is the event loop that the connections belong to.

        Outboxes and transports have no locks: what another thread writes gets between the bytes of a frame.

        Raises:
            WrongLoopError: Another event loop runs here, or none.
        """
        loop = self.loop
        if loop is not None and running_loop() is not loop and not loop.is_closed():
            raise WrongLoopError

    def pending(self, shard: int) -> list[Flushable]:
        """The list of those in a shard who wait for a turn. Whoever puts the first into one calls `book` with it."""
        return self._shards[shard]

    def schedule(self, pending: list[Flushable], worker: Flushable) -> None:
        """Let a worker take its turn soon."""
        if not pending:
            self.mark_ready(pending)
        pending.append(worker)

    def mark_ready(self, pending: list[Flushable]) -> None:
        """See to it that a list is looked at, in which nobody has waited until now."""
        self._ready.append(pending)
        if not self._scheduled:
            self._schedule()

    def exceeded(self) -> bool:
        """Whether the event loop may have been held for longer than `MAX_BLOCK`: whoever asks lets it turn then.

        A sender that computes between two messages gives it no other occasion, and transports and other connections
        need one. Asked for each message that user code sends, so it is one look at the clock.
        """
        self.sends += 1
        now = monotonic()
        if now - self._turned_at < MAX_BLOCK:
            return False
        self._turned_at = now
        return True

    def _schedule(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._run, context=self._context)

    def _run(self) -> None:
        until = monotonic() + MAX_BLOCK
        self._scheduled = False
        waiting, self._ready = self._ready, []
        try:
            while waiting:
                self._work_off(waiting, until)
                if monotonic() > until:
                    break
        finally:  # who has waited longest goes first next time, also if somebody has raised what is not ours to catch
            self._turned_at = monotonic()  # not before: a sender that goes on after a long turn has held nothing yet
            self._ready = waiting + self._ready
            if self._ready and not self._scheduled:
                self._schedule()

    def _work_off(self, waiting: list[list[Flushable]], until: float) -> None:
        """Let those in the first shard that waits take their turns. If some are left, it stays the first one."""
        pending = waiting.pop(0)
        workers = tuple(pending)
        pending.clear()
        done = 0
        try:
            for worker in workers:
                done += 1
                try:
                    worker.flush_now()
                except Exception as error:  # ours to mend, and nobody else's connection may suffer from it
                    self._events.emit_exception("internal_task_failed", error, task=type(worker).__name__)
                if not done % CHECK_INTERVAL and self._divided and monotonic() > until:
                    break
        finally:
            if done < len(workers):
                self._ready = [shard for shard in self._ready if shard is not pending]  # where somebody has booked it
                pending[:0] = workers[done:]
                waiting.insert(0, pending)


class LoopBudget:
    """Tells a loop over many when it has held the event loop long enough."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since = monotonic()

    def exceeded(self) -> bool:
        """Whether `MAX_BLOCK` has passed since it was made or let go."""
        return monotonic() - self._since > MAX_BLOCK

    async def yield_to_loop(self) -> None:
        """Give the event loop a turn. Cancelling is safe."""
        await asyncio.sleep(0)
        self._since = monotonic()


class CallbackSemaphore:
    """At most `limit` pieces of work at one time; what comes later waits in line.

    A semaphore for code that runs in no task. Who finds no slot leaves a function that is called, once, when it may
    look again. It returns whether it will; who then needs no slot after all must `pass_on`.

    Attributes:
        limit: How many slots there are.
        taken: How many are taken now.
        line: Who waits.
    """

    __slots__ = ("limit", "taken", "waiters")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self.waiters: deque[Callable[[], bool]] = deque()

    def __len__(self) -> int:
        """How many wait in line."""
        return len(self.waiters)

    @property
    def free(self) -> bool:
        """Whether a slot can be taken."""
        return self.taken < self.limit

    def take(self) -> None:
        """Take a slot."""
        self.taken += 1

    def release(self) -> None:
        """Give a slot back and let the first in line look."""
        self.taken -= 1
        self.wake_next()

    def wait(self, look_again: Callable[[], bool]) -> None:
        """Stand in line."""
        self.waiters.append(look_again)

    def wake_next(self) -> None:
        """Let the first in line that wants to look, if there is a slot."""
        while self.waiters and self.free:
            if self.waiters.popleft()():
                break


class Deadline(Protocol):
    """Entry of a `DeadlineHeap`: a connection, and when to check it.

    Attributes:
        due: Time of the next check, on the monotonic clock.
        recipient: The connection; `None` once the entry is removed.
    """

    due: float
    recipient: Any

    def __lt__(self, other: Any) -> bool:
        """Whether this entry is due first."""


D = TypeVar("D", bound=Deadline)


class DeadlineHeap(Generic[D]):
    """Deadlines of many connections on one timer.

    A removed entry stays in the heap without its connection, until it is due or most of the heap is such entries.

    Args:
        on_due: Called with the time and the delay of the call in seconds. It takes entries with `pop`.
        coalesce: Seconds that a check may be late, so that one event loop iteration handles many.
    """

    def __init__(self, on_due: Callable[[float, float], None], coalesce: float) -> None:
        self._on_due = on_due
        self._coalesce = coalesce
        self._entries: list[D] = []
        self._count = 0
        self._context = contextvars.copy_context()  # not the context of the connection that sets the timer
        self.timer: asyncio.TimerHandle | None = None
        self.timer_due = 0.0

    def __len__(self) -> int:
        """Entries that are not removed."""
        return self._count

    @property
    def size(self) -> int:
        """Entries in the heap, with removed ones."""
        return len(self._entries)

    def push(self, entry: D) -> None:
        """Add an entry, with its connection."""
        self._count += 1
        heapq.heappush(self._entries, entry)

    def pop(self, now: float) -> D | None:
        """Take out the first entry that is due; `None` if no entry is."""
        while self._entries and self._entries[0].due <= now:
            entry = heapq.heappop(self._entries)
            if entry.recipient is not None:
                self._count -= 1
                return entry
        return None

    def remove(self, entry: D) -> None:
        """Remove an entry that is in the heap."""
        entry.recipient = None
        self._count -= 1
        if len(self._entries) > MIN_COMPACTED and len(self._entries) > 2 * self._count:
            self._entries = [one for one in self._entries if one.recipient is not None]
            heapq.heapify(self._entries)

    def arm(self) -> None:
        """Set the timer to the first entry."""
        if not self._entries:
            return
        due = self._entries[0].due + self._coalesce
        if self.timer is not None:
            if self.timer_due <= due:
                return
            self.timer.cancel()
        self.timer_due = due
        self.timer = asyncio.get_running_loop().call_later(
            max(0.0, due - monotonic()), self._on_timer, context=self._context
        )

    def _on_timer(self) -> None:
        self.timer = None
        now = monotonic()
        try:
            self._on_due(now, now - self.timer_due)
        finally:
            self.arm()  # even if one check raised, the others must run in time

    def stop(self) -> None:
        """Drop all entries and the timer."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        for entry in self._entries:
            entry.recipient = None
        self._entries.clear()
        self._count = 0
