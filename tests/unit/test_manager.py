"""Tests of the manager's public methods."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from fastapi import FastAPI, HTTPException, WebSocketException
from starlette.websockets import WebSocketDisconnect

from fastapi_ws_stabilizer import scheduling as scheduling_module
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection import asgi_outbox as asgi_outbox_module
from fastapi_ws_stabilizer.connection import stall_watch as send_watch_module
from fastapi_ws_stabilizer.errors import (
    BroadcastFailedError,
    ConnectionNotFoundError,
    DuplicateClientError,
    MessageEncodeError,
    ShutdownError,
    SocketClosed,
    WrongLoopError,
)
from fastapi_ws_stabilizer.manager import STATE_KEY, WebSocketConnectionManager
from fastapi_ws_stabilizer.observability.logs import get_logger
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_websocket import FakeServer, eventually, settle, with_deadline
from tests.support.own_loop import run


class Client:
    """One client of a manager: its server, and the task that serves it, which waits until the client disconnects."""

    def __init__(self, manager: WebSocketConnectionManager, client_id: str = "ann", *, by_hand: bool = False) -> None:
        self.server = FakeServer(path_params={"client_id": client_id})
        self.manager = manager
        self.client_id = client_id
        self.socket: StableSocket | None = None
        self.task = asyncio.ensure_future(self._by_hand() if by_hand else self._served())

    async def _served(self) -> None:
        async with self.manager.serve(self.server.websocket, self.client_id) as self.socket:
            await self.socket.wait_closed()

    async def _by_hand(self) -> None:
        websocket = await self.server.accepted()
        async with AsyncExitStack() as stack:
            websocket.scope["fastapi_inner_astack"] = stack
            self.socket = await self.manager.connect(self.client_id, websocket)
            try:
                while True:
                    await websocket.receive_text()
            except WebSocketDisconnect:
                await self.manager.disconnect(self.client_id)

    async def connected(self) -> StableSocket:
        """Return the socket, once the endpoint has it."""
        await eventually(lambda: self.socket is not None or self.task.done())
        if self.socket is None:
            await self.task
        assert self.socket is not None
        return self.socket

    async def disconnect(self) -> None:
        """Let the client disconnect, and wait for its endpoint."""
        self.server.feed_disconnect(1001)
        await with_deadline(self.task)


@pytest.fixture
def clients_of() -> Any:
    """Return a function that connects clients to a manager."""

    async def connect(manager: WebSocketConnectionManager, *client_ids: str, **kwargs: Any) -> list[Client]:
        clients = [Client(manager, client_id, **kwargs) for client_id in client_ids]
        for client in clients:
            await client.connected()
        return clients

    return connect


# ── start and shutdown ──


async def test_new_manager_has_default_options() -> None:
    """Without a config the defaults apply, and no client is connected."""
    manager = WebSocketConnectionManager()
    assert manager.config == WebSocketConfig()
    assert manager.get_connection_count() == 0
    assert repr(manager) == "<WebSocketConnectionManager 0 connections>"
    assert manager.running
    assert manager.uptime_seconds == 0.0


async def test_second_start_changes_nothing(manager_with: Any, clients_of: Any) -> None:
    """A second `start` creates no second heartbeat and loses no connection."""
    manager, _ = manager_with()
    await manager.start()
    (client,) = await clients_of(manager, "ann")
    heartbeat = manager._node.heartbeat
    tasks = len(asyncio.all_tasks())
    await manager.start()
    assert manager._node.heartbeat is heartbeat
    assert len(asyncio.all_tasks()) == tasks
    assert manager.get_active_connections() == ["ann"]
    assert manager.running
    assert manager.uptime_seconds > 0
    await client.disconnect()


async def test_start_applies_log_level(manager_with: Any) -> None:
    """`log_level` takes effect."""
    manager, _ = manager_with(log_level="debug")
    await manager.start()
    assert get_logger().level == logging.DEBUG


async def test_start_with_default_options_logs_no_warning(manager_with: Any) -> None:
    """A manager with default options starts without a warning."""
    manager, heard = manager_with(heartbeat_interval=5, send_timeout=1)
    await manager.start()
    assert [report.event for report in heard.all if report.level >= logging.WARNING] == []


async def test_missing_websocket_library_is_logged_at_start(manager_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the server cannot serve WebSockets, the start logs what to install."""
    monkeypatch.setattr(
        "fastapi_ws_stabilizer.doctor.collect.websocket_library_advice", lambda: "pip install something"
    )
    manager, heard = manager_with(handle_signals=False)
    await manager.start()
    (report,) = heard.of("websocket_library_missing")
    assert report.level == logging.ERROR
    assert report.fields == {"problem": "pip install something"}


async def test_first_socket_starts_manager(manager_with: Any, clients_of: Any) -> None:
    """A manager that was not started explicitly serves connections."""
    manager, _ = manager_with()
    (client,) = await clients_of(manager, "ann")
    assert manager.running
    assert manager.get_connection_count() == 1
    await client.disconnect()


async def test_shutdown_closes_all_with_1012_and_counts(manager_with: Any, clients_of: Any) -> None:
    """A graceful shutdown closes all connections with 1012 and reports their number."""
    manager, heard = manager_with()
    clients = await clients_of(manager, "ann", "bob")
    report = await with_deadline(manager.graceful_shutdown(timeout=5))
    assert (report.closed_count, report.failed_count) == (2, 0)
    for client in clients:
        await with_deadline(client.task)
        assert [(code, text.split(";")[0]) for code, text in client.server.close_frames] == [(1012, "server shutdown")]
    assert manager.get_connection_count() == 0
    assert not manager.running
    assert heard.of("shutdown")[0].fields["closed_count"] == 2


async def test_shutdown_manager_rejects_connections(manager_with: Any) -> None:
    """After a shutdown a manager rejects handshakes with 503, and `connect` raises `ShutdownError`."""
    manager, _ = manager_with()
    await manager.start()
    await manager.graceful_shutdown(timeout=1)
    server = FakeServer(headers=[(b"origin", b"http://testserver")])  # also for a browser
    with pytest.raises(WebSocketException):
        async with manager.serve(server.websocket, "ann"):
            pass
    assert server.taken[0]["status"] == 503
    assert dict(server.taken[0]["headers"])[b"retry-after"].isdigit()
    assert manager.counters.refusals == {"1012": 1}
    with pytest.raises(ShutdownError):
        await manager.connect("ann", await FakeServer().accepted())


