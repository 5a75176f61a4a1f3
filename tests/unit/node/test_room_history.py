"""Tests of room history: its recipients, its content and its lifetime."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.stage import Line, Peer, Stage

kinds = pytest.mark.parametrize("kind", ["plain", "v1"])


async def connected(stage: Stage, kind: str, client_id: str = "ann") -> Line:
    """Connect a client."""
    line = stage.plain(client_id) if kind == "plain" else await Peer(stage, client_id).dial()
    await soon()
    return line


def got(line: Line) -> list[Any]:
    """Return the messages that a client received."""
    return line.got if line.server.websocket.scope["subprotocols"] else line.server.data


async def history_of_newcomer(stage: Stage, kind: str = "plain", client_id: str = "newcomer") -> list[Any]:
    """Join a room as a new client and return the history that it gets."""
    line = await connected(stage, kind, client_id)
    await stage.socket(client_id).join("lobby", history=10)
    await soon()
    return got(line)


async def join_with_history(ws: StableSocket) -> None:
    """Join the room in each connection, as an application's endpoint would."""
    await ws.join("lobby", history=10)
    await ws.run()


@virtually
async def test_resumed_session_gets_no_history_again() -> None:
    """A resumed session gets its missed messages once and no history, although its endpoint joins again."""
    async with Stage(room_history=50) as stage:
        stage.endpoint = join_with_history
        peer, room = Peer(stage), stage.manager.room("lobby")
        line = await peer.dial()
        await room.send("first")
        await soon()
        await line.leaves()
        await room.send("missed")
        line = await peer.dial(seq=1)
        await soon()
        assert (line.outcome, line.got) == ("full", ["missed"])


@kinds
@virtually
async def test_second_join_of_member_sends_no_history(kind: str) -> None:
    """A member that joins again updates its metadata and gets no history; after leaving it gets history again."""
    async with Stage(room_history=50) as stage:
        await connected(stage, "plain", "bob")
        await stage.socket("bob").join("lobby")
        line = await connected(stage, kind)
        for text in ("one", "two"):
            await stage.manager.room("lobby").send(text)
            await stage.socket("ann").join("lobby", history=10)
        await soon()
        assert got(line) == ["one", "two"]
        await stage.socket("ann").leave("lobby")
        await stage.socket("ann").join("lobby", history=1)
        await soon()
        assert got(line)[2:] == ["two"]


@virtually
async def test_returning_plain_client_gets_missed_history_once() -> None:
    """A plain client that returns with its token gets the history since its disconnect once, at its next join."""
    async with Stage(room_history=50) as stage:
        stage.endpoint = join_with_history
        room = stage.manager.room("lobby")
        line = stage.plain()
        await soon()
        token = stage.manager.generate_reconnect_token("ann")
        await room.send("before")
        await soon()
        await asyncio.sleep(1)
        await line.leaves()
        await asyncio.sleep(1)
        await room.send("missed")
        await asyncio.sleep(1)
        line = stage.plain(token=token)
        await soon()
        assert line.server.data == ["missed"]
        await stage.socket().join("lobby", history=10)
        await soon()
        assert line.server.data == ["missed"]


@kinds
@virtually
async def test_excluded_client_does_not_get_message_from_history(kind: str) -> None:
    """A message sent with `exclude` is missing from the history of the excluded client only."""
    async with Stage(room_history=50) as stage:
        await connected(stage, "plain", "bob")
        await stage.socket("bob").join("lobby")
        room = stage.manager.room("lobby")
        await room.send("not for ann", exclude="ann")
        await stage.manager.broadcast("not for ann and eve", "eve", room="lobby", exclude=iter(["ann"]))
        await room.send("not for bob", exclude=stage.socket("bob"))
        assert await history_of_newcomer(stage, kind, "ann") == ["not for bob"]
        assert await history_of_newcomer(stage, kind, "eve") == ["not for ann", "not for bob"]
        bob = stage.socket("bob")
        await bob.leave("lobby")
        line = next(line for line in stage.lines if line.socket is bob)
        before = len(line.server.data)
        await bob.join("lobby", history=10)
        await soon()
        assert line.server.data[before:] == ["not for ann", "not for ann and eve"]


