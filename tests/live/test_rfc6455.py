"""RFC 6455 on the protocol class: valid input works, and a violation ends its connection and no other."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.server import LiveServer, until
from tests.support.wire_client import (
    BINARY,
    CLOSE,
    CONTINUATION,
    KIND,
    NO_UVICORN_PINGS,
    PING,
    PONG,
    RSV1,
    RSV2,
    RSV3,
    TEXT,
    Frame,
    PeakMemory,
    WireClient,
    Witness,
    close_frame,
    connect,
    fragments,
    frame,
    quiet_server,
)

Serve = Callable[..., LiveServer]

pytestmark = pytest.mark.usefixtures("witness_is_unaffected")

MAX_SIZE = 100_000
INBOX = 16
SIZES = [0, 1, 125, 126, 127, 65_535, 65_536, 65_537]
KINDS = pytest.mark.parametrize("opcode", [TEXT, BINARY], ids=["text", "binary"])


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """One server for all tests of the module."""
    config = {"max_message_size": MAX_SIZE, "inbox_max_messages": INBOX, "inbox_max_bytes": 1 << 20}
    with quiet_server("--ws-max-size", str(MAX_SIZE), **config) as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[WireClient]:
    """WebSocket on the echo route."""
    with connect(server) as client:
        yield client


def text_of(size: int) -> bytes:
    return (b"0123456789abcdefghijklmnopqrstuvwxyz" * (size // 36 + 1))[:size]


# ── 5.2 and 5.3: framing ──


@KINDS
@pytest.mark.parametrize("size", SIZES)
def test_payload_at_each_length_boundary_is_echoed(client: WireClient, opcode: int, size: int) -> None:
    """Payloads at each boundary of the length field are read and written (5.2)."""
    client.write(frame(opcode, text_of(size)))
    assert client.echoed(opcode, text_of(size))


@pytest.mark.parametrize("mask", [bytes(4), b"\xff" * 4, b"\x00\x00\x00\x01", b"\x80\x00\x00\x00"], ids=bytes.hex)
def test_any_masking_key_is_removed(client: WireClient, mask: bytes) -> None:
    """The payload is unmasked with the key of its own frame, at every length modulo four (5.3)."""
    for size in range(9):
        client.write(frame(BINARY, text_of(size), mask=mask))
        assert client.echoed(BINARY, text_of(size))


@pytest.mark.parametrize(
    ("opcode", "size", "length_bits"),
    [
        (TEXT, 0, 16),
        (TEXT, 0, 64),
        (TEXT, 5, 16),
        (TEXT, 125, 64),
        (BINARY, 126, 64),
        (BINARY, 65_535, 64),
        (PING, 5, 16),
    ],
)
def test_non_minimal_length_is_read_or_fails_1002(client: WireClient, opcode: int, size: int, length_bits: int) -> None:
    """A length that is not in its shortest form is read, or fails with 1002 (5.2)."""
    client.write(frame(opcode, text_of(size), length_bits=length_bits))
    found = client.next_frame()
    if found.opcode == CLOSE:
        assert found.payload[:2] == b"\x03\xea"
        client.eof()
    else:
        assert found == Frame(PONG if opcode == PING else opcode, text_of(size))


@pytest.mark.parametrize("length", [1 << 63, (1 << 63) + 5, (1 << 64) - 1])
def test_length_with_top_bit_set_fails_connection(client: WireClient, length: int) -> None:
    """A 64-bit length with its most significant bit set fails the connection at the header (5.2)."""
    client.write(frame(BINARY, b"rest", announced=length))
    assert client.close_info()[0] in (1002, 1009)


@pytest.mark.parametrize("opcode", [CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG])
@pytest.mark.parametrize("payload", [b"", b"hello"], ids=["empty", "hello"])
def test_unmasked_frame_fails_with_1002(client: WireClient, opcode: int, payload: bytes) -> None:
    """An unmasked frame of a client fails with 1002 (5.1)."""
    client.write(frame(opcode, payload, mask=None))
    assert client.close_info()[0] == 1002


@pytest.mark.parametrize("opcode", [TEXT, BINARY, CLOSE, PING, PONG])
@pytest.mark.parametrize("rsv", [RSV1, RSV2, RSV3, RSV1 | RSV2, RSV1 | RSV3, RSV2 | RSV3, RSV1 | RSV2 | RSV3], ids=hex)
def test_reserved_bit_without_extension_fails_with_1002(client: WireClient, opcode: int, rsv: int) -> None:
    """A reserved bit that no extension defines fails with 1002 (5.2)."""
    client.write(frame(opcode, rsv=rsv))
    assert client.close_info()[0] == 1002


@pytest.mark.parametrize("rsv", [RSV1, RSV2, RSV3], ids=hex)
def test_reserved_bit_on_continuation_fails_with_1002(client: WireClient, rsv: int) -> None:
    """A reserved bit on a continuation frame fails with 1002 (5.2)."""
    client.write(frame(TEXT, b"a", fin=False), frame(CONTINUATION, b"b", rsv=rsv))
    assert client.close_info()[0] == 1002


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
@pytest.mark.parametrize(("payload", "fin"), [(b"", True), (b"hello", True), (b"hello", False)])
def test_reserved_opcode_fails_with_1002(client: WireClient, opcode: int, payload: bytes, fin: bool) -> None:
    """An unknown opcode fails with 1002 (5.2)."""
    client.write(frame(opcode, payload, fin=fin))
    assert client.close_info()[0] == 1002


def test_invalid_frame_behind_messages_fails_with_1002(client: WireClient) -> None:
    """Messages and pings before a broken frame are answered, and it fails with 1002 (7.1.7)."""
    client.write(frame(TEXT, b"first"), frame(PING, b"second"), frame(3), frame(TEXT, b"never"))
    assert sorted([client.next_frame(), client.next_frame()]) == [Frame(TEXT, b"first"), Frame(PONG, b"second")]
    assert client.close_info()[0] == 1002


# ── 5.4: fragmentation ──

PARTS = {
    "two": [b"hel", b"lo"],
    "three": [b"hel", b"lo ", b"world"],
    "hundred": [b"%02d" % number for number in range(100)],
    "ten thousand single bytes": [b"x"] * 10_000,
    "ten thousand empty": [b"a", *[b""] * 10_000, b"z"],
    "first empty": [b"", b"hel", b"lo"],
    "middle empty": [b"hel", b"", b"lo"],
    "last empty": [b"hel", b"lo", b""],
    "all empty": [b"", b"", b""],
    "of all lengths": [text_of(size) for size in (125, 126, 127, 65_535)],
}


@KINDS
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_fragments_are_reassembled(client: WireClient, opcode: int, parts: list[bytes]) -> None:
    """The fragments of a message form one message, of the type of the first (5.4)."""
    client.write(*fragments(opcode, parts))
    assert client.echoed(opcode, b"".join(parts))
    client.write(frame(opcode, b"next"))
    assert client.echoed(opcode, b"next")


@KINDS
def test_ping_between_fragments_is_answered_at_once(client: WireClient, opcode: int) -> None:
    """A ping between fragments is answered before the last fragment arrives (5.4)."""
    first, middle, last = fragments(opcode, [b"one ", b"two ", b"three"])
    client.write(first, frame(PING, b"a"))
    assert client.next_frame() == Frame(PONG, b"a")
    client.write(middle, frame(PONG, b"unsolicited"), frame(PING))
    assert client.next_frame() == Frame(PONG, b"")
    client.write(last)
    assert client.echoed(opcode, b"one two three")


@pytest.mark.parametrize("fin", [True, False])
@pytest.mark.parametrize(
    "before",
    [[], [frame(TEXT, b"whole")], fragments(TEXT, [b"who", b"le"])],
    ids=["at first", "after a message", "after fragments"],
)
def test_continuation_without_start_fails_with_1002(client: WireClient, before: list[bytes], fin: bool) -> None:
    """A continuation frame without a started message fails with 1002 (5.4)."""
    client.write(*before)
    if before:
        assert client.echoed(TEXT, b"whole")
    client.write(frame(CONTINUATION, b"?", fin=fin))
    assert client.close_info()[0] == 1002


@KINDS
@pytest.mark.parametrize("fin", [True, False])
@pytest.mark.parametrize("start", [TEXT, BINARY])
def test_interleaved_messages_fail_with_1002(client: WireClient, start: int, opcode: int, fin: bool) -> None:
    """Interleaved fragments of two messages fail with 1002 (5.4)."""
    client.write(frame(start, b"one", fin=False), frame(opcode, b"two", fin=fin))
    assert client.close_info()[0] == 1002


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
def test_fragmented_control_frame_fails_with_1002(client: WireClient, opcode: int) -> None:
    """A fragmented control frame fails with 1002 at its first fragment (5.5)."""
    client.write(frame(opcode, b"", fin=False))
    assert client.close_info()[0] == 1002


# ── 7.4.1: messages that are too big ──


@KINDS
@pytest.mark.parametrize("cut", [1, 3], ids=["one frame", "three fragments"])
def test_message_at_size_limit_is_echoed(client: WireClient, opcode: int, cut: int) -> None:
    """A message of exactly the limit is accepted, in any number of fragments (7.4.1)."""
    payload = text_of(MAX_SIZE)
    size = MAX_SIZE // cut + 1
    client.write(*fragments(opcode, [payload[at : at + size] for at in range(0, MAX_SIZE, size)]))
    assert client.echoed(opcode, payload)


@KINDS
@pytest.mark.parametrize("length", [MAX_SIZE + 1, 1 << 31, 1 << 32, (1 << 63) - 1])
def test_oversized_frame_header_closes_with_1009(client: WireClient, opcode: int, length: int) -> None:
    """A frame that announces more than the limit closes with 1009 before its payload arrives (7.4.1)."""
    client.write(frame(opcode, b"begin", announced=length))
    assert client.close_info()[0] == 1009


@KINDS
def test_message_one_byte_over_limit_fails_with_1009(client: WireClient, opcode: int) -> None:
    """A message one byte over the limit closes with 1009 (7.4.1)."""
    client.write(frame(opcode, text_of(MAX_SIZE + 1)))
    assert client.close_info()[0] == 1009


@KINDS
def test_oversized_fragments_close_1009_before_last_fragment(client: WireClient, opcode: int) -> None:
    """Fragments count together, and the fragment over the limit closes with 1009 (7.4.1)."""
    parts = [text_of(MAX_SIZE // 2)] * 2
    client.write(*(frame(opcode if not n else CONTINUATION, part, fin=False) for n, part in enumerate(parts)))
    client.write(frame(PING))
    assert client.next_frame() == Frame(PONG, b"")
    client.write(frame(CONTINUATION, b"!", fin=False))
    assert client.close_info()[0] == 1009


@KINDS
def test_ping_does_not_count_against_message_limit(client: WireClient, opcode: int) -> None:
    """Control frames between fragments do not count against the limit of the message (5.4)."""
    client.write(frame(opcode, text_of(MAX_SIZE), fin=False), frame(PING, b"in between"))
    assert client.next_frame() == Frame(PONG, b"in between")
    client.write(frame(CONTINUATION))
    assert client.echoed(opcode, text_of(MAX_SIZE))


@pytest.fixture(scope="module")
def wide_server() -> Iterator[LiveServer]:
    """Server on which uvicorn's own limit is wider than the library's."""
    with quiet_server("--ws-max-size", "1000000", max_message_size=1000) as server:
        yield server


@pytest.mark.parametrize(
    ("opcode", "good", "bad"),
    [
        (TEXT, b"x" * 1000, b"x" * 1001),
        (BINARY, b"\xff" * 1000, b"\xff" * 1001),
        (TEXT, "é".encode() * 500, "é".encode() * 501),
        (TEXT, "𝄞".encode() * 250, "𝄞".encode() * 250 + b"x"),
    ],
    ids=["ascii", "binary", "two bytes each", "four bytes each"],
)
def test_max_message_size_counts_payload_bytes(wide_server: LiveServer, opcode: int, good: bytes, bad: bytes) -> None:
    """`max_message_size` counts payload bytes, and closes with 1009 where uvicorn's own limit is wider."""
    with connect(wide_server) as client:
        client.write(*fragments(opcode, [good[:400], good[400:]]))
        assert client.echoed(opcode, good)
        client.write(frame(opcode, bad))
        assert client.close_info(answer=True)[0] == 1009
    with connect(wide_server) as client:
        client.write(*fragments(opcode, [bad[:400], bad[400:]]))
        assert client.close_info(answer=True)[0] == 1009
    assert not wide_server.errors()


