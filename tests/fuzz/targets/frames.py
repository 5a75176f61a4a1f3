"""One frame or message of any kind: read, written, and read again."""

from __future__ import annotations

import zlib
from typing import Any, Final

from fastapi_ws_stabilizer.close_codes import check_close_code
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.wire.deflate import TAIL, InflateLimitError, deflate_message, deflate_stream, inflate
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode, encode_json
from fastapi_ws_stabilizer.wire.envelope import copy_for_replay, to_deflated, to_v1
from fastapi_ws_stabilizer.wire.text_ping import MAX_CONTROL_CHARS, TextPing, parse_text_ping
from fastapi_ws_stabilizer.wire.v1.frames import (
    MAX_HELLO_BYTES,
    MAX_NAME_CHARS,
    MAX_RESUME_TOKEN_CHARS,
    MAX_SEQ,
    Message,
    ProtocolError,
    control_frame,
    deflated,
    envelope,
    message_of,
    optional_int,
    optional_text,
    parse,
    require_int,
)
from fastapi_ws_stabilizer.wire.v1.hello import parse_hello
from tests.fuzz.choices import text_of
from tests.fuzz.strict_json import finite, strict_json

LIMIT: Final = 4096
"""Maximum bytes of an inflated frame."""

CODES: Final = {1009, 4400, 4406}
"""All close codes for an invalid frame."""

_FIELDS: Final = ("v", "seq", "ts", "n", "ack", "re", "token", "event", "data", "in", "type", "room")


def frames(data: bytes) -> None:
    """Use bytes for a text frame, and for a binary one."""
    text = text_of(data)
    frame = read_frame(text)
    if frame is not None:
        reads_fields(frame)
        _agrees(text, frame)
    reads_hello(text)
    reads_control(text)
    reads_frame_of_bytes(data)
    survives_compression(data)
    survives_sending(text, data)


def read_frame(raw: str | bytes, max_inflated: int = 0) -> dict[str, Any] | None:
    """Return a well-formed frame; `None` if it was rejected with a valid close code."""
    try:
        frame = parse(raw, max_inflated)
    except ProtocolError as error:
        assert error.code in CODES
        assert check_close_code(error.code)
        assert len(str(error)) < 1024, "the error text is too long"
        return None
    assert isinstance(frame, dict)
    assert isinstance(frame["type"], str)
    return frame


def _agrees(text: str, frame: dict[str, Any]) -> None:
    assert finite(strict_json(text)) == finite(frame), "another parser has another result"


def reads_fields(frame: dict[str, Any]) -> Message | None:
    """Read the fields of a frame as every kind of frame does: each has its type, or is rejected."""
    for name in _FIELDS:
        try:
            assert 0 <= require_int(frame, name) <= MAX_SEQ
        except ProtocolError as error:
            assert error.code == 4400
        try:
            count, word = optional_int(frame, name, least=1), optional_text(frame, name)
        except ProtocolError as error:
            assert error.code == 4400
        else:
            assert count is None or 1 <= count <= MAX_SEQ
            assert word is None or len(word) <= MAX_NAME_CHARS
    try:
        message = message_of(frame)
    except ProtocolError as error:
        assert error.code == 4400
        return None
    _is_written_as_it_was_read(message)
    return message


def _is_written_as_it_was_read(message: Message) -> None:
    fields = {name: getattr(message, name) for name in ("event", "id", "key", "room", "seq")}
    said = parse(envelope("msg", message.data, **fields))
    came = message_of(said)
    assert {name: getattr(came, name) for name in fields} == fields
    assert came.data == finite(message.data)
    raw = message.raw
    if isinstance(raw, str) and not isinstance(message.data, str):
        assert strict_json(raw) == finite(message.data)
    if not isinstance(message.data, bytes):  # values that the client sent are sent back to it
        strict_json(control_frame("pong", ts=message.data).payload)


