"""An ended connection leaves no more to the garbage collector than a bare endpoint does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.server import LiveServer, until

COUNT = 200
"""Connections of each kind."""

AT_ONCE = 20

MORE_THAN_BARE = 1.0
"""Objects per connection that may be left to the collector beyond those of a bare endpoint."""

SUBPROTOCOL: Any = "stabilizer.v1.json"


async def open_client(server: LiveServer, path: str, **options: Any) -> ClientConnection:
    """Connect a client."""
    return await connect(server.url(path), compression=None, ping_interval=None, **options)


async def open_v1(server: LiveServer, path: str, number: int, **resume: Any) -> tuple[ClientConnection, dict[str, Any]]:
    """Connect a client of `stabilizer.v1.json`, and return its welcome."""
    client = await open_client(server, path, subprotocols=[SUBPROTOCOL])
    await client.send(json.dumps({"type": "hello", "v": 1, "n": number, "client": "i", **resume}))
    return client, json.loads(await client.recv())


async def until_closed(client: ClientConnection) -> int:
    """Read until the server closes, and return its code."""
    with suppress(ConnectionClosed):
        while True:
            await asyncio.wait_for(client.recv(), 10)
    return client.close_code or 0


async def plain(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/main/read/{name}")
    await client.send("hello")
    assert await client.recv() == "hello"
    await client.close()


async def with_handlers(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/main/run/{name}")
    await client.send('{"type":"echo"}')
    assert await client.recv() == '{"type":"echo"}'
    await client.close()


async def with_task(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/forgetful/task/{name}")
    await client.close()


async def failed(server: LiveServer, name: str, endpoint: str = "run") -> None:
    client = await open_client(server, f"/main/{endpoint}/{name}")
    await client.send('{"type":"fail"}')
    assert await until_closed(client) == 1011


async def failed_among_others(server: LiveServer, name: str) -> None:
    await failed(server, name, "concurrent")


async def failed_in_task(server: LiveServer, name: str) -> None:
    await failed(server, name, "failing")


async def unwelcome(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/main/read/unwelcome-{name}")
    assert await until_closed(client) == 4403


async def refused_by_auth(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/main/run/{name}", subprotocols=[SUBPROTOCOL])
    await client.send(json.dumps({"type": "hello", "v": 1, "n": 1, "client": "i", "auth": "wrong"}))
    assert await until_closed(client) == 4401


async def limited(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/limited/read/{name}")
    await client.send("hello")
    assert await client.recv() == "hello"
    await client.close()


async def by_hand(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/main/adopt/{name}")
    await client.send("hello")
    assert await client.recv() == "hello"
    await client.close()


async def by_hand_raw(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/main/raw/{name}")
    await client.send("hello")
    assert await client.recv() == "hello"
    await client.close()


async def by_hand_untracked(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/main/untracked/{name}")
    await client.send("hello")
    assert await client.recv() == "hello"
    await client.close()


async def v1_ended(server: LiveServer, name: str) -> None:
    client, _ = await open_v1(server, f"/main/run/{name}", 1)
    await client.send(json.dumps({"type": "msg", "seq": 1, "data": {"a": 1}}))
    await client.close(1000)


async def v1_expired(server: LiveServer, name: str) -> None:
    client, _ = await open_v1(server, f"/forgetful/run/{name}", 1)
    client.transport.abort()


async def v1_resumed(server: LiveServer, name: str) -> None:
    first, welcome = await open_v1(server, f"/main/run/{name}", 1)
    first.transport.abort()
    second, _ = await open_v1(server, f"/main/run/{name}", 2, resume={"token": welcome["token"], "seq": 0})
    await second.close(1000)


async def refused_by_hook(server: LiveServer, name: str) -> None:
    with pytest.raises(InvalidStatus):
        await open_client(server, f"/main/read/refused-{name}")


async def refused_by_admission(server: LiveServer, name: str) -> None:
    first = await open_client(server, f"/full/read/{name}")
    with pytest.raises(InvalidStatus):
        await open_client(server, f"/full/read/{name}")
    await first.close()


async def timed_out(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/beating/adopt/{name}")
    client.transport.pause_reading()  # it gets no ping, and answers none
    await asyncio.sleep(1.0)
    client.transport.resume_reading()
    assert await until_closed(client) == 4408


async def replaced(server: LiveServer, name: str) -> None:
    first = await open_client(server, f"/main/read/{name}")
    second = await open_client(server, f"/main/read/{name}")
    await until_closed(first)
    await second.close()


async def closed_by_endpoint(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/main/read/{name}")
    await client.send("close")
    assert await until_closed(client) == 4000


async def lost(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/main/read/{name}")
    client.transport.abort()


async def bare(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/bare/{name}")
    await client.send("hello")
    await client.close()


async def bare_failed(server: LiveServer, name: str) -> None:
    client = await open_client(server, f"/bare/{name}")
    await client.send("fail")
    await until_closed(client)


async def bare_refused(server: LiveServer, name: str) -> None:
    with pytest.raises(InvalidStatus):
        await open_client(server, f"/bare/refused/{name}")


Kind = Callable[[LiveServer, str], Awaitable[None]]

KINDS: dict[str, tuple[Kind, Kind, int]] = {
    one.__name__: (one, same, handshakes)
    for one, same, handshakes in [
        *((one, bare, 1) for one in (plain, with_handlers, with_task, limited, closed_by_endpoint, lost, timed_out)),
        *((one, bare, 1) for one in (by_hand, by_hand_raw, by_hand_untracked, v1_ended, v1_expired)),
        *((one, bare, 2) for one in (v1_resumed, replaced)),
        *((one, bare_failed, 1) for one in (failed, failed_among_others, failed_in_task, unwelcome, refused_by_auth)),
        (refused_by_hook, bare_refused, 1),
        (refused_by_admission, bare, 2),
    ]
}
"""What a client does, the same on a bare endpoint, and how many handshakes that needs."""


async def garbage(server: LiveServer, kind: Kind, count: int) -> int:
    """Let that many clients come and go, and return the objects that are left to the collector."""
    for start in range(0, count, AT_ONCE):
        await asyncio.gather(*(kind(server, f"c{start + number}") for number in range(AT_ONCE)))
    found: int = server.post("/collect")
    assert found >= 0, f"{-found} connections did not end"
    return found


async def garbage_each(server: LiveServer, kind: Kind) -> float:
    """Return how many objects one connection leaves to the collector, after the first ones."""
    await garbage(server, kind, AT_ONCE)
    return await garbage(server, kind, COUNT) / COUNT


@pytest.fixture(scope="module", params=["uvicorn-sansio", "uvicorn-stable"])
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """A server of each kind."""
    args = ("--log-level", "critical", "--ws-ping-interval", "0")
    with LiveServer(request.param, app="tests.apps.garbage:app", args=args) as server:
        yield server


@pytest.fixture(scope="module")
def of_bare(server: LiveServer) -> dict[Kind, float]:
    """Return how many objects one connection of a bare endpoint leaves to the collector, for each kind of ending."""
    return {kind: asyncio.run(garbage_each(server, kind)) for kind in (bare, bare_failed, bare_refused)}


@pytest.mark.parametrize("kind", KINDS)
async def test_ended_connection_leaves_no_garbage(server: LiveServer, of_bare: dict[Kind, float], kind: str) -> None:
    """However a connection ends, reference counting frees it, its socket, and the objects of the server."""
    play, same, handshakes = KINDS[kind]
    assert await garbage_each(server, play) <= handshakes * (of_bare[same] + MORE_THAN_BARE)


async def test_connections_closed_by_administrator_leave_no_garbage(
    server: LiveServer, of_bare: dict[Kind, float]
) -> None:
    """A close from outside of the endpoint leaves no garbage either."""
    found = 0
    for _ in range(2):  # the first time warms up
        clients = [await open_client(server, f"/main/read/c{number}") for number in range(COUNT)]
        await until(lambda: server.get("/connections") == COUNT)
        server.post("/close")
        assert set(await asyncio.gather(*map(until_closed, clients))) == {4001}
        found = server.post("/collect")
    assert found / COUNT <= of_bare[bare] + MORE_THAN_BARE