# ── frames and segments of TCP ──

MIXED = [
    *fragments(TEXT, ["κό".encode(), b"\xcf", b"\x83" + "με".encode()]),
    frame(PING, b"between"),
    frame(BINARY, bytes(range(200))),
    frame(TEXT, b""),
    frame(PING),
]
MIXED_ANSWERS = [
    Frame(TEXT, "κόσμε".encode()),
    Frame(PONG, b"between"),
    Frame(BINARY, bytes(range(200))),
    Frame(TEXT, b""),
    Frame(PONG, b""),
]


def test_frames_sent_byte_by_byte_are_read(client: WireClient) -> None:
    """Frames are read, whatever TCP segments carry them (5.2)."""
    client.drip(*MIXED)
    found = [client.next_frame() for _ in MIXED_ANSWERS]
    assert [f for f in found if f.opcode != PONG] == [f for f in MIXED_ANSWERS if f.opcode != PONG]
    assert [f for f in found if f.opcode == PONG] == [f for f in MIXED_ANSWERS if f.opcode == PONG]


@pytest.mark.parametrize("opcode", [TEXT, BINARY, PING])
@pytest.mark.parametrize("size", [0, 5, 125, 126])
def test_frame_may_be_split_at_every_byte(client: WireClient, witness: Witness, opcode: int, size: int) -> None:
    """A frame is read when segments split it anywhere in its header, key or payload (5.2)."""
    size = min(size, 125) if opcode == PING else size
    whole = frame(opcode, text_of(size))
    for at in range(1, len(whole)):
        client.write(whole[:at])
        witness.barrier()
        client.write(whole[at:])
        assert client.next_frame() == Frame(PONG if opcode == PING else opcode, text_of(size))


