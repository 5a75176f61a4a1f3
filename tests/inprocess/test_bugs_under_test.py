"""Under Starlette's TestClient a test sees the exceptions of an endpoint, as without this library."""

from __future__ import annotations

import pytest
from fastapi import FastAPI, HTTPException, WebSocket
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from fastapi_ws_stabilizer import StableSocket, StableSocketDep, WebSocketConnectionManager

ENTRY_POINTS = ("endpoint", "assertion", "handler", "explicit", "serve", "connect")


def made() -> FastAPI:
    """Return an app with endpoints that fail at each stage, and its manager."""
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    @manager.on_message
    async def handle(ws: StableSocket, message: str) -> None:
        raise ZeroDivisionError("a bug")

    @manager.on_connect
    async def connected(ws: StableSocket) -> None:
        if ws.url.path == "/connect":
            raise ZeroDivisionError("a bug")

    @app.websocket("/endpoint")
    @app.websocket("/connect")
    async def endpoint(ws: StableSocketDep) -> None:
        await ws.receive_text()
        raise ZeroDivisionError("a bug")

    @app.websocket("/assertion")
    async def assertion(ws: StableSocketDep) -> None:
        assert await ws.receive_text() == "something else"

    @app.websocket("/handler")
    async def handler(ws: StableSocketDep) -> None:
        await ws.run()

    @app.websocket("/explicit")
    async def explicit(websocket: WebSocket) -> None:
        await websocket.accept()
        await manager.connect("ann", websocket)
        await websocket.receive_text()
        raise ZeroDivisionError("a bug")

    @app.websocket("/serve")
    async def serve(websocket: WebSocket) -> None:
        async with manager.serve(websocket) as ws:
            await ws.receive_text()
            raise ZeroDivisionError("a bug")

    @app.websocket("/refuses")
    async def refuses(ws: StableSocketDep) -> None:
        await ws.receive_text()
        raise HTTPException(404, "no such room")

    return app


@pytest.mark.skipif(
    hasattr(WebSocketTestSession, "should_close"),
    reason="TestClient of Starlette 0.37 cancels the endpoint when the test closes the socket",
)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_test_client_raises_bug_of_endpoint(entry_point: str) -> None:
    """A bug of an endpoint, of a message handler or of a connect hook is raised in the test."""
    kind = AssertionError if entry_point == "assertion" else ZeroDivisionError
    with TestClient(made()) as client, pytest.raises(kind), client.websocket_connect(f"/{entry_point}") as ws:
        ws.send_text("do it")


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_test_client_without_raising_sees_close_code(entry_point: str) -> None:
    """With `raise_server_exceptions=False` a test sees what a client sees: 1011."""
    with TestClient(made(), raise_server_exceptions=False) as client, client.websocket_connect(f"/{entry_point}") as ws:
        ws.send_text("do it")
        with pytest.raises(WebSocketDisconnect) as closed:
            ws.receive_text()
        assert closed.value.code == 1011


def test_test_client_does_not_raise_rejections() -> None:
    """An exception with which an endpoint closes its connection is not a bug, and is not raised in the test."""
    with TestClient(made()) as client, client.websocket_connect("/refuses") as ws:
        ws.send_text("do it")
        with pytest.raises(WebSocketDisconnect) as closed:
            ws.receive_text()
    assert (closed.value.code, closed.value.reason) == (4404, "no such room")


def test_test_client_does_not_raise_on_client_disconnect() -> None:
    """An endpoint raises nothing in the test after its client has disconnected."""
    with TestClient(made()) as client, client.websocket_connect("/endpoint"):
        pass
