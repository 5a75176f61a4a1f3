"""Tests of messages for clients of `stabilizer.v1.json`: enveloped once, with the same bytes for all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.wire import envelope as envelope_module
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode
from fastapi_ws_stabilizer.wire.envelope import ALWAYS_FITS, copy_for_replay, sequenced_frame, to_v1
from fastapi_ws_stabilizer.wire.v1.frames import MAX_SENT_BYTES, Message, message_of, parse


class Chat(BaseModel):
    """Message of an application."""

    text: str


def read(frame: EncodedMessage) -> Message:
    """Return the message in a frame, as a client parses it."""
    return message_of(parse(frame.payload if frame.binary else frame.payload.decode()))


@pytest.mark.parametrize(
    ("message", "data"),
    [
        ("hello", "hello"),
        ('{"a":1}', '{"a":1}'),
        ("", ""),
        ("ü🦊\u2028", "ü🦊\u2028"),
        ({"type": "chat", "n": [1, None]}, {"type": "chat", "n": [1, None]}),
        ([], []),
        (None, None),
        (7, 7),
        (Chat(text="ü"), {"text": "ü"}),
        (float("nan"), None),
        (b"\x00\xff", b"\x00\xff"),
        (b"", b""),
    ],
    ids=repr,
)
def test_enveloped_payload_arrives_unchanged(message: Any, data: Any) -> None:
    """Texts arrive as texts, bytes as bytes, and other values as the JSON that a plain client gets."""
    assert read(to_v1(encode(message))).data == data


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_survives_envelope(text: str) -> None:
    """Any text is a JSON string in its envelope, even if it is JSON itself."""
    assert read(to_v1(encode(text))).data == text


@given(st.binary())
def test_any_bytes_survive_envelope(data: bytes) -> None:
    """Bytes follow the envelope."""
    frame = to_v1(encode(data))
    assert frame.binary
    assert read(frame).data == data


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=256), st.booleans(), st.booleans())
def test_envelope_contains_room_and_volatile_flag(room: str, volatile: bool, binary: bool) -> None:
    """An envelope has the room of its message and whether it is volatile; a sequenced one has no such flag."""
    frame = encode(b"x" if binary else "x", volatile=volatile)
    frame.room = room
    sent = parse(to_v1(frame).payload if binary else to_v1(frame).payload.decode())
    assert sent["room"] == room
    assert sent.get("volatile") is (True if volatile else None)
    assert "seq" not in sent


def test_minimal_envelope_contains_only_data() -> None:
    """A broadcast costs a few bytes more than for a plain client."""
    assert to_v1(encode({"a": 1})).text == '{"type":"msg","data":{"a":1}}'
    assert to_v1(encode("x")).text == '{"type":"msg","data":"x"}'


def test_envelope_is_encoded_once() -> None:
    """All clients get the same object, and an envelope is its own envelope."""
    frame = encode("x")
    enveloped = to_v1(frame)
    assert to_v1(frame) is enveloped
    assert to_v1(enveloped) is enveloped
    assert enveloped.size == len(enveloped.payload)


def test_envelope_records_creation_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The age of a stored message is counted from its envelope."""
    monkeypatch.setattr(envelope_module, "monotonic", lambda: 123.0)
    assert to_v1(encode("x")).created_at == 123.0
    assert sequenced_frame("reply", 1, re="c1").created_at == 123.0


def test_keys_of_volatile_and_numbered_messages_differ() -> None:
    """A volatile message and a numbered one have different keys, because neither can replace the other."""
    volatile, numbered = to_v1(encode("x", "price", volatile=True)), to_v1(encode("x", "price"))
    assert volatile.key == to_v1(encode("y", "price", volatile=True)).key != numbered.key
    assert numbered.key == to_v1(encode("y", "price")).key
    assert (to_v1(encode("x")).key, to_v1(encode("x")).takes_slow_path) == (None, False)
    assert volatile.takes_slow_path
    assert numbered.takes_slow_path
    assert to_v1(encode("x", volatile=True)).takes_slow_path


def test_replay_copy_has_same_content_and_new_envelope() -> None:
    """A message from a room's history is a new message with the same content and a new envelope."""
    for message in ("ü", {"a": 1}, b"\x00"):
        frame = encode(message, "key")
        frame.room = "lobby"
        copy = copy_for_replay(frame)
        assert copy is not frame
        assert (copy.payload, copy.size, copy.binary, copy.is_json, copy.room) == (
            frame.payload,
            frame.size,
            frame.binary,
            frame.is_json,
            "lobby",
        )
        assert copy.key is None
        assert to_v1(copy) is not to_v1(frame)
        assert to_v1(copy).payload == to_v1(frame).payload


def test_reply_is_enveloped_at_creation() -> None:
    """A message for one client is enveloped on creation, as text or binary."""
    reply = sequenced_frame("reply", {"ok": True}, re="c1", error=None)
    assert json.loads(reply.payload) == {"type": "reply", "re": "c1", "data": {"ok": True}}
    assert to_v1(reply) is reply
    request = sequenced_frame("msg", b"\x01", event="photo", id="s1")
    assert request.binary
    assert (read(request).data, read(request).event, read(request).id) == (b"\x01", "photo", "s1")
    assert not request.volatile


def test_unencodable_reply_raises_value_error() -> None:
    """Data that cannot be encoded raises `ValueError`."""
    with pytest.raises(ValueError, match="serialize"):
        sequenced_frame("reply", object(), re="c1")


@pytest.mark.parametrize("event", ["x" * 257, "a\nb", "\ud800", 7])
def test_request_with_invalid_event_raises(event: Any) -> None:
    """An event name that clients cannot read raises at the sender."""
    with pytest.raises(MessageEncodeError, match="an event must be a string"):
        sequenced_frame("msg", None, event=event, id="1")


@pytest.mark.parametrize("data", [10**400, "x" * MAX_SENT_BYTES, b"x" * MAX_SENT_BYTES, "\ud800", object()])
def test_reply_beyond_client_limits_raises(data: Any) -> None:
    """A reply over the limits of the clients raises at the sender."""
    with pytest.raises(MessageEncodeError):
        sequenced_frame("reply", data, re="c1")


@pytest.mark.parametrize("message", ["x" * MAX_SENT_BYTES, b"x" * MAX_SENT_BYTES, "\x00" * (MAX_SENT_BYTES // 6)])
def test_message_with_envelope_over_limit_raises(message: Any) -> None:
    """An envelope over the limit of clients raises, and one at the limit does not."""
    frame = encode(message)
    with pytest.raises(MessageEncodeError, match="send it in parts"):
        to_v1(frame)
    to_v1(encode(message[: -len(message) // 100]))
    assert encode(b"x" * ALWAYS_FITS).size == ALWAYS_FITS
