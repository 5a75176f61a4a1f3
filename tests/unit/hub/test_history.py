"""Tests of the message history of rooms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.hub import history as history_module
from fastapi_ws_stabilizer.hub.history import RoomHistory
from fastapi_ws_stabilizer.wire.encoded import encode


class Clock:
    """Clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(history_module, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a fake clock."""
    return Clock(monkeypatch)


def say(history: RoomHistory, room: str, *texts: str) -> None:
    """Send a message to a room."""
    for text in texts:
        history.add(room, encode(text))


def last(history: RoomHistory, room: str, count: int = 100) -> list[str | None]:
    """Return the last texts of a room."""
    return [frame.text for frame in history.last(room, count)]


def test_history_returns_newest_messages_oldest_first() -> None:
    """The last messages come oldest first, at most the requested number, and only those of the room."""
    history = RoomHistory(10, 60)
    say(history, "lobby", "a", "b", "c")
    say(history, "attic", "d")
    assert last(history, "lobby", 2) == ["b", "c"]
    assert last(history, "lobby") == ["a", "b", "c"]
    assert last(history, "attic") == ["d"]
    assert last(history, "cellar") == []


@pytest.mark.parametrize("count", [0, -1])
def test_history_with_non_positive_count_returns_nothing(count: int) -> None:
    """A count that is not positive returns nothing, and not everything."""
    history = RoomHistory(10, 60)
    say(history, "lobby", "a")
    assert last(history, "lobby", count) == []


def test_history_beyond_max_messages_drops_oldest() -> None:
    """Above the limit of messages the oldest are dropped."""
    history = RoomHistory(3, 60)
    say(history, "lobby", *"abcde")
    assert last(history, "lobby") == ["c", "d", "e"]


def test_history_limit_zero_stores_nothing() -> None:
    """A limit of 0 stores nothing."""
    history = RoomHistory(0, 60)
    say(history, "lobby", "a")
    assert len(history) == 0
    assert last(history, "lobby") == []


def test_volatile_message_is_not_in_history() -> None:
    """A volatile message is not stored for new members."""
    history = RoomHistory(10, 60)
    history.add("lobby", encode("a", volatile=True))
    assert len(history) == 0


def test_history_beyond_max_bytes_drops_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of bytes the oldest are dropped, and one message of any size is stored."""
    monkeypatch.setattr(history_module, "MAX_BYTES", 10)
    history = RoomHistory(100, 60)
    say(history, "lobby", "aaaa", "bbbb", "cccc")
    assert last(history, "lobby") == ["bbbb", "cccc"]
    say(history, "lobby", "d" * 50)
    assert last(history, "lobby") == ["d" * 50]
    say(history, "lobby", "e")
    assert last(history, "lobby") == ["e"]


def test_messages_beyond_max_age_expire(clock: Clock) -> None:
    """A message is stored for its maximum age, for all readers."""
    history = RoomHistory(10, 60)
    say(history, "lobby", "a")
    clock.now += 40
    say(history, "lobby", "b")
    clock.now += 20
    assert last(history, "lobby") == ["a", "b"]
    clock.now += 0.1
    assert last(history, "lobby") == ["b"]
    clock.now += 60
    assert last(history, "lobby") == []


def test_history_of_idle_room_expires_on_any_message(clock: Clock) -> None:
    """Expired messages of idle rooms are removed when a message is sent to any room."""
    history = RoomHistory(10, 60)
    say(history, "lobby", "a")
    say(history, "attic", "b")
    clock.now += 30
    say(history, "lobby", "c")
    clock.now += 31
    say(history, "cellar", "d")
    assert len(history) == 2
    assert last(history, "attic") == []
    assert last(history, "lobby") == ["c"]


def test_room_with_only_expired_messages_is_removed(clock: Clock) -> None:
    """A room that a read has emptied is removed with the next message."""
    history = RoomHistory(10, 60)
    say(history, "lobby", "a")
    clock.now += 61
    assert last(history, "lobby") == []
    say(history, "attic", "b")
    assert len(history) == 1


def test_rooms_beyond_max_rooms_drop_least_recent(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of rooms, the room with the oldest last message is removed first."""
    monkeypatch.setattr(history_module, "MAX_ROOMS", 2)
    history = RoomHistory(10, 60)
    for room in ("lobby", "attic", "lobby", "cellar"):
        clock.now += 1
        say(history, room, room)
    assert len(history) == 2
    assert last(history, "attic") == []
    assert last(history, "lobby") == ["lobby", "lobby"]


def test_history_shares_message_without_copy() -> None:
    """The history holds the same message object that was broadcast."""
    history, frame = RoomHistory(10, 60), encode("a")
    history.add("lobby", frame)
    history.add("attic", frame)
    assert history.last("lobby", 1)[0] is history.last("attic", 1)[0] is frame


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=40), st.integers(1, 5), st.integers(1, 7)
)
def test_history_is_always_tail_of_room_messages(said: list[tuple[str, int]], max_messages: int, count: int) -> None:
    """The history is always the end of the room's messages, and its bytes are counted correctly."""
    history, rooms = RoomHistory(max_messages, 60), {room: [] for room in "abc"}
    for number, (room, size) in enumerate(said):
        text = f"{number}{'.' * size}"
        rooms[room].append(text)
        say(history, room, text)
    for room, texts in rooms.items():
        assert last(history, room, count) == texts[-min(count, max_messages) :]
        if texts:
            assert history._rooms[room].bytes == sum(map(len, texts[-max_messages:]))


def test_ended_room_records_nothing_until_begin(clock: Clock) -> None:
    """The end of a room drops its messages and those sent since, until a member joins."""
    history = RoomHistory(10, 60)
    say(history, "lobby", "private")
    history.end("lobby")
    say(history, "lobby", "said to no member")
    assert last(history, "lobby") == []
    history.begin("lobby")
    say(history, "lobby", "new")
    history.begin("lobby")
    assert last(history, "lobby") == ["new"]


def test_room_end_is_remembered_for_max_age(clock: Clock) -> None:
    """After `max_age` an ended room counts as new; other rooms remove its record by then."""
    history = RoomHistory(10, 60)
    history.end("lobby")
    clock.now += 59
    say(history, "lobby", "too early")
    say(history, "attic", "x")
    assert len(history) == 1
    clock.now += 2
    say(history, "lobby", "for the first member")
    assert last(history, "lobby") == ["for the first member"]
    history.end("cellar")
    clock.now += 61
    say(history, "attic", "y")
    assert len(history) == 1


def test_ended_rooms_do_not_evict_live_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended rooms do not displace the history of others, and only the last ones are remembered."""
    monkeypatch.setattr(history_module, "MAX_ROOMS", 3)
    monkeypatch.setattr(history_module, "MAX_ENDED", 3)
    history = RoomHistory(10, 60)
    say(history, "lobby", "precious")
    for number in range(10):
        history.begin(f"room {number}")
        history.end(f"room {number}")
    assert last(history, "lobby") == ["precious"]
    assert list(history._ended) == ["room 7", "room 8", "room 9"]


def test_disabled_history_does_not_record_room_end() -> None:
    """A limit of 0 stores nothing when a room ends either."""
    history = RoomHistory(0, 60)
    history.end("lobby")
    assert (len(history), len(history._ended), history.enabled) == (0, 0, False)


def test_history_omits_message_for_excluded_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message is left out for the names that it excluded, which count as bytes of the room."""
    history = RoomHistory(10, 60)
    history.add("lobby", encode("a"), frozenset({"ann", "connection 1"}))
    history.add("lobby", encode("b"))
    assert [frame.text for frame in history.last("lobby", 1, ("ann", "x"))] == ["b"]
    assert [frame.text for frame in history.last("lobby", 2, ("bob", "connection 1"))] == ["b"]
    assert [frame.text for frame in history.last("lobby", 2, ("bob", "connection 2"))] == ["a", "b"]
    monkeypatch.setattr(history_module, "MAX_BYTES", 1000)
    history.add("lobby", encode("c"), frozenset(f"client {number}" for number in range(100)))
    assert last(history, "lobby") == ["c"]


def test_history_since_time_omits_earlier_messages(clock: Clock) -> None:
    """Messages before a given time are left out."""
    history = RoomHistory(10, 60)
    say(history, "lobby", "before")
    clock.now += 1
    say(history, "lobby", "after")
    assert [frame.text for frame in history.last("lobby", 10, (), clock.now)] == ["after"]
