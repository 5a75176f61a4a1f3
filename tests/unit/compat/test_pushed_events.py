"""Tests of reading without a task on uvicorn's own class, with a real uvicorn of the installed version."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConfig, WebSocketConnectionManager
from fastapi_ws_stabilizer.compat import uvicorn as compat
from fastapi_ws_stabilizer.compat.starlette import asgi_callables
from tests.support.fake_websocket import eventually, with_deadline
from tests.support.uvicorn_server import served
from tests.support.versions import HAS_DIRECT_TRANSPORT, HAS_PROTOCOL_CLASS

pytestmark = pytest.mark.skipif(not HAS_PROTOCOL_CLASS, reason="uvicorn has no such class yet")

OPTIONS = {"ws": "websockets-sansio"}
PROTOCOL_CLASS = "fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol"
BOTH_CLASSES = [
    "websockets-sansio",
    pytest.param(
        PROTOCOL_CLASS,
        marks=pytest.mark.skipif(not HAS_DIRECT_TRANSPORT, reason="uvicorn has no direct transport"),
        id="protocol class",
    ),
]


class Wrapped:
    """Middleware that wraps `receive` and counts the messages."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.seen = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted() -> MutableMapping[str, Any]:
            event: MutableMapping[str, Any] = await receive()
            self.seen += event["type"] == "websocket.receive"
            return event

        await self.app(scope, counted, send)


def make(**options: Any) -> tuple[WebSocketConnectionManager, FastAPI]:
    """An app that echoes."""
    manager = WebSocketConnectionManager(WebSocketConfig(handle_signals=False, **options))
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        async for message in ws:
            await ws.send(message)

    return manager, app


def pumps() -> int:
    """Return the number of tasks that read."""
    return sum(task.get_name() == "ws-pump" for task in asyncio.all_tasks())


async def test_connection_on_uvicorns_own_class_reads_without_task() -> None:
    """An idle connection owns no task of the library, and echoes text and bytes."""
    manager, app = make()
    async with served(app, **OPTIONS) as url, connect(url) as client:
        for message in ("text", b"bytes", "", b""):
            await client.send(message)
            assert await with_deadline(client.recv()) == message
        assert pumps() == 0
        assert manager.counters.messages_received == 4


@pytest.mark.parametrize("how", ["close frame", "abort"])
async def test_disconnect_without_task_is_noticed(how: str) -> None:
    """The close code of the client and a lost connection reach the disconnect hooks."""
    manager, app = make()
    reasons: list[str] = []

    @manager.on_disconnect
    async def left(_: Any, reason: Any) -> None:
        reasons.append(reason.value)

    async with served(app, **OPTIONS) as url:
        client = await connect(url)
        await eventually(lambda: manager.get_connection_count() == 1)
        if how == "abort":
            client.transport.abort()
        else:
            await client.close(4123)
        await eventually(lambda: bool(reasons))
        assert reasons == ["network_lost" if how == "abort" else "client_close"]


async def test_full_inbox_without_task_stops_reading_and_loses_nothing() -> None:
    """Messages beyond a full inbox wait in the network, and arrive in order once the endpoint reads."""
    manager = WebSocketConnectionManager(WebSocketConfig(handle_signals=False, inbox_max_messages=5))
    app = FastAPI(lifespan=manager.lifespan)
    go, got = asyncio.Event(), []

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        got.append(await ws.receive_text())  # an endpoint that reads: nothing is dropped
        await go.wait()
        async for message in ws:
            got.append(message)

    async with served(app, **OPTIONS) as url, connect(url, compression=None) as client:
        padding = "x" * 100_000
        sender = asyncio.ensure_future(send_all(client, [f"{number} {padding}" for number in range(200)]))
        await eventually(lambda: bool(manager.get_sockets()) and manager.get_sockets()[0]._connection.pause is not None)
        await asyncio.sleep(0.1)
        assert not sender.done()
        assert len(manager.get_sockets()[0]._connection.inbox) < 100
        go.set()
        await with_deadline(sender)
        await eventually(lambda: len(got) == 200)
        assert [message.split()[0] for message in got] == [str(number) for number in range(200)]


async def send_all(client: Any, messages: list[str]) -> None:
    """Send messages one after the other."""
    for message in messages:
        await client.send(message)


