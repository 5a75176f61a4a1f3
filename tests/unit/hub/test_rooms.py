"""Tests of the membership of rooms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.errors import RoomLimitError, RoomNameError
from fastapi_ws_stabilizer.hub.rooms import RoomMembership
from tests.support.fake_recipient import FakeRecipient


@pytest.fixture
def rooms() -> RoomMembership[FakeRecipient]:
    """Return rooms without a limit for a connection."""
    return RoomMembership(None)


# ── joining and leaving ──


def test_join_adds_member_and_room(rooms: RoomMembership[FakeRecipient]) -> None:
    """A connection that has joined is among the members, and the room among its rooms."""
    ann = FakeRecipient("ann")
    assert rooms.join(ann, "lobby")
    assert rooms.members("lobby") == [ann]
    assert rooms.rooms_of(ann) == ("lobby",)
    assert rooms.names() == ["lobby"]
    assert len(rooms) == 1
    assert "lobby" in rooms


def test_repeated_join_is_idempotent(rooms: RoomMembership[FakeRecipient]) -> None:
    """A second join returns that it was a member, does not change its position, and needs no second leave."""
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    rooms.join(ann, "lobby")
    rooms.join(bob, "lobby")
    assert not rooms.join(ann, "lobby")
    assert rooms.members("lobby") == [ann, bob]
    assert rooms.leave(ann, "lobby")
    assert rooms.members("lobby") == [bob]


def test_leave_without_membership_changes_nothing(rooms: RoomMembership[FakeRecipient]) -> None:
    """A leave without membership returns `False`, whether the room exists or not."""
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    assert not rooms.leave(ann, "lobby")
    rooms.join(ann, "lobby")
    rooms.join(bob, "attic")
    assert not rooms.leave(bob, "lobby")
    assert not rooms.leave(ann, "nowhere")
    assert (rooms.rooms_of(ann), rooms.rooms_of(bob)) == (("lobby",), ("attic",))
    assert len(rooms) == 2


def test_leave_all_removes_member_and_returns_rooms(rooms: RoomMembership[FakeRecipient]) -> None:
    """The connection is in no room afterwards; its rooms are returned in the order of joining; others stay."""
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    for name in ("c", "a", "b"):
        rooms.join(ann, name)
    rooms.join(bob, "a")
    assert rooms.leave_all(ann) == ("c", "a", "b")
    assert rooms.rooms_of(ann) == ()
    assert rooms.names() == ["a"]
    assert rooms.members("a") == [bob]


def test_leave_all_without_rooms_returns_nothing(rooms: RoomMembership[FakeRecipient]) -> None:
    """Without rooms nothing is returned, and nothing raises."""
    ann = FakeRecipient("ann")
    assert rooms.leave_all(ann) == ()
    rooms.join(ann, "lobby")
    rooms.leave_all(ann)
    assert rooms.leave_all(ann) == ()


def test_connections_of_one_client_are_separate_members(rooms: RoomMembership[FakeRecipient]) -> None:
    """The end of an old connection does not remove a newer one of the same client."""
    old, new = FakeRecipient("ann"), FakeRecipient("ann")
    rooms.join(old, "lobby")
    rooms.join(new, "lobby")
    rooms.join(new, "attic")
    assert rooms.members("lobby") == [old, new]
    rooms.leave_all(old)
    assert not rooms.leave(old, "attic")
    assert rooms.members("lobby") == rooms.members("attic") == [new]
    assert rooms.rooms_of(new) == ("lobby", "attic")


def test_rejoin_moves_member_to_end(rooms: RoomMembership[FakeRecipient]) -> None:
    """Members and rooms are in the order of the latest join."""
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob")
    for name in ("a", "b"):
        rooms.join(ann, name)
        rooms.join(bob, name)
    rooms.leave(ann, "a")
    rooms.join(ann, "a")
    assert rooms.members("a") == [bob, ann]
    assert rooms.rooms_of(ann) == ("b", "a")


# ── names and limits ──


@pytest.mark.parametrize("name", ["", None, 7, b"lobby", ["lobby"]])
def test_empty_or_non_string_room_name_raises_value_error(rooms: RoomMembership[FakeRecipient], name: Any) -> None:
    """A room's name is a non-empty string; another value raises and nothing is joined."""
    ann = FakeRecipient("ann")
    with pytest.raises(ValueError, match="a string of at least one character"):
        rooms.join(ann, name)
    assert rooms.rooms_of(ann) == ()
    assert len(rooms) == 0


