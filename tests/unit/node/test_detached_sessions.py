"""Tests of detached clients: their data is retained, but no object of the connection or of the server."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from starlette.websockets import WebSocket

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.errors import SocketClosed
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Line, Peer, Stage


async def detach_client(stage: Stage, *, numbered: bool) -> None:
    """Connect a client, store data, and drop its connection, so that the test holds no reference to it."""
    line = await Peer(stage).dial() if numbered else stage.plain()
    await soon()
    assert line.socket is not None
    line.socket.user_data["name"] = "Ann"
    await line.socket.join("lobby", {"colour": "red"})
    if not numbered:
        stage.manager.generate_reconnect_token("ann")
    await line.leaves()
    await asyncio.sleep(30)
    assert line.task.done()
    stage.lines.clear()


def connection_objects() -> list[object]:
    """Return all live objects that belong to a connection or to the server."""
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, (Connection, WebSocket, FakeServer, Line))]


@pytest.mark.parametrize("numbered", [True, False], ids=["session", "reconnect token"])
@virtually
async def test_detached_client_holds_no_connection_objects(numbered: bool) -> None:
    """After teardown, a detached client holds no object of the connection or of the server."""
    known = connection_objects()
    async with Stage(session_ttl=120.0) as stage:
        await detach_client(stage, numbered=numbered)
        detached = len(stage.manager._node.sessions) + len(stage.manager._node.detached.states)
        assert detached == 1
        assert [one for one in connection_objects() if one not in known] == []


@pytest.mark.parametrize("numbered", [True, False], ids=["session", "reconnect token"])
@virtually
async def test_session_end_hook_sees_data_of_closed_connection(numbered: bool) -> None:
    """The hook sees client id, close info and user data; handshake attributes raise an error that says what to do."""
    ended: list[StableSocket] = []
    async with Stage(session_ttl=120.0) as stage:

        @stage.manager.on_session_end
        async def collect(ws: StableSocket) -> None:
            ended.append(ws)

        await detach_client(stage, numbered=numbered)
        assert ended == []
        await asyncio.sleep(120)
        (ws,) = ended
        assert (ws.client_id, ws.user_data, ws.reason) == ("ann", {"name": "Ann"}, DisconnectReason.NETWORK_LOST)
        assert (ws.closed, ws.resumed.value, ws.session_id is not None) == (True, "none", numbered)
        assert (ws.queued_messages, ws.queued_bytes, ws.unread_messages, ws.unread_bytes) == (0, 0, 0, 0)
        assert (await ws.wait_closed()).code == 1006
        for concurrency in (1, 2):
            with pytest.raises(SocketClosed):
                await ws.run(concurrency=concurrency)
        assert (ws.dropped_messages, ws.rtt, ws.connected_seconds > 100) == (0, None, True)
        for name in ("websocket", "headers", "scope", "path_params", "app"):
            with pytest.raises(RuntimeError, match=r"store what this hook needs in ws\.user_data"):
                getattr(ws, name)
        late: list[Any] = [ws.send("x"), ws.send_text("x"), ws.receive(), ws.join("lobby"), ws.request("x")]
        for call in (*late, ws.send("x", ack=True)):
            with pytest.raises(SocketClosed):
                await call
        with pytest.raises(SocketClosed):
            ws.create_task(asyncio.sleep(0))
        assert [message async for message in ws] == []
        await ws.close()
        ws.user_data["late"] = "x" * 1000
        assert stage.manager.get_memory_usage()["total_memory"] == 0
        assert stage.bugs == []


@virtually
async def test_unread_messages_of_detached_client_wait_for_resume() -> None:
    """Unread messages wait for the resume after teardown, and count as discarded if the session expires."""
    async with Stage(session_ttl=60.0, disconnect_grace=1.0) as stage:
        stage.endpoint = lambda ws: stage.gate.wait()  # type: ignore[assignment,return-value]
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("note", "one", "two")
        await line.leaves()
        await asyncio.sleep(10)
        line = await peer.dial()
        assert line.socket is not None
        assert (line.outcome, line.socket.unread_messages) == ("full", 2)
        assert await line.socket.receive() == "one"
        await line.leaves()
        await asyncio.sleep(100)
        assert stage.manager.counters.messages_discarded == 1
        assert stage.manager.get_memory_usage()["total_memory"] == 0
        assert stage.manager.get_session_counts()["sessions"] == 0
