"""A slow client does not delay other clients, and its memory is bounded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.support.raw import RawClient
from tests.support.server import UVICORN, LiveServer, until
from tests.support.wire_client import PING, PONG, TEXT

Serve = Callable[..., LiveServer]

SIZE = 65536


async def test_stalled_client_does_not_delay_broadcasts(serve: Serve) -> None:
    """300 broadcasts of 64 KiB reach four clients in order within 2 s while a fifth reads nothing."""
    server = serve(config={"send_timeout": 30})

    async def read(client: ClientConnection) -> list[int]:
        return [int(str(await client.recv())[:8]) for _ in range(300)]

    with RawClient(server.port, "/echo/stalled", receive_buffer=4096) as stalled:
        stalled.handshake()
        clients = [await connect(server.url(f"/echo/c{n}"), max_queue=None) for n in range(4)]
        await until(lambda: server.probe()["connections"] == 5)
        started = time.monotonic()
        readers = [asyncio.create_task(read(client)) for client in clients]
        report = await asyncio.to_thread(server.post, f"/broadcast?count=300&size={SIZE}&pause=0.002")
        received = await asyncio.wait_for(asyncio.gather(*readers), 10)
        took = time.monotonic() - started
        for client in clients:
            await client.close()
    assert received == [list(range(300))] * 4
    assert report["slowest"] < 0.05
    assert took < 2


@pytest.mark.parametrize("kind", [*UVICORN, "hypercorn"])
async def test_stalled_send_closes_after_send_timeout(serve: Serve, kind: str) -> None:
    """A stalled client is closed within send_timeout + 1 s, on_disconnect runs once, and SIGTERM exits within 3 s."""
    server = serve(kind, config={"send_timeout": 1, "disconnect_grace": 1})
    with RawClient(server.port, "/flood/stalled", receive_buffer=4096) as stalled:
        stalled.handshake()
        await server.until_event("connect stalled")
        started = time.monotonic()
        await server.until_event("disconnect stalled", 5)
        took = time.monotonic() - started
        assert server.probe()["connections"] == 0
        await until(lambda: server.events("flood ended"))
        assert server.events("flood ended") == ["flood ended stalled slow_consumer"]
        assert server.events("disconnect") == ["disconnect stalled slow_consumer 4507"]
        if kind in UVICORN:
            assert await asyncio.to_thread(server.terminate, 3) < 3
    # The flood fills the buffers of both kernels before its send stalls, and send_timeout starts then.
    assert took < 1 + 1 + 0.8
    assert not server.errors()


async def test_memory_stays_flat_while_client_does_not_read(serve: Serve) -> None:
    """2,000 messages of 64 KiB to a stalled client use less than 8 MiB, and close it as a slow consumer."""
    server = serve(config={"send_timeout": 60})
    with RawClient(server.port, "/echo/stalled", receive_buffer=4096) as stalled:
        stalled.handshake()
        async with connect(server.url("/echo/good"), max_queue=None) as good:
            await until(lambda: server.probe()["connections"] == 2)
            await asyncio.to_thread(server.post, f"/broadcast?count=5&size={SIZE}&pause=0.001")
            before = server.probe()["max_rss"]
            report = await asyncio.to_thread(server.post, f"/broadcast?count=2000&size={SIZE}&pause=0.001")
            after = server.probe()["max_rss"]
            for _ in range(2005):
                await good.recv()
        found = server.probe()
        assert after - before < 8 * 1024 * 1024
        assert report["failed"] == 1
        assert found["endings"]["slow_consumer"] == 1
        # Discarded messages are at most those of a full outbox, the one being sent, and the one that overflows.
        assert 0 < found["discarded"] <= 4 * 1024 * 1024 // SIZE + 2
        assert server.events("disconnect stalled") == ["disconnect stalled slow_consumer 4507"]


async def test_slow_client_reads_close_code_4507(serve: Serve) -> None:
    """After its outbox overflows, a client that reads again gets 4507."""
    server = serve(config={"outbox_max_messages": 4, "send_timeout": 30})
    with RawClient(server.port, "/idle/slow", receive_buffer=4096) as slow:
        slow.handshake()
        await server.until_event("connect")
        for _ in range(40):
            report = await asyncio.to_thread(server.post, f"/broadcast?count=10&size={SIZE}&pause=0.001")
            if report["failed"]:  # the only recipient failed, which the result reports without an exception
                break
        assert report["failed"] == 1
        code, reason = await asyncio.to_thread(slow.close_frame)
    assert (code, reason) == (4507, "slow consumer")


@pytest.mark.parametrize("kind", [*UVICORN, "hypercorn", "granian"])
@pytest.mark.parametrize("path", ["/send/ann?text=x&times=1500", "/broadcast?count=3000&size=1"])
async def test_burst_over_outbox_size_reaches_reading_client(serve: Serve, kind: str, path: str) -> None:
    """A burst of more messages than an outbox holds reaches a reading client completely."""
    server = serve(kind)
    async with connect(server.url("/echo/ann"), max_queue=None) as client:
        await until(lambda: server.probe()["connections"] == 1)
        sending = asyncio.create_task(asyncio.to_thread(server.post, path))
        for _ in range(1500 if path.startswith("/send") else 3000):
            await asyncio.wait_for(client.recv(), 5)
        await sending
    assert "slow_consumer" not in server.probe()["endings"]


async def test_slow_recipients_do_not_close_broadcasting_endpoint(serve: Serve) -> None:
    """A broadcast to a single slow recipient raises nothing, and the sender's connection goes on."""
    server = serve(config={"outbox_max_messages": 4, "send_timeout": 30})
    with RawClient(server.port, "/idle/slow", receive_buffer=4096) as slow:
        slow.handshake()
        await server.until_event("connect slow")
        async with connect(server.url("/relay/speaker"), max_size=None) as speaker:
            for _ in range(400):
                await speaker.send("x" * SIZE)
            await server.until_event("disconnect slow slow_consumer")
            await asyncio.wait_for(await speaker.ping(), 10)
    assert not server.errors()


