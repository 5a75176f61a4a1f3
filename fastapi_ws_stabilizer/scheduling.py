"""Work for many connections, divided into shards so that the iterations of the event loop stay short.

Sharding limits latency. All code runs in one thread, so work without a pause delays messages, pongs and HTTP requests
of all other clients. Each connection belongs to a shard. The scheduler works shard by shard. After `MAX_BLOCK`, the
other shards wait for the next iteration of the event loop. More shards divide the work more finely, and one shard does
not divide it. In a large shard, the scheduler also checks the clock every `CHECK_INTERVAL` connections.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from asyncio import _get_running_loop as running_loop  # returns None instead of raising if no loop runs
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, Protocol, TypeVar

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.errors import WrongLoopError
from fastapi_ws_stabilizer.events import EventBus

MIN_COMPACTED: Final = 64
"""Size of a deadline heap below which removed entries stay in it."""

MAX_BLOCK: Final = 0.005
"""Maximum seconds of work before the event loop can do other work."""


CHECK_INTERVAL: Final = 256
"""Workers of a shard between two reads of the clock."""


class Flushable(Protocol):
    """Worker that has data to flush soon."""

    def on_flush_due(self) -> None:
        """Write the queued data. Must not wait."""


class FlushScheduler:
    """Scheduler that flushes connections in the next iterations of the event loop.

    Messages that are queued for one client within one iteration are sent together, which makes bursts cheap.

    Args:
        num_shards: Number of shards.
        events: Event bus for a worker that fails. The other workers still run.
        loop: The event loop of the connections. With `None`, `check_loop` checks nothing.

    Attributes:
        loop: The event loop of the connections.
        sends: Number of sends by user code.
    """

    __slots__ = ("_context", "_divided", "_events", "_ready", "_scheduled", "_shards", "_yielded_at", "loop", "sends")

    def __init__(self, num_shards: int, events: EventBus, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop
        self.sends = 0
        self._shards: tuple[list[Flushable], ...] = tuple([] for _ in range(num_shards))
        self._divided = num_shards > 1
        self._ready: list[list[Flushable]] = []  # shards with a waiting worker, in the order in which they became ready
        self._events = events
        self._context = contextvars.copy_context()  # not the context of the connection that schedules first
        self._scheduled = False
        self._yielded_at = monotonic()  # last time at which other work is known to have run

    def check_loop(self) -> None:
        """Raise unless the event loop of the connections is the running one.

        Outboxes and transports have no locks, so a write from another thread could end up inside a frame.

        Raises:
            WrongLoopError: Another event loop or no event loop runs in this thread.
        """
        loop = self.loop
        if loop is not None and running_loop() is not loop and not loop.is_closed():
            raise WrongLoopError

    def pending(self, shard: int) -> list[Flushable]:
        """Return the list of waiting workers of a shard.

        Code that adds the first worker to an empty list calls `mark_ready` with the list.
        """
        return self._shards[shard]

    def schedule(self, pending: list[Flushable], worker: Flushable) -> None:
        """Flush a worker in one of the next iterations of the event loop."""
        if not pending:
            self.mark_ready(pending)
        pending.append(worker)

    def mark_ready(self, pending: list[Flushable]) -> None:
        """Schedule the list of a shard, which was empty before."""
        self._ready.append(pending)
        if not self._scheduled:
            self._schedule()

    def exceeded(self) -> bool:
        """Return whether the event loop may be blocked for longer than `MAX_BLOCK`. Then the caller has to yield.

        Transports and other connections need this, because a sender that computes between two messages does not yield
        otherwise. Hot path: called for each message of user code, it reads the clock once.
        """
        self.sends += 1
        now = monotonic()
        if now - self._yielded_at < MAX_BLOCK:
            return False
        self._yielded_at = now
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
                self._flush_shard(waiting, until)
                if monotonic() > until:
                    break
        finally:  # the shards that have waited longest go first next time, also after a BaseException
            self._yielded_at = monotonic()  # at the end: a sender that continues now has not blocked the loop itself
            self._ready = waiting + self._ready
            if self._ready and not self._scheduled:
                self._schedule()

    def _flush_shard(self, waiting: list[list[Flushable]], until: float) -> None:
        """Flush the workers of the first waiting shard. If some are left, the shard stays the first one."""
        pending = waiting.pop(0)
        count, workers = len(pending), iter(tuple(pending))
        pending.clear()
        try:
            for _ in range(0, count, CHECK_INTERVAL):
                for worker in itertools.islice(workers, CHECK_INTERVAL):
                    try:
                        worker.on_flush_due()
                    except Exception as error:  # a bug of this library, which must not affect other connections
                        self._events.emit_exception("internal_task_failed", error, task=type(worker).__name__)
                if self._divided and monotonic() > until:
                    break
        finally:
            if left := list(workers):
                self._ready = [shard for shard in self._ready if shard is not pending]  # a worker may have added it
                pending[:0] = left
                waiting.insert(0, pending)


class LoopBudget:
    """Time budget of a loop over many items, which says when the loop has to yield to the event loop."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since = monotonic()

    def exceeded(self) -> bool:
        """Return whether `MAX_BLOCK` has passed since the budget was created or `yield_to_loop` returned."""
        return monotonic() - self._since > MAX_BLOCK

    async def yield_to_loop(self) -> None:
        """Let the event loop do other work, and start a new budget. Cancelling is safe."""
        await asyncio.sleep(0)
        self._since = monotonic()


