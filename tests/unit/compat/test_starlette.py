"""Tests of the private parts of Starlette, on the installed version."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from fastapi_ws_stabilizer.compat.starlette import (
    asgi_callables,
    install_asgi_shim,
    lifespan_owners,
    mark_disconnected,
    mark_handled,
    mounted_app,
    unwrap_send,
)
from tests.support.fake_websocket import FakeServer


async def test_asgi_callables_are_those_of_server() -> None:
    """The callables that the `WebSocket` was made with come back."""
    server = FakeServer()
    assert asgi_callables(server.websocket) == (server.receive, server.send)


async def test_shim_receives_and_sends_for_websocket() -> None:
    """Calls of the `WebSocket` go through the installed callables."""
    server = FakeServer()
    websocket = await server.accepted()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.receive", "text": "from the shim"}

    async def send(message: Any) -> None:
        sent.append(message)

    install_asgi_shim(websocket, receive, send)
    websocket.client_state = WebSocketState.CONNECTED
    assert await websocket.receive_text() == "from the shim"
    await websocket.send_text("to the shim")
    assert sent == [{"type": "websocket.send", "text": "to the shim"}]


async def test_handled_websocket_sends_no_second_close() -> None:
    """Starlette closes a `WebSocket` that is marked, and nothing reaches the server."""
    server = FakeServer()
    mark_handled(server.websocket)
    await server.websocket.close(1000)
    assert server.offered == []


async def test_disconnected_websocket_rejects_reads() -> None:
    """Starlette raises at a read of a `WebSocket` that is marked as disconnected."""
    server = FakeServer()
    websocket = await server.accepted()
    mark_disconnected(websocket)
    with pytest.raises((RuntimeError, WebSocketDisconnect)):
        await websocket.receive_text()


async def test_send_of_server_is_found_inside_starlette_closures() -> None:
    """`send` of the server comes out of the exception middleware of a running app."""
    found: list[Any] = []

    async def endpoint(websocket: WebSocket) -> None:
        found.append(unwrap_send(asgi_callables(websocket)[1], only_starlettes=True))

    server = FakeServer()
    await Starlette(routes=[WebSocketRoute("/ws", endpoint)])(server.websocket.scope, server.receive, server.send)
    assert found == [server.send]


def test_foreign_closure_is_not_opened() -> None:
    """A middleware that is not Starlette's may change messages, so its `send` stays if only Starlette's are opened."""

    def wrapped(send: Any) -> Any:
        async def inner(message: Any) -> None:
            await send(message)

        return inner

    server = FakeServer()
    send = wrapped(server.send)
    assert unwrap_send(send, only_starlettes=True) is send
    assert unwrap_send(send) == server.send


class Owner:
    """An object whose method is a lifespan."""

    @asynccontextmanager
    async def lifespan(self, app: Any) -> Any:
        yield {}


def test_owner_of_merged_lifespan_is_found() -> None:
    """FastAPI merges the lifespan of an included router into that of the app."""
    owner, other = Owner(), Owner()
    app = FastAPI(lifespan=owner.lifespan)
    app.include_router(APIRouter(lifespan=other.lifespan))
    found = list(lifespan_owners(app.router.lifespan_context))
    assert owner in found
    assert other in found


def test_mounted_app_comes_without_middleware() -> None:
    """The app of a mount is found behind its middleware."""
    app = Starlette()
    assert mounted_app(Mount("/", app=app, middleware=[Middleware(GZipMiddleware)])) is app
    assert mounted_app(Mount("/", app=GZipMiddleware(app))) is app
