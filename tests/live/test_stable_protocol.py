"""On the protocol class, a client that disconnects, floods or breaks rules at any moment affects only itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest
from websockets.asyncio.client import connect as connect_plain

from tests.support.plain_client import received_close
from tests.support.process import no_new_errors
from tests.support.raw import RawClient
from tests.support.server import LiveServer, until
from tests.support.wire_client import (
    BINARY,
    BROWSER_OFFER,
    CLOSE,
    CONTINUATION,
    KIND,
    PING,
    PONG,
    RSV1,
    TEXT,
    PeakMemory,
    close_frame,
    connect,
    deflate,
    fragments,
    frame,
    quiet_server,
)

Serve = Callable[..., LiveServer]

MEBIBYTE = 1 << 20
LIMIT = 1000
COUNT, SIZE = 800, 20_000
"""Messages of a large outbox, several times what the buffers of both kernels hold."""

CLEAN_EXITS = (0, -15)
"""Exit codes of a clean stop of uvicorn; newer versions raise the signal again at the end."""

LONG_TIMEOUTS = {"outbox_max_bytes": 2 * COUNT * SIZE, "send_timeout": 20, "disconnect_grace": 20}
"""Options with timeouts longer than any test here."""


@pytest.fixture(scope="module")
def strict_server() -> Iterator[LiveServer]:
    """One server with a small message limit, for all tests of clients that break rules."""
    with quiet_server(max_message_size=LIMIT) as server:
        yield server


@pytest.fixture
def clean_server(strict_server: LiveServer) -> Iterator[LiveServer]:
    """That server, which must not log an error during the test."""
    with no_new_errors(strict_server):
        yield strict_server
        strict_server.probe()  # one more loop iteration, in which a pending error is logged


class StalledFlush(NamedTuple):
    """Server in the middle of a `ws.close()`, and the client that does not read what is flushed."""

    server: LiveServer
    client: RawClient


@pytest.fixture
async def flushing(serve: Serve, request: pytest.FixtureRequest) -> AsyncIterator[StalledFlush]:
    """Flush that waits for its client."""
    server = serve(KIND, config={**LONG_TIMEOUTS, **getattr(request, "param", {})})
    with RawClient(server.port, f"/flush/ann?count={COUNT}&size={SIZE}", receive_buffer=4096) as client:
        client.handshake()
        await server.until_event("queued ann")
        yield StalledFlush(server, client)


def read_to_eof(client: RawClient) -> tuple[int, int]:
    """Read to the close frame and the end of TCP, and return the number of messages and the code.

    Args:
        client: Client of a server that closes.
    """
    messages = 0
    while (found := client.frame())[0] != CLOSE:
        assert found[0] in (TEXT, BINARY)
        messages += 1
    with suppress(ConnectionError):
        assert not client.socket.recv(1), "something follows the close frame"
    return messages, int.from_bytes(found[1][:2], "big")


# ── interrupted flushes ──


async def test_client_close_during_flush_ends_flush(flushing: StalledFlush) -> None:
    """No message follows the echoed close frame, ws.close() returns at once, and unsent messages are counted."""
    server, client = flushing
    client.socket.sendall(close_frame(1000))
    await server.until_event("closed ann", 2)
    messages, code = await asyncio.to_thread(read_to_eof, client)
    assert code == 1000
    assert 0 < messages < COUNT
    assert server.probe()["discarded"] == COUNT - messages
    assert not server.errors()


async def test_sigterm_during_flush_waits_for_reading_client(flushing: StalledFlush) -> None:
    """The drain waits for a flush to a client that reads, which gets every message and the original code."""
    server, client = flushing
    stopping = asyncio.create_task(asyncio.to_thread(server.terminate, 8))
    assert await asyncio.to_thread(read_to_eof, client) == (COUNT, 4001)
    await stopping
    assert "LIFESPAN ended" in server.log
    assert not server.errors()


@pytest.mark.parametrize("flushing", [{"handle_signals": False}], indirect=True, ids=["no drain"])
async def test_sigterm_during_flush_closes_stalled_client_with_1012(flushing: StalledFlush) -> None:
    """Without a drain no message follows the close frame with 1012, and the process ends."""
    server, client = flushing
    stopping = asyncio.create_task(asyncio.to_thread(server.terminate, 4))
    await until(lambda: "Shutting down" in server.log)  # else the client may read everything before the shutdown
    messages, code = await asyncio.to_thread(read_to_eof, client)
    assert code == 1012
    assert 0 < messages < COUNT
    await stopping
    assert server.process.returncode in CLEAN_EXITS
    assert "LIFESPAN ended" in server.log
    assert not server.errors()


async def test_reset_during_flush_ends_flush(flushing: StalledFlush) -> None:
    """After a reset ws.close() returns at once, unsent messages are counted, and SIGTERM ends the process at once."""
    server, client = flushing
    client.reset()
    await server.until_event("closed ann", 2)
    assert server.probe()["discarded"] > 0
    await until(lambda: server.probe()["connections"] == 0)
    assert await asyncio.to_thread(server.terminate, 2) < 2
    assert not server.errors()


async def test_reset_and_sigterm_during_flush_end_process(flushing: StalledFlush) -> None:
    """A process does not wait for send_timeout or disconnect_grace of a lost client."""
    server, client = flushing
    client.reset()
    assert await asyncio.to_thread(server.terminate, 4) < 4
    assert server.process.returncode in CLEAN_EXITS
    assert "LIFESPAN ended" in server.log
    assert not server.errors()


async def test_sigterm_sends_1012_despite_stalled_closed_client(serve: Serve) -> None:
    """A transport that waits for a stalled client delays neither the 1012 of others nor the end of the lifespan."""
    server = serve(KIND, config=LONG_TIMEOUTS)
    path = f"/flush/ann?count={COUNT}&size={SIZE}&close=false"
    with RawClient(server.port, path, receive_buffer=4096) as stalled:
        stalled.handshake()
        await server.until_event("queued ann")
        async with connect_plain(server.url("/echo/bob")) as bob, connect_plain(server.url("/echo/cyd")) as cyd:
            stalled.socket.sendall(close_frame(1000))
            await server.until_event("disconnect ann client_close")
            assert await asyncio.to_thread(server.terminate, 4) < 4
            for client in (bob, cyd):
                assert (await received_close(client, discard=False))[0] == 1012
    assert server.process.returncode in CLEAN_EXITS
    assert "LIFESPAN ended" in server.log
    assert not server.errors()


# ── protocol errors ──


@pytest.mark.parametrize("behind", [PING, PONG, TEXT])
@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        pytest.param([frame(TEXT, b"\xff")], 1007, id="no-utf-8"),
        pytest.param(fragments(BINARY, [b"x" * 600, b"x" * 600, b""])[:2], 1009, id="too-big"),
        pytest.param([frame(3, b"x")], 1002, id="reserved-opcode"),
    ],
)
def test_data_behind_protocol_error_does_not_hide_its_code(
    clean_server: LiveServer, wrong: list[bytes], code: int, behind: int
) -> None:
    """The close frame has the code of the error, no data follows it, and the server logs no crash."""
    with connect(clean_server) as client:
        client.write(*wrong, frame(behind, b"behind"))
        found = client.next_frame()
        assert (found.opcode, int.from_bytes(found.payload[:2], "big")) == (CLOSE, code)
        client.eof()


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        pytest.param(frame(CONTINUATION, b"x"), 1002, id="1002"),
        pytest.param(frame(TEXT, b"\xff"), 1007, id="1007"),
        pytest.param(frame(BINARY, b"x" * 5 * LIMIT)[:20], 1009, id="1009-from-the-header"),
        pytest.param(frame(BINARY, b"x" * (LIMIT + 1)), 1009, id="1009"),
    ],
)
def test_data_after_protocol_error_is_discarded(clean_server: LiveServer, wrong: bytes, code: int) -> None:
    """The server reads on briefly, so no TCP reset overtakes the close frame of a client that is still sending."""
    with connect(clean_server) as client:
        client.write(wrong)
        found = client.next_frame()
        assert (found.opcode, int.from_bytes(found.payload[:2], "big")) == (CLOSE, code)
        for _ in range(20):  # more than both kernels hold, so the write stalls unless the server reads
            client.write(b"y" * MEBIBYTE)
        client.eof()


async def test_client_writing_long_after_error_is_aborted(clean_server: LiveServer) -> None:
    """The server stops reading about 2 s after its close frame."""

    def refused() -> bool:
        try:
            client.write(b"y")
        except ConnectionError:
            return True
        return False

    with connect(clean_server) as client:
        client.write(frame(TEXT, b"\xff"))
        started = time.monotonic()
        assert client.close_info()[0] == 1007
        await until(refused, 5)
        assert 1.5 < time.monotonic() - started < 4


@pytest.mark.parametrize(
    "message",
    [
        pytest.param([frame(TEXT, b"x" * (LIMIT + 1))], id="one-byte-over"),
        pytest.param([frame(BINARY, b"x" * 5 * LIMIT)], id="far-over"),
        pytest.param(fragments(BINARY, [b"x" * 600] * 2), id="fragments"),
        pytest.param([frame(BINARY, deflate(bytes(LIMIT + 1)), rsv=RSV1)], id="compressed"),
        pytest.param([frame(BINARY, deflate(bytes(MEBIBYTE)), rsv=RSV1)], id="compressed-far-over"),
    ],
)
def test_oversized_message_reason_names_max_message_size(clean_server: LiveServer, message: list[bytes]) -> None:
    """The close reason names max_message_size, whether the parser, the inflater or the library finds the excess."""
    with connect(clean_server, offer=BROWSER_OFFER) as client:
        client.write(*message)
        assert client.close_info() == (1009, f"message over {LIMIT} bytes")


def test_oversized_message_reason_names_smaller_server_limit(serve: Serve) -> None:
    """If --ws-max-size is below max_message_size, the close reason names --ws-max-size."""
    server = serve(KIND, config={"max_message_size": 2 * LIMIT}, args=("--ws-max-size", str(LIMIT)))
    for size in (LIMIT + 1, 5 * LIMIT):
        with connect(server) as client:
            client.write(frame(BINARY, b"x" * size))
            assert client.close_info() == (1009, f"message over {LIMIT} bytes")


# ── unread inboxes ──


async def test_compressed_burst_does_not_overrun_full_inbox(serve: Serve) -> None:
    """A segment that inflates a thousand times stays compressed while it is unread, and arrives in order later."""
    count = 60
    server = serve(KIND, config={"inbox_max_bytes": MEBIBYTE})
    peak = PeakMemory(server)
    with connect(server, "/read-later", offer=BROWSER_OFFER) as client:
        messages = [f"{number:08d}".encode().ljust(MEBIBYTE, b"x") for number in range(count)]
        client.write(*(frame(TEXT, deflate(message), rsv=RSV1) for message in messages))
        await until(lambda: "reading_paused" in server.log)
        # One slice of the parser is 4 KiB, which inflates to at most 4 MiB; the previous message left the inbox open.
        assert MEBIBYTE <= server.probe()["unread_bytes"] <= 6 * MEBIBYTE
        assert peak.growth() < 24 * MEBIBYTE
        server.post("/release")
        assert [client.message().payload for _ in messages] == [message[:8] for message in messages]
        client.write(close_frame(1000))
        assert client.close_info()[0] == 1000
    assert not server.errors()


async def test_read_pause_suspends_uvicorn_keepalive(serve: Serve) -> None:
    """With heartbeat_type off and a full inbox, uvicorn's own keepalive pauses as long as reading does."""
    server = serve(
        KIND,
        config={"heartbeat_type": "off", "inbox_max_messages": 5},
        args=("--ws-ping-interval", "0.1", "--ws-ping-timeout", "0.5"),
    )
    with RawClient(server.port, "/read-later/ann") as ann, RawClient(server.port, "/idle/bob") as bob:
        ann.handshake()
        bob.handshake()
        for number in range(20):
            ann.send(TEXT, b"%d" % number)
        await until(lambda: "reading_paused" in server.log)
        for _ in range(10):  # twice as long as uvicorn waits for a pong
            answer_ping(bob)
        server.post("/release")
        received: list[bytes] = []
        while len(received) < 20:
            opcode, payload = ann.frame()
            if opcode == PING:
                ann.send(PONG, payload)
            else:
                assert opcode == TEXT, payload
                received.append(payload)
        assert received == [b"%d" % number for number in range(20)]
        for _ in range(2):  # the keepalive resumes with reading
            answer_ping(ann)
    assert not server.errors()


