"""Tests of work that is split into slices."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer import scheduling as scheduling_module
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.scheduling import (
    CHECK_INTERVAL,
    CallbackSemaphore,
    DeadlineHeap,
    FlushScheduler,
    LoopBudget,
    PacedCalls,
    PacedTasks,
)
from tests.support.fake_websocket import eventually, settle
from tests.support.own_loop import run


class Worker:
    """Worker that records its flushes."""

    def __init__(self, name: str, log: list[str], clock: Any = None, error: BaseException | None = None) -> None:
        self.name, self.log, self.clock, self.error = name, log, clock, error

    def on_flush_due(self) -> None:
        """Flush, for as long as the clock says."""
        self.log.append(self.name)
        if self.clock is not None:
            self.clock.now += 0.004
        if self.error is not None:
            raise self.error


class Clock:
    """Clock that advances only while a worker flushes."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def soon(scheduler: FlushScheduler, shard: int, worker: Worker) -> None:
    scheduler.schedule(scheduler.pending(shard), worker)


async def test_work_is_flushed_on_next_loop_iteration() -> None:
    """Nothing runs during the call, and everything in the next iteration of the event loop."""
    log: list[str] = []
    scheduler = FlushScheduler(4, EventBus())
    for shard in (2, 0, 2):
        soon(scheduler, shard, Worker(str(shard), log))
    assert log == []
    await asyncio.sleep(0)
    assert log == ["2", "2", "0"]


async def test_flush_beyond_max_block_continues_next_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that takes more than MAX_BLOCK continues in the next iteration, with the shard that waited longest."""
    clock = Clock()
    monkeypatch.setattr(scheduling_module, "monotonic", clock)
    log: list[str] = []
    scheduler = FlushScheduler(4, EventBus())
    for shard in range(4):
        soon(scheduler, shard, Worker(str(shard), log, clock))
    await asyncio.sleep(0)
    assert log == ["0", "1"]
    soon(scheduler, 0, Worker("late", log, clock))
    await asyncio.sleep(0)
    assert log == ["0", "1", "2", "3"]
    await asyncio.sleep(0)
    assert log == ["0", "1", "2", "3", "late"]


async def test_single_shard_is_flushed_without_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """With num_shards=1 everything is flushed in one iteration."""
    clock = Clock()
    monkeypatch.setattr(scheduling_module, "monotonic", clock)
    log: list[str] = []
    scheduler = FlushScheduler(1, EventBus())
    for number in range(10):
        soon(scheduler, 0, Worker(str(number), log, clock))
    await asyncio.sleep(0)
    assert len(log) == 10


async def test_failing_flush_is_reported_and_others_continue(heard: Any) -> None:
    """The failure is reported as a bug, and the other workers are flushed."""
    events, ear = heard
    log: list[str] = []
    scheduler = FlushScheduler(1, events)
    soon(scheduler, 0, Worker("bad", log, error=ValueError("x")))
    soon(scheduler, 0, Worker("good", log))
    await settle()
    assert log == ["bad", "good"]
    assert ear.events == ["internal_task_failed"]


@pytest.mark.parametrize(("num_shards", "first_turn"), [(2, CHECK_INTERVAL), (1, 2 * CHECK_INTERVAL + 1)])
async def test_large_shard_is_split_after_max_block(
    monkeypatch: pytest.MonkeyPatch, num_shards: int, first_turn: int
) -> None:
    """The clock is read after each LOOK_EVERY workers of a shard, unless there is only one shard."""
    clock = Clock()
    monkeypatch.setattr(scheduling_module, "monotonic", clock)
    log: list[str] = []
    scheduler = FlushScheduler(num_shards, EventBus())
    names = [str(number) for number in range(2 * CHECK_INTERVAL + 1)]
    for name in names:
        soon(scheduler, 0, Worker(name, log, clock))
    await asyncio.sleep(0)
    assert len(log) == first_turn
    await settle()
    assert log == names


async def test_large_shard_within_max_block_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short flush of any number of workers takes one iteration of the event loop."""
    monkeypatch.setattr(scheduling_module, "monotonic", Clock())
    log: list[str] = []
    scheduler = FlushScheduler(2, EventBus())
    for number in range(2 * CHECK_INTERVAL + 1):
        soon(scheduler, 0, Worker(str(number), log))
    await asyncio.sleep(0)
    assert len(log) == 2 * CHECK_INTERVAL + 1


