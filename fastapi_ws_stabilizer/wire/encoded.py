"""A message that is encoded once for all recipients."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel
from pydantic_core import to_json

from fastapi_ws_stabilizer.compat.uvicorn import EMPTY_BYTES, EMPTY_TEXT
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.wire.deflate import deflate_message
from fastapi_ws_stabilizer.wire.rfc6455 import BINARY, TEXT, frame_bytes
from fastapi_ws_stabilizer.wire.strict_json import SHORT, check_sent


class EncodedMessage:
    """Encoded message: text or bytes, and its size on the wire before compression.

    A broadcast creates one and passes it to every outbox. Each encoding is created for the first client that needs it,
    and cached for the other clients: the string for a plain ASGI server, the framed bytes, and the compressed bytes for
    each window size.

    Attributes:
        binary: Whether it is sent in a binary frame.
        size: Payload size in bytes.
        key: Coalescing key: in an outbox, a newer message with an equal key replaces this one.
        is_json: Whether the text is a JSON value. Otherwise it is text of the application.
        volatile: Whether the message is useless later. It is not stored for a detached client.
        takes_slow_path: Whether sessions queue it on their slow path, because it is volatile or has a key. Only v1
            frames have it.
        room: The room that it is sent to; `None` if it is sent to several rooms, or to none.
        enveloped: The same message as a `stabilizer.v1.json` frame; `None` until it is created.
        is_envelope: Whether this message is such a frame itself.
        deflated: The same v1 frame compressed; `None` until it is created, and `False` if compression does not make it
            smaller.
        created_at: Creation time on the monotonic clock, in seconds. Only v1 frames have it.
        refcount: Number of outboxes and replay buffers that hold it for longer than one event loop iteration.
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
        "takes_slow_path",
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
        self.takes_slow_path = False
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
        """The text; `None` for a binary message."""
        if self.binary:
            return None
        if self._text is None:
            self._text = self.payload.decode("utf-8")
        return self._text

    @property
    def data(self) -> bytes | None:
        """The bytes of a binary message; `None` for text."""
        return self._payload if self.binary else None

    @property
    def payload(self) -> bytes:
        """The payload of the frame."""
        if self._payload is None:
            self._payload = (self._text or "").encode("utf-8")
        return self._payload

    def message(self) -> dict[str, Any]:
        """Return a new ASGI message that sends this frame.

        It is never shared, because a middleware may modify the message that it gets. Hot path: called for each
        recipient on plain ASGI.
        """
        if self.binary:
            return {"type": "websocket.send", "bytes": self._payload or EMPTY_BYTES}
        return {"type": "websocket.send", "text": self._text or self.text or EMPTY_TEXT}

    def framed(self) -> bytes:
        """Return the uncompressed frame as it is sent on the wire."""
        if self._framed is None:
            self._framed = frame_bytes(BINARY if self.binary else TEXT, self.payload)
        return self._framed

    def compressed(self, window_bits: int, min_bytes: int) -> bytes:
        """Return the frame as it is sent on the wire to clients with this window size.

        Args:
            window_bits: Base-2 logarithm of the window, 9 to 15.
            min_bytes: Smaller payloads are not compressed. Neither are payloads that compression does not shrink.
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
    """Encode a message of any supported type.

    A `str` becomes a text frame unchanged, and bytes become a binary frame. Everything else becomes JSON in a text
    frame: pydantic models, dicts, lists and dataclasses, which may contain datetimes, UUIDs, decimals and enums. NaN
    and infinities, which JSON does not have, become `null`, as in JavaScript. JSON that some clients cannot read is
    rejected: JSON that is nested too deep, and numbers beyond a double.

    Args:
        message: The message.
        key: Its `coalesce_key`, if a newer message may replace it.
        volatile: Whether the message is useless later.

    Raises:
        MessageEncodeError: The message cannot be encoded.
        TypeError: The key is not hashable.
    """
    if isinstance(message, str):
        frame = _text(message)
    elif isinstance(message, (bytes, bytearray, memoryview)):
        frame = EncodedMessage(bytes(message), binary=True)
    else:
        frame = encode_json(message)
    if key is not None:
        hash(key)  # fail in the caller instead of in the middle of a broadcast
        frame.key = key
    if volatile:
        frame.volatile = True
    return frame


def encode_json(message: Any) -> EncodedMessage:
    """Encode a message, including a `str`, as JSON in a text frame.

    Raises:
        MessageEncodeError: The message cannot be encoded.
    """
    try:
        if isinstance(message, BaseModel):
            frame = _text(message.model_dump_json())
            check_sent(frame.payload)
        else:
            payload = to_json(message, inf_nan_mode="null")
            if len(payload) > SHORT or b"N" in payload or b"I" in payload:  # nearly all messages need no call
                check_sent(payload)
            frame = EncodedMessage(payload)
    except ValueError as error:  # pydantic raises ValueErrors, also for a cycle
        raise MessageEncodeError(f"a {type(message).__name__} cannot be sent as JSON: {error}") from error
    frame.is_json = True
    return frame


def _text(text: str) -> EncodedMessage:
    if text.isascii():
        return EncodedMessage(text)
    try:
        payload = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MessageEncodeError(f"the text cannot be sent: character {error.start} is a lone surrogate") from error
    frame = EncodedMessage(text, size=len(payload))
    frame._payload = payload
    return frame


CLOSE: Final = "websocket.close"


def asgi_close(code: int, text: str) -> dict[str, Any]:
    """Return the ASGI message that closes a connection."""
    return {"type": CLOSE, "code": code, "reason": text}
