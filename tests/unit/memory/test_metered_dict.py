"""Tests of the dicts for data that an application stores for a client."""

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
    """Client with a metered dict."""

    def __init__(self, budget: MemoryBudget, name: str = "a") -> None:
        super().__init__(budget, name)
        self.data = MeteredDict(budget, self)

    @property
    def memory_usage(self) -> int:  # type: ignore[override]
        return self.data.held_bytes if hasattr(self, "data") else 0

    @memory_usage.setter
    def memory_usage(self, _: int) -> None:
        pass

    def evict(self) -> None:
        self.evicted = True
        self.data.stop_accounting()


def counted(data: dict[str, Any]) -> int:
    """Return the held bytes of a dict by a full count."""
    return sum(sys.getsizeof(key) + deep_size(value) for key, value in data.items())


@pytest.fixture
async def owner() -> Owner:
    """Return a client with a limit of 10,000 bytes."""
    budget = MemoryBudget(100_000, 10_000)
    budget.bind_loop()
    return Owner(budget)


WRITES: dict[str, Callable[[MeteredDict], object]] = {
    "set": lambda data: data.__setitem__("new", "x" * 100),
    "set another": lambda data: data.__setitem__("a", "x" * 100),
    "set the same": lambda data: data.__setitem__("a", data["a"]),
    "update": lambda data: data.update({"b": "x" * 50, "new": [1]}, more=2),
    "update with pairs": lambda data: data.update([("b", "y" * 9)]),
    "in place or": lambda data: data.__ior__({"b": "x" * 50}),
    "setdefault new": lambda data: data.setdefault("new", "x"),
    "setdefault old": lambda data: data.setdefault("a", "x" * 1000),
    "del": lambda data: data.__delitem__("a"),
    "pop": lambda data: data.pop("a"),
    "pop nothing": lambda data: data.pop("none", None),
    "popitem": lambda data: data.popitem(),
    "clear": lambda data: data.clear(),
    "replace": lambda data: data.replace({"a": 1, "new": "x"}),
    "replace by itself": lambda data: data.replace(data),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
async def test_every_write_is_counted_and_acts_like_dict(owner: Owner, write: Callable[[MeteredDict], object]) -> None:
    """After each write the dict equals a plain one, and the totals equal a full count."""
    plain: Any = {"a": "x", "b": ["y"] * 3}
    owner.data.update(plain)

    class Plain(dict[str, Any]):
        def replace(self, values: Any) -> None:
            values = dict(values)
            self.clear()
            self.update(values)

    expected: Any = Plain(plain)
    result, wanted = write(owner.data), write(expected)
    assert owner.data == expected
    assert list(owner.data) == list(expected)
    if result is not owner.data:
        assert result == wanted
    assert owner.data.held_bytes == counted(owner.data) == owner.data._budget.total  # type: ignore[union-attr]


@pytest.mark.parametrize("write", [lambda data: data.__delitem__("none"), lambda data: data.pop("none")])
async def test_removing_missing_key_raises_key_error(owner: Owner, write: Callable[[MeteredDict], object]) -> None:
    """Removing a missing key raises `KeyError` and counts nothing."""
    with pytest.raises(KeyError):
        write(owner.data)
    assert owner.data.held_bytes == 0


async def test_nested_value_is_measured_deeply() -> None:
    """A value is measured recursively."""
    budget = MemoryBudget()
    budget.bind_loop()
    data = MeteredDict(budget, None)
    data["deep"] = {"a": [{"b": ("x" * 10_000_000,)}]}
    assert 10_000_000 < budget.total < 10_002_000


REJECTED: dict[str, Callable[[MeteredDict], object]] = {
    "set new": lambda data: data.__setitem__("new", "x" * 20_000),
    "set old": lambda data: data.__setitem__("none", "x" * 20_000),
    "update": lambda data: data.update({"a": 5, "none": 1, "new": "x" * 20_000}),
    "in place or": lambda data: data.__ior__({"a": 5, "new": "x" * 20_000}),
    "setdefault": lambda data: data.setdefault("new", "x" * 20_000),
    "replace": lambda data: data.replace({"new": "x" * 20_000}),
}


@pytest.mark.parametrize("write", REJECTED.values(), ids=REJECTED)
async def test_write_over_limit_changes_nothing(owner: Owner, write: Callable[[MeteredDict], object]) -> None:
    """A write above the limit raises, and values, order and total are unchanged."""
    before = {"none": None, "a": "old"}
    owner.data.update(before)
    total = owner.data._budget.total  # type: ignore[union-attr]
    with pytest.raises(MemoryLimitExceededError, match="max_memory_per_connection is 10000"):
        write(owner.data)
    assert list(owner.data.items()) == list(before.items())
    assert owner.data.held_bytes == owner.data._budget.total == total  # type: ignore[union-attr]


@pytest.mark.parametrize("write", [lambda data: data.replace(None), lambda data: data.update(7)])
async def test_write_of_non_mapping_changes_nothing(owner: Owner, write: Callable[[MeteredDict], object]) -> None:
    """A value that is not a mapping raises `TypeError` and changes nothing."""
    owner.data["a"] = 1
    with pytest.raises(TypeError):
        write(owner.data)
    assert owner.data == {"a": 1}


async def test_replacing_value_needs_memory_only_for_growth(owner: Owner) -> None:
    """A value of 6,000 bytes can be replaced by another one, although both together exceed the limit."""
    owner.data["a"] = "x" * 6_000
    owner.data["a"] = "y" * 6_000
    owner.data.replace({"b": "z" * 6_000})
    assert list(owner.data) == ["b"]


@virtually
async def test_dict_over_limit_is_found_and_can_still_shrink() -> None:
    """A dict that has grown inside above the limit is found, reported to its owner, and can still shrink."""
    budget = MemoryBudget(max_each=1_000, check_interval=5.0)
    budget.bind_loop()
    owner = Owner(budget)
    owner.data["list"] = grown = ["x"]
    grown.extend("y" * 50 for _ in range(100))
    assert owner.data.held_bytes < 1_000
    await asyncio.sleep(6.0)
    assert owner.ended_at == owner.data.held_bytes == counted(owner.data) == budget.total
    owner.data["list"] = []
    assert owner.data.held_bytes == budget.total < 1_000
    budget.stop()


@virtually
async def test_shrunk_value_is_found_at_next_check() -> None:
    """A value that has shrunk lowers the total at the next check."""
    budget = MemoryBudget(check_interval=5.0)
    budget.bind_loop()
    data = MeteredDict(budget, None, {"list": ["x" * 5_000]})
    data["list"].clear()
    await asyncio.sleep(6.0)
    assert budget.total == counted(data) < 1_000
    budget.stop()


async def test_write_over_total_limit_evicts_others() -> None:
    """A write above the total limit evicts the first client of the order, and succeeds."""
    budget = MemoryBudget(10_000)
    budget.bind_loop()
    a, b = Owner(budget, "a"), Owner(budget, "b")
    a.data["x"], b.data["x"] = "a" * 6_000, "b" * 6_000
    assert (a.evicted, b.evicted) == (True, False)
    assert budget.total == counted(b.data)


async def test_detached_dict_is_uncounted_and_writable(owner: Owner) -> None:
    """A detached dict is not counted and has no limit, but it can be written."""
    budget = owner.data._budget
    owner.data["a"] = "x" * 5_000
    owner.data.stop_accounting()
    owner.data["b"] = "x" * 50_000
    owner.data.stop_accounting()
    assert budget is not None
    assert (budget.total, list(owner.data)) == (0, ["a", "b"])


def test_dict_without_budget_has_no_owner() -> None:
    """A dict without a budget has no owner."""
    assert MeteredDict(None, FakeEvictable(MemoryBudget(), "a")).owner is None


async def test_copies_of_metered_dict_are_plain_dicts(owner: Owner) -> None:
    """Copies and pickles are plain dicts that count nothing, and the dict can be encoded as JSON."""
    owner.data.update({"a": [1]})
    copies = [copy.copy(owner.data), copy.deepcopy(owner.data), pickle.loads(pickle.dumps(owner.data)), owner.data | {}]
    assert all(type(one) is dict and one == {"a": [1]} for one in copies)
    assert json.dumps(owner.data) == '{"a": [1]}'


# ── cost ──


def many(number: int) -> list[object]:
    """Return a value of `number` + 1 objects."""
    return [float(one) for one in range(number)]


def looked_at(data: MeteredDict) -> int:
    """Return the number of measured objects of a dict."""
    return sum(count for _, count in data._sizes.values())


async def test_measured_objects_are_bounded_for_many_entries() -> None:
    """Writes and checks measure at most `MAX_OBJECTS` objects, and one for each further value."""
    third = many(MAX_OBJECTS // 3)
    budget = MemoryBudget()
    budget.bind_loop()
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
    """A large value is measured in many steps, so that the event loop runs between them."""
    data = MeteredDict(None, None, {"large": many(20 * STEP)})
    assert sum(1 for _ in data.remeasure()) >= 20


# ── threads ──


async def in_threads(*functions: Callable[[], object]) -> None:
    """Run functions concurrently in threads, as sync hooks and handlers run."""
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
    """Key that yields to other threads when a dict hashes it."""

    __slots__ = ()

    def __hash__(self) -> int:
        time.sleep(0)
        return str.__hash__(self)


async def test_concurrent_thread_writes_retain_correct_sums() -> None:
    """After concurrent writes of four threads to the same keys, the totals equal a full count."""
    budget = MemoryBudget(10**9)
    budget.bind_loop()
    owner = Owner(budget)

    def write() -> None:
        for number in range(200):
            owner.data[SlowKey(number % 3)] = "x" * (number % 90)
            owner.data.pop(SlowKey((number + 1) % 3), None)

    await in_threads(write, write, write, write)
    assert owner.data.held_bytes == counted(owner.data) == budget.total
    budget.stop()


async def test_detach_during_thread_write_leaves_nothing_counted() -> None:
    """The write of a thread is not counted after the dict is detached."""
    budget = MemoryBudget()
    budget.bind_loop()
    data = MeteredDict(budget, None)
    written = threading.Event()

    def write() -> None:
        data["a"] = "x" * 1_000
        written.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert written.wait(5)  # the event loop has not processed the write yet
    data.stop_accounting()
    thread.join()
    await asyncio.sleep(0)
    assert (budget.total, budget._measured) == (0, {})


async def test_connection_limit_applies_to_threads() -> None:
    """A write above the limit raises in the thread that writes, and writes nothing."""
    budget = MemoryBudget(10_000, 1_000)
    budget.bind_loop()
    owner = Owner(budget)
    with pytest.raises(MemoryLimitExceededError):
        await asyncio.to_thread(owner.data.__setitem__, "a", "x" * 1_000)
    assert (dict(owner.data), budget.total) == ({}, 0)


async def test_eviction_for_thread_write_runs_on_event_loop() -> None:
    """The eviction for a thread's write runs on the event loop, in its next iteration, and spares the writer."""
    budget = MemoryBudget(10_000)
    budget.bind_loop()
    writer, other = Owner(budget, "first in every order"), Owner(budget, "another")
    other.data["x"] = "x" * 6_000
    loop_thread, evicted_in = threading.get_ident(), []
    other.evict = lambda: (evicted_in.append(threading.get_ident()), other.data.stop_accounting())  # type: ignore[method-assign]
    await asyncio.to_thread(writer.data.__setitem__, "x", "x" * 6_000)
    await asyncio.sleep(0)
    assert (evicted_in, writer.evicted) == ([loop_thread], False)
    assert budget.total == counted(writer.data)


async def test_thread_write_over_total_limit_raises() -> None:
    """A thread's write above the total limit raises, and no client is evicted."""
    budget = MemoryBudget(10_000)
    budget.bind_loop()
    writer = Owner(budget)
    with pytest.raises(MemoryLimitExceededError, match="max_total_memory"):
        await asyncio.to_thread(writer.data.__setitem__, "x", "x" * 10_000)
