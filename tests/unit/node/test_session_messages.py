"""Tests of messages to sessions, both connected and detached."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.errors import (
    RequestError,
    RequestTimeoutError,
    SessionEndedError,
    UnsupportedByClientError,
)
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.sessions import requests as requests_module
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import with_deadline
from tests.support.stage import Peer, Stage


async def start(coroutine: Any) -> asyncio.Task[Any]:
    """Start a coroutine and let it run until it waits."""
    task = asyncio.ensure_future(coroutine)
    await soon()
    return task


# ── acknowledgements ──


@virtually
async def test_send_with_ack_waits_for_ack_of_its_message() -> None:
    """`ws.send(..., ack=True)` returns when the client acknowledges that sequence number, not an earlier one."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        await stage.socket().send("before")
        sending = await start(stage.socket().send("it", ack=True))
        assert line.of("ping")[-1]["seq"] == 2
        await line.say({"type": "ack", "seq": 1})
        assert not sending.done()
        await line.say({"type": "pong", "ack": 2})
        assert await with_deadline(sending) is None


@virtually
async def test_send_with_ack_completes_with_resume() -> None:
    """A resume that acknowledges the message in its hello completes the send."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        sending = await start(stage.socket().send("it", ack=True))
        await line.leaves()
        assert not sending.done()
        await peer.dial(seq=1)
        assert await with_deadline(sending) is None


@virtually
async def test_send_with_ack_completes_in_later_connection() -> None:
    """An unacknowledged message is replayed after the resume, and the send completes with its acknowledgement there."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        sending = await start(stage.socket().send("it", ack=True))
        await line.leaves()
        line = await peer.dial(seq=0)
        assert (line.got, sending.done()) == (["it"], False)
        await line.say({"type": "ack", "seq": 1})
        assert await with_deadline(sending) is None


@virtually
async def test_send_with_ack_after_gap_raises_missed() -> None:
    """A message that is lost in a gap raises `RequestError` with the code `missed` at its sender."""
    async with Stage(replay_max_messages=2) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        sending = await start(stage.socket().send("it", ack=True))
        await line.leaves()
        for number in range(5):
            await stage.manager.send_to_client("ann", number)
        line = await peer.dial(seq=0)
        assert (line.outcome, line.welcome["why"], line.welcome["seq"]) == ("gap", "overflow", 6)
        with pytest.raises(RequestError) as caught:
            await with_deadline(sending)
        assert caught.value.code == "missed"


@virtually
async def test_send_with_ack_raises_when_session_ends() -> None:
    """A send that waits for an acknowledgement raises `SessionEndedError` when the session ends."""
    async with Stage(session_ttl=20) as stage:
        line = await Peer(stage).dial()
        sending = await start(stage.socket().send("it", ack=True))
        await line.leaves()
        await asyncio.sleep(30)
        with pytest.raises(SessionEndedError):
            await with_deadline(sending)


@virtually
async def test_ack_beyond_last_sequence_number_confirms_nothing() -> None:
    """A client that claims a number never sent gets a gap, and later messages do not count as acknowledged."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await stage.socket().send("one")
        await line.leaves()
        line = await peer.dial(seq=50)
        assert (line.outcome, line.welcome["why"], line.welcome["seq"]) == ("gap", "ahead", 1)
        sending = await start(stage.socket().send("two", ack=True))
        assert not sending.done()
        await line.say({"type": "ack", "seq": 2})
        assert await with_deadline(sending) is None


@virtually
async def test_ack_of_plain_client_or_volatile_message_raises() -> None:
    """`ack=True` raises for a plain client, which cannot acknowledge, and for a volatile message."""
    async with Stage() as stage:
        plain = stage.plain("bob")
        await Peer(stage).dial()
        assert plain.socket is not None
        with pytest.raises(UnsupportedByClientError):
            await plain.socket.send("x", ack=True)
        with pytest.raises(UnsupportedByClientError):
            await plain.socket.request("x")
        for socket in (plain.socket, stage.socket()):
            with pytest.raises(ValueError, match="volatile"):
                await socket.send("x", ack=True, volatile=True)
        assert plain.server.data == []


# ── requests ──


@virtually
async def test_request_returns_data_of_reply() -> None:
    """`ws.request` returns the data of the reply."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        asking = await start(stage.socket().request("confirm", {"price": 3}))
        (asked,) = line.of("msg")
        assert (asked["event"], asked["data"]) == ("confirm", {"price": 3})
        await line.say({"type": "reply", "seq": 1, "re": asked["id"], "data": True})
        assert await with_deadline(asking) is True
        await line.say({"type": "reply", "seq": 2, "re": asked["id"], "data": "twice"})
        assert line.close_code is None


