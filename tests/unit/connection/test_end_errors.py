"""Tests of calls on a closed connection: each raises again, and the event loop keeps running."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from fastapi_ws_stabilizer import scheduling
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.end_errors import IGNORED, PAUSE, SPINS
from fastapi_ws_stabilizer.errors import SocketClosed
from tests.support.fake_websocket import settle, with_deadline


async def ended(bench: Any, **options: Any) -> Any:
    """Return a closed connection."""
    b = bench(**options)
    await b.open()
    b.connection.close(DisconnectReason.APPLICATION)
    await with_deadline(b.connection.closed)
    return b


async def turns_of(*calls: Any) -> list[int]:
    """Return how many iterations of the event loop each call took."""
    scheduler = 0
    over = False

    async def count() -> None:
        nonlocal scheduler
        while not over:
            scheduler += 1
            await asyncio.sleep(0)

    async def make() -> list[int]:
        taken = []
        for call in calls:
            before = scheduler
            with pytest.raises(SocketClosed):
                await call()
            taken.append(scheduler - before)
        return taken

    counting = asyncio.ensure_future(count())
    taken = await asyncio.ensure_future(make())
    over = True
    await counting
    return taken


async def test_first_error_after_close_raises_without_yielding(bench: Any) -> None:
    """The first error in a task is raised without yielding to the event loop, later ones after a yield."""
    b = await ended(bench)
    socket = b.connection.socket
    assert await turns_of(socket.receive, lambda: socket.send("x"), socket.receive_json) == [0, 1, 1]


async def test_each_task_gets_first_close_error_without_yielding(bench: Any) -> None:
    """The errors of one task do not slow another one down."""
    b = await ended(bench)
    for _ in range(3):
        assert await turns_of(b.connection.socket.receive) == [0]


async def test_task_ignoring_close_yields_to_event_loop(bench: Any) -> None:
    """A loop that ignores the close yields to the event loop on later errors."""
    b = await ended(bench)
    count = 0

    async def spin() -> None:
        nonlocal count
        while True:
            try:
                await b.connection.socket.receive()
            except SocketClosed:
                count += 1

    task = asyncio.ensure_future(spin())
    await asyncio.wait({task}, timeout=0.5)
    task.cancel()
    await settle()
    assert IGNORED < SPINS <= count < SPINS + 50
    assert len(b.heard.of("end_ignored")) == 1


async def spin(*sockets: Any) -> None:
    """Catch all errors in an endless loop, and never wait."""
    while True:
        for socket in sockets:
            with contextlib.suppress(SocketClosed):
                await socket.send("x")


async def test_task_spinning_on_two_closed_connections_is_named(bench: Any) -> None:
    """A loop that ignores the close of several connections in turn is slowed down and logged with its coroutine."""
    benches = [await ended(bench), await ended(bench)]
    task = asyncio.ensure_future(spin(*(b.connection.socket for b in benches)))
    task.set_name("the publisher")
    await asyncio.wait({task}, timeout=0.5)
    task.cancel()
    await settle()
    for b in benches:
        (report,) = b.heard.of("end_ignored")
        assert report.fields["task"] == "the publisher"
        assert report.fields["coroutine"] == "spin"
        assert "endpoint" not in report.fields


async def rounds_among(bench: Any, between: Callable[[Any], Awaitable[None]], stale: int) -> tuple[float, list[Any]]:
    """Return the seconds that a publisher needs for 200 rounds after many earlier ones, and the log about it."""
    benches = [await ended(bench) for _ in range(stale)]
    live = bench()
    await live.open()
    for b in benches:  # as connections of one manager do
        b.connection.resources.scheduler = live.connection.resources.scheduler

    async def publish(rounds: int) -> None:
        for _ in range(rounds):
            for b in benches:
                with contextlib.suppress(SocketClosed):
                    await b.connection.socket.send("price")
            await between(live.connection.socket)

    async def measure() -> float:
        await publish(SPINS + 1)
        began = monotonic()
        await publish(100)
        return monotonic() - began

    seconds = await asyncio.ensure_future(measure())
    return seconds, [report for b in benches for report in b.heard.of("end_ignored")]


@pytest.mark.parametrize("stale", [1, IGNORED + 1])
@pytest.mark.parametrize("how", ["sleeps", "sends"])
async def test_publisher_to_some_closed_connections_is_not_slowed(bench: Any, how: str, stale: int) -> None:
    """A task that waits, or sends to open connections, between two errors is neither slowed down nor logged."""

    async def between(socket: Any) -> None:
        await (asyncio.sleep(0.0001) if how == "sleeps" else socket.send("price"))

    seconds, logged = await rounds_among(bench, between, stale)
    assert logged == []
    assert seconds < 100 * PAUSE


async def test_endpoint_sleeping_between_errors_is_named(bench: Any) -> None:
    """An endpoint that continues with its own closed connection is logged, even if it waits between the errors."""
    b = bench()

    async def endpoint() -> None:
        await b.open(cancellable=True)
        b.connection.close(DisconnectReason.APPLICATION)
        for _ in range(IGNORED):
            await asyncio.sleep(0.001)
            with contextlib.suppress(SocketClosed):
                await b.connection.socket.receive()
        b.connection.endpoint.mark_returned()

    await with_deadline(asyncio.ensure_future(endpoint()))
    (report,) = b.heard.of("end_ignored")
    assert report.fields["endpoint"] == b.connection.endpoint_name


async def test_closed_websocket_reads_unread_then_raises_disconnect(bench: Any) -> None:
    """Starlette's WebSocket returns unread messages after the close, then raises `WebSocketDisconnect` each time."""
    b = bench()
    await b.open()
    b.server.feed_text("1", "2")
    b.server.feed_disconnect(1001)
    await with_deadline(b.connection.closed)
    websocket = b.connection.websocket
    assert isinstance(websocket, WebSocket)
    assert websocket.client_state is WebSocketState.CONNECTED
    assert [await websocket.receive_text(), await websocket.receive_text()] == ["1", "2"]
    for _ in range(3):
        with pytest.raises(WebSocketDisconnect) as caught:
            await websocket.receive_text()
        assert caught.value.code == 1001
        assert websocket.client_state is WebSocketState.DISCONNECTED


