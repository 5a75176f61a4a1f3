"""Tests of sending one message to many recipients."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from fastapi_ws_stabilizer import scheduling as scheduling_module
from fastapi_ws_stabilizer.errors import BroadcastFailedError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.hub.broadcast import Broadcaster, BroadcastResult
from fastapi_ws_stabilizer.hub.history import RoomHistory
from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from fastapi_ws_stabilizer.hub.rooms import RoomMembership
from fastapi_ws_stabilizer.queueing import EnqueueResult, Recipient
from fastapi_ws_stabilizer.scheduling import FlushScheduler
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode
from tests.support.fake_recipient import FakeRecipient


def broadcaster(recipients: Iterable[FakeRecipient], num_shards: int = 1) -> Broadcaster:
    """Return a broadcaster to recipients, which are distributed over the shards."""
    events, registry = EventBus(), ConnectionRegistry(num_shards)
    for recipient in recipients:
        registry.add_queue(recipient, registry.next_shard())
    scheduler, rooms = FlushScheduler(num_shards, events), RoomMembership[Recipient](None)
    return Broadcaster(num_shards, scheduler, events.counters, registry, rooms, RoomHistory(0, 0.0), lambda _: ())


async def fan_out(frame: EncodedMessage, recipients: list[FakeRecipient]) -> BroadcastResult:
    """Send a frame to recipients of one shard."""
    return await broadcaster(recipients).broadcast(frame)


async def test_broadcast_shares_one_encoded_message() -> None:
    """All recipients get the same encoded frame, not a copy."""
    recipients = [FakeRecipient() for _ in range(3)]
    frame = encode({"n": 1})
    result = await fan_out(frame, recipients)
    assert result == BroadcastResult(total=3, succeeded=3, failed=0, errors=[])
    assert all(len(recipient.frames) == 1 and recipient.frames[0] is frame for recipient in recipients)


async def test_failed_recipient_is_listed_with_close_cause() -> None:
    """The result names each failed connection, with the cause of its close."""
    ann, bob = FakeRecipient("ann"), FakeRecipient("bob", takes=False)
    result = await fan_out(encode("hi"), [ann, bob])
    assert result == BroadcastResult(total=2, succeeded=1, failed=1, errors=[("bob", "slow_consumer")], slow=1)
    assert len(ann.frames) == 1


async def test_unopened_recipient_is_listed_as_not_open() -> None:
    """A failure without close info has a reason as well."""
    ann, new = FakeRecipient("ann"), FakeRecipient("new")
    new.offer = lambda frame: EnqueueResult.CLOSED  # type: ignore[method-assign]
    assert (await fan_out(encode("hi"), [ann, new])).errors == [("new", "not open")]


async def test_broadcast_to_slow_recipients_only_does_not_raise() -> None:
    """A broadcast does not raise because clients are slow, so that it does not end its publisher."""
    result = await fan_out(encode("hi"), [FakeRecipient(takes=False), FakeRecipient(takes=False)])
    assert (result.total, result.succeeded, result.failed, result.slow) == (2, 0, 2, 2)


async def test_raise_for_failure_without_success_raises() -> None:
    """`raise_for_failure` raises if there were recipients and the message could be queued for none of them."""
    result = await fan_out(encode("hi"), [FakeRecipient(takes=False), FakeRecipient(takes=False)])
    with pytest.raises(BroadcastFailedError) as caught:
        result.raise_for_failure()
    assert caught.value.total == 2


async def test_raise_for_failure_with_success_returns_result() -> None:
    """`raise_for_failure` returns the result if at least one client gets the message, or if there were no clients."""
    reached = await fan_out(encode("hi"), [FakeRecipient(takes=False), FakeRecipient()])
    assert reached.raise_for_failure() is reached
    assert (empty := await fan_out(encode("hi"), [])).raise_for_failure() is empty


async def test_broadcast_without_recipients_returns_empty_result() -> None:
    """Without recipients nothing can fail."""
    assert await fan_out(encode("hi"), []) == BroadcastResult()


async def test_broadcast_without_backpressure_does_not_yield(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as outboxes are mostly empty, a broadcast does not yield to the event loop."""
    monkeypatch.setattr(scheduling_module, "MAX_BLOCK", math.inf)  # the machine may stop for longer than that
    turns: list[str] = []
    asyncio.get_running_loop().call_soon(turns.append, "turn")
    await fan_out(encode("hi"), [FakeRecipient()])
    assert turns == []
    await asyncio.sleep(0)
    assert turns == ["turn"]


