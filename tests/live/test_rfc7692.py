"""RFC 7692 on the protocol class: permessage-deflate within the client's offer, with bounded inflation."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from tests.support.server import LiveServer, until
from tests.support.wire_client import (
    BINARY,
    BROWSER_OFFER,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    RSV1,
    RSV2,
    RSV3,
    TEXT,
    Frame,
    PeakMemory,
    WireClient,
    close_frame,
    compressed_with,
    connect,
    deflate,
    far_repeats,
    fragments,
    frame,
    inflated_with,
    quiet_server,
)

pytestmark = pytest.mark.usefixtures("witness_is_unaffected")

MAX_SIZE = 1 << 20
KINDS = pytest.mark.parametrize("opcode", [TEXT, BINARY], ids=["text", "binary"])
LONG = far_repeats(5000)  # longer than any reasonable compression_min_bytes, and compressible
INFLATE_ERRORS = (1002, 1007)  # close codes for data that does not inflate


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """One server for all tests of the module."""
    with quiet_server("--ws-max-size", str(MAX_SIZE), max_message_size=MAX_SIZE) as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[WireClient]:
    """WebSocket on the echo route, with the offer of a browser."""
    with connect(server, offer=BROWSER_OFFER) as client:
        assert client.parameters is not None
        yield client


def noise(size: int) -> bytes:
    """Return bytes that deflate cannot shorten."""
    return random.Random(size).randbytes(size)


def compressor_of(client: WireClient) -> zlib._Compress:
    return zlib.compressobj(9, zlib.DEFLATED, -max(client.window_bits, 9))  # zlib supports no window of 8 bits


def deflated(client: WireClient, payload: bytes) -> bytes:
    """Return the payload as this client may compress it."""
    return compressed_with(compressor_of(client), payload)


@cache
def _packed_zeros(bits: int, size: int) -> bytes:
    packed = deflate(bytes(size), bits)
    assert len(packed) < size // 900
    return packed


def bomb(client: WireClient, size: int) -> bytes:
    """Return `size` zeros as this client may compress them."""
    return _packed_zeros(max(client.window_bits, 9), size)


# ── 7.1: negotiation ──


def test_browser_offer_is_accepted_without_server_context(server: LiveServer) -> None:
    """The server accepts a browser's offer, and promises to compress each message on its own (7.1.1.1)."""
    with connect(server, offer=BROWSER_OFFER) as client:
        assert client.parameters is not None
        assert client.parameters["server_no_context_takeover"] is None
        assert client.parameters.keys() <= {
            "server_no_context_takeover",
            "client_no_context_takeover",
            "server_max_window_bits",
            "client_max_window_bits",
        }
        assert 8 <= client.window_bits <= 15


@pytest.mark.parametrize("bits", range(8, 16))
@pytest.mark.parametrize("rest", ["", "; server_no_context_takeover", "; client_max_window_bits"])
def test_server_window_fits_client_offer(server: LiveServer, bits: int, rest: str) -> None:
    """The agreed server window is at most the offered one, and no distance in its frames is longer (7.1.2.1)."""
    with connect(server, offer=f"permessage-deflate; server_max_window_bits={bits}{rest}") as client:
        if bits == 8 and client.parameters is None:  # zlib cannot deflate with a window of 256 bytes
            return
        assert client.parameters is not None
        assert 8 <= int(client.parameters["server_max_window_bits"] or 0) <= bits
        for distance in (100, (1 << bits) - 300, (1 << bits) + 300, 3 << bits):
            payload = far_repeats(distance)
            client.write(frame(TEXT, payload))
            assert client.echoed(TEXT, payload)
        client.write(frame(BINARY, LONG))
        assert client.message() == (BINARY, LONG, True)


def test_inflater_rejects_distances_beyond_window() -> None:
    """A stream with a larger window does not inflate with a smaller one, so the test above can fail."""
    with pytest.raises(zlib.error):
        inflated_with(zlib.decompressobj(-10), deflate(far_repeats(1500), 15))
    assert inflated_with(zlib.decompressobj(-10), deflate(far_repeats(1500), 10)) == far_repeats(1500)