@kinds
@virtually
async def test_history_ends_when_last_member_leaves(kind: str) -> None:
    """A client that joins after a room has ended gets no history of it, nor messages sent to the empty room."""
    async with Stage(room_history=50) as stage:
        await connected(stage, kind)
        await stage.socket().join("lobby")
        await stage.manager.room("lobby").send("private")
        await stage.socket().leave("lobby")
        await stage.manager.room("lobby").send("ann has left")
        assert await history_of_newcomer(stage) == []
        await stage.manager.room("lobby").send("new")
        assert await history_of_newcomer(stage, client_id="second") == ["new"]


@virtually
async def test_history_survives_presence_grace() -> None:
    """A room retains its history while its last member is within `presence_grace`."""
    async with Stage(room_history=50, presence_grace=10) as stage:
        line = await connected(stage, "plain")
        await stage.socket().join("lobby")
        await stage.manager.room("lobby").send("private")
        await line.leaves()
        await asyncio.sleep(5)
        line = await connected(stage, "plain")
        await stage.socket().join("lobby", history=10)
        await soon()
        assert line.server.data == ["private"]
        await line.leaves()
        await asyncio.sleep(15)
        assert await history_of_newcomer(stage) == []


@kinds
@virtually
async def test_history_survives_while_member_is_detached(kind: str) -> None:
    """A room retains its history while a member is detached, until the member's session ends."""
    async with Stage(room_history=50, session_ttl=60, presence_grace=1) as stage:
        line = await connected(stage, kind)
        await stage.socket().join("lobby")
        stage.manager.generate_reconnect_token("ann")
        await stage.manager.room("lobby").send("private")
        await line.leaves()
        await asyncio.sleep(30)
        await stage.manager.room("lobby").send("said while away")
        assert await history_of_newcomer(stage) == ["private", "said while away"]
        await stage.socket("newcomer").close()
        await asyncio.sleep(60)
        assert await history_of_newcomer(stage, client_id="stranger") == []


@pytest.mark.parametrize("action", ["close", "remove", "disconnect"])
@virtually
async def test_history_ends_when_room_is_emptied(action: str) -> None:
    """`room.close()`, `room.remove()` and `room.disconnect()` of the last member end its history."""
    async with Stage(room_history=50) as stage:
        await connected(stage, "plain")
        await stage.socket().join("lobby")
        room = stage.manager.room("lobby")
        await room.send("private")
        await (room.close() if action == "close" else room.remove("ann") if action == "remove" else room.disconnect())
        assert await history_of_newcomer(stage) == []


@virtually
async def test_message_before_first_join_is_in_history() -> None:
    """A message to a room without members is in the history for the first client that joins."""
    async with Stage(room_history=50) as stage:
        await stage.manager.room("lobby").send("welcome")
        assert await history_of_newcomer(stage) == ["welcome"]


@virtually
async def test_message_with_history_false_is_not_stored() -> None:
    """A message with `history=False` reaches the current members, but is not in the history."""
    async with Stage(room_history=50) as stage:
        line = await connected(stage, "plain")
        await stage.socket().join("lobby")
        await stage.manager.room("lobby").send("typing", history=False)
        await stage.manager.broadcast("typing too", room="lobby", history=False)
        await stage.manager.room("lobby").send("text")
        await soon()
        assert line.server.data == ["typing", "typing too", "text"]
        assert await history_of_newcomer(stage) == ["text"]


@pytest.mark.parametrize("stored", [False, True])
@virtually
async def test_hook_announcement_is_stored_only_with_history_true(stored: bool) -> None:
    """A message that `on_join` or `on_leave` sends with its `Room` is not stored, except with `history=True`."""
    async with Stage(room_history=50) as stage:

        @stage.manager.on_join
        async def came(room: Room, recipient: Presence) -> None:
            if stored:
                await room.send(f"{recipient.client_id} came", history=True)
            else:
                await room.send(f"{recipient.client_id} came")

        line = await connected(stage, "plain")
        await stage.socket().join("lobby")
        await soon()
        assert line.server.data == ["ann came"]
        found = await history_of_newcomer(stage)
        assert ("ann came" in found) is stored
