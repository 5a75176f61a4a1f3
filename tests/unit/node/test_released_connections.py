"""Tests that reference counting alone frees an ended connection, and what the socket has after that."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import HTTPException

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.ended_connection import EndedConnection
from fastapi_ws_stabilizer.connection.pending import PendingConnection
from fastapi_ws_stabilizer.errors import NotOpenError, SocketClosed
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.stage import Line, Peer, Stage

tenant: contextvars.ContextVar[Any] = contextvars.ContextVar("tenant", default=None)


class Tenant:
    """Value that a middleware sets in a context variable for one connection."""


@pytest.fixture(autouse=True)
def only_reference_counting() -> Iterator[None]:
    """Turn the garbage collector off."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive(stage: Stage) -> int:
    """Return how many connections and handshakes of a manager exist in memory."""
    budget, kinds = stage.manager._node.budget, (Connection, PendingConnection)
    found = [one for one in gc.get_objects() if type(one) in kinds]  # `isinstance` fails for proxies of other tests
    return sum(one.budget is budget for one in found)


async def client_of(stage: Stage, kind: str) -> Line:
    """Return a client with a connection: a plain one, or one with a session."""
    line = await Peer(stage).dial() if kind == "v1" else stage.plain()
    await soon()
    assert alive(stage) == 1
    return line


@pytest.mark.parametrize("kind", ["plain", "v1"])
@virtually
async def test_ended_connection_is_freed_without_collector(kind: str) -> None:
    """Nothing refers to a connection after its end, although user code still has its socket."""
    async with Stage() as stage:
        line = await client_of(stage, kind)
        socket = line.socket
        await line.leaves(1000)
        assert alive(stage) == 0
        assert socket is not None
        assert socket.closed


@virtually
async def test_detached_session_holds_no_connection() -> None:
    """While its client is away, a session refers to facts about its last connection only."""
    async with Stage() as stage:
        line = await client_of(stage, "v1")
        await line.leaves()
        assert stage.manager._node.sessions.detached_count == 1
        (session,) = stage.manager._node.detached.of_client("ann")
        assert isinstance(session.socket._connection, EndedConnection)
        assert alive(stage) == 0


@virtually
async def test_detached_state_holds_no_connection() -> None:
    """The saved state of a plain client refers to facts about its last connection only."""
    async with Stage() as stage:
        line = await client_of(stage, "plain")
        assert line.socket is not None
        line.socket.reconnect_token()
        await line.leaves()
        (state,) = stage.manager._node.detached.of_client("ann")
        assert isinstance(state.socket._connection, EndedConnection)
        assert alive(stage) == 0


@pytest.mark.parametrize("kind", ["plain", "v1"])
@virtually
async def test_socket_has_facts_after_its_connection_is_freed(kind: str) -> None:
    """The socket of an ended connection still has the ids, the close info, the user data and the rooms."""
    async with Stage() as stage:
        line = await client_of(stage, kind)
        ws = line.socket
        assert ws is not None
        await ws.join("lobby")
        ws.user_data["note"] = 1
        connection_id = ws.connection_id
        await line.leaves(1000)
        assert isinstance(ws._connection, EndedConnection)
        assert (ws.client_id, ws.connection_id, ws.rooms) == ("ann", connection_id, ("lobby",))
        assert ws.close_info is not None
        assert (ws.close_info.cause, ws.close_info.code) == (DisconnectReason.CLIENT_CLOSE, 1000)
        assert ws.user_data["note"] == 1
        assert (ws.queued_messages, ws.unread_messages) == (0, 0)
        with pytest.raises(SocketClosed):
            await ws.send("too late")
        with pytest.raises(SocketClosed):
            await ws.receive()
        with pytest.raises(RuntimeError, match="not available after the connection has ended"):
            _ = ws.headers


@virtually
async def test_rejected_handshake_is_freed_without_collector() -> None:
    """A client that a hook rejects leaves nothing behind, and a socket that user code keeps has no WebSocket."""
    async with Stage() as stage:
        seen: list[StableSocket] = []

        @stage.manager.on_handshake
        async def reject(ws: StableSocket) -> None:
            seen.append(ws)
            raise HTTPException(403)

        line = stage.plain()
        await soon()
        assert seen[0].client_id == "ann"
        with pytest.raises(NotOpenError):
            await seen[0].send("too late")
        with pytest.raises(RuntimeError, match="not available after the connection has ended"):
            _ = seen[0].headers
        line.error = None  # it refers to the frames of the handshake
        seen.clear()
        await soon()
        assert alive(stage) == 0


@pytest.mark.parametrize("kind", ["plain", "v1"])
@virtually
async def test_detached_client_does_not_hold_context_of_its_connection(kind: str) -> None:
    """No timer, task or session holds the context variables of a connection that has ended."""
    async with Stage(session_ttl=1000.0) as stage:
        value = Tenant()
        reference = weakref.ref(value)

        async def connect(value: Tenant) -> Line:
            tenant.set(value)
            return await client_of(stage, kind)

        line = await asyncio.ensure_future(connect(value))
        del value
        assert line.socket is not None
        if kind == "plain":
            line.socket.reconnect_token()
        await line.socket.join("lobby")
        assert reference() is not None
        await line.leaves()
        assert stage.manager._node.detached.of_client("ann")
        stage.lines.remove(line)
        del line
        await soon()
        assert reference() is None