@virtually
async def test_request_raises_error_of_reply() -> None:
    """`ws.request` raises the error of the reply, with code and message."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        asking = await start(stage.socket().request("confirm"))
        error = {"code": "busy", "message": "not now"}
        await line.say({"type": "reply", "seq": 1, "re": line.of("msg")[0]["id"], "error": error})
        with pytest.raises(RequestError) as caught:
            await with_deadline(asking)
        assert (caught.value.code, caught.value.message) == ("busy", "not now")


@virtually
async def test_request_without_reply_raises_after_timeout() -> None:
    """`ws.request` raises RequestTimeoutError after its timeout, and a later reply is ignored."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        asking = await start(stage.socket().request("confirm", timeout=3))
        await asyncio.sleep(2.9)
        assert not asking.done()
        await asyncio.sleep(0.2)
        with pytest.raises(RequestTimeoutError):
            await with_deadline(asking)
        await line.say({"type": "reply", "seq": 1, "re": line.of("msg")[0]["id"], "data": "late"})
        assert line.close_code is None


@virtually
async def test_request_survives_reconnect() -> None:
    """A request is replayed in the next connection if the client has not received it, and answered there."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        asking = await start(stage.socket().request("confirm", timeout=60))
        await line.leaves()
        line = await peer.dial(seq=0)
        await line.say({"type": "reply", "seq": 1, "re": line.of("msg")[0]["id"], "data": "yes"})
        assert await with_deadline(asking) == "yes"


@virtually
async def test_request_raises_when_session_ends() -> None:
    """A pending request raises `SessionEndedError` when the session ends."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        asking = await start(stage.socket().request("confirm", timeout=60))
        await line.leaves(1000)
        with pytest.raises(SessionEndedError):
            await with_deadline(asking)


@virtually
async def test_requests_over_max_open_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than MAX_OPEN concurrent requests raise, and nothing is sent for them."""
    monkeypatch.setattr(requests_module, "MAX_OPEN", 2)
    async with Stage() as stage:
        line = await Peer(stage).dial()
        for _ in range(2):
            await start(stage.socket().request("confirm", timeout=5))
        with pytest.raises(RequestError) as caught:
            await stage.socket().request("confirm")
        assert caught.value.code == "too_many"
        assert len(line.of("msg")) == 2
        await asyncio.sleep(6)
        await start(stage.socket().request("confirm", timeout=1))
        assert len(line.of("msg")) == 3


@virtually
async def test_sends_with_ack_over_max_open_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than MAX_OPEN concurrent sends with `ack=True` raise instead of waiting."""
    monkeypatch.setattr(requests_module, "MAX_OPEN", 2)
    async with Stage() as stage:
        await Peer(stage).dial()
        for _ in range(2):
            await start(stage.socket().send("x", ack=True))
        with pytest.raises(RequestError) as caught:
            await with_deadline(stage.socket().send("x", ack=True))
        assert caught.value.code == "too_many"


# ── volatile messages and limits ──