@pytest.mark.parametrize("num_shards", [1, 2])
async def test_cancelled_error_in_flush_does_not_stop_others(num_shards: int) -> None:
    """A CancelledError goes to the event loop, and the other workers of all shards are flushed."""
    reported: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    error = asyncio.CancelledError()
    log: list[str] = []
    scheduler = FlushScheduler(num_shards, EventBus())
    soon(scheduler, 0, Worker("before", log))
    soon(scheduler, 0, Worker("bad", log, error=error))
    soon(scheduler, 0, Worker("behind", log))
    soon(scheduler, num_shards - 1, Worker("last", log))
    await settle()
    assert log == ["before", "bad", "behind", "last"]
    assert reported == [error]
    soon(scheduler, 0, Worker("later", log))
    await settle()
    assert log[4:] == ["later"]


class Again(Worker):
    """Worker that requests a number of further flushes, and may raise in each."""

    times = 0

    def __init__(self, scheduler: FlushScheduler, shard: int, again: int, log: list[str], *args: Any) -> None:
        super().__init__(str(shard), log, *args)
        self.scheduler, self.shard, self.again = scheduler, shard, again

    def on_flush_due(self) -> None:
        """Flush, and request the next flush before the end of this one."""
        self.times += 1
        if self.times <= self.again:
            soon(self.scheduler, self.shard, self)
        super().on_flush_due()


_WORKERS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 3),
        st.sampled_from([None, None, None, ValueError("x"), asyncio.CancelledError()]),
    ),
    max_size=30,
)


@given(_WORKERS, st.sampled_from([1, 2, 4]), st.booleans())
def test_each_flush_request_runs_exactly_once(workers: list[tuple[int, int, Any]], num_shards: int, long: bool) -> None:
    """Each worker is flushed as often as it requested, also if others are slow, fail or request more."""

    async def play() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, __: None)
        clock = Clock()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduling_module, "monotonic", clock)
            patch.setattr(scheduling_module, "CHECK_INTERVAL", 2)
            scheduler = FlushScheduler(num_shards, EventBus())
            log: list[str] = []
            callers = [
                Again(scheduler, shard % num_shards, again, log, clock if long else None, error)
                for shard, again, error in workers
            ]
            for number, worker in enumerate(callers):
                soon(scheduler, worker.shard, worker)
                if number % 7 == 6:
                    await asyncio.sleep(0)
            for _ in range(200):
                await asyncio.sleep(0)
                assert len({id(shard) for shard in scheduler._ready}) == len(scheduler._ready)
            assert [worker.times for worker in callers] == [1 + worker.again for worker in callers]
            assert len(log) == sum(worker.times for worker in callers)
            assert not scheduler._scheduled

    run(play())


async def test_exceeded_loop_budget_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that sends in a loop without a pause gets a signal to yield, whether work waits or not."""
    clock = Clock()
    monkeypatch.setattr(scheduling_module, "monotonic", clock)
    scheduler = FlushScheduler(1, EventBus())
    assert not scheduler.exceeded()
    clock.now += 0.006
    assert scheduler.exceeded()
    assert not scheduler.exceeded()
    clock.now += 0.006
    soon(scheduler, 0, Worker("x", []))
    await settle()
    assert not scheduler.exceeded()


async def test_loop_budget_restarts_after_yield(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget starts again in each iteration."""
    clock = Clock()
    monkeypatch.setattr(scheduling_module, "monotonic", clock)
    hold = LoopBudget()
    clock.now += 0.006
    assert hold.exceeded()
    await hold.yield_to_loop()
    assert not hold.exceeded()


def test_semaphore_wakes_waiters_in_order() -> None:
    """Waiters check again in order when a slot is free; one that needs none passes it on."""
    slots = CallbackSemaphore(1)
    assert slots.free
    slots.take()
    assert not slots.free
    log: list[str] = []

    def look(name: str, wants: bool = True) -> Any:
        return lambda: log.append(name) or wants

    slots.wait(look("a"))
    slots.wait(look("b"))
    assert len(slots) == 2
    slots.wake_next()
    assert log == []
    slots.release()
    assert log == ["a"]
    slots.wake_next()
    assert log == ["a", "b"]
    slots.wake_next()
    assert log == ["a", "b"]


def test_semaphore_skips_waiters_without_need() -> None:
    """The first waiter that still needs a slot gets it, at once and without recursion."""
    slots = CallbackSemaphore(1)
    slots.take()
    for _ in range(5000):
        slots.wait(lambda: False)
    log: list[str] = []
    slots.wait(lambda: log.append("here") is None)
    slots.wait(lambda: log.append("not yet") is None)
    slots.release()
    assert log == ["here"]
    assert len(slots) == 1


