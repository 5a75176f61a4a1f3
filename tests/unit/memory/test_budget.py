"""Tests of the sum of what is held for clients, and of who goes when it is too much."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from fastapi_ws_stabilizer.errors import MemoryLimitExceededError
from fastapi_ws_stabilizer.memory import budget as ledger_module
from fastapi_ws_stabilizer.memory.budget import FRAME_OVERHEAD_BYTES, SLICE, Evictable, MemoryBudget, Policy
from tests.support.fake_evictable import FakeEvictable, Note
from tests.support.fake_link import virtually
from tests.support.fake_websocket import settle

POLICIES: tuple[Policy, ...] = ("lru", "fifo", "oldest")


@pytest.fixture
async def budget() -> MemoryBudget:
    """A ledger for 100 bytes."""
    made = MemoryBudget(100)
    made.begin()
    return made


def gone(*clients: FakeEvictable) -> str:
    """Who had to go."""
    return "".join(client.connection_id for client in clients if client.evicted)


# ── the sum ──


def test_shared_message_counts_once() -> None:
    """The first who holds it adds it, the last who lets go takes it away."""
    budget, note = MemoryBudget(), Note(30)
    for _ in range(3):
        budget.retain(note)
    sums = [budget.total]
    for _ in range(3):
        budget.release(note)
        sums.append(budget.total)
    assert sums == [30 + FRAME_OVERHEAD_BYTES] * 3 + [0]


async def test_total_is_read_without_visiting_clients(budget: MemoryBudget) -> None:
    """It is a number that is there, and no count of what clients hold."""
    for number in range(3):
        FakeEvictable(budget, str(number), 10).memory_usage = 999
    assert budget.total == 30


# ── who goes first ──


@pytest.mark.parametrize(("policy", "victim"), [("lru", "b"), ("fifo", "a"), ("oldest", "c")])
async def test_eviction_policy_selects_client(policy: Policy, victim: str) -> None:
    """Of the same three clients, each policy picks another one: they are three orders and no names for one."""
    budget = MemoryBudget(100, policy=policy)
    budget.begin()
    a, b, c = clients = [FakeEvictable(budget, name, 20) for name in "abc"]
    for delivered in (c, a, b):
        budget.on_delivered(delivered) if budget.output_counts else None
    for heard in (b, c, a):
        budget.on_inbound(heard)
    writer = FakeEvictable(budget, "w")
    budget.reserve(writer, 50)
    assert gone(*clients, writer) == victim


@pytest.mark.parametrize("policy", POLICIES)
async def test_reattached_client_is_last_in_eviction_order(policy: Policy) -> None:
    """A client that has come back is the last in every order, whenever it had come first."""
    budget = MemoryBudget(100, policy=policy)
    budget.begin()
    a, b = FakeEvictable(budget, "a", 40), FakeEvictable(budget, "b", 40)
    budget.detach(a)
    budget.attach(a)
    budget.reserve(None, 30)
    assert gone(a, b) == "b"


@pytest.mark.parametrize("policy", POLICIES)
async def test_detached_clients_are_evicted_first_oldest_first(policy: Policy) -> None:
    """Nobody who is here goes while something is kept for somebody who is not."""
    budget = MemoryBudget(100, policy=policy)
    budget.begin()
    a, b, c = (FakeEvictable(budget, name, 30) for name in "abc")
    budget.detach(c)
    budget.detach(b)
    order = []
    for _ in range(3):
        budget.reserve(None, 100 - budget.total + 1)
        order.append(gone(a, b, c))
    assert order == ["c", "bc", "abc"]


@pytest.mark.parametrize("policy", POLICIES)
async def test_writing_client_is_not_evicted(policy: Policy) -> None:
    """Room for what a client writes is made by others, even if it would be the first to go."""
    budget = MemoryBudget(100, policy=policy)
    budget.begin()
    a, b = FakeEvictable(budget, "a", 40), FakeEvictable(budget, "b", 40)
    budget.detach(a)
    budget.reserve(a, 30)
    assert gone(a, b) == "b"


async def test_eviction_stops_when_memory_suffices(budget: MemoryBudget) -> None:
    """Eviction stops as soon as there is room."""
    clients = [FakeEvictable(budget, name, 20) for name in "abcde"]
    budget.reserve(None, 21)
    assert gone(*clients) == "ab"


async def test_request_over_total_limit_raises_without_eviction(budget: MemoryBudget) -> None:
    """A client that wants more than there is for all is refused before anybody goes for it."""
    a, b = FakeEvictable(budget, "a", 40), FakeEvictable(budget, "b", 40)
    with pytest.raises(MemoryLimitExceededError) as refused:
        budget.reserve(b, 61)
    assert (refused.value.limit, refused.value.most, gone(a, b)) == ("max_total_memory", 100, "")


async def test_shared_message_is_freed_with_last_holder(budget: MemoryBudget) -> None:
    """Clients go, the first before all others, until what they have shared is free."""
    shared = Note(60)
    clients = [FakeEvictable(budget, name) for name in "abc"]
    for client in clients:
        client.holds(shared)
    budget.reserve(None, 50)
    assert (gone(*clients), budget.total) == ("abc", 0)


async def test_unreserved_growth_evicts_on_next_iteration(budget: MemoryBudget) -> None:
    """Messages are queued first and counted; nobody goes in the middle of that, and the limit holds a turn later."""
    clients = [FakeEvictable(budget, name, 40) for name in "abc"]
    assert (budget.total, gone(*clients)) == (120, "")
    await settle(1)
    assert (budget.total, gone(*clients)) == (80, "a")


async def test_unreserved_message_over_total_limit_evicts_holder(budget: MemoryBudget) -> None:
    """The limit holds for what nobody has asked for, even if its holder is the only client."""
    client = FakeEvictable(budget, "a")
    client.holds(Note(101))
    await settle(1)
    assert (gone(client), budget.total) == ("a", 0)


async def test_removed_client_is_not_evicted(budget: MemoryBudget) -> None:
    """A client that is over is no candidate; leaving twice changes nothing."""
    a, b = FakeEvictable(budget, "a", 40), FakeEvictable(budget, "b", 40)
    budget.detach(a)
    budget.remove(a)
    budget.remove(a)
    budget.reserve(None, 30)
    assert gone(a, b) == "b"


async def test_activity_of_detached_or_removed_client_is_ignored(budget: MemoryBudget) -> None:
    """A message of a client that has left, or is away, does not bring it back."""
    a = FakeEvictable(budget, "a", 40)
    b = FakeEvictable(budget, "b", 40)
    budget.detach(a)
    budget.on_inbound(a)
    budget.on_delivered(a)
    budget.remove(b)
    budget.on_inbound(b)
    budget.reserve(None, 21)
    assert gone(a, b) == "a"


def test_budget_without_limit_maintains_no_order() -> None:
    """Who needs no order pays for none."""
    budget = MemoryBudget()
    client = FakeEvictable(budget, "a", 10**12)
    budget.on_inbound(client)
    budget.detach(client)
    budget.reserve(client, 10**12)
    assert not budget._entries


# ── what one may hold ──


def test_write_over_connection_limit_raises() -> None:
    """What a client holds already counts; nothing is written, and the error names the option and its value."""
    budget = MemoryBudget(max_each=100)
    client = FakeEvictable(budget, "a", 60)
    budget.reserve(client, 40)
    with pytest.raises(MemoryLimitExceededError) as refused:
        budget.reserve(client, 41)
    error = refused.value
    assert (error.limit, error.most, error.wanted) == ("max_memory_per_connection", 100, 101)
    assert budget.total == 60


def test_shrinking_write_is_never_rejected() -> None:
    """A client that is over the limit can always shrink."""
    budget = MemoryBudget(max_each=10)
    client = FakeEvictable(budget, "a", 60)
    budget.reserve(client, -20)
    budget.reserve(client, 0)


def test_client_over_limit_is_ended_at_next_message() -> None:
    """Queues and logs do not ask, so their sum is looked at when its client says something."""
    budget = MemoryBudget(max_each=100)
    client = FakeEvictable(budget, "a", 100)
    budget.on_inbound(client)
    assert client.ended_at is None
    client.takes(1)
    budget.on_inbound(client)
    assert client.ended_at == 101


async def test_flood_of_one_client_evicts_no_other() -> None:
    """`max_memory_per_connection` refuses it before room is made."""
    budget = MemoryBudget(1000, max_each=100)
    budget.begin()
    others = [FakeEvictable(budget, name, 90) for name in "abcdefghij"]
    flood = FakeEvictable(budget, "x", 50)
    with pytest.raises(MemoryLimitExceededError):
        budget.reserve(flood, 60)
    assert gone(*others) == ""


# ── how much it costs ──


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("number", [10, 10_000])
async def test_eviction_cost_is_independent_of_client_count(
    policy: Policy, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handful of looks at the line to come, to speak, to be sent something and to go, among ten or ten thousand."""
    budget = MemoryBudget(number, policy=policy)
    budget.begin()
    clients = [FakeEvictable(budget, str(place), 1) for place in range(number)]
    silent = [FakeEvictable(budget, f"silent {place}") for place in range(number)]
    looks = 0

    def looking(real: Any) -> Any:
        def look(*args: Any) -> Any:
            nonlocal looks
            looks += 1
            return real(*args)

        return look

    for name in ("heappush", "heappop", "heapify"):
        monkeypatch.setattr(ledger_module, name, looking(getattr(ledger_module, name)))
    most = 0
    for one in range(5):
        looks = 0
        budget.on_inbound(clients[7])
        budget.on_delivered(clients[8])
        budget.reserve(clients[9], 1)
        FakeEvictable(budget, f"new {one}", 1)
        most = max(most, looks)
    assert sum(client.evicted for client in clients) == 5
    assert most <= 10
    assert gone(*silent) == ""


