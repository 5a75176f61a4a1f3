"""Tests of the total of held memory, and of eviction."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from fastapi_ws_stabilizer.errors import MemoryLimitExceededError
from fastapi_ws_stabilizer.memory import budget as budget_module
from fastapi_ws_stabilizer.memory.budget import FRAME_OVERHEAD_BYTES, SLICE, Evictable, MemoryBudget, Policy
from tests.support.fake_evictable import FakeEvictable, Note
from tests.support.fake_link import virtually
from tests.support.fake_websocket import settle

POLICIES: tuple[Policy, ...] = ("lru", "fifo", "oldest")


@pytest.fixture
async def budget() -> MemoryBudget:
    """Return a budget of 100 bytes."""
    made = MemoryBudget(100)
    made.bind_loop()
    return made


def evicted_ids(*clients: FakeEvictable) -> str:
    """Return the ids of the evicted clients."""
    return "".join(client.connection_id for client in clients if client.evicted)


# ── total ──


def test_shared_message_counts_once() -> None:
    """A shared message counts from its first holder to its last."""
    budget, note = MemoryBudget(), Note(30)
    for _ in range(3):
        budget.retain(note)
    sums = [budget.total]
    for _ in range(3):
        budget.release(note)
        sums.append(budget.total)
    assert sums == [30 + FRAME_OVERHEAD_BYTES] * 3 + [0]


async def test_total_is_read_without_visiting_clients(budget: MemoryBudget) -> None:
    """The total is a stored number, not a sum over the clients."""
    for number in range(3):
        FakeEvictable(budget, str(number), 10).memory_usage = 999
    assert budget.total == 30


# ── eviction order ──


@pytest.mark.parametrize(("policy", "victim"), [("lru", "b"), ("fifo", "a"), ("oldest", "c")])
async def test_eviction_policy_selects_client(policy: Policy, victim: str) -> None:
    """Each policy selects another one of the same three clients."""
    budget = MemoryBudget(100, policy=policy)
    budget.bind_loop()
    a, b, c = clients = [FakeEvictable(budget, name, 20) for name in "abc"]
    for delivered in (c, a, b):
        budget.on_delivered(delivered) if budget.output_counts else None
    for sender in (b, c, a):
        budget.on_inbound(sender)
    writer = FakeEvictable(budget, "w")
    budget.ensure_room(writer, 50)
    assert evicted_ids(*clients, writer) == victim


@pytest.mark.parametrize("policy", POLICIES)
async def test_reattached_client_is_last_in_eviction_order(policy: Policy) -> None:
    """A reattached client is the last in the eviction order of each policy."""
    budget = MemoryBudget(100, policy=policy)
    budget.bind_loop()
    a, b = FakeEvictable(budget, "a", 40), FakeEvictable(budget, "b", 40)
    budget.detach(a)
    budget.attach(a)
    budget.ensure_room(None, 30)
    assert evicted_ids(a, b) == "b"


@pytest.mark.parametrize("policy", POLICIES)
async def test_detached_clients_are_evicted_first_oldest_first(policy: Policy) -> None:
    """Detached clients are evicted before connected ones, the oldest first."""
    budget = MemoryBudget(100, policy=policy)
    budget.bind_loop()
    a, b, c = (FakeEvictable(budget, name, 30) for name in "abc")
    budget.detach(c)
    budget.detach(b)
    order = []
    for _ in range(3):
        budget.ensure_room(None, 100 - budget.total + 1)
        order.append(evicted_ids(a, b, c))
    assert order == ["c", "bc", "abc"]


@pytest.mark.parametrize("policy", POLICIES)
async def test_writing_client_is_not_evicted(policy: Policy) -> None:
    """A client is not evicted for its own write, even if it is the first in the order."""
    budget = MemoryBudget(100, policy=policy)
    budget.bind_loop()
    a, b = FakeEvictable(budget, "a", 40), FakeEvictable(budget, "b", 40)
    budget.detach(a)
    budget.ensure_room(a, 30)
    assert evicted_ids(a, b) == "b"


async def test_eviction_stops_when_memory_suffices(budget: MemoryBudget) -> None:
    """Eviction stops as soon as enough memory is free."""
    clients = [FakeEvictable(budget, name, 20) for name in "abcde"]
    budget.ensure_room(None, 21)
    assert evicted_ids(*clients) == "ab"


async def test_request_over_total_limit_raises_without_eviction(budget: MemoryBudget) -> None:
    """A request above the total limit raises before any eviction."""
    a, b = FakeEvictable(budget, "a", 40), FakeEvictable(budget, "b", 40)
    with pytest.raises(MemoryLimitExceededError) as rejected:
        budget.ensure_room(b, 61)
    assert (rejected.value.option, rejected.value.limit, evicted_ids(a, b)) == ("max_total_memory", 100, "")


async def test_shared_message_is_freed_with_last_holder(budget: MemoryBudget) -> None:
    """A shared message is freed only with its last holder."""
    shared = Note(60)
    clients = [FakeEvictable(budget, name) for name in "abc"]
    for client in clients:
        client.holds(shared)
    budget.ensure_room(None, 50)
    assert (evicted_ids(*clients), budget.total) == ("abc", 0)


async def test_unreserved_growth_evicts_on_next_iteration(budget: MemoryBudget) -> None:
    """Queued messages are counted at once, and the eviction for them runs in the next loop iteration."""
    clients = [FakeEvictable(budget, name, 40) for name in "abc"]
    assert (budget.total, evicted_ids(*clients)) == (120, "")
    await settle(1)
    assert (budget.total, evicted_ids(*clients)) == (80, "a")


async def test_unreserved_message_over_total_limit_evicts_holder(budget: MemoryBudget) -> None:
    """An unreserved message above the total limit evicts its holder, even if that is the only client."""
    client = FakeEvictable(budget, "a")
    client.holds(Note(101))
    await settle(1)
    assert (evicted_ids(client), budget.total) == ("a", 0)


async def test_removed_client_is_not_evicted(budget: MemoryBudget) -> None:
    """A removed client is not evicted, and a second removal has no effect."""
    a, b = FakeEvictable(budget, "a", 40), FakeEvictable(budget, "b", 40)
    budget.detach(a)
    budget.remove(a)
    budget.remove(a)
    budget.ensure_room(None, 30)
    assert evicted_ids(a, b) == "b"


async def test_activity_of_detached_or_removed_client_is_ignored(budget: MemoryBudget) -> None:
    """Activity of a detached or removed client does not change the eviction order."""
    a = FakeEvictable(budget, "a", 40)
    b = FakeEvictable(budget, "b", 40)
    budget.detach(a)
    budget.on_inbound(a)
    budget.on_delivered(a)
    budget.remove(b)
    budget.on_inbound(b)
    budget.ensure_room(None, 21)
    assert evicted_ids(a, b) == "a"


def test_budget_without_limit_maintains_no_order() -> None:
    """Without a limit the budget maintains no eviction order."""
    budget = MemoryBudget()
    client = FakeEvictable(budget, "a", 10**12)
    budget.on_inbound(client)
    budget.detach(client)
    budget.ensure_room(client, 10**12)
    assert not budget._entries


# ── limit of one client ──


def test_write_over_connection_limit_raises() -> None:
    """A write above the limit, with what the client holds already, raises with the option and its value."""
    budget = MemoryBudget(max_each=100)
    client = FakeEvictable(budget, "a", 60)
    budget.ensure_room(client, 40)
    with pytest.raises(MemoryLimitExceededError) as rejected:
        budget.ensure_room(client, 41)
    error = rejected.value
    assert (error.option, error.limit, error.requested) == ("max_memory_per_connection", 100, 101)
    assert budget.total == 60


def test_shrinking_write_is_never_rejected() -> None:
    """A client above its limit may always shrink."""
    budget = MemoryBudget(max_each=10)
    client = FakeEvictable(budget, "a", 60)
    budget.ensure_room(client, -20)
    budget.ensure_room(client, 0)


def test_client_over_limit_is_ended_at_next_message() -> None:
    """Queues reserve nothing, so the limit is checked at the next message of their client."""
    budget = MemoryBudget(max_each=100)
    client = FakeEvictable(budget, "a", 100)
    budget.on_inbound(client)
    assert client.ended_at is None
    client.takes(1)
    budget.on_inbound(client)
    assert client.ended_at == 101


async def test_flood_of_one_client_evicts_no_other() -> None:
    """A write above `max_memory_per_connection` raises before any eviction."""
    budget = MemoryBudget(1000, max_each=100)
    budget.bind_loop()
    others = [FakeEvictable(budget, name, 90) for name in "abcdefghij"]
    flood = FakeEvictable(budget, "x", 50)
    with pytest.raises(MemoryLimitExceededError):
        budget.ensure_room(flood, 60)
    assert evicted_ids(*others) == ""


# ── cost ──


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("number", [10, 10_000])
async def test_eviction_cost_is_independent_of_client_count(
    policy: Policy, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activity and eviction take at most 10 heap operations, for 10 clients as for 10,000."""
    budget = MemoryBudget(number, policy=policy)
    budget.bind_loop()
    clients = [FakeEvictable(budget, str(index), 1) for index in range(number)]
    silent = [FakeEvictable(budget, f"silent {index}") for index in range(number)]
    looks = 0

    def looking(real: Any) -> Any:
        def look(*args: Any) -> Any:
            nonlocal looks
            looks += 1
            return real(*args)

        return look

    for name in ("heappush", "heappop", "heapify"):
        monkeypatch.setattr(budget_module, name, looking(getattr(budget_module, name)))
    most = 0
    for one in range(5):
        looks = 0
        budget.on_inbound(clients[7])
        budget.on_delivered(clients[8])
        budget.ensure_room(clients[9], 1)
        FakeEvictable(budget, f"new {one}", 1)
        most = max(most, looks)
    assert sum(client.evicted for client in clients) == 5
    assert most <= 10
    assert evicted_ids(*silent) == ""


