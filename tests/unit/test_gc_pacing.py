"""Tests of the pacing of the garbage collector, in virtual time and on the collector of this process."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from fastapi_ws_stabilizer import WebSocketConfig, WebSocketConnectionManager, gc_pacing
from fastapi_ws_stabilizer.events import Event, EventBus
from fastapi_ws_stabilizer.gc_pacing import (
    CHECK_INTERVAL,
    MAX_BLOCKS_PER_CONNECTION,
    MAX_FREEZES,
    MAX_FROZEN_BY_INTERPRETER,
    MIN_CONNECTIONS,
    MIN_GROWTH,
    QUIET_CHECKS,
    CollectorPacer,
    PacedConnections,
)
from tests.support.virtual_time import run_virtually

LIVE_BLOCKS = 1_000_000


class Manager:
    """A manager with some number of open connections."""

    def __init__(self, connections: int = 0, *, enabled: bool = True) -> None:
        self.connections = connections
        self.events: list[Event] = []
        bus = EventBus()
        bus.subscribe(self.events.append)
        self.paced = PacedConnections(bus, lambda: self.connections, enabled=enabled)

    def event_names(self) -> list[str]:
        return [event.event for event in self.events]


class Process:
    """The process, with a pacer of its own, and with set figures of its memory and of the load."""

    def __init__(self, pacer: CollectorPacer) -> None:
        self.pacer = pacer
        self.thresholds = gc.get_threshold()
        self.blocks = LIVE_BLOCKS
        self.cpu = 0.0
        self.cpu_per_call = 0.0

    def thread_cpu(self) -> float:
        self.cpu += self.cpu_per_call
        return self.cpu

    @property
    def frozen(self) -> int:
        """Objects that are frozen; 0 if the interpreter alone has frozen some, as CPython 3.12 does."""
        count = gc.get_freeze_count()
        return count if count > MAX_FROZEN_BY_INTERPRETER else 0


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    others = [one for one in gc.callbacks if isinstance(getattr(one, "__self__", None), CollectorPacer)]
    for callback in others:  # those of managers that other tests have left
        gc.callbacks.remove(callback)
    pacer = CollectorPacer()
    process = Process(pacer)
    monkeypatch.setattr(gc_pacing, "PACER", pacer)
    monkeypatch.setattr(gc_pacing, "thread_cpu", process.thread_cpu)
    monkeypatch.setattr(gc_pacing, "QUIET_CHECKS", 1)
    monkeypatch.setattr(sys, "getallocatedblocks", lambda: process.blocks)
    callbacks = list(gc.callbacks)
    gc.callbacks.clear()  # those of managers that another test has not stopped
    yield process
    gc.callbacks[:] = callbacks
    gc.unfreeze()
    gc.set_threshold(*process.thresholds)
    gc.enable()
    for callback in [one for one in gc.callbacks if getattr(one, "__self__", None) is pacer]:
        gc.callbacks.remove(callback)
    gc.callbacks.extend(others)


class Cycle:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


async def next_check() -> None:
    await asyncio.sleep(1.5 * CHECK_INTERVAL)


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run_virtually(scene())


def test_few_connections_leave_collector_unchanged(process: Process) -> None:
    """Below `MIN_CONNECTIONS`, a collection freezes nothing, and no timer is set."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS - 1)
        manager.paced.start()
        gc.collect(1)
        gc.collect()
        await asyncio.sleep(0)
        assert process.frozen == 0
        assert manager.events == []
        manager.paced.stop()

    play(scene)


def test_survivors_of_young_collection_are_frozen(process: Process) -> None:
    """From `MIN_CONNECTIONS` on, what a young collection leaves is frozen. The thresholds stay as they are."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(0)
        assert process.frozen == 0
        gc.collect(1)
        first = process.frozen
        assert first > 0
        assert gc.get_count()[2] == 0  # so no automatic full collection is ever due
        more = [[] for _ in range(1000)]
        gc.collect(1)
        assert process.frozen >= first + len(more)
        assert gc.get_threshold() == process.thresholds
        manager.paced.stop()

    play(scene)


def test_start_of_pacing_is_logged_once(process: Process) -> None:
    """The start of the pacing is one event, with the number of open connections."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        for _ in range(3):
            gc.collect(1)
            await next_check()
        (event,) = manager.events
        assert (event.event, dict(event.fields)) == ("gc_pacing_started", {"connections": MIN_CONNECTIONS})
        manager.paced.stop()

    play(scene)


