"""What is kept of a client that is away: its facts, and nothing of its connection or of the server."""

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


async def goes_away(stage: Stage, *, numbered: bool) -> None:
    """Let a client connect, keep something, and lose its connection; nothing of it is left in the test itself."""
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


def of_connections() -> list[object]:
    """All objects by which a connection or the server is held."""
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, (Connection, WebSocket, FakeServer, Line))]


@pytest.mark.parametrize("numbered", [True, False], ids=["session", "reconnect token"])
@virtually
async def test_detached_client_holds_no_connection_objects(numbered: bool) -> None:
    """When everything is done for a connection, what waits for its client's return holds nothing of the server's."""
    known = of_connections()
    async with Stage(session_ttl=120.0) as stage:
        await goes_away(stage, numbered=numbered)
        kept = len(stage.manager._node.sessions) + len(stage.manager._node.resumption.detached)
        assert kept == 1
        assert [one for one in of_connections() if one not in known] == []


@pytest.mark.parametrize("numbered", [True, False], ids=["session", "reconnect token"])
@virtually
async def test_session_end_hook_sees_data_of_closed_connection(numbered: bool) -> None:
    """It knows the client, the ending and the user data; the handshake is gone, and the error says what to do."""
    ended: list[StableSocket] = []
    async with Stage(session_ttl=120.0) as stage:

        @stage.manager.on_session_end
        async def over(ws: StableSocket) -> None:
            ended.append(ws)

        await goes_away(stage, numbered=numbered)
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
    """What is unread when everything is done for a connection waits for the next one, and is counted if none comes."""
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