async def test_long_flush_does_not_count_against_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a long flush does not count for code that continues to send."""
    clock = Clock()
    monkeypatch.setattr(scheduling_module, "monotonic", clock)
    scheduler = FlushScheduler(1, EventBus())

    class Slow:
        def on_flush_due(self) -> None:
            clock.now += 2 * scheduling_module.MAX_BLOCK

    scheduler.schedule(scheduler.pending(0), Slow())
    await asyncio.sleep(0)
    assert not scheduler.exceeded()
    clock.now += 1.1 * scheduling_module.MAX_BLOCK
    assert scheduler.exceeded()


class Entry:
    """An entry of a deadline heap."""

    def __init__(self, due: float) -> None:
        self.due = due
        self.recipient: Any = "connection"

    def __lt__(self, other: Any) -> bool:
        return self.due < other.due


async def test_deadline_heap_skips_many_removed_entries_in_parts() -> None:
    """One call skips a bounded number of removed entries, and the timer continues with the rest."""
    checked: list[float] = []

    def on_due(now: float, _: float) -> None:
        while (entry := heap.pop(now)) is not None:
            checked.append(entry.due)

    heap: DeadlineHeap[Entry] = DeadlineHeap(on_due, 0.0)
    entries = [Entry(float(number)) for number in range(-2000, 0)]  # overdue, even just after the machine was booted
    for entry in entries:
        heap.push(entry)
    for entry in entries[:999]:  # not yet most of the heap, so they stay in it
        heap.remove(entry)
    assert len(heap._entries) == 2000
    assert heap.pop(0.0) is None
    assert 0 < 2000 - len(heap._entries) < 999
    heap.arm()
    await eventually(lambda: len(checked) == 1001)
    assert checked == [entry.due for entry in entries[999:]]
    assert (len(heap), len(heap._entries)) == (0, 0)


# ── paced calls and tasks ──


class Work:
    """Work of a storm, of which each part takes 2 ms of a fake clock.

    Attributes:
        done: The parts that were done, in order.
        by_iteration: Number of parts that were done in each iteration of the event loop.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(scheduling_module, "monotonic", self.clock)
        self.done: list[Any] = []
        self.by_iteration: list[int] = []

    def __call__(self, part: Any) -> None:
        """Do one part."""
        self.done.append(part)
        self.clock.now += 0.002

    async def until(self, parts: int) -> None:
        """Count the parts of each iteration until so many are done."""
        while len(self.done) < parts:
            before = len(self.done)
            await asyncio.sleep(0)
            self.by_iteration.append(len(self.done) - before)
            assert len(self.by_iteration) < 1000


async def test_few_paced_calls_run_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that take less than MAX_BLOCK together run before `run` returns."""
    work, calls = Work(monkeypatch), PacedCalls(EventBus())
    for part in range(3):
        calls.run(work, part)
        assert work.done[-1] == part
    assert len(calls) == 0


async def test_many_paced_calls_take_max_block_of_each_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """No iteration runs calls for longer than MAX_BLOCK and one call, and the calls keep their order."""
    work, calls = Work(monkeypatch), PacedCalls(EventBus())
    for part in range(100):
        calls.run(work, part)
    assert len(work.done) == 3
    assert len(calls) == 97
    await work.until(100)
    assert max(work.by_iteration) == 3
    assert work.done == list(range(100))
    assert len(calls) == 0


async def test_later_paced_call_waits_behind_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is made while others wait runs after them."""
    work, calls = Work(monkeypatch), PacedCalls(EventBus())
    for part in range(8):
        calls.run(work, part)
    await asyncio.sleep(0)
    calls.run(work, "late")
    await work.until(9)
    assert work.done == [*range(8), "late"]


