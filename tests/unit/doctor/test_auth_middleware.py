"""Tests of D17: HTTP middleware that looks like a login beside WebSocket routes without authentication."""

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
    """Login by its name."""

    async def dispatch(self, request: Request, call_next: Callable[..., Any]) -> Response:
        return await call_next(request)


class Gate(BaseHTTPMiddleware):
    """Login by the status that one of its methods answers."""

    async def dispatch(self, request: Request, call_next: Callable[..., Any]) -> Response:
        return self._refusal() if "x-user" not in request.headers else await call_next(request)

    def _refusal(self) -> Response:
        return PlainTextResponse("no user", 401)


class Latch(Gate):
    """Login by inheritance."""


class Timing(BaseHTTPMiddleware):
    """No login, though a docstring mentions authorization and 401."""

    async def dispatch(self, request: Request, call_next: Callable[..., Any]) -> Response:
        """Pass each request on; authorization is not checked, and no 401 is answered."""
        return await call_next(request)


class AuthInAsgi:
    """ASGI middleware, which may check sockets too."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


async def require_login(request: Request, call_next: Callable[..., Any]) -> Response:
    """Pass on; a login by name."""
    return await call_next(request)


async def api_key(request: Request, call_next: Callable[..., Any]) -> Response:
    """Pass on; a login by name, with an underscore between the words."""
    return await call_next(request)


async def read_header(request: Request, call_next: Callable[..., Any]) -> Response:
    """Answer by the header; a login by the header that it reads."""
    return await call_next(request) if request.headers.get("Authorization") else PlainTextResponse("no")


async def answer_constant(request: Request, call_next: Callable[..., Any]) -> Response:
    """Answer 403; a login by the name of the status."""
    return PlainTextResponse("no", status.HTTP_403_FORBIDDEN)


async def compare_status(request: Request, call_next: Callable[..., Any]) -> Response:
    """Compare a status; a login by a status in a tuple of an inner function."""

    async def inner() -> bool:
        return (await call_next(request)).status_code in (401, 500)

    return PlainTextResponse(str(await inner()))


async def timing(request: Request, call_next: Callable[..., Any]) -> Response:
    """Measure; no login."""
    response = await call_next(request)
    response.headers["x-time"] = "404"
    return response


def by_function(dispatch: Callable[..., Any]) -> Middleware:
    """Return the middleware that `@app.middleware("http")` adds."""
    return Middleware(BaseHTTPMiddleware, dispatch=dispatch)


def app_with(*middleware: Middleware, endpoint: Any = None) -> FastAPI:
    """Return an app with middleware and one socket."""
    app = FastAPI(middleware=list(middleware))
    app.add_api_websocket_route("/ws", stable if endpoint is None else endpoint)
    return app


async def stable(ws: StableSocketDep) -> None:
    """Accept each client."""


LOGINS = [
    *((Middleware(kind), kind.__name__) for kind in (CheckToken, Gate, Latch)),
    *((by_function(one), one.__name__) for one in (require_login, api_key, read_header, answer_constant)),
    (by_function(compare_status), "compare_status"),
    (by_function(functools.partial(functools.partial(read_header))), "read_header"),
    (Middleware(BaseHTTPMiddleware, answer_constant), "answer_constant"),
]


@pytest.mark.parametrize(("middleware", "name"), LOGINS, ids=[name for _, name in LOGINS])
def test_login_middleware_is_recognised(middleware: Middleware, name: str) -> None:
    """A login is recognised by its name, by the header that it reads, or by the status that it answers."""
    assert unguarded_routes(app_with(middleware)) == ((name,), ("/ws",))


@pytest.mark.parametrize(
    "middleware",
    [
        Middleware(Timing),
        by_function(timing),
        Middleware(BaseHTTPMiddleware, timing),
        *map(Middleware, (AuthInAsgi, GZipMiddleware)),
    ],
    ids=["Timing", "timing", "timing by position", "AuthInAsgi", "GZipMiddleware"],
)
def test_other_middleware_is_not_recognised(middleware: Middleware) -> None:
    """Middleware without such a sign, and ASGI middleware, is no login."""
    assert unguarded_routes(app_with(middleware)) == ((), ())


def test_http_middleware_decorator_is_recognised() -> None:
    """Middleware of `@app.middleware("http")` is recognised as well."""
    app = app_with()
    app.middleware("http")(require_login)
    assert unguarded_routes(app) == (("require_login",), ("/ws",))


@pytest.mark.parametrize("app", [None, object(), FastAPI(), app_with()])
def test_app_without_login_has_no_finding(app: Any) -> None:
    """An app without a login for HTTP has no finding."""
    assert unguarded_routes(app) == ((), ())


# ── routes ──


def user(session: str = Cookie("")) -> str:
    """Return the user of a session cookie, or reject the client."""
    if not session:
        raise HTTPException(401)
    return session


def fixed_user() -> str:
    """Return a fixed identity, which the doctor does not question."""
    return "ann"


async def raw(websocket: WebSocket) -> None:
    """Accept each client, without the library."""
    await websocket.accept()


async def named(ws: Any = Depends(manager.socket)) -> None:
    """Accept each client, by the dependency of a manager."""


async def identified(ws: Any = Depends(manager.socket_for(user))) -> None:
    """Take the client id from a dependency."""


async def identified_as_fixed_user(ws: Any = Depends(manager.socket_for(fixed_user))) -> None:
    """Take the client id from a dependency without a check."""


async def with_dependency(ws: StableSocketDep, user_id: str = Depends(user)) -> None:
    """Take a user from a dependency."""


async def with_credential(ws: StableSocketDep, user_id: str = Depends(Credential(bearer()))) -> None:
    """Take a credential."""


async def with_own_code(ws: StableSocketDep) -> None:
    """Reject clients without a cookie."""
    if "session" not in ws.cookies:
        await ws.close(4401)


async def raw_with_own_code(websocket: WebSocket) -> None:
    """Reject clients without a header, without the library."""
    if not websocket.headers.get("authorization"):
        raise HTTPException(status.HTTP_401_UNAUTHORIZED)


class Reader(WebSocketEndpoint):
    """Endpoint class of Starlette that accepts each client."""


class Guard(WebSocketEndpoint):
    """Endpoint class of Starlette that rejects clients."""

    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.close(status.WS_1008_POLICY_VIOLATION)


def read_database(fails: bool = False) -> Iterator[str]:
    """Yield a database, with a parameter, and raise errors again."""
    try:
        yield "database"
    except ValueError:
        raise


def find_pool(connection: HTTPConnection) -> object:
    """Return a pool of the app; it reads the connection, but not its credentials."""
    return connection.app.state


def ensure_ready() -> None:
    """Raise an error for all clients or for none."""
    if not manager:
        raise RuntimeError("not ready")


async def with_database(ws: StableSocketDep, database: str = Depends(read_database)) -> None:
    """Take a database."""


async def with_pool(ws: StableSocketDep, pool: Any = Depends(find_pool)) -> None:
    """Take a pool of the app."""


async def with_readiness(ws: StableSocketDep, _: None = Depends(ensure_ready)) -> None:
    """Take a readiness check."""


async def with_both(ws: StableSocketDep, pool: Any = Depends(find_pool), _: None = Depends(ensure_ready)) -> None:
    """Take one dependency that reads the connection and another that raises."""


@pytest.mark.parametrize("endpoint", [with_database, with_pool, with_readiness, with_both])
def test_dependency_without_check_is_no_guard(endpoint: Any) -> None:
    """A dependency is a guard only if it reads the client's data and can reject it."""
    assert unguarded_routes(app_with(Middleware(CheckToken), endpoint=endpoint)) == (("CheckToken",), ("/ws",))


