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


class Watched:
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
        self.board = PresenceTracker(
            grace=grace,
            joined=lambda who: self._hear("joined", who),
            left=lambda who: self._hear("left", who),
            wanted=lambda: self.listening,
            tasks=self.tasks,
        )

    async def _hear(self, what: str, who: Presence) -> None:
        self.running[who.room] = self.running.get(who.room, 0) + 1
        assert self.running[who.room] == 1, "two calls at a time in one room"
        self.calls.append((what, who))
        await self._may_end.wait()
        self.running[who.room] -= 1

    def block(self) -> None:
        """Let no call end from now on."""
        self._may_end.clear()

    def release(self) -> None:
        """Let calls end again."""
        self._may_end.set()

    @property
    def said(self) -> list[str]:
        """The announcements as texts."""
        return [f"{who.client_id} {what}" for what, who in self.calls]

    def enter(self, member: FakeRecipient, room: str = "lobby", metadata: Any = None) -> None:
        """Let a connection join."""
        self.board.join(room, member.client_id, member.connection_id, metadata)

    def leave(self, member: FakeRecipient, room: str = "lobby", *, at_once: bool = False) -> None:
        """Let a connection leave."""
        self.board.leave(room, member.client_id, member.connection_id, at_once=at_once)

    def present(self, room: str = "lobby") -> list[str]:
        """Return the clients in a room."""
        return [who.client_id for who in self.board.present(room)]

    def at(self, seconds: float) -> None:
        """Set the clock to that many seconds after the start, and end the graces that have expired."""
        self.now = 1000.0 + seconds
        while self.board._graces and next(iter(self.board._graces.values())) <= self.now:
            self.timer_fires()

    def timer_fires(self) -> None:
        """Run the timer's callback."""
        assert self.board._timer is not None
        self.board._timer.cancel()
        self.board._on_timer()


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a factory of trackers; they are closed at the end, and nothing in them may have failed."""
    made: list[Watched] = []

    def make(grace: float = 10.0) -> Watched:
        made.append(Watched(monkeypatch, grace))
        return made[-1]

    yield make
    for one in made:
        one.release()
        one.board.close()
        await eventually(lambda one=one: len(one.tasks) == 0)
        assert one.failures == []


# ── presence ──


async def test_client_with_two_connections_is_present_once(watched: Any) -> None:
    """A client is present once, with all its connections, and only the first and the last one are announced."""
    w = watched()
    one, two = FakeRecipient("ann"), FakeRecipient("ann")
    w.enter(one)
    w.enter(two)
    (ann,) = w.board.present("lobby")
    assert (ann.client_id, ann.room, ann.connections) == ("ann", "lobby", 2)
    await settle()
    w.leave(one, at_once=True)
    await settle()
    assert [who.connections for who in w.board.present("lobby")] == [1]
    assert w.said == ["ann joined"]
    w.leave(two, at_once=True)
    await settle()
    assert w.present() == []
    assert w.said == ["ann joined", "ann left"]


async def test_repeated_join_needs_one_leave(watched: Any) -> None:
    """Connections are known by their ids, so a repeated join has no effect, and one leave is enough."""
    w = watched()
    ann = FakeRecipient("ann")
    w.enter(ann)
    w.enter(ann)
    assert [who.connections for who in w.board.present("lobby")] == [1]
    w.leave(ann, at_once=True)
    assert w.present() == []


async def test_leave_without_join_changes_nothing(watched: Any) -> None:
    """A leave with another room, another client or an old connection removes no presence."""
    w = watched(grace=0)
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
    assert len(w.board) == 1


async def test_presence_order_is_order_of_first_join(watched: Any) -> None:
    """Further tabs and reloads do not change a client's position; a client that left and joins again is last."""
    w = watched()
    ann, bob, eve = FakeRecipient("ann"), FakeRecipient("bob"), FakeRecipient("eve")
    for member in (ann, bob, eve):
        w.enter(member)
    w.enter(FakeRecipient("ann"))
    w.leave(bob)
    w.enter(bob)
    assert w.present() == ["ann", "bob", "eve"]
    w.leave(bob, at_once=True)
    w.enter(bob)
    assert w.present() == ["ann", "eve", "bob"]


