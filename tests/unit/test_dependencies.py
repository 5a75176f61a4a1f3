"""Tests of `stable_socket`, and of finding the manager of an app."""

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, WebSocket
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.testclient import TestClient

from fastapi_ws_stabilizer import dependencies
from fastapi_ws_stabilizer.dependencies import StableSocketDep, find_manager, stable_socket
from fastapi_ws_stabilizer.errors import ManagerNotFoundError, SocketClosed
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_websocket import FakeServer


async def send_id(ws: StableSocket = Depends(stable_socket)) -> None:
    """Send the client its id."""
    await ws.send(ws.client_id)


def with_endpoint(app: Any, path: str = "/ws/{client_id}") -> Any:
    """Add the endpoint to an app or router."""
    app.add_api_websocket_route(path, send_id)
    return app


def first_message(client: TestClient, path: str = "/ws/ann") -> str:
    """Return the text that the endpoint sends to a client, which is then closed with 1000."""
    with client.websocket_connect(path) as ws:
        said = ws.receive_text()
        closed = ws.receive()
    assert (closed["type"], closed["code"]) == ("websocket.close", 1000)
    return str(said)


def test_manager_lifespan_serves_sockets() -> None:
    """`FastAPI(lifespan=manager.lifespan)` is sufficient."""
    app = with_endpoint(FastAPI(lifespan=WebSocketConnectionManager().lifespan))
    with TestClient(app) as client:
        assert first_message(client) == "ann"


def test_socket_works_without_running_lifespan() -> None:
    """A test client without `with` runs no lifespan, and sockets work nevertheless."""
    app = with_endpoint(FastAPI(lifespan=WebSocketConnectionManager().lifespan))
    assert first_message(TestClient(app)) == "ann"
    assert first_message(TestClient(app)) == "ann"


def test_installed_manager_serves_sockets() -> None:
    """`manager.install(app)` works with and without a running lifespan."""
    app = with_endpoint(FastAPI())
    WebSocketConnectionManager().install(app)
    assert first_message(TestClient(app)) == "ann"
    with TestClient(app) as client:
        assert first_message(client) == "ann"


def test_manager_lifespan_inside_own_lifespan_serves_sockets() -> None:
    """`async with manager.lifespan(app) as state: yield state` works in the app's own lifespan."""
    manager = WebSocketConnectionManager()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with manager.lifespan(app) as state:
            yield state

    with TestClient(with_endpoint(FastAPI(lifespan=lifespan))) as client:
        assert first_message(client) == "ann"


def test_manager_is_found_from_router_and_mounted_app() -> None:
    """The manager of the running app is found from an included router and from a mounted sub-app."""
    app = FastAPI(lifespan=WebSocketConnectionManager().lifespan)
    app.include_router(with_endpoint(APIRouter()), prefix="/router")
    app.mount("/sub", with_endpoint(FastAPI()))
    with TestClient(app) as client:
        assert first_message(client, "/router/ws/bob") == "bob"
        assert first_message(client, "/sub/ws/eve") == "eve"


def test_stable_socket_dep_needs_no_default() -> None:
    """`ws: StableSocketDep` needs no default."""
    app = FastAPI(lifespan=WebSocketConnectionManager().lifespan)

    @app.websocket("/ws")
    async def endpoint(ws: StableSocketDep) -> None:
        await ws.send(await ws.receive_text())

    with TestClient(app) as client, client.websocket_connect("/ws?client_id=ann") as ws:
        ws.send_text("echo")
        assert ws.receive_text() == "echo"


def test_named_managers_share_one_app() -> None:
    """`Depends(manager.socket)` needs no manager in the app, and two managers can serve one app."""
    one, other = WebSocketConnectionManager(), WebSocketConnectionManager()
    app = FastAPI()

    @app.websocket("/one")
    async def at_one(ws: Annotated[StableSocket, Depends(one.socket)]) -> None:
        await ws.send([one.get_connection_count(), other.get_connection_count()])

    @app.websocket("/other")
    async def at_other(ws: Annotated[StableSocket, Depends(other.socket)]) -> None:
        await ws.send([one.get_connection_count(), other.get_connection_count()])

    with TestClient(app) as client:
        with client.websocket_connect("/one") as ws:
            assert ws.receive_json() == [1, 0]
        with client.websocket_connect("/other") as ws:
            assert ws.receive_json() == [0, 1]


