"""Tests of encoding: once for all recipients."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, field_serializer

from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.wire.encoded import asgi_close, encode, encode_json


class Chat(BaseModel):
    """Message of an application."""

    text: str
    at: datetime | None = None
    score: float = 0.0


class Broken(BaseModel):
    """Model that cannot be serialised."""

    text: str = ""

    @field_serializer("text")
    def _fail(self, _: str) -> str:
        raise TypeError("serializer failed")


class Colour(enum.Enum):
    """Enum of an application."""

    RED = "red"


@dataclasses.dataclass
class Point:
    """Dataclass of an application."""

    x: int


class Opaque:
    """Object that JSON cannot represent."""


def endless() -> dict[str, Any]:
    """Return a dict that contains itself."""
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def deep() -> list[Any]:
    """Return a list nested deeper than any encoder allows."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


def failing() -> Iterator[int]:
    """Yield a value, then fail."""
    yield 1
    raise RuntimeError("source ran dry")


@pytest.mark.parametrize("text", ["", "hello", '{"type":"ping"}', "grün 🌱"])
def test_str_is_unchanged_text_frame(text: str) -> None:
    """Text is sent unchanged, and its size is that of its UTF-8."""
    frame = encode(text)
    assert (frame.text, frame.data, frame.size) == (text, None, len(text.encode()))
    assert frame.message() == {"type": "websocket.send", "text": text}


@pytest.mark.parametrize("message", ["", b""])
def test_empty_message_is_true(message: str | bytes) -> None:
    """uvicorn 0.35 to 0.41 ignores text and bytes that are false."""
    sent = encode(message).message()
    assert sent.get("text") or sent.get("bytes")
    assert encode(message).framed() == (b"\x81\x00" if message == "" else b"\x82\x00")


@pytest.mark.parametrize("data", [b"", b"\x00\xff", bytearray(b"ab"), memoryview(b"ab")])
def test_bytes_are_binary_frame(data: bytes) -> None:
    """Every kind of bytes is sent as a binary frame."""
    frame = encode(data)
    assert (frame.text, frame.data, frame.size) == (None, bytes(data), len(data))
    assert frame.message() == {"type": "websocket.send", "bytes": bytes(data)}


def test_mutated_buffer_does_not_change_frame() -> None:
    """A queued frame does not change with its buffer."""
    data = bytearray(b"before")
    frame = encode(data)
    data[:] = b"after!"
    assert frame.data == b"before"


@pytest.mark.parametrize(
    ("message", "value"),
    [
        ({"a": [1, None, True]}, {"a": [1, None, True]}),
        ([1, "ä"], [1, "ä"]),
        ((1, 2), [1, 2]),
        (7, 7),
        (None, None),
        (Chat(text="hi"), {"text": "hi", "at": None, "score": 0.0}),
        ({"chat": Chat(text="hi")}, {"chat": {"text": "hi", "at": None, "score": 0.0}}),
        ({"at": datetime(2026, 1, 2, tzinfo=timezone.utc)}, {"at": "2026-01-02T00:00:00Z"}),
        ({"id": UUID(int=1)}, {"id": "00000000-0000-0000-0000-000000000001"}),
        ({"n": Decimal("1.5")}, {"n": "1.5"}),
        ({"c": Colour.RED}, {"c": "red"}),
        (Point(3), {"x": 3}),
        ({"set": {1}}, {"set": [1]}),
    ],
    ids=repr,
)
def test_other_payloads_are_json_text_frame(message: Any, value: Any) -> None:
    """Models, containers and common values are JSON in a text frame."""
    frame = encode(message)
    assert frame.text is not None
    assert json.loads(frame.text) == value
    assert frame.size == len(frame.text.encode())


class OddNumbers(BaseModel, ser_json_inf_nan="constants"):
    number: float


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"x": [model]}])
def test_nan_and_infinity_of_model_raise(number: float, wrap: Any) -> None:
    """A NaN or an infinity that a pydantic model writes as a constant cannot be sent, however short the message is."""
    with pytest.raises(MessageEncodeError, match="cannot be sent as JSON"):
        encode(wrap(OddNumbers(number=number)))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [lambda n: {"n": n}, lambda n: [n], lambda n: n, lambda n: Chat(text="", score=n)])
def test_nan_and_infinity_become_null(number: float, wrap: Any) -> None:
    """NaN and the infinities become `null`, so that every browser can parse the frame."""
    text = encode(wrap(number)).text
    assert text is not None
    assert "null" in text
    assert "NaN" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize(
    "message",
    [
        {"x": Opaque()},
        Opaque(),
        [Opaque()],
        {"x": b"\xff"},
        "half \ud800 a pair",
        {"x": "half \ud800 a pair"},
        {"half \ud800": 1},
        Chat(text="half \ud800 a pair"),
        Broken(),
        endless(),
        lambda: None,
    ],
    ids=lambda message: type(message).__name__,
)
def test_unencodable_payload_raises_message_encode_error(message: Any) -> None:
    """A payload that cannot be encoded raises `MessageEncodeError`, a `ValueError`, and nothing else."""
    with pytest.raises(MessageEncodeError, match="cannot be sent"):
        encode(message)


def test_deep_payload_raises_message_encode_error() -> None:
    """A payload of any depth is encoded or raises `MessageEncodeError`."""
    with pytest.raises(MessageEncodeError, match="a list cannot be sent as JSON"):
        encode(deep())


def test_payload_with_failing_code_raises_message_encode_error() -> None:
    """A payload with an iterator that raises cannot be encoded."""
    with pytest.raises(MessageEncodeError, match="source ran dry"):
        encode({"x": failing()})


def test_message_encode_error_has_cause() -> None:
    """The encoder's error is the cause, for the log."""
    with pytest.raises(MessageEncodeError) as caught:
        encode(Opaque())
    assert caught.value.__cause__ is not None
    assert "Opaque" in str(caught.value)


def test_str_as_json_is_quoted() -> None:
    """`encode_json` makes a JSON string of a `str`."""
    assert encode_json("hi").text == '"hi"'


def test_each_asgi_message_is_separate_dict() -> None:
    """A middleware that changes its message does not change the message of others."""
    frame = encode("hi")
    frame.message()["text"] = "changed"
    assert frame.message()["text"] == "hi"


def test_asgi_close_has_code_and_reason() -> None:
    """A close frame is the ASGI message with code and reason."""
    assert asgi_close(4408, "bye") == {"type": "websocket.close", "code": 4408, "reason": "bye"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_JSON)
def test_json_survives_round_trip(value: Any) -> None:
    """Encoded JSON has the same value when parsed, and its size is that of its bytes."""
    frame = encode_json(value)
    assert frame.text is not None
    assert json.loads(frame.text) == value
    assert frame.size == len(frame.text.encode("utf-8"))
