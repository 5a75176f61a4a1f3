"""Tests of the presence of clients in rooms, on a fake clock."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json, to_json

from fastapi_ws_stabilizer.hub import presence as presence_module
from fastapi_ws_stabilizer.hub.presence import AT_ONCE, Presence, PresenceTracker
from fastapi_ws_stabilizer.tasks import TaskSet
from tests.support.fake_recipient import FakeRecipient
from tests.support.fake_websocket import eventually, settle
from tests.support.own_loop import run

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


class PresenceHarness:
    """A presence tracker on a fake clock, and its announcements.

    Attributes:
        calls: Announcements in the order in which their calls began.
        running: Number of running calls in each room.
        listening: Whether there are hooks.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, grace: float = 10.0) -> None:
        self.now = 1000.0
        self.calls: list[tuple[str, Presence]] = []
        self.running: dict[str, int] = {}
        self.listening = True
        self.failures: list[BaseException] = []
        self.tasks = TaskSet(lambda _, error: self.failures.append(error))
        self._may_end = asyncio.Event()
        self._may_end.set()
        monkeypatch.setattr(presence_module, "monotonic", lambda: self.now)
        self.tracker = PresenceTracker(
            grace=grace,
            joined=lambda presence: self._hear("joined", presence),
            left=lambda presence: self._hear("left", presence),
            wanted=lambda: self.listening,
            tasks=self.tasks,
        )

    async def _hear(self, what: str, presence: Presence) -> None:
        self.running[presence.room] = self.running.get(presence.room, 0) + 1
        assert self.running[presence.room] == 1, "two calls at a time in one room"
        self.calls.append((what, presence))
        await self._may_end.wait()
        self.running[presence.room] -= 1

    def block(self) -> None:
        """Let no call end from now on."""
        self._may_end.clear()

    def release(self) -> None:
        """Let calls end again."""
        self._may_end.set()

    @property
    def announced(self) -> list[str]:
        """The announcements as texts."""
        return [f"{presence.client_id} {what}" for what, presence in self.calls]

    def enter(self, recipient: FakeRecipient, room: str = "lobby", metadata: Any = None) -> None:
        """Let a connection join."""
        self.tracker.join(room, recipient.client_id, recipient.connection_id, metadata)

    def leave(self, recipient: FakeRecipient, room: str = "lobby", *, at_once: bool = False) -> None:
        """Let a connection leave."""
        self.tracker.leave(room, recipient.client_id, recipient.connection_id, at_once=at_once)

    def present(self, room: str = "lobby") -> list[str]:
        """Return the clients in a room."""
        return [presence.client_id for presence in self.tracker.present(room)]

    def at(self, seconds: float) -> None:
        """Set the clock to that many seconds after the start, and end the graces that have expired."""
        self.now = 1000.0 + seconds
        while self.tracker._graces and next(iter(self.tracker._graces.values())) <= self.now:
            self.timer_fires()

    def timer_fires(self) -> None:
        """Run the timer's callback."""
        assert self.tracker._timer is not None
        self.tracker._timer.cancel()
        self.tracker._on_timer()


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a factory of trackers; they are closed at the end, and nothing in them may have failed."""
    made: list[PresenceHarness] = []

    def make(grace: float = 10.0) -> PresenceHarness:
        made.append(PresenceHarness(monkeypatch, grace))
        return made[-1]

    yield make
    for one in made:
        one.release()
        one.tracker.close()
        await eventually(lambda one=one: len(one.tasks) == 0)
        assert one.failures == []


# ── presence ──


async def test_client_with_two_connections_is_present_once(harness: Any) -> None:
    """A client is present once, with all its connections, and only the first and the last one are announced."""
    w = harness()
    one, two = FakeRecipient("ann"), FakeRecipient("ann")
    w.enter(one)
    w.enter(two)
    (ann,) = w.tracker.present("lobby")
    assert (ann.client_id, ann.room, ann.connections) == ("ann", "lobby", 2)
    await settle()
    w.leave(one, at_once=True)
    await settle()
    assert [presence.connections for presence in w.tracker.present("lobby")] == [1]
    assert w.announced == ["ann joined"]
    w.leave(two, at_once=True)
    await settle()
    assert w.present() == []
    assert w.announced == ["ann joined", "ann left"]


async def test_repeated_join_needs_one_leave(harness: Any) -> None:
    """Connections are known by their ids, so a repeated join has no effect, and one leave is enough."""
    w = harness()
    ann = FakeRecipient("ann")
    w.enter(ann)
    w.enter(ann)
    assert [presence.connections for presence in w.tracker.present("lobby")] == [1]
    w.leave(ann, at_once=True)
    assert w.present() == []


async def test_leave_without_join_changes_nothing(harness: Any) -> None:
    """A leave with another room, another client or an old connection removes no presence."""
    w = harness(grace=0)
    ann, old, bob = FakeRecipient("ann"), FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann)
    w.leave(old)
    w.leave(bob)
    w.leave(ann, "attic")
    assert w.present() == ["ann"]
    w.enter(old)
    w.leave(old)
    w.leave(old)
    assert w.present() == ["ann"]
    assert len(w.tracker) == 1


async def test_presence_order_is_order_of_first_join(harness: Any) -> None:
    """Further tabs and reloads do not change a client's position; a client that left and joins again is last."""
    w = harness()
    ann, bob, eve = FakeRecipient("ann"), FakeRecipient("bob"), FakeRecipient("eve")
    for recipient in (ann, bob, eve):
        w.enter(recipient)
    w.enter(FakeRecipient("ann"))
    w.leave(bob)
    w.enter(bob)
    assert w.present() == ["ann", "bob", "eve"]
    w.leave(bob, at_once=True)
    w.enter(bob)
    assert w.present() == ["ann", "eve", "bob"]