async def test_manager_shut_down_before_start_rejects_connections(manager_with: Any) -> None:
    """`graceful_shutdown` stays in effect until `start`, whether the manager was started before or not."""
    manager, _ = manager_with()
    await manager.graceful_shutdown(timeout=1)
    with pytest.raises(ShutdownError):
        await manager.connect("ann", await FakeServer().accepted())
    await manager.start()
    assert manager.running


async def test_manager_can_start_again_after_shutdown(manager_with: Any, clients_of: Any) -> None:
    """`start` after a shutdown accepts connections again, and runs the heartbeat."""
    manager, _ = manager_with(heartbeat_interval=0.02)
    await clients_of(manager, "ann")
    await manager.graceful_shutdown(timeout=5)
    await manager.start()
    (client,) = await clients_of(manager, "bob")
    await client.server.until(lambda: client.server.data)
    assert manager.get_active_connections() == ["bob"]
    await client.disconnect()


async def test_shutdown_timeout_aborts_remaining_connections(manager_with: Any, clients_of: Any) -> None:
    """The timeout of a shutdown is enforced, and no task is left."""
    manager, _ = manager_with(send_timeout=60, disconnect_grace=60)
    (client,) = await clients_of(manager, "ann")
    client.server.block()
    report = await with_deadline(manager.graceful_shutdown(timeout=0.05))
    assert (report.closed_count, report.failed_count) == (0, 1)
    await with_deadline(client.task)
    await eventually(lambda: len(manager._node._tasks) == 0)
    assert manager.get_connection_count() == 0


def test_manager_works_on_successive_event_loops() -> None:
    """A test client creates a loop for each connection, and an earlier loop causes no error."""
    manager = WebSocketConnectionManager()

    async def once() -> int:
        client = Client(manager)
        await client.connected()
        count = manager.get_connection_count()
        await client.disconnect()
        return count

    assert [run(once()), run(once())] == [1, 1]


def test_start_without_asyncio_names_server_option() -> None:
    """If a server runs an event loop of another library, the start and the first socket name the option for asyncio."""
    manager = WebSocketConnectionManager()
    server = FakeServer()
    for call in (manager.lifespan(FastAPI()).__aenter__, manager.start, manager.serve(server.websocket).__aenter__):
        with pytest.raises(WrongLoopError, match="--worker-class trio"):
            call().send(None)  # as any event loop would start it


async def test_manager_with_connections_rejects_second_event_loop(manager_with: Any, clients_of: Any) -> None:
    """With open connections, a second event loop is an error that says what to do."""
    manager, _ = manager_with()
    (client,) = await clients_of(manager, "ann")
    with pytest.raises(WrongLoopError, match="TestClient"):
        await asyncio.to_thread(lambda: asyncio.run(manager.start()))
    assert manager.get_connection_count() == 1
    await client.disconnect()


async def test_running_manager_rejects_second_event_loop(manager_with: Any) -> None:
    """The error is raised without open connections too, because sessions and histories belong to the running loop."""
    manager, _ = manager_with()
    await manager.start()
    node = manager._node
    with pytest.raises(WrongLoopError, match="belongs to another event loop"):
        await asyncio.to_thread(lambda: asyncio.run(manager.start()))
    assert manager._node is node


async def test_lifespan_starts_and_stops_manager(manager_with: Any, clients_of: Any) -> None:
    """During the lifespan the manager runs and is in the app's state; afterwards all connections are closed."""
    manager, _ = manager_with()
    app = FastAPI()
    async with manager.lifespan(app) as state:
        assert state == {STATE_KEY: manager}
        assert getattr(app.state, STATE_KEY) is manager
        assert manager.running
        (client,) = await clients_of(manager, "ann")
    assert not manager.running
    await with_deadline(client.task)
    assert [(code, text.split(";")[0]) for code, text in client.server.close_frames] == [(1012, "server shutdown")]


async def test_install_wraps_existing_lifespan(manager_with: Any) -> None:
    """`install` runs the app's own lifespan, with its state, inside the manager's."""
    manager, _ = manager_with()
    order: list[str] = []

    @asynccontextmanager
    async def own(app: Any) -> AsyncIterator[dict[str, Any]]:
        order.append(f"up, running={manager.running}")
        yield {"db": "open"}
        order.append(f"down, running={manager.running}")

    app = FastAPI(lifespan=own)
    manager.install(app)
    wrapped = app.router.lifespan_context
    manager.install(app)
    assert app.router.lifespan_context is wrapped
    async with app.router.lifespan_context(app) as state:
        assert state == {STATE_KEY: manager, "db": "open"}
    assert order == ["up, running=True", "down, running=False"]
    assert not manager.running


async def test_install_works_without_lifespan(manager_with: Any) -> None:
    """An app without a lifespan gets the manager's."""
    manager, _ = manager_with()
    app = FastAPI()
    manager.install(app)
    async with app.router.lifespan_context(app) as state:
        assert state == {STATE_KEY: manager}
        assert manager.running


def test_installing_second_manager_raises() -> None:
    """A second manager is an error that says how to use several."""
    app = FastAPI()
    WebSocketConnectionManager().install(app)
    with pytest.raises(RuntimeError, match=r"Depends\(manager\.socket\)"):
        WebSocketConnectionManager().install(app)


# ── serving ──


async def test_served_socket_is_accepted_registered_and_closed(manager_with: Any, clients_of: Any) -> None:
    """An endpoint that returns closes with 1000, and nothing is left."""
    manager, heard = manager_with(handle_signals=False)
    await manager.start()
    server = FakeServer(path_params={"client_id": "ann"})
    async with manager.serve(server.websocket) as socket:
        assert server.taken[0]["type"] == "websocket.accept"
        assert manager.get_sockets() == [socket]
        assert manager.get_socket(socket.connection_id) is socket
        assert socket.client_id == "ann"
    assert server.close_frames == [(1000, "")]
    assert socket.reason is DisconnectReason.COMPLETED
    assert manager.get_connection_count() == 0
    assert manager.get_socket(socket.connection_id) is None
    assert heard.events == ["connection_opened", "connection_ended"]


