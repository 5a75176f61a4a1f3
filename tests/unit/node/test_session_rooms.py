"""Tests of sessions in rooms: messages for detached sessions, presence, and room history."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.errors import ConnectionNotFoundError
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.stage import Peer, Stage

# ── detached sessions ──


@virtually
async def test_detached_session_queues_broadcasts_and_messages() -> None:
    """Broadcasts, room messages and messages to the client id are queued for a detached session, as succeeded."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await stage.socket().join("lobby")
        await line.leaves()
        result = await stage.manager.broadcast("all")
        assert (result.total, result.succeeded) == (1, 1)
        assert (await stage.manager.room("lobby").send("room")).succeeded == 1
        assert (await stage.manager.broadcast("room again", room=["lobby", "other"])).succeeded == 1
        assert await stage.manager.send_to_client("ann", "you")
        assert not await stage.manager.send_to_client("bob", "you")
        line = await peer.dial()
        assert line.got == ["all", "room", "room again", "you"]
        assert [frame.get("room") for frame in line.of("msg")] == [None, "lobby", None, None]


@virtually
async def test_detached_session_can_be_excluded() -> None:
    """A detached session can be excluded by its client id and by any of its sockets; others get the message."""
    async with Stage() as stage:
        ann, bob = Peer(stage), Peer(stage, "bob")
        lines = [await ann.dial(), await bob.dial()]
        sockets = [stage.socket(), stage.socket("bob")]
        for line in lines:
            await line.leaves()
        await stage.manager.broadcast("by id", exclude="ann")
        await stage.manager.broadcast("by socket", exclude=sockets[0])
        await stage.manager.broadcast("by the old name", exclude_client="ann")
        await stage.manager.broadcast("both", exclude=[sockets[1]])
        assert (await ann.dial()).got == ["both"]
        assert (await bob.dial()).got == ["by id", "by socket", "by the old name"]
        await stage.manager.broadcast("by an old socket", exclude=sockets[0])
        assert "by an old socket" not in (await ann.dial(seq=1)).got


@virtually
async def test_room_contains_detached_session() -> None:
    """A detached session is in its room for `len()`, `in`, `members` and `get_rooms()`."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        socket, room = stage.socket(), stage.manager.room("lobby")
        await socket.join("lobby")
        await line.leaves()
        assert (len(room), bool(room), socket in room, "ann" in room) == (1, True, True, True)
        assert ([one.client_id for one in room.members], stage.manager.get_rooms()) == (["ann"], ["lobby"])
        await peer.dial()
        assert (len(room), "ann" in room, socket in room, room.members) == (1, True, True, [stage.socket()])


@virtually
async def test_room_disconnect_ends_detached_sessions() -> None:
    """`Room.disconnect` ends detached sessions too; their clients get its code at the next connect."""
    async with Stage() as stage:
        peers = [Peer(stage), Peer(stage, "bob")]
        lines = [await peer.dial() for peer in peers]
        for name in ("ann", "bob"):
            await stage.socket(name).join("lobby")
        await lines[0].leaves()
        assert await stage.manager.room("lobby").disconnect() == 2
        await soon()
        assert lines[1].close_code == 4410
        assert stage.events.count("session_end ann application") == 1
        assert stage.events.count("session_end bob application") == 1
        assert stage.manager.get_session_counts() == {"sessions": 0, "away": 0}
        assert len(stage.manager.room("lobby")) == 0
        assert (await peers[0].dial()).close_code == 4410


@virtually
async def test_room_close_removes_detached_sessions() -> None:
    """`Room.close` removes detached sessions, which are not in the room after a resume."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await stage.socket().join("lobby")
        await line.leaves()
        assert await stage.manager.room("lobby").close() == 1
        await peer.dial()
        assert stage.socket().rooms == ()


@virtually
async def test_disconnect_ends_detached_session_of_client() -> None:
    """`manager.disconnect` ends detached sessions as well; their clients get its code at the next connect."""
    async with Stage() as stage:
        peer = Peer(stage)
        await (await peer.dial()).leaves()
        await stage.manager.disconnect("ann")
        await soon()
        assert stage.events[2:] == ["session_end ann application"]
        with pytest.raises(ConnectionNotFoundError):
            await stage.manager.disconnect("ann")
        assert (await peer.dial()).close_code == 4410


# ── presence ──


