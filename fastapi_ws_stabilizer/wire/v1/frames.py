"""Frames of `stabilizer.v1.json`: parsing, encoding of the small ones, and delayed acknowledgements. No I/O.

A text frame is one JSON object, and its member `type` names the kind of frame. A binary frame of kind 1 has such an
object without `data`, followed by the data as bytes. Unknown fields and types are ignored, so that newer peers can add
some. Malformed fields are errors.
"""

from __future__ import annotations

import asyncio
import re
import reprlib
import struct
from collections.abc import Callable
from typing import Any, Final

from pydantic_core import to_json

from fastapi_ws_stabilizer.errors import RequestError
from fastapi_ws_stabilizer.wire.deflate import InflateLimitError, deflate_stream, inflate, inflated_start
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.identifiers import MAX_NAME_CHARS, NAME_RULE, is_name
from fastapi_ws_stabilizer.wire.strict_json import MAX_DEPTH, InvalidJsonError, read_json

SUBPROTOCOL: Final = "stabilizer.v1.json"
"""Subprotocol that a client offers, and a server answers, to use this protocol."""

AUTH_PREFIX: Final = "stabilizer.auth."
"""Prefix of a subprotocol that carries a credential. The server never answers with it."""

VERSION: Final = 1
MAX_SEQ: Final = 2**53 - 1
MAX_HELLO_BYTES: Final = 8 * 1024
MAX_RESUME_TOKEN_CHARS: Final = 512

MAX_CONTROL_BYTES: Final = 4 * 1024
"""Maximum size of a frame without data or a credential, in bytes. Most have fewer than 100."""

LONG_TYPES: Final = frozenset({"msg", "reply", "auth"})
"""Frame types that may be larger."""

_OBJECT_BYTES: Final = 200
_LIST_BYTES: Final = 72
_VALUE_BYTES: Final = 48
"""Estimated memory of an object, of a list, and of a value in one of them, in bytes, without its characters."""

MAX_STAMP_CHARS: Final = 64
"""Maximum length of the text in the `ts` of a ping, in characters. The pong repeats that text."""

ACK_EVERY: Final = 32
"""Maximum number of sequenced frames before the receiver acknowledges."""

KIND_MESSAGE: Final = 1
KIND_DEFLATED: Final = 2
DEFLATE_CAP: Final = "deflate-raw"
"""Capability that both sides list before either may send binary frames of kind 2."""

RETRY_CAP: Final = "retry"
"""Capability of a client that sends a message again if the server rejects it with `retry`. For other clients the server
acknowledges the rejected message, so it is lost."""

MAX_SENT_BYTES: Final = 16 * 1024 * 1024
"""Maximum size of a frame that a client accepts, in bytes, compressed or not."""

DEFLATE_FROM: Final = 512
"""Minimum size of a text frame that is compressed, in bytes."""

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
    """A frame violates the protocol.

    Attributes:
        code: Close code for the connection.
    """

    def __init__(self, what: str, code: int = 4400) -> None:
        super().__init__(what)
        self.code = code


class Message:
    """Application message as it was received.

    Attributes:
        data: The payload: a JSON value, or bytes.
        event: The event, if the sender has set one.
        id: The request id that a reply refers to, if the sender expects a reply.
        key: The idempotency key: a message with a key that was handled before is not handled again.
        seq: The sequence number; `None` for a volatile message.
        room: The room that it was sent to, for information.
        size: Estimated memory in bytes, if the size was requested.
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
        """The message as a plain client sends it: strings and bytes unchanged, other data as JSON."""
        data = self.data
        if isinstance(data, (str, bytes)):
            return data
        return to_json(data).decode("utf-8")


def parse(raw: str | bytes, max_inflated: int = 0, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Parse one frame. The payload of a binary frame becomes its `data`.

    Args:
        raw: The received frame.
        max_inflated: Maximum size of an inflated frame, in bytes; 0 if compressed frames were not negotiated.
        max_depth: Maximum nesting depth.

    Raises:
        ProtocolError: The frame is invalid.
    """
    if max_inflated:
        raw = inflated(raw, max_inflated)
    if isinstance(raw, bytes):
        return _parse_binary(raw)
    frame = _object(raw, max_depth)
    if not isinstance(frame.get("type"), str):
        raise ProtocolError("a frame must have a type")
    return frame


