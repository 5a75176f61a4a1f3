"""Heartbeats close dead clients, spare live ones, and hold idle connections open behind proxies."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.support.plain_client import received_close
from tests.support.raw import RawClient, idle_cutting_proxy
from tests.support.server import SERVERS, UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]

NO_SERVER_PINGS = {
    "granian": (),
    "hypercorn": (),
    **dict.fromkeys(UVICORN, ("--ws-ping-interval", "0")),
}


@pytest.mark.parametrize("kind", UVICORN)
async def test_busy_handler_does_not_trigger_heartbeat_timeout(serve: Serve, kind: str) -> None:
    """With server pings of 1 s + 1 s a handler may work for 6 s while a second message waits."""
    server = serve(kind, args=("--ws-ping-interval", "1", "--ws-ping-timeout", "1"))
    async with connect(server.url("/run/ann")) as client:
        for name in ("first", "second"):
            await client.send(json.dumps({"type": "wait", "seconds": 6 if name == "first" else 0, "name": name}))
        assert [await client.recv(), await client.recv()] == ["first", "second"]


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["uvicorn-sansio", "granian"])
async def test_heartbeat_holds_idle_connection_open_behind_proxy(serve: Serve, kind: str) -> None:
    """Without server pings, an idle socket stays open for 10 s behind a proxy with an idle timeout of 2 s."""
    args = NO_SERVER_PINGS[kind]
    server = serve(kind, args=args, config={"heartbeat_interval": 1, "heartbeat_timeout": 3})
    async with idle_cutting_proxy(server.port, 2.0) as port:
        async with connect(f"ws://127.0.0.1:{port}/idle/ann", ping_interval=None) as client:
            deadline = time.monotonic() + 10
            while (left := deadline - time.monotonic()) > 0:
                try:
                    message = await asyncio.wait_for(client.recv(), left)
                except asyncio.TimeoutError:
                    break
                assert json.loads(message) == {"type": "ping"}
                await client.send("pong")
            assert server.probe()["clients"] == ["ann"]


async def test_proxy_closes_idle_connection_without_heartbeat(serve: Serve) -> None:
    """Without heartbeats a proxy cuts the idle connection, so the test above can fail."""
    server = serve(args=("--ws-ping-interval", "0"), config={"heartbeat_type": "off"})
    async with idle_cutting_proxy(server.port, 0.5) as port:
        async with connect(f"ws://127.0.0.1:{port}/idle/ann", ping_interval=None) as client:
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(client.recv(), 3)


@pytest.mark.parametrize("kind", SERVERS)
async def test_silent_client_closes_after_interval_plus_timeout(serve: Serve, kind: str) -> None:
    """A client that is silent after the handshake is closed with 4408 within interval + timeout, once."""
    config = {"heartbeat_interval": 0.5, "heartbeat_timeout": 1.0, "require_pong": True}
    server = serve(kind, args=NO_SERVER_PINGS[kind], config=config)
    with RawClient(server.port, "/echo/silent") as client:
        assert "101" in client.handshake()
        started = time.monotonic()
        assert await asyncio.to_thread(client.close_frame, 5) == (4408, "heartbeat timeout")
        took = time.monotonic() - started
        await server.until_event("disconnect silent heartbeat_timeout 4408")
    assert 1.0 <= took < 0.5 + 1.0 + 0.5
    found = server.probe()
    assert found["endings"] == {"heartbeat_timeout": 1}
    assert server.events("disconnect") == ["disconnect silent heartbeat_timeout 4408"]


@pytest.mark.parametrize(("interval", "timeout"), [(0.3, 1.2), (1.0, 0.3)])
async def test_heartbeat_timeout_is_independent_of_interval(serve: Serve, interval: float, timeout: float) -> None:
    """The time from the first unanswered ping to the close is heartbeat_timeout, whatever the interval."""
    server = serve(config={"heartbeat_interval": interval, "heartbeat_timeout": timeout, "require_pong": True})
    async with connect(server.url("/echo/ann")) as client:
        assert json.loads(await client.recv()) == {"type": "ping"}
        pinged = time.monotonic()
        code, _ = await received_close(client)
        took = time.monotonic() - pinged
    assert code == 4408
    assert timeout - 0.05 < took < timeout + 0.4


async def test_any_frame_counts_as_liveness(serve: Serve) -> None:
    """A client that answers no ping but sends messages stays connected."""
    server = serve(config={"heartbeat_interval": 0.2, "heartbeat_timeout": 0.4, "require_pong": True})
    async with connect(server.url("/echo/chatty"), max_queue=None) as client:
        for _ in range(20):
            await client.send("I am here")
            await asyncio.sleep(0.1)
        assert server.probe()["clients"] == ["chatty"]


async def test_client_that_never_ponged_is_left_to_server_pings(serve: Serve) -> None:
    """With require_pong="auto" the timeout applies only after the first pong."""
    server = serve(config={"heartbeat_interval": 0.2, "heartbeat_timeout": 0.4})
    async with connect(server.url("/echo/silent")), connect(server.url("/echo/answers")) as answers:
        await answers.send("pong")
        await asyncio.sleep(1.5)
        assert server.probe()["clients"] == ["silent"]
        await server.until_event("disconnect answers heartbeat_timeout 4408")


async def test_stalled_client_does_not_delay_heartbeats(serve: Serve) -> None:
    """Heartbeats go on at their rate while a send to another client is stalled."""
    server = serve(config={"heartbeat_interval": 0.2, "send_timeout": 30})
    with RawClient(server.port, "/flood/stalled", receive_buffer=4096) as stalled:
        stalled.handshake()
        async with connect(server.url("/idle/ann")) as client:
            await asyncio.sleep(0.5)
            beats = 0
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                assert json.loads(await asyncio.wait_for(client.recv(), 1)) == {"type": "ping"}
                beats += 1
    assert 8 <= beats <= 14


async def test_read_pause_does_not_trigger_heartbeat_timeout(serve: Serve) -> None:
    """A client is not closed for pongs that the server does not read during a read pause."""
    config = {"heartbeat_interval": 0.2, "heartbeat_timeout": 0.4, "require_pong": True, "inbox_max_messages": 2}
    server = serve(config=config, args=("--ws-ping-interval", "0"))
    async with connect(server.url("/run/ann")) as client:
        await client.send(json.dumps({"type": "wait", "seconds": 2, "name": "slow"}))
        for number in range(6):
            await client.send(json.dumps({"type": "echo", "number": number}))
        received = []
        while len(received) < 7:
            message = str(await asyncio.wait_for(client.recv(), 5))
            if "ping" in message:
                await client.send("pong")
            else:
                received.append(message)
        assert received[0] == "slow"
        assert [json.loads(message)["number"] for message in received[1:]] == list(range(6))


async def test_round_trip_time_is_in_stats(serve: Serve) -> None:
    """The stats contain the round trip after an answered ping."""
    server = serve(config={"heartbeat_interval": 0.1})
    async with connect(server.url("/echo/ann")) as client:
        await client.recv()
        await asyncio.sleep(0.05)
        await client.send('{"type":"pong"}')
        found = await until(
            lambda: [c for c in server.get("/ws-stats/connections")["connections"] if c["rtt_seconds"] is not None]
        )
    assert 0.04 < found[0]["rtt_seconds"] < 1


async def test_client_text_pings_are_answered_and_hidden(serve: Serve) -> None:
    """`ping` gets `pong`, a JSON ping gets its `ts` back, and every similar text is data."""
    server = serve()
    async with connect(server.url("/echo/ann")) as client:
        await client.send("ping")
        assert await client.recv() == "pong"
        await client.send('{"type":"ping","ts":17}')
        assert json.loads(await client.recv()) == {"type": "pong", "ts": 17}
        for data in ("pinging", '{"type":"ping","room":1}', "pong!", '{"type": "pong", "x": 1}', "p", "{"):
            await client.send(data)
            assert await client.recv() == data
