"""Tests of the negotiation of compression, and of inflating in pieces."""

from __future__ import annotations

import zlib

import pytest
from websockets.exceptions import NegotiationError

from fastapi_ws_stabilizer.servers.uvicorn.deflate import DEFLATE, MAX_FINAL_BLOCKS, MessageInflater
from fastapi_ws_stabilizer.wire.deflate import TAIL, InflateLimitError, deflate_message

DATA = b"hello " * 200


@pytest.mark.parametrize("bits", range(9, 16))
def test_negotiated_window_can_be_compressed_with(bits: int) -> None:
    """A client may request any window that zlib supports, and gets it."""
    _, agreed = DEFLATE.process_request_params([("server_max_window_bits", str(bits))], [])
    assert agreed.local_max_window_bits == bits
    packed = deflate_message(b"hello" * 200, agreed.local_max_window_bits)
    assert zlib.decompressobj(wbits=-bits).decompress(packed + TAIL) == b"hello" * 200


def test_window_unsupported_by_zlib_is_declined() -> None:
    """Compression with a window of 8 bits is declined, because the first message would break the connection."""
    with pytest.raises(NegotiationError):
        DEFLATE.process_request_params([("server_max_window_bits", "8")], [])


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("packed", [deflate_message(DATA, 15), deflate_message(b"", 15)], ids=["text", "empty"])
def test_message_inflates_in_pieces_of_any_size(packed: bytes, size: int) -> None:
    """The pieces of a message inflate to the message, however it is cut."""
    inflater = MessageInflater(15)
    pieces = [packed[at : at + size] for at in range(0, len(packed), size)]
    inflated = [inflater.inflate(piece, 10_000, last=piece is pieces[-1]) for piece in pieces]
    assert b"".join(inflated) == zlib.decompressobj(-15).decompress(packed + TAIL)


def test_block_after_final_blocks_refers_to_earlier_data() -> None:
    """Blocks follow final ones, also several in one piece, and may repeat what came before them."""
    first = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = first.compress(DATA) + first.flush(zlib.Z_FINISH) + b"\x03\x00"
    second = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=DATA)
    packed += second.compress(DATA) + second.flush(zlib.Z_FINISH) + b"\x00"
    assert MessageInflater(15).inflate(packed, 10_000, last=True) == DATA * 2


def test_final_blocks_are_bounded() -> None:
    """One final block too many is invalid."""
    MessageInflater(15).inflate(b"\x03\x00" * MAX_FINAL_BLOCKS, 10_000, last=True)
    with pytest.raises(ValueError, match="too many final blocks"):
        MessageInflater(15).inflate(b"\x03\x00" * (MAX_FINAL_BLOCKS + 1), 10_000, last=True)


@pytest.mark.parametrize("limit", [len(DATA) - 1, 1, 0, -1])
def test_inflated_size_is_bounded(limit: int) -> None:
    """A message that inflates to more than the limit raises, also if the limit was lowered below what came before."""
    assert MessageInflater(15).inflate(deflate_message(DATA, 15), len(DATA), last=True) == DATA
    with pytest.raises(InflateLimitError):
        MessageInflater(15).inflate(deflate_message(DATA, 15), limit, last=True)