async def test_closed_websocket_keeps_application_class(bench: Any) -> None:
    """A WebSocket of an application's class keeps that class after the close."""

    class Own(WebSocket):
        """WebSocket class of an application."""

        name = "own"

    b = bench()
    await b.server.accepted()
    b.server.websocket.__class__ = Own
    await b.open(accept=False)
    b.connection.open()
    b.connection.close(DisconnectReason.APPLICATION)
    await with_deadline(b.connection.closed)
    assert isinstance(b.connection.websocket, Own)
    assert b.connection.websocket.client_state is WebSocketState.DISCONNECTED


@pytest.mark.parametrize("how", ["send", "receive"])
async def test_loss_that_waits_for_its_turn_closes_socket(
    bench: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Code that uses a lost connection gets `SocketClosed`, also while the loss waits behind very many others."""
    b = bench()
    await b.open()
    monkeypatch.setattr(scheduling, "MAX_BLOCK", -1.0)  # one loss in each iteration of the event loop
    closings = b.connection.resources.closings
    for _ in range(20):
        closings.run(int)
    b.server.feed_disconnect(1001)
    while len(closings) < 10 or not b.connection.outbox._shut:  # the reader has noticed the loss
        await asyncio.sleep(0)
    assert b.connection.close_info is None
    socket = b.connection.socket
    with pytest.raises(SocketClosed) as raised:
        await with_deadline(socket.send("x") if how == "send" else socket.receive())
    assert raised.value.code == 1001
