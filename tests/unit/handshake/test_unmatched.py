"""Tests of saying why a WebSocket handshake got a 403."""

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
    """An endpoint."""


def make_app() -> FastAPI:
    """An app with WebSocket routes of all kinds."""
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


async def knock(app: Any, path: str) -> FakeServer:
    """Let a client try a path."""
    server = FakeServer(path)
    await app(server.websocket.scope, server.receive, server.send)
    return server


def test_all_websocket_paths_are_found() -> None:
    """Those of included routers and mounted apps too, and no others."""
    assert sorted(websocket_paths(make_app().routes)) == ["/router/inner", "/sub/deep", "/ws/{client_id}"]


async def test_unmatched_path_is_reported_with_known_paths() -> None:
    """The bare 403 gets a warning that names the path and the known ones."""
    app, events, heard = make_app(), EventBus(), EventRecorder()
    events.subscribe(heard)
    UnmatchedRouteLogger.watch(app, events)
    server = await knock(app, "/wss/ann")
    assert server.taken[0]["type"] == "websocket.close"
    (report,) = heard.all
    assert (report.event, report.level) == ("no_websocket_route", logging.WARNING)
    assert report.fields == {"path": "/wss/ann", "known": "/router/inner, /sub/deep, /ws/{client_id}"}


async def test_unmatched_path_is_reported_once_up_to_limit() -> None:
    """A scanner does not fill the log."""
    app, events, heard = FastAPI(), EventBus(), EventRecorder()
    events.subscribe(heard)
    UnmatchedRouteLogger.watch(app, events)
    for number in range(3 * MAX_LOGGED):
        await knock(app, f"/{number}")
        await knock(app, f"/{number}")
    assert len(heard.all) == MAX_LOGGED
    assert heard.all[0].fields["known"] == "none"


async def test_unmatched_http_request_is_not_reported() -> None:
    """A 404 of HTTP is no business of ours."""
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
    """Attaching a manager again puts no second watch before the first."""
    app, events = FastAPI(), EventBus()
    UnmatchedRouteLogger.watch(app, events)
    first = app.router.default
    UnmatchedRouteLogger.watch(app, events)
    assert app.router.default is first


@pytest.mark.parametrize(
    "app", [SimpleNamespace(), SimpleNamespace(router=None), SimpleNamespace(router=SimpleNamespace())]
)
def test_app_without_router_default_is_unchanged(app: Any) -> None:
    """Where there is no router with a default, nothing is watched and nothing fails."""
    before = vars(app).copy()
    UnmatchedRouteLogger.watch(app, EventBus())
    assert vars(app) == before


# ── behind mounts ──


def watched(app: FastAPI) -> EventRecorder:
    """Watch an app, and hear what is told."""
    events, heard = EventBus(), EventRecorder()
    events.subscribe(heard)
    UnmatchedRouteLogger.watch(app, events)
    return heard


async def test_path_behind_static_files_is_reported_and_gets_403() -> None:
    """Behind a mount of files, a WebSocket gets the 403 of the router and a line in the log, not an AssertionError."""
    app = FastAPI()
    app.add_api_websocket_route("/ws", endpoint)
    app.mount("/", StaticFiles(directory=Path(__file__).parent))
    app.add_api_websocket_route("/late", endpoint)
    heard = watched(app)
    for path in ("/wss", "/late"):
        server = await knock(app, path)
        assert [message["type"] for message in server.taken] == ["websocket.close"]
    first, second = heard.of("no_websocket_route")
    assert first.fields == {"path": "/wss", "known": "/late, /ws", "taken_by": "the mount at /"}
    assert second.fields["advice"] == "the WebSocket route /late comes after the mount at /: put the mount last"


async def test_unmatched_path_in_mounted_app_is_reported() -> None:
    """A path below a mounted app is told by the manager of the app around it."""
    app = make_app()
    heard = watched(app)
    server = await knock(app, "/sub/no")
    assert [message["type"] for message in server.taken] == ["websocket.close"]
    (report,) = heard.of("no_websocket_route")
    assert (report.fields["path"], report.fields["taken_by"]) == ("/sub/no", "the mount at /sub")


async def test_mounted_app_with_manager_reports_its_own_path() -> None:
    """One line is written, by the manager of the mounted app."""
    app, sub = FastAPI(), FastAPI()
    app.mount("/sub", sub)
    outer, inner = watched(app), watched(sub)
    await knock(app, "/sub/no")
    assert (len(outer.all), len(inner.all)) == (0, 1)


async def test_served_paths_are_not_reported() -> None:
    """Routes, those of mounted apps and of apps that show no routes are left alone, and requests too."""
    served: list[str] = []

    async def serves(websocket: WebSocket) -> None:
        served.append(websocket.scope["path"])
        await websocket.close()

    async def other_app(scope: Any, receive: Any, send: Any) -> None:
        served.append(scope["path"])
        await send({"type": "websocket.close", "code": 1000})

    app, sub, router = FastAPI(), FastAPI(), APIRouter()
    app.add_api_websocket_route("/ws", serves)
    sub.add_api_websocket_route("/deep", serves)
    router.add_api_websocket_route("/{room}", serves)
    app.include_router(router, prefix="/rooms")
    app.mount("/sub", sub)
    app.mount("/socket.io", other_app)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent))
    heard = watched(app)
    paths = ["/ws", "/sub/deep", "/rooms/lobby", "/socket.io/5"]
    for path in paths:
        await knock(app, path)
    assert served == paths
    assert heard.all == []


async def test_root_path_is_ignored_when_matching_routes() -> None:
    """Where a proxy or a server has put a path before those of the app, that does not count."""
    app = FastAPI()
    app.mount("/", StaticFiles(directory=Path(__file__).parent))
    heard = watched(app)
    server = FakeServer("/api/ws", root_path="/api")
    await app(server.websocket.scope, server.receive, server.send)
    assert heard.of("no_websocket_route")[0].fields["taken_by"] == "the mount at /"
