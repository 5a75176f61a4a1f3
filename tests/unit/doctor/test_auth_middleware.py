"""Tests of how the doctor sees that HTTP middleware looks like a login, and that a socket beside it is open."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import APIRouter, Cookie, Depends, FastAPI, Header, HTTPException, Query, Request, WebSocket, status
from fastapi.security import HTTPBearer
from starlette.endpoints import WebSocketEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, WebSocketRoute
from starlette.testclient import TestClient

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConnectionManager
from fastapi_ws_stabilizer.auth import Credential, bearer
from fastapi_ws_stabilizer.doctor.auth_middleware import unguarded_routes

manager = WebSocketConnectionManager()


# ── middleware ──


class CheckToken(BaseHTTPMiddleware):
    """Is one by its name."""

    async def dispatch(self, request: Request, call_next: Callable[..., Any]) -> Response:
        return await call_next(request)


class Gate(BaseHTTPMiddleware):
    """Is one by what a method of it answers."""

    async def dispatch(self, request: Request, call_next: Callable[..., Any]) -> Response:
        return self._refusal() if "x-user" not in request.headers else await call_next(request)

    def _refusal(self) -> Response:
        return PlainTextResponse("who are you?", 401)


class Latch(Gate):
    """Is one by what it inherits."""


class Timing(BaseHTTPMiddleware):
    """Is none, though its documentation speaks of authorization and of 401."""

    async def dispatch(self, request: Request, call_next: Callable[..., Any]) -> Response:
        """Authorization is somebody else's: no 401 comes from here."""
        return await call_next(request)


