"""Tests of the parser of frames: what it returns does not depend on how the bytes are cut."""

from __future__ import annotations

import random
import struct
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.protocol import State
from websockets.server import ServerProtocol

from fastapi_ws_stabilizer.servers.uvicorn.frame_parser import (
    FRAGMENTS,
    MAX_FRAGMENTS,
    MAX_PARTS,
    FrameParser,
    ProtocolViolation,
)
from fastapi_ws_stabilizer.wire.deflate import deflate_message
from fastapi_ws_stabilizer.wire.rfc6455 import BINARY, CLOSE, CONTINUATION, PING, PONG, RSV1, TEXT
from tests.support.wire_client import fragments, frame

LIMIT = 70_000


def parsed(*reads: bytes, limit: int = LIMIT, window_bits: int | None = None) -> list[Any]:
    """Return the messages and control frames in some reads, with the code of a violation at the end."""
    parser = FrameParser(limit, window_bits)
    found: list[Any] = []
    try:
        for read in reads:
            parser.feed(read)
            while (one := parser.next_frame()) is not None:
                if one[0] != FRAGMENTS:
                    found.append(one)
    except ProtocolViolation as violation:
        found.append(violation.code)
    return found


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536])
def test_frame_of_each_length_is_returned(size: int) -> None:
    """A frame is returned once, whole, with each form of its length, and nothing is left."""
    data = frame(BINARY, bytes(size)) + frame(TEXT, b"x" * size)
    parser = FrameParser(LIMIT, None)
    parser.feed(data)
    assert parser.next_frame() == (BINARY, bytes(size))
    assert parser.unparsed_bytes == len(data) // 2
    assert parser.next_frame() == (TEXT, "x" * size)
    assert parser.next_frame() is None
    assert parser.unparsed_bytes == 0


def test_read_of_many_fragments_is_parsed_in_steps() -> None:
    """The parser returns after `MAX_FRAGMENTS` fragments of a message, and goes on with the next call."""
    data = frame(TEXT, b"a", fin=False) + 2 * MAX_FRAGMENTS * frame(CONTINUATION, b"b", fin=False) + frame(CONTINUATION)
    parser = FrameParser(LIMIT, None)
    parser.feed(data)
    steps = [parser.next_frame() for _ in range(3)]
    assert steps == [(FRAGMENTS, b"")] * 2 + [(TEXT, "a" + "b" * 2 * MAX_FRAGMENTS)]


def test_message_of_many_tiny_fragments_has_few_parts() -> None:
    """A client that sends each byte in a fragment of its own does not make the server store each byte."""
    parser = FrameParser(LIMIT, None)
    parser.feed(frame(BINARY, b"0", fin=False))
    for _ in range(3 * MAX_PARTS):
        parser.feed(frame(CONTINUATION, b"1", fin=False))
        assert parser.next_frame() is None
        assert len(parser._parts) <= MAX_PARTS
    parser.feed(frame(CONTINUATION))
    assert parser.next_frame() == (BINARY, b"0" + b"1" * 3 * MAX_PARTS)


def test_unfinished_frame_stores_no_header_twice() -> None:
    """What has arrived of a large frame is taken as it arrives, and does not wait to be parsed."""
    parser = FrameParser(LIMIT, None)
    whole = frame(BINARY, bytes(60_000))
    for at in range(0, len(whole) - 1000, 1000):
        parser.feed(whole[at : at + 1000])
        assert parser.next_frame() is None
        assert parser.unparsed_bytes == 0


def test_compacted_parser_keeps_unparsed_bytes() -> None:
    """`compact` drops the bytes that are parsed, and no others."""
    parser = FrameParser(1000, None)
    data = frame(TEXT, b"one") + frame(TEXT, b"two")
    parser.feed(data[:-2])
    assert parser.next_frame() is not None
    parser.compact()
    assert parser.unparsed_bytes == len(parser._data) == len(data) // 2 - 2
    parser.feed(data[-2:])
    assert parser.next_frame() == (TEXT, "two")
    parser.compact()
    assert parser._data == b""


def test_ended_parser_returns_nothing() -> None:
    """After its end the parser ignores what waits and what comes."""
    parser = FrameParser(LIMIT, None)
    parser.feed(frame(TEXT, b"a") + frame(TEXT, b"b"))
    assert parser.next_frame() == (TEXT, "a")
    parser.end()
    assert parser.next_frame() is None
    parser.feed(frame(TEXT, b"c"))
    assert parser.next_frame() is None
    assert parser.unparsed_bytes == 0


