"""Tests of how the doctor finds `BackgroundTasks` that FastAPI never runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, WebSocket
from starlette.testclient import TestClient

from fastapi_ws_stabilizer import StableSocketDep
from fastapi_ws_stabilizer.doctor.background_tasks import routes_with_background_tasks


async def with_tasks(ws: StableSocketDep, tasks: BackgroundTasks) -> None:
    """Takes them itself."""


async def by_hand(websocket: WebSocket, tasks: BackgroundTasks) -> None:
    """Takes them beside a WebSocket."""


def audit(tasks: BackgroundTasks) -> None:
    """A dependency that takes them."""


def audited(_: None = Depends(audit)) -> None:
    """A dependency that needs one which takes them."""


async def with_dependency(ws: StableSocketDep, _: None = Depends(audited)) -> None:
    """Takes them in a dependency."""


async def without(ws: StableSocketDep) -> None:
    """Takes none."""


@pytest.mark.parametrize("endpoint", [with_tasks, by_hand, with_dependency])
@pytest.mark.parametrize("included", [False, True], ids=["app", "router"])
def test_socket_with_background_tasks_is_found(endpoint: Any, included: bool) -> None:
    """A WebSocket route is found whose endpoint or dependency takes `BackgroundTasks`, also on a router."""
    app, router = FastAPI(), APIRouter()
    (router if included else app).add_api_websocket_route("/ws", endpoint)
    app.include_router(router)
    assert routes_with_background_tasks(app) == ("/ws",)


def test_route_without_background_tasks_is_not_found() -> None:
    """Sockets without them are not found, nor are HTTP routes with them, nor is anything without an app."""
    app = FastAPI()
    app.add_api_websocket_route("/ws", without)

    @app.post("/mail")
    def mail(tasks: BackgroundTasks) -> None: ...

    assert routes_with_background_tasks(app) == routes_with_background_tasks(None) == ()


def test_start_warns_about_background_tasks_once(manager_with: Any) -> None:
    """A starting manager names the route, and says what to write instead."""
    own, heard = manager_with()
    app = FastAPI(lifespan=own.lifespan)
    app.add_api_websocket_route("/ws", with_tasks)
    for _ in range(2):
        with TestClient(app):
            assert "D23" in {finding.code for finding in own.check()}
    (report,) = [report for report in heard.of("doctor_finding") if report.fields["code"] == "D23"]
    assert report.level == logging.WARNING
    assert "/ws takes BackgroundTasks" in report.fields["problem"]
    assert "ws.create_task(" in report.fields["advice"]