async def test_presence_of_each_room_is_independent(harness: Any) -> None:
    """A client in two rooms joins and leaves each of them independently."""
    w = harness()
    ann = FakeRecipient("ann")
    w.enter(ann, "a")
    w.enter(ann, "b")
    w.leave(ann, "a", at_once=True)
    await settle()
    assert (w.present("a"), w.present("b")) == ([], ["ann"])
    assert {(what, presence.room) for what, presence in w.calls} == {("joined", "b")}


async def test_presence_of_unknown_room_is_empty(harness: Any) -> None:
    """Asking for the presence of an unknown room is not an error and creates no room."""
    w = harness()
    assert w.tracker.present("nowhere") == []
    assert len(w.tracker) == 0


# ── metadata ──


async def test_later_join_replaces_presence_metadata(harness: Any) -> None:
    """The last metadata applies; a join without metadata changes nothing."""
    w = harness()
    seen = []
    for metadata in (None, {"name": "Ann"}, None, {"away": True}):
        w.enter(FakeRecipient("ann"), metadata=metadata)
        seen += [presence.metadata for presence in w.tracker.present("lobby")]
    assert seen == [{}, {"name": "Ann"}, {"name": "Ann"}, {"away": True}]


async def test_presence_update_replaces_metadata_unannounced(harness: Any) -> None:
    """An update replaces the metadata of a present client unannounced, and returns whether there was one."""
    w = harness()
    ann = FakeRecipient("ann")
    w.enter(ann, metadata={"name": "Ann"})
    await settle()
    assert w.tracker.update("lobby", "ann", {"name": "Anne"})
    assert not w.tracker.update("lobby", "bob", {})
    assert not w.tracker.update("attic", "ann", {})
    assert [presence.metadata for presence in w.tracker.present("lobby")] == [{"name": "Anne"}]
    await settle()
    assert w.announced == ["ann joined"]
    w.leave(ann)
    assert w.tracker.update("lobby", "ann", {"away": True})


async def test_presence_metadata_is_copied(harness: Any) -> None:
    """Metadata is copied on join and on update."""
    w = harness()
    mine = {"n": 1}
    w.enter(FakeRecipient("ann"), metadata=mine)
    mine["n"] = 2
    assert w.tracker.present("lobby")[0].metadata == {"n": 1}
    w.tracker.update("lobby", "ann", mine)
    mine["n"] = 3
    assert w.tracker.present("lobby")[0].metadata == {"n": 2}


async def test_rejoin_after_leave_starts_without_metadata(harness: Any) -> None:
    """After a leave the metadata is removed, even if the leave was not announced yet."""
    w = harness()
    ann = FakeRecipient("ann")
    w.enter(ann, metadata={"name": "Ann"})
    await settle()
    w.leave(ann, at_once=True)
    w.now += 5
    w.enter(ann)
    (presence,) = w.tracker.present("lobby")
    assert (presence.metadata, presence.present_seconds) == ({}, 0.0)


async def test_present_seconds_span_reconnects_and_grace(harness: Any) -> None:
    """The seconds include reconnects, and stop at the end of the grace or at an explicit leave."""
    w = harness(grace=10)
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann)
    w.enter(bob)
    w.at(7)
    w.leave(ann)
    w.enter(ann)
    w.at(20)
    assert [presence.present_seconds for presence in w.tracker.present("lobby")] == [20.0, 20.0]
    await settle()
    w.leave(ann)
    w.leave(bob, at_once=True)
    w.at(33)
    w.now += 100  # regardless of when it is announced
    await settle()
    departures = [
        (presence.client_id, presence.connections, presence.present_seconds)
        for what, presence in w.calls
        if what == "left"
    ]
    assert departures == [("bob", 0, 20.0), ("ann", 0, 30.0)]