async def test_broadcast_with_backpressure_yields_to_writers() -> None:
    """When an outbox fills up, a broadcast yields to the event loop before it returns."""
    scheduler: list[str] = []
    asyncio.get_running_loop().call_soon(scheduler.append, "turn")
    await fan_out(encode("hi"), [FakeRecipient(pressed=True), FakeRecipient()])
    assert scheduler == ["turn"]


async def test_cancelled_broadcast_with_backpressure_reaches_all() -> None:
    """Cancelling a broadcast at its only await loses no message."""
    recipients = [FakeRecipient(pressed=True) for _ in range(3)]
    task = asyncio.ensure_future(fan_out(encode("hi"), recipients))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [len(recipient.frames) for recipient in recipients] == [1, 1, 1]


class AdvancingClock:
    """Clock that advances 2 ms for each recipient."""

    now = 50.0

    def __call__(self) -> float:
        self.now += 0.002
        return self.now


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every read of the clock report a long block."""
    monkeypatch.setattr("fastapi_ws_stabilizer.scheduling.monotonic", AdvancingClock())
    monkeypatch.setattr("fastapi_ws_stabilizer.scheduling.MAX_BLOCK", 0.001)


@pytest.mark.usefixtures("slow_clock")
async def test_long_broadcast_yields_and_preserves_order() -> None:
    """Other tasks run between two shards, and a later broadcast arrives second at every client."""
    recipients = [FakeRecipient(str(number)) for number in range(4)]
    fan = broadcaster(recipients, num_shards=4)
    first, second = encode("first"), encode("second")
    long = asyncio.ensure_future(fan.broadcast(first))
    await asyncio.sleep(0)
    assert 0 < sum(len(recipient.frames) for recipient in recipients) < 4
    await fan.broadcast(second)
    await long
    assert all(recipient.frames == [first, second] for recipient in recipients)


@pytest.mark.usefixtures("slow_clock")
async def test_cancelled_long_broadcast_still_reaches_all() -> None:
    """A caller that is cancelled between two shards does not stop the broadcast."""
    recipients = [FakeRecipient() for _ in range(4)]
    fan = broadcaster(recipients, num_shards=4)
    long = asyncio.ensure_future(fan.broadcast(encode("hi")))
    await asyncio.sleep(0)
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    assert [len(recipient.frames) for recipient in recipients] == [1, 1, 1, 1]
    assert (await fan.broadcast(encode("next"))).succeeded == 4


async def test_dropped_message_is_neither_success_nor_failure() -> None:
    """A dropped message is neither a success nor a failure, and counts its client as slow."""
    slow, dropping, well = FakeRecipient(), FakeRecipient(), FakeRecipient()
    slow.verdict, dropping.verdict = EnqueueResult.SLOW, EnqueueResult.DROPPED
    result = await fan_out(encode("hi"), [slow, dropping, well])
    assert (result.total, result.succeeded, result.failed, result.slow) == (3, 2, 0, 2)


async def test_excluded_connection_is_not_in_total() -> None:
    """Excluded connections are not part of the total."""
    recipients = [FakeRecipient() for _ in range(3)]
    socket = SimpleNamespace(recipient_id=recipients[1].connection_id)
    result = await broadcaster(recipients).broadcast(encode("hi"), exclude=socket)
    assert (result.total, result.succeeded) == (2, 2)
    assert [len(recipient.frames) for recipient in recipients] == [1, 0, 1]


async def test_broadcasts_without_recipients_yield_to_event_loop() -> None:
    """A loop of broadcasts without recipients yields, so that another task can stop it."""
    fan = broadcaster([])
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True

    asyncio.get_running_loop().call_soon(stop)
    deadline = time.monotonic() + 2
    while not stopped and time.monotonic() < deadline:
        await fan.broadcast(encode("hi"))
    assert stopped


async def test_recipient_on_fast_path_gets_no_second_offer() -> None:
    """`offer` is asked only if the fast path of an outbox declines the frame."""
    fast, slow = FakeRecipient(), FakeRecipient()
    fast.try_enqueue = lambda _: True  # type: ignore[method-assign]
    result = await fan_out(encode("hi"), [fast, slow])
    assert (result.total, result.succeeded) == (2, 2)
    assert [len(recipient.frames) for recipient in (fast, slow)] == [0, 1]
