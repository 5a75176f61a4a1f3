"""permessage-deflate (RFC 7692) without context takeover.

The compressed bytes of a message are the same for all recipients, so the message is compressed once.
"""

from __future__ import annotations

import zlib
from typing import Final

TAIL: Final = b"\x00\x00\xff\xff"
"""End of a flushed block. It is removed before sending (RFC 7692 section 7.2.1)."""


class InflateLimitError(ValueError):
    """The inflated data exceeds the limit."""


def inflate(packed: bytes, limit: int) -> bytes:
    """Inflate one message that was compressed separately, up to a limit.

    Raises:
        InflateLimitError: The inflated data has more than `limit` bytes.
        ValueError: The data is not valid raw deflate, is truncated, or has trailing bytes.
    """
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(packed, limit + 1)
    except zlib.error as error:
        raise ValueError(f"not raw deflate: {error}") from None
    if len(data) > limit:
        raise InflateLimitError(f"more than {limit} bytes")
    if not inflater.eof or inflater.unused_data:
        raise ValueError("the compressed data is truncated or has trailing bytes")
    return data


def inflated_start(packed: bytes, max_bytes: int) -> bytes:
    """Return the first bytes of a separately compressed message, or `b""` if it is invalid."""
    try:
        return zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(packed, max_bytes)
    except zlib.error:
        return b""


def deflate_stream(payload: bytes) -> bytes:
    """Compress one message as a complete deflate stream."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(payload) + compressor.flush()


def deflate_message(payload: bytes, window_bits: int) -> bytes:
    """Compress one message for any receiver with a window of at least `window_bits`."""
    compressor = zlib.compressobj(wbits=-window_bits)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)
