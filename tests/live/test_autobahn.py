"""Cases of the Autobahn TestSuite in which the letter of RFC 6455 asks for more than the usual server does.

Each case has its number. Unless stated otherwise, the frames of a case arrive in one read, which is its hardest form.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator

import pytest

from tests.support.server import LiveServer
from tests.support.wire_client import (
    BINARY,
    BROWSER_OFFER,
    CONTINUATION,
    PING,
    PONG,
    RSV1,
    RSV2,
    RSV3,
    TEXT,
    Frame,
    WireClient,
    Witness,
    close_frame,
    connect,
    fragments,
    frame,
    quiet_server,
)

pytestmark = pytest.mark.usefixtures("witness_is_unaffected")

HELLO = b"Hello, world!"
BEFORE = "κόσμε".encode()
INVALID = b"\xf4\x90\x80\x80"  # above U+10FFFF; its second byte is the first invalid one
AFTER = b"edited"

ROUTES = pytest.mark.parametrize("route", ["/echo", "/unattached"], ids=["attached", "unattached"])


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """One server for all tests of the module."""
    with quiet_server() as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[WireClient]:
    """WebSocket on the echo route."""
    with connect(server) as client:
        yield client


# ── 3, 4 and 5: messages before an invalid frame ──

INVALID_FRAMES = {
    "3.2": frame(TEXT, HELLO, rsv=RSV2),
    "3.3": frame(TEXT, HELLO, rsv=RSV1 | RSV2),
    "3.4": frame(TEXT, HELLO, rsv=RSV3),
    "4.1.3": frame(5),
    "4.1.4": frame(6, HELLO),
    "4.1.5": frame(7, HELLO),
    "4.2.3": frame(13),
    "4.2.4": frame(14, HELLO),
    "4.2.5": frame(15, HELLO),
}


@pytest.mark.parametrize("invalid", INVALID_FRAMES.values(), ids=INVALID_FRAMES)
@ROUTES
def test_message_before_invalid_frame_is_echoed(server: LiveServer, route: str, invalid: bytes) -> None:
    """A message is delivered and answered, and the invalid frame after it fails with 1002; a ping gets no pong."""
    with connect(server, route) as client:
        client.write(frame(TEXT, HELLO), invalid, frame(PING))
        assert client.echoed(TEXT, HELLO)
        assert client.close_info()[0] == 1002


@pytest.mark.parametrize("invalid", INVALID_FRAMES.values(), ids=INVALID_FRAMES)
def test_message_and_invalid_frame_by_bytes_are_equal(client: WireClient, invalid: bytes) -> None:
    """The result is the same if each byte arrives in a read of its own."""
    client.drip(frame(TEXT, HELLO), invalid)
    assert client.echoed(TEXT, HELLO)
    assert client.close_info()[0] == 1002


def test_several_messages_before_invalid_frame_are_echoed(client: WireClient) -> None:
    """All messages before the invalid frame are delivered and answered, in order."""
    messages = [b"message %d" % number for number in range(10)]
    client.write(*(frame(TEXT, message) for message in messages), frame(3))
    assert [client.message().payload for _ in messages] == messages
    assert client.close_info()[0] == 1002


def test_handled_message_before_invalid_frame_is_answered(server: LiveServer) -> None:
    """A message handler of `ws.run()` answers before the failure too."""
    with connect(server, "/run") as client:
        client.write(frame(TEXT, json.dumps({"type": "echo", "number": 1}).encode()), frame(3))
        assert json.loads(client.message().payload)["number"] == 1
        assert client.close_info()[0] == 1002


def test_message_before_oversized_message_is_echoed(client: WireClient) -> None:
    """A message before one over the limit is delivered and answered, and then the connection fails with 1009."""
    client.write(frame(TEXT, HELLO), frame(BINARY, announced=1 << 40))
    assert client.echoed(TEXT, HELLO)
    assert client.close_info()[0] == 1009


@ROUTES
def test_case_5_15_echoes_message_before_continuation(server: LiveServer, route: str) -> None:
    """A fragmented message is delivered and answered, and the continuation without a start after it fails with 1002."""
    with connect(server, route) as client:
        client.write(
            *fragments(TEXT, [b"fragment1", b"fragment2"]),
            frame(CONTINUATION, b"fragment3", fin=False),
            frame(TEXT, b"fragment4"),
        )
        assert client.echoed(TEXT, b"fragment1fragment2")
        assert client.close_info()[0] == 1002


# ── 6.4: invalid UTF-8 ──


@ROUTES
@pytest.mark.parametrize("invalid", [INVALID, INVALID[:2]], ids=["6.4.1", "6.4.2"])
def test_invalid_utf8_fails_at_its_fragment(server: LiveServer, route: str, invalid: bytes) -> None:
    """A fragment that makes a message invalid UTF-8 fails with 1007 before the next fragment, even without its rest."""
    with connect(server, route) as client:
        client.write(frame(TEXT, BEFORE, fin=False), frame(PING))
        assert client.next_frame() == Frame(PONG, b"")
        client.write(frame(CONTINUATION, invalid, fin=False))
        assert client.close_info()[0] == 1007


@ROUTES
@pytest.mark.parametrize("size", [4, 2], ids=["6.4.3", "6.4.4"])
def test_invalid_utf8_fails_inside_its_frame(server: LiveServer, witness: Witness, route: str, size: int) -> None:
    """Invalid UTF-8 fails with 1007 as soon as its first invalid byte arrives, before the end of its frame."""
    whole = frame(TEXT, BEFORE + INVALID + AFTER)
    at = len(whole) - len(AFTER) - len(INVALID)
    with connect(server, route) as client:
        client.write(whole[:at])
        witness.barrier()
        client.write(whole[at : at + size])
        assert client.close_info()[0] == 1007


@pytest.mark.parametrize("at", range(len(BEFORE) + 1))
def test_first_invalid_byte_fails_and_none_before_it(server: LiveServer, witness: Witness, at: int) -> None:
    """Every byte before the first invalid one is accepted, wherever the segments are cut."""
    whole = frame(TEXT, BEFORE[:at] + b"\xff" + BEFORE)
    with connect(server) as client:
        client.drip(whole[: 6 + at])
        witness.barrier()
        client.socket.settimeout(0.02)
        with pytest.raises(TimeoutError):
            client.socket.recv(1)
        client.socket.settimeout(5)
        client.write(whole[6 + at : 7 + at])
        assert client.close_info()[0] == 1007


def test_invalid_utf8_in_large_frame_fails_at_once(client: WireClient) -> None:
    """An invalid byte at the start of a frame of a megabyte fails with 1007 long before the frame's end."""
    whole = frame(TEXT, b"\xff" + b"x" * 1_000_000)
    client.write(whole[:100])
    assert client.close_info()[0] == 1007