async def test_presence_of_each_room_is_independent(watched: Any) -> None:
    """A client in two rooms joins and leaves each of them independently."""
    w = watched()
    ann = FakeRecipient("ann")
    w.enter(ann, "a")
    w.enter(ann, "b")
    w.leave(ann, "a", at_once=True)
    await settle()
    assert (w.present("a"), w.present("b")) == ([], ["ann"])
    assert {(what, who.room) for what, who in w.calls} == {("joined", "b")}


async def test_presence_of_unknown_room_is_empty(watched: Any) -> None:
    """Asking for the presence of an unknown room is not an error and creates no room."""
    w = watched()
    assert w.board.present("nowhere") == []
    assert len(w.board) == 0


# ── metadata ──


async def test_later_join_replaces_presence_metadata(watched: Any) -> None:
    """The last metadata applies; a join without metadata changes nothing."""
    w = watched()
    seen = []
    for metadata in (None, {"name": "Ann"}, None, {"away": True}):
        w.enter(FakeRecipient("ann"), metadata=metadata)
        seen += [who.metadata for who in w.board.present("lobby")]
    assert seen == [{}, {"name": "Ann"}, {"name": "Ann"}, {"away": True}]


async def test_presence_update_replaces_metadata_unannounced(watched: Any) -> None:
    """An update replaces the metadata of a present client unannounced, and returns whether there was one."""
    w = watched()
    ann = FakeRecipient("ann")
    w.enter(ann, metadata={"name": "Ann"})
    await settle()
    assert w.board.update("lobby", "ann", {"name": "Anne"})
    assert not w.board.update("lobby", "bob", {})
    assert not w.board.update("attic", "ann", {})
    assert [who.metadata for who in w.board.present("lobby")] == [{"name": "Anne"}]
    await settle()
    assert w.said == ["ann joined"]
    w.leave(ann)
    assert w.board.update("lobby", "ann", {"away": True})


async def test_presence_metadata_is_copied(watched: Any) -> None:
    """Metadata is copied on join and on update."""
    w = watched()
    mine = {"n": 1}
    w.enter(FakeRecipient("ann"), metadata=mine)
    mine["n"] = 2
    assert w.board.present("lobby")[0].metadata == {"n": 1}
    w.board.update("lobby", "ann", mine)
    mine["n"] = 3
    assert w.board.present("lobby")[0].metadata == {"n": 2}


async def test_rejoin_after_leave_starts_without_metadata(watched: Any) -> None:
    """After a leave the metadata is removed, even if the leave was not announced yet."""
    w = watched()
    ann = FakeRecipient("ann")
    w.enter(ann, metadata={"name": "Ann"})
    await settle()
    w.leave(ann, at_once=True)
    w.now += 5
    w.enter(ann)
    (presence,) = w.board.present("lobby")
    assert (presence.metadata, presence.present_seconds) == ({}, 0.0)


async def test_present_seconds_span_reconnects_and_grace(watched: Any) -> None:
    """The seconds include reconnects, and stop at the end of the grace or at an explicit leave."""
    w = watched(grace=10)
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann)
    w.enter(bob)
    w.at(7)
    w.leave(ann)
    w.enter(ann)
    w.at(20)
    assert [who.present_seconds for who in w.board.present("lobby")] == [20.0, 20.0]
    await settle()
    w.leave(ann)
    w.leave(bob, at_once=True)
    w.at(33)
    w.now += 100  # regardless of when it is announced
    await settle()
    gone = [(who.client_id, who.connections, who.present_seconds) for what, who in w.calls if what == "left"]
    assert gone == [("bob", 0, 20.0), ("ann", 0, 30.0)]


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


