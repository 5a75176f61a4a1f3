"""Tests of compressed frames: binary ones of kind 2."""

from __future__ import annotations

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.wire.encoded import encode
from fastapi_ws_stabilizer.wire.envelope import to_deflated, to_v1
from fastapi_ws_stabilizer.wire.v1.frames import DEFLATE_FROM, ProtocolError, deflated, parse

LIMIT = 10_000


@given(st.text(alphabet="ab\u00e9\U0001f600", min_size=0, max_size=2000))
def test_compressed_frame_decodes_to_original_text(text: str) -> None:
    """Compressible text is restored, and other text is not compressed."""
    frame = json.dumps({"type": "msg", "data": text}, ensure_ascii=False)
    packed = deflated(frame)
    if packed is None:
        assert len(frame.encode()) < DEFLATE_FROM or len(set(text)) > 1
    else:
        assert len(packed) < len(frame.encode())
        assert parse(packed, LIMIT) == {"type": "msg", "data": text}


def test_unnegotiated_compressed_frame_is_malformed() -> None:
    """Kind 2 is malformed unless both sides have announced the capability."""
    packed = deflated(json.dumps({"type": "msg", "data": "x" * 1000}))
    assert packed is not None
    with pytest.raises(ProtocolError, match="not negotiated") as caught:
        parse(packed)
    assert caught.value.code == 4400


def test_frame_inflating_beyond_limit_is_too_big() -> None:
    """A frame that inflates beyond the limit is too big, and inflating stops there."""
    bomb = b"\x02\x00\x00" + raw_deflate(b"x" * 10_000_000)
    with pytest.raises(ProtocolError, match="more than") as caught:
        parse(bomb, LIMIT)
    assert caught.value.code == 1009


@pytest.mark.parametrize(
    "packed",
    [b"\x02", b"\x02\x00", b"\x02\x00\x00", b"\x02\x00\x01{}", b"\x02\x00\x00garbage", b"\x02\x00\x00" + b"\xff" * 9],
)
def test_invalid_deflate_data_closes_with_4400(packed: bytes) -> None:
    """Data that is not a raw deflate of a text frame closes with 4400."""
    with pytest.raises(ProtocolError) as caught:
        parse(packed, LIMIT)
    assert caught.value.code == 4400


@pytest.mark.parametrize("cut", [-1, -2, -5])
def test_truncated_deflate_stream_is_malformed(cut: int) -> None:
    """A stream without its end is malformed, and so is one with data after its end."""
    packed = b"\x02\x00\x00" + raw_deflate(json.dumps({"type": "msg", "data": "x" * 1000}).encode())
    with pytest.raises(ProtocolError):
        parse(packed[:cut], LIMIT)
    with pytest.raises(ProtocolError):
        parse(packed + b"\x00", LIMIT)


def test_broadcast_is_compressed_once() -> None:
    """All clients with compression get the same compressed frame, and bytes are not compressed."""
    frame = to_v1(encode("x" * 1000))
    assert to_deflated(frame) is to_deflated(frame)
    assert to_deflated(frame).size < 100
    small, binary = to_v1(encode("x")), to_v1(encode(b"x" * 1000))
    assert to_deflated(small) is small
    assert to_deflated(binary) is binary


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()
