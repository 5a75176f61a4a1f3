"""Tests of what a drain reports. In virtual time; tests/live/test_drain.py has the servers and the signals."""

from __future__ import annotations

import asyncio

from fastapi_ws_stabilizer.connection.socket import StableSocket
from tests.unit.client.fake_link import soon, virtually
from tests.unit.routing.stage import Peer, Stage


@virtually
async def test_sessions_that_can_be_resumed_are_counted() -> None:
    """Those of clients that are there, which keep theirs, and of those that are away; not what has ended."""
    async with Stage(drain_window=1) as stage:
        await Peer(stage, "ann").dial()
        await (await Peer(stage, "bob").dial()).leaves()
        await (await Peer(stage, "eve").dial()).leaves(1000)
        stage.plain("plain")
        await soon()
        report = await stage.manager.drain(10)
        assert (report.closed_count, report.forced_count, report.resumable_count) == (2, 0, 2)


@virtually
async def test_what_is_not_over_in_time_is_forced() -> None:
    """An endpoint that does not end is cut when the time is over, and counted as failed and forced."""
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
async def test_a_second_drain_waits_for_the_first() -> None:
    """Both get the same report: a connection is counted once."""
    async with Stage(drain_window=1) as stage:
        stage.plain("ann")
        await soon()
        first, second = await asyncio.gather(stage.manager.drain(5), stage.manager.drain(5))
        assert first is second
        assert first.closed_count == 1
        assert (await stage.manager.graceful_shutdown(5)).closed_count == 1


@virtually
async def test_clients_with_a_session_are_asked_and_plain_ones_told_when_to_come_back() -> None:
    """`drain` with a moment of its own for the one, 1012 with `retry=` for the other."""
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