@pytest.mark.parametrize("policy", POLICIES)
async def test_client_without_memory_is_not_evicted(policy: Policy) -> None:
    """A client that holds nothing is not evicted; when it holds memory, it has its old position in the order."""
    budget = MemoryBudget(100, policy=policy)
    budget.bind_loop()
    a, b, c = FakeEvictable(budget, "a"), FakeEvictable(budget, "b", 50), FakeEvictable(budget, "c", 50)
    budget.ensure_room(None, 10)
    assert evicted_ids(a, b, c) == "b"
    b = FakeEvictable(budget, "b", 10)
    a.takes(10)
    budget.ensure_room(None, 35)
    assert evicted_ids(a, b, c) == "a"


@pytest.mark.parametrize("policy", POLICIES)
async def test_refilled_client_returns_to_its_eviction_position(policy: Policy) -> None:
    """A client that holds memory again has its old position in the order, instead of the last one."""
    budget = MemoryBudget(100, policy=policy)
    budget.bind_loop()
    a, b, c = (FakeEvictable(budget, name, 30) for name in "abc")
    a.takes(-30)
    budget.ensure_room(None, 50)
    assert evicted_ids(a, b, c) == "b"
    a.takes(30)
    budget.ensure_room(None, 50)
    assert evicted_ids(a, c) == "a"


