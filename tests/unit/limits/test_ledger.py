"""Tests of the sum of what is held for clients, and of who goes when it is too much."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from fastapi_ws_stabilizer.errors import MemoryLimitExceededError
from fastapi_ws_stabilizer.limits import ledger as ledger_module
from fastapi_ws_stabilizer.limits.ledger import FRAME_OVERHEAD_BYTES, SLICE, Evictable, MemoryBudget, Policy
from tests.unit.client.fake_link import virtually
from tests.unit.fake_websocket import settle
from tests.unit.limits.fake_client import FakeClient, Note

POLICIES: tuple[Policy, ...] = ("lru", "fifo", "oldest")


@pytest.fixture
async def ledger() -> MemoryBudget:
    """A ledger for 100 bytes."""
    made = MemoryBudget(100)
    made.begin()
    return made


def gone(*clients: FakeClient) -> str:
    """Who had to go."""
    return "".join(client.connection_id for client in clients if client.evicted)


# ── the sum ──


def test_a_message_that_many_hold_counts_once() -> None:
    """The first who holds it adds it, the last who lets go takes it away."""
    ledger, note = MemoryBudget(), Note(30)
    for _ in range(3):
        ledger.hold(note)
    sums = [ledger.total]
    for _ in range(3):
        ledger.release(note)
        sums.append(ledger.total)
    assert sums == [30 + FRAME_OVERHEAD_BYTES] * 3 + [0]


async def test_a_read_of_the_sum_looks_at_nobody(ledger: MemoryBudget) -> None:
    """It is a number that is there, and no count of what clients hold."""
    for number in range(3):
        FakeClient(ledger, str(number), 10).held_memory = 999
    assert ledger.total == 30


# ── who goes first ──


@pytest.mark.parametrize(("policy", "victim"), [("lru", "b"), ("fifo", "a"), ("oldest", "c")])
async def test_each_policy_picks_another(policy: Policy, victim: str) -> None:
    """Of the same three clients, each policy picks another one: they are three orders and no names for one."""
    ledger = MemoryBudget(100, policy=policy)
    ledger.begin()
    a, b, c = clients = [FakeClient(ledger, name, 20) for name in "abc"]
    for delivered in (c, a, b):
        ledger.delivered(delivered) if ledger.output_counts else None
    for heard in (b, c, a):
        ledger.heard(heard)
    writer = FakeClient(ledger, "w")
    ledger.admit(writer, 50)
    assert gone(*clients, writer) == victim


@pytest.mark.parametrize("policy", POLICIES)
async def test_who_comes_back_comes_anew(policy: Policy) -> None:
    """A client that has come back is the last in every order, whenever it had come first."""
    ledger = MemoryBudget(100, policy=policy)
    ledger.begin()
    a, b = FakeClient(ledger, "a", 40), FakeClient(ledger, "b", 40)
    ledger.goes_away(a)
    ledger.enter(a)
    ledger.admit(None, 30)
    assert gone(a, b) == "b"


@pytest.mark.parametrize("policy", POLICIES)
async def test_those_that_are_away_go_first_the_one_that_left_first_before_all(policy: Policy) -> None:
    """Nobody who is here goes while something is kept for somebody who is not."""
    ledger = MemoryBudget(100, policy=policy)
    ledger.begin()
    a, b, c = (FakeClient(ledger, name, 30) for name in "abc")
    ledger.goes_away(c)
    ledger.goes_away(b)
    order = []
    for _ in range(3):
        ledger.admit(None, 100 - ledger.total + 1)
        order.append(gone(a, b, c))
    assert order == ["c", "bc", "abc"]


@pytest.mark.parametrize("policy", POLICIES)
async def test_the_writer_is_spared(policy: Policy) -> None:
    """Room for what a client writes is made by others, even if it would be the first to go."""
    ledger = MemoryBudget(100, policy=policy)
    ledger.begin()
    a, b = FakeClient(ledger, "a", 40), FakeClient(ledger, "b", 40)
    ledger.goes_away(a)
    ledger.admit(a, 30)
    assert gone(a, b) == "b"


async def test_as_many_go_as_must_and_no_more(ledger: MemoryBudget) -> None:
    """Eviction stops as soon as there is room."""
    clients = [FakeClient(ledger, name, 20) for name in "abcde"]
    ledger.admit(None, 21)
    assert gone(*clients) == "ab"


async def test_what_cannot_be_costs_nobody_their_connection(ledger: MemoryBudget) -> None:
    """A client that wants more than there is for all is refused before anybody goes for it."""
    a, b = FakeClient(ledger, "a", 40), FakeClient(ledger, "b", 40)
    with pytest.raises(MemoryLimitExceededError) as refused:
        ledger.admit(b, 61)
    assert (refused.value.limit, refused.value.most, gone(a, b)) == ("max_total_memory", 100, "")


async def test_a_shared_message_is_free_when_its_last_holder_went(ledger: MemoryBudget) -> None:
    """Clients go, the first before all others, until what they have shared is free."""
    shared = Note(60)
    clients = [FakeClient(ledger, name) for name in "abc"]
    for client in clients:
        client.holds(shared)
    ledger.admit(None, 50)
    assert (gone(*clients), ledger.total) == ("abc", 0)


async def test_what_grows_without_asking_is_dealt_with_at_the_end_of_the_turn(ledger: MemoryBudget) -> None:
    """Messages are queued first and counted; nobody goes in the middle of that, and the limit holds a turn later."""
    clients = [FakeClient(ledger, name, 40) for name in "abc"]
    assert (ledger.total, gone(*clients)) == (120, "")
    await settle(1)
    assert (ledger.total, gone(*clients)) == (80, "a")


async def test_a_message_that_is_too_much_for_all_ends_its_holder(ledger: MemoryBudget) -> None:
    """The limit holds for what nobody has asked for, even if its holder is the only client."""
    client = FakeClient(ledger, "a")
    client.holds(Note(101))
    await settle(1)
    assert (gone(client), ledger.total) == ("a", 0)


async def test_who_has_left_is_found_no_more(ledger: MemoryBudget) -> None:
    """A client that is over is no candidate; leaving twice changes nothing."""
    a, b = FakeClient(ledger, "a", 40), FakeClient(ledger, "b", 40)
    ledger.goes_away(a)
    ledger.leave(a)
    ledger.leave(a)
    ledger.admit(None, 30)
    assert gone(a, b) == "b"


async def test_news_of_somebody_who_is_not_here_change_nothing(ledger: MemoryBudget) -> None:
    """A message of a client that has left, or is away, does not bring it back."""
    a = FakeClient(ledger, "a", 40)
    b = FakeClient(ledger, "b", 40)
    ledger.goes_away(a)
    ledger.heard(a)
    ledger.delivered(a)
    ledger.leave(b)
    ledger.heard(b)
    ledger.admit(None, 21)
    assert gone(a, b) == "a"


def test_without_a_limit_nobody_stands_anywhere() -> None:
    """Who needs no order pays for none."""
    ledger = MemoryBudget()
    client = FakeClient(ledger, "a", 10**12)
    ledger.heard(client)
    ledger.goes_away(client)
    ledger.admit(client, 10**12)
    assert not ledger._places


# ── what one may hold ──


def test_one_client_may_hold_only_so_much() -> None:
    """What a client holds already counts; nothing is written, and the error names the option and its value."""
    ledger = MemoryBudget(max_each=100)
    client = FakeClient(ledger, "a", 60)
    ledger.admit(client, 40)
    with pytest.raises(MemoryLimitExceededError) as refused:
        ledger.admit(client, 41)
    error = refused.value
    assert (error.limit, error.most, error.wanted) == ("max_memory_per_connection", 100, 101)
    assert ledger.total == 60


def test_to_hold_less_is_never_refused() -> None:
    """A client that is over the limit can always shrink."""
    ledger = MemoryBudget(max_each=10)
    client = FakeClient(ledger, "a", 60)
    ledger.admit(client, -20)
    ledger.admit(client, 0)


def test_who_holds_too_much_is_found_with_its_next_message() -> None:
    """Queues and logs do not ask, so their sum is looked at when its client says something."""
    ledger = MemoryBudget(max_each=100)
    client = FakeClient(ledger, "a", 100)
    ledger.heard(client)
    assert client.ended_at is None
    client.takes(1)
    ledger.heard(client)
    assert client.ended_at == 101


async def test_a_flood_of_one_evicts_nobody_where_one_may_hold_only_so_much() -> None:
    """`max_memory_per_connection` refuses it before room is made."""
    ledger = MemoryBudget(1000, max_each=100)
    ledger.begin()
    others = [FakeClient(ledger, name, 90) for name in "abcdefghij"]
    flood = FakeClient(ledger, "x", 50)
    with pytest.raises(MemoryLimitExceededError):
        ledger.admit(flood, 60)
    assert gone(*others) == ""


# ── how much it costs ──


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("number", [10, 10_000])
async def test_to_evict_one_costs_the_same_whatever_their_number(
    policy: Policy, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handful of looks at the line to come, to speak, to be sent something and to go, among ten or ten thousand."""
    ledger = MemoryBudget(number, policy=policy)
    ledger.begin()
    clients = [FakeClient(ledger, str(place), 1) for place in range(number)]
    silent = [FakeClient(ledger, f"silent {place}") for place in range(number)]
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
        ledger.heard(clients[7])
        ledger.delivered(clients[8])
        ledger.admit(clients[9], 1)
        FakeClient(ledger, f"new {one}", 1)
        most = max(most, looks)
    assert sum(client.evicted for client in clients) == 5
    assert most <= 10
    assert gone(*silent) == ""


