"""permessage-deflate, RFC 7692, without context takeover: what is compressed once can be sent to many."""

from __future__ import annotations

import zlib
from typing import Final

TAIL: Final = b"\x00\x00\xff\xff"
"""What a flushed block ends with. It is not sent: RFC 7692 section 7.2.1."""


def deflate(payload: bytes, window_bits: int) -> bytes:
    """Compress one message on its own, for any receiver whose window has at least `window_bits`."""
    compressor = zlib.compressobj(wbits=-window_bits)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)
