"""Tests of the context variables of a manager's timers, tasks and hooks."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from typing import Any

import pytest

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.hub import reaper as lifetimes_module
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_websocket import FakeServer, eventually, with_deadline
from tests.unit.test_manager import Client

tenant: contextvars.ContextVar[Any] = contextvars.ContextVar("tenant", default="none")


class Tenant:
    """Value that a middleware sets in a context variable for one connection."""

    def __init__(self, name: str) -> None:
        self.name = name


def client_of(manager: WebSocketConnectionManager, name: str, value: Any = None) -> Client:
    """Return a client that sets a context variable in its handshake."""

    def dial() -> Client:
        tenant.set(name if value is None else value)
        return Client(manager, name)

    return contextvars.copy_context().run(dial)


async def has(client: Client, message: str) -> None:
    """Wait until a client has received a message."""
    await client.server.until(lambda: message in client.server.data)


async def test_heartbeat_payload_sees_context_of_its_connection(manager_with: Any) -> None:
    """`heartbeat_payload` is called with the context variables of its connection."""
    manager, _ = manager_with(
        heartbeat_type="custom",
        heartbeat_interval=0.02,
        heartbeat_timeout=5,
        heartbeat_payload=lambda ws: f"{ws.client_id} of {tenant.get()}",
    )
    clients = [client_of(manager, name) for name in ("ann", "bob", "cid")]
    for client in clients:
        await client.connected()
    for client in clients:
        await client.server.until(lambda server=client.server: len(server.data) >= 2)  # type: ignore[misc]
        assert set(client.server.data) == {f"{client.client_id} of {client.client_id}"}
        await client.disconnect()


OPTIONS: dict[str, dict[str, Any]] = {
    "the heartbeat": {"heartbeat_interval": 0.02, "heartbeat_timeout": 5, "heartbeat_type": "ping"},
    "max_lifetime": {"max_lifetime": 60},
    "idle_timeout": {"idle_timeout": 60},
    "presence_grace": {"presence_grace": 60},
    "max_total_memory": {"max_total_memory": 10_000_000},
}


@pytest.mark.parametrize("started", [True, False], ids=["started before", "started by the first connection"])
@pytest.mark.parametrize("option", OPTIONS)
async def test_manager_timers_do_not_hold_first_connection_context(option: str, started: bool) -> None:
    """No timer holds the context of a closed connection while others are connected."""
    manager = WebSocketConnectionManager(WebSocketConfig(**{"heartbeat_type": "off", **OPTIONS[option]}))
    if started:
        await manager.start()
    value = Tenant("ann")
    reference = weakref.ref(value)
    first = client_of(manager, "ann", value)
    del value
    ws = await first.connected()
    await ws.join("lobby")
    await ws.send("hello")
    await has(first, "hello")
    second = client_of(manager, "bob")
    await second.connected()
    await manager.broadcast("all")
    await has(first, "all")
    await first.disconnect()
    await eventually(lambda: not any(one.client_id == "ann" for one in manager._node.connections))
    del first, ws
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    assert reference() is None
    await second.disconnect()
    await manager.graceful_shutdown(1.0)


async def test_on_slow_runs_in_context_of_slow_client(manager_with: Any) -> None:
    """on_slow sees the context variables of the slow client, and not those of the sender."""
    manager, _ = manager_with(outbox_max_messages=2)
    seen: list[tuple[str, Any]] = []

    @manager.on_slow
    async def slow(ws: StableSocket) -> None:
        seen.append((ws.client_id, tenant.get()))

    ann = client_of(manager, "ann")
    await ann.connected()
    ann.server.block()
    tenant.set("publisher")
    for _ in range(6):
        await manager.broadcast("x")
        await asyncio.sleep(0)
    await eventually(lambda: bool(seen))
    assert set(seen) == {("ann", "ann")}
    ann.server.release()
    await with_deadline(ann.task)


async def test_slow_client_does_not_hold_publisher_context(manager_with: Any) -> None:
    """The task and the timers of a slow client do not hold the context of the sender."""
    manager, _ = manager_with()
    ann = client_of(manager, "ann")
    await ann.connected()
    ann.server.block()
    value = Tenant("publisher")
    reference = weakref.ref(value)

    async def publish(value: Tenant) -> None:
        tenant.set(value)
        for _ in range(3):
            await manager.broadcast("x")
            await manager.send_to_client("ann", "y")

    await asyncio.ensure_future(publish(value))
    del value
    await ann.server.until(lambda: bool(ann.server.offered))
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    assert reference() is None
    ann.server.release()
    await ann.disconnect()


async def test_timed_close_runs_hooks_in_connection_context(manager_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A close by a timer runs the disconnect hooks with the connection's own context variables."""
    monkeypatch.setattr(lifetimes_module, "COALESCE_DELAY", 0.0)
    manager, _ = manager_with(max_lifetime=0.05)
    seen: list[tuple[str, Any]] = []

    @manager.on_disconnect
    async def left(ws: StableSocket) -> None:
        seen.append((ws.client_id, tenant.get()))

    clients = [client_of(manager, name) for name in ("ann", "bob")]
    for client in clients:
        await client.connected()
    for client in clients:
        await with_deadline(client.task)
    await eventually(lambda: len(seen) == 2)
    assert sorted(seen) == [("ann", "ann"), ("bob", "bob")]