@pytest.mark.parametrize("size", [65_535, 65_536])
def test_long_frame_header_may_be_split(client: WireClient, witness: Witness, size: int) -> None:
    """A header with a 16-bit or 64-bit length is read when segments split it anywhere (5.2)."""
    whole = frame(BINARY, text_of(size))
    for at in range(1, 16):
        client.write(whole[:at])
        witness.barrier()
        client.write(whole[at:])
        assert client.echoed(BINARY, text_of(size))


def test_two_frames_may_be_split_at_every_byte(client: WireClient, witness: Witness) -> None:
    """A segment may hold the end of one frame and the beginning of the next (5.2)."""
    whole = frame(TEXT, b"first") + frame(BINARY, b"second")
    for at in range(1, len(whole)):
        client.write(whole[:at])
        witness.barrier()
        client.write(whole[at:])
        assert client.echoed(TEXT, b"first")
        assert client.echoed(BINARY, b"second")


def test_all_frames_in_one_segment_are_read(client: WireClient) -> None:
    """Messages in one segment, more than the inbox holds, are all delivered in order (5.2)."""
    messages = [b"message %d" % number for number in range(20 * INBOX)]
    client.write(*(frame(TEXT, message) for message in messages))
    assert [client.message().payload for _ in messages] == messages


def test_connection_lost_anywhere_leaves_nothing_behind(server: LiveServer, witness: Witness) -> None:
    """TCP may end or reset inside a header, a payload or a fragmented message, and leaves nothing behind (7.1.1)."""
    whole = frame(TEXT, b"hello", fin=False) + frame(CONTINUATION, text_of(200))
    for at in range(0, len(whole), 3):
        with connect(server) as half_closed, connect(server) as reset:
            half_closed.write(whole[:at])
            half_closed.socket.shutdown(socket.SHUT_WR)
            while half_closed.socket.recv(4096):  # a close frame, or nothing
                pass
            reset.write(whole[:at])
            reset.reset()
    witness.check()