def test_presence_is_serializable_and_hashable() -> None:
    """A presence is JSON with durations only, is hashable, and equals another one of the same state."""
    first, second = Presence("ann", "lobby", {"n": 1}, 2, 3.0), Presence("ann", "lobby", {"n": 1}, 2, 4.0)
    assert from_json(to_json(first)) == {
        "client_id": "ann",
        "room": "lobby",
        "metadata": {"n": 1},
        "connections": 2,
        "present_seconds": 3.0,
    }
    assert len({first, second}) == 1


async def test_many_stored_presence_lists_share_entries(harness: Any) -> None:
    """Each list shows its own time, and 2,000 stored lists share a few objects for each member."""
    w = harness()
    members = [FakeRecipient(f"c{number}") for number in range(2_000)]
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    try:
        rosters = []
        for recipient in members:
            w.enter(recipient, metadata={"name": recipient.client_id})
            rosters.append(w.tracker.roster("lobby"))
            if len(rosters) % 2:  # others are read when the next one is created
                assert len(rosters[-1]) == len(rosters)
        gc.collect()
        objects, (size, _) = len(gc.get_objects()) - before, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert objects < 20 * len(members)
    assert size < 4_000 * len(members)
    for position, roster in enumerate(rosters[::97]):
        assert [presence.client_id for presence in roster] == [f"c{number}" for number in range(97 * position + 1)]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "describe", "wait"]), st.integers(0, 150)), max_size=300))
def test_presence_list_is_unaffected_by_later_changes(steps: list[tuple[str, int]]) -> None:
    """A list shows the state at the call of `present`, even if it is read later."""

    async def play() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            w = PresenceHarness(monkeypatch, 0.0)
            members = [FakeRecipient(f"c{number}") for number in range(151)]
            stored: list[tuple[Any, list[Presence], list[float]]] = []
            for act, number in steps:
                recipient = members[number]
                if act == "wait":
                    w.now += 1.0
                elif act == "describe":
                    w.tracker.update("lobby", recipient.client_id, {"n": w.now})
                elif act == "enter":
                    w.enter(recipient)
                else:
                    w.leave(recipient, at_once=True)
                there = w.tracker.present("lobby")
                stored.append((w.tracker.roster("lobby"), there, [presence.present_seconds for presence in there]))
            for roster, there, seconds in stored:
                assert list(roster) == there
                assert [presence.present_seconds for presence in roster] == seconds
                assert (len(roster), roster[-1:], roster[2:5]) == (len(there), there[-1:], there[2:5])
            w.tracker.close()
            await settle()

    run(play())


# ── grace ──


async def test_reconnect_within_grace_is_not_announced(harness: Any) -> None:
    """A client that reconnects within the grace is present all the time, without an announcement."""
    w = harness(grace=10)
    old, new = FakeRecipient("ann"), FakeRecipient("ann")
    w.enter(old)
    await settle()
    w.leave(old)
    w.at(9.9)
    assert [(presence.client_id, presence.connections) for presence in w.tracker.present("lobby")] == [("ann", 0)]
    w.enter(new)
    w.at(1000)
    await settle()
    assert w.present() == ["ann"]
    assert w.announced == ["ann joined"]


async def test_client_leaves_presence_when_grace_ends(harness: Any) -> None:
    """A client is present until `grace` seconds after its last connection has left."""
    w = harness(grace=10)
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.at(5)
    w.leave(ann)
    w.at(14.9)
    await settle()
    assert w.present() == ["ann"]
    assert w.announced == ["ann joined"]
    w.at(15)
    assert w.present() == []
    await settle()
    assert w.announced == ["ann joined", "ann left"]


async def test_interrupted_grace_does_not_shorten_next_grace(harness: Any) -> None:
    """An earlier interrupted grace does not shorten the next one."""
    w = harness(grace=10)
    ann = FakeRecipient("ann")
    w.enter(ann)
    w.leave(ann)
    w.at(9)
    w.enter(ann)
    w.leave(ann)
    w.at(18.9)
    assert w.present() == ["ann"]
    w.at(19)
    assert w.present() == []


async def test_repeated_leave_does_not_change_running_grace(harness: Any) -> None:
    """A second leave of a connection neither extends nor ends the grace."""
    w = harness(grace=10)
    ann = FakeRecipient("ann")
    w.enter(ann)
    w.leave(ann)
    w.at(5)
    w.leave(ann)
    w.leave(FakeRecipient("ann"), at_once=True)
    w.at(9.9)
    assert w.present() == ["ann"]
    w.at(10)
    assert w.present() == []