@pytest.mark.parametrize("bits", range(8, 16))
def test_client_window_fits_client_offer(server: LiveServer, bits: int) -> None:
    """The agreed client window is at most the offered one, and every distance within it inflates (7.1.2.2)."""
    with connect(server, offer=f"permessage-deflate; client_max_window_bits={bits}") as client:
        assert client.parameters is not None
        agreed = client.parameters.get("client_max_window_bits")
        assert agreed is None or 8 <= int(agreed) <= bits
        payload = far_repeats((1 << min(client.window_bits, bits)) - 300 if client.window_bits > 8 else 100)
        client.write(frame(TEXT, deflated(client, payload), rsv=RSV1))
        assert client.echoed(TEXT, payload)


def test_client_window_defaults_to_15_bits(server: LiveServer) -> None:
    """An offer without `client_max_window_bits` gets none in the response, and the window is 15 bits (7.1.2.2)."""
    with connect(server, offer="permessage-deflate") as client:
        assert client.parameters is not None
        assert "client_max_window_bits" not in client.parameters
        payload = far_repeats(30_000)
        client.write(frame(TEXT, deflate(payload), rsv=RSV1))
        assert client.echoed(TEXT, payload)


@pytest.mark.parametrize(
    "offer",
    [
        "permessage-deflate",
        "permessage-deflate; client_no_context_takeover",
        "permessage-deflate; server_no_context_takeover",
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
        'permessage-deflate; server_max_window_bits="10"; client_max_window_bits="10"',
        "permessage-deflate; client_max_window_bits=12; server_max_window_bits=12; server_no_context_takeover",
        "permessage-deflate;server_max_window_bits=10;client_max_window_bits",
        "permessage-deflate ; client_max_window_bits ; server_max_window_bits = 10",
    ],
)
def test_each_valid_offer_is_accepted(server: LiveServer, offer: str) -> None:
    """All parameters of the RFC are accepted, with and without quotes and spaces (7.1)."""
    with connect(server, offer=offer) as client:
        assert client.parameters is not None
        if "server_no_context_takeover" in offer:
            assert "server_no_context_takeover" in client.parameters
        for _ in range(2):
            client.write(frame(TEXT, deflated(client, LONG), rsv=RSV1))
            assert client.message() == (TEXT, LONG, True)


DECLINED = [
    "x-webkit-deflate-frame",
    "permessage-bzip2",
    "permessage-deflate; unknown",
    "permessage-deflate; unknown=1",
    "permessage-deflate; client_max_window_bits; unknown",
    "permessage-deflate; server_no_context_takeover; server_no_context_takeover",
    "permessage-deflate; client_no_context_takeover; client_no_context_takeover",
    "permessage-deflate; server_max_window_bits=10; server_max_window_bits=10",
    "permessage-deflate; client_max_window_bits; client_max_window_bits=10",
    "permessage-deflate; server_no_context_takeover=1",
    "permessage-deflate; client_no_context_takeover=true",
    "permessage-deflate; server_max_window_bits",
    *(
        f"permessage-deflate; {side}_max_window_bits={value}"
        for side in ("server", "client")
        for value in ("0", "7", "16", "-9", "08", "010", "1e1", "ten", "15.0", "255", '""', "99999999999999999999")
    ),
]


@pytest.mark.parametrize("offer", DECLINED)
def test_invalid_offer_is_declined(server: LiveServer, offer: str) -> None:
    """An unknown, repeated or invalid parameter declines the offer, but does not fail the connection (7.1)."""
    with WireClient(server.port) as client:
        answer = client.upgrade(headers={"Sec-WebSocket-Extensions": offer})
        if answer.status == 400:  # an empty quoted string breaks the grammar of RFC 6455 section 9.1
            assert '""' in offer
            return
        assert answer.status == 101
        assert answer.deflate is None
        client.write(frame(TEXT, LONG))
        assert client.message() == (TEXT, LONG, False)


@pytest.mark.parametrize(
    ("offer", "bits"),
    [
        ("permessage-deflate; server_max_window_bits=10, permessage-deflate", 10),
        ("permessage-deflate; unknown, permessage-deflate; server_max_window_bits=11", 11),
        ("permessage-deflate; server_max_window_bits=7, permessage-deflate; server_max_window_bits=9", 9),
        ("x-webkit-deflate-frame, permessage-deflate; server_max_window_bits=12; client_max_window_bits", 12),
        ("permessage-deflate; server_max_window_bits=13, x-other; a=b", 13),
        ("permessage-deflate; unknown\r\nSec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=14", 14),
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate; server_max_window_bits=9", 9),
    ],
)
def test_first_acceptable_offer_is_selected(server: LiveServer, offer: str, bits: int) -> None:
    """The first acceptable offer is selected, over all lines of the header (5)."""
    with connect(server, offer=offer) as client:
        assert client.parameters is not None
        assert 8 <= int(client.parameters["server_max_window_bits"] or 0) <= bits
        client.write(frame(TEXT, LONG))
        assert client.message() == (TEXT, LONG, True)