class AuthInAsgi:
    """Speaks ASGI, and may look at sockets too."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


async def require_login(request: Request, call_next: Callable[..., Any]) -> Response:
    """By its name."""
    return await call_next(request)


async def api_key(request: Request, call_next: Callable[..., Any]) -> Response:
    """By its name, whatever stands between the words."""
    return await call_next(request)


async def looks_at_the_header(request: Request, call_next: Callable[..., Any]) -> Response:
    """By the header that it reads."""
    return await call_next(request) if request.headers.get("Authorization") else PlainTextResponse("no")


async def answers_by_name(request: Request, call_next: Callable[..., Any]) -> Response:
    """By the name of a status."""
    return PlainTextResponse("no", status.HTTP_403_FORBIDDEN)


async def answers_one_of_two(request: Request, call_next: Callable[..., Any]) -> Response:
    """By a status in a tuple, in a function of its own."""

    async def inner() -> bool:
        return (await call_next(request)).status_code in (401, 500)

    return PlainTextResponse(str(await inner()))


async def timing(request: Request, call_next: Callable[..., Any]) -> Response:
    """Is none."""
    response = await call_next(request)
    response.headers["x-time"] = "404"
    return response


def by_function(dispatch: Callable[..., Any]) -> Middleware:
    """What `@app.middleware("http")` adds."""
    return Middleware(BaseHTTPMiddleware, dispatch=dispatch)


def app_with(*middleware: Middleware, endpoint: Any = None) -> FastAPI:
    """An app with middleware and one socket."""
    app = FastAPI(middleware=list(middleware))
    app.add_api_websocket_route("/ws", stable if endpoint is None else endpoint)
    return app


async def stable(ws: StableSocketDep) -> None:
    """Takes everybody."""


LOGINS = [
    *((Middleware(kind), kind.__name__) for kind in (CheckToken, Gate, Latch)),
    *((by_function(one), one.__name__) for one in (require_login, api_key, looks_at_the_header, answers_by_name)),
    (by_function(answers_one_of_two), "answers_one_of_two"),
    (by_function(functools.partial(functools.partial(looks_at_the_header))), "looks_at_the_header"),
    (Middleware(BaseHTTPMiddleware, answers_by_name), "answers_by_name"),
]


@pytest.mark.parametrize(("middleware", "name"), LOGINS, ids=[name for _, name in LOGINS])
def test_login_middleware_is_recognised(middleware: Middleware, name: str) -> None:
    """By its name, by the header that it reads, or by the status that it answers."""
    assert unguarded_routes(app_with(middleware)) == ((name,), ("/ws",))


@pytest.mark.parametrize(
    "middleware",
    [
        Middleware(Timing),
        by_function(timing),
        Middleware(BaseHTTPMiddleware, timing),
        *map(Middleware, (AuthInAsgi, GZipMiddleware)),
    ],
    ids=["Timing", "timing", "timing by place", "AuthInAsgi", "GZipMiddleware"],
)
def test_other_middleware_is_not_recognised(middleware: Middleware) -> None:
    """What only measures, and what speaks ASGI itself, is no login that leaves sockets out."""
    assert unguarded_routes(app_with(middleware)) == ((), ())


def test_http_middleware_decorator_is_recognised() -> None:
    """`@app.middleware("http")` makes the same middleware."""
    app = app_with()
    app.middleware("http")(require_login)
    assert unguarded_routes(app) == (("require_login",), ("/ws",))


@pytest.mark.parametrize("app", [None, object(), FastAPI(), app_with()])
def test_app_without_login_has_no_finding(app: Any) -> None:
    """Whoever has no login for HTTP needs none for sockets."""
    assert unguarded_routes(app) == ((), ())


# ── routes ──


def user(session: str = Cookie("")) -> str:
    """Who it is."""
    if not session:
        raise HTTPException(401)
    return session


def anybody() -> str:
    """An identity that lets everybody in: that is for its author to know."""
    return "ann"


async def raw(websocket: WebSocket) -> None:
    """Takes everybody, by itself."""
    await websocket.accept()


async def named(ws: Any = Depends(manager.socket)) -> None:
    """Names its manager, and takes everybody."""


async def identified(ws: Any = Depends(manager.socket_for(user))) -> None:
    """Has its client id from a dependency."""


async def identified_as_anybody(ws: Any = Depends(manager.socket_for(anybody))) -> None:
    """Has its client id from a dependency that asks nothing."""


async def with_dependency(ws: StableSocketDep, who: str = Depends(user)) -> None:
    """Looks somebody up."""


async def with_credential(ws: StableSocketDep, who: str = Depends(Credential(bearer()))) -> None:
    """Wants a credential."""


async def by_hand(ws: StableSocketDep) -> None:
    """Looks for itself."""
    if "session" not in ws.cookies:
        await ws.close(4401)


async def raw_by_hand(websocket: WebSocket) -> None:
    """Looks for itself, without the library."""
    if not websocket.headers.get("authorization"):
        raise HTTPException(status.HTTP_401_UNAUTHORIZED)


class Reader(WebSocketEndpoint):
    """A class of Starlette that takes everybody."""


class Guard(WebSocketEndpoint):
    """A class of Starlette that does not."""

    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.close(status.WS_1008_POLICY_VIOLATION)


def read_database(fails: bool = False) -> Iterator[str]:
    """Opens something, looks at a parameter, and hands on what goes wrong."""
    try:
        yield "database"
    except ValueError:
        raise


def find_pool(connection: HTTPConnection) -> object:
    """Looks at the connection, but not at who has made it."""
    return connection.app.state


def ensure_ready() -> None:
    """May refuse, but everybody or nobody."""
    if not manager:
        raise RuntimeError("not ready")


async def with_database(ws: StableSocketDep, database: str = Depends(read_database)) -> None:
    """Opens a database."""


async def with_pool(ws: StableSocketDep, pool: Any = Depends(find_pool)) -> None:
    """Takes a pool of the app."""


async def with_readiness(ws: StableSocketDep, _: None = Depends(ensure_ready)) -> None:
    """Is not there yet."""


async def with_both(ws: StableSocketDep, pool: Any = Depends(find_pool), _: None = Depends(ensure_ready)) -> None:
    """One looks, another may refuse: neither does both."""


@pytest.mark.parametrize("endpoint", [with_database, with_pool, with_readiness, with_both])
def test_dependency_without_check_is_no_guard(endpoint: Any) -> None:
    """One is an identity if it looks at who comes and can refuse, not by being there."""
    assert unguarded_routes(app_with(Middleware(CheckToken), endpoint=endpoint)) == (("CheckToken",), ("/ws",))


def by_header(authorization: str = Header("")) -> str:
    """Hands on what stands there."""
    return authorization


def above(found: str = Depends(by_header)) -> str:
    """Refuses by what another has found."""
    if found != "good":
        raise KeyError(found)
    return found


def by_name(token: str = Query("")) -> Any:
    """Leaves the refusal to somebody else, but says what it is about."""
    return manager.verify_jwt(token)  # type: ignore[attr-defined]


class Guardian:
    """An object that is a dependency."""

    def __call__(self, websocket: WebSocket) -> None:
        if "x" not in websocket.cookies:
            raise PermissionError


Guardian.__call__.__annotations__ = {"websocket": WebSocket}  # older FastAPI cannot read those of this module there


def nested(_: Any = Depends(user)) -> None:
    """Is one by what is beneath it."""


@pytest.mark.parametrize(
    "dependency",
    [user, above, by_name, Guardian(), nested, functools.partial(user), HTTPBearer(), Credential(bearer())],
    ids=["user", "above", "by_name", "Guardian", "nested", "partial", "HTTPBearer", "Credential"],
)
def test_dependency_that_checks_and_rejects_is_guard(dependency: Any) -> None:
    """By itself or with what is beneath it, however it refuses; beside the socket, or before all of a router."""

    async def beside(ws: StableSocketDep, who: Any = Depends(dependency)) -> None: ...

    beside.__annotations__ = {"ws": StableSocketDep, "who": Any}  # those of this module are texts
    app = app_with(Middleware(CheckToken), endpoint=beside)
    app.add_api_websocket_route("/before", stable, dependencies=[Depends(dependency)])
    router = APIRouter()
    router.add_api_websocket_route("/included", stable)
    app.include_router(router, dependencies=[Depends(dependency)])
    assert unguarded_routes(app) == ((), ())


def test_router_inclusion_dependencies_are_inspected() -> None:
    """A database that is opened for all routes of a router guards none of them."""
    app, router, outer = FastAPI(middleware=[Middleware(CheckToken)]), APIRouter(), APIRouter()
    router.add_api_websocket_route("/ws", stable)
    outer.include_router(router, prefix="/b", dependencies=[Depends(read_database)])
    app.include_router(outer, prefix="/a", dependencies=[Depends(find_pool)])
    assert unguarded_routes(app) == (("CheckToken",), ("/a/b/ws",))


@pytest.mark.parametrize("endpoint", [stable, raw, named])
def test_unauthenticated_route_is_found(endpoint: Any) -> None:
    """Our sockets take a client at its word, and Starlette's are given to everybody."""
    assert unguarded_routes(app_with(Middleware(CheckToken), endpoint=endpoint)) == (("CheckToken",), ("/ws",))