async def test_explicit_leave_skips_grace(harness: Any) -> None:
    """With `at_once` the leave of the last connection removes its client; with another connection the client stays."""
    w = harness(grace=10)
    one, two = FakeRecipient("ann"), FakeRecipient("ann")
    w.enter(one)
    w.enter(two)
    w.leave(one, at_once=True)
    assert w.present() == ["ann"]
    w.leave(two, at_once=True)
    assert w.present() == []
    assert w.tracker._timer is None


@pytest.mark.parametrize("broken_first", [True, False])
async def test_lost_connection_gets_grace_when_other_one_leaves(harness: Any, broken_first: bool) -> None:
    """Of two connections one is lost and one leaves explicitly, in either order: the lost one gets its grace."""
    w = harness(grace=10)
    broken, closed = FakeRecipient("ann"), FakeRecipient("ann")
    w.enter(broken)
    w.enter(closed)
    await settle()
    for tab in (broken, closed) if broken_first else (closed, broken):
        w.leave(tab, at_once=tab is closed)
    await settle()
    w.enter(FakeRecipient("ann"))
    await settle()
    assert w.announced == ["ann joined"]


async def test_zero_grace_announces_leave_immediately(harness: Any) -> None:
    """A grace of zero seconds needs no timer."""
    w = harness(grace=0)
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.leave(ann)
    assert w.present() == []
    assert w.tracker._timer is None
    await settle()
    assert w.announced == ["ann joined", "ann left"]


async def test_grace_ends_on_real_clock() -> None:
    """On the real clock, a grace ends by its timer, and no timer is left."""
    left = asyncio.Event()

    async def joined(presence: Presence) -> None: ...

    async def on_left(presence: Presence) -> None:
        left.set()

    tasks = TaskSet(lambda _, __: None)
    tracker = PresenceTracker(grace=0.02, joined=joined, left=on_left, wanted=lambda: True, tasks=tasks)
    tracker.join("lobby", "ann", "1", None)
    await settle()
    tracker.leave("lobby", "ann", "1", at_once=False)
    await asyncio.wait_for(left.wait(), 5.0)
    assert tracker.present("lobby") == []
    assert tracker._timer is None


async def test_all_graces_share_one_timer(harness: Any) -> None:
    """For any number of graces the event loop has one timer, for the first; a reconnect has no cost."""
    w = harness(grace=10)
    members = [FakeRecipient(f"client-{number}") for number in range(5)]
    timers = set()
    for second, recipient in enumerate(members):
        w.at(second)
        w.enter(recipient)
        assert w.tracker._timer in timers or not timers
        w.leave(recipient)
        timers.add(w.tracker._timer)
    assert len(timers) == 1
    w.enter(members[0])
    w.enter(members[1])
    assert len(w.tracker._graces) == 3
    w.at(12)
    assert w.present() == ["client-0", "client-1", "client-3", "client-4"]
    assert w.tracker._timer not in timers
    w.at(20)
    assert w.present() == ["client-0", "client-1"]
    assert w.tracker._timer is None


async def test_timer_of_returned_client_ends_no_other_grace(harness: Any) -> None:
    """When the first client has reconnected, its timer ends no other grace early."""
    w = harness(grace=10)
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann)
    w.enter(bob)
    w.leave(ann)
    w.at(5)
    w.leave(bob)
    w.enter(ann)
    w.now = 1010.0
    w.timer_fires()
    assert w.present() == ["ann", "bob"]
    assert w.tracker._timer is not None
    w.at(15)
    assert w.present() == ["ann"]


async def test_repeated_reconnects_hold_one_grace_entry(harness: Any) -> None:
    """A client has one grace entry, however often it has left."""
    w = harness(grace=10)
    ann = FakeRecipient("ann")
    for _ in range(1000):
        w.enter(ann)
        w.leave(ann)
    assert len(w.tracker._graces) == 1


async def test_simultaneous_grace_ends_are_processed_in_batches(harness: Any) -> None:
    """One iteration of the event loop ends at most `AT_ONCE` graces; the rest follows automatically."""
    w = harness(grace=10)
    w.listening = False
    members = [FakeRecipient(f"client-{number}") for number in range(1000)]
    for recipient in members:
        w.enter(recipient)
        w.leave(recipient)
    w.now += 10
    left = [1000]
    w.timer_fires()
    while left[-1]:
        left.append(len(w.present()))
        await asyncio.sleep(0)
    assert left[1] == 1000 - AT_ONCE
    assert max(before - after for before, after in pairwise(left)) == AT_ONCE


# ── announcements ──


