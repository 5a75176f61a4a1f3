"""Rooms and presence from one end to the other, and clients of a room that do not keep up, on every server."""

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
FOR_EVER = 60
SIZE = 65536
MORE_THAN_BUFFERS_HOLD = 200  # messages of that size


async def say(client: ClientConnection, kind: str, text: str = "", *, room: str = "lobby") -> None:
    await client.send(json.dumps({"type": kind, "room": room, "text": text}))


async def heard(client: ClientConnection) -> Any:
    """The next message, whatever it is."""
    return json.loads(await asyncio.wait_for(client.recv(), 5))


async def joined(client: ClientConnection, text: str = "", *, room: str = "lobby") -> dict[str, int]:
    """Join, and return who is there and on how many connections.

    `on_join` sends to those that are members when it runs: wait for its event before a next client joins.
    """
    await say(client, "join", text, room=room)
    return await here(client)


async def here(client: ClientConnection) -> dict[str, int]:
    """What comes next is the answer to a question for who is there."""
    message = await heard(client)
    assert message["type"] == "here", message
    people: dict[str, int] = message["people"]
    return people


def raw_member(server: LiveServer, client_id: str) -> RawClient:
    """A client on a bare socket that has asked to be in the room and reads little."""
    client = RawClient(server.port, f"/ws/{client_id}", receive_buffer=4096)
    client.handshake()
    client.send(1, b'{"type":"join","room":"lobby"}')
    assert json.loads(client.frame()[1])["type"] == "here"
    return client


@pytest.mark.parametrize("kind", SERVERS)
async def test_room_message_reaches_members_only(serve: Serve, kind: str) -> None:
    """Who has joined gets it, who says it and who is elsewhere does not; each arrival is told with its metadata."""
    server = serve(kind, app=APP)
    async with (
        connect(server.url("/ws/ann")) as ann,
        connect(server.url("/ws/bob")) as bob,
        connect(server.url("/ws/cyd")) as cyd,
    ):
        assert await joined(ann) == {"ann": 1}
        await server.until_event("came ann")
        assert await joined(bob, "gay") == {"ann": 1, "bob": 1}
        assert await heard(ann) == {"type": "came", "who": "bob", "mood": "gay"}
        assert await joined(cyd, room="garden") == {"cyd": 1}
        assert server.probe()["rooms"] == {"lobby": ["ann", "bob"], "garden": ["cyd"]}
        await say(ann, "say", "hello")
        assert await heard(bob) == {"type": "said", "who": "ann", "text": "hello"}
        for client in (ann, cyd):  # what they get next is the answer to this
            await say(client, "who")
            assert await here(client) == {"ann": 1, "bob": 1}
        await say(bob, "leave")
        assert await heard(ann) == {"type": "went", "who": "bob"}
        await say(ann, "say", "anybody?")
        await say(bob, "who")
        assert await here(bob) == {"ann": 1}
    await until(lambda: server.probe()["rooms"] == {})
    assert not server.errors()


@pytest.mark.parametrize("kind", SERVERS)
async def test_reset_client_leaves_presence_after_grace(serve: Serve, kind: str) -> None:
    """Its connection leaves the room at once, the client only then."""
    server = serve(kind, app=APP, config={"presence_grace": GRACE})
    async with connect(server.url("/ws/bob")) as bob:
        await joined(bob)
        await server.until_event("came bob")
        with raw_member(server, "ann") as ann:
            assert (await heard(bob))["type"] == "came"
            gone = time.monotonic()
            ann.reset()
        assert await heard(bob) == {"type": "went", "who": "ann"}
        assert GRACE <= time.monotonic() - gone < GRACE + 2
        await say(bob, "who")
        assert await here(bob) == {"bob": 1}
    assert not server.errors()


@pytest.mark.parametrize("kind", SERVERS)
async def test_reconnect_within_grace_announces_nothing(serve: Serve, kind: str) -> None:
    """While it is away it is present without a connection, and neither its leaving nor its coming is told."""
    server = serve(kind, app=APP, config={"presence_grace": FOR_EVER})
    async with connect(server.url("/ws/bob")) as bob:
        await joined(bob)
        await server.until_event("came bob")
        with raw_member(server, "ann") as ann:
            assert (await heard(bob))["type"] == "came"
            ann.reset()
        await until(lambda: server.probe()["connections"] == 1)
        await say(bob, "who")
        assert await here(bob) == {"bob": 1, "ann": 0}
        async with connect(server.url("/ws/ann")) as again:
            assert await joined(again) == {"bob": 1, "ann": 1}
            await say(again, "say", "back")
            assert await heard(bob) == {"type": "said", "who": "ann", "text": "back"}
    assert not server.errors()