@pytest.mark.parametrize(
    ("error", "code", "events"),
    [
        (HTTPException(401), 4401, []),
        (WebSocketException(4123, "no"), 4123, []),
        (ValueError("bug"), 1011, ["endpoint_failed"]),
        (WebSocketDisconnect(1001), 1000, []),
    ],
)
async def test_endpoint_exception_decides_close_code(
    manager_with: Any, error: Exception, code: int, events: list[str]
) -> None:
    """The close code depends on the kind of the error; earlier dependencies get the exception."""
    manager, heard = manager_with()
    server = FakeServer()
    with pytest.raises(WebSocketException) as caught:
        async with manager.serve(server.websocket, "ann"):
            raise error
    assert caught.value.__cause__ is error
    assert [frame[0] for frame in server.close_frames] == [code]
    assert [event for event in heard.events if event.endswith("failed")] == events


async def test_escaped_disconnect_logs_no_error(manager_with: Any) -> None:
    """`SocketClosed` after a disconnect of the client is a normal end, and is not logged as an error."""
    manager, heard = manager_with(handle_signals=False)
    await manager.start()
    server = FakeServer()
    server.feed_disconnect(1001)
    async with manager.serve(server.websocket, "ann") as socket:
        await with_deadline(socket.receive())
    assert max(report.level for report in heard.all) < logging.WARNING
    assert heard.of("connection_ended")[0].fields["reason"] == "client_close"


async def test_endpoint_error_after_lost_connection_is_logged_once(manager_with: Any) -> None:
    """After a lost connection Starlette's handler may close again with 1006, which has no effect and raises nothing."""
    manager, heard = manager_with()
    server = FakeServer()
    server.feed_disconnect(1006)

    async def endpoint() -> None:
        async with manager.serve(server.websocket, "ann") as socket:
            await socket.wait_closed()
            raise ValueError("bug")

    with pytest.raises(WebSocketException) as caught:
        await endpoint()
    await server.websocket.close(caught.value.code, caught.value.reason)
    assert server.close_frames == []
    assert len(heard.of("endpoint_failed")) == 1


async def test_foreign_cancellation_of_endpoint_propagates_after_close(manager_with: Any, clients_of: Any) -> None:
    """A foreign cancellation propagates after the close frame of a shutdown."""
    manager, _ = manager_with()
    (client,) = await clients_of(manager, "ann")
    client.task.cancel("server stops")
    with pytest.raises(asyncio.CancelledError):
        await with_deadline(client.task)
    assert client.server.close_frames == [(1012, "server shutdown")]
    assert manager.get_connection_count() == 0


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_cancelled_endpoint_completes_teardown(manager_with: Any, how: str) -> None:
    """Close frame and hooks are completed before the cancellation propagates, at whichever await it arrives."""
    manager, _ = manager_with()
    server = FakeServer()
    done: list[str] = []

    @manager.on_disconnect
    async def slow(ws: StableSocket, reason: DisconnectReason) -> None:
        await settle(50)
        done.append(reason.value)

    scope = anyio.CancelScope()

    async def endpoint() -> None:
        with scope:
            async with manager.serve(server.websocket, "ann"):
                await asyncio.Event().wait()

    task = asyncio.ensure_future(endpoint())
    await eventually(manager.get_connection_count)
    await settle()
    if how == "task":
        task.cancel()
    else:
        scope.cancel()
    await with_deadline(asyncio.wait([task]))
    assert done == ["server_shutdown"]
    assert server.close_frames == [(1012, "server shutdown")]
    assert task.cancelled() == (how == "task")
    assert scope.cancelled_caught == (how == "scope")


async def test_own_cancellation_after_grace_is_suppressed(manager_with: Any) -> None:
    """The library's own cancellation after `disconnect_grace` does not reach the caller."""
    manager, heard = manager_with(disconnect_grace=0.03)
    server = FakeServer()
    server.feed_disconnect(1001)

    async def endpoint() -> str:
        try:
            async with manager.serve(server.websocket, "ann"):
                await asyncio.Event().wait()
        except WebSocketException:
            return "exchanged"
        return "swallowed"

    assert await with_deadline(asyncio.ensure_future(endpoint())) in ("swallowed", "exchanged")
    assert len(heard.of("endpoint_cancelled")) == 1


async def test_system_exit_propagates(manager_with: Any) -> None:
    """An exception that is not an `Exception` propagates, and the connection closes as in a shutdown."""
    manager, _ = manager_with()
    server = FakeServer()
    with pytest.raises(SystemExit):
        async with manager.serve(server.websocket, "ann") as socket:
            raise SystemExit(3)
    assert socket.reason is DisconnectReason.SERVER_SHUTDOWN


# ── hooks ──


async def test_hooks_run_in_lifecycle_order_once(manager_with: Any) -> None:
    """The handshake hook runs before the accept, the connect hook after it, the disconnect hook once with the cause."""
    manager, _ = manager_with()
    server = FakeServer()
    log: list[Any] = []

    @manager.on_handshake
    async def shake(ws: StableSocket) -> None:
        log.append(("handshake", [message["type"] for message in server.taken]))
        ws.user_data["seen"] = True

    @manager.on_connect()
    async def connect(ws: StableSocket) -> None:
        log.append(("connect", manager.get_active_connections(), ws.user_data))
        await ws.send("welcome")

    @manager.on_disconnect
    def disconnect(ws: StableSocket, reason: DisconnectReason) -> None:
        log.append(("disconnect", manager.get_active_connections(), reason))

    async with manager.serve(server.websocket, "ann"):
        pass
    assert log == [
        ("handshake", []),
        ("connect", ["ann"], {"seen": True}),
        ("disconnect", [], DisconnectReason.COMPLETED),
    ]
    assert server.data == ["welcome"]