def test_stop_gives_collector_back_as_found(process: Process) -> None:
    """After the stop nothing is frozen, the thresholds are as found, and the collector calls nothing of the library."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        callbacks = list(gc.callbacks)
        manager.paced.start()
        gc.collect(1)
        assert process.frozen > 0
        manager.paced.stop()
        assert process.frozen == 0
        assert gc.get_threshold() == process.thresholds
        assert gc.callbacks == callbacks
        manager.paced.stop()
        await next_check()
        gc.collect(1)
        assert process.frozen == 0

    play(scene)


def test_several_managers_share_one_pacer(process: Process) -> None:
    """The connections of all managers count together, and only the last stop gives the collector back."""

    async def scene() -> None:
        one, other = Manager(MIN_CONNECTIONS // 2), Manager(MIN_CONNECTIONS // 2)
        one.paced.start()
        gc.collect(1)
        assert process.frozen == 0
        other.paced.start()
        other.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        assert one.event_names() == ["gc_pacing_started"]
        assert other.events == []
        one.connections = 0
        one.paced.stop()
        other.connections = MIN_CONNECTIONS
        gc.collect(1)
        assert process.frozen > 0
        await asyncio.sleep(0)
        assert other.event_names() == ["gc_pacing_started"]  # its event loop runs the checks from now on
        await next_check()
        assert process.frozen > 0
        other.paced.stop()
        assert process.frozen == 0

    play(scene)


def test_thresholds_set_while_pacing_end_it(process: Process) -> None:
    """If the application sets thresholds, the collector is its own from the next check on, also after the stop."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(1)
        gc.set_threshold(5000, 5, 5)
        await next_check()
        assert process.frozen == 0
        gc.collect(1)
        assert process.frozen == 0
        manager.paced.stop()
        assert gc.get_threshold() == (5000, 5, 5)

    play(scene)


