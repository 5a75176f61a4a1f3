"""Property: after random activity of clients and the end of all their sessions, no memory is held."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import HTTPException

from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.errors import MemoryLimitExceededError, WebSocketStabilizerError
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Line, Peer, Stage
from tests.support.virtual_time import run_virtually

BIG = "x" * 10_000
CLIENTS = 8
STEPS = 120
SEEDS = range(12)

OPTIONS: dict[str, dict[str, Any]] = {
    "no limits": {},
    "no sessions": {"enable_reconnect": False},
    "small budget": {"max_total_memory": 60_000},
    "small budget, no sessions": {"max_total_memory": 60_000, "enable_reconnect": False},
    "small share": {"max_memory_per_connection": 8_000, "max_total_memory": 200_000},
    "several tabs": {"on_duplicate": "allow", "max_total_memory": 100_000, "memory_eviction_policy": "oldest"},
    "dropping": {"outbox_overflow": "drop_oldest", "max_total_memory": 80_000, "memory_eviction_policy": "fifo"},
    "few detached": {"max_detached_sessions": 2, "session_ttl": 5.0},
}


class Churn:
    """Manager with clients that act at random."""

    def __init__(self, seed: int, **options: Any) -> None:
        self.dice = random.Random(seed)
        self.stage = Stage(
            **{
                "outbox_max_messages": 6,
                "replay_max_messages": 6,
                "inbox_max_messages": 4,
                "session_ttl": 20.0,
                "send_timeout": 5.0,
                "disconnect_grace": 1.0,
                "room_history": 0,
                "presence_grace": 1.0,
                "log_level": "CRITICAL",
                **options,
            }
        )
        self.peers: dict[str, Peer] = {}
        self.tokens: dict[str, str] = {}
        self.sockets: list[StableSocket] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.stage.endpoint = self._endpoint
        self.stage.manager.on_connect(self._connected)
        self.stage.manager.on_resume(self._connected)
        self.stage.manager.on_slow(self._slow)
        self.stage.manager.on_disconnect(self._disconnected)
        self.stage.manager.on_session_end(self._disconnected)

    # ── application ──

    async def _connected(self, ws: StableSocket) -> None:
        self.sockets.append(ws)
        how = self.dice.random()
        if how < 0.15:
            await asyncio.sleep(self.dice.uniform(0, 3))
        elif how < 0.2:
            raise HTTPException(403)
        elif how < 0.25:
            ws.user_data["connected"] = BIG[:500]

    async def _endpoint(self, ws: StableSocket) -> None:
        how = self.dice.random()
        if how < 0.6:
            await ws.run()
        elif how < 0.8:
            await asyncio.sleep(self.dice.uniform(0, 30))
        else:
            await ws.wait_closed()
            ws.user_data["late"] = BIG[:500]

    async def _slow(self, ws: StableSocket, how: SlowConsumer) -> None:
        ws.user_data["slow"] = how.value
        await ws.send("you are slow")

    async def _disconnected(self, ws: StableSocket) -> None:
        with contextlib.suppress(MemoryLimitExceededError):
            ws.user_data["gone"] = BIG[:300]
            ws.metadata["gone"] = BIG[:300]

    # ── clients ──

    def _name(self) -> str:
        return f"c{self.dice.randrange(CLIENTS)}"

    def _line(self) -> Line | None:
        return self.dice.choice(self.stage.lines) if self.stage.lines else None

    def _socket(self) -> StableSocket | None:
        return self.dice.choice(self.sockets) if self.sockets else None

    async def dials(self) -> None:
        client_id = self._name()
        if self.dice.random() < 0.6:
            peer = self.peers.setdefault(client_id, Peer(self.stage, client_id))
            await peer.dial(self.dice.choice((0, 0, 3)))
        else:
            self.stage.plain(client_id, token=self.tokens.pop(client_id, None))

    async def connect_explicitly(self) -> None:
        server = FakeServer()
        websocket, client_id = await server.accepted(), self._name()
        with contextlib.suppress(WebSocketStabilizerError):
            ws = await self.stage.manager.connect(client_id, websocket, {"about": BIG[: self.dice.randrange(9_000)]})
            line = Line.__new__(Line)
            line.server, line.socket = server, ws
            self.stage.lines.append(line)

    async def request_token(self) -> None:
        ws, client_id = self._socket(), self._name()
        if ws is not None and self.dice.random() < 0.5:
            self.tokens[ws.client_id] = ws.reconnect_token()
        self.tokens[client_id] = self.stage.manager.generate_reconnect_token(client_id)

    async def leaves(self) -> None:
        if (line := self._line()) is not None:
            line.server.feed_disconnect(self.dice.choice((1000, 1001, 1006, 4000)))

    async def fails(self) -> None:
        if (line := self._line()) is not None:
            line.server.fail(OSError("broken pipe"))

    async def stops_reading(self) -> None:
        if (line := self._line()) is not None:
            line.server.block()

    async def reads_again(self) -> None:
        if (line := self._line()) is not None:
            line.server.release()

    async def says(self) -> None:
        if (line := self._line()) is not None:
            data = BIG[: self.dice.randrange(4_000)]
            seq = self.dice.randrange(1, 6)
            line.server.feed_text(
                *[f'{{"type":"msg","seq":{seq},"event":"note","data":"{data}"}}'] * self.dice.randrange(1, 4)
            )

    async def acknowledges(self) -> None:
        if (line := self._line()) is not None:
            line.server.feed_text(f'{{"type":"ack","seq":{self.dice.randrange(4)}}}')

    async def send_direct(self) -> None:
        ws = self._socket()
        if ws is not None:
            self.tasks.append(asyncio.ensure_future(ws.send(BIG[: self.dice.randrange(6_000)])))

    async def send_broadcast(self) -> None:
        options: dict[str, Any] = {"room": self.dice.choice((None, "lobby"))}
        if self.dice.random() < 0.3:
            options["coalesce_key"] = "price"
        if self.dice.random() < 0.2:
            options["volatile"] = True
        await self.stage.manager.broadcast(BIG[: self.dice.randrange(6_000)], **options)

    async def store_data(self) -> None:
        ws = self._socket()
        if ws is not None:
            data = self.dice.choice((ws.user_data, ws.metadata))
            data[self.dice.choice("abc")] = [BIG[: self.dice.randrange(7_000)]]

    async def joins(self) -> None:
        ws = self._socket()
        if ws is not None:
            await ws.join(self.dice.choice(("lobby", "kitchen")), {"about": BIG[: self.dice.randrange(5_000)]})

    async def leave_room(self) -> None:
        ws = self._socket()
        if ws is not None:
            await ws.leave(self.dice.choice(("lobby", "kitchen")))

    async def set_presence(self) -> None:
        self.stage.manager.room("lobby").set_presence(self._name(), about=BIG[: self.dice.randrange(5_000)])

    async def set_presence_of_detached(self) -> None:
        detached = self.stage.manager._node.detached
        for client_id in sorted({one.client_id for one in detached.states._states.values()} | set(self.peers)):
            if detached.of_client(client_id):
                room = self.stage.manager.room(self.dice.choice(("lobby", "kitchen")))
                room.set_presence(client_id, about=BIG[: self.dice.randrange(5_000)])

    async def is_kicked(self) -> None:
        await self.stage.manager.disconnect(self._name())

    async def room_is_closed(self) -> None:
        room = self.stage.manager.room("lobby")
        await self.dice.choice((room.close, room.disconnect))()

    async def time_passes(self) -> None:
        await asyncio.sleep(self.dice.choice((0.1, 1.0, 4.0, 15.0)))

    async def step(self) -> None:
        """Run one random action."""
        actions: tuple[Callable[[], Awaitable[None]], ...] = (
            *(self.dials,) * 4,
            self.connect_explicitly,
            self.request_token,
            *(self.leaves,) * 2,
            self.fails,
            *(self.stops_reading,) * 2,
            self.reads_again,
            *(self.says,) * 2,
            self.acknowledges,
            *(self.send_direct,) * 3,
            *(self.send_broadcast,) * 4,
            *(self.store_data,) * 2,
            *(self.joins,) * 2,
            self.leave_room,
            self.set_presence,
            self.set_presence_of_detached,
            self.is_kicked,
            self.room_is_closed,
            *(self.time_passes,) * 2,
        )
        with contextlib.suppress(WebSocketStabilizerError, MemoryLimitExceededError):
            await self.dice.choice(actions)()
        if self.dice.random() < 0.7:
            await soon()

    async def disconnect_all(self) -> None:
        """Break all connections, and wait until all sessions have expired."""
        self.stage.gate.set()
        for line in self.stage.lines:
            line.server.feed_disconnect(1006)
            line.server.release()
        await asyncio.sleep(300)
        endpoints = [line.task for line in self.stage.lines if hasattr(line, "task")]  # some servers fail in the accept
        await asyncio.gather(*self.tasks, *endpoints, return_exceptions=True)
        self.stage.lines.clear()


def check_nothing_is_held(stage: Stage) -> None:
    """Assert that no total, table or queue has an entry of a client."""
    node = stage.manager._node
    budget, sessions, states = node.budget, node.sessions, node.detached.states
    assert stage.manager.get_memory_usage()["total_memory"] == 0
    assert (budget.total, budget._entries, budget._measured, list(budget._pinned)) == (0, {}, {}, [])
    assert [entry for entry in budget._heap if entry is entry[2].heap_item] == []
    assert (len(node.connections), len(states), sessions._by_id) == (0, 0, {})
    assert (sessions._detached, sessions._of_instance) == ({}, {})
    assert (node.tokens._inherited, states.by_client) == ({}, {})
    assert (stage.manager.get_connection_count(), len(stage.manager.get_rooms())) == (0, 0)
    assert len(node.hub.presence) == 0
    assert (budget.described, list(node.hub._metadata_sizes)) == ({}, [])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_memory_budget_is_zero_after_random_churn(options: dict[str, Any]) -> None:
    """Without connections and sessions, the memory budget and each part of it are exactly zero."""

    async def churn(seed: int) -> None:
        churn = Churn(seed, **options)
        async with churn.stage as stage:
            for _ in range(STEPS):
                await churn.step()
            await churn.disconnect_all()
            try:
                check_nothing_is_held(stage)
                assert stage.bugs == []
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error

    for seed in SEEDS:
        run_virtually(churn(seed))


@pytest.mark.parametrize("reconnect", [True, False], ids=["not admitted", "enable_reconnect=False"])
@virtually
async def test_send_that_ends_session_is_counted_as_discarded(reconnect: bool) -> None:
    """A message that overflows the outbox and so ends the session counts as discarded and is not held."""
    async with Stage(enable_reconnect=reconnect, outbox_max_messages=2, replay_max_messages=8) as stage:
        release = asyncio.Event()

        @stage.manager.on_connect
        async def slow(ws: StableSocket) -> None:
            if reconnect:
                await release.wait()

        line = await Peer(stage).dial()
        line.server.block()
        for _ in range(6):
            await stage.manager.broadcast(BIG)
            await soon()
        result = await stage.manager.broadcast(BIG)
        release.set()
        line.server.release()
        await asyncio.sleep(60)
        assert result.total == 0
        assert stage.manager.get_session_counts()["sessions"] == 0
        check_nothing_is_held(stage)
        assert stage.manager.counters.messages_discarded == 4


@virtually
async def test_on_slow_send_to_closed_client_logs_no_error() -> None:
    """An on_slow hook that sends to a closed connection logs no error and no traceback."""
    async with Stage(outbox_max_messages=2) as stage:
        seen: list[SlowConsumer] = []

        @stage.manager.on_slow
        async def slow(ws: StableSocket, how: SlowConsumer) -> None:
            seen.append(how)
            await ws.send("you are slow")

        line = stage.plain()
        await soon()
        line.server.block()
        for _ in range(6):
            await stage.manager.broadcast("a message")
            await soon()
        assert seen == [SlowConsumer.DISCONNECTED]
        assert stage.bugs == []
        assert stage.manager.counters.slow_clients[SlowConsumer.DISCONNECTED] == 1
