"""Bytes in either direction prove liveness: slow links stay connected, and stalled clients are closed."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable

import pytest

from fastapi_ws_stabilizer.client import Gap, connect
from tests.support.raw import RawClient, slow_link
from tests.support.server import UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]

NO_UVICORN_PINGS = ("--ws-ping-interval", "0")
"""Options without uvicorn's own pings, which wait behind a large message until uvicorn closes the client."""


def read_at_rate(client: RawClient, rate: int, seconds: float) -> int:
    """Read `rate` bytes per second, and return the number of bytes."""
    started, got = time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < seconds:
        if got >= rate * elapsed:
            time.sleep(0.01)
            continue
        data = client.socket.recv(min(16384, rate // 20))
        if not data:
            raise ConnectionError(f"cut after {elapsed:.1f} s and {got} bytes")
        got += len(data)
    return got


@pytest.mark.parametrize("size", [40_000, 12_000_000])
@pytest.mark.parametrize("kind", UVICORN)
async def test_client_stalled_within_one_message_is_closed(serve: Serve, kind: str, size: int) -> None:
    """A client that stops reading within a single message is closed, though no other message waits."""
    config = {
        "heartbeat_interval": 0.5,
        "heartbeat_timeout": 1,
        "send_timeout": 1,
        "require_pong": True,
        "compression": "none",
    }
    server = serve(kind, config=config, args=NO_UVICORN_PINGS)
    with RawClient(server.port, "/idle/stalled", receive_buffer=4096) as client:
        client.handshake()
        await server.until_event("connect stalled")
        await asyncio.to_thread(server.post, f"/broadcast?count=1&size={size}")
        await server.until_event("disconnect stalled", 5)
    assert server.probe()["connections"] == 0
    assert not server.errors()


@pytest.mark.parametrize("kind", UVICORN)
async def test_steady_slow_reader_is_not_stalled(serve: Serve, kind: str) -> None:
    """Bytes that leave the kernel's queue are progress, so a client that reads longer than send_timeout stays."""
    server = serve(kind, config={"send_timeout": 1, "compression": "none"}, args=NO_UVICORN_PINGS)
    with RawClient(server.port, "/flood/slow", receive_buffer=65536) as client:
        client.handshake()
        assert await asyncio.to_thread(read_at_rate, client, 400_000, 5) > 1_000_000
        assert not server.events("disconnect")


@pytest.mark.parametrize("kind", UVICORN)
async def test_slow_reader_gets_last_message_and_close_frame(serve: Serve, kind: str) -> None:
    """A client that reads steadily gets all that an endpoint sent before it returned, and the close frame."""
    server = serve(kind, config={"send_timeout": 1, "compression": "none"}, args=NO_UVICORN_PINGS)
    size = 6_000_000
    with RawClient(server.port, f"/return/slow?size={size}", receive_buffer=65536) as client:
        client.handshake()
        got = await asyncio.to_thread(read_at_rate, client, 1_500_000, size / 1_500_000 - 0.5)
        rest = await asyncio.to_thread(read_rest, client)
    assert got + len(rest) >= 10 + size + 4
    assert rest[-4:] == b"\x88\x02\x03\xe8"


HEARTBEAT = {"heartbeat_interval": 0.5, "heartbeat_timeout": 1, "require_pong": True, "compression": "none"}


def binary_head(size: int) -> bytes:
    """Return the header of a client's binary frame, with a masking key of zeros."""
    return b"\x82\xff" + struct.pack("!Q", size) + bytes(4)


@pytest.mark.parametrize("kind", UVICORN)
async def test_slow_upload_does_not_count_as_silence(serve: Serve, kind: str) -> None:
    """A client stays if one message takes it longer than heartbeat_interval + heartbeat_timeout."""
    server = serve(kind, config=HEARTBEAT, args=NO_UVICORN_PINGS)
    with RawClient(server.port, "/echo/slow") as client:
        client.handshake()
        client.socket.sendall(binary_head(400_000))
        for _ in range(40):
            client.socket.sendall(bytes(10_000))
            await asyncio.sleep(0.08)
        opcode, payload = 1, b""
        while opcode != 2:
            opcode, payload = await asyncio.to_thread(client.frame)
            assert opcode != 8, payload
    assert len(payload) == 400_000


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_endless_message_counts_as_silence(serve: Serve, kind: str) -> None:
    """Single bytes hold a connection for as long as the largest message takes at 4 KiB per second, and no longer."""
    server = serve(kind, config={**HEARTBEAT, "max_message_size": 4096}, args=NO_UVICORN_PINGS)
    with RawClient(server.port, "/echo/drip") as client:
        client.handshake()
        client.socket.sendall(binary_head(4096))
        started = time.monotonic()
        while not server.events("disconnect drip") and time.monotonic() - started < 6:
            client.socket.sendall(b"x")
            await asyncio.sleep(0.1)
        took = time.monotonic() - started
    assert server.events("disconnect drip") == ["disconnect drip heartbeat_timeout 4408"]
    assert 2 <= took < 5


@pytest.mark.parametrize("kind", UVICORN)
async def test_ping_behind_large_message_causes_no_timeout(serve: Serve, kind: str) -> None:
    """A client stays if it reads one message for longer than heartbeat_interval + heartbeat_timeout."""
    server = serve(kind, config=HEARTBEAT, args=NO_UVICORN_PINGS)
    with RawClient(server.port, "/echo/slow", receive_buffer=65536) as client:
        client.handshake()
        await server.until_event("connect slow")
        client.send(1, b"pong")
        await asyncio.to_thread(server.post, "/broadcast?count=1&size=3000000")
        assert await asyncio.to_thread(read_at_rate, client, 600_000, 4.5) > 2_000_000
        client.send(1, b"pong")
        assert not server.events("disconnect")


def read_rest(client: RawClient) -> bytes:
    """Read until the close frame or the end of TCP."""
    rest = b""
    while not rest.endswith(b"\x88\x02\x03\xe8") and (data := client.socket.recv(1 << 20)):
        rest += data
    return rest


@pytest.mark.parametrize("kind", UVICORN)
async def test_large_message_to_python_client_arrives_on_slow_link(serve: Serve, kind: str) -> None:
    """A message that takes longer than both heartbeat times arrives on the first connection."""
    server = serve(kind, config=HEARTBEAT, args=NO_UVICORN_PINGS)
    size = 2_000_000
    async with slow_link(server.port, 500_000, upload=False) as port:
        async with connect(f"ws://127.0.0.1:{port}/idle/slow", compression=None) as client:
            await asyncio.to_thread(server.post, f"/broadcast?count=1&size={size}")
            message = await asyncio.wait_for(anext(client), 8)
            assert len(message.data) == size
            assert client.attempts == 1


@pytest.mark.parametrize("kind", UVICORN)
async def test_large_message_of_python_client_arrives_on_slow_link(serve: Serve, kind: str) -> None:
    """A message of the client that takes longer than both heartbeat times is accepted on the first connection."""
    server = serve(kind, config=HEARTBEAT, args=NO_UVICORN_PINGS)
    async with slow_link(server.port, 200_000, upload=True) as port:
        async with connect(f"ws://127.0.0.1:{port}/idle/slow", compression=None, probe_timeout=0.5) as client:
            await asyncio.wait_for(client.send("x" * 800_000), 8)
            assert client.attempts == 1


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_message_interrupted_twice_is_skipped_and_reported(serve: Serve, kind: str) -> None:
    """The third connection skips a message that was interrupted twice, reports a gap, and delivers the next one."""
    server = serve(kind, config={"replay_max_bytes": 8_000_000})
    gaps: list[Gap] = []
    async with slow_link(server.port, 200_000, upload=False) as port:
        async with connect(f"ws://127.0.0.1:{port}/idle/ann", compression=None, min_delay=0.05) as client:
            client.on_gap(gaps.append)
            await asyncio.to_thread(server.post, "/broadcast?count=1&size=2000000")
            await asyncio.to_thread(server.post, "/send/ann?text=behind")
            for _ in range(2):
                dials = client.attempts
                await asyncio.sleep(0.5)  # a part has arrived, and the rest takes 10 s
                client.reconnect()
                await until(lambda dials=dials: client.attempts > dials and client.state == "open")
            message = await asyncio.wait_for(anext(client), 5)
    assert message.data == "behind"
    assert gaps == [Gap(False, "unfinished", 1, 1)]