async def test_closed_client_is_evicted_before_detached_ones(budget: MemoryBudget) -> None:
    """The memory of a closed client is freed before a detached or connected client is evicted."""
    a, b, c = (FakeEvictable(budget, name, 30) for name in "abc")
    budget.detach(a)
    budget.mark_closed(c)
    budget.ensure_room(None, 20)
    assert evicted_ids(a, b, c) == "c"


async def test_many_evictions_are_spread_over_iterations(budget: MemoryBudget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loop iteration evicts for one time slice, and later iterations evict the rest."""
    clients = [FakeEvictable(budget, str(number), 10) for number in range(10)]
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += SLICE / 3
        return now

    monkeypatch.setattr(budget_module, "monotonic", clock)
    FakeEvictable(budget, "hog", 90)
    counts = []
    for _ in range(4):
        await asyncio.sleep(0)
        counts.append(sum(client.evicted for client in clients))
    assert counts == [3, 6, 9, 9]


async def test_eviction_queue_does_not_grow_with_reattachments(budget: MemoryBudget) -> None:
    """Obsolete entries of the eviction queue are removed."""
    client = FakeEvictable(budget, "a", 10)
    for _ in range(1_000):
        budget.detach(client)
        budget.attach(client)
    assert len(budget._heap) < 100


async def test_pinned_client_is_not_evicted(budget: MemoryBudget) -> None:
    """A pinned client is not evicted, and its memory does not count as available."""
    a, b = FakeEvictable(budget, "a", 60), FakeEvictable(budget, "b", 30)
    with budget.pinned(a), budget.pinned(None):
        with pytest.raises(MemoryLimitExceededError):
            budget.ensure_room(None, 50)
        assert evicted_ids(a, b) == ""
        budget.ensure_room(None, 40)
        assert evicted_ids(a, b) == "b"
    budget.ensure_room(None, 50)
    assert evicted_ids(a, b) == "ab"
    assert not budget._pinned


# ── growth inside values ──


class FakeDict:
    """Dict with values that grow."""

    def __init__(self, budget: MemoryBudget, *sizes: int) -> None:
        self.owner: Evictable | None = None
        self.counted_bytes = 0
        self.sizes = list(sizes)
        self.looks = 0
        self._budget = budget
        self._known = sum(sizes)
        budget.changed(self)

    def flush_accounting(self) -> int:
        more, self.counted_bytes = self._known - self.counted_bytes, self._known
        return more

    def remeasure(self) -> Iterator[None]:
        for _ in self.sizes:
            self.looks += 1
            yield
        self._known = sum(self.sizes)
        self._budget.changed(self)

    def empty(self) -> None:
        """Remove all values."""
        self._known = 0
        self.sizes.clear()
        self._budget.changed(self)


@virtually
async def test_growth_inside_dict_is_found_at_next_check() -> None:
    """Growth inside a dict is found every `memory_check_interval`, and not earlier."""
    budget = MemoryBudget(check_interval=5.0)
    budget.bind_loop()
    growing = FakeDict(budget, 10)
    growing.sizes[0] = 70
    sums = []
    for _ in range(3):
        await asyncio.sleep(4.0)
        sums.append((budget.total, growing.looks))
    assert sums == [(10, 0), (70, 1), (70, 2)]


@virtually
async def test_memory_check_runs_once_per_interval() -> None:
    """The check runs once per interval, for any number of changes."""
    budget = MemoryBudget(check_interval=5.0)
    budget.bind_loop()
    growing = FakeDict(budget, 10)
    for seconds in range(20):
        growing.sizes[0] += 1
        assert growing.looks == seconds
        await asyncio.sleep(5.0)
    budget.stop()


@virtually
async def test_empty_dict_is_not_checked() -> None:
    """The timer stops with the last dict and starts with the next one."""
    budget = MemoryBudget(check_interval=5.0)
    budget.bind_loop()
    empty = FakeDict(budget, 10)
    empty.empty()
    await asyncio.sleep(6.0)
    assert (budget._timer, budget._measured, empty.looks) == (None, {}, 0)
    full = FakeDict(budget, 10)
    await asyncio.sleep(6.0)
    assert full.looks == 1
    budget.stop()


async def test_memory_check_yields_after_time_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring yields after `SLICE`, even within a dict, and continues in a later loop iteration."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += SLICE / 10  # each read of the clock costs a tenth of a slice
        return now

    budget = MemoryBudget(check_interval=0.001)
    budget.bind_loop()
    large, small = FakeDict(budget, *[1] * 25), FakeDict(budget, 1)
    monkeypatch.setattr(budget_module, "monotonic", clock)
    looks: list[int] = []
    iterations = 0  # most of them before the first measurement
    while not small.looks:
        await asyncio.sleep(0)
        if large.looks and (not looks or looks[-1] != large.looks):
            looks.append(large.looks)
        iterations += 1
        assert iterations < 100_000
    assert looks == [10, 20, 25]
    budget.stop()


@virtually
async def test_dict_detached_during_check_is_skipped() -> None:
    """A dict that is emptied during a check is skipped."""
    budget = MemoryBudget(check_interval=5.0)
    budget.bind_loop()
    second = FakeDict(budget, 1)

    class Emptying(FakeDict):
        def remeasure(self) -> Iterator[None]:
            second.empty()
            yield from super().remeasure()

    first = Emptying(budget, 1)
    budget._measured = {id(first): first, id(second): second}
    await asyncio.sleep(6.0)
    assert (first.looks, second.looks) == (1, 0)
    budget.stop()


async def test_stopped_budget_holds_nothing(budget: MemoryBudget) -> None:
    """A stopped budget has no timer, no order and no dict."""
    FakeDict(budget, 10)
    clients = [FakeEvictable(budget, name, 60) for name in "ab"]
    budget.stop()
    await settle(2)
    assert (evicted_ids(*clients), budget._timer, budget._eviction) == ("", None, None)
    assert not budget._entries
    assert not budget._heap
    assert not budget._measured