@pytest.mark.parametrize(
    "endpoint", [identified, identified_as_anybody, with_dependency, with_credential, by_hand, raw_by_hand]
)
def test_authenticated_route_is_not_found(endpoint: Any) -> None:
    """With `socket_for`, with another dependency that does, or with code that refuses somebody."""
    assert unguarded_routes(app_with(Middleware(CheckToken), endpoint=endpoint)) == ((), ())


def test_route_router_and_inclusion_dependencies_count() -> None:
    """Wherever FastAPI takes `dependencies=`, they run for sockets too."""
    app = FastAPI(middleware=[Middleware(CheckToken)])
    app.add_api_websocket_route("/route", stable, dependencies=[Depends(user)])
    router, included, bare = APIRouter(dependencies=[Depends(user)]), APIRouter(), APIRouter()
    router.add_api_websocket_route("/router", stable)
    included.add_api_websocket_route("/included", stable)
    bare.add_api_websocket_route("/bare", stable)
    app.include_router(router)
    app.include_router(included, dependencies=[Depends(user)])
    app.include_router(bare, prefix="/v1")
    assert unguarded_routes(app) == (("CheckToken",), ("/v1/bare",))


def test_app_dependencies_count() -> None:
    """They run before every route, those of included routers too."""
    app, router = FastAPI(middleware=[Middleware(CheckToken)], dependencies=[Depends(user)]), APIRouter()
    router.add_api_websocket_route("/included", stable)
    app.add_api_websocket_route("/ws", stable)
    app.include_router(router)
    assert unguarded_routes(app) == ((), ())


