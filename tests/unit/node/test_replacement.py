"""Tests of the order of hooks when a client id connects again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Peer, Stage

REPLACED = [
    "connect ann",
    "disconnect ann replaced",
    "disconnect hook done",
    "session_end ann replaced",
    "connect ann",
]


def hold_disconnect_hooks(stage: Stage) -> None:
    """Register a disconnect hook that waits for the gate of the stage."""

    @stage.manager.on_disconnect
    async def slow(ws: StableSocket) -> None:
        await stage.gate.wait()
        stage.events.append("disconnect hook done")


async def manual_endpoint(stage: Stage, server: FakeServer) -> None:
    """Accept and connect a WebSocket explicitly, as an endpoint would."""
    websocket = await server.accepted()
    socket = await stage.manager.connect("ann", websocket)
    await socket.wait_closed()


async def dial(stage: Stage, kind: str, tasks: list[asyncio.Task[None]]) -> None:
    """Open another connection of the same client id."""
    if kind == "v1":
        await Peer(stage).dial()
    elif kind == "manual":
        task = asyncio.ensure_future(manual_endpoint(stage, FakeServer()))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        tasks.append(task)
    else:
        stage.plain()
    await soon()


kinds = pytest.mark.parametrize("kind", ["plain", "v1", "manual"])


@kinds
@virtually
async def test_replacement_waits_for_disconnect_hook_of_old(kind: str) -> None:
    """`on_connect` of a connection begins after `on_disconnect` of the connection that it replaces has returned."""
    async with Stage() as stage:
        tasks: list[asyncio.Task[None]] = []
        hold_disconnect_hooks(stage)
        await dial(stage, kind, tasks)
        await dial(stage, kind, tasks)
        await asyncio.sleep(5)
        assert stage.events == ["connect ann", "disconnect ann replaced"]
        stage.gate.set()
        await soon()
        assert stage.events == REPLACED


@kinds
@virtually
async def test_hanging_disconnect_hook_delays_replacement_by_grace(kind: str) -> None:
    """A disconnect hook that never returns delays the next connection by `disconnect_grace`, but not longer."""
    async with Stage(disconnect_grace=2) as stage:
        tasks: list[asyncio.Task[None]] = []
        hold_disconnect_hooks(stage)
        await dial(stage, kind, tasks)
        await dial(stage, kind, tasks)
        await asyncio.sleep(2.5)
        assert stage.events.count("connect ann") == 2


@pytest.mark.parametrize("policy", ["replace", "reject"])
@virtually
async def test_reconnect_waits_for_disconnect_hook_of_lost_connection(policy: str) -> None:
    """`on_disconnect` of a lost connection has returned before `on_connect` of the next one begins."""
    async with Stage(on_duplicate=policy) as stage:
        hold_disconnect_hooks(stage)
        line = stage.plain()
        await soon()
        await line.leaves()
        stage.plain()
        await soon()
        assert stage.events == ["connect ann", "disconnect ann network_lost"]
        stage.gate.set()
        await soon()
        assert stage.events[-2:] == ["session_end ann network_lost", "connect ann"]


@virtually
async def test_allowed_duplicates_do_not_wait_for_each_other() -> None:
    """With `on_duplicate="allow"` the connections of a client do not wait for each other's hooks."""
    async with Stage(on_duplicate="allow") as stage:
        hold_disconnect_hooks(stage)
        line = stage.plain()
        await soon()
        await line.leaves()
        stage.plain()
        await soon()
        assert stage.events[-1] == "connect ann"


@virtually
async def test_connection_replaced_while_waiting_runs_no_hooks() -> None:
    """A connection that is replaced before its `on_connect` began gets no hooks; the last one gets `on_connect`."""
    async with Stage() as stage:
        hold_disconnect_hooks(stage)
        for _ in range(4):
            stage.plain()
            await soon()
        stage.gate.set()
        await soon()
        assert stage.events == REPLACED