async def test_joins_and_leaves_are_announced_in_order(harness: Any) -> None:
    """Announcements of a room have the order of the changes."""
    w = harness(grace=10)
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann, metadata={"name": "Ann"})
    w.enter(bob)
    await settle()
    w.leave(bob)
    w.leave(ann)
    w.at(10)
    await settle()
    assert w.announced == ["ann joined", "bob joined", "bob left", "ann left"]
    assert w.calls[0][1] == Presence("ann", "lobby", {"name": "Ann"}, 1, 0.0)
    assert w.calls[3][1] == Presence("ann", "lobby", {"name": "Ann"}, 0, 10.0)


async def test_announcements_of_room_run_one_at_a_time(harness: Any) -> None:
    """The next call of a room waits for the end of the previous one; other rooms do not wait."""
    w = harness()
    w.block()
    for name in ("ann", "bob"):
        w.enter(FakeRecipient(name), "a")
        w.enter(FakeRecipient(name), "b")
    await settle()
    assert [(presence.room, presence.client_id) for _, presence in w.calls] == [("a", "ann"), ("b", "ann")]
    assert len(w.tasks) == 2
    w.release()
    await settle()
    assert w.announced == ["ann joined", "ann joined", "bob joined", "bob joined"]


async def test_join_undone_before_announcement_is_not_announced(harness: Any) -> None:
    """A join that was undone while another call was running is not announced."""
    w = harness()
    bob = FakeRecipient("bob")
    w.block()
    w.enter(FakeRecipient("ann"))
    await settle()
    for _ in range(100):
        w.enter(bob)
        w.leave(bob, at_once=True)
    w.release()
    await settle()
    assert w.announced == ["ann joined"]


async def test_leave_undone_before_announcement_is_not_announced(harness: Any) -> None:
    """A leave that was undone while another call was running is not announced; the next one is."""
    w = harness()
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.block()
    w.enter(FakeRecipient("bob"))
    await settle()
    for _ in range(100):
        w.leave(ann, at_once=True)
        w.enter(ann)
    w.release()
    await settle()
    assert w.announced == ["ann joined", "bob joined"]
    w.leave(ann, at_once=True)
    await settle()
    assert w.announced == ["ann joined", "bob joined", "ann left"]


async def test_leave_during_join_announcement_is_announced(harness: Any) -> None:
    """A call that has begun counts as announced, so the opposite change is announced too."""
    w = harness()
    ann = FakeRecipient("ann")
    w.block()
    w.enter(ann)
    await settle()
    w.leave(ann, at_once=True)
    w.release()
    await settle()
    assert w.announced == ["ann joined", "ann left"]


async def test_join_during_leave_announcement_is_announced(harness: Any) -> None:
    """After the call for a leave has begun, a rejoin is announced as a join."""
    w = harness()
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.block()
    w.leave(ann, at_once=True)
    await settle()
    w.enter(ann)
    w.release()
    await settle()
    assert w.announced == ["ann joined", "ann left", "ann joined"]


async def test_empty_room_with_running_hook_starts_no_second_task(harness: Any) -> None:
    """While a leave is announced, an unannounced join and leave start no second call."""
    w = harness()
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann)
    await settle()
    w.block()
    w.leave(ann, at_once=True)
    await settle()
    w.enter(bob)
    w.leave(bob, at_once=True)
    w.enter(FakeRecipient("eve"))
    await settle()
    assert w.announced == ["ann joined", "ann left"]
    assert len(w.tasks) == 1
    w.release()
    await settle()
    assert w.announced == ["ann joined", "ann left", "eve joined"]


async def test_pending_announcements_are_one_per_client(harness: Any) -> None:
    """Any number of changes leaves one waiting entry for each client, and one task."""
    w = harness()
    members = [FakeRecipient(f"client-{number}") for number in range(10)]
    w.block()
    w.enter(FakeRecipient("ann"))
    await settle()
    for _ in range(50):
        for recipient in members:
            w.enter(recipient)
        for recipient in members[::2]:
            w.leave(recipient, at_once=True)
    assert len(w.tracker._rooms["lobby"].pending) == 5
    assert len(w.tasks) == 1
    w.release()
    await settle()
    assert w.announced == ["ann joined", *(f"{recipient.client_id} joined" for recipient in members[1::2])]


async def test_announcement_carries_state_at_call_time(harness: Any) -> None:
    """A delayed announcement has the metadata and connections at the time of its call."""
    w = harness()
    w.block()
    w.enter(FakeRecipient("ann"))
    await settle()
    w.enter(FakeRecipient("bob"), metadata={"n": 1})
    w.enter(FakeRecipient("bob"), metadata={"n": 2})
    w.now += 3
    w.release()
    await settle()
    what, bob = w.calls[1]
    assert (what, bob, bob.present_seconds) == ("joined", Presence("bob", "lobby", {"n": 2}, 2, 0.0), 3.0)


