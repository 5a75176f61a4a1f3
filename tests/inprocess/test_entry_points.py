"""Entry points of an app, under the clients that applications are tested with."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
import starlette
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket
from httpx_ws import aconnect_ws
from httpx_ws.transport import ASGIWebSocketTransport
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_ws_stabilizer import (
    ManagerNotFoundError,
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
    WrongLoopError,
    stable_socket,
    stats_router,
)

Made = tuple[FastAPI, WebSocketConnectionManager, str]


async def echo(ws: StableSocket = Depends(stable_socket)) -> None:
    async for message in ws:
        await ws.send(f"{ws.client_id}: {message!s}")


def plain() -> Made:
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    app.websocket("/ws/{client_id}")(echo)
    return app, manager, "/ws/ann"


def with_router() -> Made:
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    router = APIRouter(prefix="/api")
    router.websocket("/ws/{client_id}")(echo)
    app.include_router(router)
    app.include_router(stats_router, prefix="/ws-stats")
    return app, manager, "/api/ws/ann"


def mounted() -> Made:
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    inner = FastAPI()
    inner.websocket("/ws/{client_id}")(echo)
    app.mount("/inner", inner)
    return app, manager, "/inner/ws/ann"


def own_lifespan() -> Made:
    manager = WebSocketConnectionManager()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with manager.lifespan(app) as state:
            yield {**state, "mine": 1}

    app = FastAPI(lifespan=lifespan)
    app.websocket("/ws/{client_id}")(echo)
    return app, manager, "/ws/ann"


def installed_twice() -> Made:
    manager = WebSocketConnectionManager()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        yield {"mine": 1}

    app = FastAPI(lifespan=lifespan)
    manager.install(app)
    manager.install(app)
    app.websocket("/ws/{client_id}")(echo)
    return app, manager, "/ws/ann"


def named() -> Made:
    manager = WebSocketConnectionManager()
    app = FastAPI()

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocket = Depends(manager.socket)) -> None:
        await echo(ws)

    return app, manager, "/ws/ann"


def by_alias() -> Made:
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        await echo(ws)

    return app, manager, "/ws/ann"


APPS = [plain, with_router, mounted, own_lifespan, installed_twice, named, by_alias]
FOUND_WITHOUT_LIFESPAN = [plain, with_router, installed_twice, named, by_alias]


@pytest.mark.parametrize("make", APPS)
def test_every_entry_point_works_under_test_client(make: Callable[[], Made]) -> None:
    """`with TestClient(app)` connects, echoes, and leaves no connection and no slot behind."""
    app, manager, path = make()
    with TestClient(app) as client:
        for _ in range(2):
            with client.websocket_connect(path) as ws:
                ws.send_text("hi")
                assert ws.receive_text() == "ann: hi"
                assert manager.get_active_connections() == ["ann"]
            assert manager.get_connection_count() == 0


@pytest.mark.parametrize("make", FOUND_WITHOUT_LIFESPAN)
def test_manager_is_found_without_lifespan(make: Callable[[], Made]) -> None:
    """A TestClient without `with` works, although it runs no lifespan and creates an event loop for each connection."""
    app, manager, path = make()
    client = TestClient(app)
    for _ in range(2):
        with client.websocket_connect(path) as ws:
            ws.send_text("hi")
            assert ws.receive_text() == "ann: hi"
    assert manager.get_connection_count() == 0


def test_second_event_loop_raises_wrong_loop_error() -> None:
    """Two sockets on two event loops cannot share a manager; the error says what to write."""
    app, _, path = plain()
    client = TestClient(app)
    with client.websocket_connect(path), pytest.raises(WrongLoopError, match="with TestClient"):
        with client.websocket_connect("/ws/bob"):
            pass


@pytest.mark.parametrize("make", APPS)
async def test_every_entry_point_works_under_httpx_ws(make: Callable[[], Made]) -> None:
    """httpx-ws connects to the app, with its lifespan run as an application server runs it."""
    app, manager, path = make()
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "state": dict(state or {})}, receive, send)

        async with httpx.AsyncClient(transport=ASGIWebSocketTransport(with_state)) as client:
            async with aconnect_ws(f"http://test{path}", client) as ws:
                await ws.send_text("hi")
                assert await ws.receive_text() == "ann: hi"
            with anyio.fail_after(2):
                while manager.get_connection_count():
                    await anyio.sleep(0)
    assert manager.counters.connections_opened == 1


@pytest.mark.anyio
async def test_socket_dependency_works_under_anyio_plugin(anyio_backend_name: str) -> None:
    """The socket dependency works inside a task group and a cancel scope."""
    app, manager, path = plain()
    async with anyio.create_task_group() as group:
        group.cancel_scope.deadline = anyio.current_time() + 5
        async with app.router.lifespan_context(app):
            async with httpx.AsyncClient(transport=ASGIWebSocketTransport(app)) as client:
                async with aconnect_ws(f"http://test{path}", client) as ws:
                    await ws.send_text("hi")
                    assert await ws.receive_text() == "ann: hi"
    assert manager.counters.connections_opened == 1


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_socket_dependency_can_be_overridden() -> None:
    """`app.dependency_overrides[stable_socket]` replaces the socket by another manager's socket, or by a fake."""
    app, manager, path = plain()
    other = WebSocketConnectionManager()
    app.dependency_overrides[stable_socket] = other.socket
    with TestClient(app) as client, client.websocket_connect(path) as ws:
        ws.send_text("hi")
        assert ws.receive_text() == "ann: hi"
        assert (manager.get_connection_count(), other.get_connection_count()) == (0, 1)