async def test_handshake_hook_can_reject(manager_with: Any) -> None:
    """An `HTTPException` of a handshake hook answers the handshake, and no other hook runs."""
    manager, heard = manager_with(handle_signals=False)
    await manager.start()
    calls: list[str] = []

    @manager.on_handshake
    async def refuse(ws: StableSocket) -> None:
        raise HTTPException(401)

    manager.on_connect(lambda ws: calls.append("connect"))
    manager.on_disconnect(lambda ws: calls.append("disconnect"))
    server = FakeServer()
    with pytest.raises(WebSocketException) as caught:
        async with manager.serve(server.websocket, "ann"):
            calls.append("endpoint")
    assert isinstance(caught.value.__cause__, HTTPException)
    assert [message.get("status") for message in server.offered] == [401, None]
    assert calls == []
    assert heard.events == ["connection_refused"]


async def test_handshake_hook_bug_rejects_with_500(manager_with: Any) -> None:
    """A failing handshake hook is reported once and rejects with 500."""
    manager, heard = manager_with(handle_signals=False)
    await manager.start()
    error = ValueError("bug")
    called: list[Any] = []

    @manager.on_handshake
    async def fail(ws: StableSocket) -> None:
        raise error

    @manager.on_error
    async def on_error(ws: StableSocket, error: BaseException) -> None:
        called.append(error)

    server = FakeServer()
    with pytest.raises(WebSocketException):
        async with manager.serve(server.websocket, "ann"):
            pass
    assert server.taken[0]["status"] == 500
    assert [(report.event, report.error) for report in heard.all] == [
        ("handshake_hook_failed", error),
        ("connection_refused", None),
    ]
    assert called == [error]


@pytest.mark.parametrize(
    ("error", "code"), [(HTTPException(403), 4403), (ValueError("bug"), 1011), (WebSocketException(4001), 4001)]
)
async def test_failing_connect_hook_closes_before_endpoint(manager_with: Any, error: Exception, code: int) -> None:
    """The endpoint does not start, the close code names the failure, and the disconnect hooks run once."""
    manager, _ = manager_with()
    calls: list[str] = []

    @manager.on_connect
    async def refuse(ws: StableSocket) -> None:
        raise error

    manager.on_disconnect(lambda ws: calls.append("disconnect"))
    server = FakeServer()
    with pytest.raises(WebSocketException) as caught:
        async with manager.serve(server.websocket, "ann"):
            calls.append("endpoint")
    assert caught.value.code == code
    assert [frame[0] for frame in server.close_frames] == [code]
    assert calls == ["disconnect"]
    assert manager.get_connection_count() == 0


async def test_closing_connect_hook_prevents_endpoint(manager_with: Any) -> None:
    """After a connect hook has closed the socket, the endpoint does not start."""
    manager, heard = manager_with(handle_signals=False)
    await manager.start()

    @manager.on_connect
    async def refuse(ws: StableSocket) -> None:
        await ws.close(4010, "not today")

    server = FakeServer()
    with pytest.raises(WebSocketException):
        async with manager.serve(server.websocket, "ann"):
            pytest.fail("the endpoint ran")
    assert server.close_frames == [(4010, "not today")]
    assert max(report.level for report in heard.all) < logging.WARNING


async def test_messages_reach_matching_handlers(manager_with: Any) -> None:
    """`on_message` works with a type, without parentheses, and with empty parentheses."""
    manager, _ = manager_with()
    seen: list[Any] = []

    @manager.on_message("chat")
    async def chat(ws: StableSocket, message: dict[str, Any]) -> None:
        seen.append(message["text"])

    @manager.on_message
    async def others(ws: StableSocket, message: str) -> None:
        seen.append(message)

    @manager.on_message()
    def more(ws: StableSocket) -> None:
        seen.append("again")

    server = FakeServer()
    server.feed_text('{"type":"chat","text":"hi"}', "plain")
    server.feed_disconnect()
    async with manager.serve(server.websocket, "ann") as socket:
        await with_deadline(socket.run())
    assert seen == ["hi", "plain", "again"]


# ── duplicate connections ──


async def test_newer_connection_replaces_older_with_4409(manager_with: Any, clients_of: Any) -> None:
    """With `on_duplicate="replace"` the old connection closes with 4409; its teardown does not affect the new one."""
    manager, _ = manager_with()
    (old,) = await clients_of(manager, "ann")
    (new,) = await clients_of(manager, "ann")
    await with_deadline(old.task)
    assert old.server.close_frames == [(4409, "replaced by a newer connection")]
    assert manager.get_sockets("ann") == [new.socket]
    assert await manager.send_to_client("ann", "hi")
    await new.server.until(lambda: new.server.data == ["hi"])
    await new.disconnect()


async def test_old_endpoint_cleanup_does_not_close_new_connection(manager_with: Any, clients_of: Any) -> None:
    """In an endpoint, `manager.disconnect(client_id)` after a disconnect refers to the endpoint's own connection."""
    manager, heard = manager_with(handle_signals=False)
    await manager.start()
    (old,) = await clients_of(manager, "ann", by_hand=True)
    (new,) = await clients_of(manager, "ann", by_hand=True)
    await with_deadline(old.task)
    assert manager.get_sockets("ann") == [new.socket]
    assert new.socket.close_info is None
    assert old.server.close_frames == [(4409, "replaced by a newer connection")]
    await new.disconnect()
    assert max(report.level for report in heard.all) < logging.WARNING


async def test_duplicate_connection_can_be_rejected_with_4409(manager_with: Any, clients_of: Any) -> None:
    """With `on_duplicate="reject"` the old connection stays; the new one is closed with 4409, without hooks."""
    manager, _ = manager_with(on_duplicate="reject")
    calls: list[str] = []
    (old,) = await clients_of(manager, "ann")
    manager.on_connect(lambda ws: calls.append("connect"))
    manager.on_disconnect(lambda ws: calls.append("disconnect"))
    server = FakeServer()
    with pytest.raises(WebSocketException) as caught:
        async with manager.serve(server.websocket, "ann"):
            pass
    assert caught.value.code == 4409
    assert [frame[0] for frame in server.close_frames] == [4409]
    assert manager.get_sockets("ann") == [old.socket]
    assert calls == []
    with pytest.raises(DuplicateClientError):
        await manager.connect("ann", await FakeServer().accepted())
    assert manager.get_connection_count() == 1
    await old.disconnect()


