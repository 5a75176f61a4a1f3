"""Tests of the negotiation of compression."""

from __future__ import annotations

import zlib

import pytest
from websockets.exceptions import NegotiationError

from fastapi_ws_stabilizer.servers.uvicorn.deflate import DEFLATE
from fastapi_ws_stabilizer.wire.deflate import TAIL, deflate_message


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