# ── 8.1: UTF-8 ──

INVALID_UTF8 = {
    "lone continuation byte": b"a\x80b",
    "invalid byte": b"a\xffb",
    "overlong slash of two": b"\xc0\xaf",
    "overlong slash of three": b"\xe0\x80\xaf",
    "overlong slash of four": b"\xf0\x80\x80\xaf",
    "overlong null": b"\xc0\x80",
    "highest overlong of two": b"\xc1\xbf",
    "highest overlong of three": b"\xe0\x9f\xbf",
    "highest overlong of four": b"\xf0\x8f\xbf\xbf",
    "lowest surrogate": b"\xed\xa0\x80",
    "highest surrogate": b"\xed\xbf\xbf",
    "pair of surrogates": b"\xed\xa0\xbd\xed\xb8\x80",
    "above U+10FFFF": b"\xf4\x90\x80\x80",
    "five bytes": b"\xf8\x88\x80\x80\x80",
    "six bytes": b"\xfc\x84\x80\x80\x80\x80",
    "ends after one of two": b"abc\xce",
    "ends after two of three": b"abc\xe2\x82",
    "ends after three of four": b"abc\xf0\x9d\x84",
    "cut short by ASCII": b"\xe2\x82abc",
}
VALID_UTF8 = {
    "Greek": "κόσμε",
    "null": "a\0b",
    "borders of one and two bytes": "\x7f\x80",
    "borders of two and three": "\u07ff\u0800",
    "around the surrogates": "\ud7ff\ue000",
    "borders of three and four": "\uffff\U00010000",
    "last code point": "\U0010ffff",
    "noncharacters": "\ufffe\ufdd0\U0001fffe",
    "byte order mark": "\ufeffa",
}


@pytest.mark.parametrize("payload", INVALID_UTF8.values(), ids=INVALID_UTF8)
def test_invalid_utf8_text_fails_with_1007(client: WireClient, payload: bytes) -> None:
    """Text that is not UTF-8 fails with 1007 (8.1)."""
    client.write(frame(TEXT, payload))
    assert client.close_info()[0] == 1007