@pytest.mark.parametrize(
    "name", ["x" * 257, "x" * 1_000_000, "\r\n[ERROR] fake", "\x1b[2J", "a\x00"], ids=lambda n: ascii(n[:9])
)
def test_long_or_unprintable_room_name_raises_short_error(rooms: RoomMembership[FakeRecipient], name: str) -> None:
    """Clients choose room names, so the error is one short line, and not a bug of the endpoint."""
    ann = FakeRecipient("ann")
    with pytest.raises(RoomNameError, match="at most 256 characters") as caught:
        rooms.join(ann, name)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()
    assert caught.value.close_code == 1008
    assert len(rooms) == 0
    assert rooms.join(ann, "x" * 256)


def test_join_beyond_room_limit_raises() -> None:
    """The error has room and limit; no room is created, and the connection stays in its rooms."""
    rooms: RoomMembership[FakeRecipient] = RoomMembership(2)
    ann = FakeRecipient("ann")
    rooms.join(ann, "a")
    rooms.join(ann, "b")
    with pytest.raises(RoomLimitError) as caught:
        rooms.join(ann, "c")
    assert (caught.value.room, caught.value.limit) == ("c", 2)
    assert rooms.names() == ["a", "b"]
    assert not rooms.join(ann, "b")
    rooms.leave(ann, "a")
    assert rooms.join(ann, "c")


def test_room_limit_applies_per_connection() -> None:
    """A second connection of the same client has its own limit."""
    rooms: RoomMembership[FakeRecipient] = RoomMembership(1)
    rooms.join(FakeRecipient("ann"), "a")
    assert rooms.join(FakeRecipient("ann"), "b")


def test_room_limit_zero_rejects_every_join() -> None:
    """With a limit of zero there are no rooms, and a rejected connection has no entry."""
    rooms: RoomMembership[FakeRecipient] = RoomMembership(0)
    with pytest.raises(RoomLimitError):
        rooms.join(FakeRecipient("ann"), "a")
    assert rooms._members == rooms._names == {}


# ── nothing is left ──


def test_empty_room_is_removed(rooms: RoomMembership[FakeRecipient]) -> None:
    """A room is removed with its last member, by `leave` and by `leave_all`."""
    ann = FakeRecipient("ann")
    rooms.join(ann, "lobby")
    rooms.leave(ann, "lobby")
    assert "lobby" not in rooms
    assert (rooms.names(), rooms.members("lobby"), len(rooms)) == ([], [], 0)
    rooms.join(ann, "lobby")
    rooms.leave_all(ann)
    assert "lobby" not in rooms


def test_connection_without_rooms_holds_no_entry(rooms: RoomMembership[FakeRecipient]) -> None:
    """A connection that never joined or has left its last room has no entry."""
    ann = FakeRecipient("ann")
    rooms.rooms_of(ann)
    rooms.leave(ann, "lobby")
    rooms.leave_all(ann)
    assert rooms._names == {}
    rooms.join(ann, "lobby")
    rooms.leave(ann, "lobby")
    assert rooms._names == {}


# ── recipients ──


def test_recipients_of_room_are_its_members_in_order(rooms: RoomMembership[FakeRecipient]) -> None:
    """The recipients of a room are its members in order, whether it is given alone or in a list."""
    ann, bob, eve = FakeRecipient("ann"), FakeRecipient("bob"), FakeRecipient("eve")
    rooms.join(ann, "lobby")
    rooms.join(bob, "lobby")
    rooms.join(eve, "l")
    assert list(rooms.recipients(["lobby"])) == list(rooms.recipients("lobby")) == [ann, bob]


def test_member_of_several_rooms_is_recipient_once(rooms: RoomMembership[FakeRecipient]) -> None:
    """A member of several rooms gets one copy, also if a room is named twice; two connections are two members."""
    ann, again, bob = FakeRecipient("ann"), FakeRecipient("ann"), FakeRecipient("bob")
    for name in ("a", "b"):
        rooms.join(ann, name)
    rooms.join(again, "b")
    rooms.join(bob, "c")
    assert list(rooms.recipients(iter(["a", "b", "a", "nowhere", "c"]))) == [ann, again, bob]
    assert len(rooms.recipients(["b", "b"])) == 2


