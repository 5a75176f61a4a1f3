"""Tests of the outbound messages of a client: bounded, in order, stored until the server accepts them."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.client import send_buffer as outgoing_module
from fastapi_ws_stabilizer.client.errors import (
    BufferFullError,
    ClientClosedError,
    MessageTooLargeError,
    SessionLostError,
)
from fastapi_ws_stabilizer.client.send_buffer import SEQ_BYTES, PendingMessage, SendBuffer
from fastapi_ws_stabilizer.wire.v1.frames import MAX_META_BYTES, MAX_SEQ, envelope, parse
from tests.support.own_loop import run


def buffer(
    max_messages: int = 100, max_bytes: int = 10**6, overflow: Literal["reject", "drop_oldest"] = "reject"
) -> SendBuffer:
    """Return an empty buffer."""
    return SendBuffer(max_messages, max_bytes, overflow)


def put(into: SendBuffer, *data: Any) -> list[PendingMessage]:
    """Add messages."""
    messages = [PendingMessage("msg", one, {}) for one in data]
    for message in messages:
        into.add(message)
    return messages


def sent(out: SendBuffer) -> list[tuple[int, Any]]:
    """Return all frames that are to be sent now, with their numbers."""
    messages = []
    while (message := out.pop_next()) is not None:
        frame = parse(message.frame())
        messages.append((frame["seq"], frame["data"]))
    return messages


async def test_messages_are_numbered_from_one_in_order() -> None:
    """Each message gets the next number when it is sent for the first time."""
    out = buffer()
    put(out, "a", b"b", {"c": 3})
    assert sent(out) == [(1, "a"), (2, b"b"), (3, {"c": 3})]
    put(out, "d")
    assert sent(out) == [(4, "d")]
    assert len(out) == 4


async def test_ack_resolves_messages_and_frees_room() -> None:
    """An acknowledgement completes all messages up to its number, and makes room."""
    out = buffer(max_messages=3)
    messages = put(out, "a", "b", "c")
    sent(out)
    assert out.oldest_sent is messages[0]
    out.acknowledge(2)
    assert [message.done.done() for message in messages] == [True, True, False]
    assert out.oldest_sent is messages[2]
    put(out, "d", "e")
    out.acknowledge(99)
    assert (len(out), out.oldest_sent) == (2, None)


async def test_ack_above_last_sent_number_resolves_nothing() -> None:
    """An acknowledgement above the last sent number completes nothing."""
    out = buffer()
    (message,) = put(out, "a")
    out.acknowledge(5)
    assert not message.done.done()
    assert sent(out) == [(1, "a")]


async def test_resume_resends_unacked_messages_before_new() -> None:
    """After a reconnect unacknowledged messages are sent again with the same numbers, before new ones."""
    out = buffer()
    put(out, "a", "b", "c")
    sent(out)
    put(out, "d")
    out.resume(1)
    assert sent(out) == [(2, "b"), (3, "c"), (4, "d")]
    out.resume(4)
    assert sent(out) == []


async def test_send_window_is_bounded_and_smaller_after_reconnect() -> None:
    """The number of unacknowledged messages is bounded, with a smaller bound after a reconnect, and one after 4429."""
    out = buffer(10_000)
    put(out, *range(3000))
    last, unacked = 0, []
    for _ in range(5):
        batch = sent(out)
        unacked.append(len(batch))
        last = batch[-1][0]
        out.acknowledge(last)
    assert unacked == [128, 256, 512, 512, 512]
    out.resume(last)
    assert len(sent(out)) == 32
    out.reduce_window()
    out.resume(last)
    assert len(sent(out)) == 1


async def test_resend_restarts_after_second_reconnect() -> None:
    """Each resend starts at the server's number, however far the previous resend came."""
    out = buffer()
    put(out, "a", "b", "c")
    sent(out)
    out.resume(0)
    assert parse(out.pop_next().frame())["seq"] == 1  # type: ignore[union-attr]
    out.resume(0)
    assert sent(out) == [(1, "a"), (2, "b"), (3, "c")]


async def test_message_acked_during_resend_is_not_resent() -> None:
    """A message that is acknowledged during a resend is left out."""
    out = buffer()
    put(out, "a", "b", "c")
    sent(out)
    out.resume(0)
    out.acknowledge(2)
    assert sent(out) == [(3, "c")]
    out.resume(2)
    out.acknowledge(3)
    assert sent(out) == []


async def test_server_ahead_of_client_sets_next_number() -> None:
    """A server that has accepted more than this client remembers determines the next number."""
    out = buffer()
    out.resume(7)
    put(out, "a")
    assert sent(out) == [(8, "a")]


async def test_lost_session_fails_sent_and_retains_unsent() -> None:
    """Sent messages fail, because it is unknown whether they were handled; unsent ones go to the new session."""
    out = buffer()
    lost = put(out, "a", "b")
    sent(out)
    (unsent,) = put(out, "c")
    assert out.restart_session(0, replay=False) == lost
    for message in lost:
        assert isinstance(message.done.exception(), SessionLostError)
    assert sent(out) == [(1, "c")]
    assert not unsent.done.done()
    assert len(out) == 1