async def test_announcer_task_exists_only_while_needed(harness: Any) -> None:
    """One task for each room announces and ends; a second tab, a reload and a present client have none."""
    w = harness()
    ann = FakeRecipient("ann")
    w.enter(ann)
    w.enter(FakeRecipient("bob"))
    assert len(w.tasks) == 1
    await settle()
    assert len(w.tasks) == 0
    w.enter(FakeRecipient("ann"))
    w.leave(ann)
    w.enter(ann)
    assert len(w.tasks) == 0


async def test_presence_without_hooks_creates_no_task(harness: Any) -> None:
    """Without hooks no task is created and no announcement waits."""
    w = harness(grace=10)
    w.listening = False
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann)
    w.enter(bob)
    assert w.tracker._rooms["lobby"].pending == {}
    w.leave(ann)
    w.at(10)
    w.leave(bob, at_once=True)
    assert len(w.tasks) == 0
    assert len(w.tracker) == 0
    assert w.calls == []


async def test_late_presence_hook_gets_no_leave_without_join(harness: Any) -> None:
    """A late hook gets no leave without its join, and every later change."""
    w = harness()
    w.listening = False
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann)
    w.listening = True
    w.enter(bob)
    w.leave(ann, at_once=True)
    w.enter(ann)
    await settle()
    assert w.announced == ["bob joined", "ann joined"]


async def test_many_announcements_yield_to_event_loop() -> None:
    """One iteration of the event loop makes at most `AT_ONCE` announcements of a room."""
    count = 0

    async def hear(presence: Presence) -> None:
        nonlocal count
        count += 1

    tasks = TaskSet(lambda _, __: None)
    tracker = PresenceTracker(grace=0, joined=hear, left=hear, wanted=lambda: True, tasks=tasks)
    for number in range(1000):
        tracker.join("lobby", f"client-{number}", str(number), None)
    counts = [0]
    while counts[-1] < 1000:
        await asyncio.sleep(0)
        counts.append(count)
    assert max(after - before for before, after in pairwise(counts)) == AT_ONCE
    tracker.close()
    await eventually(lambda: len(tasks) == 0)


async def test_announcement_runs_in_context_of_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The context is that of the tracker's creator, and not that of a connection."""
    seen: list[str] = []

    async def hear(presence: Presence) -> None:
        seen.append(VARIABLE.get())

    tasks = TaskSet(lambda _, __: None)
    makers = contextvars.copy_context()
    makers.run(VARIABLE.set, "maker's")
    tracker = makers.run(lambda: PresenceTracker(grace=0, joined=hear, left=hear, wanted=lambda: True, tasks=tasks))
    contextvars.copy_context().run(lambda: (VARIABLE.set("ann's"), tracker.join("lobby", "ann", "1", None)))
    await settle()
    assert seen == ["maker's"]


async def test_presence_change_by_hook_is_announced_afterwards(harness: Any) -> None:
    """A change that a call makes in its own room is announced after it, by the same task."""
    w = harness()
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    hear = w.tracker._joined

    async def joined(presence: Presence) -> None:
        if presence.client_id == "ann":
            w.enter(bob)
            w.leave(ann, at_once=True)
            assert len(w.tasks) == 1
        await hear(presence)

    w.tracker._joined = joined
    w.enter(ann)
    await settle()
    assert w.announced == ["ann joined", "bob joined", "ann left"]


async def test_raising_presence_hook_does_not_stop_announcements(harness: Any) -> None:
    """The task reports the error, the change counts as announced, and the remaining ones are announced."""
    w = harness()
    ann, hear = FakeRecipient("ann"), w.tracker._joined

    async def joined(presence: Presence) -> None:
        await hear(presence)
        if presence.client_id == "ann":
            raise ValueError("no")

    w.tracker._joined = joined
    w.enter(ann)
    w.enter(FakeRecipient("bob"))
    await settle()
    assert w.announced == ["ann joined", "bob joined"]
    w.leave(ann, at_once=True)
    await settle()
    assert w.announced == ["ann joined", "bob joined", "ann left"]
    assert [str(error) for error in w.failures] == ["no"]
    w.failures.clear()


async def test_join_while_announcer_ends_is_announced(harness: Any) -> None:
    """A change between the task's last check and its end is announced."""
    w = harness()

    async def joined(presence: Presence) -> None:
        w.calls.append(("joined", presence))
        if presence.client_id == "ann":  # runs after this task's last step and before it counts as done
            asyncio.get_running_loop().call_soon(w.enter, FakeRecipient("bob"))

    w.tracker._joined = joined
    w.enter(FakeRecipient("ann"))
    await settle()
    assert w.announced == ["ann joined", "bob joined"]