async def test_client_may_have_several_connections(manager_with: Any, clients_of: Any) -> None:
    """With `on_duplicate="allow"` a direct send reaches all connections of a client, which counts once."""
    manager, _ = manager_with(on_duplicate="allow")
    clients = await clients_of(manager, "ann", "ann", "bob")
    assert manager.get_active_connections() == ["ann", "bob"]
    assert manager.get_connection_count() == 3
    assert await manager.send_to_client("ann", "hi")
    for client in clients[:2]:
        await client.server.until(lambda client=client: client.server.data == ["hi"])
    assert clients[2].server.data == []
    await manager.disconnect("ann", 4010)
    assert manager.get_active_connections() == ["bob"]
    await clients[2].disconnect()


# ── connect() ──


async def test_adopted_connection_is_registered_with_metadata(manager_with: Any) -> None:
    """`connect` registers an accepted WebSocket with its metadata, and the caller still reads from it."""
    manager, _ = manager_with()
    server = FakeServer()
    websocket = await server.accepted()
    socket = await manager.connect("ann", websocket, metadata={"plan": "free"})
    assert socket.metadata == {"plan": "free"}
    assert manager.get_sockets("ann") == [socket]
    server.feed_text("ping", "hello")
    assert await with_deadline(websocket.receive_text()) == "hello"
    await server.until(lambda: server.data == ["pong"])
    await manager.disconnect("ann", 4001, "bye")
    await server.until(lambda: server.close_frames == [(4001, "bye")])
    assert manager.get_connection_count() == 0


async def test_adopted_connection_closes_with_its_task(manager_with: Any) -> None:
    """Outside of FastAPI's exit stacks the connection closes when the task that made it ends."""
    manager, _ = manager_with()
    server = FakeServer()

    async def endpoint() -> None:
        await manager.connect("ann", await server.accepted())

    await with_deadline(asyncio.ensure_future(endpoint()))
    await server.until(lambda: server.close_frames)
    assert server.close_frames == [(1000, "")]
    assert manager.get_connection_count() == 0


@pytest.mark.parametrize(("error", "code"), [(HTTPException(401), 4401), (ValueError("bug"), 1011)])
async def test_adopted_connection_in_endpoint_gets_fitting_close_code(
    manager_with: Any, error: BaseException, code: int
) -> None:
    """In a FastAPI endpoint an adopted connection gets the same close codes as one of the dependency."""
    manager, _ = manager_with()
    server = FakeServer()

    async def endpoint() -> None:
        websocket = await server.accepted()
        async with AsyncExitStack() as stack:
            websocket.scope["fastapi_inner_astack"] = stack
            await manager.connect("ann", websocket)
            raise error

    with pytest.raises((WebSocketException, asyncio.CancelledError)):
        await with_deadline(asyncio.ensure_future(endpoint()))
    assert [frame[0] for frame in server.close_frames] == [code]


async def test_foreign_cancellation_of_adopting_endpoint_propagates(manager_with: Any) -> None:
    """A foreign cancellation propagates, for adopted connections as for the dependency."""
    manager, _ = manager_with()
    client = Client(manager, by_hand=True)
    await client.connected()
    client.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await with_deadline(client.task)
    assert client.server.close_frames == [(1012, "server shutdown")]


async def test_connect_requires_accepted_websocket(manager_with: Any) -> None:
    """`connect` without a previous `accept` raises an error that says so."""
    manager, _ = manager_with()
    with pytest.raises(RuntimeError, match=r"await websocket\.accept\(\)"):
        await manager.connect("ann", FakeServer().websocket)


@pytest.mark.parametrize("client_id", ["\ud800", "a\nb", "x" * 257, "\x1b[2J"], ids=ascii)
async def test_invalid_client_id_raises_in_every_call(manager_with: Any, client_id: str) -> None:
    """`connect`, `serve`, tokens and tickets raise a `ValueError` with the problem and the rule for client ids."""
    problem = "has 257 characters" if len(client_id) > 256 else "contains a control character"
    manager, _ = manager_with()
    websocket = await FakeServer().accepted()
    with pytest.raises(ValueError, match=problem + r".*at most 256 characters.*use another id"):
        await manager.connect(client_id, websocket)
    for call in (
        manager.generate_reconnect_token,
        manager.issue_ticket,
        functools.partial(manager.serve, websocket),
    ):
        with pytest.raises(ValueError, match=problem + r".*at most 256 characters.*use another id"):
            call(client_id)
    assert manager.get_connection_count() == 0


@pytest.mark.parametrize("client_id", ["", None, 7])
async def test_empty_or_non_text_client_id_raises(manager_with: Any, client_id: Any) -> None:
    """An empty client id, or one that is not text, is rejected."""
    manager, _ = manager_with()
    with pytest.raises(ValueError, match="client_id"):
        await manager.connect(client_id, await FakeServer().accepted())


@pytest.mark.parametrize("with_stack", [True, False])
async def test_disconnect_after_failed_connect_is_silent(manager_with: Any, with_stack: bool) -> None:
    """After a disconnect during connect(), disconnect() is silent in the same code, but raises later."""
    manager, _ = manager_with()
    server = FakeServer(path_params={"client_id": "ann"})
    websocket = await server.accepted()

    @manager.on_connect
    async def disconnects(ws: StableSocket) -> None:
        server.feed_disconnect(1001)
        await ws.wait_closed()

    async def endpoint() -> None:
        async with AsyncExitStack() as stack:
            if with_stack:
                websocket.scope["fastapi_inner_astack"] = stack
            with pytest.raises(SocketClosed):
                await manager.connect("ann", websocket)
            await settle()
            await manager.disconnect("ann")
        if with_stack:
            with pytest.raises(ConnectionNotFoundError):
                await manager.disconnect("ann")

    await with_deadline(asyncio.ensure_future(endpoint()))


async def test_rejecting_connect_hook_raises_disconnect_in_connect(manager_with: Any) -> None:
    """The caller of `connect` gets `SocketClosed`, which is a `WebSocketDisconnect`."""
    manager, _ = manager_with()

    @manager.on_connect
    async def refuse(ws: StableSocket) -> None:
        raise HTTPException(403)

    server = FakeServer()
    with pytest.raises(SocketClosed) as caught:
        await manager.connect("ann", await server.accepted())
    assert caught.value.code == 4403
    assert isinstance(caught.value, WebSocketDisconnect)


