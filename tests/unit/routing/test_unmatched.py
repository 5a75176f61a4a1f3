"""Tests of saying why a WebSocket handshake got a 403."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.routing import Mount

from fastapi_ws_stabilizer.reports import Reports
from fastapi_ws_stabilizer.routing.unmatched import MAX_TOLD, UnmatchedSockets, websocket_paths
from tests.unit.conftest import Heard
from tests.unit.fake_websocket import FakeServer


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


async def test_a_path_that_nobody_serves_is_told_with_those_that_exist() -> None:
    """The bare 403 gets a warning that names the path and the known ones."""
    app, reports, heard = make_app(), Reports(), Heard()
    reports.subscribe(heard)
    UnmatchedSockets.watch(app, reports)
    server = await knock(app, "/wss/ann")
    assert server.taken[0]["type"] == "websocket.close"
    (report,) = heard.reports
    assert (report.event, report.level) == ("no_websocket_route", logging.WARNING)
    assert report.facts == {"path": "/wss/ann", "known": "/router/inner, /sub/deep, /ws/{client_id}"}


async def test_each_path_is_told_once_and_only_so_many() -> None:
    """A scanner does not fill the log."""
    app, reports, heard = FastAPI(), Reports(), Heard()
    reports.subscribe(heard)
    UnmatchedSockets.watch(app, reports)
    for number in range(3 * MAX_TOLD):
        await knock(app, f"/{number}")
        await knock(app, f"/{number}")
    assert len(heard.reports) == MAX_TOLD
    assert heard.reports[0].facts["known"] == "none"


async def test_a_request_that_is_no_websocket_is_not_told() -> None:
    """A 404 of HTTP is no business of ours."""
    app, reports, heard = FastAPI(), Reports(), Heard()
    reports.subscribe(heard)
    UnmatchedSockets.watch(app, reports)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    await app({"type": "http", "method": "GET", "path": "/x", "headers": [], "query_string": b""}, receive, send)
    assert sent[0]["status"] == 404
    assert heard.reports == []


def test_an_app_is_watched_once() -> None:
    """Attaching a manager again puts no second watch before the first."""
    app, reports = FastAPI(), Reports()
    UnmatchedSockets.watch(app, reports)
    first = app.router.default
    UnmatchedSockets.watch(app, reports)
    assert app.router.default is first


@pytest.mark.parametrize(
    "app", [SimpleNamespace(), SimpleNamespace(router=None), SimpleNamespace(router=SimpleNamespace())]
)
def test_an_app_of_another_kind_is_left_alone(app: Any) -> None:
    """Where there is no router with a default, nothing is watched and nothing fails."""
    before = vars(app).copy()
    UnmatchedSockets.watch(app, Reports())
    assert vars(app) == before