@pytest.mark.parametrize("policy", POLICIES)
async def test_who_holds_nothing_does_not_go(policy: Policy) -> None:
    """However long it was silent, its end would free nothing. When it holds something, it stands where it stood."""
    ledger = MemoryBudget(100, policy=policy)
    ledger.begin()
    a, b, c = FakeClient(ledger, "a"), FakeClient(ledger, "b", 50), FakeClient(ledger, "c", 50)
    ledger.admit(None, 10)
    assert gone(a, b, c) == "b"
    b = FakeClient(ledger, "b", 10)
    a.takes(10)
    ledger.admit(None, 35)
    assert gone(a, b, c) == "a"


@pytest.mark.parametrize("policy", POLICIES)
async def test_who_holds_nothing_any_more_leaves_the_line_until_it_does(policy: Policy) -> None:
    """It comes back to where it would have stood, and not to the end."""
    ledger = MemoryBudget(100, policy=policy)
    ledger.begin()
    a, b, c = (FakeClient(ledger, name, 30) for name in "abc")
    a.takes(-30)
    ledger.admit(None, 50)
    assert gone(a, b, c) == "b"
    a.takes(30)
    ledger.admit(None, 50)
    assert gone(a, c) == "a"


async def test_what_has_ended_goes_before_those_that_are_away(ledger: MemoryBudget) -> None:
    """Nobody goes who could come back, or is here, while something is held for what is over."""
    a, b, c = (FakeClient(ledger, name, 30) for name in "abc")
    ledger.goes_away(a)
    ledger.has_ended(c)
    ledger.admit(None, 20)
    assert gone(a, b, c) == "c"