def burst(client: Any, count: int) -> None:
    """Send messages in one write, so that the server reads and parses many of them at once."""
    frames = (Frame(Opcode.TEXT, f"{number:050}".encode()) for number in range(count))
    client.transport.write(b"".join(frame.serialize(mask=True) for frame in frames))


async def test_burst_in_one_read_waits_for_room_in_inbox() -> None:
    """A client that sends more in one read than its inbox and its memory limit hold is slowed down and not closed."""
    limit = 100_000
    manager = WebSocketConnectionManager(WebSocketConfig(handle_signals=False, max_memory_per_connection=limit))
    app = FastAPI(lifespan=manager.lifespan)
    go, got = asyncio.Event(), []

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        got.append(await ws.receive_text())
        await go.wait()
        async for message in ws:
            got.append(message)

    async with served(app, **OPTIONS) as url, connect(url, compression=None) as client:
        burst(client, 2000)
        await eventually(lambda: bool(manager.get_sockets()) and manager.get_sockets()[0]._connection.pause is not None)
        connection = manager.get_sockets()[0]._connection
        assert connection.inbox.counted_bytes < limit
        assert len(connection.inbox) <= 257
        go.set()
        await eventually(lambda: len(got) == 2000)
        assert [int(message) for message in got] == list(range(2000))
        await eventually(lambda: connection.pause is None)
        await client.send("2000")  # reading has resumed
        await eventually(lambda: got[-1] == "2000")


@pytest.mark.parametrize("how", ["close frame", "abort"])
async def test_burst_before_disconnect_is_delivered(how: str) -> None:
    """Messages that wait for room when the client leaves arrive before the end of the connection."""
    manager = WebSocketConnectionManager(WebSocketConfig(handle_signals=False, inbox_max_messages=5))
    app = FastAPI(lifespan=manager.lifespan)
    go, got, reasons = asyncio.Event(), [], []

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        got.append(await ws.receive_text())
        await go.wait()
        async for message in ws:
            got.append(message)
        reasons.append(str(ws.reason and ws.reason.value))

    async with served(app, **OPTIONS) as url:
        client = await connect(url, compression=None)
        burst(client, 100)
        if how == "close frame":
            client.transport.write(Frame(Opcode.CLOSE, b"\x10\x1b").serialize(mask=True))
        await eventually(lambda: bool(got))
        if how == "abort":
            await eventually(lambda: manager.get_sockets()[0]._connection.pause is not None)
            manager.get_sockets()[0]._connection.server_transport.abort()
        go.set()
        await eventually(lambda: bool(reasons))
        assert [int(message) for message in got] == list(range(100))
        assert reasons == ["network_lost" if how == "abort" else "client_close"]
        client.transport.abort()


async def seen_after_long_pause(ws: str, *, wrapped: bool = False) -> list[Any]:
    """Fill the inbox of an endpoint that is busy for 3 s, and return what its client sees then.

    These are the echoes of all messages, and the close code after the client has stopped to answer pings.
    """
    manager = WebSocketConnectionManager(
        WebSocketConfig(handle_signals=False, inbox_max_messages=5, heartbeat_type="off")
    )
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        await ws.send(await ws.receive_text())
        await asyncio.sleep(3)
        async for message in ws:
            await ws.send(message)

    options = {"ws": ws, "ws_ping_interval": 0.5, "ws_ping_timeout": 0.5}
    seen: list[Any] = []
    async with served(Wrapped(app) if wrapped else app, **options) as url:
        client = await connect(url, compression=None, ping_interval=None)
        burst(client, 20)
        await eventually(lambda: bool(manager.get_sockets()) and manager.get_sockets()[0]._connection.pause is not None)
        try:
            seen += [int(await with_deadline(client.recv())) for _ in range(20)]
            (socket,) = manager.get_sockets()
            client.transport.pause_reading()  # the client does not see pings
            await with_deadline(socket.wait_closed())
            client.transport.resume_reading()
            await client.recv()
        except ConnectionClosed as closed:
            seen.append(closed.rcvd and closed.rcvd.code)
    return seen