class User:
    def __init__(self, name: str) -> None:
        self.name = name


def current_user(token: str) -> User:
    return User(token)


def app_for(*args: Any, **options: Any) -> tuple[FastAPI, WebSocketConnectionManager]:
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws")
    async def endpoint(ws: StableSocket = Depends(manager.socket_for(*args, **options))) -> None:
        await ws.send(f"{ws.client_id} {type(ws.identity).__name__}")
        async for message in ws:
            await ws.send(message)

    return app, manager


def test_client_id_comes_from_any_dependency() -> None:
    """socket_for takes the id from another dependency, which can be overridden; ws.identity is its result."""
    app, _ = app_for(current_user, key=lambda user: user.name)
    with TestClient(app) as client:
        with client.websocket_connect("/ws?token=ann") as ws:
            assert ws.receive_text() == "ann User"
        app.dependency_overrides[current_user] = lambda: User("fake")
        with client.websocket_connect("/ws") as ws:
            assert ws.receive_text() == "fake User"


def test_identity_without_client_id_raises_with_hint() -> None:
    """An object without a key is rejected with the advice to give one."""
    app, _ = app_for(current_user)
    with TestClient(app) as client, pytest.raises(TypeError, match="key=lambda identity"):
        with client.websocket_connect("/ws?token=ann"):
            pass


def test_control_frames_false_delivers_ping_to_endpoint() -> None:
    """With control_frames=False the texts ping and pong are data like any other."""
    app, _ = app_for(lambda: "ann", control_frames=False)
    with TestClient(app) as client, client.websocket_connect("/ws") as ws:
        ws.receive_text()
        ws.send_text("ping")
        assert ws.receive_text() == "ping"


def test_missing_manager_raises_with_hint() -> None:
    """An app without a manager gets an error with the lines to write."""
    app = FastAPI()
    app.websocket("/ws/{client_id}")(echo)
    with pytest.raises(ManagerNotFoundError, match=r"FastAPI\(lifespan=manager.lifespan\)"):
        with TestClient(app).websocket_connect("/ws/ann"):
            pass


def test_client_id_is_path_then_query_then_generated() -> None:
    """The path parameter takes precedence over the query parameter; without both each connection gets its own id."""
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    @app.websocket("/ws")
    async def endpoint(ws: StableSocketDep) -> None:
        await ws.send(ws.client_id)

    with TestClient(app) as client:
        found = []
        for path in ("/ws/ann?client_id=bob", "/ws?client_id=bob", "/ws", "/ws", "/ws?client_id="):
            with client.websocket_connect(path) as ws:
                found.append(ws.receive_text())
    assert found[:2] == ["ann", "bob"]
    assert len(set(found)) == 5


def test_stable_socket_has_attributes_of_websocket() -> None:
    """Headers, parameters, cookies, url, client, app and state are those of the handshake."""
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    async def mark(websocket: WebSocket) -> None:
        websocket.state.mark = "state"

    @app.websocket("/ws/{client_id}", dependencies=[Depends(mark)])
    async def endpoint(ws: StableSocketDep) -> None:
        await ws.send_json(
            [
                ws.headers["x-test"],
                ws.query_params["q"],
                ws.path_params["client_id"],
                ws.cookies["c"],
                ws.url.path,
                ws.client.host if ws.client else None,
                ws.app is app,
                ws.state.mark,
                ws.scope["type"],
            ]
        )
        await ws.send_json({"of": await ws.receive_json()}, mode="binary")
        await ws.send_bytes(await ws.receive_bytes())
        await ws.send_text(await ws.receive_text())

    with TestClient(app, cookies={"c": "cookie"}) as client:
        with client.websocket_connect("/ws/ann?q=query", headers={"x-test": "header"}) as ws:
            assert ws.receive_json() == [
                *("header", "query", "ann", "cookie", "/ws/ann", "testclient", True, "state", "websocket"),
            ]
            ws.send_json({"a": 1})
            assert ws.receive_json(mode="binary") == {"of": {"a": 1}}
            ws.send_bytes(b"raw")
            assert ws.receive_bytes() == b"raw"
            ws.send_text("text")
            assert ws.receive_text() == "text"
            assert ws.receive()["code"] == 1000