class PacedCalls:
    """Calls that take at most `MAX_BLOCK` seconds of an event loop iteration together. The others wait, in order.

    A call runs immediately, unless very many are made in one iteration.

    Args:
        events: Event bus for a call that fails after it has waited. The other calls still run.
    """

    __slots__ = ("_context", "_events", "_scheduled", "_until", "_waiting")

    def __init__(self, events: EventBus) -> None:
        self._events = events
        self._context = contextvars.copy_context()  # not the context of the code that makes the first call
        self._waiting: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._scheduled = False
        self._until = 0.0

    def __len__(self) -> int:
        """Return the number of waiting calls."""
        return len(self._waiting)

    def run(self, call: Callable[..., object], *args: Any) -> None:
        """Run a call now, or in one of the next iterations if this one has no time left.

        Raises:
            Exception: The call raised it now.
        """
        if not self._scheduled:
            self._schedule()
        if self._waiting or monotonic() >= self._until:
            self._waiting.append((call, args))
        else:
            call(*args)

    async def wait_for_earlier(self) -> None:
        """Wait until the calls that wait now have run. Cancelling is safe."""
        if self._waiting:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.run(_complete, turn)
            await turn

    def _schedule(self) -> None:
        self._scheduled = True
        self._until = monotonic() + MAX_BLOCK
        asyncio.get_running_loop().call_soon(self._run, context=self._context)

    def _run(self) -> None:
        self._scheduled = False
        if self._waiting:
            self._schedule()
        while self._waiting:
            call, args = self._waiting.popleft()
            try:
                call(*args)
            except Exception as error:  # a bug of this library, which must not affect other connections
                self._events.emit_exception("internal_task_failed", error, task="ws-paced")
            if monotonic() >= self._until:
                break


def _complete(turn: asyncio.Future[None]) -> None:
    if not turn.done():  # a cancelled task does not wait for it
        turn.set_result(None)


MAX_BATCH: Final = 1024
"""Maximum number of tasks that `PacedTasks` lets continue in one event loop iteration."""