async def test_paced_calls_have_new_budget_in_later_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of one iteration does not count in the next one."""
    work, calls = Work(monkeypatch), PacedCalls(EventBus())
    for _ in range(3):
        for part in range(3):
            calls.run(work, part)
        await asyncio.sleep(0)
    assert work.done == [0, 1, 2] * 3


async def test_failing_paced_call_is_reported_and_others_run(monkeypatch: pytest.MonkeyPatch, heard: Any) -> None:
    """A call that fails after it has waited is reported as a bug, and the others run."""
    events, ear = heard
    work, calls = Work(monkeypatch), PacedCalls(events)

    def fail() -> None:
        raise ValueError("x")

    for part in range(3):
        calls.run(work, part)
    calls.run(fail)
    calls.run(work, "last")
    await work.until(4)
    assert ear.events == ["internal_task_failed"]


async def test_task_waits_for_earlier_paced_calls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task continues after the calls that waited before it. A cancelled one leaves the others as they are."""
    work, calls = Work(monkeypatch), PacedCalls(EventBus())
    await calls.wait_for_earlier()  # nothing waits
    for part in range(8):
        calls.run(work, part)
    cancelled, waiting = (asyncio.ensure_future(calls.wait_for_earlier()) for _ in range(2))
    await asyncio.sleep(0)
    for part in range(8, 50):
        calls.run(work, part)
    cancelled.cancel()
    await waiting
    assert 8 <= len(work.done) < 20
    await work.until(50)


async def arrive(gate: PacedTasks, work: Work, part: Any) -> None:
    """Do a part of the work behind the gate."""
    await gate.enter()
    work(part)


async def test_single_task_passes_gate_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without many tasks, the gate does not yield to the event loop."""
    work, gate = Work(monkeypatch), PacedTasks()
    with pytest.raises(StopIteration):
        arrive(gate, work, 1).send(None)
    assert work.done == [1]


async def test_many_tasks_pass_gate_for_max_block_of_each_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """No iteration lets tasks work for longer than MAX_BLOCK and one task, and the tasks keep their order."""
    work, gate = Work(monkeypatch), PacedTasks()
    tasks = [asyncio.ensure_future(arrive(gate, work, part)) for part in range(100)]
    await work.until(100)
    assert max(work.by_iteration) == 3
    assert work.done == list(range(100))
    assert len(work.by_iteration) < 60
    assert len(gate) == 0
    await asyncio.gather(*tasks)


async def test_first_task_of_each_iteration_passes_without_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks pass one by one if even the first finds no time, so the gate never blocks them forever."""
    work, gate = Work(monkeypatch), PacedTasks()
    monkeypatch.setattr(scheduling_module, "MAX_BLOCK", -1.0)
    tasks = [asyncio.ensure_future(arrive(gate, work, part)) for part in range(5)]
    await work.until(5)
    assert work.done == list(range(5))
    assert max(work.by_iteration) == 1
    await asyncio.gather(*tasks)


async def test_gate_wakes_more_tasks_while_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks with little work pass in growing numbers."""
    work, gate = Work(monkeypatch), PacedTasks()
    tasks = [asyncio.ensure_future(arrive(gate, work, part)) for part in range(4)]
    tasks += [asyncio.ensure_future(gate.enter()) for _ in range(1000)]
    iterations = 0
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        iterations += 1
        assert iterations < 30


async def test_cancelled_task_at_gate_does_not_stop_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that are cancelled while they wait are skipped, and the others pass in order."""
    work, gate = Work(monkeypatch), PacedTasks()
    tasks = [asyncio.ensure_future(arrive(gate, work, part)) for part in range(20)]
    await asyncio.sleep(0)
    for task in tasks[5:15]:
        task.cancel()
    await asyncio.wait(tasks, timeout=5)
    assert work.done == [*range(5), *range(15, 20)]
    assert len(gate) == 0


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.sets(st.integers(0, 59)))
def test_gate_passes_every_task_once_and_bounds_each_iteration(costs: list[int], cancelled: set[int]) -> None:
    """Whatever the tasks cost and whichever are cancelled, the others pass once, in order, and in bounded time."""

    async def play() -> None:
        clock, gate = Clock(), PacedTasks()
        done: list[int] = []
        spent: list[float] = []

        async def task(number: int) -> None:
            await gate.enter()
            done.append(number)
            clock.now += costs[number] / 1000

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduling_module, "monotonic", clock)
            tasks = [asyncio.ensure_future(task(number)) for number in range(len(costs))]
            await asyncio.sleep(0)
            spent.append(clock.now - Clock.now)
            for number in cancelled & set(range(len(costs))) - set(done):
                tasks[number].cancel()
            for _ in range(1000):
                if all(one.done() for one in tasks):
                    break
                before = clock.now
                await asyncio.sleep(0)
                spent.append(clock.now - before)
            assert [one for one in range(len(costs)) if not tasks[one].cancelled()] == done
            assert max(spent) <= scheduling_module.MAX_BLOCK + 0.006 + 1e-9

    run(play())
