"""Second connections of a client id, which end independently of the first ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from websockets.asyncio.client import connect

from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.plain_client import received_close
from tests.support.server import UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]


@pytest.mark.parametrize("path", ["/slow-finish/ann", "/adopt-slow/ann"])
async def test_late_end_of_replaced_connection_spares_newer_one(serve: Serve, path: str) -> None:
    """The late end of a replaced endpoint leaves the newer connection open, by the dependency and by `connect()`."""
    server = serve(config={"disconnect_grace": 10})
    async with connect(server.url(path)) as old:
        await until(lambda: server.probe()["connections"] == 1)
        async with connect(server.url(path)) as new:
            assert (await received_close(old))[0] == 4409
            assert server.probe()["clients"] == ["ann"]
            await until(lambda: server.events("finished ann") or server.events("adopt-slow finished"))
            assert server.probe()["connections"] == 1
            assert await asyncio.to_thread(server.post, "/send/ann?text=hello") is True
            assert await asyncio.wait_for(new.recv(), 2) == "hello"
            await new.send("still here")
            assert await asyncio.wait_for(new.recv(), 2) == "still here"
    await until(lambda: len(server.events("disconnect")) == 2)
    assert sorted(server.events("disconnect"))[1] == "disconnect ann replaced 4409"
    assert not server.errors()


@pytest.mark.parametrize("kind", UVICORN)
@pytest.mark.parametrize("path", ["/echo/ann", "/adopt/ann", "/run/ann"])
async def test_on_disconnect_of_replaced_precedes_on_connect_of_new(serve: Serve, kind: str, path: str) -> None:
    """`on_disconnect` of the replaced connection runs before `on_connect` of the new one, on each kind of server."""
    server = serve(kind)
    protocol = [SUBPROTOCOL] if path.startswith("/run") else None
    hello = json.dumps({"type": "hello", "v": 1, "n": 1})
    async with connect(server.url(path), subprotocols=protocol) as old:  # type: ignore[arg-type]
        if protocol:
            await old.send(hello)
        await server.until_event("connect ann")
        async with connect(server.url(path), subprotocols=protocol) as new:  # type: ignore[arg-type]
            if protocol:
                await new.send(hello)
            await until(lambda: len(server.events()) >= 3)
            code = 4410 if protocol else 4409
            assert server.events()[:3] == ["connect ann", f"disconnect ann replaced {code}", "connect ann"]
    assert not server.errors()


async def test_fifty_rapid_reconnects_leave_one_entry(serve: Serve) -> None:
    """Of 50 connections of one client only the last one remains."""
    server = serve()
    clients = [await connect(server.url("/echo/ann")) for _ in range(50)]
    await clients[-1].send("x")
    assert await clients[-1].recv() == "x"
    found = server.probe()
    assert (found["connections"], found["clients"]) == (1, ["ann"])
    for client in clients:
        await client.close()
    await until(lambda: server.probe()["connections"] == 0)
    await until(lambda: server.events()[-1].startswith("disconnect"))
    # A connection that is replaced before its `on_connect` began has no hooks; the others have them in order.
    assert [event.split()[0] for event in server.events()] == ["connect", "disconnect"] * len(server.events("connect"))
    assert not server.errors()


@pytest.mark.parametrize("path", ["/echo/ann", "/adopt/ann"])
async def test_on_duplicate_reject_closes_newer_with_4409(serve: Serve, path: str) -> None:
    """With on_duplicate="reject" the second connection gets 4409, and no hook runs for it."""
    server = serve(config={"on_duplicate": "reject"})
    async with connect(server.url(path)) as old:
        await until(lambda: server.probe()["connections"] == 1)
        async with connect(server.url(path)) as new:
            assert (await received_close(new))[0] == 4409
        await old.send("x")
        assert await old.recv() == "x"
        assert server.events() == ["connect ann"]
    await server.until_event("disconnect ann client_close")
    assert not server.errors()


async def test_on_duplicate_allow_sends_to_all_connections(serve: Serve) -> None:
    """With on_duplicate="allow" one client has several connections, and the end of one leaves the other open."""
    server = serve(config={"on_duplicate": "allow"})
    async with connect(server.url("/echo/ann")) as first:
        async with connect(server.url("/echo/ann")) as second:
            await until(lambda: server.probe()["connections"] == 2)
            assert await asyncio.to_thread(server.post, "/send/ann?text=both") is True
            assert [await first.recv(), await second.recv()] == ["both", "both"]
        await until(lambda: server.probe()["connections"] == 1)
        await first.send("alone")
        assert await first.recv() == "alone"


async def test_disconnect_closes_client_or_raises_not_found(server: LiveServer) -> None:
    """`disconnect` raises ConnectionNotFoundError for an unknown client, and closes a connected one with its code."""
    with pytest.raises(Exception, match="500"):
        await asyncio.to_thread(server.post, "/kick/unknown")
    await until(lambda: "client 'unknown' is not connected" in server.log)
    async with connect(server.url("/echo/kicked")) as client:
        await until(lambda: "kicked" in server.probe()["clients"])
        assert await asyncio.to_thread(server.post, "/kick/kicked") is True
        assert (await received_close(client))[0] == 4403