async def test_disconnect_of_unknown_client_id_raises(manager_with: Any, clients_of: Any) -> None:
    """An unknown client id raises `ConnectionNotFoundError`; an invalid code raises and closes nothing."""
    manager, _ = manager_with()
    with pytest.raises(ConnectionNotFoundError):
        await manager.disconnect("unknown")
    (client,) = await clients_of(manager, "ann")
    with pytest.raises(ValueError, match="1006"):
        await manager.disconnect("ann", 1006)
    assert manager.get_connection_count() == 1
    await client.disconnect()


async def test_handle_pong_counts_as_liveness(manager_with: Any, clients_of: Any) -> None:
    """`handle_pong` counts as liveness, and does nothing for a client that is not connected."""
    manager, _ = manager_with()
    (client,) = await clients_of(manager, "ann")
    liveness = client.socket._connection.liveness
    liveness.on_ping_queued(liveness.last_seen)
    await manager.handle_pong("ann")
    assert (liveness.has_ponged, liveness.awaiting_since) == (True, None)
    assert client.socket.rtt is not None
    await manager.handle_pong("unknown")
    await client.disconnect()


# ── sends ──


async def test_broadcast_skips_excluded_clients(manager_with: Any, clients_of: Any) -> None:
    """Excluded clients are not counted in the result."""
    manager, _ = manager_with()
    clients = await clients_of(manager, "ann", "bob", "eve")
    result = await manager.broadcast({"n": 1}, exclude_client="eve")
    assert (result.total, result.succeeded, result.failed, result.errors) == (2, 2, 0, [])
    for client in clients[:2]:
        await client.server.until(lambda client=client: client.server.json == [{"n": 1}])
    assert clients[2].server.data == []
    assert manager.counters.broadcasts == 1
    for client in clients:
        await client.disconnect()


async def test_broadcast_without_recipients_raises_nothing(manager_with: Any, clients_of: Any) -> None:
    """Neither an empty manager nor an exclusion of the only client raises."""
    manager, _ = manager_with()
    assert (await manager.broadcast("hi")).total == 0
    (client,) = await clients_of(manager, "ann")
    assert (await manager.broadcast("hi", exclude_client="ann")).total == 0
    await client.disconnect()


async def test_unencodable_broadcast_raises_and_closes_no_socket(manager_with: Any, clients_of: Any) -> None:
    """The call raises, and all connections stay open."""
    manager, _ = manager_with()
    clients = await clients_of(manager, "ann", "bob")
    sends = manager.broadcast, manager.room("lobby").send, lambda payload: manager.send_to_client("ann", payload)
    for send in sends:
        with pytest.raises(MessageEncodeError):
            await send({"x": object()})
    assert manager.get_active_connections() == ["ann", "bob"]
    assert [client.server.data for client in clients] == [[], []]
    for client in clients:
        await client.disconnect()


async def test_stalled_client_does_not_block_broadcast(manager_with: Any, clients_of: Any) -> None:
    """A broadcast returns at once despite a stalled client; only that client is closed when its outbox is full."""
    manager, _ = manager_with(outbox_max_messages=2)
    slow, good = await clients_of(manager, "slow", "good")
    slow.server.block()
    results = [await asyncio.wait_for(manager.broadcast(str(number)), 1.0) for number in range(6)]
    assert results[-1].total == 1
    assert [error for result in results for error in result.errors] == [("slow", "slow_consumer")]
    await good.server.until(lambda: len(good.server.data) == 6)
    assert manager.get_active_connections() == ["good"]
    slow.server.release()
    await with_deadline(slow.task)
    assert slow.server.close_frames == [(4507, "slow consumer")]
    await good.disconnect()


@pytest.mark.parametrize("in_room", [False, True])
async def test_broadcast_to_slow_client_does_not_raise(manager_with: Any, clients_of: Any, in_room: bool) -> None:
    """A slow client as the only recipient does not end the publisher; `raise_for_failure` raises on demand."""
    manager, _ = manager_with(outbox_max_messages=1)
    (slow,) = await clients_of(manager, "slow")
    await manager.get_sockets("slow")[0].join("prices")
    publish = manager.room("prices").send if in_room else manager.broadcast
    slow.server.block()
    await publish("sending")
    await slow.server.until(lambda: len(slow.server.offered) == 2)
    await publish("waiting")
    result = await publish("too much")
    assert (result.total, result.failed, result.errors) == (1, 1, [("slow", "slow_consumer")])
    with pytest.raises(BroadcastFailedError):
        result.raise_for_failure()
    slow.server.release()
    await with_deadline(slow.task)


async def test_send_to_unknown_client_returns_false(manager_with: Any, clients_of: Any) -> None:
    """`send_to_client` returns whether the message was queued, and does not raise for an unknown client."""
    manager, _ = manager_with()
    assert not await manager.send_to_client("unknown", "hi")
    (client,) = await clients_of(manager, "ann")
    assert await manager.send_to_client("ann", b"data")
    assert await manager.send_to_client("ann", ["list"])
    await client.server.until(lambda: client.server.data == [b"data", '["list"]'])
    await client.disconnect()
    assert not await manager.send_to_client("ann", "hi")


# ── user data and memory ──


async def test_user_data_is_accessible_by_client_id(manager_with: Any, clients_of: Any) -> None:
    """The entries are those of `ws.user_data`; an unknown client has none and cannot get any."""
    manager, _ = manager_with()
    (client,) = await clients_of(manager, "ann")
    await manager.set_user_data("ann", "name", "Ann")
    await manager.set_user_data("ann", "nothing", None)
    assert client.socket.user_data == {"name": "Ann", "nothing": None}
    assert await manager.get_user_data("ann", "name") == "Ann"
    assert await manager.get_user_data("ann", "age") is None
    assert await manager.get_user_data("unknown", "name") is None
    with pytest.raises(ConnectionNotFoundError):
        await manager.set_user_data("unknown", "name", "x")
    await client.disconnect()