@KINDS
def test_no_offer_means_no_compression(server: LiveServer, opcode: int) -> None:
    """A client without an offer gets no RSV1, and may not set it (6)."""
    with connect(server) as client:
        assert client.parameters is None
        client.write(frame(opcode, LONG))
        assert client.message() == (opcode, LONG, False)
        client.write(frame(opcode, deflate(LONG), rsv=RSV1))
        assert client.close_info()[0] == 1002


@pytest.mark.parametrize(
    ("config", "args"),
    [({"compression": "none"}, ()), ({}, ("--ws-per-message-deflate", "false"))],
    ids=["compression", "uvicorn option"],
)
def test_compression_can_be_disabled(config: dict[str, str], args: tuple[str, ...]) -> None:
    """With compression="none", or uvicorn's own option, every offer is declined and nothing is compressed."""
    with quiet_server(*args, **config) as server, connect(server, offer=BROWSER_OFFER) as client:
        assert client.parameters is None
        client.write(frame(TEXT, LONG))
        assert client.message() == (TEXT, LONG, False)
        client.write(frame(TEXT, deflate(LONG), rsv=RSV1))
        assert client.close_info()[0] == 1002
        assert not server.errors()


# ── 7.2.1: messages of the server ──


@pytest.mark.parametrize(
    ("opcode", "payload", "compressed"),
    [
        (TEXT, b"", False),
        (TEXT, b"x", False),
        (TEXT, b"x" * 199, False),
        (TEXT, b"x" * 201, True),
        (TEXT, "é".encode() * 99, False),
        (TEXT, "é".encode() * 101, True),
        (TEXT, LONG, True),
        (BINARY, b"", False),
        (BINARY, b"\xff" * 199, False),
        (BINARY, b"\xff" * 201, True),
        (BINARY, LONG, True),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else str(value),
)
def test_only_messages_of_min_bytes_are_compressed(
    min_bytes_server: LiveServer, opcode: int, payload: bytes, compressed: bool
) -> None:
    """Messages below `compression_min_bytes` are sent unchanged, and longer ones compressed with RSV1 (7.2.1)."""
    with connect(min_bytes_server, offer=BROWSER_OFFER) as client:
        for _ in range(2):
            client.write(frame(opcode, payload))
            assert client.message() == (opcode, payload, compressed)
    assert not min_bytes_server.errors()


@pytest.fixture(scope="module")
def min_bytes_server() -> Iterator[LiveServer]:
    """Server that compresses messages from 200 bytes."""
    with quiet_server(compression_min_bytes=200) as server:
        yield server


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 600, 65_535, 65_536, 65_537, 1_000_000])
def test_incompressible_message_is_echoed(client: WireClient, size: int) -> None:
    """Messages that deflate lengthens arrive intact, at each boundary of the length field (7.2.1)."""
    client.write(frame(BINARY, noise(size)))
    assert client.echoed(BINARY, noise(size))
    client.write(frame(BINARY, deflated(client, noise(size)), rsv=RSV1))
    assert client.echoed(BINARY, noise(size))


def test_control_frames_are_never_compressed(client: WireClient) -> None:
    """Pong and close frames are never compressed (5)."""
    client.write(frame(PING, b"x" * 125))
    assert client.next_frame() == Frame(PONG, b"x" * 125)
    client.write(close_frame(4000, b"x" * 123))
    assert client.close_info()[0] == 4000


LISTENERS = [
    None,
    BROWSER_OFFER,
    "permessage-deflate",
    "permessage-deflate; unknown",
    *(f"permessage-deflate; server_max_window_bits={bits}" for bits in range(9, 16)),
]