@pytest.mark.parametrize("begun", [True, False])
async def test_cancelled_announcement_is_made_at_next_change(harness: Any, begun: bool) -> None:
    """A task that is cancelled, even before its first step, starts no other; the room's next change does."""
    w = harness()
    w.block()
    w.enter(FakeRecipient("ann"))
    w.enter(FakeRecipient("bob"))
    await settle(2 if begun else 0)
    w.tasks.cancel()
    await settle()
    w.running.clear()
    assert len(w.tasks) == 0
    w.release()
    w.enter(FakeRecipient("eve"))
    await settle()
    assert w.announced == ["ann joined", "bob joined", "eve joined"]


async def test_pending_leave_survives_cancelled_announcer(harness: Any) -> None:
    """The empty room stays until the leave is announced, so that a rejoin cancels it and is no second join."""
    w = harness()
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.leave(ann, at_once=True)
    w.tasks.cancel()
    await settle()
    assert len(w.tracker) == 1
    w.enter(ann)
    w.leave(ann, at_once=True)
    await settle()
    assert w.announced == ["ann joined", "ann left"]
    assert len(w.tracker) == 0


async def test_eager_task_factory_does_not_change_announcements(harness: Any) -> None:
    """Calls that run inside `enter` and `leave` see the new state, and still run one at a time in each room."""
    w = harness(grace=0)
    ann, bob, eve = FakeRecipient("ann"), FakeRecipient("bob"), FakeRecipient("eve")
    hear = w.tracker._joined

    async def joined(presence: Presence) -> None:
        if presence.client_id == "ann":
            w.enter(bob)
            w.enter(eve, "attic")
        await hear(presence)

    w.tracker._joined = joined
    loop = asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", None))  # since Python 3.12
    try:
        w.enter(ann)
        await settle()
        w.leave(ann)
        await settle()
    finally:
        loop.set_task_factory(None)
    calls = {
        room: [(what, presence.client_id, presence.connections) for what, presence in w.calls if presence.room == room]
        for room in ("lobby", "attic")
    }
    assert calls == {
        "lobby": [("joined", "ann", 1), ("joined", "bob", 1), ("left", "ann", 0)],
        "attic": [("joined", "eve", 1)],
    }


# ── nothing is left ──


async def test_empty_room_is_removed_after_last_announcement(harness: Any) -> None:
    """A room exists until its last leave is announced, and no longer."""
    w = harness(grace=10)
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.leave(ann)
    assert len(w.tracker) == 1
    w.block()
    w.at(10)
    await settle()
    assert w.present() == []
    assert len(w.tracker) == 1
    w.release()
    await settle()
    assert len(w.tracker) == 0


async def test_room_with_undone_join_is_removed(harness: Any) -> None:
    """A room without any announcement leaves no entry and no task."""
    w = harness()
    ann = FakeRecipient("ann")
    w.enter(ann)
    w.leave(ann, at_once=True)
    await settle()
    assert (len(w.tracker), len(w.tasks), w.calls) == (0, 0, [])


async def test_closed_tracker_announces_nothing(harness: Any) -> None:
    """Closing removes all clients, stops the timer, and lets a running call finish; it may be repeated."""
    w = harness(grace=10)
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.block()
    w.enter(ann)
    await settle()
    w.enter(bob)
    w.leave(ann)
    timer = w.tracker._timer
    w.tracker.close()
    w.tracker.close()
    assert timer.cancelled()
    assert w.tracker._timer is None
    assert len(w.tasks) == 1
    w.leave(bob, at_once=True)
    w.release()
    await settle()
    assert w.announced == ["ann joined"]
    assert (len(w.tracker), len(w.tasks), len(w.tracker._graces)) == (0, 0, 0)


async def test_closed_tracker_can_be_reused(harness: Any) -> None:
    """State after a close is new, and the end of an earlier call does not affect it."""
    w = harness()
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.block()
    w.leave(ann, at_once=True)
    await settle()
    w.tracker.close()
    w.listening = False
    w.enter(FakeRecipient("bob"))
    w.release()
    await settle()
    assert w.present() == ["bob"]
    assert len(w.tracker) == 1
    assert w.announced == ["ann joined", "ann left"]


# ── random operations ──

GRACE = 10.0
ROOMS = "ab"
CLIENTS = ("ann", "bob")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["turn", "block", "release", "listen", "cover ears"])),
        st.tuples(st.just("enter"), st.sampled_from(ROOMS), st.integers(0, 3), st.none() | st.integers(0, 3)),
        st.tuples(st.just("leave"), st.sampled_from(ROOMS), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("wait"), st.sampled_from([1.0, 4.0, 10.0])),
    ),
    min_size=30,  # by default, hypothesis creates lists of about five
    max_size=80,
)


@dataclass
class ModelPresence:
    """State of one client in one room, in a simple model."""

    since: float
    metadata: Any
    connections: set[str] = field(default_factory=set)
    due: float | None = None
    expected: float = 0.0