def by_header(authorization: str = Header("")) -> str:
    """Return a header."""
    return authorization


def above(found: str = Depends(by_header)) -> str:
    """Reject by the value of another dependency."""
    if found != "good":
        raise KeyError(found)
    return found


def by_name(token: str = Query("")) -> Any:
    """Pass a token to another function."""
    return manager.verify_jwt(token)  # type: ignore[attr-defined]


class Guardian:
    """Object that is a dependency."""

    def __call__(self, websocket: WebSocket) -> None:
        if "x" not in websocket.cookies:
            raise PermissionError


Guardian.__call__.__annotations__ = {"websocket": WebSocket}  # older FastAPI cannot read this module's annotations


def nested(_: Any = Depends(user)) -> None:
    """Depend on a guard."""


@pytest.mark.parametrize(
    "dependency",
    [user, above, by_name, Guardian(), nested, functools.partial(user), HTTPBearer(), Credential(bearer())],
    ids=["user", "above", "by_name", "Guardian", "nested", "partial", "HTTPBearer", "Credential"],
)
def test_dependency_that_checks_and_rejects_is_guard(dependency: Any) -> None:
    """A dependency that checks and rejects is a guard, directly or by its own dependencies, on a route or a router."""

    async def beside(ws: StableSocketDep, checked: Any = Depends(dependency)) -> None: ...

    beside.__annotations__ = {"ws": StableSocketDep, "checked": Any}  # annotations of this module are strings
    app = app_with(Middleware(CheckToken), endpoint=beside)
    app.add_api_websocket_route("/before", stable, dependencies=[Depends(dependency)])
    router = APIRouter()
    router.add_api_websocket_route("/included", stable)
    app.include_router(router, dependencies=[Depends(dependency)])
    assert unguarded_routes(app) == ((), ())