def answer_ping(client: RawClient) -> None:
    """Wait for a ping, and answer it."""
    opcode, payload = client.frame()
    assert opcode == PING, payload
    client.send(PONG, payload)


# ── late adoption ──


async def test_task_blocked_in_send_survives_connect(serve: Serve) -> None:
    """Data that a task began to send before manager.connect() arrives completely, and the disconnect is detected."""
    server = serve(KIND)
    with RawClient(server.port, "/adopt-busy/ann?operation=send", receive_buffer=4096) as client:
        client.handshake()
        await server.until_event("adopted")
        assert not server.events("worked")

        def read() -> int:
            return sum(len(client.frame()[1]) for _ in range(400))

        assert await asyncio.to_thread(read) == 400 * 65536
        await server.until_event("worked")
        client.reset()
        await server.until_event("disconnect ann")
    assert not server.errors()


async def test_disconnect_wakes_task_blocked_in_send(serve: Serve) -> None:
    """A disconnect raises uvicorn's exception in a task that is blocked in send, and the connection ends."""
    server = serve(KIND)
    with RawClient(server.port, "/adopt-busy/ann?operation=send", receive_buffer=4096) as client:
        client.handshake()
        await server.until_event("adopted")
        client.reset()
        await server.until_event("worked")
        await server.until_event("disconnect ann")
    await until(lambda: server.probe()["connections"] == 0)
    assert not server.errors()