async def test_replay_resends_messages_with_new_numbers() -> None:
    """With `replay` all messages go to the new session, in order, under new numbers."""
    out = buffer()
    messages = put(out, "a", "b")
    sent(out)
    messages += put(out, "c")
    assert out.restart_session(4, replay=True) == []
    assert sent(out) == [(5, "a"), (6, "b"), (7, "c")]
    out.acknowledge(7)
    assert all(message.done.done() for message in messages)


async def test_full_buffer_rejects_new_message() -> None:
    """A full buffer rejects a new message and stays as it is; sent messages count too."""
    out = buffer(max_messages=2)
    messages = put(out, "a", "b")
    sent(out)
    with pytest.raises(BufferFullError):
        put(out, "c")
    assert not any(message.done.done() for message in messages)
    out.acknowledge(1)
    put(out, "c")


async def test_drop_oldest_drops_oldest_unsent_message() -> None:
    """With `drop_oldest` the newest messages stay, and the future of the oldest fails."""
    out = buffer(max_messages=2, overflow="drop_oldest")
    first, second = put(out, "a", "b")
    put(out, "c")
    assert isinstance(first.done.exception(), BufferFullError)
    assert not second.done.done()
    assert sent(out) == [(1, "b"), (2, "c")]


async def test_sent_message_is_never_dropped() -> None:
    """A numbered message cannot be dropped; if all are sent, the new one is rejected."""
    out = buffer(max_messages=2, overflow="drop_oldest")
    messages = put(out, "a", "b")
    sent(out)
    with pytest.raises(BufferFullError):
        put(out, "c")
    assert not any(message.done.done() for message in messages)


async def test_buffer_is_bounded_by_bytes() -> None:
    """Bytes are limited as well as messages, and one message of any size fits into an empty buffer."""
    out = buffer(max_bytes=100)
    (large,) = put(out, "x" * 200)
    with pytest.raises(BufferFullError):
        put(out, "a")
    assert out.cancel(large)
    put(out, "a", "b")
    with pytest.raises(BufferFullError):
        put(out, "x" * 60)


async def test_finished_message_frees_its_bytes() -> None:
    """A finished message no longer counts, regardless of its result."""
    out = buffer(max_bytes=300)
    put(out, "x" * 100, "x" * 100)
    sent(out)
    out.acknowledge(1)
    (withdrawn,) = put(out, "x" * 100)
    assert out.cancel(withdrawn)
    put(out, "x" * 100)
    out.restart_session(0, replay=False)
    put(out, "x" * 100)
    with pytest.raises(BufferFullError):
        put(out, "x" * 100)
    assert len(out) == 2


async def test_message_over_server_limit_is_not_buffered() -> None:
    """A message that would close the connection is not queued."""
    out = buffer()
    out.max_frame = 100
    with pytest.raises(MessageTooLargeError, match=r"the message has \d+ bytes, but the server accepts 100") as caught:
        put(out, "x" * 100)
    assert caught.value.limit == 100
    assert caught.value.size > 100
    assert len(out) == 0
    with pytest.raises(MessageTooLargeError):
        put(out, "é" * 45)
    put(out, "x" * 50)


async def test_only_unsent_message_can_be_cancelled() -> None:
    """A sent message cannot be cancelled."""
    out = buffer()
    first, second = put(out, "a", "b")
    out.pop_next()
    assert not out.cancel(first)
    assert out.cancel(second)
    assert not out.cancel(second)
    assert len(out) == 1
    put(out, "c")
    assert sent(out) == [(2, "c")]


async def test_close_fails_every_buffered_message() -> None:
    """On close every future fails, and the buffer is empty."""
    out = buffer()
    messages = put(out, "a", "b", "c")
    out.pop_next()
    out.resume(0)
    out.close(ClientClosedError(1000))
    assert all(isinstance(message.done.exception(), ClientClosedError) for message in messages)
    assert (len(out), out.pop_next(), out.oldest_sent) == (0, None, None)


async def test_cancelled_future_is_not_resolved() -> None:
    """A cancelled future is left alone."""
    out = buffer()
    first, second = put(out, "a", "b")
    first.done.cancel()
    second.done.cancel()
    sent(out)
    out.acknowledge(1)
    out.close(ClientClosedError(1000))


async def test_unencodable_message_raises_in_caller() -> None:
    """The caller gets the encoding error immediately, and not a task later."""
    with pytest.raises(ValueError, match="serialize"):
        PendingMessage("msg", object(), {})


