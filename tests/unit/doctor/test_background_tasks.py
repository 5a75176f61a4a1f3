"""Tests of D23: `BackgroundTasks` that FastAPI never runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, WebSocket
from starlette.testclient import TestClient

from fastapi_ws_stabilizer import StableSocketDep
from fastapi_ws_stabilizer.doctor.background_tasks import routes_with_background_tasks


async def with_tasks(ws: StableSocketDep, tasks: BackgroundTasks) -> None:
    """Take background tasks."""


async def raw_with_tasks(websocket: WebSocket, tasks: BackgroundTasks) -> None:
    """Take background tasks beside a WebSocket."""


def audit(tasks: BackgroundTasks) -> None:
    """Take background tasks, as a dependency."""


def audited(_: None = Depends(audit)) -> None:
    """Depend on a dependency that takes them."""


async def with_dependency(ws: StableSocketDep, _: None = Depends(audited)) -> None:
    """Take background tasks in a dependency."""


async def without(ws: StableSocketDep) -> None:
    """Take none."""


@pytest.mark.parametrize("endpoint", [with_tasks, raw_with_tasks, with_dependency])
@pytest.mark.parametrize("included", [False, True], ids=["app", "router"])
def test_socket_with_background_tasks_is_found(endpoint: Any, included: bool) -> None:
    """A WebSocket route is found if its endpoint or a dependency takes `BackgroundTasks`, also on a router."""
    app, router = FastAPI(), APIRouter()
    (router if included else app).add_api_websocket_route("/ws", endpoint)
    app.include_router(router)
    assert routes_with_background_tasks(app) == ("/ws",)


def test_route_without_background_tasks_is_not_found() -> None:
    """Sockets without background tasks, HTTP routes with them, and a missing app are not found."""
    app = FastAPI()
    app.add_api_websocket_route("/ws", without)

    @app.post("/mail")
    def mail(tasks: BackgroundTasks) -> None: ...

    assert routes_with_background_tasks(app) == routes_with_background_tasks(None) == ()


def test_start_warns_about_background_tasks_once(manager_with: Any) -> None:
    """A start warns once about the route, with what to write instead."""
    own, heard = manager_with()
    app = FastAPI(lifespan=own.lifespan)
    app.add_api_websocket_route("/ws", with_tasks)
    for _ in range(2):
        with TestClient(app):
            assert "D23" in {finding.code for finding in own.check()}
    (event,) = [event for event in heard.of("doctor_finding") if event.fields["code"] == "D23"]
    assert event.level == logging.WARNING
    assert "/ws takes BackgroundTasks" in event.fields["problem"]
    assert "ws.create_task(" in event.fields["advice"]
