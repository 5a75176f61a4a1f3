"""Tests of the replay buffer: its messages, their numbers, and when they are removed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.memory.budget import FRAME_OVERHEAD_BYTES, MemoryBudget
from fastapi_ws_stabilizer.sessions import replay_buffer as log_module
from fastapi_ws_stabilizer.sessions.replay_buffer import NOTHING, ReplayBuffer, ReplayLimits
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

WIDE = ReplayLimits(1000, 10**6, 60.0)


def frame(text: str = "x", at: float = 0.0) -> EncodedMessage:
    """Return a message that was created at some time."""
    made = EncodedMessage(text)
    made.created_at = at
    return made


def log_of(*texts: str, limits: ReplayLimits = WIDE) -> ReplayBuffer:
    """Return a buffer with some messages."""
    log = ReplayBuffer(limits)
    for text in texts:
        log.append(frame(text))
    return log


def texts(log: ReplayBuffer, seq: int) -> list[str | None]:
    """Return the messages after a number."""
    return [entry.text for entry in log.since(seq)]


def test_sequence_numbers_start_at_one() -> None:
    """The first message has number 1, and each following one is one higher."""
    log = ReplayBuffer(WIDE)
    assert (log.head, log.first_seq, len(log.entries)) == (0, 1, 0)
    assert [log.append(frame()) for _ in range(3)] == [1, 2, 3]
    assert (log.head, log.first_seq, len(log.entries), log.held_bytes) == (3, 1, 3, 3)


def test_since_returns_later_messages_in_order() -> None:
    """`since` returns every message after a number, the oldest first."""
    log = log_of("a", "b", "c")
    assert texts(log, 0) == ["a", "b", "c"]
    assert texts(log, 2) == ["c"]
    assert texts(log, 3) == []


def test_ack_forgets_messages_up_to_its_number() -> None:
    """An acknowledgement removes messages up to its number, and numbering continues."""
    log = log_of("a", "b", "c")
    log.forget_up_to(2)
    assert (log.first_seq, log.head, log.held_bytes, texts(log, 2)) == (3, 3, 1, ["c"])
    log.forget_up_to(1)
    assert texts(log, 2) == ["c"]
    assert [frame.text for frame in log.entries] == ["c"]
    assert log.append(frame("d")) == 4


def test_drained_buffer_has_no_queue() -> None:
    """An idle session has no queue, even if it had messages before."""
    log = log_of("a", "b")
    log.forget_up_to(2)
    assert log._entries is NOTHING
    assert (log.first_seq, log.head, log.held_bytes) == (3, 2, 0)
    assert log.append(frame()) == 3
    assert tuple(NOTHING) == ()


def test_oldest_messages_are_evicted_above_count_limit() -> None:
    """Above the limit of messages, the oldest are removed."""
    log = log_of(*"abcdef", limits=ReplayLimits(3, 10**6, 60.0))
    assert (log.first_seq, log.head, texts(log, 3)) == (4, 6, ["d", "e", "f"])


def test_oldest_messages_are_evicted_above_byte_limit() -> None:
    """Above the limit of bytes, the oldest are removed."""
    log = log_of("aaaa", "bbbb", "cccc", limits=ReplayLimits(1000, 9, 60.0))
    assert (log.first_seq, log.held_bytes, texts(log, 1)) == (2, 8, ["bbbb", "cccc"])


def test_single_message_above_byte_limit_is_retained() -> None:
    """A message above the byte limit stays until the next one, because otherwise no resume could include it."""
    log = log_of("a", "b" * 100, limits=ReplayLimits(1000, 9, 60.0))
    assert (log.first_seq, log.held_bytes) == (2, 100)
    log.append(frame("c"))
    assert (log.first_seq, log.held_bytes, texts(log, 2)) == (3, 1, ["c"])


def test_messages_expire_after_ttl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message expires after the ttl."""
    log = ReplayBuffer(ReplayLimits(1000, 10**6, 10.0))
    for at in (101.0, 102.0, 112.0):
        log.append(frame(str(at), at))
    monkeypatch.setattr(log_module, "monotonic", lambda: 112.0)
    log.forget_old()
    assert (log.first_seq, texts(log, 1)) == (2, ["102.0", "112.0"])
    monkeypatch.setattr(log_module, "monotonic", lambda: 1000.0)
    log.forget_old()
    assert (log.first_seq, log.head, log.held_bytes) == (4, 3, 0)
    assert log._entries is NOTHING


def test_clear_continues_sequence_numbers() -> None:
    """Clearing removes the messages but does not reset the numbers."""
    log = log_of("a", "b")
    log.forget_all()
    assert (len(log.entries), log.first_seq, log.head, log.held_bytes) == (0, 3, 2, 0)
    assert log.append(frame()) == 3


def test_rewind_reissues_sequence_numbers() -> None:
    """After a rewind, numbering continues at the rewound number."""
    log = log_of("a", "b", "c")
    log.rewind(2)
    assert (log.head, log.first_seq, log.held_bytes, texts(log, 0)) == (1, 1, 1, ["a"])
    assert log.append(frame("B")) == 2


def test_rewind_below_first_entry_empties_buffer() -> None:
    """A rewind below the oldest message empties the buffer, and below the first it starts again at 1."""
    log = log_of("a", "b", "c")
    log.forget_up_to(2)
    log.rewind(2)
    assert (len(log.entries), log.head, log.held_bytes) == (0, 1, 0)
    log.rewind(5)
    assert (log.head, log.first_seq) == (0, 1)


