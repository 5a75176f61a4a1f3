"""Rooms and presence end to end, and slow clients of a room, on every server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.support.raw import RawClient
from tests.support.server import SERVERS, UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]

APP = "tests.live.rooms_app:app"
GRACE = 0.4
LONG_TIMEOUT = 60
SIZE = 65536
MORE_THAN_BUFFERS = 200  # messages of that size


async def send_command(client: ClientConnection, kind: str, text: str = "", *, room: str = "lobby") -> None:
    await client.send(json.dumps({"type": kind, "room": room, "text": text}))


async def next_message(client: ClientConnection) -> Any:
    """Return the next message."""
    return json.loads(await asyncio.wait_for(client.recv(), 5))


async def joined(client: ClientConnection, text: str = "", *, room: str = "lobby") -> dict[str, int]:
    """Join a room, and return its clients with their number of connections.

    `on_join` sends to the members at the time it runs, so wait for its event before another client joins.
    """
    await send_command(client, "join", text, room=room)
    return await present(client)


async def present(client: ClientConnection) -> dict[str, int]:
    """Return the clients from the next message, which must answer a presence request."""
    message = await next_message(client)
    assert message["type"] == "present", message
    clients: dict[str, int] = message["clients"]
    return clients


def raw_client_in_room(server: LiveServer, client_id: str) -> RawClient:
    """Return a client on a bare socket with a small buffer, after it has joined the room."""
    client = RawClient(server.port, f"/ws/{client_id}", receive_buffer=4096)
    client.handshake()
    client.send(1, b'{"type":"join","room":"lobby"}')
    assert json.loads(client.frame()[1])["type"] == "present"
    return client


@pytest.mark.parametrize("kind", SERVERS)
async def test_room_message_reaches_members_only(serve: Serve, kind: str) -> None:
    """A room message reaches all members except the sender, and each join is announced with its metadata."""
    server = serve(kind, app=APP)
    async with (
        connect(server.url("/ws/ann")) as ann,
        connect(server.url("/ws/bob")) as bob,
        connect(server.url("/ws/cyd")) as cyd,
    ):
        assert await joined(ann) == {"ann": 1}
        await server.until_event("joined ann")
        assert await joined(bob, "gay") == {"ann": 1, "bob": 1}
        assert await next_message(ann) == {"type": "joined", "client_id": "bob", "mood": "gay"}
        assert await joined(cyd, room="garden") == {"cyd": 1}
        assert server.probe()["rooms"] == {"lobby": ["ann", "bob"], "garden": ["cyd"]}
        await send_command(ann, "say", "hello")
        assert await next_message(bob) == {"type": "said", "from": "ann", "text": "hello"}
        for client in (ann, cyd):  # the next message is the answer to this
            await send_command(client, "presence")
            assert await present(client) == {"ann": 1, "bob": 1}
        await send_command(bob, "leave")
        assert await next_message(ann) == {"type": "left", "client_id": "bob"}
        await send_command(ann, "say", "hello?")
        await send_command(bob, "presence")
        assert await present(bob) == {"ann": 1}
    await until(lambda: server.probe()["rooms"] == {})
    assert not server.errors()


@pytest.mark.parametrize("kind", SERVERS)
async def test_reset_client_leaves_presence_after_grace(serve: Serve, kind: str) -> None:
    """The connection leaves the room at once, and the client leaves presence after the grace."""
    server = serve(kind, app=APP, config={"presence_grace": GRACE})
    async with connect(server.url("/ws/bob")) as bob:
        await joined(bob)
        await server.until_event("joined bob")
        with raw_client_in_room(server, "ann") as ann:
            assert (await next_message(bob))["type"] == "joined"
            reset_at = time.monotonic()
            ann.reset()
        assert await next_message(bob) == {"type": "left", "client_id": "ann"}
        assert GRACE <= time.monotonic() - reset_at < GRACE + 2
        await send_command(bob, "presence")
        assert await present(bob) == {"bob": 1}
    assert not server.errors()


@pytest.mark.parametrize("kind", SERVERS)
async def test_reconnect_within_grace_announces_nothing(serve: Serve, kind: str) -> None:
    """Within the grace a client is present without a connection, and neither leave nor join is announced."""
    server = serve(kind, app=APP, config={"presence_grace": LONG_TIMEOUT})
    async with connect(server.url("/ws/bob")) as bob:
        await joined(bob)
        await server.until_event("joined bob")
        with raw_client_in_room(server, "ann") as ann:
            assert (await next_message(bob))["type"] == "joined"
            ann.reset()
        await until(lambda: server.probe()["connections"] == 1)
        await send_command(bob, "presence")
        assert await present(bob) == {"bob": 1, "ann": 0}
        async with connect(server.url("/ws/ann")) as again:
            assert await joined(again) == {"bob": 1, "ann": 1}
            await send_command(again, "say", "back")
            assert await next_message(bob) == {"type": "said", "from": "ann", "text": "back"}
    assert not server.errors()


@pytest.mark.parametrize("kind", [kind for kind in SERVERS if kind != "hypercorn"])  # it reports no close code
async def test_normal_close_leaves_presence_at_once(serve: Serve, kind: str) -> None:
    """A close with 1000 ends presence without a grace."""
    server = serve(kind, app=APP, config={"presence_grace": LONG_TIMEOUT})
    async with connect(server.url("/ws/bob")) as bob:
        await joined(bob)
        await server.until_event("joined bob")
        async with connect(server.url("/ws/ann")) as ann:
            await joined(ann)
            assert (await next_message(bob))["type"] == "joined"
        assert await next_message(bob) == {"type": "left", "client_id": "ann"}
    assert not server.errors()


@pytest.mark.parametrize("kind", SERVERS)
async def test_tabs_of_client_share_one_presence_entry(serve: Serve, kind: str) -> None:
    """A client joins with its first connection and leaves with its last, and each connection gets room messages."""
    server = serve(kind, app=APP, config={"on_duplicate": "allow", "presence_grace": LONG_TIMEOUT})
    async with connect(server.url("/ws/bob")) as bob:
        await joined(bob)
        await server.until_event("joined bob")
        async with connect(server.url("/ws/ann")) as first:
            await joined(first)
            assert (await next_message(bob))["type"] == "joined"
            async with connect(server.url("/ws/ann")) as second:
                assert await joined(second) == {"bob": 1, "ann": 2}
                await send_command(bob, "say", "hello")
                assert [(await next_message(tab))["text"] for tab in (first, second)] == ["hello", "hello"]
                await send_command(first, "say", "here")
                assert [(await next_message(one))["text"] for one in (second, bob)] == ["here", "here"]
                await send_command(second, "leave")
                await send_command(second, "presence")
                assert await present(second) == {"bob": 1, "ann": 1}
            await until(lambda: server.probe()["connections"] == 2)
            await send_command(bob, "presence")
            assert await present(bob) == {"bob": 1, "ann": 1}
            await send_command(first, "leave")
            assert await next_message(bob) == {"type": "left", "client_id": "ann"}
    assert not server.errors()


# ── slow clients ──


def send_numbered(server: LiveServer, first: int, count: int, size: int = SIZE, key: str = "") -> Any:
    """Send numbered messages to the room, and return the result of each."""
    return server.post(f"/send/lobby?first={first}&count={count}&size={size}" + (f"&key={key}" if key else ""))


def numbers(client: RawClient, last: int) -> list[int]:
    """Read the numbers of the messages, up to and including `last`."""
    found = [int(client.frame()[1][:8])]
    while found[-1] != last:
        found.append(int(client.frame()[1][:8]))
    return found


@pytest.mark.parametrize("kind", UVICORN)
async def test_drop_oldest_delivers_newest_messages_to_slow_client(serve: Serve, kind: str) -> None:
    """A slow client stays, gets the newest messages, and on_slow runs once for the drops."""
    waiting = 8
    server = serve(
        kind,
        app=APP,
        config={"outbox_overflow": "drop_oldest", "outbox_max_messages": waiting, "send_timeout": LONG_TIMEOUT},
    )
    with raw_client_in_room(server, "ann") as ann:
        sent, results = 0, []
        while "slow ann dropping" not in server.probe()["events"]:
            results += await asyncio.to_thread(send_numbered, server, sent, 10)
            sent += 10
            assert sent < 5 * MORE_THAN_BUFFERS
        results += await asyncio.to_thread(send_numbered, server, sent, 2 * waiting)
        sent += 2 * waiting
        received = await asyncio.to_thread(numbers, ann, sent - 1)
        assert received == sorted(set(received))
        assert received[-waiting:] == list(range(sent - waiting, sent))
        dropped = server.probe()["dropped"]
        assert dropped == sent - len(received) == sum(result["dropped"] for result in results)
        assert dropped >= 2 * waiting
        ann.send(1, b'{"type":"presence","room":"lobby"}')
        assert json.loads(ann.frame()[1])["clients"] == {"ann": 1}
        first, *events = server.probe()["events"]
        assert first == "joined ann"
        # The client lags before if the transport has been full for longer than one request of the test.
        assert events in (["slow ann dropping"], ["slow ann lagging", "slow ann dropping"])
    assert "client_caught_up" in server.log
    assert not server.errors()


@pytest.mark.parametrize("kind", UVICORN)
async def test_slow_client_gets_newest_message_of_key(serve: Serve, kind: str) -> None:
    """Earlier messages stay in order, and of fifty messages with one key the last one arrives."""
    server = serve(
        kind, app=APP, config={"outbox_max_bytes": 2 * MORE_THAN_BUFFERS * SIZE, "send_timeout": LONG_TIMEOUT}
    )
    with raw_client_in_room(server, "ann") as ann:
        await asyncio.to_thread(send_numbered, server, 0, MORE_THAN_BUFFERS)
        results = await asyncio.to_thread(send_numbered, server, 1000, 50, 8, "price")
        assert [result["succeeded"] for result in results] == [1] * 50
        received = await asyncio.to_thread(numbers, ann, 1049)
        assert received == [*range(MORE_THAN_BUFFERS), 1049]
        assert server.probe()["coalesced"] == 49
    assert not server.errors()