@pytest.mark.parametrize("by_hand", [False, True])
async def test_leftover_endpoint_task_does_not_hold_connection(manager_with: Any, *, by_hand: bool) -> None:
    """A task that outlives the endpoint that started it holds neither the connection nor its WebSocket."""
    manager, _ = manager_with()
    left_running: list[asyncio.Task[None]] = []

    @manager.on_connect
    async def start(ws: StableSocket) -> None:
        left_running.append(asyncio.ensure_future(asyncio.sleep(60)))

    client = Client(manager, "ann", by_hand=by_hand)
    ws = await client.connected()
    reference = weakref.ref(ws.websocket)
    await client.disconnect()
    await eventually(lambda: not manager._node.connections)
    del client, ws
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    assert reference() is None
    left_running[0].cancel()


async def test_task_serving_sockets_in_turn_holds_only_last_one(manager_with: Any) -> None:
    """A task's record of the connections that it has opened shrinks when it opens the next one."""
    manager, _ = manager_with()
    alive: list[weakref.ref[Any]] = []
    for number in range(5):
        server = FakeServer()
        async with manager.serve(server.websocket, f"client-{number}") as ws:
            alive.append(weakref.ref(ws.websocket))
            server.feed_disconnect(1001)
            await ws.wait_closed()
        await eventually(lambda: not manager._node.connections)
        del server, ws
    gc.collect()
    assert sum(one() is not None for one in alive) <= 1


async def test_task_of_adopted_connection_releases_it_at_its_end(manager_with: Any) -> None:
    """Without FastAPI a connection is referenced until its task ends, whichever of the two ends first."""
    manager, _ = manager_with()
    alive: list[weakref.ref[Any]] = []
    left_running: list[asyncio.Task[None]] = []

    async def serve_one(*, leave_first: bool) -> None:
        server = FakeServer()
        websocket = await server.accepted()
        alive.append(weakref.ref(websocket))
        await manager.connect(f"client-{leave_first}", websocket)
        left_running.append(asyncio.ensure_future(asyncio.sleep(60)))
        if leave_first:
            server.feed_disconnect(1001)
            await eventually(lambda: not manager._node.connections)

    for leave_first in (True, False):
        await asyncio.ensure_future(serve_one(leave_first=leave_first))
        await eventually(lambda: not manager._node.connections)
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    assert [one() for one in alive] == [None, None]
    for task in left_running:
        task.cancel()