@pytest.mark.parametrize("payload", INVALID_UTF8.values(), ids=INVALID_UTF8)
def test_invalid_utf8_in_binary_message_is_accepted(client: WireClient, payload: bytes) -> None:
    """A binary message may hold any bytes (5.6)."""
    client.write(frame(BINARY, payload), *fragments(BINARY, [payload[:1], payload[1:]]))
    assert client.echoed(BINARY, payload)
    assert client.echoed(BINARY, payload)


@pytest.mark.parametrize("payload", INVALID_UTF8.values(), ids=INVALID_UTF8)
def test_invalid_utf8_across_fragments_fails_with_1007(server: LiveServer, payload: bytes) -> None:
    """UTF-8 is checked over the whole message, so fragments do not hide invalid bytes (8.1)."""
    for at in range(len(payload) + 1):
        with connect(server) as client:
            client.write(*fragments(TEXT, [payload[:at], payload[at:]]))
            assert client.close_info()[0] == 1007


@pytest.mark.parametrize("text", VALID_UTF8.values(), ids=VALID_UTF8)
def test_code_point_may_be_split_across_fragments(client: WireClient, text: str) -> None:
    """A code point may begin in one fragment and end in another (5.6)."""
    payload = text.encode()
    for at in range(len(payload) + 1):
        client.write(*fragments(TEXT, [payload[:at], b"", payload[at:]]))
        assert client.echoed(TEXT, payload)
    client.write(*fragments(TEXT, [bytes([byte]) for byte in payload]))
    assert client.echoed(TEXT, payload)


# ── 5.5.2 and 5.5.3: ping and pong ──


def test_ping_of_every_size_is_answered(client: WireClient) -> None:
    """A pong carries the payload of its ping, 0 to 125 bytes of any value (5.5.3)."""
    for size in range(126):
        payload = bytes(255 - number for number in range(size))
        client.write(frame(PING, payload))
        assert client.next_frame() == Frame(PONG, payload)


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
@pytest.mark.parametrize("size", [126, 127, 65_536])
def test_oversized_control_frame_fails_with_1002(client: WireClient, opcode: int, size: int) -> None:
    """A control frame over 125 bytes fails with 1002 (5.5)."""
    client.write(frame(opcode, b"\x03\xe8" + text_of(size - 2)))
    assert client.close_info()[0] == 1002


def test_pings_in_one_segment_are_answered_in_order(client: WireClient) -> None:
    """Of several pings at least the last is answered, and all answers are in order (5.5.3)."""
    client.write(*(frame(PING, bytes([number])) for number in range(100)), frame(TEXT, b"done"))
    pongs: list[Frame] = []
    while b"\x63" not in [pong.payload for pong in pongs]:
        found = client.next_frame()
        if found.opcode == PONG:
            pongs.append(found)
        else:
            assert found == Frame(TEXT, b"done")
    assert pongs == sorted(pongs)


@pytest.mark.parametrize("payload", [b"", b"\x00\xff", b"x" * 125], ids=["empty", "bytes", "longest"])
def test_unsolicited_pong_is_ignored(client: WireClient, payload: bytes) -> None:
    """An unsolicited pong is ignored (5.5.3)."""
    client.write(frame(PONG, payload), frame(PONG, payload), frame(TEXT, b"after"))
    assert client.echoed(TEXT, b"after")


def json_message(kind: str, **fields: object) -> bytes:
    return frame(TEXT, json.dumps({"type": kind, **fields}).encode())


WAITING = pytest.mark.parametrize("waiting", [0, 1, INBOX - 1], ids=["none", "one", "almost full"])


@WAITING
def test_ping_is_answered_while_handler_is_busy(server: LiveServer, waiting: int) -> None:
    """A ping is answered while a handler is busy, however many messages wait, and none of them is lost (5.5.2)."""
    with connect(server, "/run") as client:
        client.write(json_message("wait", seconds=0.5, name="slow"))
        client.write(*(json_message("echo", number=number) for number in range(waiting)))
        for payload in (b"first", b"second"):
            client.write(frame(PING, payload))
            assert client.next_frame() == Frame(PONG, payload)
        assert client.echoed(TEXT, b"slow")
        assert [json.loads(client.message().payload)["number"] for _ in range(waiting)] == list(range(waiting))