def test_invalid_utf8_in_compressed_fragment_fails_at_it(server: LiveServer) -> None:
    """Compressed text fails with 1007 at the fragment that inflates to the first invalid byte."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -9)
    first, second = (compressor.compress(part) + compressor.flush(zlib.Z_SYNC_FLUSH) for part in (BEFORE * 20, b"\xff"))
    with connect(server, offer=BROWSER_OFFER) as client:
        client.write(frame(TEXT, first, fin=False, rsv=RSV1), frame(PING))
        assert client.next_frame() == Frame(PONG, b"")
        client.write(frame(CONTINUATION, second, fin=False))
        assert client.close_info()[0] == 1007


def test_code_point_cut_by_segments_is_read(client: WireClient, witness: Witness) -> None:
    """A code point may be cut by segments inside one frame, also by those of a fragmented message."""
    for frames in ([frame(TEXT, BEFORE)], fragments(TEXT, [BEFORE[:3], BEFORE[3:]])):
        whole = b"".join(frames)
        for at in range(1, len(whole)):
            client.write(whole[:at])
            witness.barrier()
            client.write(whole[at:])
            assert client.echoed(TEXT, BEFORE)


# ── 7.1.5: a close frame between fragments ──


@ROUTES
def test_case_7_1_5_answers_close_between_fragments(server: LiveServer, route: str) -> None:
    """A close frame between the fragments of a message is answered with its code, and the message is not delivered."""
    received = server.get("/ws-stats/")["messages_received"]
    with connect(server, route) as client:
        client.write(frame(TEXT, b"fragment1", fin=False), close_frame(1000), frame(CONTINUATION, b"fragment2"))
        assert client.close_info()[0] == 1000
    assert server.get("/ws-stats/")["messages_received"] == received