async def test_memory_counts_nested_data_and_queues(manager_with: Any, clients_of: Any) -> None:
    """Ten megabytes nested in user data count as ten megabytes; queued and unread messages count too."""
    manager, _ = manager_with(outbox_max_bytes=10**7)
    assert manager.get_memory_usage() == {"total_memory": 0, "connection_count": 0, "per_connection_average": 0.0}
    ann, bob = await clients_of(manager, "ann", "bob")
    before = manager.get_memory_usage()["total_memory"]
    await manager.set_user_data("ann", "nested", [{"deep": b"x" * 10_000_000}])
    bob.server.block()
    await manager.send_to_client("bob", "sending")
    await bob.server.until(lambda: len(bob.server.offered) == 2)
    await manager.send_to_client("bob", "y" * 1_000_000)
    bob.server.feed_text("z" * 500_000)
    await eventually(lambda: bob.socket.unread_messages)
    usage = manager.get_memory_usage()
    assert 11_500_000 < usage["total_memory"] - before < 11_510_000
    assert usage["connection_count"] == 2
    assert usage["per_connection_average"] == usage["total_memory"] / 2
    bob.server.release()
    await ann.disconnect()
    await bob.disconnect()


async def test_heartbeat_timeout_closes_served_socket_with_4408(manager_with: Any, clients_of: Any) -> None:
    """A client that answered once and then falls silent is closed with 4408 and unregistered."""
    manager, heard = manager_with(heartbeat_interval=0.02, heartbeat_timeout=0.05)
    (client,) = await clients_of(manager, "ann")
    await client.server.until(lambda: client.server.data)
    client.server.feed_text("pong")
    await with_deadline(client.task)
    assert client.server.close_frames == [(4408, "heartbeat timeout")]
    assert manager.get_connection_count() == 0
    assert len(manager._node.heartbeat) == 0
    assert heard.of("connection_ended")[0].fields["reason"] == "heartbeat_timeout"


async def test_internal_task_failure_is_reported_as_bug(manager_with: Any) -> None:
    """A failing task of the library is reported with its name, as a bug."""
    manager, heard = manager_with(handle_signals=False)
    await manager.start()

    async def fail() -> None:
        raise ValueError("internal")

    manager._node._tasks.spawn(fail(), name="ws-internal")
    await settle()
    (report,) = heard.of("internal_task_failed")
    assert report.fields == {"task": "ws-internal"}


# ── hanging hooks and the shutdown ──


async def test_hanging_error_hook_does_not_delay_close_frame(manager_with: Any) -> None:
    """After a bug the client gets 1011 at once, and the endpoint ends although an error hook hangs."""
    manager, _ = manager_with(disconnect_grace=0.05)
    frames: list[Any] = []
    server = FakeServer()

    @manager.on_error
    async def hang(_: StableSocket, __: BaseException) -> None:
        await eventually(lambda: server.close_frames)
        frames.extend(server.close_frames)
        await asyncio.Event().wait()

    async def endpoint() -> None:
        async with manager.serve(server.websocket, "ann"):
            raise ValueError("bug")

    with pytest.raises(WebSocketException):
        await with_deadline(asyncio.ensure_future(endpoint()))
    assert frames == [(1011, "internal error")]


async def test_timed_out_shutdown_runs_disconnect_hooks_once(manager_with: Any) -> None:
    """A handler that is busy beyond the timeout does not prevent `on_disconnect`, which runs once."""
    manager, _ = manager_with()
    called: list[str] = []
    started = asyncio.Event()

    @manager.on_message
    async def busy(_: StableSocket) -> None:
        started.set()
        await asyncio.Event().wait()

    @manager.on_disconnect
    async def gone(ws: StableSocket, _: DisconnectReason) -> None:
        called.append(ws.client_id)

    server = FakeServer()

    async def endpoint() -> None:
        async with manager.serve(server.websocket, "ann") as ws:
            await ws.run()

    task = asyncio.ensure_future(endpoint())
    server.feed_text("work")
    await with_deadline(asyncio.ensure_future(started.wait()))
    report = await manager.graceful_shutdown(timeout=0.05)
    assert report.failed_count == 1
    assert called == ["ann"]
    await asyncio.wait([task], timeout=5)
    assert called == ["ann"]


async def test_shutdown_during_handshake_rejects_connection(manager_with: Any) -> None:
    """With a handshake hook that is slower than the shutdown, the connection is not accepted."""
    manager, _ = manager_with()
    await manager.start()
    waiting, go = asyncio.Event(), asyncio.Event()

    @manager.on_handshake
    async def slow(_: StableSocket) -> None:
        waiting.set()
        await go.wait()

    server = FakeServer()

    async def endpoint() -> None:
        async with manager.serve(server.websocket, "ann"):
            pytest.fail("the connection was accepted")

    task = asyncio.ensure_future(endpoint())
    await with_deadline(asyncio.ensure_future(waiting.wait()))
    await manager.graceful_shutdown(1)
    go.set()
    with pytest.raises(WebSocketException):
        await with_deadline(task)
    assert [message.get("status") for message in server.taken] == [503, None]


# ── which connection disconnect() refers to ──


async def test_second_connect_of_websocket_raises(manager_with: Any) -> None:
    """A second `connect` with the same WebSocket raises, and does not affect the first connection."""
    manager, _ = manager_with()
    websocket = await FakeServer().accepted()
    await manager.connect("ann", websocket)
    with pytest.raises(RuntimeError, match="already connected, as client 'ann'"):
        await manager.connect("bob", websocket)
    assert manager.get_active_connections() == ["ann"]


async def test_disconnect_in_child_task_spares_newer_connection(manager_with: Any, clients_of: Any) -> None:
    """`disconnect(client_id)` in a task that the old endpoint started never closes the newer connection."""
    manager, _ = manager_with()
    server = FakeServer()

    async def reader(websocket: Any) -> None:
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            await manager.disconnect("ann")

    async def endpoint() -> None:
        websocket = await server.accepted()
        async with AsyncExitStack() as stack:
            websocket.scope["fastapi_inner_astack"] = stack
            await manager.connect("ann", websocket)
            await asyncio.gather(reader(websocket))

    old = asyncio.ensure_future(endpoint())
    await eventually(lambda: manager.get_connection_count() == 1)
    (new,) = await clients_of(manager, "ann")
    await with_deadline(old)
    assert server.close_frames == [(4409, "replaced by a newer connection")]
    assert manager.get_connection_count() == 1
    assert not new.server.close_frames