@pytest.mark.parametrize("policy", POLICIES)
async def test_client_without_memory_is_not_evicted(policy: Policy) -> None:
    """However long it was silent, its end would free nothing. When it holds something, it stands where it stood."""
    budget = MemoryBudget(100, policy=policy)
    budget.begin()
    a, b, c = FakeEvictable(budget, "a"), FakeEvictable(budget, "b", 50), FakeEvictable(budget, "c", 50)
    budget.reserve(None, 10)
    assert gone(a, b, c) == "b"
    b = FakeEvictable(budget, "b", 10)
    a.takes(10)
    budget.reserve(None, 35)
    assert gone(a, b, c) == "a"


@pytest.mark.parametrize("policy", POLICIES)
async def test_refilled_client_returns_to_its_eviction_position(policy: Policy) -> None:
    """It comes back to where it would have stood, and not to the end."""
    budget = MemoryBudget(100, policy=policy)
    budget.begin()
    a, b, c = (FakeEvictable(budget, name, 30) for name in "abc")
    a.takes(-30)
    budget.reserve(None, 50)
    assert gone(a, b, c) == "b"
    a.takes(30)
    budget.reserve(None, 50)
    assert gone(a, c) == "a"


async def test_closed_client_is_evicted_before_detached_ones(budget: MemoryBudget) -> None:
    """Nobody goes who could come back, or is here, while something is held for what is over."""
    a, b, c = (FakeEvictable(budget, name, 30) for name in "abc")
    budget.detach(a)
    budget.mark_closed(c)
    budget.reserve(None, 20)
    assert gone(a, b, c) == "c"