async def test_task_blocked_in_receive_gets_next_message(serve: Serve) -> None:
    """A task that reads since before manager.connect() gets the next message, and the disconnect is detected."""
    server = serve(KIND)
    with RawClient(server.port, "/adopt-busy/ann?operation=receive") as client:
        client.handshake()
        await server.until_event("adopted")
        client.send(TEXT, b"hello")
        await server.until_event("worked hello")
        client.reset()
        await server.until_event("disconnect ann")
    assert not server.errors()


async def test_client_close_wakes_task_blocked_in_receive(serve: Serve) -> None:
    """A client close reaches both the task that is blocked in receive and the connection."""
    server = serve(KIND)
    with RawClient(server.port, "/adopt-busy/ann?operation=receive") as client:
        client.handshake()
        await server.until_event("adopted")
        client.socket.sendall(close_frame(1000))
        await server.until_event("worked WebSocketDisconnect")
        await server.until_event("disconnect ann")
    await until(lambda: server.probe()["connections"] == 0)
    assert not server.errors()


# ── closes before a close frame that has arrived ──


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"max_memory_per_connection": 100_000}, "memory"),
        ({"inbox_overflow": "close", "inbox_max_messages": 1}, "policy"),
        ({"max_message_rate": 0.001, "max_message_burst": 1}, "policy"),
    ],
)
async def test_close_before_arrived_close_frame_completes_teardown(
    serve: Serve, config: dict[str, object], reason: str
) -> None:
    """A connection that ends before an arrived close frame is read runs its hooks, and does not delay the shutdown."""
    server = serve(KIND, config={"heartbeat_type": "off", **config})
    client = connect(server, "/idle", offer=BROWSER_OFFER)
    messages = [frame(TEXT, deflate(b"x" * 60_000), rsv=RSV1) for _ in range(8)]
    client.socket.sendall(b"".join(messages) + close_frame(1000))
    await until(lambda: any(f" {reason} " in one for one in server.events("disconnect ")))
    await server.until_event("released")
    client.close()
    assert not server.errors()
    assert server.terminate(8) < 4