def is_numbered(raw: str | bytes) -> bool:
    """Guess from its first bytes whether an unparsable server frame has a sequence number."""
    if isinstance(raw, bytes):
        if raw[:1] == _DEFLATED:
            raw = inflated_start(raw[len(_DEFLATED_HEAD) :], _HEAD_BYTES)
        else:
            raw = raw[_BINARY_HEAD.size : _BINARY_HEAD.size + _HEAD_BYTES] if raw[:1] == _MESSAGE else b""
        raw = raw.decode("utf-8", "replace")
    return _numbered(raw[:_HEAD_BYTES]) is not None


def inflated(raw: str | bytes, limit: int) -> str | bytes:
    """Return the content of a compressed frame, and any other frame unchanged.

    Raises:
        ProtocolError: The content has more than `limit` bytes, or is invalid.
    """
    if not isinstance(raw, bytes) or raw[:1] != _DEFLATED:
        return raw
    if raw[: len(_DEFLATED_HEAD)] != _DEFLATED_HEAD:
        raise ProtocolError("a binary frame of kind 2 must have no meta")
    try:
        return inflate(raw[len(_DEFLATED_HEAD) :], limit).decode("utf-8")
    except InflateLimitError as error:
        raise ProtocolError(f"a compressed frame holds {error}", code=1009) from None
    except ValueError:  # includes UnicodeDecodeError
        raise ProtocolError("a compressed frame must be one complete raw deflate stream of UTF-8") from None


def deflated(text: str) -> bytes | None:
    """Return a text frame as a binary frame of kind 2; `None` if that is not smaller."""
    payload = text.encode("utf-8")
    if len(payload) < DEFLATE_FROM:
        return None
    packed = _DEFLATED_HEAD + deflate_stream(payload)
    return packed if len(packed) < len(payload) else None


def is_longer(raw: str | bytes, max_bytes: int) -> bool:
    """Return whether a frame has more than `max_bytes` bytes. Text counts as UTF-8."""
    return len(raw) > max_bytes or (isinstance(raw, str) and len(raw.encode("utf-8", "replace")) > max_bytes)


def _parse_binary(raw: bytes) -> dict[str, Any]:
    if len(raw) < _BINARY_HEAD.size:
        raise ProtocolError("a binary frame must have a head of 3 bytes")
    kind, length = _BINARY_HEAD.unpack_from(raw)
    start = _BINARY_HEAD.size + length
    if kind != KIND_MESSAGE:
        raise ProtocolError(f"binary frames of kind {kind} were not negotiated")
    if len(raw) < start:
        raise ProtocolError("a binary frame is shorter than the length in its head")
    frame = _object(raw[_BINARY_HEAD.size : start])
    if frame.get("type") not in ("msg", "reply"):
        raise ProtocolError("a binary frame must be a message or a reply")
    frame["data"] = raw[start:]
    return frame


def _object(text: str | bytes, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    try:
        value: Any = read_json(text, max_depth)
    except InvalidJsonError as problem:
        raise ProtocolError(f"a frame cannot be read: {problem}") from None
    if not isinstance(value, dict):
        raise ProtocolError("a frame must be a JSON object")
    return value


# ── fields ──


def require_int(frame: dict[str, Any], name: str, *, least: int = 0) -> int:
    """Return a required integer field.

    Raises:
        ProtocolError: The field is missing or invalid.
    """
    value = frame.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_SEQ:
        raise ProtocolError(f"{frame.get('type')}: {name} must be an integer from {least} to 2^53-1")
    return value


def optional_int(frame: dict[str, Any], name: str, *, least: int = 0) -> int | None:
    """Return an optional integer field; `None` if it is missing.

    Raises:
        ProtocolError: The field is invalid.
    """
    return None if frame.get(name) is None else require_int(frame, name, least=least)


def optional_text(frame: dict[str, Any], name: str, max_chars: int = MAX_NAME_CHARS) -> str | None:
    """Return an optional text field; `None` if it is missing.

    Raises:
        ProtocolError: The field is not a string, or is too long.
    """
    value = frame.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= max_chars):
        raise ProtocolError(f"{frame.get('type')}: {name} must be a string of at most {max_chars} characters")
    return value