class Model:
    """Simple model of presence, without cleanup."""

    def __init__(self) -> None:
        self.present_clients: dict[tuple[str, str], ModelPresence] = {}

    def enter(self, room: str, recipient: FakeRecipient, metadata: Any, now: float) -> None:
        """Let a connection join."""
        state = self.present_clients.setdefault((room, recipient.client_id), ModelPresence(now, {}))
        state.connections.add(recipient.connection_id)
        state.due = None
        state.expected = 0.0
        state.metadata = state.metadata if metadata is None else metadata

    def leave(self, room: str, recipient: FakeRecipient, at_once: bool, now: float) -> None:
        """Let a connection leave."""
        state = self.present_clients.get((room, recipient.client_id))
        if state is not None and recipient.connection_id in state.connections:
            state.connections.remove(recipient.connection_id)
            if not at_once:
                state.expected = now + GRACE
            if not state.connections:
                state.due = now if state.expected <= now else now + GRACE
                self.wait(now)

    def wait(self, now: float) -> None:
        """Let time pass."""
        self.present_clients = {
            key: state for key, state in self.present_clients.items() if state.due is None or state.due > now
        }

    def present(self, room: str, now: float) -> list[tuple[str, Any, int, float]]:
        """Return the clients in a room."""
        return [
            (client_id, state.metadata, len(state.connections), now - state.since)
            for (where, client_id), state in self.present_clients.items()
            if where == room
        ]


def said_of(calls: list[tuple[str, Presence]]) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Return the announcements for each client of each room, in order."""
    for room in ROOMS:
        for client_id in CLIENTS:
            yield (
                (room, client_id),
                [what for what, presence in calls if (presence.room, presence.client_id) == (room, client_id)],
            )


@settings(max_examples=300)
@given(STEPS)
def test_presence_and_announcements_agree_with_model(steps: list[tuple[Any, ...]]) -> None:
    """Presence equals that of a simple model, and calls alternate between join and leave."""
    run(_play(steps))


async def _play(steps: list[tuple[Any, ...]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        w, model = PresenceHarness(monkeypatch, GRACE), Model()
        members = [FakeRecipient(CLIENTS[number % 2]) for number in range(4)]
        always_listening = True
        for act, *details in steps:
            if act == "enter":
                room, number, value = details
                metadata = None if value is None else {"n": value}
                w.enter(members[number], room, metadata)
                model.enter(room, members[number], metadata, w.now)
                always_listening = always_listening and w.listening
            elif act == "leave":
                room, number, at_once = details
                w.leave(members[number], room, at_once=at_once)
                model.leave(room, members[number], at_once, w.now)
            elif act == "wait":
                w.at(w.now - 1000.0 + details[0])
                if w.tracker._timer is not None:  # it may have been set for a client that has reconnected
                    w.timer_fires()
                model.wait(w.now)
            elif act == "turn":
                await settle(5)
            elif act in ("block", "release"):
                getattr(w, act)()
            else:
                w.listening = act == "listen"
            for room in ROOMS:
                there = w.tracker.present(room)
                seen = [
                    (presence.client_id, dict(presence.metadata), presence.connections, presence.present_seconds)
                    for presence in there
                ]
                assert seen == model.present(room, w.now)
                assert len(w.tracker._rooms[room].pending if room in w.tracker._rooms else ()) <= len(CLIENTS)
            assert len(w.tracker._graces) == sum(state.due is not None for state in model.present_clients.values())
            assert (w.tracker._timer is not None) >= bool(w.tracker._graces)
        w.release()
        await settle(60)
        assert w.failures == []
        assert len(w.tasks) == 0
        assert set(w.tracker._rooms) == {room for room, _ in model.present_clients}
        for key, words in said_of(w.calls):
            assert words == ["joined", "left"] * (len(words) // 2) + ["joined"] * (len(words) % 2)
            if always_listening:
                assert (words[-1:] == ["joined"]) == (key in model.present_clients)
        w.tracker.close()
        await settle()


def test_room_list_is_stable_while_rooms_change() -> None:
    """Another thread may list the rooms while they change."""

    async def nothing(_: Presence) -> None:
        """Do nothing."""

    async def check() -> None:
        tasks = TaskSet(lambda *_: None)
        tracker = PresenceTracker(grace=0, joined=nothing, left=nothing, wanted=lambda: False, tasks=tasks)

        class Changing:
            """Dict that gets another room while it is iterated."""

            @property
            def entries(self) -> dict[str, Any]:
                tracker.join("another", "ann", "connection", None)
                return {"bob": None}

        tracker._rooms["lobby"] = Changing()  # type: ignore[assignment]
        assert tracker.rooms() == ["lobby"]
        assert "another" in tracker.rooms()

    run(check())
