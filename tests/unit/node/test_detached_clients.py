"""Tests of detached clients: calls that close, remove and list clients include them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fastapi_ws_stabilizer.errors import ConnectionNotFoundError, MemoryLimitExceededError, SocketClosed
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Line, Peer, Stage

kinds = pytest.mark.parametrize("kind", ["plain", "v1"])

Reconnect = Callable[[], Awaitable[Line]]


async def detach_client(stage: Stage, kind: str, client_id: str = "ann", *, lost: bool = True) -> Reconnect:
    """Join the client to a room and, if `lost`, drop its network. Return a function that reconnects it."""
    if kind == "v1":
        peer = Peer(stage, client_id)
        line = await peer.dial()
        reconnect: Reconnect = peer.dial
    else:
        line = stage.plain(client_id)
        await soon()
        token = stage.manager.generate_reconnect_token(client_id)

        async def reconnect() -> Line:
            line = stage.plain(client_id, token=token)
            await soon()
            return line

    await stage.socket(client_id).join("lobby")
    await soon()
    if lost:
        await line.leaves()
    return reconnect


def rooms_of(line: Line) -> tuple[str, ...]:
    """Return the rooms of the connection."""
    assert line.socket is not None
    return line.socket.rooms


@kinds
@virtually
async def test_closed_room_removes_detached_clients(kind: str) -> None:
    """`room.close()` removes and counts detached clients too: a client that reconnects is not in the room."""
    async with Stage() as stage:
        reconnect = await detach_client(stage, kind)
        room = stage.manager.room("lobby")
        assert await room.close() == 1
        assert (bool(room), room.clients, room.members) == (False, [], [])
        assert rooms_of(await reconnect()) == ()


KICKS: dict[str, Callable[[WebSocketConnectionManager], Awaitable[object]]] = {
    "room.disconnect": lambda manager: manager.room("lobby").disconnect(4403, "banned"),
    "manager.disconnect": lambda manager: manager.disconnect("ann", 4403, "banned"),
}


@kinds
@pytest.mark.parametrize("kick", KICKS)
@pytest.mark.parametrize("lost", [True, False], ids=["detached", "half-open"])
@virtually
async def test_kicked_detached_client_is_closed_with_code_on_return(kick: str, kind: str, lost: bool) -> None:
    """A client that is kicked while detached or half-open is closed with that code and reason at each reconnect."""
    async with Stage() as stage:
        reconnect = await detach_client(stage, kind, lost=lost)
        result = await KICKS[kick](stage.manager)
        assert result in (1, None)
        await soon()
        assert stage.events[-1] == "session_end ann application"
        assert not stage.manager.room("lobby")
        for _ in range(2):
            line = await reconnect()
            assert line.server.close_frames == [(4403, "banned")]
        assert stage.events.count("connect ann") == 1


ORDERS: dict[str, Callable[[WebSocketConnectionManager], Awaitable[object]]] = {
    "disconnect": lambda manager: manager.disconnect("ann", reason="banned"),
    "disconnect with 4410": lambda manager: manager.disconnect("ann", 4410, "banned"),
    "room.disconnect with 4410": lambda manager: manager.room("lobby").disconnect(4410, "banned"),
    "revoke": lambda manager: manager.revoke("ann", "banned"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("lost", [True, False], ids=["detached", "half-open"])
@virtually
async def test_external_close_with_4410_is_repeated_on_each_attempt(order: str, lost: bool) -> None:
    """A session that a call from outside its endpoint ends is answered with 4410 at each reconnect."""
    async with Stage() as stage:
        reconnect = await detach_client(stage, "v1", lost=lost)
        await ORDERS[order](stage.manager)
        await soon()
        for _ in range(2):
            assert (await reconnect()).server.close_frames == [(4410, "banned")]
        assert stage.events.count("connect ann") == 1


@virtually
async def test_endpoint_close_with_4410_makes_next_attempt_lost() -> None:
    """After the endpoint closes its session with 4410, the client gets a new session at its next connect."""
    async with Stage() as stage:
        reconnect = await detach_client(stage, "v1", lost=False)
        await stage.socket().close(4410)
        await soon()
        assert (await reconnect()).outcome == "lost"


@pytest.mark.parametrize("code", [1000, 4403, 4410])
@pytest.mark.parametrize("lost", [True, False], ids=["detached", "half-open"])
@virtually
async def test_kicked_client_known_by_session_only_is_rejected(code: int, lost: bool) -> None:
    """A kicked client is closed at each reconnect also when the endpoint takes the client id from the session."""
    async with Stage() as stage:
        peer = Peer(stage, None)
        line = await peer.dial()
        (client_id,) = stage.manager.get_active_connections()
        if lost:
            await line.leaves()
        await stage.manager.disconnect(client_id, code, "banned")
        await soon()
        for _ in range(2):
            assert (await peer.dial()).server.close_frames == [(code if code == 4403 else 4410, "banned")]
        assert stage.manager.get_active_connections() == []


@kinds
@virtually
async def test_kick_expires_with_session_ttl(kind: str) -> None:
    """After `session_ttl` the token of a kicked client names an ended session: the client connects without rooms."""
    async with Stage(session_ttl=20) as stage:
        reconnect = await detach_client(stage, kind)
        await stage.manager.disconnect("ann", 4403, "banned")
        await asyncio.sleep(30)
        line = await reconnect()
        assert line.server.close_frames == []
        assert rooms_of(line) == ()


@kinds
@pytest.mark.parametrize(
    ("code", "expected"), [(1000, {"plain": 1000, "v1": 4410}), (4321, {"plain": 4321, "v1": 4321})]
)
@virtually
async def test_kick_with_retryable_code_is_sent_once(kind: str, code: int, expected: dict[str, int]) -> None:
    """A kick with a retryable code answers the next reconnect, but not the one after it."""
    async with Stage() as stage:
        reconnect = await detach_client(stage, kind)
        await stage.manager.disconnect("ann", code)
        assert (await reconnect()).close_code == expected[kind]
        if expected[kind] != 4410:
            assert (await reconnect()).close_code is None


@virtually
async def test_new_reconnect_token_after_kick_is_accepted() -> None:
    """A client with a reconnect token that was generated after the kick is accepted."""
    async with Stage() as stage:
        await detach_client(stage, "plain")
        await stage.manager.disconnect("ann", 4403)
        line = stage.plain(token=stage.manager.generate_reconnect_token("ann"))
        await soon()
        assert line.close_code is None


@virtually
async def test_explicit_connect_of_kicked_client_raises_close_code() -> None:
    """`connect()` after `validate_reconnect_token()` raises `SocketClosed` and closes with the code of the kick."""
    async with Stage() as stage:
        manager = stage.manager
        line = stage.plain()
        await soon()
        token = manager.generate_reconnect_token("ann")
        await line.leaves()
        await manager.disconnect("ann", 4403, "banned")
        for _ in range(3):
            server = FakeServer()
            websocket = await server.accepted()
            assert await manager.validate_reconnect_token(token) == "ann"
            with pytest.raises(SocketClosed):
                await manager.connect("ann", websocket)
            assert server.close_frames == [(4403, "banned")]


@virtually
async def test_disconnect_of_unknown_client_raises() -> None:
    """`manager.disconnect()` of a client that is neither connected nor detached raises."""
    async with Stage(session_ttl=20) as stage:
        await detach_client(stage, "plain")
        await asyncio.sleep(30)
        with pytest.raises(ConnectionNotFoundError):
            await stage.manager.disconnect("ann")


@kinds
@virtually
async def test_room_members_and_clients_include_detached_clients(kind: str) -> None:
    """A detached client is in `members`, `clients`, `len()`, `in` and `get_rooms()` until its session ends."""
    async with Stage(session_ttl=20, presence_grace=1) as stage:
        await detach_client(stage, kind)
        await asyncio.sleep(5)
        room = stage.manager.room("lobby")
        assert ([one.client_id for one in room.members], room.clients, len(room)) == (["ann"], ["ann"], 1)
        assert room.members[0].closed
        assert ("ann" in room, room.members[0] in room, bool(room), stage.manager.get_rooms()) == (
            True,
            True,
            True,
            ["lobby"],
        )
        assert room.presence == []
        await asyncio.sleep(30)
        assert (room.members, room.clients, bool(room), stage.manager.get_rooms()) == ([], [], False, [])


@kinds
@pytest.mark.parametrize("lost", [True, False], ids=["detached", "present"])
@virtually
async def test_room_remove_ends_membership_but_not_session(kind: str, lost: bool) -> None:
    """`room.remove()` takes a client out of the room and ends its presence there; its connection and session remain."""
    async with Stage() as stage:
        left: list[str] = []

        @stage.manager.on_leave
        async def leave(room: object, recipient: object) -> None:
            left.append("left")

        reconnect = await detach_client(stage, kind, lost=lost)
        room = stage.manager.room("lobby")
        assert await room.remove("ann") is True
        await soon()
        assert (bool(room), room.clients, left) == (False, [], ["left"])
        assert await room.remove("ann") is False
        if lost:
            line = await reconnect()
            assert rooms_of(line) == ()
            assert stage.events[-1].startswith("resume ann")
        else:
            assert stage.socket().rooms == ()
            assert not stage.socket().closed


@virtually
async def test_room_with_only_presence_grace_exists() -> None:
    """A room that holds only a client in its presence grace is truthy and listed; `remove()` ends the grace."""
    async with Stage(presence_grace=10) as stage:
        line = stage.plain()
        await soon()
        await stage.socket().join("lobby")
        await line.leaves()
        room = stage.manager.room("lobby")
        assert (room.clients, bool(room), stage.manager.get_rooms()) == (["ann"], True, ["lobby"])
        assert await room.remove("ann") is True
        assert (room.clients, bool(room), stage.manager.get_rooms()) == ([], False, [])


@kinds
@virtually
async def test_kick_of_detached_client_ends_its_presence(kind: str) -> None:
    """The kick of a detached client ends its presence at once, despite `presence_grace`."""
    async with Stage(presence_grace=60) as stage:
        await detach_client(stage, kind)
        await stage.manager.disconnect("ann", 4403)
        assert stage.manager.room("lobby").presence == []


@virtually
async def test_broadcast_skips_detached_plain_client() -> None:
    """A broadcast counts a detached plain client as `skipped`, but not when it is excluded."""
    async with Stage() as stage:
        await detach_client(stage, "plain")
        result = await stage.manager.room("lobby").send("news")
        assert (result.total, result.succeeded, result.skipped, result.failed) == (1, 0, 1, 0)
        assert (await stage.manager.room("lobby").send("news", exclude="ann")).total == 0


@kinds
@virtually
async def test_revoke_ends_state_of_detached_client(kind: str) -> None:
    """`revoke()` counts a detached client and removes it from its rooms."""
    async with Stage() as stage:
        await detach_client(stage, kind)
        assert await stage.manager.revoke("ann") == 1
        assert not stage.manager.room("lobby")


@virtually
async def test_session_end_hook_sees_remaining_rooms_only() -> None:
    """The session end hook does not see a room that the client was removed from while detached."""
    async with Stage(session_ttl=20) as stage:
        rooms: list[tuple[str, ...]] = []

        @stage.manager.on_session_end
        async def ended(ws: StableSocket) -> None:
            rooms.append(ws.rooms)

        line = stage.plain()
        await soon()
        await stage.socket().join("lobby")
        await stage.socket().join("kitchen")
        stage.manager.generate_reconnect_token("ann")
        await line.leaves()
        await stage.manager.room("lobby").remove("ann")
        await asyncio.sleep(30)
        assert rooms == [("kitchen",)]


@kinds
@virtually
async def test_new_connection_replaces_detached_client(kind: str) -> None:
    """With `on_duplicate="replace"` a new connection ends the detached state, so the client is in its room once."""
    async with Stage() as stage:
        await detach_client(stage, kind)
        if kind == "v1":
            await Peer(stage).dial()
        else:
            stage.plain()
            await soon()
        await stage.socket().join("lobby")
        assert stage.events[-2:] == ["session_end ann replaced", "connect ann"]
        assert stage.manager.room("lobby").members == [stage.socket()]


@virtually
async def test_allowed_duplicate_leaves_detached_state_of_other() -> None:
    """With `on_duplicate="allow"` a new connection does not end the detached state of its client."""
    async with Stage(on_duplicate="allow") as stage:
        reconnect = await detach_client(stage, "plain")
        stage.plain()
        await soon()
        assert len(stage.manager.room("lobby")) == 1
        assert rooms_of(await reconnect()) == ("lobby",)


@kinds
@pytest.mark.parametrize("wait", [0, 10], ids=["within the grace", "after the grace"])
@virtually
async def test_presence_set_for_detached_client_survives_return(kind: str, wait: float) -> None:
    """`room.set_presence()` of a detached client is counted until the client leaves, and survives its return."""
    async with Stage(session_ttl=60, presence_grace=5) as stage:
        reconnect = await detach_client(stage, kind)
        room = stage.manager.room("lobby")
        before = stage.manager.get_memory_usage()["total_memory"]
        assert room.set_presence("ann", about="z" * 5_000)
        assert [entry.metadata for entry in room.presence] == [{"about": "z" * 5_000}]
        assert stage.manager.get_memory_usage()["total_memory"] >= before + 5_000
        await asyncio.sleep(wait)
        assert stage.manager.get_memory_usage()["total_memory"] >= before + 5_000
        line = await reconnect()
        assert [entry.metadata for entry in room.presence] == [{"about": "z" * 5_000}]
        assert line.socket is not None
        assert line.socket.held_bytes >= 5_000
        await line.socket.leave("lobby")
        assert stage.manager.get_memory_usage()["total_memory"] < before + 5_000


@pytest.mark.parametrize("kind", ["plain", "v1", "no detached state"])
@virtually
async def test_presence_over_limit_for_detached_client_raises(kind: str) -> None:
    """`room.set_presence()` of a detached client over the limit of one connection raises and changes nothing."""
    async with Stage(max_memory_per_connection=100_000) as stage:
        if kind == "no detached state":
            line = stage.plain()
            await soon()
            await stage.socket().join("lobby")
            await line.leaves()
        else:
            await detach_client(stage, kind)
        room = stage.manager.room("lobby")
        with pytest.raises(MemoryLimitExceededError):
            room.set_presence("ann", big="z" * 500_000)
        assert [entry.metadata for entry in room.presence] == [{}]