@virtually
async def test_session_leaves_presence_after_grace_and_rejoins() -> None:
    """A resume within the grace is not announced; after the grace the client leaves, and joins again at its resume."""
    async with Stage(presence_grace=5) as stage:
        seen: list[tuple[str, str, dict[str, Any]]] = []

        @stage.manager.on_join
        async def joined(room: Any, entry: Presence) -> None:
            seen.append(("join", entry.client_id, dict(entry.metadata)))

        @stage.manager.on_leave
        async def left(room: Any, entry: Presence) -> None:
            seen.append(("leave", entry.client_id, dict(entry.metadata)))

        peer, room = Peer(stage), stage.manager.room("lobby")
        line = await peer.dial()
        await stage.socket().join("lobby", {"name": "Ann"})
        room.set_presence("ann", name="Ann", colour="red")
        await soon()
        await line.leaves()
        await asyncio.sleep(4)
        assert room.clients == ["ann"]
        line = await peer.dial()
        await asyncio.sleep(10)
        assert (room.clients, [event for event, *_ in seen]) == (["ann"], ["join"])
        await line.leaves()
        await asyncio.sleep(6)
        assert (room.presence, room.clients, [event for event, *_ in seen]) == ([], ["ann"], ["join", "leave"])
        await peer.dial()
        assert [dict(entry.metadata) for entry in room.presence] == [{"name": "Ann", "colour": "red"}]
        assert seen[2:] == [("join", "ann", {"name": "Ann", "colour": "red"})]


@virtually
async def test_takeover_of_half_open_connection_announces_no_leave() -> None:
    """A client that replaces its half-open connection stays present, without a leave."""
    async with Stage(presence_grace=0) as stage:
        left: list[str] = []

        @stage.manager.on_leave
        async def leaves(room: Any, entry: Presence) -> None:
            left.append(entry.client_id)

        peer = Peer(stage)
        await peer.dial()
        await stage.socket().join("lobby")
        await peer.dial()
        await asyncio.sleep(1)
        assert (left, stage.manager.room("lobby").clients) == ([], ["ann"])


@virtually
async def test_clean_close_ends_presence_immediately() -> None:
    """A clean close ends presence at once, despite `presence_grace`."""
    async with Stage(presence_grace=5) as stage:
        line = await Peer(stage).dial()
        await stage.socket().join("lobby")
        await line.leaves(1000)
        assert stage.manager.room("lobby").clients == []
        assert not stage.manager.room("lobby")


# ── room history ──


@pytest.mark.parametrize("kind", ["plain", "v1"])
@virtually
async def test_join_with_history_sends_last_room_messages(kind: str) -> None:
    """A join gets the last n messages in order before newer ones, without volatile ones and those of other rooms."""
    async with Stage(room_history=4) as stage:
        room = stage.manager.room("lobby")
        for number in range(6):
            await room.send(number)
            await room.send("volatile", volatile=True)
            await stage.manager.room("other").send("other")

        async def endpoint(ws: StableSocket) -> None:
            await ws.join("lobby", history=3)
            await room.send(6)
            await ws.run()

        stage.endpoint = endpoint
        line = stage.plain() if kind == "plain" else await Peer(stage).dial()
        await soon()
        assert (line.server.json if kind == "plain" else line.got) == [3, 4, 5, 6]
        if kind == "v1":
            await line.say({"type": "ack", "seq": 4})
            assert line.close_code is None


@virtually
async def test_join_sends_at_most_available_history() -> None:
    """A room stores `room_history` messages and sends what it has; without that option it stores none."""
    async with Stage(room_history=2) as stage:
        for number in range(5):
            await stage.manager.room("lobby").send(number)
        line = await Peer(stage).dial()
        await stage.socket().join("lobby", history=10)
        await stage.socket().join("silent", history=10)
        await soon()
        assert line.got == [3, 4]
    async with Stage() as stage:
        await stage.manager.room("lobby").send("x")
        line = await Peer(stage).dial()
        await stage.socket().join("lobby", history=10)
        await soon()
        assert line.got == []


@virtually
async def test_history_over_max_age_is_not_sent() -> None:
    """A message is stored for room_history_max_age."""
    async with Stage(room_history=5, room_history_max_age=10) as stage:
        room = stage.manager.room("lobby")
        await room.send("old")
        await asyncio.sleep(8)
        await room.send("young")
        await asyncio.sleep(4)
        line = await Peer(stage).dial()
        await stage.socket().join("lobby", history=5)
        await soon()
        assert line.got == ["young"]


@virtually
async def test_history_is_replayed_after_resume() -> None:
    """History that a session gets at a join is numbered, and is replayed after a resume."""
    async with Stage(room_history=5) as stage:
        for number in range(3):
            await stage.manager.room("lobby").send(number)
        peer = Peer(stage)
        line = await peer.dial()
        await stage.socket().join("lobby", history=5)
        await line.leaves()
        assert (await peer.dial(seq=1)).got == [1, 2]


@virtually
async def test_replay_age_of_history_starts_at_join() -> None:
    """History counts as sent at the join, so that an old message is still replayed after a resume."""
    async with Stage(room_history=5, replay_max_age=5) as stage:
        await Peer(stage, "bob").dial()
        await stage.socket("bob").join("lobby")
        await stage.manager.room("lobby").send("said long ago")
        await asyncio.sleep(60)
        peer = Peer(stage)
        line = await peer.dial()
        await stage.socket().join("lobby", history=5)
        await line.leaves()
        line = await peer.dial()
        assert (line.outcome, line.got) == ("full", ["said long ago"])