def reads_hello(raw: str | bytes) -> None:
    """Parse an object as a hello."""
    try:
        hello = parse_hello(raw)
    except ProtocolError as error:
        assert error.code in (4400, 4406)
        return
    assert isinstance(raw, str)
    assert len(raw.encode()) <= MAX_HELLO_BYTES
    assert 0 <= hello.attempt <= MAX_SEQ
    assert 0 <= hello.seq <= MAX_SEQ
    assert hello.token is None or len(hello.token) <= MAX_RESUME_TOKEN_CHARS
    assert hello.instance is None or len(hello.instance) <= MAX_NAME_CHARS
    assert hello.auth is None or isinstance(hello.auth, str)
    assert isinstance(hello.deflates, bool)
    assert repr(hello.token) not in repr(hello) or hello.token is None


def reads_control(text: str) -> None:
    """Parse a text as a ping or a pong of the plain mode."""
    frame = parse_text_ping(text)
    if frame is None:
        return
    assert len(text) <= MAX_CONTROL_CHARS
    assert text in ("ping", "pong") or strict_json(text).keys() <= {"type", "ts"}, "it was application data"
    if not isinstance(frame, TextPing):
        assert text == "pong" or strict_json(text)["type"] == "pong"
    elif text == "ping":
        assert frame.answer.text == "pong"
    else:
        said = {**strict_json(text), "type": "pong"}
        assert strict_json(frame.answer.payload) == finite(said)
        assert frame.answer.size <= 4 * MAX_CONTROL_CHARS


def reads_frame_of_bytes(data: bytes) -> None:
    """Parse bytes as a binary frame, with compression negotiated and without."""
    for limit in (0, LIMIT):
        frame = read_frame(data, limit)
        if frame is None:
            continue
        message = reads_fields(frame)
        if isinstance(frame.get("data"), bytes):
            assert data.endswith(frame["data"])
            if message is not None:
                assert message.raw == frame["data"]
    try:
        assert len(inflate(data, LIMIT)) <= LIMIT
    except ValueError as error:
        assert len(str(error)) < 1024


def survives_compression(data: bytes) -> None:
    """Compress bytes with each compressor, inflate them again, and check the limit."""
    packed = deflate_stream(data)
    assert inflate(packed, len(data)) == data
    if data:
        _is_not_inflated(packed, len(data) - 1, InflateLimitError)
    _is_not_inflated(packed[:-1], LIMIT, ValueError)
    _is_not_inflated(packed + b"\0", LIMIT, ValueError)
    for bits in (9, 15):
        raw = zlib.decompressobj(wbits=-bits).decompress(deflate_message(data, bits) + TAIL)
        assert raw == data


def _is_not_inflated(packed: bytes, limit: int, expected: type[ValueError]) -> None:
    try:
        inflate(packed, limit)
    except expected:
        return
    raise AssertionError("truncated, trailing or excessive data was inflated")


def survives_sending(text: str, data: bytes) -> None:
    """Send a text, bytes and JSON as a plain client and as a v1 client gets them."""
    binary = to_v1(encode(data))
    assert parse(binary.payload)["data"] == data
    assert encode(data).data == data
    try:
        plain, json = encode(text), encode_json({"text": text})
    except MessageEncodeError:
        assert any("\ud800" <= character <= "\udfff" for character in text)
        return
    assert plain.text == text
    assert plain.size == len(plain.payload) == len(text.encode())
    assert parse(_text(to_v1(plain)))["data"] == text
    json.room = text[:MAX_NAME_CHARS]
    frame = parse(_text(to_v1(json)))
    assert (frame["data"], frame["room"]) == ({"text": text}, json.room)
    assert parse(_text(to_v1(copy_for_replay(json)))) == frame
    small = to_deflated(to_v1(json))
    assert parse(small.payload if small.binary else _text(small), 2**20) == frame
    if (packed := deflated(_text(to_v1(json)))) is not None:
        assert len(packed) < to_v1(json).size


def _text(frame: EncodedMessage) -> str:
    assert frame.text is not None
    return frame.text