async def test_many_stored_presence_lists_share_entries(watched: Any) -> None:
    """Each list shows its own time, and 2,000 stored lists share a few objects for each member."""
    w = watched()
    members = [FakeRecipient(f"c{number}") for number in range(2_000)]
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    try:
        rosters = []
        for member in members:
            w.enter(member, metadata={"name": member.client_id})
            rosters.append(w.board.roster("lobby"))
            if len(rosters) % 2:  # others are read when the next one is created
                assert len(rosters[-1]) == len(rosters)
        gc.collect()
        objects, (size, _) = len(gc.get_objects()) - before, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert objects < 20 * len(members)
    assert size < 4_000 * len(members)
    for place, roster in enumerate(rosters[::97]):
        assert [who.client_id for who in roster] == [f"c{number}" for number in range(97 * place + 1)]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "describe", "wait"]), st.integers(0, 150)), max_size=300))
def test_presence_list_is_unaffected_by_later_changes(steps: list[tuple[str, int]]) -> None:
    """A list shows the state at the call of `present`, even if it is read later."""

    async def play() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            w = Watched(monkeypatch, 0.0)
            members = [FakeRecipient(f"c{number}") for number in range(151)]
            kept: list[tuple[Any, list[Presence], list[float]]] = []
            for act, number in steps:
                member = members[number]
                if act == "wait":
                    w.now += 1.0
                elif act == "describe":
                    w.board.update("lobby", member.client_id, {"n": w.now})
                elif act == "enter":
                    w.enter(member)
                else:
                    w.leave(member, at_once=True)
                there = w.board.present("lobby")
                kept.append((w.board.roster("lobby"), there, [who.present_seconds for who in there]))
            for roster, there, seconds in kept:
                assert list(roster) == there
                assert [who.present_seconds for who in roster] == seconds
                assert (len(roster), roster[-1:], roster[2:5]) == (len(there), there[-1:], there[2:5])
            w.board.close()
            await settle()

    run(play())


# ── grace ──


async def test_reconnect_within_grace_is_not_announced(watched: Any) -> None:
    """A client that reconnects within the grace is present all the time, without an announcement."""
    w = watched(grace=10)
    old, new = FakeRecipient("ann"), FakeRecipient("ann")
    w.enter(old)
    await settle()
    w.leave(old)
    w.at(9.9)
    assert [(who.client_id, who.connections) for who in w.board.present("lobby")] == [("ann", 0)]
    w.enter(new)
    w.at(1000)
    await settle()
    assert w.present() == ["ann"]
    assert w.said == ["ann joined"]


async def test_client_leaves_presence_when_grace_ends(watched: Any) -> None:
    """A client is present until `grace` seconds after its last connection has left."""
    w = watched(grace=10)
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.at(5)
    w.leave(ann)
    w.at(14.9)
    await settle()
    assert w.present() == ["ann"]
    assert w.said == ["ann joined"]
    w.at(15)
    assert w.present() == []
    await settle()
    assert w.said == ["ann joined", "ann left"]


async def test_interrupted_grace_does_not_shorten_next_grace(watched: Any) -> None:
    """An earlier interrupted grace does not shorten the next one."""
    w = watched(grace=10)
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


async def test_repeated_leave_does_not_change_running_grace(watched: Any) -> None:
    """A second leave of a connection neither extends nor ends the grace."""
    w = watched(grace=10)
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


async def test_explicit_leave_skips_grace(watched: Any) -> None:
    """With `at_once` the leave of the last connection removes its client; with another connection the client stays."""
    w = watched(grace=10)
    one, two = FakeRecipient("ann"), FakeRecipient("ann")
    w.enter(one)
    w.enter(two)
    w.leave(one, at_once=True)
    assert w.present() == ["ann"]
    w.leave(two, at_once=True)
    assert w.present() == []
    assert w.board._timer is None


@pytest.mark.parametrize("broken_first", [True, False])
async def test_lost_connection_gets_grace_when_other_one_leaves(watched: Any, broken_first: bool) -> None:
    """Of two connections one is lost and one leaves explicitly, in either order: the lost one gets its grace."""
    w = watched(grace=10)
    broken, closed = FakeRecipient("ann"), FakeRecipient("ann")
    w.enter(broken)
    w.enter(closed)
    await settle()
    for tab in (broken, closed) if broken_first else (closed, broken):
        w.leave(tab, at_once=tab is closed)
    await settle()
    w.enter(FakeRecipient("ann"))
    await settle()
    assert w.said == ["ann joined"]