def test_lowered_limit_holds_for_message_in_progress() -> None:
    """A lower limit fails the message whose first fragment exceeds it already."""
    data = random.Random(1).randbytes(3000)
    for window_bits, rsv, payload in ((None, 0, data), (15, RSV1, deflate_message(data, 15))):
        first, second = fragments(BINARY, [payload[:2000], payload[2000:]], rsv=rsv)
        parser = FrameParser(LIMIT, window_bits)
        parser.feed(first)
        assert parser.next_frame() is None
        parser.max_message_bytes = 1000
        parser.feed(second)
        with pytest.raises(ProtocolViolation, match="1009"):
            parser.next_frame()


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        pytest.param([frame(TEXT, b"a"), frame(3)], [(TEXT, "a"), 1002], id="opcode"),
        pytest.param([frame(TEXT, b"a"), frame(TEXT, b"\xff")], [(TEXT, "a"), 1007], id="UTF-8"),
        pytest.param([frame(TEXT, b"a"), frame(BINARY, announced=LIMIT + 1)], [(TEXT, "a"), 1009], id="size"),
        pytest.param([frame(TEXT, b"a"), frame(BINARY, announced=1 << 63)], [(TEXT, "a"), 1002], id="length"),
        pytest.param([frame(PING, b"a"), frame(TEXT, mask=None)], [(PING, b"a"), 1002], id="mask"),
        pytest.param([frame(CLOSE, b"\x03\xe8"), frame(PONG, rsv=RSV1)], [(CLOSE, b"\x03\xe8"), 1002], id="rsv"),
        pytest.param([frame(TEXT, b"\xf4", fin=False), frame(CONTINUATION, b"\x90", fin=False)], [1007], id="fragment"),
        pytest.param([frame(TEXT, b"\xf4\x90\x80\x80")[:8]], [1007], id="unfinished frame"),
        pytest.param([frame(TEXT, b"\xf4\x8f")[:7]], [], id="nothing invalid yet"),
        pytest.param([frame(PING, bytes(126))[:2]], [1002], id="long ping"),
        pytest.param([frame(PING, fin=False)[:2]], [1002], id="fragmented ping"),
    ],
)
def test_valid_frames_before_invalid_one_are_returned(frames: list[bytes], expected: list[Any]) -> None:
    """An invalid frame raises with its code as soon as it shows, after what came before it."""
    assert parsed(b"".join(frames)) == expected


OPCODES = st.sampled_from([CONTINUATION, TEXT, TEXT, BINARY, CLOSE, PING, PONG, 3, 11])
PAYLOADS = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=80).map(str.encode),
    st.sampled_from([b"", b"x" * 126, b"\xf4\x8f\xbf\xbf" * 100, deflate_message(b"hello" * 50, 15), b"\xed\xa0\x80"]),
)
FRAMES = st.lists(
    st.builds(
        frame,
        OPCODES,
        PAYLOADS,
        fin=st.sampled_from([True, True, False]),
        rsv=st.sampled_from([0, 0, 0, RSV1]),
        mask=st.binary(min_size=4, max_size=4),
    ),
    max_size=6,
).map(b"".join)


@given(st.one_of(FRAMES, st.binary(max_size=64)), st.lists(st.integers(0, 600)), st.sampled_from([None, 9, 15]))
@example(b"\xc1\x84\x00\x00\x00\x00j\x00\x00\x00", [], 9)  # neither valid UTF-8 nor valid deflate
def test_cuts_do_not_change_result(data: bytes, cuts: list[int], window_bits: int | None) -> None:
    """Any bytes have the same result in one read, in any pieces, and byte by byte.

    If a compressed message has several faults, the code depends on which one the parser meets first.
    """

    def result(*reads: bytes) -> list[Any]:
        found = parsed(*reads, limit=300, window_bits=window_bits)
        return ["failed" if window_bits and isinstance(one, int) else one for one in found]

    whole = result(data)
    borders = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert result(*(data[a:b] for a, b in pairwise(borders))) == whole
    assert result(*(bytes([byte]) for byte in data)) == whole


def messages_of_websockets(data: bytes) -> list[Any]:
    """Return what the parser of `websockets` makes of some bytes: messages, and the code of a violation at the end."""
    conn = ServerProtocol(state=State.OPEN, max_size=LIMIT)
    conn.receive_data(data)
    found: list[Any] = []
    parts: list[bytes] = []
    kind = 0
    for event in conn.events_received():
        assert not hasattr(event, "path")
        if event.opcode >= CLOSE:
            found.append((int(event.opcode), bytes(event.data)))
            continue
        if event.opcode:
            kind, parts = int(event.opcode), []
        parts.append(bytes(event.data))
        if event.fin:
            payload = b"".join(parts)
            try:
                found.append((kind, payload.decode() if kind == TEXT else payload))
            except UnicodeDecodeError:
                return [*found, 1007]
    if conn.parser_exc is not None:
        assert conn.close_sent is not None
        found.append(int(conn.close_sent.code))
    return found


@given(FRAMES)
def test_frames_are_read_as_by_websockets(data: bytes) -> None:
    """Until the first close frame, frames are read as by the parser of `websockets`, but invalid text fails earlier."""
    ours, theirs = parsed(data), messages_of_websockets(data)
    end = next((n for n, one in enumerate(ours) if one == 1007 or (isinstance(one, tuple) and one[0] == CLOSE)), None)
    assert ours[:end] == theirs[: end if end is not None else None]


def test_header_is_read_at_any_offset() -> None:
    """A header is read wherever it begins in a read, also behind a partial one."""
    data = b"".join(frame(BINARY, struct.pack("!I", number) * (number % 70)) for number in range(300))
    expected = [(BINARY, struct.pack("!I", number) * (number % 70)) for number in range(300)]
    for size in (1, 3, 17, 400, len(data)):
        assert parsed(*(data[at : at + size] for at in range(0, len(data), size))) == expected
