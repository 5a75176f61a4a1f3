"""The frames of `stabilizer.v1.json`: how they are read, and how the small ones are written. No I/O.

A text frame is one JSON object whose member `type` says what it is. A binary frame of kind 1 is such an object without
its `data`, and the data behind it as bytes. Fields and types that are not known are ignored, so that newer peers can
say more; what is malformed is an error, so that nobody guesses.
"""

from __future__ import annotations

import re
import reprlib
import struct
from typing import Any, Final

from pydantic_core import to_json

from fastapi_ws_stabilizer.wire.deflate import InflateLimitError, deflate_stream, inflate, inflated_start
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.identifiers import MAX_NAME_CHARS, NAME_RULE, is_name
from fastapi_ws_stabilizer.wire.strict_json import MAX_DEPTH, InvalidJsonError, read_json

SUBPROTOCOL: Final = "stabilizer.v1.json"
"""What a client offers, and a server answers, to speak it."""

AUTH_PREFIX: Final = "stabilizer.auth."
"""What a subprotocol begins with that carries a credential; it is never answered."""

VERSION: Final = 1
MAX_SEQ: Final = 2**53 - 1
MAX_HELLO_BYTES: Final = 8 * 1024
MAX_RESUME_TOKEN_CHARS: Final = 512

MAX_CONTROL_BYTES: Final = 4 * 1024
"""Bytes of a frame that carries neither data nor a credential. Most take less than a hundred."""

LONG_TYPES: Final = frozenset({"msg", "reply", "auth"})
"""What may be longer."""

_OBJECT_BYTES: Final = 200
_LIST_BYTES: Final = 72
_VALUE_BYTES: Final = 48
"""What an object and a list take in memory, and what a value adds to them, beside its characters."""

MAX_STAMP_CHARS: Final = 64
"""Longest text that a ping may ask to have back."""

ACK_EVERY: Final = 32
"""Sequenced frames after which the receiver acknowledges at the latest."""

KIND_MESSAGE: Final = 1
KIND_DEFLATED: Final = 2
DEFLATE_CAP: Final = "deflate-raw"
"""What both sides have to list before one may send binary frames of kind 2."""

RETRY_CAP: Final = "retry"
"""What a client lists that sends a message again which was refused with `retry`; of others it is accepted, and lost."""

MAX_SENT_BYTES: Final = 16 * 1024 * 1024
"""Bytes of the largest frame that a client takes, compressed or not."""

DEFLATE_FROM: Final = 512
"""Bytes of a text frame from which it is worth compressing."""

_BINARY_HEAD: Final = struct.Struct(">BH")
_DEFLATED_HEAD: Final = _BINARY_HEAD.pack(KIND_DEFLATED, 0)
_DEFLATED: Final = _DEFLATED_HEAD[:1]
_MESSAGE: Final = bytes([KIND_MESSAGE])
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 80
_shortened: Final = _shorten.repr
_HEAD_BYTES: Final = 128
_numbered: Final = re.compile(r'\s*\{\s*"type"\s*:\s*"(?:msg|reply)"(?!\s*,\s*"volatile"\s*:\s*true)').match
MAX_META_BYTES: Final = 0xFFFF


class ProtocolError(Exception):
    """A frame that breaks the protocol.

    Attributes:
        code: The close code that its connection gets.
    """

    def __init__(self, what: str, code: int = 4400) -> None:
        super().__init__(what)
        self.code = code


class Message:
    """An application message, as it came.

    Attributes:
        data: What it carries: a JSON value, or bytes.
        event: What kind of message it is, if its sender has said so.
        id: What a reply refers to, if one is wanted.
        key: Its idempotency key: a message with a key that was handled before is not handled again.
        seq: Its number; `None` if it is volatile.
        room: The room that it was sent to, for information.
        size: Bytes of memory that it holds, about, where that was asked for.
    """

    __slots__ = ("data", "event", "id", "key", "room", "seq", "size")

    def __init__(
        self,
        data: Any,
        *,
        event: str | None = None,
        id: str | None = None,  # noqa: A002 (the field's name on the wire)
        key: str | None = None,
        seq: int | None = None,
        room: str | None = None,
    ) -> None:
        self.data: Any = data
        self.event: str | None = event
        self.id: str | None = id
        self.key: str | None = key
        self.seq: int | None = seq
        self.room: str | None = room
        self.size: int = 0

    def __repr__(self) -> str:
        return f"<Message event={self.event!r} id={self.id!r} seq={self.seq} data={_shortened(self.data)}>"

    @property
    def raw(self) -> str | bytes:
        """The message as a plain client would have sent it: a string and bytes as they are, all else as JSON."""
        data = self.data
        if isinstance(data, (str, bytes)):
            return data
        return to_json(data).decode("utf-8")