def optional_identifier(frame: dict[str, Any], name: str) -> str | None:
    """Return an optional name (id, event, room or key); `None` if it is missing.

    Raises:
        ProtocolError: The field is not a valid name.
    """
    value = frame.get(name)
    if value is not None and not (isinstance(value, str) and is_name(value)):
        raise ProtocolError(f"{frame.get('type')}: {name} must be a string of {NAME_RULE}")
    return value


def ping_timestamp(frame: dict[str, Any]) -> int | float | str | None:
    """Return the `ts` of a ping, which the pong repeats.

    It is a number or a text. Its length is limited, because pongs queue up on a stalled connection.

    Raises:
        ProtocolError: The field is invalid.
    """
    value = frame.get("ts")
    if value is None or value.__class__ is int or value.__class__ is float:
        return value
    if not (isinstance(value, str) and len(value) <= MAX_STAMP_CHARS):
        raise ProtocolError(f"ping: ts must be a number or a string of at most {MAX_STAMP_CHARS} characters")
    return value


def estimate_parsed_size(text: str) -> int:
    """Return the estimated memory of the values in a JSON text, in bytes, without the text."""
    return text.count("{") * _OBJECT_BYTES + text.count("[") * _LIST_BYTES + text.count(",") * _VALUE_BYTES


def message_of(frame: dict[str, Any]) -> Message:
    """Return the message in a `msg` frame.

    Raises:
        ProtocolError: A field is invalid.
    """
    return Message(
        frame.get("data"),
        event=optional_identifier(frame, "event"),
        id=optional_identifier(frame, "id"),
        key=optional_identifier(frame, "key"),
        seq=optional_int(frame, "seq", least=1),
        room=optional_identifier(frame, "room"),
    )


def request_error(error: Any) -> RequestError:
    """Return the error of an error reply. The peer wrote its fields, so they are truncated."""
    fields = error if isinstance(error, dict) else {}
    return RequestError(str(fields.get("code", "error"))[:64], str(fields.get("message", ""))[:1024])


# ── writing ──


def to_milliseconds(seconds: float) -> int:
    """Convert seconds to the milliseconds that frames carry, at least 1."""
    return max(1, round(seconds * 1000))


def control_frame(type_: str, **fields: Any) -> EncodedMessage:
    """Return an unsequenced frame. Fields that are `None` are omitted, and infinity becomes `null`."""
    frame = {"type": type_, **{name: value for name, value in fields.items() if value is not None}}
    return EncodedMessage(to_json(frame, inf_nan_mode="null"))


def envelope(type_: str, data: Any, **fields: Any) -> str | bytes:
    """Encode a message or a reply: as text, or as a binary frame of kind 1 if the data is bytes.

    Raises:
        ValueError: The data cannot be encoded as JSON, or the fields are too large for a binary frame.
    """
    head = {"type": type_, **{name: value for name, value in fields.items() if value is not None}}
    if isinstance(data, (bytes, bytearray, memoryview)):
        return binary_envelope(head, bytes(data))
    return to_json({**head, "data": data}, inf_nan_mode="null").decode("utf-8")


def binary_envelope(head: dict[str, Any], payload: bytes) -> bytes:
    """Return a binary frame of kind 1.

    Raises:
        ValueError: The fields are too large.
    """
    meta = to_json(head)
    if len(meta) > MAX_META_BYTES:
        raise ValueError(f"the fields of a binary message have {len(meta)} bytes, more than {MAX_META_BYTES}")
    return _BINARY_HEAD.pack(KIND_MESSAGE, len(meta)) + meta + payload


# ── acknowledging ──


class DelayedAcks:
    """Count of received messages without an acknowledgement, and the timer of that acknowledgement.

    It refers to its owner only while the timer runs. So an owner that calls `reset` at its end is freed by reference
    counting.

    Args:
        delay: Maximum seconds from a message to its acknowledgement.
    """

    __slots__ = ("_count", "_delay", "_timer")

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def schedule(self, send: Callable[[], object]) -> None:
        """Count a received message, and send its acknowledgement now or later.

        Args:
            send: Function that acknowledges all received messages and calls `reset`.
        """
        self._count += 1
        if self._count >= ACK_EVERY:
            send()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._delay, send)

    def reset(self) -> None:
        """Stop the timer, because a frame acknowledges the messages or the connection ends."""
        self._count = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
