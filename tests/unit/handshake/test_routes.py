"""Tests of the WebSocket routes that a path reaches, and of shadowed routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles

from fastapi_ws_stabilizer.handshake.routes import entries_for_path, shadowed_routes
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager

HERE = Path(__file__).parent


async def endpoint(websocket: WebSocket) -> None:
    """Do nothing, as an endpoint."""


async def other_app(scope: Any, receive: Any, send: Any) -> None:
    """Do nothing, as an app without visible routes."""


def page() -> str:
    """Return a page."""
    return "page"


def files() -> StaticFiles:
    """Return an app that serves files."""
    return StaticFiles(directory=HERE)


def socket(path: str) -> WebSocketRoute:
    """Return a WebSocket route."""
    return WebSocketRoute(path, endpoint)


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ([Mount("/", files()), socket("/ws")], (("/ws", "the mount at /"),)),
        ([Mount("", files()), socket("/ws/{client_id}")], (("/ws/{client_id}", "the mount at /"),)),
        ([Mount("/", other_app), socket("/ws")], (("/ws", "the mount at /"),)),
        ([Mount("/", Starlette()), socket("/ws")], (("/ws", "the mount at /"),)),
        ([Mount("/ws", files()), socket("/ws/{n:int}")], (("/ws/{n:int}", "the mount at /ws"),)),
        ([Mount("/a/{b}", files()), socket("/a/{c}/d")], (("/a/{c}/d", "the mount at /a/{b}"),)),
        ([socket("/ws/{client_id}"), socket("/ws/me")], (("/ws/me", "the WebSocket route /ws/{client_id}"),)),
        ([socket("/{rest:path}"), socket("/ws")], (("/ws", "the WebSocket route /{rest:path}"),)),
        ([socket("/ws"), socket("/ws")], (("/ws", "the WebSocket route /ws"),)),
        ([Mount("/", routes=[socket("/in")]), socket("/out")], (("/out", "the mount at /"),)),
        ([Mount("/", files(), middleware=[Middleware(CORSMiddleware)]), socket("/x")], (("/x", "the mount at /"),)),
        ([socket("/ws"), Mount("/", files())], ()),
        ([Mount("/static", files()), socket("/ws")], ()),
        ([Mount("/ws", files()), socket("/wss")], ()),
        ([Route("/{rest:path}", page), socket("/ws")], ()),
        ([socket("/ws/me"), socket("/ws/{client_id}")], ()),
        ([socket("/ws/{n:int}"), socket("/ws/{client_id}")], ()),
        ([Mount("/", routes=[socket("/in")])], ()),
        ([Host("a.example.com", Router([socket("/ws")])), socket("/ws")], ()),
    ],
)
def test_shadowed_websocket_routes_are_found(routes: list[Any], expected: tuple[tuple[str, str], ...]) -> None:
    """A WebSocket route is found with the earlier entry that takes all its paths, and no other route is found."""
    app = FastAPI(openapi_url=None)
    app.router.routes.extend(routes)
    assert shadowed_routes(app) == expected


def test_shadowed_routes_of_router_and_mount_are_found() -> None:
    """The routes of included routers and mounted apps are checked at their position."""
    app, router, sub = FastAPI(), APIRouter(), FastAPI()
    router.add_api_websocket_route("/{room}", endpoint)
    sub.mount("/", files())
    sub.add_api_websocket_route("/deep", endpoint)
    app.include_router(router, prefix="/rooms")
    app.add_api_websocket_route("/rooms/lobby", endpoint)
    app.mount("/sub", sub)
    assert shadowed_routes(app) == (
        ("/rooms/lobby", "the WebSocket route /rooms/{room}"),
        ("/sub/deep", "the mount at /sub"),
    )


def test_doctor_reports_shadowed_route_as_d20() -> None:
    """D20 is an error if files are mounted before a socket, and absent if they are mounted last."""
    manager = WebSocketConnectionManager()
    good, bad = FastAPI(), FastAPI()
    good.add_api_websocket_route("/ws", endpoint)
    for app in (good, bad):
        app.mount("/", files())
    bad.add_api_websocket_route("/ws", endpoint)
    found = {finding.code: finding for finding in manager.check(bad)}
    assert found["D20"].severity == "error"
    assert "/ws is never reached" in found["D20"].problem
    assert "D20" not in {finding.code for finding in manager.check(good)}


@pytest.mark.parametrize("app", [None, object(), FastAPI()])
def test_app_without_websocket_routes_has_no_shadowed_route(app: Any) -> None:
    """An app without visible routes has no shadowed routes."""
    assert shadowed_routes(app) == ()


def test_path_is_matched_by_first_route() -> None:
    """The entry that takes a path is found as the router finds it, with the socket route that it hides."""
    routes = [socket("/ws"), Mount("/api", routes=[socket("/in")]), Mount("/", files()), socket("/late")]

    def names_for(path: str) -> tuple[str | None, str | None]:
        first, behind = entries_for_path(routes, path)
        return (None if first is None else str(first), None if behind is None else str(behind))

    assert names_for("/ws") == ("the WebSocket route /ws", None)
    assert names_for("/api/in") == ("the WebSocket route /api/in", None)
    assert names_for("/api/no") == ("the mount at /api", None)
    assert names_for("/late") == ("the mount at /", "the WebSocket route /late")
    assert entries_for_path(routes[:2], "/no") == (None, None)


def test_handshake_solves_no_dependencies_of_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The route of a path is found by attributes alone: solving the dependencies of routers takes milliseconds."""
    app = FastAPI()
    for number in range(20):
        app.include_router(APIRouter(), prefix=f"/{number}", dependencies=[Depends(lambda: None)])
    monkeypatch.setattr("fastapi_ws_stabilizer.compat.fastapi.APIWebSocketRoute", lambda *_, **__: pytest.fail("made"))
    assert entries_for_path(app.routes, "/ws") == (None, None)
