"""A message, encoded once for all who get it."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel
from pydantic_core import to_json

from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.wire.deflate import deflate_message
from fastapi_ws_stabilizer.wire.rfc6455 import BINARY, TEXT, frame_bytes
from fastapi_ws_stabilizer.wire.strict_json import check_sent


class EncodedMessage:
    """One encoded message: text or bytes, and its size on the wire before compression.

    A broadcast makes one and hands it to every outbox. What a kind of client needs of it is made when the first such
    client gets it, and kept for the others: the string for a plain ASGI server, the framed bytes, and the compressed
    ones for each size of window.

    Attributes:
        binary: Whether it travels in a binary frame.
        size: Bytes of its payload.
        key: What a newer message must have in common with this one to take its place in an outbox.
        is_json: Whether its text is a JSON value, and not a text of the application's.
        volatile: Whether it is worth nothing later: it is not kept for a client that is away.
        room: The one room that it is sent to; `None` if it is sent to more, or to no room.
        enveloped: The same message as clients of `stabilizer.v1.json` get it, once it was made.
        is_envelope: Whether it is such a frame itself.
        deflated: The same frame as a compressed one of the v1 protocol; `None` until it was made, and `False` where
            that is not worth it.
        at: When it was made, on the monotonic clock; only of frames that are kept.
        refcount: How many outboxes and logs hold it for longer than a turn of the event loop.
    """

    __slots__ = (
        "_compressed",
        "_framed",
        "_payload",
        "_text",
        "binary",
        "created_at",
        "deflated",
        "enveloped",
        "is_envelope",
        "is_json",
        "key",
        "refcount",
        "room",
        "size",
        "volatile",
    )

    def __init__(self, payload: str | bytes, *, binary: bool = False, size: int | None = None, key: Any = None) -> None:
        self._text: str | None = None
        self._payload: bytes | None = None
        if isinstance(payload, str):
            self._text = payload
        else:
            self._payload = payload
        self.binary = binary
        self.size = len(payload) if size is None else size
        self.key = key
        self.is_json = False
        self.volatile = False
        self.room: str | None = None
        self.enveloped: EncodedMessage | None = None
        self.is_envelope = False
        self.deflated: EncodedMessage | Literal[False] | None = None
        self.created_at = 0.0
        self.refcount = 0
        self._framed: bytes | None = None
        self._compressed: dict[int, bytes] | None = None

    @property
    def text(self) -> str | None:
        """The text; `None` if it is binary."""
        if self.binary:
            return None
        if self._text is None:
            self._text = self.payload.decode("utf-8")
        return self._text

    @property
    def data(self) -> bytes | None:
        """The bytes of a binary message; `None` if it is text."""
        return self._payload if self.binary else None

    @property
    def payload(self) -> bytes:
        """What travels inside the frame."""
        if self._payload is None:
            self._payload = (self._text or "").encode("utf-8")
        return self._payload

    def message(self) -> dict[str, Any]:
        """The ASGI message that sends this frame. Made anew each time: a middleware may change what it is given."""
        if self.binary:
            return {"type": "websocket.send", "bytes": self._payload}
        return {"type": "websocket.send", "text": self.text}

    def framed(self) -> bytes:
        """The frame as it stands on the wire, uncompressed."""
        if self._framed is None:
            self._framed = frame_bytes(BINARY if self.binary else TEXT, self.payload)
        return self._framed

    def compressed(self, window_bits: int, min_bytes: int) -> bytes:
        """The frame as it stands on the wire, compressed for clients with windows of this size.

        Args:
            window_bits: Base-2 logarithm of the window, 9 to 15.
            min_bytes: A payload below this, and one that compression makes no smaller, stays as it is.
        """
        if self.size < min_bytes:
            return self.framed()
        if self._compressed is None:
            self._compressed = {}
        known = self._compressed.get(window_bits)
        if known is None:
            small = deflate_message(self.payload, window_bits)
            known = (
                frame_bytes(BINARY if self.binary else TEXT, small, compressed=True)
                if len(small) < self.size
                else self.framed()
            )
            self._compressed[window_bits] = known
        return known


def encode(message: Any, key: Any = None, *, volatile: bool = False) -> EncodedMessage:
    """Encode anything that can be sent.

    `str` becomes a text frame as it is, bytes a binary frame, and everything else JSON in a text frame: pydantic
    models, dicts, lists, dataclasses, with datetimes, UUIDs, decimals and enums inside. NaN and infinities, which JSON
    does not have, become `null`, as in JavaScript. JSON that some clients cannot read, for its depth or for a number in
    it that is larger than a double, cannot be sent.

    Args:
        message: What to encode.
        key: Its `coalesce_key`, if a newer message may take its place.
        volatile: Whether it is worth nothing later.

    Raises:
        MessageEncodeError: The message cannot be encoded.
        TypeError: The key cannot be hashed.
    """
    if isinstance(message, str):
        frame = _text(message)
    elif isinstance(message, (bytes, bytearray, memoryview)):
        frame = EncodedMessage(bytes(message), binary=True)
    else:
        frame = encode_json(message)
    if key is not None:
        hash(key)  # now, at the caller, and not in the middle of a broadcast
        frame.key = key
    if volatile:
        frame.volatile = True
    return frame


def encode_json(message: Any) -> EncodedMessage:
    """Encode a message as JSON in a text frame, a `str` too.

    Raises:
        MessageEncodeError: The message cannot be encoded.
    """
    try:
        if isinstance(message, BaseModel):
            frame = _text(message.model_dump_json())
            check_sent(frame.payload)
        else:
            payload = to_json(message, inf_nan_mode="null")
            check_sent(payload)
            frame = EncodedMessage(payload)
    except ValueError as error:  # pydantic's errors are ValueErrors, and so is a cycle
        raise MessageEncodeError(f"a {type(message).__name__} cannot be sent as JSON: {error}") from error
    frame.is_json = True
    return frame


def _text(text: str) -> EncodedMessage:
    if text.isascii():
        return EncodedMessage(text)
    try:
        payload = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MessageEncodeError(
            f"the text cannot be sent: character {error.start} is half of a surrogate pair"
        ) from error
    frame = EncodedMessage(text, size=len(payload))
    frame._payload = payload
    return frame


CLOSE: Final = "websocket.close"


def asgi_close(code: int, text: str) -> dict[str, Any]:
    """The ASGI message that closes a connection."""
    return {"type": CLOSE, "code": code, "reason": text}
