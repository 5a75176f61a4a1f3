"""Tests of a real uvicorn of the installed version: with the protocol class, or with the fallback."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from fastapi import FastAPI
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConnectionManager
from fastapi_ws_stabilizer.servers.detect import websocket_library_advice
from tests.support.fake_websocket import with_deadline
from tests.support.versions import HAS_DIRECT_TRANSPORT


def make() -> tuple[WebSocketConnectionManager, FastAPI]:
    """An app that echoes."""
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        async for message in ws:
            await ws.send(message)

    return manager, app


@asynccontextmanager
async def served(manager: WebSocketConnectionManager, app: FastAPI) -> AsyncIterator[str]:
    """Serve an app on a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        options = {**manager.uvicorn_options(), "log_level": "critical"}
        server = uvicorn.Server(uvicorn.Config(app, **options))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined,method-assign]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            assert not task.done()
            await asyncio.sleep(0.01)
        try:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}/ws/ann"
        finally:
            server.should_exit = True
            await with_deadline(task)


async def test_installed_uvicorn_serves_with_manager_options(caplog: pytest.LogCaptureFixture) -> None:
    """Messages, the close code and the shutdown work on every uvicorn, and a fallback is logged."""
    manager, app = make()
    with caplog.at_level(logging.WARNING, "fastapi_ws_stabilizer"):
        async with served(manager, app) as url:
            client = await with_deadline(connect(url))
            await client.send("hello")
            assert await with_deadline(client.recv()) == "hello"
            (ws,) = manager.get_sockets()
            is_direct = ws._connection.is_direct
            await manager.disconnect("ann", 4000, "bye")
            with pytest.raises(ConnectionClosed) as closed:
                await with_deadline(client.recv())
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4000, "bye")
    assert is_direct == HAS_DIRECT_TRANSPORT
    events = [getattr(record, "event", "") for record in caplog.records]
    assert ("uvicorn_internals_unknown" in events) == (not is_direct)


def test_installed_uvicorn_has_websocket_library() -> None:
    """The extra `uvicorn` brings a WebSocket library."""
    assert websocket_library_advice() is None
