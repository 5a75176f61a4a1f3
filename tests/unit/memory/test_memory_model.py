"""Property: under `max_total_memory` totals are exact, the limit holds, and evictions follow the policy."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.support.fake_link import soon
from tests.support.memory_world import ModelClient, World, recording_servers
from tests.support.virtual_time import VirtualLoop, run_virtually

pytestmark = pytest.mark.generated

POLICIES = ("lru", "fifo", "oldest")
LIMIT = 20_000
"""Bytes: small, so that many steps lead to an eviction."""

numbers = st.integers(0, 11)
sizes = st.sampled_from([0, 10, 500, 2_000, 5_000])
rooms = st.sampled_from([None, "lobby", "kitchen"])


class MemoryMachine(RuleBasedStateMachine):
    """State machine of 12 clients: every second one has a session, and every third one's endpoint reads nothing."""

    policy = "lru"
    evictions = 0

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._loop: Any = None

    @initialize(full=st.booleans())
    def begin(self, full: bool) -> None:
        """Start a manager in virtual time, with clients that hold nothing, or three quarters of the limit together."""
        self._stack.enter_context(recording_servers())
        self._loop = self._stack.enter_context(VirtualRunner())

        async def make() -> World:
            world = World(self.policy, LIMIT)
            await world.stage.__aenter__()
            return world

        self.world: World = self._loop.run(make())
        for number in range(12):
            self.do(self.world.connects(self.client(number)))
            if full:
                self.do(self.world.stores(self.client(number), "a", LIMIT // 16))

    def client(self, number: int) -> ModelClient:
        return self.world.add(f"c{number}", numbered=number % 2 == 1, deaf=number % 3 == 0)

    def do(self, step: Any) -> None:
        async def run() -> None:
            if step is not None:
                await step
            await soon()

        self._loop.run(run())

    @rule(number=numbers)
    def comes(self, number: int) -> None:
        self.do(self.world.connects(self.client(number)))

    @rule(number=numbers)
    def leaves(self, number: int) -> None:
        self.do(self.world.leaves(self.client(number)))

    @rule(number=numbers)
    def close_normally(self, number: int) -> None:
        self.do(self.world.close_normally(self.client(number)))

    @rule(number=numbers, key=st.sampled_from("ab"), size=sizes)
    def keeps(self, number: int, key: str, size: int) -> None:
        self.do(self.world.stores(self.client(number), key, size))

    @rule(number=numbers, size=sizes)
    def grows(self, number: int, size: int) -> None:
        self.do(self.world.grows(self.client(number), size))

    @rule(number=numbers, size=sizes)
    def says(self, number: int, size: int) -> None:
        self.do(self.world.says(self.client(number), size))

    @rule(number=numbers)
    def acknowledges(self, number: int) -> None:
        self.do(self.world.acknowledges(self.client(number)))

    @rule(number=numbers)
    def blocks(self, number: int) -> None:
        self.world.blocks(self.client(number))

    @rule(number=numbers)
    def reads(self, number: int) -> None:
        self.world.reads(self.client(number))
        self.do(None)

    @rule(number=numbers, room=rooms.filter(bool))
    def joins(self, number: int, room: str) -> None:
        self.do(self.world.joins(self.client(number), room))

    @rule(size=sizes, room=rooms, key=st.sampled_from([None, "price"]))
    def broadcast(self, size: int, room: str | None, key: str | None) -> None:
        self.do(self.world.broadcast(size, room, key))

    @rule(number=numbers, size=sizes)
    def tell(self, number: int, size: int) -> None:
        self.do(self.world.sends_to(self.client(number), size))

    @rule(seconds=st.sampled_from([1.0, 130.0]))
    def time_passes(self, seconds: float) -> None:
        for client in self.world.clients.values():
            if client.detached is not None and seconds > 120:  # the session has expired
                client.recipient, client.token = None, None
        self.do(asyncio.sleep(seconds))

    @invariant()
    def holds(self) -> None:
        if self._loop is not None:
            self.world.check()

    def teardown(self) -> None:
        type(self).evictions += self.world.evictions if self._loop is not None else 0
        try:
            if self._loop is not None:
                self._loop.run(self.world.end())
        finally:
            self._stack.close()


class VirtualRunner:
    """Event loop with virtual time, also for the clock of the library."""

    def __enter__(self) -> VirtualRunner:
        self._loop = VirtualLoop()
        self._clocks = ExitStack()
        for name, module in list(sys.modules.items()):
            if name.startswith("fastapi_ws_stabilizer") and hasattr(module, "monotonic"):
                self._clocks.enter_context(mock.patch.object(module, "monotonic", self._loop.time))
        return self

    def __exit__(self, *_: object) -> None:
        self._clocks.close()
        self._loop.close()

    def run(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_limit_and_eviction_match_model_of_12_clients(policy: str) -> None:
    """After each step the total equals a full count, the limit holds, and the evicted client was first in the order."""
    machine = type(f"Machine_{policy}", (MemoryMachine,), {"policy": policy})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert machine.evictions  # every second run starts nearly full, and most of these evict


def one_step(world: World, client: ModelClient, dice: random.Random) -> Any:
    """Return a random step of one client."""
    size, key = dice.choice((10, 300, 3_000, 60_000)), dice.choice("abc")
    steps: tuple[Callable[[], Any], ...] = (
        lambda: world.connects(client),
        lambda: world.leaves(client),
        lambda: world.stores(client, key, size),
        lambda: world.stores(client, key, size),
        lambda: world.grows(client, size),
        lambda: world.says(client, size),
        lambda: world.acknowledges(client),
        lambda: world.blocks(client),
        lambda: world.reads(client),
        lambda: world.sends_to(client, size),
        lambda: world.broadcast(size // 10, dice.choice((None, "lobby")), None),
    )
    return dice.choice(steps)()


async def run_1000_clients(policy: str, seed: int, steps: int) -> int:
    """Run random steps of 1,000 clients, and return the number of evictions."""
    dice = random.Random(seed)
    world = World(policy, 100_000)
    await world.stage.__aenter__()
    clients = [world.add(f"c{n}", numbered=n % 4 == 1, deaf=n % 7 == 0) for n in range(1000)]
    busy = dice.sample(clients, 60)
    try:
        for client in clients:
            await world.connects(client)
            if client.client_id.endswith("0"):
                await world.joins(client, "lobby")
        world.check()
        for _ in range(steps):
            step = one_step(world, dice.choice(dice.choice((busy, clients))), dice)
            if step is not None:
                await step
            await soon()
            world.check()
    finally:
        await world.end()
    return world.evictions


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=1, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_memory_limit_and_eviction_hold_for_1000_clients(policy: str, seed: int) -> None:
    """The properties hold for 1,000 clients with random data, messages, broadcasts, disconnects and returns."""
    with recording_servers():
        assert run_virtually(run_1000_clients(policy, seed, 300)) > 3