@WAITING
def test_ping_is_answered_when_endpoint_does_not_read(server: LiveServer, witness: Witness, waiting: int) -> None:
    """A ping is answered for an endpoint that does not read, with its messages and after them (5.5.2)."""
    with connect(server, "/idle") as client:
        client.write(*(frame(TEXT, b"unread %d" % number) for number in range(waiting)), frame(PING, b"with them"))
        assert client.next_frame() == Frame(PONG, b"with them")
        witness.barrier()
        client.write(frame(PING, b"later"))
        assert client.next_frame() == Frame(PONG, b"later")


@pytest.mark.alone
@WAITING
@pytest.mark.parametrize("path", ["/idle", "/run"], ids=["no reader", "busy handler"])
def test_close_frame_is_answered_at_once(server: LiveServer, witness: Witness, path: str, waiting: int) -> None:
    """A close frame is answered at once, whatever waits to be read before it (5.5.1)."""
    with connect(server, path) as client:
        client.write(json_message("wait", seconds=1, name="slow"))
        client.write(*(json_message("echo", number=number) for number in range(waiting)))
        witness.barrier()
        started = time.monotonic()
        client.write(close_frame(4001, b"bye"))
        assert client.close_info() == (4001, "bye")
        assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    ("path", "flood"),
    [
        ("/idle", frame(BINARY, bytes(50_000))),
        ("/idle", frame(TEXT, b"x") * 10_000),
        ("/echo", frame(BINARY, bytes(50_000))),
        ("/echo", frame(PING, bytes(125)) * 500),
    ],
    ids=["long messages", "short messages", "echoes", "pings"],
)
def test_flood_uses_bounded_memory(server: LiveServer, path: str, flood: bytes) -> None:
    """Data that the endpoint or the client does not read is held up to a limit only."""
    with connect(server, path) as client:
        memory = PeakMemory(server)
        client.socket.settimeout(0.5)
        try:
            for _ in range((32 << 20) // len(flood)):
                client.write(flood)
        except (TimeoutError, ConnectionError):  # TCP pushes back, or the connection ends
            pass
        assert memory.growth() < 12 << 20


# ── 5.5.1 and 7: closing ──


def test_empty_close_frame_is_answered(client: WireClient) -> None:
    """A close frame without a code is answered, and the server ends TCP (5.5.1, 7.1.1)."""
    client.write(close_frame())
    assert client.close_info()[0] in (None, 1000)


@pytest.mark.parametrize("code", [*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999])
def test_valid_close_code_is_echoed(client: WireClient, code: int) -> None:
    """The answer to a close frame has its code, and the server ends TCP (5.5.1, 7.4)."""
    client.write(close_frame(code))
    assert client.close_info()[0] == code


@pytest.mark.parametrize(
    "reason", [b"x", "tschüß".encode(), b"x" * 123, "𝄞".encode() * 30 + b"xyz"], ids=["one", "UTF-8", "longest", "both"]
)
def test_close_frame_with_reason_is_answered(client: WireClient, reason: bytes) -> None:
    """A close frame with a reason of up to 123 bytes of UTF-8 is answered (5.5.1)."""
    client.write(close_frame(1000, reason))
    code, text = client.close_info()
    assert code == 1000
    assert text in ("", reason.decode())


@pytest.mark.parametrize("code", [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1099, 1100, 2000, 2999, 5000, 9999, 65_535])
@pytest.mark.parametrize("reason", [b"", b"why"], ids=["bare", "reason"])
def test_invalid_close_code_fails_with_1002(client: WireClient, code: int, reason: bytes) -> None:
    """A close code that is reserved, unassigned or out of range fails with 1002 (7.4)."""
    client.write(close_frame(code, reason))
    assert client.close_info()[0] == 1002


@pytest.mark.parametrize("payload", [b"\x03", b"\xff"], ids=bytes.hex)
def test_one_byte_close_frame_fails_with_1002(client: WireClient, payload: bytes) -> None:
    """A close frame with a body of one byte fails with 1002 (5.5.1)."""
    client.write(frame(CLOSE, payload))
    assert client.close_info()[0] == 1002


@pytest.mark.parametrize("reason", INVALID_UTF8.values(), ids=INVALID_UTF8)
def test_invalid_utf8_close_reason_fails_connection(client: WireClient, reason: bytes) -> None:
    """A close reason that is not UTF-8 fails the connection (5.5.1, 8.1)."""
    client.write(close_frame(1000, reason))
    assert client.close_info()[0] in (1002, 1007)


@pytest.mark.parametrize(
    "after",
    [
        [frame(TEXT, b"late")],
        [frame(PING, b"late")],
        [close_frame(1001)],
        [frame(3)],
        [frame(TEXT, b"\xff")],
        [b"no frame at all"],
        [frame(BINARY, b"late")] * 100,
    ],
    ids=["text", "ping", "close", "bad opcode", "bad text", "garbage", "many"],
)
@pytest.mark.parametrize("together", [True, False], ids=["one segment", "later"])
def test_data_after_close_frame_is_ignored(
    server: LiveServer, client: WireClient, after: list[bytes], together: bool
) -> None:
    """Data after a close frame is neither delivered nor answered (5.5.1)."""
    client.write(frame(TEXT, b"in time"))
    assert client.echoed(TEXT, b"in time")
    received = server.get("/ws-stats/")["messages_received"]
    try:
        if together:
            client.write(close_frame(1000), *after)
        else:
            client.write(close_frame(1000))
            client.write(*after)
    except ConnectionError:
        assert not together
    assert client.close_info()[0] == 1000
    assert server.get("/ws-stats/")["messages_received"] == received


def test_close_frame_inside_fragmented_message_closes(server: LiveServer, client: WireClient) -> None:
    """A close frame between fragments is answered, and the unfinished message is not delivered (5.4, 5.5.1)."""
    received = server.get("/ws-stats/")["messages_received"]
    client.write(frame(TEXT, b"cut", fin=False), close_frame(1000), frame(CONTINUATION, b" off"))
    assert client.close_info()[0] == 1000
    assert server.get("/ws-stats/")["messages_received"] == received


@pytest.mark.parametrize("code", [None, 1000, 1001, 4999])
async def test_application_gets_close_code_of_client(server: LiveServer, code: int | None) -> None:
    """The close code of a connection is that of the client's close frame, or 1005 for none (7.1.5)."""
    with connect(server) as client:
        client.write(close_frame(code))
        client.close_info()
        await server.until_event(f"disconnect {client.name} client_close {code or 1005}")


async def test_application_gets_protocol_error_cause(server: LiveServer) -> None:
    """A connection that the server fails has the cause `policy` instead of `client_close` (7.1.7)."""
    with connect(server) as client:
        client.write(frame(3))
        assert client.close_info()[0] == 1002
        await server.until_event(f"disconnect {client.name} policy 1002")


@pytest.mark.parametrize("code", [1000, 1013, 3000, 4001])
def test_server_sends_close_frame_and_ends_tcp_first(server: LiveServer, code: int) -> None:
    """A close by the application sends one close frame, and the client's answer ends TCP (7.1.2)."""
    with connect(server, f"/close?code={code}&reason=bye") as client:
        assert client.close_info(answer=True) == (code, "bye")


def test_simultaneous_close_frames_answer_each_other(server: LiveServer) -> None:
    """Close frames that cross each other answer each other (7.1.2)."""
    with WireClient(server.port) as client:
        client.write(client.request("/close?code=4001"))
        assert client.answer().status == 101
        client.write(close_frame(4002))
        assert client.close_info()[0] in (4001, 4002)


# ── 4: the handshake ──


def test_handshake_sent_byte_by_byte_is_accepted(server: LiveServer) -> None:
    """A handshake is read, whatever TCP segments carry it (4.2.1)."""
    with WireClient(server.port) as client:
        client.drip(client.request())
        assert client.answer().status == 101
        client.write(frame(TEXT, b"hello"))
        assert client.echoed(TEXT, b"hello")


@pytest.mark.parametrize("offered", [None, "chat", "chat, superchat"])
def test_only_offered_subprotocol_is_selected(server: LiveServer, offered: str | None) -> None:
    """The response selects only an offered subprotocol, and none without an offer (4.2.2)."""
    with WireClient(server.port) as client:
        answer = client.upgrade(headers={"Sec-WebSocket-Protocol": offered})
        assert answer.status == 101
        agreed = answer.all("Sec-WebSocket-Protocol")
        assert len(agreed) < 2
        assert set(agreed) <= set((offered or "").split(", "))


@pytest.mark.parametrize("header", ["Upgrade", "Connection"])
def test_upgrade_tokens_are_case_insensitive(server: LiveServer, header: str) -> None:
    """`websocket` and `Upgrade` are compared without case, and `Upgrade` may be one of several tokens (4.2.1)."""
    value = {"Upgrade": "WebSocket", "Connection": "keep-alive, UPGRADE"}[header]
    with WireClient(server.port) as client:
        assert client.upgrade(headers={header: value}).status == 101


@pytest.mark.parametrize("version", [None, "0", "8", "12", "14", "thirteen", ""])
def test_handshake_with_other_version_is_rejected(server: LiveServer, version: str | None) -> None:
    """A version other than 13 gets an HTTP error, and a 426 names version 13 (4.2.2)."""
    with WireClient(server.port) as client:
        answer = client.upgrade(headers={"Sec-WebSocket-Version": version})
        assert answer.status in (400, 426)
        if answer.status == 426:
            assert answer.all("Sec-WebSocket-Version") == ["13"]


@pytest.mark.parametrize("key", [None, "", "short", "c2hvcnQ=", "*" * 24, "dGhlIHNhbXBsZSBub25jZQ==dGhl"])
def test_handshake_with_invalid_key_is_rejected_with_400(server: LiveServer, key: str | None) -> None:
    """A key that is not base64 of 16 bytes gets 400 (4.2.1)."""
    with WireClient(server.port) as client:
        assert client.upgrade(headers={"Sec-WebSocket-Key": key}).status == 400


@pytest.mark.parametrize(
    "offer",
    ["permessage-deflate; ;", "permessage-deflate; =", "permessage-deflate;;", "=", ";", "a b", '"'],
)
def test_malformed_extension_offer_is_rejected_or_ignored(server: LiveServer, offer: str) -> None:
    """A malformed extension offer gets 400, or a response without extensions (9.1)."""
    with WireClient(server.port) as client:
        answer = client.upgrade(headers={"Sec-WebSocket-Extensions": offer})
        assert answer.status in (101, 400)
        assert not answer.all("Sec-WebSocket-Extensions")


def test_malformed_http_request_is_rejected(server: LiveServer) -> None:
    """A malformed request gets a response or the end of the connection, and never hangs (4.2.1)."""
    with WireClient(server.port) as client:
        try:
            assert client.upgrade(headers={"X-Delete": "\x7f"}).status in (101, 400)
        except ConnectionError:
            pass


def test_frames_before_handshake_answer_crash_nothing(server: LiveServer) -> None:
    """Frames before the handshake response are answered, lost, or end the connection, and crash nothing (4.1)."""
    with WireClient(server.port) as client:
        client.write(client.request(), frame(TEXT, b"early"), frame(PING, b"early"))
        try:
            answer = client.answer()
            if answer.status == 101:
                client.write(frame(TEXT, b"in time"))
                while (found := client.next_frame()).payload != b"in time" and found.opcode != CLOSE:
                    assert found in (Frame(TEXT, b"early"), Frame(PONG, b"early"))
        except ConnectionError:
            pass


# ── heartbeats with real ping frames ──


@pytest.fixture(scope="module")
def heartbeat_server() -> Iterator[LiveServer]:
    """Server with a short heartbeat interval."""
    config = {"heartbeat_interval": 0.3, "heartbeat_timeout": 0.6}
    with LiveServer(KIND, config=config, args=NO_UVICORN_PINGS) as server:
        yield server


@pytest.mark.alone
async def test_client_answering_pings_stays_connected(heartbeat_server: LiveServer) -> None:
    """A client that answers ping frames stays, gets no other heartbeats, and has a round trip in the stats."""
    with connect(heartbeat_server) as client:
        for _ in range(4):
            ping = client.next_frame()
            assert ping.opcode == PING
            client.write(frame(PONG, ping.payload))

        def measured() -> list[float]:
            found = heartbeat_server.get(f"/ws-stats/connections?client_id={client.name}")["connections"]
            return [c["rtt_seconds"] for c in found if c["rtt_seconds"] is not None]

        (rtt,) = await until(measured)
        assert 0 <= rtt < 0.3
        client.write(frame(TEXT, b"alive"))
        assert client.echoed(TEXT, b"alive")
    assert not heartbeat_server.errors()


@pytest.mark.alone
async def test_client_ignoring_pings_closes_with_4408(heartbeat_server: LiveServer) -> None:
    """Silence after a ping closes with 4408 after interval + timeout, without a text message before it."""
    started = time.monotonic()
    with connect(heartbeat_server) as client:
        while (found := client.next_frame()).opcode == PING:
            pass
        took = time.monotonic() - started
        assert found == Frame(CLOSE, b"\x11\x38heartbeat timeout")
        client.write(close_frame(4408))
        client.eof()
        await heartbeat_server.until_event(f"disconnect {client.name} heartbeat_timeout 4408")
    assert 0.6 <= took < 0.3 + 0.6 + 0.5
    assert not heartbeat_server.errors()


def test_unmatched_pong_is_not_measured(heartbeat_server: LiveServer) -> None:
    """A pong without a matching ping proves liveness, but is not measured as a round trip (5.5.3)."""
    with connect(heartbeat_server) as client:
        for _ in range(4):
            assert client.next_frame().opcode == PING
            client.write(frame(PONG, b"something else"))
        (found,) = heartbeat_server.get(f"/ws-stats/connections?client_id={client.name}")["connections"]
        assert found["rtt_seconds"] is None