def test_unknown_rooms_have_no_recipients(rooms: RoomMembership[FakeRecipient]) -> None:
    """A message to an empty or unknown room reaches no member and creates no room."""
    assert (
        list(rooms.recipients(["nowhere", "neither"]))
        == list(rooms.recipients([]))
        == list(rooms.recipients("x"))
        == []
    )
    assert len(rooms) == 0


@pytest.mark.parametrize("names", ["a", ["a"], ["a", "b"]])
def test_recipients_are_unaffected_by_later_changes(rooms: RoomMembership[FakeRecipient], names: Any) -> None:
    """The recipients are those of the call: later changes have no effect."""
    members = [FakeRecipient() for _ in range(3)]
    for member in members:
        rooms.join(member, "a")
        rooms.join(member, "b")
    audience = rooms.recipients(names)
    seen = []
    for member in audience:
        seen.append(member)
        rooms.leave_all(member)
        rooms.join(FakeRecipient(), "a")
        rooms.join(FakeRecipient(), "a")
    assert seen == members
    assert len(audience) == 3


def test_changing_returned_list_does_not_change_room(rooms: RoomMembership[FakeRecipient]) -> None:
    """Changing the returned list does not change the room."""
    ann = FakeRecipient("ann")
    rooms.join(ann, "lobby")
    rooms.members("lobby").clear()
    rooms.names().clear()
    assert rooms.members("lobby") == [ann]
    assert rooms.names() == ["lobby"]


# ── random operations ──

STEPS = st.lists(
    st.tuples(st.sampled_from(["join", "join", "leave", "end"]), st.integers(0, 5), st.sampled_from("abcd")),
    min_size=20,  # by default, hypothesis creates lists of about five
    max_size=60,
)


@given(STEPS, st.none() | st.integers(0, 4))
def test_membership_agrees_with_model(steps: list[tuple[str, int, str]], limit: int | None) -> None:
    """After any joins and leaves, all results agree with a plain list of memberships."""
    rooms: RoomMembership[FakeRecipient] = RoomMembership(limit)
    members = [FakeRecipient(f"client-{number % 3}") for number in range(6)]
    pairs: list[tuple[FakeRecipient, str]] = []
    for act, number, name in steps:
        member = members[number]
        mine = [room for one, room in pairs if one is member]
        if act == "join" and name not in mine and limit is not None and len(mine) >= limit:
            with pytest.raises(RoomLimitError):
                rooms.join(member, name)
        elif act == "join":
            assert rooms.join(member, name) == (name not in mine)
            pairs += [] if name in mine else [(member, name)]
        elif act == "leave":
            assert rooms.leave(member, name) == (name in mine)
            pairs = [pair for pair in pairs if pair != (member, name)]
        else:
            assert rooms.leave_all(member) == tuple(mine)
            pairs = [pair for pair in pairs if pair[0] is not member]

        for one in members:
            assert list(rooms.rooms_of(one)) == [room for member, room in pairs if member is one]
        for room in "abcd":
            there = [member for member, room_name in pairs if room_name == room]
            assert rooms.members(room) == list(rooms.recipients([room])) == there
            assert (room in rooms) == bool(there)
        both = rooms.recipients(["a", "b"])
        assert len(both) == len({member.connection_id for member, room_name in pairs if room_name in "ab"})
        assert {member.connection_id for member in both} == {
            member.connection_id for member, room_name in pairs if room_name in "ab"
        }
        assert set(rooms.names()) == {room_name for _, room_name in pairs}
        assert len(rooms) == len(rooms.names())
        assert set(rooms._names) == {member.connection_id for member, _ in pairs}


def test_leave_all_of_old_member_after_handover_does_nothing() -> None:
    """A recipient with the same id replaces another in all its rooms, and the end of the old one changes nothing."""
    rooms: RoomMembership[Any] = RoomMembership(None)
    old, new = FakeRecipient(), FakeRecipient()
    new.connection_id = old.connection_id
    rooms.hand_over(old, new)
    for name in ("lobby", "kitchen"):
        rooms.join(old, name)
    rooms.hand_over(old, new)
    assert rooms.leave_all(old) == ()
    assert (rooms.members("lobby"), rooms.rooms_of(new)) == ([new], ("lobby", "kitchen"))
    assert rooms.leave_all(new) == ("lobby", "kitchen")
    assert len(rooms) == 0
