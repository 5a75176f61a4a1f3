"""Tests of the private parts of Starlette, on the installed version."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from websockets.asyncio.client import connect

from fastapi_ws_stabilizer.compat.starlette import (
    asgi_callables,
    close_frame_was_received,
    forget_task,
    install_asgi_shim,
    lifespan_owners,
    mark_disconnected,
    mark_handled,
    mark_open,
    mounted_app,
    replace_with_ended,
    transport_of,
    unwrap_send,
)
from tests.support.fake_websocket import FakeServer, with_deadline


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


async def test_closed_websocket_marked_open_closes_again() -> None:
    """Starlette closes a closed `WebSocket` again only if it is marked as open."""
    server = FakeServer()
    websocket = await server.accepted()
    await websocket.close(4000)
    with pytest.raises(RuntimeError):
        await websocket.close(4001)
    mark_open(websocket)
    await websocket.close(4001)
    assert [message["code"] for message in server.offered[1:]] == [4000, 4001]


class Ended:
    """Receiver of an ended connection, which counts the calls that Starlette rejects."""

    def __init__(self, *events: Any) -> None:
        self.events = list(events)
        self.yields = 0

    async def receive(self) -> Any:
        """Return the unread messages, and then the disconnect."""
        return self.events.pop(0) if self.events else {"type": "websocket.disconnect", "code": 1001}

    async def yield_after_end(self) -> None:
        """Count a call."""
        self.yields += 1


class AppsWebSocket(WebSocket):
    """A subclass of the application."""

    name = "of the application"


@pytest.mark.parametrize("kind", [WebSocket, AppsWebSocket])
async def test_ended_websocket_reports_disconnect_after_unread(kind: type[WebSocket]) -> None:
    """An ended `WebSocket` keeps its class, returns unread messages, and then reports the disconnect each time."""
    server, ended = FakeServer(), Ended({"type": "websocket.receive", "text": "unread"})
    websocket = kind(server.websocket.scope, server.receive, server.send)
    await websocket.accept()
    mark_disconnected(websocket)
    install_asgi_shim(websocket, ended.receive, server.send)
    replace_with_ended(websocket)
    assert isinstance(websocket, kind)
    assert getattr(websocket, "name", "") == getattr(kind, "name", "")
    assert await websocket.receive_text() == "unread"
    for _ in range(2):
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()
    assert ended.yields == 0


@pytest.mark.parametrize("method", ["receive_text", "receive_bytes", "receive_json", "send_text"])
async def test_rejected_call_of_ended_websocket_yields(method: str) -> None:
    """A call that Starlette rejects yields first, so that a loop around it does not block the event loop."""
    server, ended = FakeServer(), Ended()
    websocket = await server.accepted()
    await websocket.close()
    install_asgi_shim(websocket, ended.receive, server.send)
    replace_with_ended(websocket)
    with pytest.raises(RuntimeError):
        await getattr(websocket, method)(*(("x",) if method == "send_text" else ()))
    assert ended.yields == 1


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


# ── the server's protocol object ──


async def on_uvicorn(library: str, end: Callable[[Any], Awaitable[None]]) -> tuple[Any, Any, Any, bool | None]:
    """Serve one WebSocket on a real uvicorn until the client ends it.

    Returns:
        The owner of `receive`, the transport, the server's tasks with that of the application, and what the protocol
        object knows of a close frame.
    """
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        owner = asgi_callables(websocket)[0].__self__
        task = asyncio.current_task()
        before = set(owner.tasks)
        forget_task(task, None, owner)
        found.extend((owner, transport_of(None, owner), before - owner.tasks == {task}))
        owner.tasks |= before
        with suppress(DeprecationWarning):  # uvicorn before 0.35 reads a deprecated attribute of the close
            await websocket.receive()
        found.append(close_frame_was_received(owner, owner))

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, ws=library, lifespan="off", log_level="critical"))  # type: ignore[arg-type]
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined,method-assign]
        running = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            assert not running.done()
            await asyncio.sleep(0.01)
        async with connect(f"ws://127.0.0.1:{listener.getsockname()[1]}/") as client:
            await end(client)
            while len(found) < 4:
                await asyncio.sleep(0.01)
        server.should_exit = True
        await running
    owner, transport, is_forgotten, has_close_frame = found
    return owner, transport, is_forgotten, has_close_frame


LIBRARIES = ("wsproto", "websockets-sansio" if "websockets-sansio" in uvicorn.config.WS_PROTOCOLS else "websockets")
"""Protocols of the installed uvicorn. A newer one warns about `websockets`."""


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("sends_close_frame", [True, False])
async def test_protocol_object_of_uvicorn_is_known(library: str, sends_close_frame: bool) -> None:
    """uvicorn's protocol object shows its transport, its tasks, and whether the client has sent a close frame.

    The oldest one, on the legacy part of `websockets`, does not know the close frame: the event decides.
    """

    async def end(client: Any) -> None:
        if sends_close_frame:
            await client.close()
        else:
            client.transport.abort()

    owner, transport, is_forgotten, has_close_frame = await with_deadline(on_uvicorn(library, end))
    assert transport is owner.transport
    assert is_forgotten
    assert has_close_frame is (None if library == "websockets" else sends_close_frame)


@pytest.mark.parametrize("protocol", [None, object(), SimpleNamespace(transport=None, tasks=None, conn=None)])
def test_unknown_protocol_object_is_left_alone(protocol: Any) -> None:
    """Nothing is known of another server, and nothing fails."""
    assert transport_of(protocol, protocol) is None
    assert close_frame_was_received(protocol, protocol) is None
    forget_task(None, protocol, protocol)
