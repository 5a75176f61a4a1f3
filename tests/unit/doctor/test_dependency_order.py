"""Tests of D19: an identity dependency that runs before the socket dependency."""

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
    """Return a database, without a check."""
    return "database"


def current_user(token: Annotated[str, Depends(find)], database: Annotated[str, Depends(get_database)]) -> str:
    """Return the user of a credential, or reject the client."""
    if token != "good":
        raise HTTPException(401, "log in again")
    return "ann"


def admin(user: Annotated[str, Depends(current_user)]) -> str:
    """Return the user, as a second dependency."""
    return user


Socket = Depends(manager.socket_for(current_user))


def through(ws: Any = Socket) -> Any:
    """Depend on the socket."""
    return ws


async def before(me: str = Depends(current_user), ws: Any = Socket) -> None:
    """Take the identity, then the socket."""


async def before_by_another(me: str = Depends(admin), ws: Any = Depends(through)) -> None:
    """Take a dependency of the identity first, and the socket by another dependency."""


async def before_by_its_part(token: str = Depends(find), ws: Any = Socket) -> None:
    """Take the credential of the identity first."""


async def after(ws: Any = Socket, me: str = Depends(current_user), token: str = Depends(find)) -> None:
    """Take the socket first."""


async def only(ws: Any = Socket) -> None:
    """Take the socket only."""


async def beside_a_database(database: str = Depends(get_database), ws: Any = Socket) -> None:
    """Take a database first, which the identity needs too."""


async def another(session: str = Cookie(""), ws: Any = Socket) -> None:
    """Take a cookie first."""


async def unnamed(ws: StableSocketDep, me: str = Depends(current_user)) -> None:
    """Take a socket without an identity, then the user."""


def app_with(endpoint: Any, **options: Any) -> FastAPI:
    """Return an app with one socket."""
    app = FastAPI(**options)
    app.add_api_websocket_route("/ws", endpoint)
    return app


@pytest.mark.parametrize("endpoint", [before, before_by_another, before_by_its_part])
def test_identity_before_socket_is_found(endpoint: Any) -> None:
    """The identity, a dependency on it, and its credential are found before the socket."""
    assert routes_with_early_identity(app_with(endpoint)) == ("/ws",)


@pytest.mark.parametrize("endpoint", [after, only, beside_a_database, another, unnamed])
def test_other_dependency_orders_are_not_found(endpoint: Any) -> None:
    """A dependency after the socket, or one that is no identity, is not found."""
    assert routes_with_early_identity(app_with(endpoint)) == ()


@pytest.mark.parametrize("app", [None, object(), FastAPI()])
def test_app_without_sockets_has_no_finding(app: Any) -> None:
    """An app without sockets of the library has no finding."""
    assert routes_with_early_identity(app) == ()


@pytest.mark.parametrize("dependency", [current_user, admin, find])
def test_dependencies_argument_runs_before_socket(dependency: Any) -> None:
    """`dependencies=` of routes, routers and mounts run before the socket of the endpoint."""
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


async def close_codes(endpoint: Any) -> list[int]:
    """Return the close codes for a browser without a credential; none if the answer is an HTTP status."""
    app = app_with(endpoint)
    manager.install(app)
    server = FakeServer(headers=BROWSER)
    await with_deadline(asyncio.ensure_future(app(server.websocket.scope, server.receive, server.send)))
    return [code for code, _ in server.close_frames]


async def test_browser_reads_rejection_only_behind_socket() -> None:
    """A browser can read a rejection after the socket dependency, but not the HTTP status before it."""
    assert await close_codes(after) == [4401]
    counted = dict(manager.counters.refusals)
    assert counted == {"4401": 1}
    assert await close_codes(before) == []
    assert manager.counters.refusals == counted


def test_start_warns_about_early_identity_once(manager_with: Any) -> None:
    """A start warns once about the route, with what to do, and `check` finds it too."""
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
    (event,) = [event for event in heard.of("doctor_finding") if event.fields["code"] == "D19"]
    assert event.level == logging.WARNING
    assert "/ws" in event.fields["problem"]
    assert "first" in event.fields["advice"]