def parse(raw: str | bytes, max_inflated: int = 0, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Read one frame. What a binary one carries is its `data`.

    Args:
        raw: What has come in.
        max_inflated: Bytes that a compressed frame may hold; 0 if that was not agreed on.
        max_depth: Levels that it may have.

    Raises:
        ProtocolError: It is none.
    """
    if max_inflated:
        raw = inflated(raw, max_inflated)
    if isinstance(raw, bytes):
        return _parse_binary(raw)
    frame = _object(raw, max_depth)
    if not isinstance(frame.get("type"), str):
        raise ProtocolError("a frame needs a type")
    return frame


def is_numbered(raw: str | bytes) -> bool:
    """Whether a frame of a server that cannot be read has a number, as far as its beginning tells."""
    if isinstance(raw, bytes):
        if raw[:1] == _DEFLATED:
            raw = inflated_start(raw[len(_DEFLATED_HEAD) :], _HEAD_BYTES)
        else:
            raw = raw[_BINARY_HEAD.size : _BINARY_HEAD.size + _HEAD_BYTES] if raw[:1] == _MESSAGE else b""
        raw = raw.decode("utf-8", "replace")
    return _numbered(raw[:_HEAD_BYTES]) is not None


def inflated(raw: str | bytes, limit: int) -> str | bytes:
    """What a compressed frame holds; any other frame as it is.

    Raises:
        ProtocolError: It holds more than `limit` bytes, or is broken.
    """
    if not isinstance(raw, bytes) or raw[:1] != _DEFLATED:
        return raw
    if raw[: len(_DEFLATED_HEAD)] != _DEFLATED_HEAD:
        raise ProtocolError("a binary frame of kind 2 has no meta")
    try:
        return inflate(raw[len(_DEFLATED_HEAD) :], limit).decode("utf-8")
    except InflateLimitError as error:
        raise ProtocolError(f"a compressed frame holds {error}", code=1009) from None
    except ValueError:  # UnicodeDecodeError is one
        raise ProtocolError("a compressed frame is raw deflate of UTF-8, once and whole") from None


def deflated(text: str) -> bytes | None:
    """A text frame as a binary one of kind 2; `None` where that is not worth it."""
    payload = text.encode("utf-8")
    if len(payload) < DEFLATE_FROM:
        return None
    packed = _DEFLATED_HEAD + deflate_stream(payload)
    return packed if len(packed) < len(payload) else None


def is_longer(raw: str | bytes, most: int) -> bool:
    """Whether a frame takes more bytes, as UTF-8 if it is a text."""
    return len(raw) > most or (isinstance(raw, str) and len(raw.encode("utf-8", "replace")) > most)


def _parse_binary(raw: bytes) -> dict[str, Any]:
    if len(raw) < _BINARY_HEAD.size:
        raise ProtocolError("a binary frame has a head of 3 bytes")
    kind, length = _BINARY_HEAD.unpack_from(raw)
    start = _BINARY_HEAD.size + length
    if kind != KIND_MESSAGE:
        raise ProtocolError(f"binary frames of kind {kind} were not agreed on")
    if len(raw) < start:
        raise ProtocolError("a binary frame is shorter than its head says")
    frame = _object(raw[_BINARY_HEAD.size : start])
    if frame.get("type") not in ("msg", "reply"):
        raise ProtocolError("only messages and replies are binary")
    frame["data"] = raw[start:]
    return frame


def _object(text: str | bytes, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    try:
        value: Any = read_json(text, max_depth)
    except InvalidJsonError as problem:
        raise ProtocolError(f"a frame cannot be read: {problem}") from None
    if not isinstance(value, dict):
        raise ProtocolError("a frame is a JSON object")
    return value


# ── fields ──


def require_int(frame: dict[str, Any], name: str, *, least: int = 0) -> int:
    """A number that must be there.

    Raises:
        ProtocolError: It is not, or is none.
    """
    value = frame.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_SEQ:
        raise ProtocolError(f"{frame.get('type')}: {name} is a whole number from {least} to 2^53-1")
    return value


def optional_int(frame: dict[str, Any], name: str, *, least: int = 0) -> int | None:
    """A number that may be left out.

    Raises:
        ProtocolError: It is there and is none.
    """
    return None if frame.get(name) is None else require_int(frame, name, least=least)


def optional_text(frame: dict[str, Any], name: str, most: int = MAX_NAME_CHARS) -> str | None:
    """A text that may be left out.

    Raises:
        ProtocolError: It is there and is none, or is too long.
    """
    value = frame.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= most):
        raise ProtocolError(f"{frame.get('type')}: {name} is a text of at most {most} characters")
    return value


def optional_identifier(frame: dict[str, Any], name: str) -> str | None:
    """A name that may be left out: an id, an event, a room, a key.

    Raises:
        ProtocolError: It is there and is none.
    """
    value = frame.get(name)
    if value is not None and not (isinstance(value, str) and is_name(value)):
        raise ProtocolError(f"{frame.get('type')}: {name} is a text of {NAME_RULE}")
    return value


def ping_timestamp(frame: dict[str, Any]) -> int | float | str | None:
    """What a ping asks to have back: a number or a short text, for whoever is stalled is still owed some pongs.

    Raises:
        ProtocolError: It is anything else.
    """
    value = frame.get("ts")
    if value is None or value.__class__ is int or value.__class__ is float:
        return value
    if not (isinstance(value, str) and len(value) <= MAX_STAMP_CHARS):
        raise ProtocolError(f"ping: ts is a number or a text of at most {MAX_STAMP_CHARS} characters")
    return value


def estimate_parsed_size(text: str) -> int:
    """About how much memory the values take that a text is parsed to, beside that of the text."""
    return text.count("{") * _OBJECT_BYTES + text.count("[") * _LIST_BYTES + text.count(",") * _VALUE_BYTES


def message_of(frame: dict[str, Any]) -> Message:
    """The message in a `msg` frame.

    Raises:
        ProtocolError: A field is malformed.
    """
    return Message(
        frame.get("data"),
        event=optional_identifier(frame, "event"),
        id=optional_identifier(frame, "id"),
        key=optional_identifier(frame, "key"),
        seq=optional_int(frame, "seq", least=1),
        room=optional_identifier(frame, "room"),
    )


# ── writing ──


def control_frame(type_: str, **fields: Any) -> EncodedMessage:
    """A frame that is not sequenced. Fields that are `None` are left out, and infinity becomes `null`."""
    frame = {"type": type_, **{name: value for name, value in fields.items() if value is not None}}
    return EncodedMessage(to_json(frame, inf_nan_mode="null"))


def envelope(type_: str, data: Any, **fields: Any) -> str | bytes:
    """A message or a reply as it travels: text, or a binary frame of kind 1 where its data is bytes.

    Raises:
        ValueError: The data cannot be JSON, or there are too many fields for a binary frame.
    """
    head = {"type": type_, **{name: value for name, value in fields.items() if value is not None}}
    if isinstance(data, (bytes, bytearray, memoryview)):
        return binary_envelope(head, bytes(data))
    return to_json({**head, "data": data}, inf_nan_mode="null").decode("utf-8")


def binary_envelope(head: dict[str, Any], payload: bytes) -> bytes:
    """A binary frame of kind 1.

    Raises:
        ValueError: There are too many fields.
    """
    meta = to_json(head)
    if len(meta) > MAX_META_BYTES:
        raise ValueError(f"the fields of a binary message take {len(meta)} bytes, more than {MAX_META_BYTES}")
    return _BINARY_HEAD.pack(KIND_MESSAGE, len(meta)) + meta + payload
