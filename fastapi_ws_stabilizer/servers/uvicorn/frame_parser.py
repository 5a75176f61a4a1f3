"""Incremental parser of the frames of a client: RFC 6455 section 5, with the compression of RFC 7692.

`StableWebSocketProtocol` uses it instead of the parser of `websockets`, for three reasons:

- It returns one message or control frame at a time, so the reading can pause after any of them, and an invalid frame
  does not hide what arrived before it.
- It decodes text as it arrives. RFC 6455 section 8.1 fails a connection for invalid UTF-8, and the first invalid byte
  may arrive long before the end of its message.
- It is several times as fast.
"""

from __future__ import annotations

import codecs
from typing import Any, Final

from fastapi_ws_stabilizer.servers.uvicorn.compat import apply_mask
from fastapi_ws_stabilizer.servers.uvicorn.deflate import MessageInflater
from fastapi_ws_stabilizer.wire.deflate import InflateLimitError
from fastapi_ws_stabilizer.wire.rfc6455 import BINARY, CLOSE, CONTINUATION, FIN, MAX_CONTROL_BYTES, PONG, RSV1, TEXT

MAX_PARTS: Final = 1024
"""Maximum number of separately stored parts of one message. A client can send each byte in a fragment of its own, and a
part is larger than a byte."""

MAX_FRAGMENTS: Final = 256
"""Number of fragments after which `next_frame` returns, even if their message has not ended. A large read can contain
many thousand, and the caller has other work."""

FRAGMENTS: Final = 0x10
"""Opcode that `next_frame` returns then. No frame has it."""

PROTOCOL_ERROR: Final = 1002
INVALID_DATA: Final = 1007
MESSAGE_TOO_BIG: Final = 1009

_RESERVED_BITS: Final = 0x70
_OPCODE_BITS: Final = 0x0F
_MASKED: Final = 0x80
_WHOLE_MESSAGES: Final = frozenset({FIN | TEXT, FIN | BINARY})
"""First bytes of the frames of unfragmented and uncompressed messages."""

_utf8_decoder: Final = codecs.getincrementaldecoder("utf-8")