@KINDS
@pytest.mark.parametrize("speaker_offer", [None, BROWSER_OFFER], ids=["plain speaker", "compressing speaker"])
def test_broadcast_uses_window_of_each_client(server: LiveServer, opcode: int, speaker_offer: str | None) -> None:
    """Each recipient of a broadcast gets it compressed for its own window, or uncompressed (7.1.2.1)."""
    messages = [far_repeats(distance, seed=distance) for distance in (10, 700, 1500, 5000, 20_000, 33_000)]
    with ExitStack() as stack:
        listeners = [stack.enter_context(connect(server, offer=offer)) for offer in LISTENERS]
        for listener in listeners:
            listener.write(frame(TEXT, b"here"))
            assert listener.echoed(TEXT, b"here")
        speaker = stack.enter_context(connect(server, "/relay", offer=speaker_offer))
        speaker.write(*(frame(opcode, message) for message in messages))
        for listener in listeners:
            found = [listener.message() for _ in messages]
            assert [(each.opcode, each.payload) for each in found] == [(opcode, message) for message in messages]
            assert found[-1].compressed is (listener.parameters is not None)


def test_clients_with_same_window_get_same_frame(server: LiveServer) -> None:
    """The compressed frame of a broadcast depends only on the window, without a server context (7.1.1.1)."""
    offer = "permessage-deflate; server_no_context_takeover; server_max_window_bits=12"
    with ExitStack() as stack:
        listeners = [stack.enter_context(connect(server, offer=offer)) for _ in range(3)]
        for number, listener in enumerate(listeners):
            for _ in range(number):  # earlier messages to one client must not affect the frame
                listener.write(frame(TEXT, LONG))
                assert listener.message() == (TEXT, LONG, True)
            listener.write(frame(TEXT, b"here"))
            assert listener.echoed(TEXT, b"here")
        speaker = stack.enter_context(connect(server, "/relay"))
        speaker.write(frame(TEXT, LONG))
        first, *others = [listener.next_frame() for listener in listeners]
        assert first.rsv == RSV1
        assert inflated_with(zlib.decompressobj(-12), first.payload) == LONG
        assert others == [first, first]


def test_mixed_size_burst_preserves_order(server: LiveServer) -> None:
    """Compressed and uncompressed messages of one loop iteration arrive in the order of the sends (5)."""
    messages = [b"%04d " % number + (LONG if number % 3 == 0 else b"short") for number in range(90)]
    with connect(server) as plain, connect(server, offer=BROWSER_OFFER) as packed:
        for listener in (plain, packed):
            listener.write(frame(TEXT, b"here"))
            assert listener.echoed(TEXT, b"here")
        with connect(server, "/relay") as speaker:
            speaker.write(*(frame(TEXT, message) for message in messages))
            for listener in (plain, packed):
                assert [listener.message().payload for _ in messages] == messages


# ── 7.2.2: messages of the client ──

EXAMPLES = {
    "one fixed block": (["f248cdc9c90700"], b"Hello"),
    "two fragments": (["f248cd", "c9c90700"], b"Hello"),
    "stored block": (["000500faff48656c6c6f00"], b"Hello"),
    "final block": (["f348cdc9c9070000"], b"Hello"),
    "two blocks": (["f248050000 00ffffcac9c90700"], b"Hello"),
    "two blocks, two fragments": (["f248050000", "00ffffcac9c90700"], b"Hello"),
    "empty message": (["00"], b""),
    "empty message in empty fragments": (["", "00", ""], b""),
}


@pytest.mark.parametrize(("parts", "message"), EXAMPLES.values(), ids=EXAMPLES)
def test_rfc_example_messages_are_read(client: WireClient, parts: list[str], message: bytes) -> None:
    """Each encoding in section 7.2.3 inflates to its message (7.2.3)."""
    client.write(*fragments(TEXT, [bytes.fromhex(part) for part in parts], rsv=RSV1))
    assert client.echoed(TEXT, message)


def test_rfc_shared_window_example_is_read(client: WireClient) -> None:
    """A message may refer to the previous one, unless the server asked for no context (7.2.3.2)."""
    assert client.parameters is not None
    client.write(frame(TEXT, bytes.fromhex("f248cdc9c90700"), rsv=RSV1))
    assert client.echoed(TEXT, b"Hello")
    second = "f248cdc9c90700" if "client_no_context_takeover" in client.parameters else "f200110000"
    client.write(frame(TEXT, bytes.fromhex(second), rsv=RSV1))
    assert client.echoed(TEXT, b"Hello")