async def test_zero_grace_announces_leave_immediately(watched: Any) -> None:
    """A grace of zero seconds needs no timer."""
    w = watched(grace=0)
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.leave(ann)
    assert w.present() == []
    assert w.board._timer is None
    await settle()
    assert w.said == ["ann joined", "ann left"]


async def test_grace_ends_on_real_clock() -> None:
    """On the real clock, a grace ends by its timer, and no timer is left."""
    left = asyncio.Event()

    async def joined(who: Presence) -> None: ...

    async def gone(who: Presence) -> None:
        left.set()

    tasks = TaskSet(lambda _, __: None)
    board = PresenceTracker(grace=0.02, joined=joined, left=gone, wanted=lambda: True, tasks=tasks)
    board.join("lobby", "ann", "1", None)
    await settle()
    board.leave("lobby", "ann", "1", at_once=False)
    await asyncio.wait_for(left.wait(), 5.0)
    assert board.present("lobby") == []
    assert board._timer is None


async def test_all_graces_share_one_timer(watched: Any) -> None:
    """For any number of graces the event loop has one timer, for the first; a reconnect has no cost."""
    w = watched(grace=10)
    members = [FakeRecipient(f"client-{number}") for number in range(5)]
    timers = set()
    for second, member in enumerate(members):
        w.at(second)
        w.enter(member)
        assert w.board._timer in timers or not timers
        w.leave(member)
        timers.add(w.board._timer)
    assert len(timers) == 1
    w.enter(members[0])
    w.enter(members[1])
    assert len(w.board._graces) == 3
    w.at(12)
    assert w.present() == ["client-0", "client-1", "client-3", "client-4"]
    assert w.board._timer not in timers
    w.at(20)
    assert w.present() == ["client-0", "client-1"]
    assert w.board._timer is None


async def test_timer_of_returned_client_ends_no_other_grace(watched: Any) -> None:
    """When the first client has reconnected, its timer ends no other grace early."""
    w = watched(grace=10)
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
    assert w.board._timer is not None
    w.at(15)
    assert w.present() == ["ann"]


async def test_repeated_reconnects_hold_one_grace_entry(watched: Any) -> None:
    """A client has one grace entry, however often it has left."""
    w = watched(grace=10)
    ann = FakeRecipient("ann")
    for _ in range(1000):
        w.enter(ann)
        w.leave(ann)
    assert len(w.board._graces) == 1


async def test_simultaneous_grace_ends_are_processed_in_batches(watched: Any) -> None:
    """One iteration of the event loop ends at most `AT_ONCE` graces; the rest follows automatically."""
    w = watched(grace=10)
    w.listening = False
    members = [FakeRecipient(f"client-{number}") for number in range(1000)]
    for member in members:
        w.enter(member)
        w.leave(member)
    w.now += 10
    left = [1000]
    w.timer_fires()
    while left[-1]:
        left.append(len(w.present()))
        await asyncio.sleep(0)
    assert left[1] == 1000 - AT_ONCE
    assert max(before - after for before, after in pairwise(left)) == AT_ONCE


# ── announcements ──


async def test_joins_and_leaves_are_announced_in_order(watched: Any) -> None:
    """Announcements of a room have the order of the changes."""
    w = watched(grace=10)
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann, metadata={"name": "Ann"})
    w.enter(bob)
    await settle()
    w.leave(bob)
    w.leave(ann)
    w.at(10)
    await settle()
    assert w.said == ["ann joined", "bob joined", "bob left", "ann left"]
    assert w.calls[0][1] == Presence("ann", "lobby", {"name": "Ann"}, 1, 0.0)
    assert w.calls[3][1] == Presence("ann", "lobby", {"name": "Ann"}, 0, 10.0)