@virtually
async def test_volatile_message_is_skipped_for_detached_client() -> None:
    """A volatile message to a detached client is not stored or numbered, and counts as skipped."""
    async with Stage() as stage:
        peer = Peer(stage)
        await (await peer.dial()).leaves()
        bob = await Peer(stage, "bob").dial()
        result = await stage.manager.broadcast("now", volatile=True)
        assert (result.total, result.succeeded, result.skipped) == (2, 1, 1)
        assert not await stage.manager.send_to_client("ann", "now", volatile=True)
        assert await stage.manager.send_to_client("ann", "later")
        await soon()
        assert bob.frames[1:] == [{"type": "msg", "volatile": True, "data": "now"}]
        line = await peer.dial()
        assert (line.outcome, line.got) == ("full", ["later"])


@pytest.mark.parametrize("overflow", ["disconnect", "drop_oldest", "drop_newest"])
@virtually
async def test_volatile_message_over_outbox_limit_is_dropped(overflow: str) -> None:
    """A volatile message above the outbox limit is dropped and counted under each policy; the connection stays."""
    async with Stage(outbox_max_messages=3, outbox_overflow=overflow) as stage:
        line = await Peer(stage).dial()
        line.server.block()
        results = [await stage.manager.broadcast(number, volatile=True) for number in range(8)]
        await soon()
        assert results[-1].dropped == 1
        assert stage.manager.counters.messages_dropped == sum(result.dropped for result in results)
        line.server.release()
        await soon()
        assert line.close_code is None
        assert line.got == list(range(8 - stage.manager.counters.messages_dropped))


@pytest.mark.parametrize("overflow", ["disconnect", "drop_oldest", "drop_newest"])
@virtually
async def test_slow_v1_client_is_closed_4507_and_resumes_in_full(overflow: str) -> None:
    """A full outbox closes a v1 client with 4507 under each policy, and the resume replays all numbered messages."""
    async with Stage(outbox_max_messages=4, outbox_overflow=overflow) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        line.server.block()
        for number in range(20):
            await stage.manager.send_to_client("ann", number)
        line.server.release()
        await soon()
        assert line.close_code == 4507
        await line.leaves()
        line = await peer.dial(seq=0)
        assert (line.outcome, line.got) == ("full", list(range(20)))
        assert stage.events == ["connect ann", "disconnect ann slow_consumer", "resume ann full"]


@virtually
async def test_stalled_v1_client_is_closed_and_resumes_in_full() -> None:
    """A stalled send closes the connection with 4507, but the session resumes in full."""
    async with Stage(send_timeout=2) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        line.server.block()
        for number in range(5):
            await stage.manager.send_to_client("ann", number)
        await asyncio.sleep(5)
        assert stage.events == ["connect ann", "disconnect ann slow_consumer"]
        line.server.fail(RuntimeError("gone"))
        line = await peer.dial(seq=0)
        assert (line.outcome, line.got) == ("full", list(range(5)))


@virtually
async def test_ended_session_enqueues_no_message() -> None:
    """An ended session enqueues no message and holds no bytes."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        session = stage.socket()._connection.recipient
        await line.leaves(1000)
        assert session.outbox.offer(encode("x")) is EnqueueResult.CLOSED
        assert session.outbox.offer(encode("x", volatile=True)) is EnqueueResult.CLOSED
        assert session.outbox.counted_bytes == 0


@virtually
async def test_message_over_replay_max_age_causes_gap() -> None:
    """A message older than replay_max_age is discarded, and a client that missed it resumes with a gap."""
    async with Stage(replay_max_age=5) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.leaves()
        await stage.manager.send_to_client("ann", "old")
        await asyncio.sleep(6)
        await stage.manager.send_to_client("ann", "young")
        line = await peer.dial()
        assert (line.outcome, line.welcome["why"], line.welcome["seq"], line.got) == ("gap", "overflow", 2, [])
        assert [event.fields["missed_messages"] for event in stage.heard.of("session_gap")] == [2]
