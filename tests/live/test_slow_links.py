"""Bytes prove life, in both directions: a slow link is no dead one, and a client that takes nothing is always found."""

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
"""uvicorn's own pings wait behind a large message too, and it closes a client that does not answer in time."""


def read_at(client: RawClient, rate: int, seconds: float) -> int:
    """Read so many bytes a second, steadily; return how many have come."""
    began, got = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        if got >= rate * passed:
            time.sleep(0.01)
            continue
        data = client.socket.recv(min(16384, rate // 20))
        if not data:
            raise ConnectionError(f"cut after {passed:.1f} s and {got} bytes")
        got += len(data)
    return got


@pytest.mark.parametrize("size", [40_000, 12_000_000])
@pytest.mark.parametrize("kind", UVICORN)
async def test_client_stalled_within_one_message_is_closed(serve: Serve, kind: str, size: int) -> None:
    """A client that stops reading is found though one message is on its way to it and nothing waits behind that."""
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
    """What leaves the kernel's queue is progress: a client that reads for longer than send_timeout stays."""
    server = serve(kind, config={"send_timeout": 1, "compression": "none"}, args=NO_UVICORN_PINGS)
    with RawClient(server.port, "/flood/slow", receive_buffer=65536) as client:
        client.handshake()
        assert await asyncio.to_thread(read_at, client, 400_000, 5) > 1_000_000
        assert not server.events("disconnect")


@pytest.mark.parametrize("kind", UVICORN)
async def test_slow_reader_gets_last_message_and_close_frame(serve: Serve, kind: str) -> None:
    """A client that takes bytes all the time gets all that an endpoint has sent before it returned."""
    server = serve(kind, config={"send_timeout": 1, "compression": "none"}, args=NO_UVICORN_PINGS)
    size = 6_000_000
    with RawClient(server.port, f"/return/slow?size={size}", receive_buffer=65536) as client:
        client.handshake()
        got = await asyncio.to_thread(read_at, client, 1_500_000, size / 1_500_000 - 0.5)
        rest = await asyncio.to_thread(read_rest, client)
    assert got + len(rest) >= 10 + size + 4
    assert rest[-4:] == b"\x88\x02\x03\xe8"


HEARTBEAT = {"heartbeat_interval": 0.5, "heartbeat_timeout": 1, "require_pong": True, "compression": "none"}


def binary_head(size: int) -> bytes:
    """The head of a binary frame of a client, whose mask changes nothing."""
    return b"\x82\xff" + struct.pack("!Q", size) + bytes(4)


@pytest.mark.parametrize("kind", UVICORN)
async def test_slow_upload_does_not_count_as_silence(serve: Serve, kind: str) -> None:
    """A client that needs longer than heartbeat_interval + heartbeat_timeout for one message stays, and is answered."""
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
    """A byte now and then holds a connection as long as the largest message takes at 4 KiB a second, and no longer."""
    server = serve(kind, config={**HEARTBEAT, "max_message_size": 4096}, args=NO_UVICORN_PINGS)
    with RawClient(server.port, "/echo/drip") as client:
        client.handshake()
        client.socket.sendall(binary_head(4096))
        began = time.monotonic()
        while not server.events("disconnect drip") and time.monotonic() - began < 6:
            client.socket.sendall(b"x")
            await asyncio.sleep(0.1)
        took = time.monotonic() - began
    assert server.events("disconnect drip") == ["disconnect drip heartbeat_timeout 4408"]
    assert 2 <= took < 5


@pytest.mark.parametrize("kind", UVICORN)
async def test_ping_behind_large_message_causes_no_timeout(serve: Serve, kind: str) -> None:
    """A client that needs longer than heartbeat_interval + heartbeat_timeout to read one message stays."""
    server = serve(kind, config=HEARTBEAT, args=NO_UVICORN_PINGS)
    with RawClient(server.port, "/echo/slow", receive_buffer=65536) as client:
        client.handshake()
        await server.until_event("connect slow")
        client.send(1, b"pong")
        await asyncio.to_thread(server.post, "/broadcast?count=1&size=3000000")
        assert await asyncio.to_thread(read_at, client, 600_000, 4.5) > 2_000_000
        client.send(1, b"pong")
        assert not server.events("disconnect")


def read_rest(client: RawClient) -> bytes:
    """Read until nothing more comes."""
    rest = b""
    while not rest.endswith(b"\x88\x02\x03\xe8") and (data := client.socket.recv(1 << 20)):
        rest += data
    return rest


@pytest.mark.parametrize("kind", UVICORN)
async def test_large_message_to_python_client_arrives_on_slow_link(serve: Serve, kind: str) -> None:
    """A message that takes longer than heartbeat_interval + heartbeat_timeout arrives in the first connection."""
    server = serve(kind, config=HEARTBEAT, args=NO_UVICORN_PINGS)
    size = 2_000_000
    async with slow_link(server.port, 500_000, upload=False) as port:
        async with connect(f"ws://127.0.0.1:{port}/idle/slow", compression=None) as client:
            await asyncio.to_thread(server.post, f"/broadcast?count=1&size={size}")
            message = await asyncio.wait_for(anext(client), 8)
            assert len(message.data) == size
            assert client.dials == 1


@pytest.mark.parametrize("kind", UVICORN)
async def test_large_message_of_python_client_arrives_on_slow_link(serve: Serve, kind: str) -> None:
    """The same the other way: the server takes it, and says so, in the first connection."""
    server = serve(kind, config=HEARTBEAT, args=NO_UVICORN_PINGS)
    async with slow_link(server.port, 200_000, upload=True) as port:
        async with connect(f"ws://127.0.0.1:{port}/idle/slow", compression=None, probe_timeout=0.5) as client:
            await asyncio.wait_for(client.send("x" * 800_000), 8)
            assert client.dials == 1


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_message_interrupted_twice_is_skipped_and_reported(serve: Serve, kind: str) -> None:
    """The third connection begins behind it, and what was sent after it arrives."""
    server = serve(kind, config={"replay_max_bytes": 8_000_000})
    gaps: list[Gap] = []
    async with slow_link(server.port, 200_000, upload=False) as port:
        async with connect(f"ws://127.0.0.1:{port}/idle/ann", compression=None, min_delay=0.05) as client:
            client.on_gap(gaps.append)
            await asyncio.to_thread(server.post, "/broadcast?count=1&size=2000000")
            await asyncio.to_thread(server.post, "/send/ann?text=behind")
            for _ in range(2):
                dials = client.dials
                await asyncio.sleep(0.5)  # some of it is there, and the rest takes ten seconds
                client.reconnect()
                await until(lambda dials=dials: client.dials > dials and client.state == "open")
            message = await asyncio.wait_for(anext(client), 5)
    assert message.data == "behind"
    assert gaps == [Gap(False, "unfinished", 1, 1)]