@pytest.mark.parametrize("kind", [kind for kind in SERVERS if kind != "hypercorn"])  # it passes no code on
async def test_normal_close_leaves_presence_at_once(serve: Serve, kind: str) -> None:
    """A close frame with 1000 waits for no grace."""
    server = serve(kind, app=APP, config={"presence_grace": FOR_EVER})
    async with connect(server.url("/ws/bob")) as bob:
        await joined(bob)
        await server.until_event("came bob")
        async with connect(server.url("/ws/ann")) as ann:
            await joined(ann)
            assert (await heard(bob))["type"] == "came"
        assert await heard(bob) == {"type": "went", "who": "ann"}
    assert not server.errors()


@pytest.mark.parametrize("kind", SERVERS)
async def test_tabs_of_client_share_one_presence_entry(serve: Serve, kind: str) -> None:
    """A client comes with its first connection and goes with its last, and each of them hears the room."""
    server = serve(kind, app=APP, config={"on_duplicate": "allow", "presence_grace": FOR_EVER})
    async with connect(server.url("/ws/bob")) as bob:
        await joined(bob)
        await server.until_event("came bob")
        async with connect(server.url("/ws/ann")) as first:
            await joined(first)
            assert (await heard(bob))["type"] == "came"
            async with connect(server.url("/ws/ann")) as second:
                assert await joined(second) == {"bob": 1, "ann": 2}
                await say(bob, "say", "hello")
                assert [(await heard(tab))["text"] for tab in (first, second)] == ["hello", "hello"]
                await say(first, "say", "here")
                assert [(await heard(one))["text"] for one in (second, bob)] == ["here", "here"]
                await say(second, "leave")
                await say(second, "who")
                assert await here(second) == {"bob": 1, "ann": 1}
            await until(lambda: server.probe()["connections"] == 2)
            await say(bob, "who")
            assert await here(bob) == {"bob": 1, "ann": 1}
            await say(first, "leave")
            assert await heard(bob) == {"type": "went", "who": "ann"}
    assert not server.errors()


# ── who does not keep up ──


def tell(server: LiveServer, first: int, count: int, size: int = SIZE, key: str = "") -> Any:
    """Send numbered messages to the room, and return what became of each."""
    return server.post(f"/tell/lobby?first={first}&count={count}&size={size}" + (f"&key={key}" if key else ""))


def numbers(client: RawClient, last: int) -> list[int]:
    """Read the numbers of the messages, up to and with the last one."""
    found = [int(client.frame()[1][:8])]
    while found[-1] != last:
        found.append(int(client.frame()[1][:8]))
    return found


@pytest.mark.parametrize("kind", UVICORN)
async def test_drop_oldest_delivers_newest_messages_to_slow_client(serve: Serve, kind: str) -> None:
    """It stays, gets what was sent before and the last of what came after, and on_slow tells it once."""
    waiting = 8
    server = serve(
        kind,
        app=APP,
        config={"outbox_overflow": "drop_oldest", "outbox_max_messages": waiting, "send_timeout": FOR_EVER},
    )
    with raw_member(server, "ann") as ann:
        sent, results = 0, []
        while "slow ann dropping" not in server.probe()["events"]:
            results += await asyncio.to_thread(tell, server, sent, 10)
            sent += 10
            assert sent < 5 * MORE_THAN_BUFFERS_HOLD
        results += await asyncio.to_thread(tell, server, sent, 2 * waiting)
        sent += 2 * waiting
        received = await asyncio.to_thread(numbers, ann, sent - 1)
        assert received == sorted(set(received))
        assert received[-waiting:] == list(range(sent - waiting, sent))
        dropped = server.probe()["dropped"]
        assert dropped == sent - len(received) == sum(result["dropped"] for result in results)
        assert dropped >= 2 * waiting
        ann.send(1, b'{"type":"who","room":"lobby"}')
        assert json.loads(ann.frame()[1])["people"] == {"ann": 1}
        assert server.probe()["events"][-1] == "slow ann dropping"  # lagging is told before, if it is there for long
        assert len(server.probe()["events"]) <= 2
    assert "client_caught_up" in server.log
    assert not server.errors()


@pytest.mark.parametrize("kind", UVICORN)
async def test_slow_client_gets_newest_message_of_key(serve: Serve, kind: str) -> None:
    """What was waiting before keeps its place, and of fifty prices the last one arrives."""
    server = serve(
        kind, app=APP, config={"outbox_max_bytes": 2 * MORE_THAN_BUFFERS_HOLD * SIZE, "send_timeout": FOR_EVER}
    )
    with raw_member(server, "ann") as ann:
        await asyncio.to_thread(tell, server, 0, MORE_THAN_BUFFERS_HOLD)
        results = await asyncio.to_thread(tell, server, 1000, 50, 8, "price")
        assert [result["succeeded"] for result in results] == [1] * 50
        received = await asyncio.to_thread(numbers, ann, 1049)
        assert received == [*range(MORE_THAN_BUFFERS_HOLD), 1049]
        assert server.probe()["coalesced"] == 49
    assert not server.errors()
