"""Tests of how the doctor sees that somebody is asked who it is before there is a door to hear the refusal."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Cookie, Depends, FastAPI, HTTPException
from starlette.routing import Mount
from starlette.testclient import TestClient

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConnectionManager
from fastapi_ws_stabilizer.auth import Credential, bearer, first_message
from fastapi_ws_stabilizer.doctor.dependency_order import routes_with_early_identity
from tests.support.fake_websocket import FakeServer, with_deadline

manager = WebSocketConnectionManager()
find = Credential(bearer(), first_message())


def get_database() -> str:
    """Asks nobody anything."""
    return "database"


def current_user(token: Annotated[str, Depends(find)], database: Annotated[str, Depends(get_database)]) -> str:
    """Who it is."""
    if token != "good":
        raise HTTPException(401, "log in again")
    return "ann"


def admin(user: Annotated[str, Depends(current_user)]) -> str:
    """Who it is, if that is somebody."""
    return user


Socket = Depends(manager.socket_for(current_user))


def through(ws: Any = Socket) -> Any:
    """A dependency with the socket in it."""
    return ws


async def before(me: str = Depends(current_user), ws: Any = Socket) -> None:
    """Asks first, and finds the socket then."""


async def before_by_another(me: str = Depends(admin), ws: Any = Depends(through)) -> None:
    """Asks first by what is above the identity; the socket is beneath something, too."""


async def before_by_its_part(token: str = Depends(find), ws: Any = Socket) -> None:
    """Looks first for the credential that the identity wants."""


async def after(ws: Any = Socket, me: str = Depends(current_user), token: str = Depends(find)) -> None:
    """Finds the socket first."""


async def only(ws: Any = Socket) -> None:
    """Has its identity from the socket."""


async def beside_a_database(database: str = Depends(get_database), ws: Any = Socket) -> None:
    """Opens first what the identity needs too."""


async def another(session: str = Cookie(""), ws: Any = Socket) -> None:
    """Looks at something else."""


async def unnamed(ws: StableSocketDep, me: str = Depends(current_user)) -> None:
    """Is a socket that takes everybody, and asks by itself."""


def app_with(endpoint: Any, **options: Any) -> FastAPI:
    """An app with one socket."""
    app = FastAPI(**options)
    app.add_api_websocket_route("/ws", endpoint)
    return app


@pytest.mark.parametrize("endpoint", [before, before_by_another, before_by_its_part])
def test_identity_before_socket_is_found(endpoint: Any) -> None:
    """Itself, what is above it, or the part of it that asks."""
    assert routes_with_early_identity(app_with(endpoint)) == ("/ws",)


@pytest.mark.parametrize("endpoint", [after, only, beside_a_database, another, unnamed])
def test_other_dependency_orders_are_not_found(endpoint: Any) -> None:
    """Behind the socket all is well, and what is no identity may stand before it."""
    assert routes_with_early_identity(app_with(endpoint)) == ()


@pytest.mark.parametrize("app", [None, object(), FastAPI()])
def test_app_without_sockets_has_no_finding(app: Any) -> None:
    """No app, or none of ours, is no mistake."""
    assert routes_with_early_identity(app) == ()


@pytest.mark.parametrize("dependency", [current_user, admin, find])
def test_dependencies_argument_runs_before_socket(dependency: Any) -> None:
    """Wherever FastAPI takes `dependencies=`, they run before the endpoint's own, the socket among them."""
    early = [Depends(dependency)]
    app, included, deep, outer = FastAPI(), APIRouter(), APIRouter(), APIRouter()
    router = APIRouter(dependencies=early)
    app.add_api_websocket_route("/route", only, dependencies=early)
    app.add_api_websocket_route("/good", only, dependencies=[Depends(get_database)])
    for one in (router, included, deep):
        one.add_api_websocket_route("/ws", only)
    app.include_router(router, prefix="/router")
    app.include_router(included, prefix="/included", dependencies=early)
    outer.include_router(deep, prefix="/deep")
    app.include_router(outer, prefix="/outer", dependencies=early)
    app.router.routes.append(Mount("/sub", app=app_with(only, dependencies=early)))
    expected = ("/route", "/router/ws", "/included/ws", "/outer/deep/ws", "/sub/ws")
    assert routes_with_early_identity(app) == expected


BROWSER = [(b"host", b"a.example"), (b"origin", b"https://a.example")]


async def told(endpoint: Any) -> list[int]:
    """The codes with which a browser without a credential is closed; none if it is answered by HTTP."""
    app = app_with(endpoint)
    manager.install(app)
    server = FakeServer(headers=BROWSER)
    await with_deadline(asyncio.ensure_future(app(server.websocket.scope, server.receive, server.send)))
    return [code for code, _ in server.close_frames]


async def test_browser_reads_rejection_only_behind_socket() -> None:
    """Behind the socket a browser reads why it is refused; before it, it gets an HTTP status that it cannot read."""
    assert await told(after) == [4401]
    counted = dict(manager.counters.refusals)
    assert counted == {"4401": 1}
    assert await told(before) == []
    assert manager.counters.refusals == counted


def test_start_warns_about_early_identity_once(manager_with: Any) -> None:
    """As a warning that names the route and says what to do; the command finds it too."""
    own, heard = manager_with()

    async def endpoint(me: Any, ws: Any) -> None: ...

    endpoint.__annotations__ = {
        "me": Annotated[str, Depends(current_user)],
        "ws": Annotated[Any, Depends(own.socket_for(current_user))],
    }
    app = app_with(endpoint, lifespan=own.lifespan)
    for _ in range(2):
        with TestClient(app):
            assert "D19" in {finding.code for finding in own.check()}
    (report,) = [report for report in heard.of("doctor_finding") if report.fields["code"] == "D19"]
    assert report.level == logging.WARNING
    assert "/ws" in report.fields["problem"]
    assert "first" in report.fields["advice"]