def test_entries_are_shared_between_buffers() -> None:
    """Two sessions with the same message hold the same object."""
    one, shared = ReplayBuffer(WIDE), frame("hello")
    other = ReplayBuffer(WIDE)
    one.append(shared)
    other.append(shared)
    assert one.since(0)[0] is other.since(0)[0] is shared


def test_since_excludes_messages_appended_during_replay() -> None:
    """A message that is added during a replay is not part of it, and does not break it."""
    log = log_of("a", "b")
    replay = log.since(0)
    log.append(frame("c"))
    log.forget_up_to(3)
    assert [entry.text for entry in replay] == ["a", "b"]


def keyed(text: str, key: str = "k", at: float = 0.0) -> EncodedMessage:
    """Return a message with a key."""
    made = frame(text, at)
    made.key = key
    return made


def test_replaced_message_keeps_its_number() -> None:
    """A newer message has the number and the position of the one that it replaces, and bytes are counted."""
    log = log_of("a")
    seq = log.append_keyed(keyed("old"))
    log.append(frame("b"))
    assert log.seq_of("k") == seq == 2
    log.replace(seq, keyed("newest"))
    assert (log.head, texts(log, 0), log.held_bytes) == (3, ["a", "newest", "b"], 8)


def test_message_that_may_be_sent_has_no_key() -> None:
    """After a rewind, or when all messages are dropped, no message is found by its key."""
    log = log_of()
    for forget in (log.forget_all, lambda: log.rewind(1)):
        log.append_keyed(keyed("x"))
        forget()
        assert log.seq_of("k") is None


def test_message_larger_than_replaced_one_evicts_oldest() -> None:
    """A replacement above the limit of bytes evicts the oldest messages, and a dropped message is not replaced."""
    log = log_of("aaa", limits=ReplayLimits(100, 10, 60.0))
    log.append_keyed(keyed("k"))
    log.append(frame("bb"))
    log.replace(2, keyed("kkkkkk"))
    assert (log.first_seq, texts(log, 1), log.held_bytes) == (2, ["kkkkkk", "bb"], 8)
    log.forget_up_to(2)
    log.replace(2, keyed("late"))
    assert (texts(log, 2), log.held_bytes) == (["bb"], 2)


def test_replaced_message_is_released_in_budget() -> None:
    """The memory budget counts the newest message instead of the replaced one."""
    budget = MemoryBudget(10**6)
    log = log_of(limits=ReplayLimits(100, 10**6, 60.0, budget))
    log.append_keyed(keyed("x" * 50))
    log.replace(1, keyed("y" * 20))
    assert budget.total == log.counted_bytes == 20 + FRAME_OVERHEAD_BYTES
    log.forget_all()
    assert budget.total == 0


def test_old_message_behind_replaced_one_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message older than `max_age` is dropped, also if a replaced one before it is newer."""
    monkeypatch.setattr(log_module, "monotonic", lambda: 100.0)
    log = log_of()
    log.append_keyed(keyed("old", at=1.0))
    log.append(frame("expired", at=2.0))
    log.append(frame("fresh", at=90.0))
    log.replace(1, keyed("new", at=99.0))
    log.forget_old()
    assert (log.first_seq, texts(log, 2)) == (3, ["fresh"])


@pytest.mark.parametrize("acknowledges", [True, False])
def test_keys_of_dropped_messages_are_forgotten(acknowledges: bool) -> None:
    """The number of stored keys is bounded by that of stored messages, whatever the client acknowledges."""
    log = log_of(limits=ReplayLimits(100, 10**6, 60.0))
    for number in range(1000):
        log.append_keyed(keyed("x", f"k{number}"))
        if acknowledges:
            log.forget_up_to(log.head - 2)
    assert log.unsent is not None
    assert len(log.unsent) <= 2 * len(log.entries) + log_module._MAX_FORGOTTEN + 1
    stored = range(log.first_seq, log.head + 1)
    assert [log.seq_of(f"k{seq - 1}") for seq in stored] == list(stored)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("record"), st.integers(1, 30)),
        st.tuples(st.just("forget"), st.integers(0, 60)),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS, st.integers(1, 8), st.integers(1, 100))
def test_buffer_is_gapless_tail_after_random_operations(
    steps: list[tuple[str, int]], max_messages: int, max_bytes: int
) -> None:
    """The buffer holds the newest messages without a gap, within its limits, and counts its bytes correctly."""
    log, recorded = ReplayBuffer(ReplayLimits(max_messages, max_bytes, 60.0)), []
    numbers = itertools.count(1)
    for what, value in steps:
        if what == "record":
            recorded.append(frame(f"{next(numbers):04}".ljust(value, ".")))
            assert log.append(recorded[-1]) == len(recorded)
        elif what == "forget":
            log.forget_up_to(min(value, log.head))
            assert log.first_seq > min(value, log.head)
        else:
            log.forget_all()
        held = list(log.since(log.first_seq - 1))
        assert held == recorded[log.first_seq - 1 :]
        assert log.held_bytes == sum(entry.size for entry in held)
        assert len(log.entries) <= max_messages
        assert log.held_bytes <= max_bytes or len(log.entries) == 1