async def test_disconnect_in_leftover_task_closes_current_connection(manager_with: Any, clients_of: Any) -> None:
    """A worker that was started in a connection can disconnect a later connection of that client."""
    manager, _ = manager_with()
    go = asyncio.Event()
    workers: list[asyncio.Task[None]] = []

    async def worker() -> None:
        await go.wait()
        await manager.disconnect("ann")

    server = FakeServer()

    async def endpoint() -> None:
        async with manager.serve(server.websocket, "ann"):
            workers.append(asyncio.ensure_future(worker()))

    await with_deadline(asyncio.ensure_future(endpoint()))
    (later,) = await clients_of(manager, "ann")
    go.set()
    await with_deadline(workers[0])
    await later.server.until(lambda: later.server.close_frames)
    assert later.server.close_frames == [(1000, "")]


# ── many connections ──


async def counts_by_iteration(count: Callable[[], int], most: int) -> list[int]:
    """Return the distinct values of a count over the iterations of the event loop, up to the maximum."""
    seen: list[int] = []

    async def look() -> None:
        while not seen or seen[-1] < most:
            if count() and count() not in seen:
                seen.append(count())
            await asyncio.sleep(0)

    await with_deadline(look())
    return seen


@pytest.fixture
def blocked_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every check report a long block of the event loop, so that the code yields."""
    monkeypatch.setattr(scheduling_module, "MAX_BLOCK", -1.0)


_BY_SHARD = [(1, [8]), (4, [2, 4, 6, 8]), (32, [1, 2, 3, 4, 5, 6, 7, 8])]


@pytest.mark.usefixtures("blocked_loop")
@pytest.mark.parametrize(("num_shards", "scheduler"), _BY_SHARD)
async def test_queued_messages_are_flushed_shard_by_shard(
    manager_with: Any, clients_of: Any, monkeypatch: pytest.MonkeyPatch, num_shards: int, scheduler: list[int]
) -> None:
    """When flushing takes long, one iteration sends to one of num_shards shards; with a single shard to all."""
    monkeypatch.setattr(scheduling_module, "CHECK_INTERVAL", 2)
    manager, _ = manager_with(num_shards=num_shards)
    clients = await clients_of(manager, *"abcdefgh")
    for client in clients:
        client.socket._connection.enqueue(encode("hi"))
    assert await counts_by_iteration(lambda: sum(len(client.server.data) for client in clients), 8) == scheduler
    for client in clients:
        await client.disconnect()


@pytest.mark.usefixtures("blocked_loop")
@pytest.mark.parametrize(("num_shards", "scheduler"), _BY_SHARD)
async def test_simultaneous_closes_are_processed_shard_by_shard(
    manager_with: Any, clients_of: Any, num_shards: int, scheduler: list[int]
) -> None:
    """Many connections begin to close at once, and their teardown starts shard by shard."""
    manager, _ = manager_with(num_shards=num_shards)
    called: list[str] = []

    @manager.on_disconnect
    async def disconnected(ws: StableSocket) -> None:
        called.append(ws.client_id)

    clients = await clients_of(manager, *"abcdefgh")
    for client in clients:
        await manager.disconnect(client.client_id)
    assert all(client.socket.closed for client in clients)
    assert await counts_by_iteration(lambda: len(called), 8) == scheduler
    for client in clients:
        await with_deadline(client.task)


async def test_disconnect_hooks_have_bounded_concurrency(manager_with: Any, clients_of: Any) -> None:
    """At most max_concurrent_cleanup hooks run at once, and all run in the end."""
    manager, _ = manager_with(max_concurrent_cleanup=2)
    called: list[str] = []
    may_end = asyncio.Event()

    @manager.on_disconnect
    async def disconnected(ws: StableSocket) -> None:
        called.append(ws.client_id)
        await may_end.wait()

    clients = await clients_of(manager, *"abcdef")
    for client in clients:
        client.server.feed_disconnect(1001)
    await eventually(lambda: len(called) == 2)
    await settle()
    assert len(called) == 2
    may_end.set()
    for client in clients:
        await with_deadline(client.task)
    assert sorted(called) == list("abcdef")


async def test_close_frames_have_bounded_concurrency(
    manager_with: Any, clients_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most max_concurrent_cleanup close frames wait for the server at once, and all are sent in the end."""
    for module in (send_watch_module, asgi_outbox_module):
        monkeypatch.setattr(module, "STALL_THRESHOLD", 60.0)
    manager, _ = manager_with(max_concurrent_cleanup=2)
    clients = await clients_of(manager, *"abcdef")
    for client in clients:
        client.server.block()
        await manager.disconnect(client.client_id)

    def offered() -> int:
        return sum(client.server.offered[-1]["type"] == "websocket.close" for client in clients)

    await eventually(lambda: offered() == 2)
    await settle()
    assert offered() == 2
    for client in clients:
        client.server.release()
    for client in clients:
        await with_deadline(client.task)
        assert client.server.close_frames == [(1000, "")]


@pytest.mark.parametrize("by_hand", [False, True])
async def test_failed_registration_closes_with_1011(
    manager_with: Any, monkeypatch: pytest.MonkeyPatch, by_hand: bool
) -> None:
    """A connection that fails between its handshake and its hooks is closed with 1011, reported, and removed."""
    manager, heard = manager_with(handle_signals=False)
    await manager.start()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot be registered")

    monkeypatch.setattr(type(manager._node.heartbeat), "add", fail)
    server = FakeServer(path_params={"client_id": "ann"})
    with pytest.raises((WebSocketException, SocketClosed, RuntimeError)):
        if by_hand:
            await manager.connect("ann", await server.accepted())
        else:
            async with manager.serve(server.websocket):
                pass
    assert server.close_frames == [(1011, "internal error")]
    assert not manager._node.connections
    assert len(manager._node.registry) == 0
    assert [report.event for report in heard.all if report.error is not None] == ["endpoint_failed"]