def test_starlette_and_mounted_routes_are_inspected() -> None:
    """Middleware stands before what is mounted; that of a mounted app before its own routes alone."""
    app = FastAPI()
    app.add_api_websocket_route("/outside", stable)
    inner = app_with(Middleware(Gate))
    inner.router.routes += [WebSocketRoute("/plain", functools.partial(raw)), WebSocketRoute("/class", Reader)]
    inner.router.routes.append(WebSocketRoute("/guard", Guard))
    app.router.routes.append(Mount("/sub", app=inner))
    assert unguarded_routes(app) == (("Gate",), ("/sub/ws", "/sub/plain", "/sub/class"))
    outer = FastAPI(middleware=[Middleware(CheckToken)])
    outer.router.routes.append(Mount("/app", app=app))
    logins, paths = unguarded_routes(outer)
    assert logins == ("CheckToken", "Gate")
    assert paths == ("/app/outside", "/app/sub/ws", "/app/sub/plain", "/app/sub/class")


# ── a manager ──


class Deny(BaseHTTPMiddleware):
    """Lets nobody in, as its author thinks."""

    async def dispatch(self, request: Request, call_next: Callable[..., Any]) -> Response:
        return PlainTextResponse("no", 403)


def test_http_middleware_does_not_block_sockets_and_is_warned(manager_with: Any) -> None:
    """Middleware that denies everything lets every socket in; a start says so, once, as a warning."""
    own, heard = manager_with()
    app = FastAPI(lifespan=own.lifespan, middleware=[Middleware(Deny)])
    app.add_api_websocket_route("/ws/{client_id}", stable)
    for _ in range(2):
        with TestClient(app) as client:
            assert client.get("/").status_code == 403
            with client.websocket_connect("/ws/mallory"):
                pass
    (report,) = [report for report in heard.of("doctor_finding") if report.fields["code"] == "D17"]
    assert (report.level, report.fields["severity"]) == (logging.WARNING, "warning")
    assert "Deny" in report.fields["problem"]
    assert "/ws/{client_id}" in report.fields["problem"]
    assert "on_handshake" in report.fields["advice"]


@pytest.mark.parametrize("hook", ["on_handshake", "on_auth"])
def test_handshake_hook_clears_login_finding(manager_with: Any, hook: str) -> None:
    """Who has one has thought of sockets: neither a start nor the command says anything."""
    own, heard = manager_with()
    getattr(own, hook)(lambda ws: None)
    app = FastAPI(lifespan=own.lifespan, middleware=[Middleware(Deny)])
    app.add_api_websocket_route("/ws", stable)
    with TestClient(app):
        assert "D17" not in {finding.code for finding in own.check()}
    assert [report for report in heard.of("doctor_finding") if report.fields["code"] == "D17"] == []


def test_manager_check_finds_unauthenticated_route() -> None:
    """`check` looks at the app, without a server and without a start."""
    own = WebSocketConnectionManager()
    found = own.check(app_with(Middleware(Deny)))
    assert [finding.code for finding in found if finding.code == "D17"] == ["D17"]
    assert "D17" not in {finding.code for finding in own.check(app_with(Middleware(Deny), endpoint=identified))}