@pytest.mark.parametrize("data", [{"n": 1}, "\ud83d\ude00 ü", None, b"\x00\xff", bytearray(b"ab"), b""], ids=repr)
@pytest.mark.parametrize("fields", [{}, {"event": "chat", "id": None}, {"re": "s1", "error": {"code": "no"}}], ids=str)
async def test_numbered_frame_equals_frame_encoded_with_number(data: Any, fields: dict[str, Any]) -> None:
    """The frame equals one that is encoded with its number, for each number, and is not larger than its size."""
    data = data.encode("utf-16", "surrogatepass").decode("utf-16") if isinstance(data, str) else data
    message = PendingMessage("msg", data, fields)
    for message.seq in (1, 12, MAX_SEQ):
        frame = message.frame()
        assert frame == envelope("msg", data, seq=message.seq, **fields)
        size = len(frame if isinstance(frame, bytes) else frame.encode("utf-8"))
        assert size <= message.size + SEQ_BYTES
    assert size == message.size + SEQ_BYTES


async def test_message_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is encoded when it is queued; later changes of the object and resends do not matter."""
    encoded: list[Any] = []

    def counted(type_: str, data: Any, **fields: Any) -> str | bytes:
        encoded.append(data)
        return envelope(type_, data, **fields)

    monkeypatch.setattr(outgoing_module, "envelope", counted)
    out, data = buffer(), {"n": 1}
    put(out, data)
    data["n"] = 2
    for _ in range(3):
        assert sent(out) == [(1, {"n": 1})]
        out.resume(0)
    assert len(encoded) == 1


async def test_mutated_buffer_does_not_change_message() -> None:
    """Changing a bytearray after it was queued does not change the message."""
    data = bytearray(b"first")
    out = buffer()
    put(out, data)
    data[:] = b"other"
    assert sent(out) == [(1, b"first")]


async def test_binary_fields_over_limit_raise_before_numbering() -> None:
    """The fields of a binary message are checked before it gets a number."""
    most = MAX_META_BYTES - len('{"type":"msg","note":""}')
    with pytest.raises(ValueError, match="fields of a binary message"):
        PendingMessage("msg", b"", {"note": "x" * most})
    PendingMessage("msg", b"", {"note": "x" * (most - SEQ_BYTES)})


@pytest.mark.parametrize("replay", [False, True])
async def test_answers_to_lost_session_are_dropped(replay: bool) -> None:
    """Answers to requests of a lost session are dropped, sent or not, and their bytes no longer count."""
    out = buffer(max_bytes=300)
    old = PendingMessage("reply", "x" * 100, {"re": "s1"})
    out.add(old)
    put(out, "a")
    sent(out)
    fresh = PendingMessage("reply", 2, {"re": "s2"})
    out.add(fresh)
    put(out, "b")
    failed = out.restart_session(0, replay=replay)
    assert sent(out) == ([(1, "a"), (2, "b")] if replay else [(1, "b")])
    assert {old, fresh} <= set(failed)
    assert all(isinstance(reply.done.exception(), SessionLostError) for reply in (old, fresh))
    put(out, "x" * 150)


STEPS = st.lists(
    st.one_of(
        st.just(("put", 0)),
        st.just(("send", 0)),
        st.tuples(st.just("ack"), st.integers(0, 3)),
        st.just(("cut", 0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_random_breaks_deliver_every_message_once_in_order(steps: list[tuple[str, int]]) -> None:
    """With any disconnects, a server that checks the numbers has every message once and in order."""

    async def play() -> None:
        out, took, count = buffer(10**6), [], 0

        def send() -> bool:
            message = out.pop_next()
            if message is not None:
                frame = parse(message.frame())
                assert frame["seq"] <= len(took) + 1, "a number is missing"
                if frame["seq"] == len(took) + 1:
                    took.append(frame["data"])
            return message is not None

        for what, value in steps:
            if what == "put":
                put(out, count)
                count += 1
            elif what == "send":
                send()
            elif what == "ack":
                out.acknowledge(max(0, len(took) - value))
            else:
                out.resume(len(took))
        while send():
            pass
        assert took == list(range(count))

    run(play())


@pytest.mark.parametrize("field", ["event", "key"])
@pytest.mark.parametrize("name", ["x" * 257, "a\nb"])
async def test_invalid_event_name_raises_in_sender(field: str, name: str) -> None:
    """An invalid event name raises at the sender, for text and bytes, because it would end the session."""
    for data in ("text", b"bytes"):
        with pytest.raises(ValueError, match=f"{field} must have at most 256 characters"):
            PendingMessage("msg", data, {field: name})


async def test_too_deep_data_raises_in_sender() -> None:
    """Data that is nested too deep raises at the sender."""
    deep: list[Any] = []
    for _ in range(64):
        deep = [deep]
    with pytest.raises(ValueError, match="nested deeper"):
        PendingMessage("msg", deep, {})


async def test_accepted_messages_of_lost_session_precede_unaccepted() -> None:
    """Accepted messages that are sent again come first, count as buffered, and get new numbers."""
    out = buffer()
    first, second, third = put(out, "a", "b", "c")
    sent(out)
    out.acknowledge(2)
    size = out._bytes
    first.renew()
    second.renew()
    out.restart_session(0, replay=True, again=[first, second])
    put(out, "d")
    assert sent(out) == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]
    assert out._bytes == size + 2 * first.size + third.size
    assert not first.is_accepted
    out.acknowledge(4)
    assert (first.is_accepted, out._bytes) == (True, 0)