async def test_many_evictions_are_spread_over_iterations(budget: MemoryBudget, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a turn as many go as a slice of time is enough for, and others in the turns after it."""
    clients = [FakeEvictable(budget, str(number), 10) for number in range(10)]
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += SLICE / 3
        return now

    monkeypatch.setattr(ledger_module, "monotonic", clock)
    FakeEvictable(budget, "hog", 90)
    counts = []
    for _ in range(4):
        await asyncio.sleep(0)
        counts.append(sum(client.evicted for client in clients))
    assert counts == [3, 6, 9, 9]


async def test_eviction_queue_does_not_grow_with_reattachments(budget: MemoryBudget) -> None:
    """What means nothing any more is thrown out of it."""
    client = FakeEvictable(budget, "a", 10)
    for _ in range(1_000):
        budget.detach(client)
        budget.attach(client)
    assert len(budget._heap) < 100


async def test_pinned_client_is_not_evicted(budget: MemoryBudget) -> None:
    """For as long as it lasts; and what those hold that stay is not counted on."""
    a, b = FakeEvictable(budget, "a", 60), FakeEvictable(budget, "b", 30)
    with budget.pinned(a), budget.pinned(None):
        with pytest.raises(MemoryLimitExceededError):
            budget.reserve(None, 50)
        assert gone(a, b) == ""
        budget.reserve(None, 40)
        assert gone(a, b) == "b"
    budget.reserve(None, 50)
    assert gone(a, b) == "ab"
    assert not budget._pinned


# ── what grows without telling ──


class FakeDict:
    """A dict that grows inside."""

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
        """It holds nothing more."""
        self._known = 0
        self.sizes.clear()
        self._budget.changed(self)


@virtually
async def test_growth_inside_dict_is_found_at_next_check() -> None:
    """Every `memory_check_interval`, and not before."""
    budget = MemoryBudget(check_interval=5.0)
    budget.begin()
    growing = FakeDict(budget, 10)
    growing.sizes[0] = 70
    sums = []
    for _ in range(3):
        await asyncio.sleep(4.0)
        sums.append((budget.total, growing.looks))
    assert sums == [(10, 0), (70, 1), (70, 2)]


@virtually
async def test_memory_check_runs_once_per_interval() -> None:
    """However often sizes have changed, the next look comes once an interval."""
    budget = MemoryBudget(check_interval=5.0)
    budget.begin()
    growing = FakeDict(budget, 10)
    for seconds in range(20):
        growing.sizes[0] += 1
        assert growing.looks == seconds
        await asyncio.sleep(5.0)
    budget.stop()


@virtually
async def test_empty_dict_is_not_checked() -> None:
    """With the last dict the timer goes too, and comes again with the next one."""
    budget = MemoryBudget(check_interval=5.0)
    budget.begin()
    empty = FakeDict(budget, 10)
    empty.empty()
    await asyncio.sleep(6.0)
    assert (budget._timer, budget._measured, empty.looks) == (None, {}, 0)
    full = FakeDict(budget, 10)
    await asyncio.sleep(6.0)
    assert full.looks == 1
    budget.stop()


async def test_memory_check_yields_after_time_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring stops after `PARSE_SLICE`, in the middle of a dict if need be, and goes on after a turn of the loop."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += SLICE / 10  # each look at it costs a tenth of a slice
        return now

    budget = MemoryBudget(check_interval=0.001)
    budget.begin()
    large, small = FakeDict(budget, *[1] * 25), FakeDict(budget, 1)
    monkeypatch.setattr(ledger_module, "monotonic", clock)
    looks: list[int] = []
    scheduler = 0  # of the loop, most of them before the first look
    while not small.looks:
        await asyncio.sleep(0)
        if large.looks and (not looks or looks[-1] != large.looks):
            looks.append(large.looks)
        scheduler += 1
        assert scheduler < 100_000
    assert looks == [10, 20, 25]
    budget.stop()


@virtually
async def test_dict_detached_during_check_is_skipped() -> None:
    """It is looked at no more when its turn comes."""
    budget = MemoryBudget(check_interval=5.0)
    budget.begin()
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
    """No timer, no order, no dict."""
    FakeDict(budget, 10)
    clients = [FakeEvictable(budget, name, 60) for name in "ab"]
    budget.stop()
    await settle(2)
    assert (gone(*clients), budget._timer, budget._eviction) == ("", None, None)
    assert not budget._entries
    assert not budget._heap
    assert not budget._measured