@pytest.mark.parametrize("by_hand", [True, False])
def test_error_after_close_reaches_earlier_dependency(by_hand: bool) -> None:
    """When an endpoint closes the WebSocket itself and then raises, an earlier dependency still rolls back."""
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    seen: list[str] = []

    async def database() -> AsyncIterator[None]:
        try:
            yield
        except Exception:
            seen.append("rolled back")
            raise
        else:
            seen.append("committed")

    async def close_and_raise(websocket: WebSocket) -> None:
        await websocket.close(4000)
        raise ValueError("a bug")

    if by_hand:

        @app.websocket("/ws")
        async def endpoint(websocket: WebSocket, db: None = Depends(database)) -> None:
            await websocket.accept()
            await manager.connect("ann", websocket)
            await close_and_raise(websocket)

    else:

        @app.websocket("/ws")
        async def endpoint_with_dependency(
            db: None = Depends(database), ws: StableSocket = Depends(stable_socket)
        ) -> None:
            await close_and_raise(ws.websocket)

    with (
        TestClient(app, raise_server_exceptions=False) as client,
        client.websocket_connect("/ws") as ws,
    ):
        assert ws.receive()["code"] == 4000
        deadline = time.monotonic() + 5  # older TestClients cancel the endpoint on exit, before it is done
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
    assert seen == ["rolled back"]


REFUSALS = {
    "identity": ("/identity", {}, 401, {"detail": "log in"}),
    "origin": ("/identity", {"origin": "https://evil.example"}, 403, {"detail": "origin not allowed"}),
    "full": ("/path/bob", {}, 503, {"detail": "the server is full"}),
    "shut down": ("/path/bob", {}, 503, {"detail": "server shutdown"}),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_rejection_has_status_and_body_under_test_client(what: str) -> None:
    """Status and body arrive, and nothing hangs, on the oldest supported Starlette too."""
    path, headers, status, detail = REFUSALS[what]
    manager = WebSocketConnectionManager(WebSocketConfig(max_connections=1))
    app = FastAPI(lifespan=manager.lifespan)

    async def reject_identity() -> None:
        raise HTTPException(401, "log in")

    @app.websocket("/identity")
    async def by_identity(ws: StableSocket = Depends(manager.socket_for(reject_identity))) -> None:
        raise AssertionError("every client is rejected")

    @app.websocket("/path/{client_id}")
    async def by_path(ws: StableSocket = Depends(stable_socket)) -> None:
        await echo(ws)

    with TestClient(app) as client, client.websocket_connect("/path/ann"):
        if what == "shut down":
            assert client.portal is not None
            client.portal.call(manager.graceful_shutdown)
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(path, headers=headers):
            pass
        assert (denied.value.status_code, denied.value.json()) == (status, detail)
        assert manager.counters.refusals.total() == 1


class TeapotError(HTTPException):
    """Error that the application answers with its own handler."""


OLD_STARLETTE = tuple(map(int, starlette.__version__.split(".")[:2])) < (0, 41)
"""Whether it sends nothing that can answer a handshake, so that the library's answer is sent."""


@pytest.mark.parametrize("kind", [HTTPException, TeapotError, 418])
def test_app_handler_answers_rejection(kind: Any) -> None:
    """The application's handler answers a handshake like an HTTP route, where Starlette sends that answer."""
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    async def reject_identity() -> None:
        raise TeapotError(418, "short")

    @app.websocket("/identity")
    async def by_identity(ws: StableSocket = Depends(manager.socket_for(reject_identity))) -> None:
        raise AssertionError("every client is rejected")

    @app.exception_handler(kind)
    async def answer(_: object, error: HTTPException) -> PlainTextResponse:
        return PlainTextResponse("short and stout", error.status_code)

    with (
        TestClient(app) as client,
        pytest.raises(WebSocketDenialResponse) as denied,
        client.websocket_connect("/identity"),
    ):
        pass
    text = '{"detail":"short"}' if OLD_STARLETTE else "short and stout"
    assert (denied.value.status_code, denied.value.text) == (418, text)
