"""The part of the WebSocket protocol that a load generator needs: the handshake, and writing and reading frames."""

from __future__ import annotations

import base64
import struct
from typing import Final

TEXT: Final = 1
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10

_MASK: Final = b"\x37\xfa\x21\x3d"
_KEY: Final = base64.b64encode(b"benchmark client").decode()
_OFFER: Final = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"

Frame = tuple[int, memoryview]
"""First byte of a frame, and its payload."""


def handshake(port: int, path: str, *, deflate: bool, subprotocol: str | None = None) -> bytes:
    """Return the request that opens a WebSocket; with `deflate`, with the offer that browsers make."""
    protocol = f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {_KEY}\r\nSec-WebSocket-Version: 13\r\n{_OFFER if deflate else ''}{protocol}\r\n"
    ).encode()


def client_frame(opcode: int, payload: bytes) -> bytes:
    """Return a whole frame as a client sends it: masked."""
    size = len(payload)
    if size > 0xFFFF:
        raise ValueError("the load sends small messages only")
    head = (
        struct.pack("!BB", 0x80 | opcode, 0x80 | size) if size < 126 else struct.pack("!BBH", 0x80 | opcode, 254, size)
    )
    mask = (_MASK * (size // 4 + 1))[:size]
    masked = (int.from_bytes(payload, "big") ^ int.from_bytes(mask, "big")).to_bytes(size, "big")
    return head + _MASK + masked


def server_frame(payload: bytes) -> bytes:
    """Return a whole text frame as a server sends it."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | TEXT, size) + payload
    if size <= 0xFFFF:
        return struct.pack("!BBH", 0x80 | TEXT, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | TEXT, 127, size) + payload


def frame_bytes(payload_bytes: int) -> int:
    """Return the bytes that a server's frame with such a payload has on the wire."""
    return payload_bytes + (2 if payload_bytes < 126 else 4 if payload_bytes <= 0xFFFF else 10)


class FrameReader:
    """Splitter of a server's bytes into frames. It buffers an incomplete frame until the rest arrives."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: memoryview) -> list[Frame]:
        """Return the frames that `data` completes, as views that are invalid once its buffer is reused."""
        if self._rest:
            data = memoryview(self._rest + bytes(data))
            self._rest = b""
        frames: list[Frame] = []
        start, end = 0, len(data)
        while end - start >= 2:
            size = data[start + 1]  # no mask: only clients mask
            payload = start + 2
            if size == 126:
                payload += 2
                if payload > end:
                    break
                size = data[start + 2] << 8 | data[start + 3]
            elif size == 127:
                payload += 8
                if payload > end:
                    break
                size = int.from_bytes(data[start + 2 : payload], "big")
            if payload + size > end:
                break
            frames.append((data[start], data[payload : payload + size]))
            start = payload + size
        if start < end:
            self._rest = bytes(data[start:])
        return frames
