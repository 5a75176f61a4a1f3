"""A message, encoded once for all who get it."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import to_json

from fastapi_ws_stabilizer.errors import MessageEncodeError


class Frame:
    """One encoded message: text or bytes, and its size on the wire before compression.

    A broadcast makes one and hands it to every outbox.
    """

    __slots__ = ("data", "size", "text")

    def __init__(self, text: str | None, data: bytes | None, size: int) -> None:
        self.text = text
        self.data = data
        self.size = size

    def message(self) -> dict[str, Any]:
        """The ASGI message that sends this frame. Made anew each time: a middleware may change what it is given."""
        if self.text is not None:
            return {"type": "websocket.send", "text": self.text}
        return {"type": "websocket.send", "bytes": self.data}


def encode(message: Any) -> Frame:
    """Encode anything that can be sent.

    `str` becomes a text frame as it is, bytes a binary frame, and everything else JSON in a text frame: pydantic
    models, dicts, lists, dataclasses, with datetimes, UUIDs, decimals and enums inside. NaN and infinities, which JSON
    does not have, become `null`, as in JavaScript.

    Raises:
        MessageEncodeError: The message cannot be encoded.
    """
    if isinstance(message, str):
        return _text(message)
    if isinstance(message, (bytes, bytearray, memoryview)):
        data = bytes(message)
        return Frame(None, data, len(data))
    return encode_json(message)


def encode_json(message: Any) -> Frame:
    """Encode a message as JSON in a text frame, a `str` too.

    Raises:
        MessageEncodeError: The message cannot be encoded.
    """
    try:
        if isinstance(message, BaseModel):
            return _text(message.model_dump_json())
        data = to_json(message, inf_nan_mode="null")
        return Frame(data.decode("utf-8"), None, len(data))
    except ValueError as error:  # pydantic's errors are ValueErrors, and so is a cycle
        raise MessageEncodeError(f"a {type(message).__name__} cannot be sent as JSON: {error}") from error


def _text(text: str) -> Frame:
    if text.isascii():
        return Frame(text, None, len(text))
    try:
        return Frame(text, None, len(text.encode("utf-8")))
    except UnicodeEncodeError as error:
        raise MessageEncodeError(
            f"the text cannot be sent: character {error.start} is half of a surrogate pair"
        ) from error


CLOSE: Final = "websocket.close"


def close_message(code: int, text: str) -> dict[str, Any]:
    """The ASGI message that closes a connection."""
    return {"type": CLOSE, "code": code, "reason": text}