@virtually
async def test_other_clients_do_not_wait_for_disconnect_hooks() -> None:
    """A slow disconnect hook delays only connections of the same client id."""
    async with Stage() as stage:
        hold_disconnect_hooks(stage)
        stage.plain()
        await soon()
        stage.plain()
        stage.plain("bob")
        await soon()
        assert "connect bob" in stage.events


@virtually
async def test_client_leaving_while_waiting_runs_no_hooks() -> None:
    """A client that disconnects while its connection waits for the previous one runs no hooks."""
    async with Stage() as stage:
        hold_disconnect_hooks(stage)
        stage.plain()
        await soon()
        line: Any = stage.plain()
        await soon()
        await line.leaves()
        stage.gate.set()
        await soon()
        assert stage.events == REPLACED[:-1]
        assert stage.manager.get_connection_count() == 0


@virtually
async def test_new_session_waits_for_session_end_hook_of_detached_one() -> None:
    """`on_session_end` of a detached session that a new one replaces has returned before `on_connect` begins."""
    async with Stage() as stage:

        @stage.manager.on_session_end
        async def slow(ws: StableSocket) -> None:
            await stage.gate.wait()
            stage.events.append("session end hook done")

        await (await Peer(stage).dial()).leaves()
        await Peer(stage).dial()
        assert stage.events[-1] == "session_end ann replaced"
        stage.gate.set()
        await soon()
        assert stage.events[-2:] == ["session end hook done", "connect ann"]


def add_slow_hooks(stage: Stage, event: str, count: int) -> None:
    """Register teardown hooks that each take 0.9 s, within a grace of 1 s."""
    for number in range(count):

        async def slow(ws: StableSocket, *, number: int = number) -> None:
            await asyncio.sleep(0.9)
            stage.events.append(f"hook {number} done")

        getattr(stage.manager, event)(slow)


@pytest.mark.parametrize("event", ["on_disconnect", "on_session_end"])
@kinds
@virtually
async def test_replacement_waits_for_all_of_many_hooks(kind: str, event: str) -> None:
    """`on_connect` begins after the last teardown hook, for any number of hooks.

    Each hook is within its own limit, `disconnect_grace`.
    """
    async with Stage(disconnect_grace=1) as stage:
        tasks: list[asyncio.Task[None]] = []
        add_slow_hooks(stage, event, 9)
        await dial(stage, kind, tasks)
        await dial(stage, kind, tasks)
        await asyncio.sleep(20)
        assert stage.events[-1] == "connect ann"
        assert "hook 8 done" in stage.events


@virtually
async def test_reconnect_waits_for_hooks_queued_for_cleanup_slot() -> None:
    """`on_connect` begins after `on_disconnect`, also when that hook waits for the hooks of other clients."""
    async with Stage(disconnect_grace=1, max_concurrent_cleanup=1) as stage:
        add_slow_hooks(stage, "on_disconnect", 1)
        names = [f"client {number}" for number in range(8)]
        lines = [stage.plain(name) for name in names]
        await soon()
        for line in lines:
            await line.leaves()
        stage.events.clear()
        for name in names:
            stage.plain(name)
        await asyncio.sleep(20)
        hooks = [event.split()[0] for event in stage.events]
        done = [number for number, word in enumerate(hooks) if word == "hook"]
        connected = [number for number, word in enumerate(hooks) if word == "connect"]
        assert len(done) == len(connected) == len(names)
        assert all(before < after for before, after in zip(done, connected, strict=True))


@virtually
async def test_new_session_waits_for_many_hooks_of_detached_one() -> None:
    """`on_connect` of a new session begins after all `on_session_end` hooks of the detached one that it replaces."""
    async with Stage(disconnect_grace=1) as stage:
        add_slow_hooks(stage, "on_session_end", 9)
        await (await Peer(stage).dial()).leaves()
        stage.events.clear()
        await Peer(stage).dial()
        await asyncio.sleep(20)
        assert stage.events[-2:] == ["hook 8 done", "connect ann"]
