"""Tests of sending one message to many."""

from __future__ import annotations

import asyncio

import pytest

from fastapi_ws_stabilizer.errors import BroadcastFailedError
from fastapi_ws_stabilizer.hub.fanout import BroadcastResult, FanOut
from fastapi_ws_stabilizer.hub.member import Offered
from fastapi_ws_stabilizer.hub.turns import Turns
from fastapi_ws_stabilizer.reports import Reports
from fastapi_ws_stabilizer.wire.payload import Frame, encode
from tests.unit.hub.fake_member import FakeMember


async def fan_out(frame: Frame, members: list[FakeMember]) -> BroadcastResult:
    """Send a frame to some members, in one go."""
    reports = Reports()
    return await FanOut(Turns(1, reports), reports.totals).send(frame, [members])


async def test_everybody_gets_the_same_frame() -> None:
    """The one encoded frame is queued for each, not a copy of it."""
    members = [FakeMember() for _ in range(3)]
    frame = encode({"n": 1})
    result = await fan_out(frame, members)
    assert result == BroadcastResult(total=3, succeeded=3, failed=0, errors=[])
    assert all(len(member.frames) == 1 and member.frames[0] is frame for member in members)


async def test_a_client_that_cannot_be_queued_for_is_counted_and_named() -> None:
    """The result names each connection that could not be queued for, with the reason of its end."""
    ann, bob = FakeMember("ann"), FakeMember("bob", takes=False)
    result = await fan_out(encode("hi"), [ann, bob])
    assert result == BroadcastResult(total=2, succeeded=1, failed=1, errors=[("bob", "slow_consumer")], slow=1)
    assert len(ann.frames) == 1


async def test_a_client_that_is_not_open_yet_is_named_too() -> None:
    """A failure without an ending has a word as well."""
    ann, new = FakeMember("ann"), FakeMember("new")
    new.offer = lambda frame: Offered.REFUSED  # type: ignore[method-assign]
    assert (await fan_out(encode("hi"), [ann, new])).errors == [("new", "not open")]


async def test_a_broadcast_that_reaches_nobody_of_many_is_an_error() -> None:
    """If there were recipients and it could be queued for none, the caller learns it."""
    with pytest.raises(BroadcastFailedError) as caught:
        await fan_out(encode("hi"), [FakeMember(takes=False), FakeMember(takes=False)])
    assert caught.value.total == 2


async def test_a_broadcast_to_nobody_is_none() -> None:
    """Without recipients there is nothing that could fail."""
    assert await fan_out(encode("hi"), []) == BroadcastResult()


async def test_a_broadcast_without_pressure_does_not_yield() -> None:
    """As long as outboxes are mostly empty, a broadcast takes no turn of the event loop."""
    turns: list[str] = []
    asyncio.get_running_loop().call_soon(turns.append, "turn")
    await fan_out(encode("hi"), [FakeMember()])
    assert turns == []
    await asyncio.sleep(0)
    assert turns == ["turn"]


async def test_a_broadcast_under_pressure_lets_writers_work() -> None:
    """When an outbox fills up, the event loop gets a turn before the broadcast returns."""
    turns: list[str] = []
    asyncio.get_running_loop().call_soon(turns.append, "turn")
    await fan_out(encode("hi"), [FakeMember(pressed=True), FakeMember()])
    assert turns == ["turn"]


async def test_a_cancelled_broadcast_has_been_queued_for_everybody() -> None:
    """Cancelling at the one point where a broadcast waits loses nothing."""
    members = [FakeMember(pressed=True) for _ in range(3)]
    task = asyncio.ensure_future(fan_out(encode("hi"), members))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [len(member.frames) for member in members] == [1, 1, 1]
