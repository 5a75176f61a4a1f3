"""Tests of what sessions are sent, while their clients are here and while they are away."""

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


async def begun(coroutine: Any) -> asyncio.Task[Any]:
    """Start something that waits, and let it come to where it does."""
    task = asyncio.ensure_future(coroutine)
    await soon()
    return task


# ── acknowledged ──


@virtually
async def test_send_with_ack_waits_for_ack_of_its_message() -> None:
    """`ws.send(..., ack=True)` returns when the client has acknowledged that number, and not one before it."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        await stage.socket().send("before")
        sending = await begun(stage.socket().send("it", ack=True))
        assert line.of("ping")[-1]["seq"] == 2
        await line.say({"type": "ack", "seq": 1})
        assert not sending.done()
        await line.say({"type": "pong", "ack": 2})
        assert await with_deadline(sending) is None


@virtually
async def test_send_with_ack_completes_with_resume() -> None:
    """The hello of the next connection says that the client has it."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        sending = await begun(stage.socket().send("it", ack=True))
        await line.leaves()
        assert not sending.done()
        await peer.dial(seq=1)
        assert await with_deadline(sending) is None


@virtually
async def test_send_with_ack_completes_in_later_connection() -> None:
    """What the client had not got is sent again, and acknowledged there."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        sending = await begun(stage.socket().send("it", ack=True))
        await line.leaves()
        line = await peer.dial(seq=0)
        assert (line.got, sending.done()) == (["it"], False)
        await line.say({"type": "ack", "seq": 1})
        assert await with_deadline(sending) is None


@virtually
async def test_send_with_ack_after_gap_raises_missed() -> None:
    """A client that comes back too late will not get it: the sender is told so, and not that it was acknowledged."""
    async with Stage(replay_max_messages=2) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        sending = await begun(stage.socket().send("it", ack=True))
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
    """Nobody will acknowledge it any more."""
    async with Stage(session_ttl=20) as stage:
        line = await Peer(stage).dial()
        sending = await begun(stage.socket().send("it", ack=True))
        await line.leaves()
        await asyncio.sleep(30)
        with pytest.raises(SessionEndedError):
            await with_deadline(sending)


@virtually
async def test_ack_beyond_last_sequence_number_confirms_nothing() -> None:
    """A client that claims more than there is gets a gap, and has not acknowledged what is sent after that."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await stage.socket().send("one")
        await line.leaves()
        line = await peer.dial(seq=50)
        assert (line.outcome, line.welcome["why"], line.welcome["seq"]) == ("gap", "ahead", 1)
        sending = await begun(stage.socket().send("two", ack=True))
        assert not sending.done()
        await line.say({"type": "ack", "seq": 2})
        assert await with_deadline(sending) is None


@virtually
async def test_ack_of_plain_client_or_volatile_message_raises() -> None:
    """A plain client can acknowledge nothing, and a volatile message is not worth it."""
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
        asking = await begun(stage.socket().request("confirm", {"price": 3}))
        (asked,) = line.of("msg")
        assert (asked["event"], asked["data"]) == ("confirm", {"price": 3})
        await line.say({"type": "reply", "seq": 1, "re": asked["id"], "data": True})
        assert await with_deadline(asking) is True
        await line.say({"type": "reply", "seq": 2, "re": asked["id"], "data": "twice"})
        assert line.close_code is None


@virtually
async def test_request_raises_error_of_reply() -> None:
    """It is raised, with its code and message."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        asking = await begun(stage.socket().request("confirm"))
        error = {"code": "busy", "message": "not now"}
        await line.say({"type": "reply", "seq": 1, "re": line.of("msg")[0]["id"], "error": error})
        with pytest.raises(RequestError) as caught:
            await with_deadline(asking)
        assert (caught.value.code, caught.value.message) == ("busy", "not now")


@virtually
async def test_request_without_reply_raises_after_timeout() -> None:
    """RequestTimeoutError after the timeout; an answer that comes later is ignored."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        asking = await begun(stage.socket().request("confirm", timeout=3))
        await asyncio.sleep(2.9)
        assert not asking.done()
        await asyncio.sleep(0.2)
        with pytest.raises(RequestTimeoutError):
            await with_deadline(asking)
        await line.say({"type": "reply", "seq": 1, "re": line.of("msg")[0]["id"], "data": "late"})
        assert line.close_code is None


