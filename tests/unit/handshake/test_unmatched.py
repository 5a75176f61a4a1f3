"""Tests of events for WebSocket handshakes without a matching route."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handshake.routes import MAX_LOGGED, UnmatchedRouteLogger, websocket_paths
from tests.support.fake_websocket import FakeServer
from tests.unit.conftest import EventRecorder


async def endpoint(websocket: WebSocket) -> None:
    """Do nothing, as an endpoint."""


def make_app() -> FastAPI:
    """Return an app with WebSocket routes of all kinds."""
    app = FastAPI()
    app.add_api_websocket_route("/ws/{client_id}", endpoint)
    router = APIRouter()
    router.add_api_websocket_route("/inner", endpoint)
    app.include_router(router, prefix="/router")
    sub = FastAPI()
    sub.add_api_websocket_route("/deep", endpoint)
    app.mount("/sub", sub)
    app.router.routes.append(Mount("/empty", app=lambda scope, receive, send: None))
    return app


async def send_handshake(app: Any, path: str) -> FakeServer:
    """Send a handshake for a path, and return its server."""
    server = FakeServer(path)
    await app(server.websocket.scope, server.receive, server.send)
    return server


def test_all_websocket_paths_are_found() -> None:
    """The paths of included routers and mounted apps are found too, and no others."""
    assert sorted(websocket_paths(make_app().routes)) == ["/router/inner", "/sub/deep", "/ws/{client_id}"]


async def test_unmatched_path_is_reported_with_known_paths() -> None:
    """An unmatched path gets a warning with the path and the known paths."""
    app, events, heard = make_app(), EventBus(), EventRecorder()
    events.subscribe(heard)
    UnmatchedRouteLogger.watch(app, events)
    server = await send_handshake(app, "/wss/ann")
    assert server.taken[0]["type"] == "websocket.close"
    (event,) = heard.all
    assert (event.event, event.level) == ("no_websocket_route", logging.WARNING)
    assert event.fields == {"path": "/wss/ann", "known": "/router/inner, /sub/deep, /ws/{client_id}"}


async def test_unmatched_path_is_reported_once_up_to_limit() -> None:
    """Each unmatched path is reported once, up to MAX_LOGGED paths, so that a scanner cannot fill the log."""
    app, events, heard = FastAPI(), EventBus(), EventRecorder()
    events.subscribe(heard)
    UnmatchedRouteLogger.watch(app, events)
    for number in range(3 * MAX_LOGGED):
        await send_handshake(app, f"/{number}")
        await send_handshake(app, f"/{number}")
    assert len(heard.all) == MAX_LOGGED
    assert heard.all[0].fields["known"] == "none"


async def test_unmatched_http_request_is_not_reported() -> None:
    """An HTTP request with a 404 is not reported."""
    app, events, heard = FastAPI(), EventBus(), EventRecorder()
    events.subscribe(heard)
    UnmatchedRouteLogger.watch(app, events)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    await app({"type": "http", "method": "GET", "path": "/x", "headers": [], "query_string": b""}, receive, send)
    assert sent[0]["status"] == 404
    assert heard.all == []


def test_app_is_watched_once() -> None:
    """Watching an app again adds no second watch."""
    app, events = FastAPI(), EventBus()
    UnmatchedRouteLogger.watch(app, events)
    first = app.router.default
    UnmatchedRouteLogger.watch(app, events)
    assert app.router.default is first


@pytest.mark.parametrize(
    "app", [SimpleNamespace(), SimpleNamespace(router=None), SimpleNamespace(router=SimpleNamespace())]
)
def test_app_without_router_default_is_unchanged(app: Any) -> None:
    """An app without a router or without its default is not watched, and nothing fails."""
    before = vars(app).copy()
    UnmatchedRouteLogger.watch(app, EventBus())
    assert vars(app) == before


# ── mounts ──


def watched(app: FastAPI) -> EventRecorder:
    """Watch an app, and return its recorded events."""
    events, heard = EventBus(), EventRecorder()
    events.subscribe(heard)
    UnmatchedRouteLogger.watch(app, events)
    return heard


async def test_path_behind_static_files_is_reported_and_gets_403() -> None:
    """A WebSocket behind a mount of files gets a 403 and a log line instead of an AssertionError."""
    app = FastAPI()
    app.add_api_websocket_route("/ws", endpoint)
    app.mount("/", StaticFiles(directory=Path(__file__).parent))
    app.add_api_websocket_route("/late", endpoint)
    heard = watched(app)
    for path in ("/wss", "/late"):
        server = await send_handshake(app, path)
        assert [message["type"] for message in server.taken] == ["websocket.close"]
    first, second = heard.of("no_websocket_route")
    assert first.fields == {"path": "/wss", "known": "/late, /ws", "taken_by": "the mount at /"}
    assert second.fields["advice"] == "the WebSocket route /late comes after the mount at /: put the mount last"


async def test_unmatched_path_in_mounted_app_is_reported() -> None:
    """A path below a mounted app is reported by the manager of the outer app."""
    app = make_app()
    heard = watched(app)
    server = await send_handshake(app, "/sub/no")
    assert [message["type"] for message in server.taken] == ["websocket.close"]
    (event,) = heard.of("no_websocket_route")
    assert (event.fields["path"], event.fields["taken_by"]) == ("/sub/no", "the mount at /sub")


async def test_mounted_app_with_manager_reports_its_own_path() -> None:
    """A mounted app with its own manager reports its path alone."""
    app, sub = FastAPI(), FastAPI()
    app.mount("/sub", sub)
    outer, inner = watched(app), watched(sub)
    await send_handshake(app, "/sub/no")
    assert (len(outer.all), len(inner.all)) == (0, 1)


async def test_served_paths_are_not_reported() -> None:
    """Paths of routes, of mounted apps and of apps without visible routes are not reported."""
    served: list[str] = []

    async def serve(websocket: WebSocket) -> None:
        served.append(websocket.scope["path"])
        await websocket.close()

    async def other_app(scope: Any, receive: Any, send: Any) -> None:
        served.append(scope["path"])
        await send({"type": "websocket.close", "code": 1000})

    app, sub, router = FastAPI(), FastAPI(), APIRouter()
    app.add_api_websocket_route("/ws", serve)
    sub.add_api_websocket_route("/deep", serve)
    router.add_api_websocket_route("/{room}", serve)
    app.include_router(router, prefix="/rooms")
    app.mount("/sub", sub)
    app.mount("/socket.io", other_app)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent))
    heard = watched(app)
    paths = ["/ws", "/sub/deep", "/rooms/lobby", "/socket.io/5"]
    for path in paths:
        await send_handshake(app, path)
    assert served == paths
    assert heard.all == []


async def test_root_path_is_ignored_when_matching_routes() -> None:
    """A root path that a proxy or a server adds is ignored when routes are matched."""
    app = FastAPI()
    app.mount("/", StaticFiles(directory=Path(__file__).parent))
    heard = watched(app)
    server = FakeServer("/api/ws", root_path="/api")
    await app(server.websocket.scope, server.receive, server.send)
    assert heard.of("no_websocket_route")[0].fields["taken_by"] == "the mount at /"
