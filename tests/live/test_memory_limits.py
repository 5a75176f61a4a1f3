"""Memory held for clients on real servers: counted, limited and freed, and what evicted clients get."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from fastapi_ws_stabilizer.memory.budget import FRAME_OVERHEAD_BYTES
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.plain_client import received_close
from tests.support.raw import RawClient
from tests.support.server import LiveServer, until

Serve = Callable[..., LiveServer]

APP = "tests.live.memory_app:app"
KINDS = ["uvicorn-sansio", "uvicorn-stable"]
MEGABYTE = 1_000_000


def memory(server: LiveServer) -> int:
    """Return the bytes held for all clients."""
    total: int = server.probe()["total_memory"]
    return total


@pytest.mark.parametrize("kind", KINDS)
async def test_evicted_client_gets_4503_with_retry_time(serve: Serve, kind: str) -> None:
    """The evicted client gets 4503 with `retry=` in ms; the more recent one stays, and only its memory is counted."""
    server = serve(kind, app=APP, config={"max_total_memory": 3 * MEGABYTE})
    async with connect(server.url("/ws/ann")) as ann, connect(server.url("/ws/bob")) as bob:
        server.post(f"/store/ann?size={2 * MEGABYTE}")
        server.post(f"/store/bob?size={2 * MEGABYTE}")
        code, reason = await received_close(ann)
        assert code == 4503
        assert reason.startswith("out of memory; retry=")
        assert 0 < int(reason.partition("retry=")[2]) <= 60_000
        await server.until_event("hook done ann")
        assert server.probe()["clients"] == ["bob"]
        assert server.events("disconnect") == ["disconnect ann memory"]
        assert 2 * MEGABYTE < memory(server) < 2 * MEGABYTE + 2_000
        await bob.close()
        await until(lambda: memory(server) == 0)


@pytest.mark.parametrize(("policy", "evicted"), [("lru", "bob"), ("fifo", "ann"), ("oldest", "cid")])
async def test_each_eviction_policy_selects_its_client(serve: Serve, policy: str, evicted: str) -> None:
    """Each policy evicts its client: longest silent, longest connected, and longest without a message sent to it."""
    server = serve("uvicorn-stable", app=APP, config={"max_total_memory": 4_000, "memory_eviction_policy": policy})
    clients = {name: await connect(server.url(f"/ws/{name}")) for name in ("ann", "bob", "cid")}
    for name in ("bob", "cid", "ann"):
        await clients[name].send('{"type":"store","key":"x","size":900}')
        await asyncio.wait_for(clients[name].recv(), 5)
    for name in ("cid", "ann", "bob"):
        server.post(f"/push/{name}/1?size=10")
        await asyncio.wait_for(clients[name].recv(), 5)
    async with connect(server.url("/ws/dan")):
        server.post("/store/dan?size=900")
        assert (await received_close(clients[evicted]))[0] == 4503
        assert server.probe()["evictions"] == 1
    for client in clients.values():
        await client.close()


async def dial(server: LiveServer, token: str | None, number: int) -> tuple[ClientConnection, dict[str, Any]]:
    """Connect as a `stabilizer.v1.json` client, and return the welcome too."""
    client = await connect(server.url("/ws/ann"), subprotocols=[SUBPROTOCOL])  # type: ignore[list-item]
    hello: dict[str, Any] = {"type": "hello", "v": 1, "n": number, "client": "the client"}
    if token is not None:
        hello["resume"] = {"token": token, "seq": 0}
    await client.send(json.dumps(hello))
    welcome: dict[str, Any] = json.loads(await asyncio.wait_for(client.recv(), 5))
    return client, welcome


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detached", [False, True])
async def test_evicted_v1_client_loses_its_session(serve: Serve, kind: str, detached: bool) -> None:
    """Unacknowledged messages count for a session, and the next welcome after an eviction reports `lost`."""
    server = serve(kind, app=APP, config={"max_total_memory": 250_000})
    client, welcome = await dial(server, None, 1)
    server.post("/push/ann/20?size=10000")
    assert 200_000 < memory(server) < 210_000
    if detached:
        client.transport.abort()
        await server.until_event("hook done ann")
        assert 200_000 < memory(server) < 210_000
    async with connect(server.url("/ws/bob")):
        server.post("/store/bob?size=100000")
        if not detached:
            assert (await received_close(client))[0] == 4503
        assert memory(server) < 110_000
        again, answer = await dial(server, welcome["token"], 2)
        assert (answer["resume"], server.probe()["evictions"]) == ("lost", 1)
        await again.close()


async def test_nested_user_data_is_counted_fully(serve: Serve) -> None:
    """Nested user data is counted completely, and no longer after the disconnect."""
    server = serve(app=APP)
    async with connect(server.url("/ws/ann")):
        server.post(f"/store/ann?size={10 * MEGABYTE}")
        assert 10 * MEGABYTE < memory(server) < 10 * MEGABYTE + 2_000
    await until(lambda: memory(server) == 0)


async def test_set_user_data_over_limit_raises(serve: Serve) -> None:
    """`MemoryLimitExceededError` reaches the caller, nothing is written, and the connection goes on."""
    server = serve(app=APP, config={"max_memory_per_connection": MEGABYTE})
    async with connect(server.url("/ws/ann")) as ann:
        assert server.post("/store/ann?size=500000&key=first") == {"stored": 500_000}
        result = server.post("/store/ann?size=600000&key=second")
        assert result == {"refused": "max_memory_per_connection", "limit": MEGABYTE}
        assert server.get("/keys/ann") == ["first"]
        await ann.send('{"type":"store","key":"third","size":10}')
        assert await asyncio.wait_for(ann.recv(), 5) == "stored"


async def test_flood_of_client_at_its_limit_evicts_no_client(serve: Serve) -> None:
    """Messages of a client at its own memory limit get errors, and no client is evicted."""
    limits = {"max_total_memory": 3 * MEGABYTE, "max_memory_per_connection": MEGABYTE}
    server = serve("uvicorn-stable", app=APP, config={**limits, "max_bad_messages": 1000})
    async with connect(server.url("/ws/ann")) as ann, connect(server.url("/ws/mal")) as mal:
        server.post("/store/ann?size=900000")
        for number in range(50):
            await mal.send(json.dumps({"type": "store", "key": f"k{number}", "size": 300_000}))
        answers: list[str] = []
        try:
            while len(answers) < 50:
                answers.append(str(await asyncio.wait_for(mal.recv(), 5)))
        except ConnectionClosed:
            pass
        assert answers.count("stored") == 3
        found = server.probe()
        assert (found["evictions"], "ann" in found["clients"]) == (0, True)
        assert found["total_memory"] < 2 * MEGABYTE
        await ann.send('{"type":"store","key":"small","size":10}')
        assert await asyncio.wait_for(ann.recv(), 5) == "stored"


@pytest.mark.parametrize("kind", KINDS)
async def test_eviction_does_not_delay_new_connection(serve: Serve, kind: str) -> None:
    """A connection is accepted at once, though the evicted client reads nothing and its hook takes 3 s."""
    server = serve(kind, app=APP, config={"max_total_memory": MEGABYTE, "disconnect_grace": 5})
    with RawClient(server.port, "/ws/slow", receive_buffer=4096) as slow:
        assert "101" in slow.handshake()
        await until(lambda: server.probe()["clients"] == ["slow"])
        server.post("/store/slow?size=800000")
        server.post("/push/slow/10?size=100000")
        async with connect(server.url("/adopt/quick/900000")) as quick:
            assert float(await asyncio.wait_for(quick.recv(), 5)) < 0.5
            assert server.events("hook done") == []
            await server.until_event("hook done slow")
            assert 900_000 < memory(server) < MEGABYTE


@pytest.mark.parametrize("kind", KINDS)
async def test_broadcast_to_stalled_clients_is_stored_once(serve: Serve, kind: str) -> None:
    """A broadcast to ten stalled clients counts once, and the total limit is never exceeded."""
    config = {"max_total_memory": 2 * MEGABYTE, "outbox_max_bytes": 5 * MEGABYTE, "send_timeout": 60}
    server = serve(kind, app=APP, config=config)
    clients = [RawClient(server.port, f"/ws/c{number}", receive_buffer=4096) for number in range(10)]
    for client in clients:
        client.handshake()
    await until(lambda: len(server.probe()["clients"]) == 10)
    sums = []
    while not server.probe()["evictions"]:
        server.post("/broadcast/1?size=100000")
        sums.append(memory(server))
        assert len(sums) < 200
    assert MEGABYTE < max(sums) <= 2 * MEGABYTE
    assert max(after - before for before, after in itertools.pairwise(sums)) <= 100_000 + FRAME_OVERHEAD_BYTES
    for client in clients:
        client.close()
    await until(lambda: memory(server) == 0, 10)
