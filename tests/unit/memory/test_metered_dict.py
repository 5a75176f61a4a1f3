"""Tests of the dicts in which an application keeps things for a client."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastapi_ws_stabilizer.errors import MemoryLimitExceededError
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.memory.sizing import MAX_OBJECTS, STEP, deep_size
from tests.support.fake_evictable import FakeEvictable
from tests.support.fake_link import virtually


class Owner(FakeEvictable):
    """A client that holds a dict."""

    def __init__(self, budget: MemoryBudget, name: str = "a") -> None:
        super().__init__(budget, name)
        self.kept = MeteredDict(budget, self)

    @property
    def memory_usage(self) -> int:  # type: ignore[override]
        return self.kept.held_bytes if hasattr(self, "kept") else 0

    @memory_usage.setter
    def memory_usage(self, _: int) -> None:
        pass

    def evict(self) -> None:
        self.evicted = True
        self.kept.detach()


def counted(kept: dict[str, Any]) -> int:
    """What a dict holds, counted from nothing."""
    return sum(sys.getsizeof(key) + deep_size(value) for key, value in kept.items())


@pytest.fixture
async def owner() -> Owner:
    """A client that may hold 10,000 bytes."""
    budget = MemoryBudget(100_000, 10_000)
    budget.begin()
    return Owner(budget)


WRITES: dict[str, Callable[[MeteredDict], object]] = {
    "set": lambda kept: kept.__setitem__("new", "x" * 100),
    "set another": lambda kept: kept.__setitem__("a", "x" * 100),
    "set the same": lambda kept: kept.__setitem__("a", kept["a"]),
    "update": lambda kept: kept.update({"b": "x" * 50, "new": [1]}, more=2),
    "update with pairs": lambda kept: kept.update([("b", "y" * 9)]),
    "in place or": lambda kept: kept.__ior__({"b": "x" * 50}),
    "setdefault new": lambda kept: kept.setdefault("new", "x"),
    "setdefault old": lambda kept: kept.setdefault("a", "x" * 1000),
    "del": lambda kept: kept.__delitem__("a"),
    "pop": lambda kept: kept.pop("a"),
    "pop nothing": lambda kept: kept.pop("none", None),
    "popitem": lambda kept: kept.popitem(),
    "clear": lambda kept: kept.clear(),
    "replace": lambda kept: kept.replace({"a": 1, "new": "x"}),
    "replace by itself": lambda kept: kept.replace(kept),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
async def test_every_write_is_counted_and_acts_like_dict(owner: Owner, write: Callable[[MeteredDict], object]) -> None:
    """After it the dict holds what a plain one would, and the sums are those of a full count."""
    plain: Any = {"a": "x", "b": ["y"] * 3}
    owner.kept.update(plain)

    class Plain(dict[str, Any]):
        def replace(self, values: Any) -> None:
            values = dict(values)
            self.clear()
            self.update(values)

    expected: Any = Plain(plain)
    result, wanted = write(owner.kept), write(expected)
    assert owner.kept == expected
    assert list(owner.kept) == list(expected)
    if result is not owner.kept:
        assert result == wanted
    assert owner.kept.held_bytes == counted(owner.kept) == owner.kept._budget.total  # type: ignore[union-attr]


@pytest.mark.parametrize("write", [lambda kept: kept.__delitem__("none"), lambda kept: kept.pop("none")])
async def test_removing_missing_key_raises_key_error(owner: Owner, write: Callable[[MeteredDict], object]) -> None:
    """It raises `KeyError` and counts nothing."""
    with pytest.raises(KeyError):
        write(owner.kept)
    assert owner.kept.held_bytes == 0


async def test_nested_value_is_measured_deeply() -> None:
    """What is put in is measured deeply, whatever it is wrapped in."""
    budget = MemoryBudget()
    budget.begin()
    kept = MeteredDict(budget, None)
    kept["deep"] = {"a": [{"b": ("x" * 10_000_000,)}]}
    assert 10_000_000 < budget.total < 10_002_000


REFUSED: dict[str, Callable[[MeteredDict], object]] = {
    "set new": lambda kept: kept.__setitem__("new", "x" * 20_000),
    "set old": lambda kept: kept.__setitem__("none", "x" * 20_000),
    "update": lambda kept: kept.update({"a": 5, "none": 1, "new": "x" * 20_000}),
    "in place or": lambda kept: kept.__ior__({"a": 5, "new": "x" * 20_000}),
    "setdefault": lambda kept: kept.setdefault("new", "x" * 20_000),
    "replace": lambda kept: kept.replace({"new": "x" * 20_000}),
}


@pytest.mark.parametrize("write", REFUSED.values(), ids=REFUSED)
async def test_write_over_limit_changes_nothing(owner: Owner, write: Callable[[MeteredDict], object]) -> None:
    """All or nothing: old values stay, `None` and order included, and so does the sum."""
    before = {"none": None, "a": "old"}
    owner.kept.update(before)
    total = owner.kept._budget.total  # type: ignore[union-attr]
    with pytest.raises(MemoryLimitExceededError, match="max_memory_per_connection is 10000"):
        write(owner.kept)
    assert list(owner.kept.items()) == list(before.items())
    assert owner.kept.held_bytes == owner.kept._budget.total == total  # type: ignore[union-attr]


@pytest.mark.parametrize("write", [lambda kept: kept.replace(None), lambda kept: kept.update(7)])
async def test_write_of_non_mapping_changes_nothing(owner: Owner, write: Callable[[MeteredDict], object]) -> None:
    """What is no mapping is a `TypeError`, before anything is taken out."""
    owner.kept["a"] = 1
    with pytest.raises(TypeError):
        write(owner.kept)
    assert owner.kept == {"a": 1}


async def test_replacing_value_needs_memory_only_for_growth(owner: Owner) -> None:
    """A value of 6,000 bytes can be replaced by another one, though both would be too much."""
    owner.kept["a"] = "x" * 6_000
    owner.kept["a"] = "y" * 6_000
    owner.kept.replace({"b": "z" * 6_000})
    assert list(owner.kept) == ["b"]


@virtually
async def test_dict_over_limit_is_found_and_can_still_shrink() -> None:
    """A dict that has grown inside beyond what may be is found, its owner is told, and it may still shrink."""
    budget = MemoryBudget(max_each=1_000, check_interval=5.0)
    budget.begin()
    owner = Owner(budget)
    owner.kept["list"] = grown = ["x"]
    grown.extend("y" * 50 for _ in range(100))
    assert owner.kept.held_bytes < 1_000
    await asyncio.sleep(6.0)
    assert owner.ended_at == owner.kept.held_bytes == counted(owner.kept) == budget.total
    owner.kept["list"] = []
    assert owner.kept.held_bytes == budget.total < 1_000
    budget.stop()


@virtually
async def test_shrunk_value_is_found_at_next_check() -> None:
    """The sum goes down at the next look."""
    budget = MemoryBudget(check_interval=5.0)
    budget.begin()
    kept = MeteredDict(budget, None, {"list": ["x" * 5_000]})
    kept["list"].clear()
    await asyncio.sleep(6.0)
    assert budget.total == counted(kept) < 1_000
    budget.stop()


async def test_write_over_total_limit_evicts_others() -> None:
    """The first in the order goes, and the write is done."""
    budget = MemoryBudget(10_000)
    budget.begin()
    a, b = Owner(budget, "a"), Owner(budget, "b")
    a.kept["x"], b.kept["x"] = "a" * 6_000, "b" * 6_000
    assert (a.evicted, b.evicted) == (True, False)
    assert budget.total == counted(b.kept)


async def test_detached_dict_is_uncounted_and_writable(owner: Owner) -> None:
    """Whoever still has it writes as into any dict, without a limit."""
    budget = owner.kept._budget
    owner.kept["a"] = "x" * 5_000
    owner.kept.detach()
    owner.kept["b"] = "x" * 50_000
    owner.kept.detach()
    assert budget is not None
    assert (budget.total, list(owner.kept)) == (0, ["a", "b"])


def test_dict_without_budget_has_no_owner() -> None:
    """A dict that is made when its client is over knows nobody."""
    assert MeteredDict(None, FakeEvictable(MemoryBudget(), "a")).owner is None


async def test_copies_of_metered_dict_are_plain_dicts(owner: Owner) -> None:
    """It can be JSON, copied and pickled, and what comes of that is plain: it counts nothing."""
    owner.kept.update({"a": [1]})
    copies = [copy.copy(owner.kept), copy.deepcopy(owner.kept), pickle.loads(pickle.dumps(owner.kept)), owner.kept | {}]
    assert all(type(one) is dict and one == {"a": [1]} for one in copies)
    assert json.dumps(owner.kept) == '{"a": [1]}'


# ── how long it takes ──


def many(number: int) -> list[object]:
    """A value of that many objects and one."""
    return [float(one) for one in range(number)]


def looked_at(kept: MeteredDict) -> int:
    """How many objects of a dict were looked at."""
    return sum(count for _, count in kept._sizes.values())


async def test_measured_objects_are_bounded_for_many_entries() -> None:
    """One write, many writes and a look at all of it: `MAX_OBJECTS`, and each further value alone."""
    third = many(MAX_OBJECTS // 3)
    budget = MemoryBudget()
    budget.begin()
    at_once = MeteredDict(budget, None, {str(number): third for number in range(20)})
    assert looked_at(at_once) == at_once._objects <= MAX_OBJECTS + 20
    one_by_one = MeteredDict(budget, None)
    for number in range(20):
        one_by_one[str(number)] = third
    assert looked_at(one_by_one) == one_by_one._objects <= MAX_OBJECTS + 20
    before = one_by_one.held_bytes
    for _ in one_by_one.remeasure():
        pass
    assert looked_at(one_by_one) <= MAX_OBJECTS + 20
    assert before - 1_000 < one_by_one.held_bytes <= before
    for key in ("0", "1", "2"):
        del one_by_one[key]
    one_by_one["new"] = third
    assert one_by_one._sizes["new"][1] == MAX_OBJECTS // 3 + 1
    budget.stop()


async def test_remeasure_yields_within_large_entry() -> None:
    """A large value is measured in many steps, so that the event loop gets its turns."""
    kept = MeteredDict(None, None, {"large": many(20 * STEP)})
    assert sum(1 for _ in kept.remeasure()) >= 20


# ── from threads ──


async def in_threads(*functions: Callable[[], object]) -> None:
    """Run functions at the same time in threads, as sync hooks and handlers are run."""
    loop = asyncio.get_running_loop()
    barrier = threading.Barrier(len(functions))

    def begin(function: Callable[[], object]) -> None:
        barrier.wait(5)
        function()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(functions)) as pool:
            await asyncio.gather(*(loop.run_in_executor(pool, begin, function) for function in functions))
        await asyncio.sleep(0)
    finally:
        sys.setswitchinterval(interval)


class SlowKey(str):
    """A key that lets other threads run whenever a dict looks at it."""

    __slots__ = ()

    def __hash__(self) -> int:
        time.sleep(0)
        return str.__hash__(self)


async def test_concurrent_thread_writes_retain_correct_sums() -> None:
    """Four threads write and delete the same keys; when they are done, the sums are those of a full count."""
    budget = MemoryBudget(10**9)
    budget.begin()
    owner = Owner(budget)

    def write() -> None:
        for number in range(200):
            owner.kept[SlowKey(number % 3)] = "x" * (number % 90)
            owner.kept.pop(SlowKey((number + 1) % 3), None)

    await in_threads(write, write, write, write)
    assert owner.kept.held_bytes == counted(owner.kept) == budget.total
    budget.stop()


async def test_detach_during_thread_write_leaves_nothing_counted() -> None:
    """What a thread has written is in the sum for as long as it is kept, and not a moment longer."""
    budget = MemoryBudget()
    budget.begin()
    kept = MeteredDict(budget, None)
    written = threading.Event()

    def write() -> None:
        kept["a"] = "x" * 1_000
        written.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert written.wait(5)  # and the loop has not heard of it yet
    kept.detach()
    thread.join()
    await asyncio.sleep(0)
    assert (budget.total, budget._measured) == (0, {})


async def test_connection_limit_applies_to_threads() -> None:
    """What is too much for one is refused in the thread that writes it, and nothing is written."""
    budget = MemoryBudget(10_000, 1_000)
    budget.begin()
    owner = Owner(budget)
    with pytest.raises(MemoryLimitExceededError):
        await asyncio.to_thread(owner.kept.__setitem__, "a", "x" * 1_000)
    assert (dict(owner.kept), budget.total) == ({}, 0)


async def test_eviction_for_thread_write_runs_on_event_loop() -> None:
    """Nobody is ended from within a thread; a turn later the limit holds, and the writer is spared there too."""
    budget = MemoryBudget(10_000)
    budget.begin()
    writer, other = Owner(budget, "first in every order"), Owner(budget, "another")
    other.kept["x"] = "x" * 6_000
    loop_thread, evicted_in = threading.get_ident(), []
    other.evict = lambda: (evicted_in.append(threading.get_ident()), other.kept.detach())  # type: ignore[method-assign]
    await asyncio.to_thread(writer.kept.__setitem__, "x", "x" * 6_000)
    await asyncio.sleep(0)
    assert (evicted_in, writer.evicted) == ([loop_thread], False)
    assert budget.total == counted(writer.kept)


async def test_thread_write_over_total_limit_raises() -> None:
    """Nobody has to go for what cannot be."""
    budget = MemoryBudget(10_000)
    budget.begin()
    writer = Owner(budget)
    with pytest.raises(MemoryLimitExceededError, match="max_total_memory"):
        await asyncio.to_thread(writer.kept.__setitem__, "x", "x" * 10_000)