async def test_announcements_of_room_run_one_at_a_time(watched: Any) -> None:
    """The next call of a room waits for the end of the previous one; other rooms do not wait."""
    w = watched()
    w.block()
    for name in ("ann", "bob"):
        w.enter(FakeRecipient(name), "a")
        w.enter(FakeRecipient(name), "b")
    await settle()
    assert [(who.room, who.client_id) for _, who in w.calls] == [("a", "ann"), ("b", "ann")]
    assert len(w.tasks) == 2
    w.release()
    await settle()
    assert w.said == ["ann joined", "ann joined", "bob joined", "bob joined"]


async def test_join_undone_before_announcement_is_not_announced(watched: Any) -> None:
    """A join that was undone while another call was running is not announced."""
    w = watched()
    bob = FakeRecipient("bob")
    w.block()
    w.enter(FakeRecipient("ann"))
    await settle()
    for _ in range(100):
        w.enter(bob)
        w.leave(bob, at_once=True)
    w.release()
    await settle()
    assert w.said == ["ann joined"]


async def test_leave_undone_before_announcement_is_not_announced(watched: Any) -> None:
    """A leave that was undone while another call was running is not announced; the next one is."""
    w = watched()
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
    assert w.said == ["ann joined", "bob joined"]
    w.leave(ann, at_once=True)
    await settle()
    assert w.said == ["ann joined", "bob joined", "ann left"]


async def test_leave_during_join_announcement_is_announced(watched: Any) -> None:
    """A call that has begun counts as announced, so the opposite change is announced too."""
    w = watched()
    ann = FakeRecipient("ann")
    w.block()
    w.enter(ann)
    await settle()
    w.leave(ann, at_once=True)
    w.release()
    await settle()
    assert w.said == ["ann joined", "ann left"]


async def test_join_during_leave_announcement_is_announced(watched: Any) -> None:
    """After a leave whose call has begun, a rejoin is announced as a join."""
    w = watched()
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.block()
    w.leave(ann, at_once=True)
    await settle()
    w.enter(ann)
    w.release()
    await settle()
    assert w.said == ["ann joined", "ann left", "ann joined"]


async def test_empty_room_with_running_hook_starts_no_second_task(watched: Any) -> None:
    """While a leave is announced, an unannounced join and leave start no second call."""
    w = watched()
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
    assert w.said == ["ann joined", "ann left"]
    assert len(w.tasks) == 1
    w.release()
    await settle()
    assert w.said == ["ann joined", "ann left", "eve joined"]


async def test_pending_announcements_are_one_per_client(watched: Any) -> None:
    """Any number of changes leaves one waiting entry for each client, and one task."""
    w = watched()
    members = [FakeRecipient(f"client-{number}") for number in range(10)]
    w.block()
    w.enter(FakeRecipient("ann"))
    await settle()
    for _ in range(50):
        for member in members:
            w.enter(member)
        for member in members[::2]:
            w.leave(member, at_once=True)
    assert len(w.board._rooms["lobby"].pending) == 5
    assert len(w.tasks) == 1
    w.release()
    await settle()
    assert w.said == ["ann joined", *(f"{member.client_id} joined" for member in members[1::2])]


async def test_announcement_carries_state_at_call_time(watched: Any) -> None:
    """A delayed announcement has the metadata and connections at the time of its call."""
    w = watched()
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


async def test_announcer_task_exists_only_while_needed(watched: Any) -> None:
    """One task for each room announces and ends; a second tab, a reload and a present client have none."""
    w = watched()
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


async def test_presence_without_hooks_creates_no_task(watched: Any) -> None:
    """Without hooks no task is created and no announcement waits."""
    w = watched(grace=10)
    w.listening = False
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann)
    w.enter(bob)
    assert w.board._rooms["lobby"].pending == {}
    w.leave(ann)
    w.at(10)
    w.leave(bob, at_once=True)
    assert len(w.tasks) == 0
    assert len(w.board) == 0
    assert w.calls == []