@pytest.mark.skipif(not HAS_DIRECT_TRANSPORT, reason="uvicorn has no direct transport")
async def test_server_sends_no_pings_while_inbox_is_full() -> None:
    """uvicorn does not close for pongs that a full inbox keeps it from reading, and sends pings again after that."""
    whole = [*range(20), 1011]
    seen = await asyncio.gather(
        *(seen_after_long_pause(ws) for ws in ("websockets-sansio", "wsproto", PROTOCOL_CLASS)),
        seen_after_long_pause("websockets-sansio", wrapped=True),
    )
    assert seen == [whole] * 4


class LostTransport:
    """TLS transport of Python 3.10 after the connection was lost."""

    def resume_reading(self) -> None:
        raise AttributeError("'NoneType' object has no attribute 'resume_reading'")

    pause_reading = resume_reading


async def test_full_inbox_of_lost_tls_connection_is_no_bug() -> None:
    """A transport that cannot resume reading, because the connection was lost, is not reported as a bug."""
    manager = WebSocketConnectionManager(WebSocketConfig(handle_signals=False, inbox_max_messages=2))
    app = FastAPI(lifespan=manager.lifespan)
    go, got, events = asyncio.Event(), [], []
    manager.events.subscribe(lambda event: events.append(event.event))

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        got.append(await ws.receive_text())
        await go.wait()
        async for message in ws:
            got.append(message)

    async with served(app, **OPTIONS) as url:
        client = await connect(url, compression=None)
        burst(client, 10)
        await eventually(lambda: bool(manager.get_sockets()) and manager.get_sockets()[0]._connection.pause is not None)
        connection = manager.get_sockets()[0]._connection
        connection._reader._transport = LostTransport()  # type: ignore[assignment,union-attr]
        connection.server_transport.abort()
        go.set()
        await eventually(lambda: len(got) == 10)
        await eventually(lambda: not manager._node.connections)
        assert "internal_task_failed" not in events
        client.transport.abort()


async def test_close_of_application_arrives_without_task() -> None:
    """The close frame has the code and the reason of the application, and the answer ends the connection."""
    manager, app = make()
    async with served(app, **OPTIONS) as url:
        client = await connect(url)
        await eventually(lambda: manager.get_connection_count() == 1)
        await manager.disconnect("ann", 4000, "bye")
        with pytest.raises(ConnectionClosed) as closed:
            await with_deadline(client.recv())
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4000, "bye")
        await eventually(lambda: not manager._node.connections)


async def test_middleware_that_wraps_receive_sees_every_message() -> None:
    """Behind middleware that wraps `receive`, the connection reads with a task, through the middleware."""
    _, app = make()
    wrapped = Wrapped(app)
    async with served(wrapped, **OPTIONS) as url, connect(url) as client:
        await client.send("one")
        assert await with_deadline(client.recv()) == "one"
        assert (pumps(), wrapped.seen) == (1, 1)


async def test_message_received_before_connect_is_not_lost() -> None:
    """A message that waits in uvicorn's queue when the application calls `connect()` is the first one."""
    manager = WebSocketConnectionManager(WebSocketConfig(handle_signals=False))
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    async def endpoint(websocket: WebSocket, client_id: str) -> None:
        await websocket.accept()
        await websocket.receive_text()
        await asyncio.sleep(0.1)
        ws = await manager.connect(client_id, websocket)
        assert ws is not None
        for _ in range(2):
            await ws.send(await ws.receive_text())
        await manager.disconnect(client_id)

    async with served(app, **OPTIONS) as url, connect(url) as client:
        for message in ("first", "second", "third"):
            await client.send(message)
        assert [await with_deadline(client.recv()) for _ in range(2)] == ["second", "third"]


