"""Tests of maximum lifetimes and idle timeouts, in virtual time."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from fastapi_ws_stabilizer.hub.reaper import CHECKS_PER_TIMEOUT, DRAIN_LEAD, JITTER
from tests.support.fake_link import soon, virtually
from tests.support.stage import Line, Peer, Stage
from tests.unit.node.test_python_client import World


async def seconds_until_closed(line: Line, most: float) -> float:
    """Return the seconds until a connection closes, to a twentieth of a second."""
    started = asyncio.get_running_loop().time()
    while line.close_code is None and asyncio.get_running_loop().time() - started < most:
        await asyncio.sleep(0.05)
    return asyncio.get_running_loop().time() - started


# ── maximum lifetime ──


@virtually
async def test_max_lifetime_closes_with_1001_in_time() -> None:
    """A busy connection closes too, at most a tenth early and a moment late."""
    async with Stage(max_lifetime=100) as stage:
        lines = [stage.plain(f"client {number}") for number in range(40)]
        await soon()
        lasted = [await seconds_until_closed(lines[0], 200)]
        await asyncio.sleep(100.5 - lasted[0])
        assert {line.server.close_frames[-1] for line in lines} == {(1001, "maximum lifetime reached")}
        assert 100 * (1 - JITTER) - DRAIN_LEAD <= lasted[0] <= 100
        assert stage.events.count("disconnect client 1 lifetime") == 1


@virtually
async def test_max_lifetime_closes_are_spread_over_time() -> None:
    """A hundred connections of one moment close at different times within a tenth of their lifetime."""
    async with Stage(max_lifetime=100) as stage:
        lines = [stage.plain(f"client {number}") for number in range(100)]
        await soon()
        await asyncio.sleep(100 * (1 - JITTER) - DRAIN_LEAD - 0.5)
        counts = []
        for _ in range(21):
            counts.append(sum(line.close_code is not None for line in lines))
            await asyncio.sleep(0.6)
        assert (counts[0], counts[-1]) == (0, 100)
        assert max(later - earlier for earlier, later in itertools.pairwise(counts)) < 25


@virtually
async def test_max_lifetime_sends_drain_to_v1_client_before_close() -> None:
    """The client gets `drain`, and is closed only if it does not reconnect; its session continues."""
    async with Stage(max_lifetime=100) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        while not line.of("drain"):
            await asyncio.sleep(0.05)
        assert line.of("drain")[-1] == {"type": "drain", "after": 0, "within": 1000, "why": "lifetime"}
        assert DRAIN_LEAD <= await seconds_until_closed(line, 10) + 0.1 <= DRAIN_LEAD + 0.4
        assert line.close_code == 1001
        assert (await peer.dial()).outcome == "full"


@virtually
async def test_reconnects_after_max_lifetime_lose_no_message() -> None:
    """Over ten lifetimes no message is lost, and the client is disconnected for no noticeable time."""
    async with World(max_lifetime=20) as world, world.client() as client:
        for number in range(200):
            await client.send(number, event="note")
            await asyncio.sleep(1)
        assert world.notes == list(range(200))
        assert 8 <= client.attempts <= 14
        assert set(world.outcomes[1:]) == {"full"}
        assert world.gaps == []


@virtually
async def test_client_closing_after_drain_has_cause_lifetime() -> None:
    """A client that closes because of `max_lifetime` has the cause `lifetime` in hooks and counters."""
    async with World(max_lifetime=20) as world, world.client() as client:
        while client.attempts < 3:
            await asyncio.sleep(1)
        gone = [event for event in world.events if event.startswith("disconnect")]
        assert gone[:2] == ["disconnect ann lifetime"] * 2


# ── idle timeout ──


@virtually
async def test_idle_timeout_closes_with_1001() -> None:
    """The close comes after idle_timeout and at most a quarter later; heartbeats are not messages."""
    async with Stage(idle_timeout=40, heartbeat_type="ping", heartbeat_interval=1, require_pong=False) as stage:
        line = stage.plain()
        await soon()
        assert 40 <= await seconds_until_closed(line, 100) <= 40 * (1 + 1 / CHECKS_PER_TIMEOUT) + 0.2
        assert line.server.close_frames == [(1001, "idle")]
        assert "disconnect ann idle" in stage.events


@pytest.mark.parametrize("session", [False, True], ids=["plain", "v1"])
@pytest.mark.parametrize("direction", ["in", "out", "broadcast", "volatile"])
@virtually
async def test_message_in_either_direction_resets_idle_timeout(direction: str, session: bool) -> None:
    """A message in either direction restarts the timeout, with or without a number."""
    async with Stage(idle_timeout=40) as stage:
        line = await Peer(stage).dial() if session else stage.plain()
        await soon()
        for number in range(10):
            await asyncio.sleep(30)
            if direction == "in" and session:
                await line.message("note", number, first=number + 1)
            elif direction == "in":
                await line.say({"type": "note"})
            elif direction == "broadcast":
                await stage.manager.broadcast("x")
            else:
                await stage.socket().send("x", volatile=direction == "volatile")
        assert line.close_code is None
        assert await seconds_until_closed(line, 100) <= 40 * (1 + 1 / CHECKS_PER_TIMEOUT) + 0.2


@virtually
async def test_protocol_pings_do_not_reset_idle_timeout() -> None:
    """Protocol pings are sent like messages, but do not count as one."""
    async with Stage(idle_timeout=40, heartbeat_type="ping", heartbeat_interval=1) as stage:
        line = await Peer(stage).dial()
        for _ in range(60):
            await asyncio.sleep(1)
            if line.close_code is not None:
                break
            await line.say({"type": "pong"})
        assert line.close_code == 1001


# ── cost ──


@virtually
async def test_reaper_without_options_holds_no_entry() -> None:
    """Without the options a connection has no entry and no timer."""
    async with Stage() as stage:
        stage.plain()
        await soon()
        reaper = stage.manager._node.reaper
        assert (len(reaper), reaper._heap.timer, len(reaper._heap._entries)) == (0, None, 0)


@virtually
async def test_closed_connections_leave_reaper_immediately() -> None:
    """A thousand short connections leave no entries until their timeout."""
    async with Stage(max_lifetime=3600) as stage:
        for number in range(300):
            line = stage.plain(f"client {number}")
            await soon()
            await line.leaves(1000)
        await soon()
        reaper = stage.manager._node.reaper
        assert len(reaper) == 0
        assert len(reaper._heap._entries) <= 65
        assert all(deadline.recipient is None for deadline in reaper._heap._entries)