class PacedTasks:
    """Gate through which tasks continue for at most `MAX_BLOCK` seconds of an event loop iteration, in order.

    A task passes immediately, unless very many arrive in one iteration. The work of a task is what it does after the
    gate until it waits for something else. It is not known before, so the gate wakes as many tasks as the last
    iteration had time for, or twice as many if there was time left. A woken task that finds no time waits again.
    """

    __slots__ = ("_batch", "_context", "_is_exceeded", "_passed", "_returned", "_scheduled", "_until", "_waiting")

    def __init__(self) -> None:
        self._context = contextvars.copy_context()  # not the context of the task that arrives first
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._returned: list[asyncio.Future[None]] = []  # tasks that were woken and found no time
        self._batch = 1
        self._passed = 0
        self._is_exceeded = self._scheduled = False
        self._until: float | None = None  # set by the first task of an iteration

    def __len__(self) -> int:
        """Return the number of waiting tasks."""
        return len(self._waiting) + len(self._returned)

    def try_enter(self) -> bool:
        """Return whether the task may continue in this iteration. If not, it has to call `enter`."""
        return not self._waiting and not self._returned and self._has_time()

    async def enter(self) -> None:
        """Continue in this iteration, or wait for one with time. Cancelling is safe."""
        if self.try_enter():
            return
        waiting: Callable[[asyncio.Future[None]], None] = self._waiting.append
        while True:
            turn = asyncio.get_running_loop().create_future()
            waiting(turn)
            await turn  # a cancellation cancels it, and `_on_next_iteration` skips it
            if self._has_time():
                return
            waiting = self._returned.append

    def _has_time(self) -> bool:
        now = monotonic()
        if self._until is None:
            self._until = now + MAX_BLOCK
        if not self._scheduled:
            self._schedule()
        if now >= self._until and self._passed:  # the first task of an iteration always passes
            self._is_exceeded = True
            return False
        self._passed += 1
        return True

    def _schedule(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._on_next_iteration, context=self._context)

    def _on_next_iteration(self) -> None:
        """Begin to count anew, and wake the next tasks, which then run before this is called again."""
        self._batch = max(1, self._passed) if self._is_exceeded else min(MAX_BATCH, 2 * self._batch)
        self._passed = 0
        self._is_exceeded = self._scheduled = False
        self._until = None
        self._waiting.extendleft(reversed(self._returned))
        self._returned.clear()
        woken = 0
        while self._waiting and woken < self._batch:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                woken += 1
        if woken:
            self._schedule()


class CallbackSemaphore:
    """Semaphore for code that does not run in a task: waiters are callbacks, in FIFO order.

    Code that finds no free slot calls `wait` with a callback. The semaphore calls it once, when a slot is free. The
    callback returns whether it will use the slot. If it returns `True` and the slot is not needed later, the code must
    call `wake_next`.

    Attributes:
        limit: Number of slots.
        taken: Number of slots in use.
        waiters: Callbacks that wait for a slot.
    """

    __slots__ = ("limit", "taken", "waiters")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self.waiters: deque[Callable[[], bool]] = deque()

    def __len__(self) -> int:
        """Return the number of waiters."""
        return len(self.waiters)

    @property
    def free(self) -> bool:
        """Whether a slot can be taken."""
        return self.taken < self.limit

    def take(self) -> None:
        """Take a slot."""
        self.taken += 1

    def release(self) -> None:
        """Release a slot and wake the next waiter."""
        self.taken -= 1
        self.wake_next()

    def wait(self, retry: Callable[[], bool]) -> None:
        """Add a waiter."""
        self.waiters.append(retry)

    def wake_next(self) -> None:
        """Call waiters until one returns `True`, while a slot is free."""
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

    A removed entry stays in the heap without its connection, until it is due or removed entries are most of the heap.

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

    def push(self, entry: D) -> None:
        """Add an entry, with its connection."""
        self._count += 1
        heapq.heappush(self._entries, entry)

    def pop(self, now: float) -> D | None:
        """Take out the first entry that is due; `None` if no entry is, or if very many removed ones are before it.

        In the second case the timer calls again within `coalesce`, so that other work can run in between.
        """
        for _ in range(CHECK_INTERVAL):
            if not self._entries or self._entries[0].due > now:
                return None
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