def test_client_context_survives_interleaved_frames(client: WireClient) -> None:
    """Uncompressed messages, control frames and fragments do not change the client's window (7.2.2)."""
    assert client.parameters is not None
    compressor = compressor_of(client)
    for number in range(20):
        if "client_no_context_takeover" in client.parameters:
            compressor = compressor_of(client)
        payload = b"%d " % number + LONG
        packed = compressed_with(compressor, payload)
        cut = number * len(packed) // 20
        if number % 3 == 0:
            client.write(frame(TEXT, payload), frame(PONG, b"unsolicited"))
            assert client.echoed(TEXT, payload)
            client.write(frame(PING, b"between"))
            assert client.next_frame() == Frame(PONG, b"between")
        client.write(*fragments(TEXT, [packed[:cut], packed[cut:]] if number % 2 else [packed], rsv=RSV1))
        assert client.echoed(TEXT, payload)


@KINDS
def test_client_without_context_takeover_is_read(client: WireClient, opcode: int) -> None:
    """A client may compress each message on its own without being asked to (7.1.1.2)."""
    for number in range(5):
        payload = b"%d " % number + LONG
        client.write(frame(opcode, deflated(client, payload), rsv=RSV1))
        assert client.echoed(opcode, payload)


@KINDS
def test_compressed_message_may_be_fragmented_anywhere(client: WireClient, opcode: int) -> None:
    """RSV1 on the first fragment marks the whole message as compressed, wherever it is split (6.1)."""
    payload = b"Hello, Hello, Hello, world " * 4
    packed = deflated(client, payload)
    for at in range(len(packed) + 1):
        client.write(*fragments(opcode, [packed[:at], packed[at:]], rsv=RSV1))
        assert client.echoed(opcode, payload)
    client.write(*fragments(opcode, [bytes([byte]) for byte in packed], rsv=RSV1))
    assert client.echoed(opcode, payload)
    client.drip(*fragments(opcode, [packed[:7], b"", packed[7:]], rsv=RSV1))
    assert client.echoed(opcode, payload)


def test_ping_between_compressed_fragments_is_answered_at_once(client: WireClient) -> None:
    """A ping between fragments of a compressed message is answered at once, and is not part of it (6.1)."""
    first, second, third = fragments(TEXT, [(p := deflate(LONG, 9))[:100], p[100:200], p[200:]], rsv=RSV1)
    client.write(first, frame(PING, b"a"))
    assert client.next_frame() == Frame(PONG, b"a")
    client.write(second, frame(PONG, b"unsolicited"), frame(PING, b"b"))
    assert client.next_frame() == Frame(PONG, b"b")
    client.write(third)
    assert client.echoed(TEXT, LONG)


@pytest.mark.parametrize("first", [RSV1, 0], ids=["compressed message", "plain message"])
@pytest.mark.parametrize("fin", [True, False])
def test_rsv1_on_continuation_fails_with_1002(client: WireClient, first: int, fin: bool) -> None:
    """RSV1 on a continuation frame fails with 1002 (6.1)."""
    packed = deflate(b"Hello") if first else b"Hello"
    client.write(frame(TEXT, packed[:3], fin=False, rsv=first), frame(CONTINUATION, packed[3:], fin=fin, rsv=RSV1))
    assert client.close_info()[0] == 1002


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
@pytest.mark.parametrize(
    "payload", [b"", b"\x03\xe8hello", deflate(b"\x03\xe8hello")], ids=["empty", "plain", "packed"]
)
def test_rsv1_on_control_frame_fails_with_1002(client: WireClient, opcode: int, payload: bytes) -> None:
    """RSV1 on a control frame fails with 1002 (6.1)."""
    client.write(frame(opcode, payload, rsv=RSV1))
    assert client.close_info()[0] == 1002


@pytest.mark.parametrize("rsv", [RSV2, RSV3, RSV1 | RSV2, RSV1 | RSV3], ids=hex)
def test_rsv2_and_rsv3_fail_with_1002(client: WireClient, rsv: int) -> None:
    """RSV2 and RSV3, which the extension does not define, fail with 1002 (6)."""
    client.write(frame(TEXT, deflate(b"Hello"), rsv=rsv))
    assert client.close_info()[0] == 1002