async def test_direct_send_waits_for_slow_client_and_loses_nothing(serve: Serve) -> None:
    """`await ws.send()` in the endpoint waits while the outbox is full; every message arrives in order."""
    server = serve(config={"outbox_max_messages": 8})
    async with connect(server.url("/ten-writers/ann"), max_queue=2) as client:
        received = []
        for _ in range(1000):
            received.append(str(await client.recv()))
            if len(received) % 100 == 0:
                await asyncio.sleep(0.01)
    for writer in range(10):
        numbers = [int(m.split()[1]) for m in received if m.startswith(f"{writer} ")]
        assert numbers == list(range(100))


def read_value(client: RawClient) -> tuple[int, int]:
    """Read one broadcast value, with answers to the pings before it; return its number and the size of its frame."""
    while True:
        opcode, payload = client.frame()
        if opcode == PING:
            client.send(PONG, payload)
        else:
            assert opcode == TEXT, payload
            return int(payload[:8]), len(payload) + (2 if len(payload) < 126 else 4)


@pytest.mark.parametrize("size", [50, 200])
async def test_paused_client_gets_few_old_values(serve: Serve, size: int) -> None:
    """A client that pauses 6 s at 1,000 coalesced values a second gets at most 64 KiB of old ones when it reads on."""
    server = serve("uvicorn-stable")
    with RawClient(server.port, "/idle/ann") as client:
        client.handshake()
        await server.until_event("connect ann")
        sending = asyncio.create_task(asyncio.to_thread(server.post, f"/prices?seconds=9&rate=1000&size={size}"))
        reads_until = time.monotonic() + 1.5  # the receive buffer of the kernel grows with the reads
        while time.monotonic() < reads_until:
            await asyncio.to_thread(read_value, client)
        await asyncio.sleep(6)
        now = server.probe()["price"]
        assert now > 6000

        def read_old() -> int:
            total = 0
            while (value := read_value(client))[0] < now:
                total += value[1]
            return total

        old_bytes = await asyncio.to_thread(read_old)
        client.reset()
        await sending
    assert old_bytes <= 64 * 1024
    assert server.get("/ws-stats/")["messages_coalesced"] > 5000
    assert not server.errors()