class User:
    """A logged-in user."""

    def __init__(self, token: str) -> None:
        self.id = f"user-{token}"


def current_user(token: Annotated[str, Query()]) -> User:
    """Return the user of a connection."""
    if token == "bad":
        raise HTTPException(401)
    return User(token)


def test_socket_for_uses_client_id_of_dependency() -> None:
    """`manager.socket_for` takes the id from any dependency, and stores its result as the identity."""
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    socket = manager.socket_for(current_user, key=lambda user: user.id, control_frames=False)

    @app.websocket("/ws")
    async def endpoint(ws: Annotated[StableSocket, Depends(socket)]) -> None:
        await ws.send([ws.client_id, type(ws.identity).__name__, await ws.receive_text()])

    with TestClient(app) as client:
        with client.websocket_connect("/ws?token=7") as ws:
            ws.send_text("ping")
            assert ws.receive_json() == ["user-7", "User", "ping"]
    assert manager.counters.connections_opened == 1


def test_dependency_overrides_replace_identity_and_socket() -> None:
    """`app.dependency_overrides` replaces the identity as well as the socket itself."""
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws")
    async def endpoint(
        ws: Annotated[StableSocket, Depends(manager.socket_for(current_user, key=lambda user: user.id))],
    ) -> None:
        await ws.send(ws.client_id)

    app.dependency_overrides[current_user] = lambda: User("test")
    with TestClient(app) as client, client.websocket_connect("/ws") as ws:
        assert ws.receive_text() == "user-test"


@pytest.mark.parametrize("disconnect_code", [1000, 1005, 1006])
def test_disconnect_in_endpoint_leaves_no_traceback(disconnect_code: int, caplog: pytest.LogCaptureFixture) -> None:
    """An endpoint that lets the disconnect propagate, or rejects afterwards, logs no traceback."""
    app = FastAPI(lifespan=WebSocketConnectionManager().lifespan)
    seen: list[str] = []

    @app.websocket("/escape")
    async def escape(ws: StableSocketDep) -> None:
        await ws.receive()

    @app.websocket("/refuse")
    async def refuse(ws: StableSocketDep) -> None:
        try:
            await ws.receive()
        except SocketClosed as closed:
            seen.append(str(closed.code))
            raise HTTPException(404) from closed

    with caplog.at_level(logging.WARNING), TestClient(app) as client:
        for path in ("/escape", "/refuse"):
            with client.websocket_connect(path) as ws:
                ws.close(disconnect_code)
    assert len(seen) == 1
    assert caplog.records == []


def test_dependencies_of_endpoint_are_closed() -> None:
    """Dependencies before and after the socket run their whole cleanup, and get the exception."""
    app = FastAPI(lifespan=WebSocketConnectionManager().lifespan)
    log: list[str] = []
    closed = threading.Event()

    async def database(websocket: WebSocket) -> AsyncIterator[str]:
        try:
            yield "db"
        except Exception as error:
            log.append(f"rolled back after {type(error).__name__}")
            raise
        else:
            log.append("committed")
        finally:
            closed.set()

    @app.websocket("/good")
    async def good(ws: StableSocketDep, db: Annotated[str, Depends(database)]) -> None:
        await ws.send(db)

    @app.websocket("/bad")
    async def bad(db: Annotated[str, Depends(database)], ws: StableSocketDep) -> None:
        await ws.send(db)
        raise ValueError("bug")

    with TestClient(app, raise_server_exceptions=False) as client:
        for path, code in (("/good", 1000), ("/bad", 1011)):
            with client.websocket_connect(path) as ws:
                assert ws.receive_text() == "db"
                assert ws.receive()["code"] == code
                assert closed.wait(5)  # an older TestClient cancels running code on exit
                closed.clear()
    assert log == ["committed", "rolled back after WebSocketException"]


def test_invalid_parameter_after_accept_closes_with_1008() -> None:
    """A validation error of the endpoint's parameters rejects the connection, and the endpoint does not run."""
    app = FastAPI(lifespan=WebSocketConnectionManager().lifespan)

    @app.websocket("/ws")
    async def endpoint(ws: StableSocketDep, page: int) -> None:
        pytest.fail("the endpoint ran")

    with TestClient(app) as client, client.websocket_connect("/ws?page=x") as ws:
        assert ws.receive()["code"] == 1008


# ── finding the manager ──


