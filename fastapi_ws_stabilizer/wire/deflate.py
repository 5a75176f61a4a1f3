"""permessage-deflate, RFC 7692, without context takeover: what is compressed once can be sent to many."""

from __future__ import annotations

import zlib
from typing import Final

TAIL: Final = b"\x00\x00\xff\xff"
"""What a flushed block ends with. It is not sent: RFC 7692 section 7.2.1."""


class InflateLimitError(ValueError):
    """There is more in it than may be."""


def inflate(packed: bytes, limit: int) -> bytes:
    """Inflate one message that was compressed on its own, and no further than a limit.

    Raises:
        InflateLimitError: It holds more than `limit` bytes.
        ValueError: It is not compressed as it says.
    """
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(packed, limit + 1)
    except zlib.error as error:
        raise ValueError(f"no raw deflate: {error}") from None
    if len(data) > limit:
        raise InflateLimitError(f"more than {limit} bytes")
    if not inflater.eof or inflater.unused_data:
        raise ValueError("the compressed data ends too early, or goes on behind its end")
    return data


def inflated_start(packed: bytes, most: int) -> bytes:
    """The first bytes of a message that was compressed on its own; none if it is broken."""
    try:
        return zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(packed, most)
    except zlib.error:
        return b""


def deflate_stream(payload: bytes) -> bytes:
    """Compress one message as a stream of its own, with its end."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(payload) + compressor.flush()


def deflate_message(payload: bytes, window_bits: int) -> bytes:
    """Compress one message on its own, for any receiver whose window has at least `window_bits`."""
    compressor = zlib.compressobj(wbits=-window_bits)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)
