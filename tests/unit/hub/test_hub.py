"""Tests of the recipients of messages, on connections without sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer import scheduling as scheduling_module
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.hub.broadcast import SMALL_ROOM
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from fastapi_ws_stabilizer.scheduling import FlushScheduler
from fastapi_ws_stabilizer.tasks import TaskSet
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_recipient import FakeRecipient


class HubHarness:
    """A hub with its scheduler, and connections in the room `lobby`."""

    def __init__(self, recipients: int, **options: Any) -> None:
        self.config = WebSocketConfig(**options)
        events = EventBus()
        self.scheduler = FlushScheduler(self.config.num_shards, events)
        self.hub: Hub = Hub(
            self.config,
            events,
            self.scheduler,
            TaskSet(lambda _, error: None),
            ConnectionRegistry(self.config.num_shards),
            joined=self._hear,
            left=self._hear,
            wanted=lambda: False,
        )
        self.recipients = [self.add(f"client-{number}") for number in range(recipients)]

    async def _hear(self, _: Any) -> None:
        """Ignore the presence event."""

    def add(self, client_id: str) -> FakeRecipient:
        """Connect a client, and let it join the room."""
        recipient = FakeRecipient(client_id, shard=self.hub.registry.next_shard())
        self.hub.registry.add(recipient)
        self.hub.join(recipient, "lobby", None)
        return recipient

    async def reached_by_iteration(self, **audience: Any) -> list[int]:
        """Broadcast; return the numbers of reached recipients after each iteration that has reached some."""
        task = asyncio.ensure_future(self.hub.broadcaster.broadcast(encode("hi"), **audience))
        reached: list[int] = []
        while not task.done():
            await asyncio.sleep(0)
            count = sum(len(recipient.frames) for recipient in self.recipients)
            if count not in reached:
                reached.append(count)
        await task
        return reached


@pytest.fixture
def blocked_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every check report a long block of the event loop."""
    monkeypatch.setattr(scheduling_module, "MAX_BLOCK", -1.0)


@pytest.mark.usefixtures("blocked_loop")
@pytest.mark.parametrize(
    ("recipients", "num_shards", "reached"),
    [
        (SMALL_ROOM, 16, [SMALL_ROOM]),
        (SMALL_ROOM + 1, 16, [SMALL_ROOM, SMALL_ROOM + 1]),
        (400, 4, [100, 200, 300, 400]),
        (400, 3, [134, 268, 400]),
        (400, 1, [400]),
    ],
)
async def test_room_broadcast_is_sharded_only_for_large_room(
    recipients: int, num_shards: int, reached: list[int]
) -> None:
    """A message to a small room is sent in one iteration, and to a large one in num_shards iterations."""
    hub = HubHarness(recipients, num_shards=num_shards)
    assert await hub.reached_by_iteration(rooms="lobby") == reached


@pytest.mark.usefixtures("blocked_loop")
@pytest.mark.parametrize(("num_shards", "reached"), [(1, [8]), (4, [2, 4, 6, 8]), (8, [1, 2, 3, 4, 5, 6, 7, 8])])
async def test_broadcast_to_all_is_always_sharded(num_shards: int, reached: list[int]) -> None:
    """A broadcast to all clients goes shard by shard, however few they are."""
    assert await HubHarness(8, num_shards=num_shards).reached_by_iteration() == reached


@pytest.mark.parametrize("how", ["to one", "to all"])
async def test_send_after_max_block_yields_to_writers(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A send yields to the loop when writers have waited for longer than MAX_BLOCK, and otherwise does not."""
    now = [100.0]
    monkeypatch.setattr(scheduling_module, "monotonic", lambda: now[0])
    hub = HubHarness(1, num_shards=1)
    log: list[str] = []

    class Writer:
        def on_flush_due(self) -> None:
            log.append("written")

    async def send() -> None:
        if how == "to all":
            await hub.hub.broadcaster.broadcast(encode("hi"))
        else:
            assert await hub.hub.broadcaster.send_to_client("client-0", encode("hi"))

    hub.scheduler.schedule(hub.scheduler.pending(0), Writer())
    await send()
    assert log == []
    now[0] += 1.0
    await send()
    assert log == ["written"]