class ProtocolViolation(Exception):
    """A frame for which RFC 6455 fails the connection.

    Attributes:
        code: Close code.
        reason: Close reason.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class FrameParser:
    """Parser of the frames of one client.

    Args:
        max_message_bytes: Maximum size of a message in bytes, after inflation.
        window_bits: Base-2 logarithm of the window of compressed messages; `None` without compression.

    Attributes:
        max_message_bytes: As above. It may be lowered at any time.
        ended: Whether data is ignored.
    """

    __slots__ = (
        "_at",
        "_data",
        "_decoder",
        "_final",
        "_inflater",
        "_left",
        "_mask",
        "_opcode",
        "_parts",
        "_size",
        "_window_bits",
        "ended",
        "max_message_bytes",
    )

    def __init__(self, max_message_bytes: int, window_bits: int | None) -> None:
        self.max_message_bytes = max_message_bytes
        self.ended = False
        self._window_bits = window_bits
        self._data = b""
        self._at = 0  # index of the first byte that is not parsed
        # The current data frame, of which `_left` bytes have not arrived.
        self._final = False
        self._left = 0
        self._mask = b""
        # The current message, whose first frame has begun.
        self._opcode = CONTINUATION  # of that frame; CONTINUATION means that there is no such message
        self._size = 0
        self._parts: list[Any] = _NO_PARTS
        self._decoder: codecs.IncrementalDecoder | None = None
        self._inflater: MessageInflater | None = None

    @property
    def unparsed_bytes(self) -> int:
        """Number of bytes that wait to be parsed."""
        return len(self._data) - self._at

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        if self.ended:
            return
        self._data = data if self._at == len(self._data) else self._data[self._at :] + data
        self._at = 0

    def compact(self) -> None:
        """Drop the bytes that are parsed, as `feed` does."""
        self.feed(b"")

    def end(self) -> None:
        """Ignore all bytes from now on, and those that are not parsed."""
        self.ended = True
        self._data, self._at, self._left = b"", 0, 0
        self._forget_message()

    def next_frame(self) -> tuple[int, str | bytes] | None:
        """Return the next whole message or control frame: its opcode and its content; `None` if more bytes are needed.

        Hot path: nearly every message is one whole frame. After `MAX_FRAGMENTS` fragments, the opcode is `FRAGMENTS`.

        Raises:
            ProtocolViolation: A frame is invalid. The parser must not be used further.
        """
        fragments = 0
        while True:
            if self._left:
                if self._at == len(self._data):
                    return None
                self._take_payload()
                if self._left:
                    return None
                if self._final:
                    return self._end_message()
            data, at = self._data, self._at
            arrived = len(data) - at
            if arrived < 2:
                return None
            first, second = data[at], data[at + 1]
            if self._opcode or first not in _WHOLE_MESSAGES or second < _MASKED:
                self._check_start(first, second)
            length = second - _MASKED
            head = 6 if length < 126 else 8 if length == 126 else 14
            if arrived < head:
                return None
            if length > 125:
                length = int.from_bytes(data[at + 2 : at + head - 4], "big")
                if length >> 63:
                    raise ProtocolViolation(PROTOCOL_ERROR, "invalid length")
            start = at + head
            mask = data[start - 4 : start]
            opcode = first & _OPCODE_BITS
            if opcode >= CLOSE:
                if arrived < head + length:
                    return None
                self._at = start + length
                return opcode, apply_mask(data[start : self._at], mask)
            if self._size + length > self.max_message_bytes and not (first & RSV1 or self._inflater):
                raise self._too_big()
            if first in _WHOLE_MESSAGES and arrived >= head + length:
                self._at = start + length
                payload = apply_mask(data[start : self._at], mask)
                if opcode == BINARY:
                    return opcode, payload
                try:
                    return opcode, str(payload, "utf-8")
                except UnicodeDecodeError:
                    raise _not_utf8() from None
            self._at = start
            self._begin_frame(first, length, mask)
            self._take_payload()
            if self._left:
                return None
            if self._final:
                return self._end_message()
            fragments += 1
            if fragments == MAX_FRAGMENTS:
                return FRAGMENTS, b""

    def _check_start(self, first: int, second: int) -> None:
        """Check the first two bytes of a frame."""
        opcode = first & _OPCODE_BITS
        reserved = first & _RESERVED_BITS
        if second < _MASKED:
            problem = "incorrect masking"
        elif reserved and not (reserved == RSV1 and self._window_bits is not None and opcode in (TEXT, BINARY)):
            problem = "reserved bits must be 0"
        elif opcode > PONG or BINARY < opcode < CLOSE:
            problem = "invalid opcode"
        elif opcode >= CLOSE and not first & FIN:
            problem = "fragmented control frame"
        elif opcode >= CLOSE and second - _MASKED > MAX_CONTROL_BYTES:
            problem = "control frame too long"
        elif opcode == CONTINUATION and not self._opcode:
            problem = "unexpected continuation frame"
        elif opcode in (TEXT, BINARY) and self._opcode:
            problem = "expected a continuation frame"
        else:
            return
        raise ProtocolViolation(PROTOCOL_ERROR, problem)

    def _begin_frame(self, first: int, length: int, mask: bytes) -> None:
        """Begin a data frame that is part of a message, compressed, or has not arrived completely."""
        self._final = bool(first & FIN)
        self._left = length
        self._mask = mask
        if opcode := first & _OPCODE_BITS:
            self._opcode = opcode
            self._parts = []
            self._decoder = _utf8_decoder() if opcode == TEXT else None
            if first & RSV1 and self._window_bits is not None:
                self._inflater = MessageInflater(self._window_bits)

    def _take_payload(self) -> None:
        """Parse what has arrived of the payload of the current frame."""
        part = self._data[self._at : self._at + self._left]
        self._at += len(part)
        self._left -= len(part)
        last = self._final and not self._left
        payload: bytes = apply_mask(part, self._mask)
        if self._left and (turn := len(part) & 3):
            self._mask = self._mask[turn:] + self._mask[:turn]
        if self._inflater is not None:
            try:
                payload = self._inflater.inflate(payload, self.max_message_bytes - self._size, last=last)
            except InflateLimitError:
                raise self._too_big() from None
            except ValueError as error:
                raise ProtocolViolation(PROTOCOL_ERROR, str(error)) from None
        self._size += len(payload)
        content: str | bytes = payload
        if self._decoder is not None:
            try:
                content = self._decoder.decode(payload, last)
            except UnicodeDecodeError:
                raise _not_utf8() from None
        if content:
            self._parts.append(content)
            if len(self._parts) > MAX_PARTS:
                self._parts = [self._joined()]

    def _joined(self) -> str | bytes:
        parts = self._parts
        if len(parts) == 1:
            return parts[0]  # type: ignore[no-any-return]
        return "".join(parts) if self._opcode == TEXT else b"".join(parts)

    def _end_message(self) -> tuple[int, str | bytes]:
        message = self._opcode, self._joined()
        self._forget_message()
        return message

    def _forget_message(self) -> None:
        self._opcode = CONTINUATION
        self._size = 0
        self._parts, self._decoder, self._inflater = _NO_PARTS, None, None

    def _too_big(self) -> ProtocolViolation:
        return ProtocolViolation(MESSAGE_TOO_BIG, f"message over {self.max_message_bytes} bytes")


def _not_utf8() -> ProtocolViolation:
    return ProtocolViolation(INVALID_DATA, "text is not UTF-8")


_NO_PARTS: Final[Any] = ()
"""Parts of no message, shared by all parsers. It is a tuple, so that nothing can be appended to it by mistake."""
