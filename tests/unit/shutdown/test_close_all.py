"""Tests of closing all connections within a time limit."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from fastapi_ws_stabilizer import scheduling as scheduling_module
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.shutdown.drain import ShutdownReport, close_all
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_websocket import eventually, settle, with_deadline


async def test_close_all_without_connections_returns_immediately() -> None:
    """Without connections there is nothing to do."""
    report = await close_all([], 1.0)
    assert (report.closed_count, report.failed_count) == (0, 0)
    assert report.duration_seconds < 0.5


async def test_shutdown_sends_queued_messages_then_closes_1012(bench: Any) -> None:
    """A shutdown loses no queued message and closes with 1012."""
    benches = [bench() for _ in range(3)]
    connections = [(await b.open())[0] for b in benches]
    for connection in connections:
        connection.enqueue(encode("last"))
    report = await with_deadline(close_all(connections, 5.0))
    assert (report.closed_count, report.failed_count) == (3, 0)
    for b in benches:
        assert b.server.data == ["last"]
        assert b.server.close_frames == [(1012, "server shutdown")]
        assert b.connection.close_info.cause is DisconnectReason.SERVER_SHUTDOWN


async def test_stalled_connection_is_aborted_at_timeout(bench: Any) -> None:
    """A stalled client counts as failed at the timeout, its transport is aborted, and its endpoint cancelled."""
    aborted: list[str] = []
    good, stalled = bench(), bench(send_timeout=60, disconnect_grace=60)
    stalled.server.transport = SimpleNamespace(abort=lambda: aborted.append("stuck"))
    await good.open()

    async def endpoint() -> str:
        await stalled.open(cancellable=True)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "cancelled"
        return "returned"

    task = asyncio.ensure_future(endpoint())
    await eventually(lambda: stalled.heard.of("connection_opened"))
    stalled.server.block()
    report = await with_deadline(close_all([good.connection, stalled.connection], 0.05))
    assert (report.closed_count, report.failed_count) == (1, 1)
    assert 0.04 < report.duration_seconds < 2.0
    assert aborted == ["stuck"]
    assert await with_deadline(task) == "cancelled"


async def test_closing_connection_is_awaited_but_not_counted(bench: Any) -> None:
    """A connection that is already closing keeps its cause, and the shutdown waits for it."""
    b = bench(disconnect_grace=5)
    gate = asyncio.Event()

    async def hook(_: Any) -> None:
        await gate.wait()

    b.listener.disconnect_hook = hook
    connection, _ = await b.open()
    connection.disconnect_hooks_pending = True
    b.server.feed_disconnect(1001)
    await with_deadline(connection.wait_closing())
    closing = asyncio.ensure_future(close_all([connection], 5.0))
    await settle()
    assert not closing.done()
    gate.set()
    report = await with_deadline(closing)
    assert (report.closed_count, report.failed_count) == (0, 0)
    assert connection.close_info.cause is DisconnectReason.CLIENT_CLOSE


async def test_connections_are_closed_concurrently(bench: Any) -> None:
    """A stalled client does not delay the close frames of others."""
    stalled, good = bench(send_timeout=60), bench()
    await stalled.open()
    await good.open()
    stalled.server.block()
    closing = asyncio.ensure_future(close_all([stalled.connection, good.connection], 5.0))
    await with_deadline(good.connection.closed)
    assert good.server.close_frames == [(1012, "server shutdown")]
    assert not closing.done()
    stalled.server.release()
    assert (await with_deadline(closing)).closed_count == 2


async def test_closing_many_connections_yields_to_event_loop(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks run between two closes after a long block, and all connections are closed in the end."""
    monkeypatch.setattr(scheduling_module, "MAX_BLOCK", -1.0)
    connections = [(await bench().open())[0] for _ in range(3)]
    closing = asyncio.ensure_future(close_all(connections, 5.0))
    ended = []
    for _ in range(3):
        await asyncio.sleep(0)
        ended.append(sum(connection.close_info is not None for connection in connections))
    assert ended == [1, 2, 3]
    assert (await with_deadline(closing)).closed_count == 3


def test_default_shutdown_report_is_empty() -> None:
    """A report can be created without numbers."""
    assert ShutdownReport() == ShutdownReport(closed_count=0, failed_count=0, duration_seconds=0.0)