@pytest.mark.parametrize("then", ["more", "close frame", "abort"])
@pytest.mark.parametrize("ws", BOTH_CLASSES)
async def test_backlog_before_connect_waits_for_room(ws: str, then: str) -> None:
    """What waits in the server's queue at a late `connect()` enters the inbox as it has room, in order and whole."""
    manager = WebSocketConnectionManager(WebSocketConfig(handle_signals=False, inbox_max_messages=5))
    app = FastAPI(lifespan=manager.lifespan)
    filled, go, got, at_most = asyncio.Event(), asyncio.Event(), [], []

    @app.websocket("/ws/{client_id}")
    async def endpoint(websocket: WebSocket, client_id: str) -> None:
        await websocket.accept()
        queue = asgi_callables(websocket)[0].__self__.queue  # type: ignore[attr-defined]
        await eventually(lambda: queue.qsize() == 100)
        ws = await manager.connect(client_id, websocket)
        assert ws is not None
        inbox = ws._connection.inbox
        got.append(int(await ws.receive_text()))  # an endpoint that reads: nothing is dropped
        filled.set()
        await go.wait()
        async for message in ws:
            at_most.append(len(inbox))
            got.append(int(message))

    async with served(app, ws=ws) as url:
        client = await connect(url, compression=None)
        burst(client, 100)
        await with_deadline(filled.wait())
        await eventually(lambda: manager.get_sockets()[0]._connection.pause is not None)
        connection = manager.get_sockets()[0]._connection
        assert 5 <= len(connection.inbox) <= 6
        if then == "abort":
            connection.server_transport.abort()
        elif then == "close frame":
            client.transport.write(Frame(Opcode.CLOSE, b"\x10\x1b").serialize(mask=True))
        go.set()
        await eventually(lambda: len(got) == 100)
        if then == "more":
            assert max(at_most) <= 6
            await client.send("100")
            await eventually(lambda: len(got) == 101)
        assert got == list(range(len(got)))
        await client.close()
        await eventually(lambda: not manager._node.connections)


async def test_waiting_receive_keeps_reading_task() -> None:
    """A call of `receive` that waits when the application calls `connect()` gets the next message, and none is lost."""
    manager = WebSocketConnectionManager(WebSocketConfig(handle_signals=False))
    app = FastAPI(lifespan=manager.lifespan)
    first: list[str] = []

    @app.websocket("/ws/{client_id}")
    async def endpoint(websocket: WebSocket, client_id: str) -> None:
        await websocket.accept()
        waiting = asyncio.ensure_future(websocket.receive_text())
        await asyncio.sleep(0)
        ws = await manager.connect(client_id, websocket)
        assert ws is not None
        await ws.send("ready")
        first.append(await waiting)
        await ws.send(await ws.receive_text())
        await manager.disconnect(client_id)

    async with served(app, **OPTIONS) as url, connect(url) as client:
        assert await with_deadline(client.recv()) == "ready"
        assert pumps() == 1
        await client.send("first")
        await client.send("second")
        assert await with_deadline(client.recv()) == "second"
        assert first == ["first"]


@pytest.mark.parametrize("ws", BOTH_CLASSES)
async def test_woken_receive_gets_its_message(ws: str) -> None:
    """A call of `receive` whose message has just arrived returns it, though `connect()` runs first."""
    manager = WebSocketConnectionManager(WebSocketConfig(handle_signals=False))
    app = FastAPI(lifespan=manager.lifespan)
    first: list[str] = []

    @app.websocket("/ws/{client_id}")
    async def endpoint(websocket: WebSocket, client_id: str) -> None:
        await websocket.accept()
        waiting = asyncio.ensure_future(websocket.receive_text())
        await asyncio.sleep(0)
        arrived = asyncio.Event()
        queue = asgi_callables(websocket)[0].__self__.queue
        put_nowait = queue.put_nowait

        def put(event: Any) -> None:
            arrived.set()  # this endpoint runs before the task that waits for the message
            put_nowait(event)

        queue.put_nowait = put
        await arrived.wait()
        ws = await manager.connect(client_id, websocket)
        assert ws is not None
        first.append(await waiting)
        await ws.send(await ws.receive_text())
        await manager.disconnect(client_id)

    async with served(app, ws=ws) as url, connect(url) as client:
        await client.send("first")
        await eventually(lambda: bool(first))
        await client.send("second")
        assert await with_deadline(client.recv()) == "second"
        assert first == ["first"]


def test_class_that_uses_its_queue_differently_is_not_known() -> None:
    """A uvicorn whose methods no longer use the queue as expected falls back to the reading task."""
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    class Changed(WebSocketsSansIOProtocol):
        async def receive(self) -> Any:
            return None

    assert compat._is_known(WebSocketsSansIOProtocol)
    assert not compat._is_known(Changed)
