"""Constants of the frames of RFC 6455 section 5.2, and frames as a server sends them: unfragmented and unmasked."""

from __future__ import annotations

import struct
from typing import Final

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

FIN: Final = 0x80
RSV1: Final = 0x40  # RFC 7692 section 6: the message is compressed

MAX_CONTROL_BYTES: Final = 125
"""Maximum payload of a control frame (section 5.5)."""

_short = struct.Struct("!BB").pack
_medium = struct.Struct("!BBH").pack
_long = struct.Struct("!BBQ").pack


def frame_bytes(opcode: int, payload: bytes, *, compressed: bool = False) -> bytes:
    """Return one final frame with its header.

    Args:
        opcode: The opcode.
        payload: The payload.
        compressed: Whether permessage-deflate has compressed the payload.
    """
    first = FIN | (RSV1 if compressed else 0) | opcode
    length = len(payload)
    if length < 126:
        return _short(first, length) + payload
    if length < 65536:
        return _medium(first, 126, length) + payload
    return _long(first, 127, length) + payload