def test_router_inclusion_dependencies_are_inspected() -> None:
    """A dependency of a router that opens a database guards none of its routes."""
    app, router, outer = FastAPI(middleware=[Middleware(CheckToken)]), APIRouter(), APIRouter()
    router.add_api_websocket_route("/ws", stable)
    outer.include_router(router, prefix="/b", dependencies=[Depends(read_database)])
    app.include_router(outer, prefix="/a", dependencies=[Depends(find_pool)])
    assert unguarded_routes(app) == (("CheckToken",), ("/a/b/ws",))


@pytest.mark.parametrize("endpoint", [stable, raw, named])
def test_unauthenticated_route_is_found(endpoint: Any) -> None:
    """Sockets of the library without an identity, and those of Starlette, are found."""
    assert unguarded_routes(app_with(Middleware(CheckToken), endpoint=endpoint)) == (("CheckToken",), ("/ws",))


@pytest.mark.parametrize(
    "endpoint",
    [identified, identified_as_fixed_user, with_dependency, with_credential, with_own_code, raw_with_own_code],
)
def test_authenticated_route_is_not_found(endpoint: Any) -> None:
    """A route with `socket_for`, a dependency that checks, or code that rejects is not found."""
    assert unguarded_routes(app_with(Middleware(CheckToken), endpoint=endpoint)) == ((), ())


def test_route_router_and_inclusion_dependencies_count() -> None:
    """Dependencies of routes, routers and inclusions count for sockets too."""
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
    """Dependencies of the app count for all routes, including those of routers."""
    app, router = FastAPI(middleware=[Middleware(CheckToken)], dependencies=[Depends(user)]), APIRouter()
    router.add_api_websocket_route("/included", stable)
    app.add_api_websocket_route("/ws", stable)
    app.include_router(router)
    assert unguarded_routes(app) == ((), ())


def test_starlette_and_mounted_routes_are_inspected() -> None:
    """Middleware counts for mounted routes too, but middleware of a mounted app only for its own routes."""
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


# ── manager ──


class Deny(BaseHTTPMiddleware):
    """Middleware that rejects each HTTP request."""

    async def dispatch(self, request: Request, call_next: Callable[..., Any]) -> Response:
        return PlainTextResponse("no", 403)


def test_http_middleware_does_not_block_sockets_and_is_warned(manager_with: Any) -> None:
    """Middleware that rejects each HTTP request does not affect sockets, and a start warns about that once."""
    own, heard = manager_with()
    app = FastAPI(lifespan=own.lifespan, middleware=[Middleware(Deny)])
    app.add_api_websocket_route("/ws/{client_id}", stable)
    for _ in range(2):
        with TestClient(app) as client:
            assert client.get("/").status_code == 403
            with client.websocket_connect("/ws/mallory"):
                pass
    (event,) = [event for event in heard.of("doctor_finding") if event.fields["code"] == "D17"]
    assert (event.level, event.fields["severity"]) == (logging.WARNING, "warning")
    assert "Deny" in event.fields["problem"]
    assert "/ws/{client_id}" in event.fields["problem"]
    assert "on_handshake" in event.fields["advice"]


@pytest.mark.parametrize("hook", ["on_handshake", "on_auth"])
def test_handshake_hook_clears_login_finding(manager_with: Any, hook: str) -> None:
    """With a handshake or auth hook there is no finding, at a start and in `check`."""
    own, heard = manager_with()
    getattr(own, hook)(lambda ws: None)
    app = FastAPI(lifespan=own.lifespan, middleware=[Middleware(Deny)])
    app.add_api_websocket_route("/ws", stable)
    with TestClient(app):
        assert "D17" not in {finding.code for finding in own.check()}
    assert [event for event in heard.of("doctor_finding") if event.fields["code"] == "D17"] == []


def test_manager_check_finds_unauthenticated_route() -> None:
    """`check` inspects the app without a server and without a start."""
    own = WebSocketConnectionManager()
    found = own.check(app_with(Middleware(Deny)))
    assert [finding.code for finding in found if finding.code == "D17"] == ["D17"]
    assert "D17" not in {finding.code for finding in own.check(app_with(Middleware(Deny), endpoint=identified))}
