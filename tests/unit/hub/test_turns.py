"""Tests of work that is cut into pieces."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.hub import turns as turns_module
from fastapi_ws_stabilizer.hub.slots import Slots
from fastapi_ws_stabilizer.hub.turns import HoldTimer, Turns
from fastapi_ws_stabilizer.reports import Reports
from tests.unit.fake_websocket import settle


class Worker:
    """Notes when it takes its turn."""

    def __init__(self, name: str, log: list[str], clock: Any = None, error: Exception | None = None) -> None:
        self.name, self.log, self.clock, self.error = name, log, clock, error

    def take_turn(self) -> None:
        """Take it, for as long as the clock says."""
        self.log.append(self.name)
        if self.clock is not None:
            self.clock.now += 0.004
        if self.error is not None:
            raise self.error


class Clock:
    """A clock that stands still unless somebody works."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def soon(turns: Turns, shard: int, worker: Worker) -> None:
    turns.soon(turns.pending(shard), worker)


async def test_work_is_done_at_the_end_of_the_turn() -> None:
    """Nothing runs at the call, everything in the next turn of the event loop."""
    log: list[str] = []
    turns = Turns(4, Reports())
    for shard in (2, 0, 2):
        soon(turns, shard, Worker(str(shard), log))
    assert log == []
    await asyncio.sleep(0)
    assert log == ["2", "2", "0"]


async def test_the_loop_gets_a_turn_between_shards_when_it_was_held_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds the loop for more than MAX_HOLD goes on in the next turn, with the shard that has waited longest."""
    clock = Clock()
    monkeypatch.setattr(turns_module, "monotonic", clock)
    log: list[str] = []
    turns = Turns(4, Reports())
    for shard in range(4):
        soon(turns, shard, Worker(str(shard), log, clock))
    await asyncio.sleep(0)
    assert log == ["0", "1"]
    soon(turns, 0, Worker("late", log, clock))
    await asyncio.sleep(0)
    assert log == ["0", "1", "2", "3"]
    await asyncio.sleep(0)
    assert log == ["0", "1", "2", "3", "late"]


async def test_one_shard_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """With num_shards=1 the loop waits for all of it: that is what more shards buy."""
    clock = Clock()
    monkeypatch.setattr(turns_module, "monotonic", clock)
    log: list[str] = []
    turns = Turns(1, Reports())
    for number in range(10):
        soon(turns, 0, Worker(str(number), log, clock))
    await asyncio.sleep(0)
    assert len(log) == 10


async def test_a_worker_that_fails_hurts_nobody_else(heard: Any) -> None:
    """Its failure is reported as ours, and the others have their turn."""
    reports, ear = heard
    log: list[str] = []
    turns = Turns(1, reports)
    soon(turns, 0, Worker("bad", log, error=ValueError("x")))
    soon(turns, 0, Worker("good", log))
    await settle()
    assert log == ["bad", "good"]
    assert ear.events == ["internal_task_failed"]


async def test_work_that_waits_too_long_is_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends in a loop without a pause can see that it is time for one."""
    clock = Clock()
    monkeypatch.setattr(turns_module, "monotonic", clock)
    turns = Turns(1, Reports())
    assert not turns.overdue()
    soon(turns, 0, Worker("x", []))
    assert not turns.overdue()
    clock.now += 0.006
    assert turns.overdue()
    await settle()
    assert not turns.overdue()


async def test_a_hold_timer_starts_anew_after_it_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn may be held for as long."""
    clock = Clock()
    monkeypatch.setattr(turns_module, "monotonic", clock)
    hold = HoldTimer()
    clock.now += 0.006
    assert hold.held_long()
    await hold.let_go()
    assert not hold.held_long()


def test_slots_are_given_in_the_order_of_the_line() -> None:
    """Who waits for a slot looks again when one is free, the first first; who needs none passes it on."""
    slots = Slots(1)
    assert slots.free
    slots.take()
    assert not slots.free
    log: list[str] = []

    def look(name: str, wants: bool = True) -> Any:
        return lambda: log.append(name) or wants

    slots.wait(look("a"))
    slots.wait(look("b"))
    assert len(slots) == 2
    slots.pass_on()
    assert log == []
    slots.release()
    assert log == ["a"]
    slots.pass_on()
    assert log == ["a", "b"]
    slots.pass_on()
    assert log == ["a", "b"]


def test_who_wants_no_slot_any_more_is_passed_over() -> None:
    """However many in a line are gone, the first that still wants a slot is reached, at once and without recursion."""
    slots = Slots(1)
    slots.take()
    for _ in range(5000):
        slots.wait(lambda: False)
    log: list[str] = []
    slots.wait(lambda: log.append("here") is None)
    slots.wait(lambda: log.append("not yet") is None)
    slots.release()
    assert log == ["here"]
    assert len(slots) == 1