@pytest.mark.parametrize(
    "app",
    [None, object(), FastAPI(), FastAPI(lifespan=asynccontextmanager(lambda app: None))],  # type: ignore[list-item]
    ids=["none", "object", "plain", "lifespan"],
)
def test_missing_manager_error_lists_three_fixes(app: Any) -> None:
    """In an app without a manager the error lists three solutions."""
    with pytest.raises(ManagerNotFoundError, match=r"FastAPI\(lifespan=manager\.lifespan\)"):
        find_manager(FakeServer(app=app).websocket)


def test_foreign_object_in_app_state_is_not_manager() -> None:
    """An object of another type is not taken for a manager."""
    app = FastAPI()
    app.state.fastapi_ws_stabilizer = "not a manager"
    with pytest.raises(ManagerNotFoundError):
        find_manager(FakeServer(app=app, state=None).websocket)


def test_lifespan_closure_with_empty_variable_is_skipped() -> None:
    """A closure with an empty variable is skipped, and does not cause another error."""

    def make() -> Any:
        if False:
            later = None

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            print(later)
            yield

        return FastAPI(lifespan=lifespan)

    with pytest.raises(ManagerNotFoundError):
        find_manager(FakeServer(app=make()).websocket)


def test_endless_lifespan_chain_is_abandoned() -> None:
    """The search through merged lifespans is bounded."""

    def around(inner: Any) -> Any:
        async def lifespan(app: Any) -> Any:
            return inner

        return lifespan

    manager = WebSocketConnectionManager()
    lifespan: Any = manager.lifespan
    for _ in range(5):
        lifespan = around(lifespan)
    assert dependencies._manager_from_lifespan(lifespan) is manager
    for _ in range(100):
        lifespan = around(lifespan)
    assert dependencies._manager_from_lifespan(lifespan) is None


# ── a socket without a dependency ──


@pytest.mark.parametrize("annotation", [StableSocket, StableSocket | None, Annotated[StableSocket, "a note"]])
@pytest.mark.parametrize("decorate", [lambda app: app.websocket("/ws"), lambda app: app.get("/page")])
def test_bare_stable_socket_annotation_names_dependency(annotation: Any, decorate: Any) -> None:
    """`ws: StableSocket` alone is rejected with the name of the dependency."""

    async def endpoint(ws: Any) -> None:
        """Declare a socket as if it were a query parameter."""

    endpoint.__annotations__["ws"] = annotation
    with pytest.raises(TypeError, match=r"write `ws: StableSocketDep`, or `ws: StableSocket = Depends\("):
        decorate(FastAPI())(endpoint)


def test_socket_is_allowed_in_arbitrary_types_model() -> None:
    """A model or dataclass of the application can contain sockets."""

    class Player(BaseModel):
        """A player of a game."""

        model_config = ConfigDict(arbitrary_types_allowed=True)
        ws: StableSocket

    socket = object.__new__(StableSocket)
    assert Player(ws=socket).ws is socket
    with pytest.raises(ValidationError):
        Player(ws=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("wired", ["not", "lifespan", "merged", "installed", "own"])
@pytest.mark.parametrize("runs", [True, False])
def test_missing_lifespan_is_reported_once(wired: str, runs: bool) -> None:
    """A manager that a connection starts works, and the log says once that no lifespan has started it."""
    manager = WebSocketConnectionManager()
    found: list[Any] = []
    manager.events.subscribe(found.append)

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        async with manager.lifespan(app):
            yield

    lifespan: Any = {"lifespan": manager.lifespan, "own": own}.get(wired)
    app = FastAPI(lifespan=lifespan)
    router = APIRouter(lifespan=manager.lifespan) if wired == "merged" else APIRouter()

    @router.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocket = Depends(manager.socket)) -> None:
        await ws.send("hello")

    app.include_router(router)
    if wired == "installed":
        manager.install(app)
    for _ in range(2):  # a TestClient without `with` runs no lifespan, and has an event loop for each connection
        client = TestClient(app)
        with client if runs else nullcontext(), client.websocket_connect("/ws/ann") as ws:
            assert ws.receive_text() == "hello"
    reported = [event.fields["advice"] for event in found if event.event == "lifespan_missing"]
    assert len(reported) == (0 if runs and wired != "not" else 1)
    assert all("FastAPI(lifespan=manager.lifespan)" in advice for advice in reported)