async def test_late_presence_hook_gets_no_leave_without_join(watched: Any) -> None:
    """A late hook gets no leave without its join, and every later change."""
    w = watched()
    w.listening = False
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.enter(ann)
    w.listening = True
    w.enter(bob)
    w.leave(ann, at_once=True)
    w.enter(ann)
    await settle()
    assert w.said == ["bob joined", "ann joined"]


async def test_many_announcements_yield_to_event_loop() -> None:
    """One iteration of the event loop makes at most `AT_ONCE` announcements of a room."""
    said = 0

    async def hear(who: Presence) -> None:
        nonlocal said
        said += 1

    tasks = TaskSet(lambda _, __: None)
    board = PresenceTracker(grace=0, joined=hear, left=hear, wanted=lambda: True, tasks=tasks)
    for number in range(1000):
        board.join("lobby", f"client-{number}", str(number), None)
    at_turns = [0]
    while at_turns[-1] < 1000:
        await asyncio.sleep(0)
        at_turns.append(said)
    assert max(after - before for before, after in pairwise(at_turns)) == AT_ONCE
    board.close()
    await eventually(lambda: len(tasks) == 0)


async def test_announcement_runs_in_context_of_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The context is that of the tracker's creator, and not that of a connection."""
    seen: list[str] = []

    async def hear(who: Presence) -> None:
        seen.append(VARIABLE.get())

    tasks = TaskSet(lambda _, __: None)
    makers = contextvars.copy_context()
    makers.run(VARIABLE.set, "maker's")
    board = makers.run(lambda: PresenceTracker(grace=0, joined=hear, left=hear, wanted=lambda: True, tasks=tasks))
    contextvars.copy_context().run(lambda: (VARIABLE.set("ann's"), board.join("lobby", "ann", "1", None)))
    await settle()
    assert seen == ["maker's"]


async def test_presence_change_by_hook_is_announced_afterwards(watched: Any) -> None:
    """A change that a call makes in its own room is announced after it, by the same task."""
    w = watched()
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    hear = w.board._joined

    async def joined(who: Presence) -> None:
        if who.client_id == "ann":
            w.enter(bob)
            w.leave(ann, at_once=True)
            assert len(w.tasks) == 1
        await hear(who)

    w.board._joined = joined
    w.enter(ann)
    await settle()
    assert w.said == ["ann joined", "bob joined", "ann left"]


async def test_raising_presence_hook_does_not_stop_announcements(watched: Any) -> None:
    """The task reports the error, the change counts as announced, and the remaining ones are announced."""
    w = watched()
    ann, hear = FakeRecipient("ann"), w.board._joined

    async def joined(who: Presence) -> None:
        await hear(who)
        if who.client_id == "ann":
            raise ValueError("no")

    w.board._joined = joined
    w.enter(ann)
    w.enter(FakeRecipient("bob"))
    await settle()
    assert w.said == ["ann joined", "bob joined"]
    w.leave(ann, at_once=True)
    await settle()
    assert w.said == ["ann joined", "bob joined", "ann left"]
    assert [str(error) for error in w.failures] == ["no"]
    w.failures.clear()


async def test_join_while_announcer_ends_is_announced(watched: Any) -> None:
    """A change between the task's last check and its end is announced."""
    w = watched()

    async def joined(who: Presence) -> None:
        w.calls.append(("joined", who))
        if who.client_id == "ann":  # runs after this task's last step and before it counts as done
            asyncio.get_running_loop().call_soon(w.enter, FakeRecipient("bob"))

    w.board._joined = joined
    w.enter(FakeRecipient("ann"))
    await settle()
    assert w.said == ["ann joined", "bob joined"]


@pytest.mark.parametrize("begun", [True, False])
async def test_cancelled_announcement_is_made_at_next_change(watched: Any, begun: bool) -> None:
    """A task that is cancelled, even before its first step, starts no other; the room's next change does."""
    w = watched()
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
    assert w.said == ["ann joined", "bob joined", "eve joined"]


