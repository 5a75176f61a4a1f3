"""Tests that no frame, offer or conversation breaks its parser."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import strategies
from tests.fuzz.targets import conversations as protocol
from tests.fuzz.targets import frames, negotiation

pytestmark = pytest.mark.generated

_FRAMES = strategies.v1_frames().map(str.encode)


@settings(max_examples=400)
@given(strategies.mutated(_FRAMES | strategies.hellos().map(str.encode)) | st.binary(max_size=200))
def test_any_frame_is_read_or_rejected(data: bytes) -> None:
    """A frame is parsed as by another parser and can be written again, or is rejected with a valid close code."""
    frames.frames(data)


@settings(max_examples=150)
@given(strategies.mutated(strategies.binary_frames()))
def test_any_binary_frame_is_read_or_rejected(data: bytes) -> None:
    """A binary frame is not larger than negotiated, and its data is what follows its object."""
    frames.reads_frame_of_bytes(data)


@settings(max_examples=150)
@given(
    st.text()
    | strategies.VALUES.map('{{"type":"ping","ts":{}}}'.format)
    | st.sampled_from(["ping", "pong", '{"type":"pong","x":1}'])
)
def test_any_control_frame_is_answered_in_json(text: str) -> None:
    """A ping is answered with its own `ts`, as JSON; application data is never treated as a ping."""
    frames.reads_control(text)


@settings(max_examples=150)
@given(st.text(st.characters(codec=None)), st.binary(max_size=2000))
def test_any_encodable_payload_survives_round_trip(text: str, data: bytes) -> None:
    """A message arrives as it was sent: at plain clients, at v1 clients, and compressed."""
    frames.survives_sending(text, data)
    frames.survives_compression(data)


_LINES = st.one_of(
    _FRAMES,
    st.integers(1, 6).map(lambda seq: b'{"type":"msg","seq":%d,"id":"i","key":"k%d","data":1e400}' % (seq, seq % 3)),
    st.integers(0, 6).map(lambda seq: b'{"type":"ack","seq":%d}' % seq),
    st.tuples(st.sampled_from([b"R", b"S"]), strategies.hellos()).map(lambda one: one[0] + one[1].encode()),
    st.tuples(st.sampled_from([b"M", b"D"]), _FRAMES).map(b"".join),
    strategies.binary_frames().map(lambda data: b"B" + data.replace(b"\n", b" ")),
    st.sampled_from([b"H", b"F", b"I", b"X", b"P", b"W", b"A", b"Ohello", b"Vgone", b"O" + b"x" * 900]),
)


@settings(max_examples=400)
@given(st.lists(_LINES, max_size=14).map(b"\n".join))
def test_any_conversation_follows_protocol_rules(script: bytes) -> None:
    """Whatever a client sends over its connections, its server numbers, answers, keeps and ends by the rules."""
    protocol.conversations(script)


_OFFERS = st.lists(
    st.sampled_from(
        ["stabilizer.v1.json", "stabilizer.auth.YWJj", "stabilizer.auth.\u00e9", "stabilizer.auth.=", "chat"]
    )
    | st.text(max_size=12).map("stabilizer.auth.{}".format),
    max_size=4,
)


@settings(max_examples=100)
@given(_OFFERS)
def test_any_subprotocol_offer_is_parsed(offered: list[str]) -> None:
    """A list of subprotocols has a version or none, and one credential or none."""
    negotiation.offers_subprotocols(offered)


_PARAMETERS = st.sampled_from(
    ["client_max_window_bits", "server_no_context_takeover", "client_no_context_takeover", "x", 'y="z"']
) | st.tuples(
    st.sampled_from(["client_max_window_bits", "server_max_window_bits"]),
    st.integers(7, 16) | st.sampled_from(["", "015", '"9"']),
).map("{0[0]}={0[1]}".format)


@settings(max_examples=100)
@given(st.lists(st.lists(_PARAMETERS, max_size=4), max_size=3))
def test_any_compression_offer_is_negotiated(offers: list[list[str]]) -> None:
    """An accepted offer has windows that zlib supports, and compresses in both directions."""
    negotiation.offers_extensions(", ".join("; ".join(["permessage-deflate", *one]) for one in offers))


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 7),
            st.binary(max_size=40) | st.binary(max_size=20).map(lambda data: strategies.raw_deflate(data * 9)[:255]),
        )
    )
)
def test_any_compressed_piece_is_inflated_or_rejected(sent: list[tuple[int, bytes]]) -> None:
    """Pieces of compressed messages are inflated up to the limit, or are invalid."""
    negotiation.inflates(15, b"".join(bytes([head, len(data)]) + data for head, data in sent))
