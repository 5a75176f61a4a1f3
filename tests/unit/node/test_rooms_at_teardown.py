"""Tests of `ws.rooms`, and of hooks that use their socket, after the connection has closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Line, Peer, Stage

End = Callable[[Stage, Line], Awaitable[None]]


def record_rooms(stage: Stage) -> list[str]:
    """Record the rooms of each connection and session that its hooks see at the end."""
    recorded: list[str] = []

    @stage.manager.on_disconnect
    async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
        recorded.append(f"disconnect {' '.join(ws.rooms)}")

    @stage.manager.on_session_end
    async def ended(ws: StableSocket, reason: DisconnectReason) -> None:
        recorded.append(f"session_end {' '.join(ws.rooms)}")

    return recorded


async def client_closes(stage: Stage, line: Line) -> None:
    await line.leaves(1000)


async def network_is_lost(stage: Stage, line: Line) -> None:
    await line.leaves(1006)


async def is_kicked(stage: Stage, line: Line) -> None:
    await stage.manager.disconnect("ann", 4403)


async def room_is_disconnected(stage: Stage, line: Line) -> None:
    await stage.manager.room("lobby").disconnect(4403)


async def is_revoked(stage: Stage, line: Line) -> None:
    await stage.manager.revoke("ann")


async def is_replaced(stage: Stage, line: Line) -> None:
    await Peer(stage).dial() if line.of("welcome") else stage.plain()


async def is_drained(stage: Stage, line: Line) -> None:
    await stage.manager.graceful_shutdown(5)


@pytest.mark.parametrize("kind", ["plain", "v1"])
@pytest.mark.parametrize(
    "end",
    [client_closes, network_is_lost, is_kicked, room_is_disconnected, is_revoked, is_replaced, is_drained],
)
@virtually
async def test_rooms_after_close_are_rooms_of_connection(kind: str, end: End) -> None:
    """`ws.rooms` in `on_disconnect` and `on_session_end` has the connection's rooms, for each cause of the close."""
    async with Stage(session_ttl=30) as stage:
        recorded = record_rooms(stage)
        line = await Peer(stage).dial() if kind == "v1" else stage.plain()
        await soon()
        socket = stage.socket()
        await socket.join("lobby")
        await socket.join("kitchen")
        await end(stage, line)
        await soon()
        await asyncio.sleep(40)
        assert recorded[:2] == ["disconnect lobby kitchen", "session_end lobby kitchen"]
        assert socket.rooms == ("lobby", "kitchen")
        assert socket not in stage.manager.room("lobby")


@virtually
async def test_rooms_remain_after_close_of_explicit_connection() -> None:
    """The rooms of an explicit connection are available in `on_disconnect` as well."""
    async with Stage() as stage:
        recorded = record_rooms(stage)
        server = FakeServer()
        socket = await stage.manager.connect("ann", await server.accepted())
        await socket.join("lobby")
        server.feed_disconnect(1006)
        await soon()
        assert recorded == ["disconnect lobby", "session_end lobby"]


@virtually
async def test_rooms_of_plain_client_with_token_remain_until_end() -> None:
    """The rooms of a plain client that does not return with its token are available in `on_session_end`."""
    async with Stage(session_ttl=30) as stage:
        recorded = record_rooms(stage)
        line = stage.plain()
        await soon()
        await stage.socket().join("lobby")
        stage.manager.generate_reconnect_token("ann")
        await line.leaves()
        assert recorded == ["disconnect lobby"]
        await asyncio.sleep(40)
        assert recorded[1:] == ["session_end lobby"]


@virtually
async def test_socket_of_ended_connection_shows_rooms_of_session() -> None:
    """The socket of a closed connection shows the rooms of its session until that ends."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await stage.socket().join("lobby")
        await line.leaves()
        await peer.dial()
        await stage.socket().join("kitchen")
        assert line.socket is not None
        assert line.socket.rooms == ("lobby", "kitchen")


# ── hooks that use their socket after the close ──

Use = Callable[[StableSocket], Awaitable[Any]]

USES: dict[str, Use] = {
    "send": lambda ws: ws.send("bye"),
    "send_json": lambda ws: ws.send_json({"bye": True}),
    "send with ack": lambda ws: ws.send("bye", ack=True),
    "join": lambda ws: ws.join("attic"),
    "leave": lambda ws: ws.leave("lobby"),
    "close": lambda ws: ws.close(),
    "request": lambda ws: ws.request("sure?"),
    "receive": lambda ws: ws.receive(),
    "websocket": lambda ws: ws.websocket.send_text("bye"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["plain", "v1"])
@pytest.mark.parametrize("event", ["on_disconnect", "on_session_end", "on_leave"])
@virtually
async def test_hook_using_closed_socket_reports_no_error(event: str, kind: str, use: str) -> None:
    """A hook that uses its closed socket emits no error event, and the next hook still runs."""
    async with Stage() as stage:
        sockets: list[StableSocket] = []

        async def uses(first: StableSocket | Room, second: DisconnectReason | Presence) -> None:
            await USES[use](first if isinstance(first, StableSocket) else sockets[0])

        async def after(first: StableSocket | Room, second: DisconnectReason | Presence) -> None:
            stage.notes.append("next hook")

        for hook in (uses, after):
            getattr(stage.manager, event)(hook)
        line = await Peer(stage).dial() if kind == "v1" else stage.plain()
        await soon()
        sockets.append(stage.socket())
        await stage.socket().join("lobby")
        await line.leaves(1000)
        assert stage.notes == ["next hook"]
        assert stage.bugs == []
        assert [event for event in stage.heard.all if event.level >= logging.ERROR] == []


@virtually
async def test_error_hook_writing_to_closed_socket_reports_no_error() -> None:
    """An `on_error` hook that writes to the socket of the failed endpoint causes no second error."""
    async with Stage() as stage:

        @stage.manager.on_error
        async def says_sorry(ws: StableSocket, error: BaseException) -> None:
            await ws.send("sorry")

        async def fails(ws: StableSocket) -> None:
            raise RuntimeError("a bug of the endpoint")

        stage.endpoint = fails
        stage.plain()
        await soon()
        assert stage.bugs == ["endpoint_failed"]


@virtually
async def test_slow_hook_writing_to_closed_socket_reports_no_error() -> None:
    """An `on_slow` hook that writes to a client disconnected as a slow consumer causes no error."""
    async with Stage(outbox_max_messages=2) as stage:
        seen: list[str] = []

        @stage.manager.on_slow
        async def slow(ws: StableSocket, condition: Any) -> None:
            if ws.closed:
                seen.append(condition.value)
                await ws.send("hurry")

        line = stage.plain()
        await soon()
        line.server.block()
        for _ in range(6):
            await stage.manager.send_to_client("ann", "x")
        await soon()
        assert seen
        assert stage.bugs == []
