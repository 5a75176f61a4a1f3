"""What is held for clients on real servers: counted, limited, and given back; and what those see that go for others."""

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
    """The sum."""
    total: int = server.probe()["total_memory"]
    return total


@pytest.mark.parametrize("kind", KINDS)
async def test_evicted_client_gets_4503_with_retry_time(serve: Serve, kind: str) -> None:
    """4503 with `retry=` in milliseconds; who was heard of later stays, and the sum is what is held for it."""
    server = serve(kind, app=APP, config={"max_total_memory": 3 * MEGABYTE})
    async with connect(server.url("/ws/ann")) as ann, connect(server.url("/ws/bob")) as bob:
        server.post(f"/keep/ann?size={2 * MEGABYTE}")
        server.post(f"/keep/bob?size={2 * MEGABYTE}")
        code, reason = await received_close(ann)
        assert code == 4503
        assert reason.startswith("out of memory; retry=")
        assert 0 < int(reason.partition("retry=")[2]) <= 60_000
        await server.until_event("told ann")
        assert server.probe()["clients"] == ["bob"]
        assert server.events("disconnect") == ["disconnect ann memory"]
        assert 2 * MEGABYTE < memory(server) < 2 * MEGABYTE + 2_000
        await bob.close()
        await until(lambda: memory(server) == 0)


@pytest.mark.parametrize(("policy", "victim"), [("lru", "bob"), ("fifo", "ann"), ("oldest", "cid")])
async def test_each_eviction_policy_selects_its_client(serve: Serve, policy: str, victim: str) -> None:
    """Silent for longest, here for longest, sent nothing for longest: three clients, each goes under one policy."""
    server = serve("uvicorn-stable", app=APP, config={"max_total_memory": 4_000, "memory_eviction_policy": policy})
    clients = {name: await connect(server.url(f"/ws/{name}")) for name in ("ann", "bob", "cid")}
    for name in ("bob", "cid", "ann"):
        await clients[name].send('{"type":"keep","key":"x","size":900}')
        await asyncio.wait_for(clients[name].recv(), 5)
    for name in ("cid", "ann", "bob"):
        server.post(f"/push/{name}/1?size=10")
        await asyncio.wait_for(clients[name].recv(), 5)
    async with connect(server.url("/ws/dan")):
        server.post("/keep/dan?size=900")
        assert (await received_close(clients[victim]))[0] == 4503
        assert server.probe()["evictions"] == 1
    for client in clients.values():
        await client.close()


async def dial(server: LiveServer, token: str | None, number: int) -> tuple[ClientConnection, dict[str, Any]]:
    """Connect as a client of `stabilizer.v1.json`; return the welcome too."""
    client = await connect(server.url("/ws/ann"), subprotocols=[SUBPROTOCOL])  # type: ignore[list-item]
    hello: dict[str, Any] = {"type": "hello", "v": 1, "n": number, "client": "one and the same"}
    if token is not None:
        hello["resume"] = {"token": token, "seq": 0}
    await client.send(json.dumps(hello))
    welcome: dict[str, Any] = json.loads(await asyncio.wait_for(client.recv(), 5))
    return client, welcome


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("away", [False, True])
async def test_evicted_v1_client_loses_its_session(serve: Serve, kind: str, away: bool) -> None:
    """Its unacknowledged messages are what is held for it; when they go, it learns so from its next welcome."""
    server = serve(kind, app=APP, config={"max_total_memory": 250_000})
    client, welcome = await dial(server, None, 1)
    server.post("/push/ann/20?size=10000")
    assert 200_000 < memory(server) < 210_000
    if away:
        client.transport.abort()
        await server.until_event("told ann")
        assert 200_000 < memory(server) < 210_000
    async with connect(server.url("/ws/bob")):
        server.post("/keep/bob?size=100000")
        if not away:
            assert (await received_close(client))[0] == 4503
        assert memory(server) < 110_000
        again, answer = await dial(server, welcome["token"], 2)
        assert (answer["resume"], server.probe()["evictions"]) == ("lost", 1)
        await again.close()


async def test_nested_user_data_is_counted_fully(serve: Serve) -> None:
    """Whatever they are wrapped in; and not at all when the client has gone."""
    server = serve(app=APP)
    async with connect(server.url("/ws/ann")):
        server.post(f"/keep/ann?size={10 * MEGABYTE}")
        assert 10 * MEGABYTE < memory(server) < 10 * MEGABYTE + 2_000
    await until(lambda: memory(server) == 0)


async def test_set_user_data_over_limit_raises(serve: Serve) -> None:
    """`MemoryLimitExceededError` in the caller; nothing is written, and the connection goes on."""
    server = serve(app=APP, config={"max_memory_per_connection": MEGABYTE})
    async with connect(server.url("/ws/ann")) as ann:
        assert server.post("/keep/ann?size=500000&key=first") == {"kept": 500_000}
        refused = server.post("/keep/ann?size=600000&key=second")
        assert refused == {"refused": "max_memory_per_connection", "most": MEGABYTE}
        assert server.get("/keys/ann") == ["first"]
        await ann.send('{"type":"keep","key":"third","size":10}')
        assert await asyncio.wait_for(ann.recv(), 5) == "kept"


async def test_flood_of_client_at_its_limit_evicts_no_client(serve: Serve) -> None:
    """Where one client may hold only so much, its messages are answered with errors, and everybody stays."""
    limits = {"max_total_memory": 3 * MEGABYTE, "max_memory_per_connection": MEGABYTE}
    server = serve("uvicorn-stable", app=APP, config={**limits, "max_bad_messages": 1000})
    async with connect(server.url("/ws/ann")) as ann, connect(server.url("/ws/mal")) as mal:
        server.post("/keep/ann?size=900000")
        for number in range(50):
            await mal.send(json.dumps({"type": "keep", "key": f"k{number}", "size": 300_000}))
        answers: list[str] = []
        try:
            while len(answers) < 50:
                answers.append(str(await asyncio.wait_for(mal.recv(), 5)))
        except ConnectionClosed:
            pass
        assert answers.count("kept") == 3
        found = server.probe()
        assert (found["evictions"], "ann" in found["clients"]) == (0, True)
        assert found["total_memory"] < 2 * MEGABYTE
        await ann.send('{"type":"keep","key":"small","size":10}')
        assert await asyncio.wait_for(ann.recv(), 5) == "kept"


@pytest.mark.parametrize("kind", KINDS)
async def test_eviction_does_not_delay_new_connection(serve: Serve, kind: str) -> None:
    """A client that reads nothing and whose hook takes three seconds has to go: the one it goes for is in at once."""
    server = serve(kind, app=APP, config={"max_total_memory": MEGABYTE, "disconnect_grace": 5})
    with RawClient(server.port, "/ws/slow", receive_buffer=4096) as slow:
        assert "101" in slow.handshake()
        await until(lambda: server.probe()["clients"] == ["slow"])
        server.post("/keep/slow?size=800000")
        server.post("/push/slow/10?size=100000")
        async with connect(server.url("/hand/quick/900000")) as quick:
            assert float(await asyncio.wait_for(quick.recv(), 5)) < 0.5
            assert server.events("told") == []
            await server.until_event("told slow")
            assert 900_000 < memory(server) < MEGABYTE


@pytest.mark.parametrize("kind", KINDS)
async def test_broadcast_to_stalled_clients_is_stored_once(serve: Serve, kind: str) -> None:
    """Ten clients that read nothing are sent the same megabytes: they count once, and the limit holds all the while."""
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
