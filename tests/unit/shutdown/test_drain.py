"""Tests of the report of a drain, in virtual time. Servers and signals are tested in tests/live/test_drain.py."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Peer, Stage


@virtually
async def test_drain_report_counts_resumable_sessions() -> None:
    """Sessions of connected clients and detached sessions count, ended ones do not."""
    async with Stage(drain_window=1) as stage:
        await Peer(stage, "ann").dial()
        await (await Peer(stage, "bob").dial()).leaves()
        await (await Peer(stage, "eve").dial()).leaves(1000)
        stage.plain("plain")
        await soon()
        report = await stage.manager.drain(10)
        assert (report.closed_count, report.forced_count, report.resumable_count) == (2, 0, 2)


@virtually
async def test_connection_over_drain_timeout_is_forced() -> None:
    """An endpoint that does not return is cut at the timeout, and counted as failed and forced."""
    async with Stage(drain_window=0, disconnect_grace=60) as stage:

        async def stays(ws: StableSocket) -> None:
            await asyncio.sleep(30)

        stage.endpoint = stays
        stage.plain("slow")
        await soon()
        report = await stage.manager.drain(2)
        assert (report.closed_count, report.failed_count, report.forced_count) == (0, 1, 1)
        assert 2 <= report.duration_seconds < 3


@virtually
async def test_concurrent_drains_return_same_report() -> None:
    """Both calls return the same report, so each connection is counted once."""
    async with Stage(drain_window=1) as stage:
        stage.plain("ann")
        await soon()
        first, second = await asyncio.gather(stage.manager.drain(5), stage.manager.drain(5))
        assert first is second
        assert first.closed_count == 1
        assert (await stage.manager.graceful_shutdown(5)).closed_count == 1


@virtually
async def test_drain_sends_drain_frame_to_v1_and_1012_to_plain() -> None:
    """A v1 client gets `drain` with its own delay, a plain client 1012 with `retry=`."""
    async with Stage(drain_window=2) as stage:
        line = await Peer(stage, "ann").dial()
        plain = stage.plain("bob")
        await soon()
        await stage.manager.drain(10)
        asked = line.of("drain")[-1]
        assert asked["why"] == "restart"
        assert 0 <= asked["after"] <= asked["within"]
        ((code, reason),) = plain.server.close_frames
        assert code == 1012
        assert reason.startswith("server shutdown; retry=")


@virtually
async def test_slow_reader_gets_all_messages_during_drain() -> None:
    """A client that reads one message in a third of a second gets all; only a client that does not read is cut."""
    async with Stage(drain_window=0) as stage:
        line = stage.plain("slow")
        await soon()
        (connection,) = stage.manager._node.connections
        send = connection.outbox._send

        async def slowly(message: dict[str, object]) -> None:
            await asyncio.sleep(0.3)
            await send(message)

        connection.outbox._send = slowly
        for number in range(20):
            await stage.manager.send_to_client("slow", {"n": number})
        report = await stage.manager.drain(30)
        assert len(line.server.data) == 20
        assert line.close_code == 1012
        assert (report.closed_count, report.forced_count) == (1, 0)


@virtually
async def test_second_drain_with_shorter_timeout_shortens_first() -> None:
    """A shutdown with two seconds does not wait for a drain with five minutes."""
    async with Stage(drain_window=10, disconnect_grace=400) as stage:

        async def stays(ws: StableSocket) -> None:
            await asyncio.sleep(1000)

        stage.endpoint = stays
        for number in range(100):
            stage.plain(f"client {number}")
        await soon()
        loop = asyncio.get_running_loop()
        patient = asyncio.ensure_future(stage.manager.drain(300))
        await asyncio.sleep(0.1)
        since = loop.time()
        report = await stage.manager.drain(2)
        assert loop.time() - since <= 2.1
        assert await patient is report
        assert report.forced_count == 100


@virtually
async def test_short_drain_timeout_is_respected() -> None:
    """Neither the drain frames nor the close handshakes make it longer."""
    async with Stage(drain_window=10, disconnect_grace=400) as stage:

        async def stays(ws: StableSocket) -> None:
            await asyncio.sleep(1000)

        stage.endpoint = stays
        for number in range(200):
            stage.plain(f"client {number}")
        await Peer(stage, "ann").dial()
        loop = asyncio.get_running_loop()
        since = loop.time()
        await stage.manager.drain(0.5)
        assert loop.time() - since <= 0.6


@virtually
async def test_start_during_drain_resumes_accepting() -> None:
    """Connections that are still open stay, and new ones are accepted."""
    async with Stage(drain_window=10) as stage:
        for number in range(500):
            stage.plain(f"client {number}")
        await soon()
        draining = asyncio.ensure_future(stage.manager.drain(30))
        await asyncio.sleep(1)
        await stage.manager.start()
        new = stage.plain("new")
        await asyncio.sleep(20)
        assert (await draining).closed_count < 250
        assert new.close_code is None
        assert stage.manager.get_connection_count() > 250


@virtually
async def test_shutdown_after_cancelled_drain_closes_all() -> None:
    """After a cancelled drain a shutdown still works."""
    async with Stage(drain_window=10) as stage:
        for number in range(100):
            stage.plain(f"client {number}")
        await soon()
        first = asyncio.ensure_future(stage.manager.drain(30))
        await asyncio.sleep(0.1)
        for task in stage.manager._shutdown._tasks.tasks:
            task.cancel()
        await asyncio.wait([first])
        report = await stage.manager.graceful_shutdown(5)
        assert report.closed_count + report.failed_count > 0
        assert stage.manager.get_connection_count() == 0


@virtually
async def test_drain_returns_when_last_client_has_left() -> None:
    """A drain with a single v1 client that reconnects at once takes no noticeable time."""
    async with Stage(drain_window=10) as stage:
        line = await Peer(stage, "ann").dial()
        loop = asyncio.get_running_loop()
        since = loop.time()
        draining = asyncio.ensure_future(stage.manager.drain(30))
        await soon()
        asked = line.of("drain")[-1]
        assert asked["within"] == asked["after"] + 1000
        await line.leaves(4000)
        await draining
        assert loop.time() - since < 0.3


@virtually
async def test_client_closing_after_drain_has_cause_server_shutdown() -> None:
    """A client that closes with 4000 after a drain frame has the cause `server_shutdown` in all hooks and counters."""
    async with Stage(drain_window=2) as stage:
        line = await Peer(stage).dial()
        draining = asyncio.ensure_future(stage.manager.drain(10))
        await soon()
        await line.leaves(4000)
        await draining
        await stage.manager.graceful_shutdown(1)
        assert stage.events[1:] == ["disconnect ann server_shutdown", "session_end ann server_shutdown"]
        endings = {reason.value: count for reason, count in stage.manager.counters.endings.items()}
        assert endings == {"server_shutdown": 1}
        assert line.socket is not None
        assert line.socket.close_info is not None
        assert (line.socket.close_info.code, line.socket.close_info.by_peer) == (4000, True)


@pytest.mark.parametrize(("code", "reason"), [(1000, "client_close"), (4321, "client_close"), (1006, "network_lost")])
@virtually
async def test_client_closing_otherwise_during_drain_retains_cause(code: int, reason: str) -> None:
    """A client that closes with another code, or is lost, during a drain keeps its own cause."""
    async with Stage(drain_window=2) as stage:
        line = await Peer(stage).dial()
        draining = asyncio.ensure_future(stage.manager.drain(10))
        await soon()
        await line.leaves(code)
        await draining
        assert stage.events[1] == f"disconnect ann {reason}"


@virtually
async def test_client_closing_without_drain_has_cause_client_close() -> None:
    """A client that closes with 4000 without a drain frame has `client_close`, and its session continues."""
    async with Stage() as stage:
        peer = Peer(stage)
        await (await peer.dial()).leaves(4000)
        assert stage.events[1] == "disconnect ann client_close"
        assert (await peer.dial()).outcome == "full"


@pytest.mark.parametrize("call", ["drain", "graceful_shutdown"])
@virtually
async def test_drain_in_endpoint_waits_for_other_connections(call: str) -> None:
    """A drain in an endpoint returns when the others have closed; its own connection closes when it continues."""
    async with Stage(drain_window=1, disconnect_grace=20) as stage:
        events: list[Any] = []
        loop = asyncio.get_running_loop()

        async def endpoint(ws: StableSocket) -> None:
            if ws.client_id != "admin":
                await ws.run()
                return
            await ws.receive()
            since = loop.time()
            events.append(await getattr(stage.manager, call)(30))
            events.append(loop.time() - since)

        stage.endpoint = endpoint
        others = [stage.plain(f"client {number}") for number in range(50)]
        admin = stage.plain("admin")
        await soon()
        await admin.say("drain")
        await asyncio.sleep(5)
        report, took = events
        assert (report.closed_count, report.failed_count) == (50, 0)
        assert took < 2
        assert {line.close_code for line in [*others, admin]} == {1012}
        assert stage.events.count("disconnect admin server_shutdown") == 1
        assert not stage.manager._node.connections


async def test_shutdown_in_task_of_explicit_connection_waits_for_it() -> None:
    """A shutdown in a task that has called `connect` outside of FastAPI waits for that connection too."""
    manager = WebSocketConnectionManager(WebSocketConfig(disconnect_grace=0.1))
    server = FakeServer()
    await manager.connect("ann", await server.accepted())
    report = await manager.graceful_shutdown(5)
    assert report.closed_count == 1
    assert not manager._node.connections
    assert manager._shutdown._tasks.tasks == []


@virtually
async def test_drain_in_disconnect_hook_does_not_wait_for_itself() -> None:
    """A drain in a disconnect hook returns when the other connections have closed."""
    async with Stage(drain_window=1, disconnect_grace=20) as stage:
        loop = asyncio.get_running_loop()
        took: list[float] = []

        @stage.manager.on_disconnect
        async def last_one(ws: StableSocket) -> None:
            if ws.client_id == "admin":
                since = loop.time()
                await stage.manager.drain(30)
                took.append(loop.time() - since)

        other, admin = stage.plain("other"), stage.plain("admin")
        await soon()
        await admin.leaves()
        await asyncio.sleep(5)
        assert len(took) == 1
        assert took[0] < 2
        assert other.close_code == 1012