@pytest.mark.parametrize("change", ["thresholds", "debug", "disabled", "frozen", "allocator"])
def test_collector_of_application_is_not_paced(process: Process, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An application that has set up the collector itself keeps it as it is. So does one with another allocator."""

    async def scene() -> None:
        if change == "thresholds":
            gc.set_threshold(5000, 5, 5)
        elif change == "debug":
            monkeypatch.setattr(gc, "get_debug", lambda: gc.DEBUG_SAVEALL)
        elif change == "disabled":
            gc.disable()
        elif change == "frozen":
            gc.freeze()
        else:
            process.blocks = 0
        frozen = process.frozen
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        lists = [[] for _ in range(1000)]
        gc.collect(1)
        await next_check()
        assert len(lists) == 1000
        assert process.frozen <= frozen
        assert manager.events == []
        manager.paced.stop()
        assert (process.frozen > 0) == (change == "frozen")

    play(scene)


def test_unmeasured_interpreter_is_not_paced(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an interpreter whose collector is not measured, nothing is paced."""
    monkeypatch.setattr(gc_pacing, "_DEFAULT_THRESHOLDS", None)

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(1)
        assert process.frozen == 0
        manager.paced.stop()

    play(scene)


def test_growth_on_quiet_loop_runs_full_collection(process: Process) -> None:
    """A cycle among frozen objects is freed once memory has grown by half of the bound, on a quiet event loop."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        cycle = Cycle()
        freed = weakref.ref(cycle)
        gc.collect(1)
        await asyncio.sleep(0)
        del cycle
        gc.collect()
        assert freed() is not None  # what the pacing costs
        process.blocks += LIVE_BLOCKS // 4
        await next_check()
        assert freed() is not None
        process.blocks += 1
        await next_check()
        assert freed() is None
        assert manager.event_names() == ["gc_pacing_started", "gc_collected"]
        assert process.frozen > 0
        await next_check()
        assert len(manager.events) == 2
        manager.paced.stop()

    play(scene)


def test_small_growth_runs_no_full_collection(process: Process) -> None:
    """A process with few objects may grow by `MIN_GROWTH`: a full collection would free little."""

    async def scene() -> None:
        process.blocks = 1000
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        process.blocks += MIN_GROWTH
        await next_check()
        assert manager.event_names() == ["gc_pacing_started"]
        process.blocks += 1
        await next_check()
        assert manager.event_names() == ["gc_pacing_started", "gc_collected"]
        manager.paced.stop()

    play(scene)


def test_growth_on_busy_loop_is_bounded(process: Process) -> None:
    """A busy event loop delays a full collection until memory has grown by half of what the last one left."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        process.cpu_per_call = 0.5 * CHECK_INTERVAL
        process.blocks += LIVE_BLOCKS // 2
        await next_check()
        await next_check()
        assert manager.event_names() == ["gc_pacing_started"]
        process.blocks += 1
        await next_check()
        assert manager.event_names() == ["gc_pacing_started", "gc_collected"]
        manager.paced.stop()

    play(scene)


def test_new_connections_may_grow_memory(process: Process) -> None:
    """Each new connection may take `MAX_BLOCKS_PER_CONNECTION` without a full collection on a busy event loop.

    That also holds while they close, because their memory is freed step by step.
    """

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        process.cpu_per_call = CHECK_INTERVAL
        manager.connections += 10_000
        process.blocks += 10_000 * MAX_BLOCKS_PER_CONNECTION + LIVE_BLOCKS // 2
        await next_check()
        manager.connections = 0
        await next_check()
        assert manager.event_names() == ["gc_pacing_started"]
        process.cpu_per_call = 0.0
        await next_check()
        assert manager.event_names() == ["gc_pacing_started", "gc_collected", "gc_pacing_ended"]
        manager.paced.stop()

    play(scene)


def test_quiet_event_loop_needs_checks_in_a_row(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop is quiet when `QUIET_CHECKS` checks in a row find little load."""
    monkeypatch.setattr(gc_pacing, "QUIET_CHECKS", QUIET_CHECKS)

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0.5 * CHECK_INTERVAL)
        process.blocks += LIVE_BLOCKS // 2
        for load in (*[0.0] * (QUIET_CHECKS - 1), 1.0, *[0.0] * (QUIET_CHECKS - 1)):
            process.cpu_per_call = load
            await asyncio.sleep(CHECK_INTERVAL)
            assert manager.event_names() == ["gc_pacing_started"]
        process.cpu_per_call = 0.0
        await asyncio.sleep(CHECK_INTERVAL)
        assert manager.event_names() == ["gc_pacing_started", "gc_collected"]
        manager.paced.stop()
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0.5 * CHECK_INTERVAL)
        process.blocks += LIVE_BLOCKS // 2
        await asyncio.sleep(CHECK_INTERVAL)
        assert manager.event_names().count("gc_collected") == 1  # checks before the stop do not count
        manager.paced.stop()

    play(scene)


def test_late_check_is_not_quiet(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is late says that the machine is busy, whatever CPU the event loop has got."""
    monkeypatch.setattr(gc_pacing, "MAX_QUIET_DELAY", -1.0)

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        process.blocks += LIVE_BLOCKS // 2
        await next_check()
        assert manager.event_names() == ["gc_pacing_started"]
        manager.paced.stop()

    play(scene)


def test_listener_may_stop_manager_during_check(process: Process) -> None:
    """A listener that stops the manager during a check ends the checks."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.events.subscribe(lambda event: manager.paced.stop() if event.event == "gc_collected" else None)
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        process.blocks += LIVE_BLOCKS
        await next_check()
        assert manager.event_names() == ["gc_pacing_started", "gc_collected"]
        assert process.frozen == 0
        assert process.pacer._timer is None

    play(scene)


def test_pacing_ends_when_few_connections_are_left(process: Process) -> None:
    """With half of `MIN_CONNECTIONS`, nothing stays frozen, and the timer stops, once the event loop is quiet."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        manager.connections = MIN_CONNECTIONS // 2
        await next_check()
        assert process.frozen > 0
        manager.connections -= 1
        process.cpu_per_call = CHECK_INTERVAL
        await next_check()
        assert process.frozen > 0
        process.cpu_per_call = 0.0
        await next_check()
        await next_check()
        assert process.frozen == 0
        assert manager.event_names() == ["gc_pacing_started", "gc_pacing_ended"]
        gc.collect(1)
        assert process.frozen == 0
        manager.connections = MIN_CONNECTIONS
        gc.collect(1)
        assert process.frozen > 0
        manager.paced.stop()

    play(scene)


def test_blocked_event_loop_leaves_collector_to_interpreter(process: Process) -> None:
    """Without checks in between, only `MAX_FREEZES` collections freeze what they leave."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        for _ in range(MAX_FREEZES + 1):
            gc.collect(1)
        await asyncio.sleep(0)
        frozen = process.frozen
        lists = [[] for _ in range(10_000)]
        gc.collect(1)
        assert process.frozen < frozen + len(lists)
        await next_check()
        gc.collect(1)
        assert process.frozen >= frozen + len(lists)
        manager.paced.stop()

    play(scene)


def test_closed_event_loop_ends_pacing(process: Process) -> None:
    """A manager whose event loop has ended without a shutdown counts no more, and another one takes over."""
    ended, other = Manager(MIN_CONNECTIONS), Manager(MIN_CONNECTIONS)

    async def first() -> None:
        ended.paced.start()
        gc.collect(1)
        assert process.frozen > 0

    async def second() -> None:
        other.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        assert other.event_names() == ["gc_pacing_started"]
        other.connections = 0
        await next_check()
        assert process.frozen == 0
        other.paced.stop()

    play(first)
    play(second)


def test_restart_on_another_event_loop_is_paced(process: Process) -> None:
    """A manager that starts again on another event loop is paced there."""
    manager = Manager(MIN_CONNECTIONS)

    async def scene() -> None:
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        process.blocks += LIVE_BLOCKS
        await next_check()

    play(scene)
    play(scene)
    assert manager.event_names().count("gc_collected") == 2
    manager.paced.stop()
    assert process.frozen == 0


def test_collection_in_another_thread_starts_checks_on_event_loop(process: Process) -> None:
    """The collector may run in any thread. The checks run on the event loop of the manager."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        thread = threading.Thread(target=gc.collect, args=(1,))
        thread.start()
        thread.join()
        assert manager.events == []
        await asyncio.sleep(0)
        assert manager.event_names() == ["gc_pacing_started"]
        manager.paced.stop()

    play(scene)


def test_event_loop_may_begin_checks_before_collection_continues(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection in another thread wakes the event loop, which may begin the checks before that thread continues."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        loop = asyncio.get_running_loop()
        with monkeypatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", lambda call, *args, context: context.run(call, *args))
            gc.collect(1)
        assert manager.event_names() == ["gc_pacing_started"]
        process.blocks += LIVE_BLOCKS
        await next_check()
        assert manager.event_names() == ["gc_pacing_started", "gc_collected"]
        manager.paced.stop()

    play(scene)


def test_pacing_that_ends_during_collection_leaves_nothing_frozen(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the last manager stops while another thread freezes what its collection leaves, nothing stays frozen."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        freeze = gc.freeze

        def stop_and_freeze() -> None:
            manager.paced.stop()
            freeze()

        with monkeypatch.context() as patch:
            patch.setattr(gc, "freeze", stop_and_freeze)
            gc.collect(1)
        assert process.frozen == 0

    play(scene)


def test_full_collection_that_cannot_run_is_repeated(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another thread collects, `gc.collect` does nothing. The next check then runs the full collection."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        gc.collect(1)
        await asyncio.sleep(0)
        process.blocks += LIVE_BLOCKS
        with monkeypatch.context() as patch:
            patch.setattr(gc, "collect", lambda: 0)
            await next_check()
        assert manager.event_names() == ["gc_pacing_started"]
        await next_check()
        assert manager.event_names() == ["gc_pacing_started", "gc_collected"]
        manager.paced.stop()

    play(scene)


def test_dropped_manager_is_not_held(process: Process) -> None:
    """The pacer holds no manager that was dropped without a shutdown."""

    async def scene() -> None:
        manager = Manager(MIN_CONNECTIONS)
        manager.paced.start()
        dropped = weakref.ref(manager.paced)
        del manager
        gc.collect()
        assert dropped() is None
        other = Manager()
        other.paced.start()
        other.paced.stop()

    play(scene)


def test_full_collections_are_counted_and_timed(process: Process) -> None:
    """Full collections count, whatever started them, and also with `gc_pacing="off"`. Young ones do not."""

    async def scene() -> None:
        gc.disable()  # no collection by chance
        manager = Manager(MIN_CONNECTIONS, enabled=False)
        manager.paced.start()
        gc.collect(1)
        assert (process.pacer.full_collections, process.pacer.full_seconds) == (0, 0.0)
        with pytest.MonkeyPatch.context() as clock:
            clock.setattr(gc_pacing, "monotonic", iter([10.0, 10.25]).__next__)
            gc.collect()
        assert (process.pacer.full_collections, process.pacer.full_seconds) == (1, 0.25)
        assert process.frozen == 0
        manager.paced.stop()
        gc.collect()
        assert process.pacer.full_collections == 1

    play(scene)


@pytest.mark.parametrize(("option", "is_paced"), [("auto", True), ("off", False)])
def test_manager_is_paced_from_start_to_shutdown(process: Process, option: Any, is_paced: bool) -> None:
    """A manager takes part from its start to the end of its shutdown, unless `gc_pacing` is `"off"`."""

    async def scene() -> None:
        manager = WebSocketConnectionManager(WebSocketConfig(gc_pacing=option, handle_signals=False))
        manager._paced.count = lambda: MIN_CONNECTIONS
        await manager.start()
        gc.collect(1)
        assert (process.frozen > 0) is is_paced
        await manager.graceful_shutdown(1.0)
        assert process.frozen == 0
        await manager.start()
        gc.collect(1)
        assert (process.frozen > 0) is is_paced
        await manager.graceful_shutdown(1.0)
        assert process.frozen == 0

    play(scene)