CORRUPT = {
    "reserved block type": b"\x07",
    "wrong stored length": bytes.fromhex("000500000048656c6c6f"),
    "distance before the beginning": bytes.fromhex("f200110000"),
    "bad code lengths": b"\xfc" + b"\xff" * 20,
    "noise": noise(500),
    "uncompressed text": LONG,
}


@pytest.mark.parametrize("payload", CORRUPT.values(), ids=CORRUPT)
@pytest.mark.parametrize("cut", [False, True], ids=["one frame", "fragments"])
def test_invalid_deflate_data_fails_connection(client: WireClient, payload: bytes, cut: bool) -> None:
    """A message that is not a deflate stream fails the connection (7.2.2)."""
    half = len(payload) // 2
    client.write(*fragments(TEXT, [payload[:half], payload[half:]] if cut else [payload], rsv=RSV1))
    assert client.close_info()[0] in INFLATE_ERRORS


def test_truncated_deflate_stream_is_read_or_fails(server: LiveServer) -> None:
    """A truncated stream is read as far as it inflates, or fails the connection (7.2.2)."""
    packed = deflate(b"Hello, Hello, " + noise(40).hex().encode(), 9)
    for at in range(len(packed)):
        with connect(server, offer=BROWSER_OFFER) as client:
            client.write(frame(BINARY, packed[:at], rsv=RSV1), frame(TEXT, b"next"))
            found = client.next_frame()
            if found.opcode == CLOSE:
                assert int.from_bytes(found.payload[:2], "big") in INFLATE_ERRORS
            else:
                assert found.opcode == BINARY


@pytest.mark.parametrize("text", [b"a\xffb", b"abc\xe2\x82", b"\xed\xa0\x80"], ids=bytes.hex)
@pytest.mark.parametrize("cut", [False, True], ids=["one frame", "fragments"])
def test_compressed_invalid_utf8_fails_with_1007(client: WireClient, text: bytes, cut: bool) -> None:
    """Compressed text that is not UTF-8 after inflation fails with 1007 (RFC 6455, 8.1)."""
    packed = deflate(text, 9)
    client.write(*fragments(TEXT, [packed[:2], packed[2:]] if cut else [packed], rsv=RSV1))
    assert client.close_info()[0] == 1007


def test_messages_ending_with_final_block_are_all_read(client: WireClient) -> None:
    """BFINAL ends a block but not the connection's stream, so the next message inflates too (7.2.1, 7.2.3.4)."""
    for number in range(4):
        payload = b"%d " % number + LONG
        client.write(frame(TEXT, deflate(payload, 9, final=number % 3 != 2), rsv=RSV1))
        assert client.echoed(TEXT, payload)


def test_message_with_several_final_blocks_is_read_or_fails(client: WireClient) -> None:
    """A message with blocks after a final one is read completely or fails, and is never truncated (7.2.1)."""
    final = [deflate(word, 9, final=True)[:-1] for word in (b"Hello, ", b"brave ")]
    client.write(frame(TEXT, b"".join(final) + deflate(b"world", 9), rsv=RSV1))
    found = client.next_frame()
    if found.opcode == CLOSE:
        assert int.from_bytes(found.payload[:2], "big") in INFLATE_ERRORS
    else:
        assert found == Frame(TEXT, b"Hello, brave world")


def test_final_block_flood_fails_connection(client: WireClient) -> None:
    """A flood of empty final blocks fails the connection, and takes bounded work (7.2.3.4)."""
    client.write(frame(TEXT, b"\x03\x00" * 40_000, rsv=RSV1))
    assert client.close_info()[0] in INFLATE_ERRORS


def test_client_context_survives_final_block(client: WireClient) -> None:
    """The client's window belongs to the connection, whatever kind of block filled it (7.2.2)."""
    assert client.parameters is not None
    client.write(frame(TEXT, bytes.fromhex("f348cdc9c9070000"), rsv=RSV1))
    assert client.echoed(TEXT, b"Hello")
    second = "f248cdc9c90700" if "client_no_context_takeover" in client.parameters else "f200110000"
    client.write(frame(TEXT, bytes.fromhex(second), rsv=RSV1))
    assert client.echoed(TEXT, b"Hello")


# ── inflation is bounded ──