async def test_pending_leave_survives_cancelled_announcer(watched: Any) -> None:
    """The empty room stays until the leave is announced, so that a rejoin cancels it and is no second join."""
    w = watched()
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.leave(ann, at_once=True)
    w.tasks.cancel()
    await settle()
    assert len(w.board) == 1
    w.enter(ann)
    w.leave(ann, at_once=True)
    await settle()
    assert w.said == ["ann joined", "ann left"]
    assert len(w.board) == 0


async def test_eager_task_factory_does_not_change_announcements(watched: Any) -> None:
    """Calls that run inside `enter` and `leave` see the new state, and still run one at a time in each room."""
    w = watched(grace=0)
    ann, bob, eve = FakeRecipient("ann"), FakeRecipient("bob"), FakeRecipient("eve")
    hear = w.board._joined

    async def joined(who: Presence) -> None:
        if who.client_id == "ann":
            w.enter(bob)
            w.enter(eve, "attic")
        await hear(who)

    w.board._joined = joined
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
        room: [(what, who.client_id, who.connections) for what, who in w.calls if who.room == room]
        for room in ("lobby", "attic")
    }
    assert calls == {
        "lobby": [("joined", "ann", 1), ("joined", "bob", 1), ("left", "ann", 0)],
        "attic": [("joined", "eve", 1)],
    }


# ── nothing is left ──


async def test_empty_room_is_removed_after_last_announcement(watched: Any) -> None:
    """A room exists until its last leave is announced, and no longer."""
    w = watched(grace=10)
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.leave(ann)
    assert len(w.board) == 1
    w.block()
    w.at(10)
    await settle()
    assert w.present() == []
    assert len(w.board) == 1
    w.release()
    await settle()
    assert len(w.board) == 0


async def test_room_with_undone_join_is_removed(watched: Any) -> None:
    """A room without any announcement leaves no entry and no task."""
    w = watched()
    ann = FakeRecipient("ann")
    w.enter(ann)
    w.leave(ann, at_once=True)
    await settle()
    assert (len(w.board), len(w.tasks), w.calls) == (0, 0, [])


async def test_closed_tracker_announces_nothing(watched: Any) -> None:
    """Closing removes all clients, stops the timer, and lets a running call finish; it may be repeated."""
    w = watched(grace=10)
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    w.block()
    w.enter(ann)
    await settle()
    w.enter(bob)
    w.leave(ann)
    timer = w.board._timer
    w.board.close()
    w.board.close()
    assert timer.cancelled()
    assert w.board._timer is None
    assert len(w.tasks) == 1
    w.leave(bob, at_once=True)
    w.release()
    await settle()
    assert w.said == ["ann joined"]
    assert (len(w.board), len(w.tasks), len(w.board._graces)) == (0, 0, 0)


async def test_closed_tracker_can_be_reused(watched: Any) -> None:
    """State after a close is new, and the end of an earlier call does not affect it."""
    w = watched()
    ann = FakeRecipient("ann")
    w.enter(ann)
    await settle()
    w.block()
    w.leave(ann, at_once=True)
    await settle()
    w.board.close()
    w.listening = False
    w.enter(FakeRecipient("bob"))
    w.release()
    await settle()
    assert w.present() == ["bob"]
    assert len(w.board) == 1
    assert w.said == ["ann joined", "ann left"]


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
class Stay:
    """State of one client in one room, in a simple model."""

    since: float
    metadata: Any
    connections: set[str] = field(default_factory=set)
    due: float | None = None
    expected: float = 0.0