async def test_many_go_in_slices(ledger: MemoryBudget, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a turn as many go as a slice of time is enough for, and others in the turns after it."""
    clients = [FakeClient(ledger, str(number), 10) for number in range(10)]
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += SLICE / 3
        return now

    monkeypatch.setattr(ledger_module, "monotonic", clock)
    FakeClient(ledger, "hog", 90)
    counts = []
    for _ in range(4):
        await asyncio.sleep(0)
        counts.append(sum(client.evicted for client in clients))
    assert counts == [3, 6, 9, 9]


async def test_the_line_does_not_grow_by_coming_and_going(ledger: MemoryBudget) -> None:
    """What means nothing any more is thrown out of it."""
    client = FakeClient(ledger, "a", 10)
    for _ in range(1_000):
        ledger.goes_away(client)
        ledger.enter(client)
    assert len(ledger._line) < 100


async def test_who_is_spared_does_not_go_and_nobody_goes_in_vain(ledger: MemoryBudget) -> None:
    """For as long as it lasts; and what those hold that stay is not counted on."""
    a, b = FakeClient(ledger, "a", 60), FakeClient(ledger, "b", 30)
    with ledger.sparing(a), ledger.sparing(None):
        with pytest.raises(MemoryLimitExceededError):
            ledger.admit(None, 50)
        assert gone(a, b) == ""
        ledger.admit(None, 40)
        assert gone(a, b) == "b"
    ledger.admit(None, 50)
    assert gone(a, b) == "ab"
    assert not ledger._spared


# ── what grows without telling ──


class FakeDict:
    """A dict that grows inside."""

    def __init__(self, ledger: MemoryBudget, *sizes: int) -> None:
        self.owner: Evictable | None = None
        self.counted_bytes = 0
        self.sizes = list(sizes)
        self.looks = 0
        self._ledger = ledger
        self._known = sum(sizes)
        ledger.changed(self)

    def settle(self) -> int:
        more, self.counted_bytes = self._known - self.counted_bytes, self._known
        return more

    def measure(self) -> Iterator[None]:
        for _ in self.sizes:
            self.looks += 1
            yield
        self._known = sum(self.sizes)
        self._ledger.changed(self)

    def empty(self) -> None:
        """It holds nothing more."""
        self._known = 0
        self.sizes.clear()
        self._ledger.changed(self)


@virtually
async def test_what_has_grown_inside_is_found_at_the_next_look() -> None:
    """Every `memory_check_interval`, and not before."""
    ledger = MemoryBudget(check_interval=5.0)
    ledger.begin()
    growing = FakeDict(ledger, 10)
    growing.sizes[0] = 70
    sums = []
    for _ in range(3):
        await asyncio.sleep(4.0)
        sums.append((ledger.total, growing.looks))
    assert sums == [(10, 0), (70, 1), (70, 2)]


@virtually
async def test_a_look_that_finds_something_is_followed_by_one_look() -> None:
    """However often sizes have changed, the next look comes once an interval."""
    ledger = MemoryBudget(check_interval=5.0)
    ledger.begin()
    growing = FakeDict(ledger, 10)
    for seconds in range(20):
        growing.sizes[0] += 1
        assert growing.looks == seconds
        await asyncio.sleep(5.0)
    ledger.stop()


@virtually
async def test_nothing_is_looked_at_that_is_empty() -> None:
    """With the last dict the timer goes too, and comes again with the next one."""
    ledger = MemoryBudget(check_interval=5.0)
    ledger.begin()
    empty = FakeDict(ledger, 10)
    empty.empty()
    await asyncio.sleep(6.0)
    assert (ledger._timer, ledger._measured, empty.looks) == (None, {}, 0)
    full = FakeDict(ledger, 10)
    await asyncio.sleep(6.0)
    assert full.looks == 1
    ledger.stop()


async def test_a_look_holds_the_loop_for_no_longer_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring stops after `PARSE_SLICE`, in the middle of a dict if need be, and goes on after a turn of the loop."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += SLICE / 10  # each look at it costs a tenth of a slice
        return now

    ledger = MemoryBudget(check_interval=0.001)
    ledger.begin()
    large, small = FakeDict(ledger, *[1] * 25), FakeDict(ledger, 1)
    monkeypatch.setattr(ledger_module, "monotonic", clock)
    looks: list[int] = []
    turns = 0  # of the loop, most of them before the first look
    while not small.looks:
        await asyncio.sleep(0)
        if large.looks and (not looks or looks[-1] != large.looks):
            looks.append(large.looks)
        turns += 1
        assert turns < 100_000
    assert looks == [10, 20, 25]
    ledger.stop()


@virtually
async def test_a_dict_that_was_let_go_in_the_middle_of_a_look_is_left_alone() -> None:
    """It is looked at no more when its turn comes."""
    ledger = MemoryBudget(check_interval=5.0)
    ledger.begin()
    second = FakeDict(ledger, 1)

    class Emptying(FakeDict):
        def measure(self) -> Iterator[None]:
            second.empty()
            yield from super().measure()

    first = Emptying(ledger, 1)
    ledger._measured = {id(first): first, id(second): second}
    await asyncio.sleep(6.0)
    assert (first.looks, second.looks) == (1, 0)
    ledger.stop()


async def test_after_its_end_nothing_is_left(ledger: MemoryBudget) -> None:
    """No timer, no order, no dict."""
    FakeDict(ledger, 10)
    clients = [FakeClient(ledger, name, 60) for name in "ab"]
    ledger.stop()
    await settle(2)
    assert (gone(*clients), ledger._timer, ledger._due) == ("", None, None)
    assert not ledger._places
    assert not ledger._line
    assert not ledger._measured