@pytest.mark.parametrize("size", [MAX_SIZE - 300, MAX_SIZE - 1, MAX_SIZE])
def test_size_limit_applies_to_inflated_message(client: WireClient, size: int) -> None:
    """A message of exactly the limit passes in both directions, whatever its size on the wire (8)."""
    client.write(frame(BINARY, bomb(client, size), rsv=RSV1))
    assert client.echoed(BINARY, bytes(size))
    for payload in (bytes(size), noise(size)):
        client.write(frame(BINARY, payload))
        assert client.echoed(BINARY, payload)


@pytest.mark.parametrize("over", [1, 2, 257, 258, 259, 5000])
@pytest.mark.parametrize("cut", [False, True], ids=["one frame", "fragments"])
def test_message_inflating_over_limit_closes_with_1009(client: WireClient, over: int, cut: bool) -> None:
    """A message that inflates over the limit, by one byte or more, closes with 1009 (8)."""
    packed = bomb(client, MAX_SIZE + over)
    half = len(packed) // 2
    client.write(*fragments(BINARY, [packed[:half], packed[half:]] if cut else [packed], rsv=RSV1))
    assert client.close_info()[0] == 1009


@KINDS
@pytest.mark.parametrize("size", [10 * MAX_SIZE, 100 * MAX_SIZE], ids=["10 MiB", "100 MiB"])
def test_bomb_closes_1009_without_full_inflation(
    server: LiveServer, client: WireClient, opcode: int, size: int
) -> None:
    """Zeros at a compression ratio of 1,000 close with 1009, and are never held completely (8)."""
    packed = bomb(client, size)
    memory = PeakMemory(server)
    client.write(frame(opcode, packed, rsv=RSV1))
    assert client.close_info()[0] == 1009
    assert memory.growth() < 8 * MAX_SIZE


def test_fragmented_bomb_closes_1009_before_last_fragment(server: LiveServer, client: WireClient) -> None:
    """Inflated fragments count together, and the fragment over the limit closes with 1009 at once (8)."""
    compressor = compressor_of(client)
    parts = [compressor.compress(bytes(MAX_SIZE * 2 // 5)) + compressor.flush(zlib.Z_SYNC_FLUSH) for _ in range(3)]
    memory = PeakMemory(server)
    client.write(frame(BINARY, parts[0], fin=False, rsv=RSV1), frame(CONTINUATION, parts[1], fin=False))
    client.write(frame(PING, b"fine so far"))
    assert client.next_frame() == Frame(PONG, b"fine so far")
    client.write(frame(CONTINUATION, parts[2], fin=False))
    assert client.close_info()[0] == 1009
    assert memory.growth() < 8 * MAX_SIZE


def test_bomb_in_tiny_fragments_fails_connection(server: LiveServer, client: WireClient) -> None:
    """A bomb in short fragments, each of which inflates to little, closes with 1009 (8)."""
    packed = bomb(client, 20 * MAX_SIZE)
    memory = PeakMemory(server)
    try:
        for at in range(0, len(packed), 50):
            client.write(frame(CONTINUATION if at else BINARY, packed[at : at + 50], fin=False, rsv=0 if at else RSV1))
    except ConnectionError:  # the server closed before the client had sent everything
        pass
    assert client.close_info()[0] == 1009
    assert memory.growth() < 8 * MAX_SIZE


async def test_memory_of_many_bombs_is_freed(server: LiveServer) -> None:
    """Memory of inflated bombs is freed with their connections (8)."""
    before = server.post("/collect")["rss"]
    for _ in range(20):
        with connect(server, offer=BROWSER_OFFER) as client:
            client.write(frame(BINARY, bomb(client, 10 * MAX_SIZE), rsv=RSV1))
            assert client.close_info()[0] == 1009
    await until(lambda: server.probe()["connections"] == 1)
    assert server.post("/collect")["rss"] - before < 8 * MAX_SIZE


def test_bomb_is_bounded_with_default_uvicorn_limit() -> None:
    """With uvicorn's default limit of 16 MiB, a bomb of 100 MiB closes with 1009 and uses less than 48 MiB."""
    with quiet_server() as server, connect(server, offer=BROWSER_OFFER) as client:
        packed = bomb(client, 100 * MAX_SIZE)
        memory = PeakMemory(server)
        client.write(frame(BINARY, packed, rsv=RSV1))
        assert client.close_info(answer=True)[0] == 1009
        assert memory.growth() < 48 * MAX_SIZE
        assert not server.errors()