@virtually
async def test_request_survives_reconnect() -> None:
    """It is asked again in the next connection if the client had not got it, and answered there."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        asking = await begun(stage.socket().request("confirm", timeout=60))
        await line.leaves()
        line = await peer.dial(seq=0)
        await line.say({"type": "reply", "seq": 1, "re": line.of("msg")[0]["id"], "data": "yes"})
        assert await with_deadline(asking) == "yes"


@virtually
async def test_request_raises_when_session_ends() -> None:
    """Nobody will answer it any more."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        asking = await begun(stage.socket().request("confirm", timeout=60))
        await line.leaves(1000)
        with pytest.raises(SessionEndedError):
            await with_deadline(asking)


@virtually
async def test_requests_over_max_open_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than MAX_OPEN at the same time are refused, and nothing is sent for them."""
    monkeypatch.setattr(requests_module, "MAX_OPEN", 2)
    async with Stage() as stage:
        line = await Peer(stage).dial()
        for _ in range(2):
            await begun(stage.socket().request("confirm", timeout=5))
        with pytest.raises(RequestError) as caught:
            await stage.socket().request("confirm")
        assert caught.value.code == "too_many"
        assert len(line.of("msg")) == 2
        await asyncio.sleep(6)
        await begun(stage.socket().request("confirm", timeout=1))
        assert len(line.of("msg")) == 3


@virtually
async def test_sends_with_ack_over_max_open_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than MAX_OPEN senders at the same time do not wait."""
    monkeypatch.setattr(requests_module, "MAX_OPEN", 2)
    async with Stage() as stage:
        await Peer(stage).dial()
        for _ in range(2):
            await begun(stage.socket().send("x", ack=True))
        with pytest.raises(RequestError) as caught:
            await with_deadline(stage.socket().send("x", ack=True))
        assert caught.value.code == "too_many"


# ── volatile, and room that is left ──


@virtually
async def test_volatile_message_is_skipped_for_detached_client() -> None:
    """It is neither kept nor numbered, and the result says how many have missed it."""
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
    """Whatever outbox_overflow says, it is dropped and counted, and the connection stays."""
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


@virtually
async def test_volatile_messages_are_coalesced_by_key() -> None:
    """A newer one takes the place of one that still waits; numbered ones with a key all arrive."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        line.server.block()
        await stage.manager.send_to_client("ann", "blocks")
        await soon()
        for number in range(3):
            await stage.manager.send_to_client("ann", ["volatile", number], coalesce_key="k", volatile=True)
            await stage.manager.send_to_client("ann", ["numbered", number], coalesce_key="k")
        line.server.release()
        await soon()
        numbered = [["numbered", number] for number in range(3)]
        assert [data for data in line.got if data[0] == "numbered"] == numbered
        assert [data for data in line.got if data[0] == "volatile"] == [["volatile", 2]]


@pytest.mark.parametrize("overflow", ["disconnect", "drop_oldest", "drop_newest"])
@virtually
async def test_slow_v1_client_is_closed_4507_and_resumes_in_full(overflow: str) -> None:
    """No numbered message is dropped: 4507, whatever outbox_overflow says, and the resume brings all of them."""
    async with Stage(outbox_max_messages=4, outbox_overflow=overflow) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        line.server.block()
        for number in range(20):
            await stage.manager.send_to_client("ann", number, coalesce_key="k")
        line.server.release()
        await soon()
        assert line.close_code == 4507
        await line.leaves()
        line = await peer.dial(seq=0)
        assert (line.outcome, line.got) == ("full", list(range(20)))
        assert stage.events == ["connect ann", "disconnect ann slow_consumer", "resume ann full"]


@virtually
async def test_stalled_v1_client_is_closed_and_resumes_in_full() -> None:
    """A send that makes no progress ends the connection with 4507, and nothing of the session."""
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
    """Messages that are offered to it are refused, and kept nowhere."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        session = stage.socket()._connection.recipient
        await line.leaves(1000)
        assert session.outbox.offer(encode("x")) is EnqueueResult.CLOSED
        assert session.outbox.offer(encode("x", volatile=True)) is EnqueueResult.CLOSED
        assert session.outbox.held_bytes == 0


@virtually
async def test_message_over_replay_max_age_causes_gap() -> None:
    """After replay_max_age a message is gone, and who has missed it is told of a gap."""
    async with Stage(replay_max_age=5) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.leaves()
        await stage.manager.send_to_client("ann", "old")
        await asyncio.sleep(6)
        await stage.manager.send_to_client("ann", "young")
        line = await peer.dial()
        assert (line.outcome, line.welcome["why"], line.welcome["seq"], line.got) == ("gap", "overflow", 2, [])
        assert [report.fields["missed_messages"] for report in stage.heard.of("session_gap")] == [2]