class Model:
    """Simple model of presence, without cleanup."""

    def __init__(self) -> None:
        self.stays: dict[tuple[str, str], Stay] = {}

    def enter(self, room: str, member: FakeRecipient, metadata: Any, now: float) -> None:
        """Let a connection join."""
        stay = self.stays.setdefault((room, member.client_id), Stay(now, {}))
        stay.connections.add(member.connection_id)
        stay.due = None
        stay.expected = 0.0
        stay.metadata = stay.metadata if metadata is None else metadata

    def leave(self, room: str, member: FakeRecipient, at_once: bool, now: float) -> None:
        """Let a connection leave."""
        stay = self.stays.get((room, member.client_id))
        if stay is not None and member.connection_id in stay.connections:
            stay.connections.remove(member.connection_id)
            if not at_once:
                stay.expected = now + GRACE
            if not stay.connections:
                stay.due = now if stay.expected <= now else now + GRACE
                self.wait(now)

    def wait(self, now: float) -> None:
        """Let time pass."""
        self.stays = {key: stay for key, stay in self.stays.items() if stay.due is None or stay.due > now}

    def present(self, room: str, now: float) -> list[tuple[str, Any, int, float]]:
        """Return the clients in a room."""
        return [
            (client_id, stay.metadata, len(stay.connections), now - stay.since)
            for (where, client_id), stay in self.stays.items()
            if where == room
        ]


def said_of(calls: list[tuple[str, Presence]]) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Return the announcements for each client of each room, in order."""
    for room in ROOMS:
        for client_id in CLIENTS:
            yield (room, client_id), [what for what, who in calls if (who.room, who.client_id) == (room, client_id)]


@settings(max_examples=300)
@given(STEPS)
def test_presence_and_announcements_agree_with_model(steps: list[tuple[Any, ...]]) -> None:
    """Presence equals that of a simple model, and calls alternate between join and leave."""
    run(_play(steps))


async def _play(steps: list[tuple[Any, ...]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        w, model = Watched(monkeypatch, GRACE), Model()
        members = [FakeRecipient(CLIENTS[number % 2]) for number in range(4)]
        heard_all = True
        for act, *details in steps:
            if act == "enter":
                room, number, value = details
                metadata = None if value is None else {"n": value}
                w.enter(members[number], room, metadata)
                model.enter(room, members[number], metadata, w.now)
                heard_all = heard_all and w.listening
            elif act == "leave":
                room, number, at_once = details
                w.leave(members[number], room, at_once=at_once)
                model.leave(room, members[number], at_once, w.now)
            elif act == "wait":
                w.at(w.now - 1000.0 + details[0])
                if w.board._timer is not None:  # it may have been set for a client that has reconnected
                    w.timer_fires()
                model.wait(w.now)
            elif act == "turn":
                await settle(5)
            elif act in ("block", "release"):
                getattr(w, act)()
            else:
                w.listening = act == "listen"
            for room in ROOMS:
                there = w.board.present(room)
                seen = [(who.client_id, dict(who.metadata), who.connections, who.present_seconds) for who in there]
                assert seen == model.present(room, w.now)
                assert len(w.board._rooms[room].pending if room in w.board._rooms else ()) <= len(CLIENTS)
            assert len(w.board._graces) == sum(stay.due is not None for stay in model.stays.values())
            assert (w.board._timer is not None) >= bool(w.board._graces)
        w.release()
        await settle(60)
        assert w.failures == []
        assert len(w.tasks) == 0
        assert set(w.board._rooms) == {room for room, _ in model.stays}
        for key, words in said_of(w.calls):
            assert words == ["joined", "left"] * (len(words) // 2) + ["joined"] * (len(words) % 2)
            if heard_all:
                assert (words[-1:] == ["joined"]) == (key in model.stays)
        w.board.close()
        await settle()


def test_room_list_is_stable_while_rooms_change() -> None:
    """Another thread may list the rooms while they change."""

    async def nothing(_: Presence) -> None:
        """Do nothing."""

    async def check() -> None:
        tasks = TaskSet(lambda *_: None)
        board = PresenceTracker(grace=0, joined=nothing, left=nothing, wanted=lambda: False, tasks=tasks)

        class Changing:
            """Dict that gets another room while it is iterated."""

            @property
            def entries(self) -> dict[str, Any]:
                board.join("another", "ann", "connection", None)
                return {"bob": None}

        board._rooms["lobby"] = Changing()  # type: ignore[assignment]
        assert board.rooms() == ["lobby"]
        assert "another" in board.rooms()

    run(check())
