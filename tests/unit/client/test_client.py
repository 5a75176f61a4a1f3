"""Tests of the client against a fake server and a fake network."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from typing import Any

import pytest

from fastapi_ws_stabilizer.client import (
    BufferFullError,
    Client,
    ClientClosedError,
    Gap,
    HttpRejection,
    MessageTooLargeError,
    NotStartedError,
    RefusedError,
    RequestError,
    RequestTimeoutError,
    SessionLostError,
    TransportClosedError,
    UnreadableFrameError,
    connect,
)
from fastapi_ws_stabilizer.client.backoff import Backoff
from fastapi_ws_stabilizer.client.transport import UnreadableMessageError
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL, deflated
from tests.support.fake_link import FakeLink, Scene, soon, virtually

FINAL_CODES = [1002, 1003, 1007, 1009, 1010, 3003, 4400, 4403, 4404, 4406, 4410, 4418]
PASSING_CODES = [1000, 1001, 1005, 1006, 1011, 1012, 1015, 3500, 4001, 4408, 4500, 4503, 4507, 4999]


def now() -> float:
    """Return the virtual time."""
    return asyncio.get_running_loop().time()


# ── the handshake ──


@virtually
async def test_client_is_open_after_hello_and_welcome() -> None:
    """The first frame has the number of the attempt and the instance, and the welcome is acknowledged at once."""
    async with Scene() as scene:
        hello = scene.link.hello
        assert hello == {
            "type": "hello",
            "v": 1,
            "n": 1,
            "client": scene.client._session.instance_id,
            "caps": ["retry"],
        }
        assert scene.offers == [("ws://server/ws", [SUBPROTOCOL])]
        assert scene.client.state == "connecting"
        await scene.opened(seq=5)
        assert scene.link.sent[1] == {"type": "ack", "seq": 5}
        assert scene.client.session == "s"
        assert scene.of("open") == ["none"]
        assert scene.of("gap") == []


@virtually
async def test_async_with_opens_and_closes_client() -> None:
    """`async with` returns with an open connection, and closes with 1000 on exit."""
    scene = Scene()
    entering = asyncio.ensure_future(scene.client.__aenter__())
    await soon()
    assert not entering.done()
    await scene.opened()
    await soon()
    assert entering.result() is scene.client
    await scene.client.__aexit__(None, None, None)
    assert scene.link.closed == (1000, "")
    assert scene.client.state == "closed"


@pytest.mark.parametrize("moment", ["dialling", "connected", "waiting", "closing"])
def test_cancelled_async_with_leaves_no_task(moment: str) -> None:
    """An `async with` that is cancelled before the first connection leaves no client and no task."""

    @virtually
    async def play() -> None:
        scene = Scene(min_delay=100)
        scene.black_hole = moment == "dialling"
        entering = asyncio.ensure_future(scene.client.__aenter__())
        await soon()
        if moment == "waiting":
            await scene.link.closes(1006)
        if moment == "closing":
            scene.link.may_close.clear()
            entering.cancel()
            await soon()
            assert not entering.done(), "it sends a close frame"
        entering.cancel()
        await soon()
        assert entering.cancelled()
        assert scene.client.state == "closed"
        assert len(scene.client._tasks) == 0
        await asyncio.sleep(200)
        assert len(scene.dials) == 1

    play()


@virtually
async def test_terminal_first_close_leaves_no_task() -> None:
    """An `async with` that fails because of a terminal close leaves no task."""
    scene = Scene()
    scene.subprotocol = None
    scene.client.on_close(lambda *_: asyncio.sleep(3600))
    with pytest.raises(ClientClosedError):
        await scene.client.__aenter__()
    assert len(scene.client._tasks) == 0


@virtually
async def test_invalid_target_closes_client() -> None:
    """The client stops after an error that says that no attempt can succeed."""
    scene = Scene()
    scene.failures = [ClientClosedError(4400, "invalid URL or options: not://a.url")]
    with pytest.raises(ClientClosedError, match=r"not://a\.url"):
        await scene.client.__aenter__()
    assert (len(scene.dials), scene.client.state) == (1, "closed")


@virtually
async def test_missing_subprotocol_ends_attempt_before_hello() -> None:
    """Without the subprotocol there is no common version, and the client sends nothing."""
    scene = Scene()
    scene.subprotocol = None
    with pytest.raises(ClientClosedError, match="does not support") as caught:
        await scene.client.__aenter__()
    assert caught.value.code == 4406
    assert scene.link.sent == []
    assert len(scene.dials) == 1


@virtually
async def test_messages_wait_for_welcome() -> None:
    """Messages wait for the welcome, and frames before it are ignored."""
    async with Scene() as scene:
        scene.client.send("early")
        await scene.link.say({"type": "msg", "data": 1}, {"type": "ping", "seq": 9})
        assert [frame["type"] for frame in scene.link.sent] == ["hello"]
        await scene.opened()
        assert [frame["type"] for frame in scene.link.sent] == ["hello", "ack", "msg"]
        assert scene.client._session.last_seq == 0


@virtually
async def test_connect_timeout_covers_whole_attempt() -> None:
    """An attempt that hangs while connecting or waiting for the welcome is abandoned after `connect_timeout`."""
    scene = Scene(connect_timeout=10.0)
    scene.black_hole = True
    async with scene:
        await asyncio.sleep(9.9)
        assert scene.of("close") == []
        await asyncio.sleep(0.2)
        assert scene.of("close") == [(4408, "connect timeout")]
        scene.black_hole = False
        await scene.redialled(1)
        await asyncio.sleep(10)
        assert scene.of("close")[1:] == [(4408, "connect timeout")]


@pytest.mark.parametrize(
    "frame",
    [
        {"token": None},
        {"token": "x" * 513},
        {"token": 7},
        {"session": None},
        {"resume": "partial"},
        {"seq": -1},
        {"ack": None},
        {"ping": "25"},
    ],
    ids=str,
)
def test_malformed_welcome_closes_4412_and_reconnects(frame: dict[str, Any]) -> None:
    """On an unreadable welcome the client closes with 4412, reports the error, and reconnects."""

    @virtually
    async def play() -> None:
        async with Scene() as scene:
            await scene.link.welcome(**{"resume": "none", **frame})
            assert scene.client.state == "waiting"
            assert scene.link.closed is not None
            assert scene.link.closed[0] == 4412
            assert [type(error) for error in scene.of("error")] == [UnreadableFrameError]
            await scene.redialled(2)
            await scene.opened()

    play()


@virtually
async def test_url_function_is_called_for_each_attempt() -> None:
    """The URL function is called for each attempt, and an error in it is a failed attempt."""
    urls = iter(["ws://one", None, "ws://three"])

    async def url() -> str:
        one = next(urls)
        if one is None:
            raise OSError("no DNS")
        return one

    async with Scene(url=url) as scene:
        await scene.opened()
        await scene.link.closes(1006)
        await scene.redialled()
        assert [url for url, _ in scene.offers] == ["ws://one", "ws://three"]
        assert [str(error) for error in scene.of("error")] == ["no DNS"]


# ── close codes ──


@pytest.mark.parametrize("code", FINAL_CODES)
def test_terminal_code_closes_client(code: int) -> None:
    """After a close code that concerns the client it does not reconnect, and all pending calls fail."""

    @virtually
    async def play() -> None:
        async with Scene() as scene:
            await scene.opened()
            sent = scene.client.send("x")
            asked = asyncio.ensure_future(scene.client.request("q"))
            await soon()
            await scene.link.closes(code, "so there")
            await asyncio.sleep(60)
            assert (len(scene.dials), scene.client.state) == (1, "closed")
            for future in (sent, asked):
                with pytest.raises(ClientClosedError) as caught:
                    await future
                assert (caught.value.code, caught.value.reason) == (code, "so there")
            with pytest.raises(ClientClosedError):
                scene.client.send("y")
            with pytest.raises(ClientClosedError, match="so there"):
                await anext(aiter(scene.client))
            assert scene.client.closed is not None
            assert scene.client.closed.code == code

    play()


@pytest.mark.parametrize("code", PASSING_CODES)
def test_other_close_code_resumes_session(code: int) -> None:
    """After a close code that does not concern the client it reconnects, with its token and its number."""

    @virtually
    async def play() -> None:
        async with Scene() as scene:
            await scene.opened()
            await scene.link.say({"type": "msg", "data": 1}, {"type": "msg", "data": 2})
            await scene.link.closes(code)
            assert scene.client.state == "waiting"
            link = await scene.redialled()
            assert scene.dials[1] - scene.dials[0] >= 0.2
            assert link.hello["resume"] == {"token": "s.token", "seq": 2}
            assert link.hello["n"] == 2
            assert scene.of("close") == [(code, "")]

    play()


@virtually
async def test_superseded_client_starts_new_session() -> None:
    """After 4409 the token is invalid: the client starts a new session, and does not fight for the old one."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.closes(4409)
        link = await scene.redialled()
        assert "resume" not in link.hello
        assert link.hello["n"] == 2


@virtually
async def test_ping_number_mismatch_resumes_at_once_after_4412() -> None:
    """A ping with another number proves a loss: the client closes with 4412, and reconnects without delay."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "data": 1}, {"type": "ping", "seq": 2})
        assert scene.links[0].closed is not None
        assert scene.links[0].closed[0] == 4412
        assert len(scene.links) == 2
        assert scene.link.hello["resume"]["seq"] == 1
        assert scene.dials[1] - scene.dials[0] < 0.1


@virtually
async def test_third_resync_in_row_starts_new_session() -> None:
    """Repeated mismatches end in a new session and not in a loop; a stable connection resets the count."""
    async with Scene(stable_after=5.0) as scene:
        await scene.opened()
        await scene.link.closes(4412)
        await scene.link.welcome("full")
        await asyncio.sleep(5.1)
        for number in range(3):
            assert "resume" in scene.link.hello, number
            await scene.link.closes(4412)
            link = await scene.redialled(number + 3)
            if number < 2:
                await link.welcome("full")
        assert "resume" not in scene.link.hello


@virtually
async def test_full_resume_at_wrong_number_is_rejected() -> None:
    """A resume with outcome `full` has to start at the number that the client sent."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "data": 1})
        await scene.link.closes(1006)
        link = await scene.redialled()
        await link.welcome("full", seq=7)
        assert link.closed is not None
        assert link.closed[0] == 4412
        assert scene.client._session.last_seq == 1


@virtually
async def test_retry_hint_of_draining_server_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client obeys the `retry=` hint of a draining server."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.closes(4503, "draining; retry=3471")
        at = now()
        await scene.redialled()
        assert 3.4 < scene.dials[1] - at < 4.1  # the hint, and the random part


@virtually
async def test_backoff_grows_until_connection_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delay grows with each failed attempt; a connection resets it after five seconds, but not earlier."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    async with Scene() as scene:
        scene.failures = [TransportClosedError(1006, "refused")] * 2
        await scene.opened()
        await scene.link.closes(1006)
        await scene.redialled(2)
        await scene.link.welcome("full")
        await scene.link.closes(1006)
        await scene.redialled(3)
        await scene.link.welcome("full")
        await asyncio.sleep(5.1)
        await scene.link.closes(1006)
        await scene.redialled(4)
        gaps = [round(later - sooner, 1) for sooner, later in zip(scene.dials, scene.dials[1:], strict=False)]
        assert gaps[:4] == [1.2, 2.2, 4.2, 8.2]
        assert gaps[4] == pytest.approx(5.1 + 1.2, abs=0.1)


# ── credentials ──


@virtually
async def test_rejected_credential_is_renewed_once() -> None:
    """After 4401 the provider is called with `force`, its result is sent at once, and a second rejection is final."""
    forced: list[bool] = []

    async def auth(*, force: bool) -> str:
        forced.append(force)
        return f"credential-{len(forced)}"

    async with Scene(auth=auth) as scene:
        assert scene.link.hello["auth"] == "credential-1"
        await scene.link.closes(4401)
        assert scene.link.hello["auth"] == "credential-2"
        assert forced == [False, True]
        await scene.link.closes(4401)
        assert scene.client.state == "closed"
        assert len(scene.dials) == 2


@pytest.mark.parametrize("code", [4401, 3000, 1008])
def test_rejected_credential_without_provider_is_final(code: int) -> None:
    """A client without another credential does not retry."""

    @virtually
    async def play() -> None:
        async with Scene() as scene:
            await scene.link.closes(code)
            assert (scene.client.state, len(scene.dials)) == ("closed", 1)

    play()


@virtually
async def test_stable_connection_allows_another_credential_renewal() -> None:
    """A credential that was valid for a while may be renewed again later."""
    async with Scene(auth=lambda: "x", stable_after=5.0) as scene:
        for count in (2, 3):
            await scene.link.closes(4401)
            await (await scene.redialled(count)).welcome("none")
            await asyncio.sleep(5.1)
        assert scene.client.state == "open"


@virtually
async def test_auth_request_is_answered_with_new_credential() -> None:
    """The client answers the server's `auth` with a new credential, and sends nothing after its `ok`."""

    def auth(force: bool = False) -> str:
        return "new" if force else "old"

    async with Scene(auth=auth) as scene:
        await scene.opened()
        await scene.link.say({"type": "auth", "in": 5000})
        assert scene.link.of("auth") == [{"type": "auth", "token": "new"}]
        await scene.link.say({"type": "auth", "ok": True, "in": 60000})
        assert len(scene.link.of("auth")) == 1


@virtually
async def test_failing_provider_during_renewal_keeps_connection() -> None:
    """The error is reported, and the connection stays open until the server closes it."""

    def auth(**options: Any) -> str:
        if options.get("force"):
            raise OSError("no network")
        return "old"

    async with Scene(auth=auth) as scene:
        await scene.opened()
        await scene.link.say({"type": "auth", "in": 5000})
        assert [str(error) for error in scene.of("error")] == ["no network"]
        assert scene.client.state == "open"


# ── messages ──


@virtually
async def test_message_future_resolves_on_ack_or_pong() -> None:
    """The future of a message is done when the server accepts it, in an `ack` or in a `pong`."""
    async with Scene() as scene:
        await scene.opened()
        first, second, third = (scene.client.send(n, event="e", key=f"k{n}") for n in range(3))
        await soon()
        assert scene.link.of("msg")[0] == {"type": "msg", "seq": 1, "event": "e", "key": "k0", "data": 0}
        assert [frame["seq"] for frame in scene.link.of("msg")] == [1, 2, 3]
        await scene.link.say({"type": "ack", "seq": 1})
        assert (first.done(), second.done()) == (True, False)
        await scene.link.say({"type": "pong", "ack": 2})
        assert (second.done(), third.done()) == (True, False)


@virtually
async def test_unacked_messages_are_resent_with_same_numbers() -> None:
    """After a resume, unacknowledged messages are sent again with the same numbers, then the queued ones."""
    async with Scene() as scene:
        await scene.opened()
        sent = [scene.client.send(n) for n in range(3)]
        await soon()
        await scene.link.closes(1006)
        sent.append(scene.client.send(3))
        link = await scene.redialled()
        await link.welcome("full", ack=1)
        assert [(frame["seq"], frame["data"]) for frame in link.of("msg")] == [(2, 1), (3, 2), (4, 3)]
        await link.say({"type": "ack", "seq": 4})
        assert all(future.done() for future in sent)


@virtually
async def test_bytes_are_sent_as_binary_frames() -> None:
    """A message of bytes is a binary frame in both directions."""
    async with Scene() as scene:
        await scene.opened()
        scene.client.send(b"\x00\xff")
        await soon()
        raw = scene.link.raw[-1]
        assert isinstance(raw, bytes)
        await scene.link.say(raw.replace(b',"seq":1', b"").replace(b"\x00\x16", b"\x00\x0e"))
        message = await anext(scene.client)
        assert message.data == b"\x00\xff"


@virtually
async def test_received_messages_are_acked_in_batches() -> None:
    """A few messages are acknowledged together one second after the first, 32 messages at once."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "data": 1})
        await asyncio.sleep(0.5)
        await scene.link.say({"type": "msg", "data": 2})
        assert len(scene.link.of("ack")) == 1
        await asyncio.sleep(0.5)
        assert scene.link.of("ack")[1:] == [{"type": "ack", "seq": 2}]
        await scene.link.say(*[{"type": "msg", "data": n} for n in range(32)])
        assert scene.link.of("ack")[2:] == [{"type": "ack", "seq": 34}]


@virtually
async def test_received_volatile_message_is_not_acked() -> None:
    """Volatile messages are delivered, and neither counted nor acknowledged."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "volatile": True, "data": 1}, {"type": "ping", "seq": 0})
        assert (await anext(scene.client)).data == 1
        assert scene.client._session.last_seq == 0
        assert scene.link.of("pong") == [{"type": "pong", "ack": 0}]


@virtually
async def test_ping_is_answered_at_once_with_last_number() -> None:
    """A pong carries the number of the last processed message, and the time of the ping."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "data": 1}, {"type": "ping", "ts": 42, "seq": 1})
        assert scene.link.of("pong") == [{"type": "pong", "ack": 1, "ts": 42}]
        await asyncio.sleep(2)
        assert len(scene.link.of("ack")) == 1, "the pong was the acknowledgement"


@virtually
async def test_volatile_message_is_not_buffered() -> None:
    """Without a connection it is not sent, and with one it has no number and is not stored."""
    async with Scene() as scene:
        assert not scene.client.send_volatile(1)
        await scene.opened()
        assert scene.client.send_volatile([3, 4], event="cursor")
        await soon()
        assert scene.link.of("msg") == [{"type": "msg", "event": "cursor", "data": [3, 4]}]
        scene.link.may_send.clear()
        taken = [scene.client.send_volatile(number) for number in range(100)]
        assert not taken[-1], "a connection that takes nothing counts as none"
        assert len(scene.client._session.buffer) == 0
        scene.link.may_send.set()
        await scene.link.closes(1006)
        assert not scene.client.send_volatile(1)


@virtually
async def test_message_over_server_limit_is_rejected() -> None:
    """`max` of the welcome is checked before anything is sent."""
    async with Scene() as scene:
        await scene.opened(max=1000)
        with pytest.raises(MessageTooLargeError):
            scene.client.send("x" * 1000)
        scene.client.send("x" * 900)


@virtually
async def test_full_send_buffer_rejects_or_drops_oldest() -> None:
    """Without a connection a bounded number of messages waits; then the new one fails, or the oldest one."""
    async with Scene(max_buffered=2) as scene:
        scene.client.send(1)
        scene.client.send(2)
        with pytest.raises(BufferFullError):
            scene.client.send(3)
    async with Scene(max_buffered=2, overflow="drop_oldest") as scene:
        sent = [scene.client.send(number) for number in range(3)]
        assert isinstance(sent[0].exception(), BufferFullError)
        await scene.opened()
        assert [frame["data"] for frame in scene.link.of("msg")] == [1, 2]


@virtually
async def test_unknown_overflow_policy_raises() -> None:
    """An unknown overflow policy raises."""
    with pytest.raises(ValueError, match="'drop_newest'"):
        Client("ws://server", overflow="drop_newest")  # type: ignore[arg-type]


@virtually
async def test_iteration_continues_across_connections() -> None:
    """One iteration yields the messages of all connections, in order, and ends with the client."""
    async with Scene() as scene:
        got: list[Any] = []

        async def read() -> None:
            async for message in scene.client:
                got.append(message.data)

        reading = asyncio.ensure_future(read())
        await scene.opened()
        await scene.link.say({"type": "msg", "data": 1})
        await scene.link.closes(1006)
        await (await scene.redialled()).welcome("full", seq=1)
        await scene.link.say({"type": "msg", "data": 2})
        assert got == [1, 2]
        await scene.client.close()
        await soon()
        assert reading.done()


@virtually
async def test_slow_iteration_pauses_liveness_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a slow application pauses reading, silence is not taken for a dead connection."""
    monkeypatch.setattr("fastapi_ws_stabilizer.client.inbound.MAX_UNREAD", 2)
    async with Scene() as scene:
        await scene.opened(ping=1000, timeout=1000)
        await scene.link.say({"type": "msg", "data": 0})
        assert (await anext(scene.client)).data == 0
        await scene.link.say(*[{"type": "msg", "data": n} for n in range(1, 6)])
        await asyncio.sleep(60)
        assert scene.client.state == "open"
        assert [(await anext(scene.client)).data for _ in range(5)] == [1, 2, 3, 4, 5]


@virtually
async def test_abandoned_iteration_blocks_reading_for_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a `break`, unread messages delay handlers and answers for ten seconds at most."""
    monkeypatch.setattr("fastapi_ws_stabilizer.client.inbound.MAX_UNREAD", 2)
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "data": 0})
        async for message in scene.client:
            assert message.data == 0
            break
        asked = asyncio.ensure_future(scene.client.request("q", timeout=60))
        await scene.link.say(
            *[{"type": "msg", "data": n} for n in range(1, 6)], {"type": "reply", "re": "c1", "data": 7}
        )
        await asyncio.sleep(9)
        assert not asked.done(), "another iteration may start"
        await asyncio.sleep(3)
        assert await asked == 7
        assert [(await anext(scene.client)).data for _ in range(2)] == [4, 5]


# ── requests ──


@virtually
async def test_request_returns_answer_or_raises_error() -> None:
    """The reply with its id completes a request, also if it is an error."""
    async with Scene() as scene:
        await scene.opened()
        first = asyncio.ensure_future(scene.client.request("add", [1, 2]))
        second = asyncio.ensure_future(scene.client.request("no"))
        await soon()
        asked = scene.link.of("msg")
        assert asked[0] == {"type": "msg", "seq": 1, "event": "add", "id": "c1", "data": [1, 2]}
        no = {"code": "no", "message": "never"}
        await scene.link.say({"type": "reply", "re": asked[1]["id"], "error": no, "data": None})
        await scene.link.say({"type": "reply", "re": "c1", "data": 3}, {"type": "reply", "re": "c1", "data": 4})
        assert await first == 3
        with pytest.raises(RequestError, match="no: never"):
            await second
        assert scene.client._session.last_seq == 3


@virtually
async def test_client_request_survives_reconnect() -> None:
    """An accepted request is answered in the next connection."""
    async with Scene() as scene:
        await scene.opened()
        asked = asyncio.ensure_future(scene.client.request("add", timeout=60))
        await soon()
        await scene.link.closes(1006)
        await (await scene.redialled()).welcome("full", ack=1)
        await scene.link.say({"type": "reply", "re": "c1", "data": 3})
        assert await asked == 3
        assert scene.link.of("msg") == []


@virtually
async def test_unsent_request_is_cancelled_at_timeout() -> None:
    """A request that times out or is cancelled before it was sent is not sent any more."""
    async with Scene() as scene:
        with pytest.raises(RequestTimeoutError) as caught:
            await scene.client.request("late", timeout=5.0)
        assert caught.value.timeout == 5.0
        given_up = asyncio.ensure_future(scene.client.request("given up"))
        await soon()
        given_up.cancel()
        await soon()
        assert given_up.cancelled()
        assert len(scene.client._session.buffer) == 0
        await scene.opened()
        assert scene.link.of("msg") == []


@virtually
async def test_late_answer_is_ignored() -> None:
    """A request has its own timeout, independent of its message."""
    async with Scene() as scene:
        await scene.opened()
        with pytest.raises(RequestTimeoutError):
            await scene.client.request("slow", timeout=1.0)
        await scene.link.say({"type": "reply", "re": "c1", "data": 3})
        assert (scene.client.state, scene.client._session.last_seq) == ("open", 1)


@virtually
async def test_handler_return_value_answers_server_request() -> None:
    """The return value of a handler is the reply to a request of the server, numbered like a message."""
    async with Scene() as scene:

        @scene.client.on("where")
        async def where(data: Any) -> list[float]:
            return [48.1, 11.6]

        @scene.client.on("no")
        def no(data: Any) -> None:
            raise RequestError("no", "never")

        await scene.opened()
        await scene.link.say({"type": "msg", "event": "where", "id": "s1", "data": None})
        await scene.link.say({"type": "msg", "event": "no", "id": "s2", "data": None})
        assert scene.link.of("reply") == [
            {"type": "reply", "seq": 1, "re": "s1", "data": [48.1, 11.6]},
            {"type": "reply", "seq": 2, "re": "s2", "error": {"code": "no", "message": "never"}, "data": None},
        ]


@virtually
async def test_unencodable_answer_is_reported() -> None:
    """A handler that returns what JSON cannot encode affects nothing else."""
    async with Scene() as scene:
        scene.client.on("*")(lambda data: object())
        await scene.opened()
        await scene.link.say({"type": "msg", "id": "s1", "data": None}, {"type": "msg", "data": 1})
        assert len(scene.of("error")) == 1
        assert scene.client.state == "open"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (object(), "it cannot be encoded"),
        ("x" * 1000, "the message has 1036 bytes, but the server accepts 500"),
        (RequestError("no", "x" * 1000), "the message has 1073 bytes, but the server accepts 500"),
        (RequestError("no", "\ud800"), "it cannot be encoded"),
    ],
    ids=["not JSON", "too large", "error too large", "error not JSON"],
)
def test_unencodable_answer_is_replaced_by_error_reply(answer: Any, text: str) -> None:
    """The sender of the request gets an error reply, and the next message is handled."""

    @virtually
    async def play() -> None:
        async with Scene() as scene:
            handled: list[Any] = []

            @scene.client.on()
            def handle(data: Any) -> Any:
                handled.append(data)
                if isinstance(answer, Exception):
                    raise answer
                return answer

            await scene.opened(max=500)
            await scene.link.say({"type": "msg", "id": "s1", "data": 1}, {"type": "msg", "data": 2})
            error = {"code": "unsendable", "message": f"the client's answer cannot be sent: {text}"}
            assert scene.link.of("reply") == [{"type": "reply", "seq": 1, "re": "s1", "error": error, "data": None}]
            assert len(scene.of("error")) == 1
            assert handled == [1, 2]

    play()


@virtually
async def test_answer_over_new_server_limit_becomes_error() -> None:
    """The next server may accept smaller messages than the one for which an answer was queued."""
    async with Scene() as scene:
        gate = asyncio.Event()

        @scene.client.on()
        async def handle(data: Any) -> str:
            await gate.wait()
            return "x" * 1000

        await scene.opened()
        await scene.link.say({"type": "msg", "id": "s1", "data": 1})
        await scene.link.closes(1006)
        gate.set()
        await (await scene.redialled()).welcome("full", seq=1, max=500)
        assert [reply["error"]["code"] for reply in scene.link.of("reply")] == ["unsendable"]


@virtually
async def test_answer_without_buffer_room_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Where not even an error can be queued, this is logged and has no other effect."""
    async with Scene(max_buffered=1) as scene:
        scene.client.on()(lambda data: data)
        await scene.opened()
        scene.client.send("x")
        await scene.link.say({"type": "msg", "id": "s1", "data": 1})
        assert [type(error) for error in scene.of("error")] == [BufferFullError]
        assert [record.getMessage()[:32] for record in caplog.records] == ["the client cannot answer request"]
        assert scene.client.state == "open"


# ── lost messages ──


@virtually
async def test_new_session_gets_no_answers_of_old_session() -> None:
    """Requests of a lost session are not answered in the new one, regardless of the state of their answers."""
    async with Scene() as scene:
        gate = asyncio.Event()
        handled: list[Any] = []

        @scene.client.on()
        async def handle(data: Any) -> Any:
            if data != "sent":
                await gate.wait()
            handled.append(data)
            return data

        await scene.opened()
        asked = [{"type": "msg", "id": f"s{n}", "data": data} for n, data in enumerate(["sent", "handled", "waiting"])]
        await scene.link.say(*asked)
        assert [reply["data"] for reply in scene.link.of("reply")] == ["sent"]
        await scene.link.closes(1006)
        await (await scene.redialled()).welcome("lost", why="unknown", session="t", token="t.token")
        gate.set()
        await scene.link.say({"type": "msg", "id": "s1", "data": "new"})
        assert handled == ["sent", "handled", "waiting", "new"]
        assert scene.link.of("reply") == [{"type": "reply", "seq": 1, "re": "s1", "data": "new"}]


@virtually
async def test_gap_event_names_missing_numbers() -> None:
    """Lost messages are reported by their numbers, and counting continues after them."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "data": 1})
        await scene.link.closes(1006)
        sent = scene.client.send("text")
        await (await scene.redialled()).welcome("gap", why="overflow", seq=9)
        assert scene.of("gap") == [Gap(session_lost=False, why="overflow", first=2, last=9)]
        assert scene.of("open") == ["none", "gap"]
        await scene.link.say({"type": "msg", "data": 10}, {"type": "ping", "seq": 10}, {"type": "ack", "seq": 1})
        assert scene.client.state == "open"
        assert sent.done()


@virtually
async def test_lost_session_fails_sent_messages_only() -> None:
    """Sent messages and accepted requests of a lost session fail; unsent ones go to the new session."""
    async with Scene() as scene:
        await scene.opened()
        sent = scene.client.send("sent")
        accepted = asyncio.ensure_future(scene.client.request("accepted", timeout=600))
        await soon()
        await scene.link.say({"type": "ack", "seq": 2})
        unsure = asyncio.ensure_future(scene.client.request("unsure", timeout=600))
        open_end = scene.client.send("open end")
        await soon()
        await scene.link.closes(1006)
        fresh = scene.client.send("fresh")
        await (await scene.redialled()).welcome("lost", why="unknown", session="t", token="t.token")
        assert await sent is None
        for future in (accepted, unsure, open_end):
            with pytest.raises(SessionLostError):
                await future
        assert scene.of("gap") == [Gap(session_lost=True, why="unknown", first=1, last=None)]
        assert [(frame["seq"], frame["data"]) for frame in scene.link.of("msg")] == [(1, "fresh")]
        assert (scene.client.session, fresh.done()) == ("t", False)


@virtually
async def test_replay_on_lost_resends_messages_with_same_keys() -> None:
    """With `replay_on_lost` every message has an idempotency key, and goes to the new session with the same one."""
    async with Scene(replay_on_lost=True) as scene:
        await scene.opened()
        sent = scene.client.send("a")
        await soon()
        before = scene.link.of("msg")
        await scene.link.closes(1006)
        await (await scene.redialled()).welcome("lost", why="unknown", ack=0)
        assert scene.link.of("msg") == before
        assert before[0]["key"]
        await scene.link.say({"type": "ack", "seq": 1})
        assert sent.done()


@virtually
async def test_replay_on_lost_asks_accepted_request_again() -> None:
    """With `replay_on_lost` the new session gets a request that the old one accepted, with its idempotency key."""
    async with Scene(replay_on_lost=True) as scene:
        await scene.opened()
        asked = asyncio.ensure_future(scene.client.request("add", 1, timeout=60))
        await soon()
        (before,) = scene.link.of("msg")
        await scene.link.say({"type": "ack", "seq": 1})
        await scene.link.closes(1006)
        scene.client.send("later")
        await (await scene.redialled()).welcome("lost", why="unknown", ack=0)
        again, later = scene.link.of("msg")
        assert (again, later["data"]) == (before, "later")
        await scene.link.say({"type": "ack", "seq": 2}, {"type": "reply", "re": before["id"], "data": 2})
        assert await asked == 2


# ── dead connections ──


@virtually
async def test_silent_server_is_disconnected_after_timeout() -> None:
    """After `ping + timeout` without any frame the connection is dead, and the close frame is not awaited."""
    async with Scene() as scene:
        await scene.opened(ping=25_000, timeout=20_000)
        scene.link.may_close.clear()
        await asyncio.sleep(44)
        await scene.link.say({"type": "later"})
        await asyncio.sleep(44)
        assert scene.client.state == "open"
        await asyncio.sleep(1.1)
        assert scene.of("close") == [(4408, "heartbeat timeout")]
        await scene.redialled()


@virtually
async def test_server_without_heartbeat_may_be_silent() -> None:
    """If the server announces that it sends no pings, silence has no meaning."""
    async with Scene() as scene:
        await scene.opened(ping=0, timeout=0)
        await asyncio.sleep(3600)
        assert scene.client.state == "open"


@virtually
async def test_unanswered_probe_closes_connection() -> None:
    """An answered probe proves the connection and measures it; an unanswered one closes it at once."""
    async with Scene(probe_timeout=5.0) as scene:
        await scene.opened()
        assert scene.client.rtt is None
        scene.client.probe()
        await asyncio.sleep(0.25)
        await scene.link.say({"type": "pong"})
        assert scene.client.rtt == pytest.approx(0.25, abs=0.01)
        await asyncio.sleep(10)
        assert scene.client.state == "open"
        scene.client.probe()
        await asyncio.sleep(5.1)
        assert scene.of("close") == [(4408, "no answer")]
        assert len(scene.links) == 2, "it reconnects without delay"


async def is_doubted_after(seconds: float, link: FakeLink, *, before: int = 0) -> None:
    """Check that a probe is sent after that time, and not before."""
    await asyncio.sleep(seconds - 0.1)
    assert len(link.of("ping")) == before
    await asyncio.sleep(0.2)
    assert len(link.of("ping")) == before + 1


@virtually
async def test_unacked_message_triggers_probe_after_ten_seconds() -> None:
    """When the server has not acknowledged a message for ten seconds, the client sends a probe."""
    async with Scene() as scene:
        await scene.opened()
        scene.client.send("x")
        await is_doubted_after(10, scene.link)
        await scene.link.say({"type": "pong", "ack": 1})
        await asyncio.sleep(30)
        assert len(scene.link.of("ping")) == 1


@virtually
async def test_each_message_has_its_own_ack_timeout() -> None:
    """Each unacknowledged message causes a probe ten seconds after it was sent, regardless of earlier messages."""
    async with Scene() as scene:
        await scene.opened()
        for number in range(1, 4):
            scene.client.send(number)
            await asyncio.sleep(6)
            await scene.link.say({"type": "ack", "seq": number})
        scene.client.send(4)
        await is_doubted_after(10, scene.link)


@virtually
async def test_ack_after_probe_restarts_ack_timeout() -> None:
    """After an answered probe, a message that is still unacknowledged has ten seconds from its own send."""
    async with Scene() as scene:
        await scene.opened()
        scene.client.send(1)
        await asyncio.sleep(9)
        scene.client.send(2)
        await asyncio.sleep(1.1)
        assert len(scene.link.of("ping")) == 1
        await scene.link.say({"type": "pong", "ack": 1})
        await is_doubted_after(8.9, scene.link, before=1)


@virtually
async def test_answering_server_without_acks_is_probed_repeatedly() -> None:
    """The server answers, so the connection stays open."""
    async with Scene() as scene:
        await scene.opened()
        scene.client.send("x")
        for count in range(1, 6):
            await asyncio.sleep(10.01)
            assert len(scene.link.of("ping")) == count
            await scene.link.say({"type": "pong"})
        assert scene.client.state == "open"


class SlowReader:
    """A client with a slow handler, so that it stops reading."""

    def __init__(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastapi_ws_stabilizer.client.inbound.MAX_UNREAD", 2)
        self.scene = scene
        self.handled: list[int] = []
        self.may_go_on = asyncio.Event()

        @scene.client.on("slow")
        async def slow(data: int) -> None:
            await self.may_go_on.wait()
            self.handled.append(data)

    async def send_to_handler(self, count: int) -> None:
        """Let the server send that many messages to the handler."""
        await self.scene.link.say(*[{"type": "msg", "event": "slow", "data": n} for n in range(count)])


@virtually
@pytest.mark.parametrize("asked", ["by the client", "by check()"])
async def test_unread_probe_reply_does_not_close_connection(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """The reply to a probe may be unread behind messages for a slow handler, so the connection stays open."""
    async with Scene(probe_timeout=5.0) as scene:
        await scene.opened(ping=0)
        reader = SlowReader(scene, monkeypatch)
        await reader.send_to_handler(6)
        scene.client.send("x")
        if asked == "by check()":
            scene.client.probe()
        await scene.link.say({"type": "ack", "seq": 1}, {"type": "pong"})
        await asyncio.sleep(60)
        assert (scene.client.state, reader.handled) == ("open", [])
        reader.may_go_on.set()
        await asyncio.sleep(60)
        assert (len(scene.links), scene.client.state) == (1, "open")
        assert reader.handled == list(range(6))


@virtually
async def test_dead_connection_is_closed_after_reading_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for an answer starts again when reading continues."""
    async with Scene(probe_timeout=5.0) as scene:
        await scene.opened(ping=0)
        reader = SlowReader(scene, monkeypatch)
        await reader.send_to_handler(3)
        scene.client.probe()
        await asyncio.sleep(22)
        assert scene.client.state == "open"
        reader.may_go_on.set()
        await asyncio.sleep(4.9)
        assert scene.client.state == "open"
        await asyncio.sleep(0.2)
        assert scene.of("close") == [(4408, "no answer")]


@virtually
async def test_large_message_on_slow_link_extends_probe_timeout() -> None:
    """The answer to a probe comes after the message before it: 16 KiB per second is not a dead connection."""
    async with Scene(probe_timeout=5.0) as scene:
        await scene.opened(ping=0)
        scene.link.may_send.clear()
        scene.client.send("x" * 40 * 16 * 1024)
        await asyncio.sleep(10 + 5 + 39)
        assert scene.client.state == "open"
        await asyncio.sleep(2)
        assert scene.of("close") == [(4408, "no answer")]


# ── large messages of the server ──


@virtually
async def test_incomplete_message_bytes_count_as_liveness() -> None:
    """A large message on a slow connection is not silence; the timeout starts at the last of its bytes."""
    async with Scene() as scene:
        link = await scene.opened(ping=25_000, timeout=20_000)
        await link.trickle(1_000_000, 200)
        await asyncio.sleep(44.5)
        assert scene.client.state == "open"
        await asyncio.sleep(1)
        assert scene.of("close") == [(4408, "heartbeat timeout")]


@virtually
async def test_client_acks_during_large_inbound_message() -> None:
    """The server's ping may be behind the message in a proxy, so the client sends a frame within its timeout."""
    async with Scene() as scene:
        link = await scene.opened(ping=25_000, timeout=20_000)
        before = len(link.sent)
        await link.trickle(1_000_000, 100)
        assert [frame["type"] for frame in link.sent[before:]] == ["ack"] * 10
        await asyncio.sleep(15)
        after = len(link.sent)
        await asyncio.sleep(25)
        assert len(link.sent) == after


@virtually
@pytest.mark.parametrize("what", ["come", "gone"])
async def test_bytes_in_transit_count_as_probe_answer(what: str) -> None:
    """An answer is behind the bytes in transit, in both directions, and is awaited as long as they make progress."""
    async with Scene(probe_timeout=5.0) as scene:
        link = await scene.opened(ping=0)
        link.taken = 0
        scene.client.probe()
        for _ in range(20):
            await asyncio.sleep(4)
            if what == "come":
                link.came = (link.came[0] + 1000, now())
            else:
                link.taken += 1000
        assert scene.client.state == "open"
        await asyncio.sleep(10.1)
        assert scene.of("close") == [(4408, "no answer")]


async def breaks_off(link: FakeLink, count: int = 100_000) -> None:
    """Lose a connection after that many bytes of a message."""
    link.came = (link.came[0] + count, now())
    await link.closes(1006)


@virtually
async def test_message_interrupted_twice_becomes_gap() -> None:
    """It would be restarted forever, so the client continues after it, and reports a gap."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "data": "first"})
        await breaks_off(scene.link)
        again = await scene.redialled()
        assert again.hello["resume"]["seq"] == 1
        await again.welcome("full", seq=1)
        assert scene.of("gap") == []
        await breaks_off(again)
        assert scene.of("gap") == [Gap(False, "unfinished", 2, 2)]
        third = await scene.redialled(3)
        assert third.hello["resume"]["seq"] == 2
        await third.welcome("full", seq=2)
        await third.say({"type": "msg", "data": "third"})
        assert scene.client._session.last_seq == 3
        assert scene.of("gap") == [Gap(False, "unfinished", 2, 2)]


@virtually
@pytest.mark.parametrize("between", ["volatile", "ping", "quiet"])
async def test_interrupted_volatile_message_skips_no_number(between: str) -> None:
    """The server does not send a volatile message again, so the client skips no number for it."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "data": "first"})
        for dial in range(2, 5):
            await breaks_off(scene.link)
            link = await scene.redialled(dial)
            assert link.hello["resume"]["seq"] == 1
            await link.welcome("full", seq=1)
            if between == "volatile":
                await link.say({"type": "msg", "volatile": True, "data": "tick"})
            elif between == "ping":
                await link.say({"type": "ping", "seq": 1})
            else:
                await asyncio.sleep(1.1)
        await scene.link.say({"type": "msg", "data": "second"})
        assert (scene.client._session.last_seq, scene.of("gap")) == (2, [])


@virtually
async def test_slow_message_interrupted_twice_becomes_gap() -> None:
    """The bytes after the welcome belong to the message that was sent again, even if it is interrupted late."""
    async with Scene() as scene:
        await scene.opened()
        await breaks_off(scene.link)
        link = await scene.redialled()
        await link.welcome("full")
        link.came = (1000, now())
        await asyncio.sleep(10)
        await breaks_off(link)
        assert scene.of("gap") == [Gap(False, "unfinished", 1, 1)]


@virtually
@pytest.mark.parametrize("count", [0, 16 * 1024 - 1])
async def test_small_message_is_never_skipped(count: int) -> None:
    """A small message is not the cause of the repeated disconnects."""
    async with Scene() as scene:
        for dial in range(1, 6):
            link = await scene.redialled(dial)
            await link.welcome("none" if dial == 1 else "full")
            await breaks_off(link, count)
        assert scene.of("gap") == []


@virtually
async def test_interruptions_are_counted_per_message_number() -> None:
    """Another message, or another session, restarts the count."""
    async with Scene() as scene:
        await scene.opened()
        await breaks_off(scene.link)
        second = await scene.redialled()
        await second.welcome("full")
        await second.say({"type": "msg", "data": "arrived"})
        await breaks_off(second)
        third = await scene.redialled(3)
        await third.welcome("lost", session="t", seq=1)
        await breaks_off(third)
        assert [gap.why for gap in scene.of("gap")] == [None]


@virtually
async def test_unread_messages_do_not_count_as_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that were not read because of a slow handler may be complete."""
    async with Scene() as scene:
        for dial in range(1, 4):
            link = await scene.redialled(dial)
            await link.welcome("none" if dial == 1 else "full", seq=scene.client._session.last_seq)
            if dial == 1:
                reader = SlowReader(scene, monkeypatch)
                await reader.send_to_handler(3)
            else:
                await link.say({"type": "later"})
            await breaks_off(link)
            scene.client.reconnect()
        assert scene.of("gap") == []


@virtually
async def test_close_during_partial_message_reports_no_gap() -> None:
    """A client that is closed reports no gap."""
    async with Scene() as scene:
        await scene.opened()
        await breaks_off(scene.link)
        link = await scene.redialled()
        await link.welcome("full")
        link.came = (100_000, now())
        await scene.client.close()
        assert scene.of("gap") == []


@virtually
async def test_late_resent_message_gets_ack_timeout_from_resend() -> None:
    """The timeout runs from the resend; the send on the previous connection is irrelevant."""
    async with Scene() as scene:
        await scene.opened()
        scene.client.send(1)
        scene.client.send(2)
        await asyncio.sleep(9)
        await scene.link.closes(1006)
        again = await scene.redialled()
        again.may_send.clear()
        await again.welcome("full")
        await again.say({"type": "ack", "seq": 1})
        await asyncio.sleep(9.9)
        assert (len(scene.links), again.of("ping")) == (2, [])
        again.may_send.set()
        await is_doubted_after(10, again)


@virtually
async def test_resent_messages_get_new_ack_timeout() -> None:
    """After a reconnect the server has the full timeout for messages that the previous connection lost."""
    async with Scene() as scene:
        await scene.opened()
        scene.client.send("x")
        await asyncio.sleep(9)
        await scene.link.closes(1006)
        await (await scene.redialled()).welcome("full")
        await is_doubted_after(10, scene.link)


@virtually
async def test_stalled_write_closes_connection_after_grace() -> None:
    """When a write stalls the reader has a moment to receive a close code; then the connection is lost."""
    async with Scene() as scene:
        await scene.opened()
        scene.link.broken = True
        sent = scene.client.send("x")
        await asyncio.sleep(0.4)
        assert scene.of("close") == []
        await asyncio.sleep(0.2)
        assert scene.of("close") == [(1006, "broken pipe")]
        await (await scene.redialled()).welcome("full")
        await scene.link.say({"type": "ack", "seq": 1})
        assert sent.done()


@virtually
async def test_close_code_read_after_failed_write_applies() -> None:
    """A close code that is read after a failed write takes precedence."""
    async with Scene() as scene:
        await scene.opened()
        scene.link.broken = True
        scene.client.send("x")
        await asyncio.sleep(0.1)
        await scene.link.closes(4410, "kicked")
        assert (scene.client.state, scene.of("close")) == ("closed", [(4410, "kicked")])


@virtually
async def test_writer_bug_is_logged_and_session_resumes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in the writer that is not a closed connection is logged, and the session resumes in a new connection."""
    async with Scene() as scene:
        await scene.opened()

        async def fail(message: str | bytes) -> None:
            raise LookupError("a bug in a codec")

        monkeypatch.setattr(scene.link, "send", fail)
        sent = scene.client.send("x")
        await soon()
        assert scene.of("close") == [(1006, "LookupError('a bug in a codec')")]
        errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert errors == ["the client's writer failed"]
        await (await scene.redialled()).welcome("full")
        assert scene.link.of("msg") == [{"type": "msg", "seq": 1, "data": "x"}]
        await scene.link.say({"type": "ack", "seq": 1})
        assert sent.done()


@virtually
async def test_probe_during_backoff_reconnects_now() -> None:
    """A probe ends the wait before the next attempt."""
    async with Scene(min_delay=100) as scene:
        await scene.opened()
        await scene.link.closes(1006)
        await asyncio.sleep(1)
        assert len(scene.dials) == 1
        scene.client.probe()
        await soon()
        assert len(scene.dials) == 2


@virtually
async def test_reconnect_closes_4000_and_resumes_at_once() -> None:
    """`reconnect` closes with 4000, and the session resumes in the next connection at once."""
    async with Scene() as scene:
        await scene.opened()
        scene.client.reconnect()
        await soon()
        assert scene.links[0].closed == (4000, "reconnect")
        assert scene.link.hello["resume"] == {"token": "s.token", "seq": 0}


@virtually
async def test_frames_of_old_connection_are_ignored() -> None:
    """Frames of an abandoned connection have no effect."""
    async with Scene() as scene:
        await scene.opened()
        old = scene.link
        old.may_close.clear()
        scene.client.reconnect()
        await soon()
        await scene.link.welcome("full")
        await old.say({"type": "msg", "data": 1}, {"type": "ping", "seq": 99})
        await old.closes(4410)
        assert (scene.client.state, scene.client._session.last_seq, len(scene.links)) == ("open", 0, 2)


# ── drain ──


@virtually
async def test_drain_frame_closes_4000_and_resumes() -> None:
    """The client closes with 4000 after `after`, and resumes at once."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "drain", "after": 3000, "within": 20_000})
        assert scene.of("drain") == [(3.0, 20.0)]
        await asyncio.sleep(2.9)
        assert len(scene.links) == 1
        await asyncio.sleep(0.2)
        assert scene.links[0].closed == (4000, "drain")
        assert scene.link.hello["resume"] == {"token": "s.token", "seq": 0}


@virtually
async def test_earlier_of_two_drain_frames_applies() -> None:
    """A later drain frame does not extend the first, and an earlier one shortens it."""
    async with Scene() as scene:
        await scene.opened()
        for after in (3000, 1000, 9000):
            await scene.link.say({"type": "drain", "after": after, "within": 20_000})
        await asyncio.sleep(0.9)
        assert len(scene.links) == 1
        await asyncio.sleep(0.2)
        assert len(scene.links) == 2
        await scene.link.welcome("full")
        await asyncio.sleep(20)
        assert len(scene.links) == 2


# ── frames ──


@virtually
async def test_unknown_frames_are_ignored() -> None:
    """Newer servers may send frames and fields that the client does not know."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "later", "x": 1}, {"type": "welcome", "v": 1})
        assert scene.client.state == "open"


@pytest.mark.parametrize(
    "frame", ["{", "[]", {"type": "ack"}, {"type": "drain"}, {"type": "msg", "event": 7}, b"\x02\x00\x00", {"type": 7}]
)
def test_unreadable_frame_is_reported_and_skipped(frame: Any) -> None:
    """The client reports a frame that it cannot read to `on_error`, counts it and continues."""

    @virtually
    async def play() -> None:
        async with Scene() as scene:
            await scene.opened()
            await scene.link.say(frame)
            assert [type(error) for error in scene.of("error")] == [UnreadableFrameError]
            assert scene.client.unreadable_frames == 1
            assert (scene.client.state, scene.link.closed) == ("open", None)

    play()


@pytest.mark.parametrize(
    ("frame", "number"),
    [
        (f'{{"type":"msg","data":{"[" * 99}{"]" * 99}}}', 1),
        (f'{{ "type" : "reply","re":"c1","data":{10**400}}}', 1),
        (json.dumps({"type": "msg", "event": "x" * 300, "data": 1}), 1),
        (f'{{"type":"msg","volatile":true,"data":{10**400}}}', 0),
        (b"\x01\x00\x10" + b'{"type":"msg","x', 1),
        ('{"type":"later","x":NaN}', 0),
    ],
    ids=lambda value: str(value)[:24],
)
def test_unreadable_sequenced_frame_counts_its_number(frame: Any, number: int) -> None:
    """A sequenced frame that the client cannot read is counted, so that the server's next ping reveals no gap."""

    @virtually
    async def play() -> None:
        async with Scene() as scene:
            await scene.opened()
            await scene.link.say(frame, {"type": "ping", "seq": number})
            assert scene.link.of("pong")[-1]["ack"] == number
            assert (scene.client.state, scene.client.unreadable_frames) == ("open", 1)

    play()


@virtually
async def test_oversized_message_is_retried_then_session_restarts() -> None:
    """The client reconnects after a message that its library rejects, and requests a new session the third time."""
    async with Scene() as scene:
        for dial in (1, 2, 3):
            await scene.redialled(dial)
            await scene.link.welcome("full" if dial > 1 else "none")
            scene.link._incoming.put_nowait(UnreadableMessageError("closed with 1009"))
            await soon()
            assert scene.client.state != "closed"
        await scene.redialled(4)
        assert "resume" not in scene.link.hello
        assert [type(error) for error in scene.of("error")] == [UnreadableFrameError] * 3


@pytest.mark.parametrize("compressed", [False, True])
def test_unreadable_compressed_frame_counts_its_number(compressed: bool) -> None:
    """A compressed frame that is too large for the client counts under the number at its beginning."""

    @virtually
    async def play() -> None:
        async with Scene(deflate=True) as scene:
            await scene.opened(caps=["deflate-raw"])
            text = f'{{"type":"msg","data":"{"x" * (17 * 1024 * 1024)}"}}' if compressed else '{"type":"msg","data":}'
            frame = deflated(text) if compressed else text
            assert frame is not None
            await scene.link.say(frame, {"type": "ping", "seq": 1})
            assert scene.link.of("pong")[-1]["ack"] == 1

    play()


@virtually
async def test_error_frame_is_reported_and_keeps_connection() -> None:
    """An `error` frame does not close the connection."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "error", "code": "unknown_type", "message": "no handler", "seq": 3})
        assert [str(error) for error in scene.of("error")] == ["unknown_type: no handler (message 3)"]
        assert scene.client.state == "open"


@virtually
async def test_rejected_message_fails_its_future_and_is_reported() -> None:
    """The future of a rejected message fails with the server's reason, and `on_error` gets the message's key."""
    async with Scene() as scene:
        await scene.opened()
        sent = [scene.client.send(number, event=f"e{number}") for number in (1, 2, 3)]
        await soon()
        await scene.link.say({"type": "ack", "seq": 1})
        for seq in (1, 2):
            await scene.link.say({"type": "error", "code": "unknown_type", "message": "no", "seq": seq})
        await scene.link.say({"type": "ack", "seq": 3})
        assert [one.exception() is None for one in sent] == [True, False, True]
        error = sent[1].exception()
        assert isinstance(error, RefusedError)
        assert (error.code, error.seq, error.event) == ("unknown_type", 2, "e2")
        assert [(one.seq, one.event) for one in scene.of("error")] == [(1, "e1"), (2, "e2")]
        assert len(scene.client._session.buffer) == 0


@virtually
async def test_rejected_message_with_delay_is_resent_in_order() -> None:
    """A message that the server has no room for, and those after it, are sent again after the delay, one at first."""
    async with Scene() as scene:
        await scene.opened()
        sent = [scene.client.send(number) for number in range(1, 6)]
        await soon()
        await scene.link.say({"type": "ack", "seq": 2})
        await scene.link.say({"type": "error", "code": "rate_limited", "message": "", "seq": 3, "retry": 2000})
        await asyncio.sleep(1.9)
        assert len(scene.link.of("msg")) == 5
        await asyncio.sleep(0.2)
        assert [frame["seq"] for frame in scene.link.of("msg")[5:]] == [3]
        await scene.link.say({"type": "ack", "seq": 3})
        assert [frame["seq"] for frame in scene.link.of("msg")[5:]] == [3, 4, 5]
        await scene.link.say({"type": "error", "code": "rate_limited", "message": "", "seq": 5, "retry": 3000})
        await scene.link.say({"type": "ack", "seq": 4}, {"type": "ping"})
        await asyncio.sleep(3.1)
        assert [frame["seq"] for frame in scene.link.of("msg")[8:]] == [5]
        await scene.link.say({"type": "ack", "seq": 5})
        assert [one.exception() for one in sent] == [None] * 5
        assert scene.of("error") == []


@virtually
async def test_number_of_unacked_messages_is_limited() -> None:
    """The client has at most 128 unacknowledged messages at first, and each accepted one raises the limit by one."""
    async with Scene() as scene:
        await scene.opened()
        for number in range(600):
            scene.client.send(number)
        await soon()
        assert len(scene.link.of("msg")) == 128
        await scene.link.say({"type": "ack", "seq": 100})
        assert len(scene.link.of("msg")) == 328
        await scene.link.say({"type": "ack", "seq": 328})
        assert len(scene.link.of("msg")) == 600


# ── listeners ──


@virtually
async def test_failing_listener_does_not_affect_others(caplog: pytest.LogCaptureFixture) -> None:
    """What a listener raises is logged; the other listeners and the connection continue."""
    async with Scene() as scene:

        def fail(*_: Any) -> None:
            raise KeyError("broken listener")

        for register in ("on_open", "on_gap", "on_close", "on_state", "on_drain", "on_error"):
            assert getattr(scene.client, register)(fail) is fail
        scene.client.on_open(lambda outcome: scene.heard.append(("second", outcome)))
        await scene.opened()
        await scene.link.say({"type": "drain", "after": 60_000}, {"type": "error"})
        await scene.link.closes(1006)
        await (await scene.redialled()).welcome("gap", seq=3)
        assert scene.client.state == "open"
        assert scene.of("second") == ["none", "gap"]
        assert len([record for record in caplog.records if "a listener for" in record.message]) >= 8


@virtually
async def test_async_listener_does_not_block_client() -> None:
    """The client does not wait for an async listener, and logs its failure."""
    async with Scene() as scene:
        heard: list[str] = []

        @scene.client.on_state
        async def note(state: str) -> None:
            await asyncio.sleep(1)
            heard.append(state)

        await scene.opened()
        assert heard == []
        await asyncio.sleep(1.1)
        assert heard == ["open"]


# ── close ──


@virtually
async def test_close_fails_pending_futures_with_client_closed_error() -> None:
    """On close every future fails with `ClientClosedError`, regardless of the state of its message."""
    scene = Scene()
    async with scene:
        await scene.opened()
        accepted = scene.client.send("accepted")
        await soon()
        await scene.link.say({"type": "ack", "seq": 1})
        futures: list[Any] = [scene.client.send("sent"), asyncio.ensure_future(scene.client.request("asked"))]
        await soon()
        scene.link.may_send.clear()
        futures += [scene.client.send("queued"), asyncio.ensure_future(scene.client.request("queued too"))]
        futures.append(asyncio.ensure_future(anext(scene.client, "nothing")))
        await soon()
        await scene.client.close()
        assert scene.link.closed == (1000, "")
    await soon()
    assert accepted.result() is None
    assert futures.pop().result() == "nothing"
    for future in futures:
        assert isinstance(future.exception(), ClientClosedError)
    with pytest.raises(ClientClosedError):
        await scene.client.request("late")
    with pytest.raises(ClientClosedError):
        scene.client.start()
    await scene.client.close()
    assert len(scene.client._tasks) == 0


@pytest.mark.parametrize("moment", ["idle", "dialling", "connected", "waiting"])
def test_client_can_be_closed_in_any_state(moment: str) -> None:
    """Closing ends an attempt, a handshake and a delay within `flush_timeout`, and leaves no task."""

    @virtually
    async def play() -> None:
        scene = Scene(min_delay=100)
        scene.black_hole = moment == "dialling"
        if moment != "idle":
            scene.client.start()
            await soon()
        if moment == "waiting":
            await scene.link.closes(1006)
            assert scene.client.state == "waiting"
        waiting = scene.client.send("x")
        at = now()
        await scene.client.close()
        assert now() - at < 6
        assert scene.client.state == "closed"
        assert isinstance(waiting.exception(), ClientClosedError)
        await asyncio.sleep(200)
        assert len(scene.dials) <= 1
        assert len(scene.client._tasks) == 0

    play()


@virtually
async def test_stalled_close_frame_delays_close_by_seconds_only() -> None:
    """A stalled network delays the close by a few seconds at most."""
    async with Scene() as scene:
        await scene.opened()
        scene.link.may_close.clear()
        at = now()
        await scene.client.close()
        assert now() - at <= 10
        assert scene.client.state == "closed"
        assert len(scene.client._tasks) == 0


@virtually
@pytest.mark.parametrize("stalled", [False, True])
async def test_cancelled_client_leaves_no_task_for_event_loop(stalled: bool) -> None:
    """A client that the end of the event loop cancels sends a close frame within a second, and leaves no task."""
    async with Scene() as scene:
        await scene.opened()
        if stalled:
            scene.link.may_close.clear()
        runner, at = scene.client._runner, now()
        assert runner is not None
        known = scene.client._tasks.cancel()
        await asyncio.wait(known)
        assert runner.done()
        assert now() - at <= (1.1 if stalled else 0.1)
        assert (scene.link.closed, len(scene.client._tasks)) == ((4000, "cancelled"), 0)


@virtually
async def test_client_can_be_closed_from_its_own_handler() -> None:
    """Closing in a handler does not wait for that handler."""
    async with Scene() as scene:

        @scene.client.on("bye")
        async def bye(data: Any) -> None:
            await scene.client.close()

        await scene.opened()
        await scene.link.say({"type": "msg", "event": "bye", "data": None})
        await soon()
        assert scene.client.state == "closed"
        assert scene.link.closed == (1000, "")


@virtually
async def test_client_bug_closes_client_and_wakes_waiters(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the client itself fails it is closed, all pending calls fail, and the error is logged."""
    async with Scene() as scene:
        await scene.opened()
        sent = scene.client.send("x")
        monkeypatch.setattr(Backoff, "delay", lambda *_: 1 / 0)
        await scene.link.closes(1006)
        await soon()
        assert scene.client.state == "closed"
        assert isinstance(sent.exception(), ClientClosedError)
        assert any("failed" in record.getMessage() for record in caplog.records)


@virtually
async def test_client_repr_contains_no_token_or_credential() -> None:
    """The repr of a client contains its session, and neither its token nor its credential."""
    async with Scene(auth=lambda: "credential") as scene:
        await scene.opened()
        assert repr(scene.client) == "<Client open session=s>"


@virtually
async def test_connect_creates_client_with_same_options() -> None:
    """`connect` has the same options as `Client`."""
    client = connect("ws://server", dial=Scene()._dial, max_buffered=1)
    assert isinstance(client, Client)
    client.send(1)
    with pytest.raises(BufferFullError):
        client.send(2)
    await client.close()
    assert json.dumps(client.state) == '"closed"'


# ── flush at close ──


@virtually
async def test_client_close_flushes_before_close_frame() -> None:
    """Closing sends numbered and volatile messages, waits for the acknowledgement, and then sends the close frame."""
    async with Scene() as scene:
        await scene.opened()
        sent = [scene.client.send(number) for number in range(300)]
        assert all(scene.client.send_volatile(number) for number in range(50))
        closing = asyncio.ensure_future(scene.client.close())
        for seq in (128, 300):
            await soon()
            assert not closing.done()
            await scene.link.say({"type": "ack", "seq": seq})
        await closing
        assert [one.exception() for one in sent] == [None] * 300
        assert len(scene.link.of("msg")) == 350
        assert scene.link.closed == (1000, "")


@virtually
async def test_close_writes_volatile_messages_first() -> None:
    """Volatile messages are written before the close frame, without waiting for an acknowledgement."""
    async with Scene() as scene:
        await scene.opened()
        scene.client.send_volatile("x")
        await scene.client.close()
        assert [frame["data"] for frame in scene.link.of("msg")] == ["x"]


@virtually
@pytest.mark.parametrize("volatile", [True, False])
async def test_concurrent_closes_return_together(volatile: bool) -> None:
    """All calls of `close` return when the client is closed, and none waits for `flush_timeout`."""
    async with Scene() as scene:
        await scene.opened()
        if volatile:
            scene.client.send_volatile("x")
        else:
            scene.client.send("x")
        at = now()
        closing = [asyncio.ensure_future(scene.client.close()) for _ in range(3)]
        await soon()
        await scene.link.say({"type": "ack", "seq": 1})
        await asyncio.gather(*closing)
        assert now() - at < 0.5
        assert [frame["data"] for frame in scene.link.of("msg")] == ["x"]
        assert scene.link.closed == (1000, "")


@virtually
async def test_close_flushes_in_later_connection() -> None:
    """If the connection breaks while the client closes, it is replaced and the messages arrive."""
    async with Scene() as scene:
        await scene.opened()
        sent = scene.client.send("x")
        closing = asyncio.ensure_future(scene.client.close())
        await soon()
        await scene.link.closes(1006)
        await scene.redialled(2)
        await scene.link.welcome("full", ack=1)
        await closing
        assert sent.exception() is None


@pytest.mark.parametrize("flush_timeout", [0.5, 3.0])
def test_flush_timeout_bounds_close(flush_timeout: float, caplog: pytest.LogCaptureFixture) -> None:
    """Messages that the server has not accepted in time fail, and a warning has their number."""

    @virtually
    async def play() -> None:
        async with Scene(flush_timeout=flush_timeout) as scene:
            await scene.opened()
            sent = [scene.client.send(number) for number in range(7)]
            at = now()
            await scene.client.close()
            assert flush_timeout <= now() - at < flush_timeout + 0.2
            assert all(isinstance(one.exception(), ClientClosedError) for one in sent)

    play()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the client is closed, but the server has not accepted 7 messages"
    ]


@virtually
async def test_cancelled_close_ends_client_at_once() -> None:
    """A close that is cancelled while it waits for the server still ends the client."""
    async with Scene() as scene:
        await scene.opened()
        scene.client.send("x")
        closing = asyncio.ensure_future(scene.client.close())
        await soon()
        closing.cancel()
        await soon()
        assert scene.client.state == "closed"
        await asyncio.sleep(10)
        assert len(scene.client._tasks) == 0


# ── logs and state ──


def test_first_failed_attempt_of_row_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The first failed attempt in a row is logged as a warning; a connection starts a new row."""
    caplog.set_level(logging.INFO, "fastapi_ws_stabilizer.client")

    @virtually
    async def play() -> None:
        scene = Scene(url="ws://me:secret@server/ws?token=secret")
        scene.failures = [TransportClosedError(1006, "refused") for _ in range(3)]
        async with scene:
            await scene.redialled(1)
            await scene.opened()
            scene.failures = [TransportClosedError(1006, "refused")]
            await scene.link.closes(1006, "cable")
            await scene.redialled(2)

    play()
    records = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in records] == ["WARNING", "INFO", "INFO", "INFO", "INFO", "WARNING"]
    assert records[0][1].startswith("cannot connect to ws://server/ws: code 1006 (refused); next attempt in ")
    assert records[3][1] == "connected to ws://server/ws after 3 failed attempts"
    assert records[4][1].startswith("the connection to ws://server/ws is lost: code 1006 (cable)")
    assert "secret" not in caplog.text


def test_terminal_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A terminal close by the server is logged as a warning; a local close is not logged."""

    @virtually
    async def play() -> None:
        async with Scene() as scene:
            await scene.opened()
            await scene.link.closes(4403, "banned")
        async with Scene() as scene:
            await scene.opened()

    play()
    assert [record.getMessage() for record in caplog.records] == [
        "the client of ws://server/ws is permanently closed: code 4403 (banned)"
    ]


REJECTION = HttpRejection(403, '{"detail":"no such room"}')


def test_rejected_handshake_shows_body_in_error_and_log(caplog: pytest.LogCaptureFixture) -> None:
    """The final error and the log have the start of the body with which the server rejected the handshake."""

    @virtually
    async def play() -> None:
        scene = Scene()
        scene.failures = [TransportClosedError(4403, "HTTP 403", REJECTION)]
        with pytest.raises(ClientClosedError, match="no such room") as caught:
            await scene.client.__aenter__()
        assert (caught.value.rejection, caught.value.reason) == (REJECTION, "HTTP 403")
        with pytest.raises(ClientClosedError, match="no such room"):
            await anext(scene.client)
        assert scene.of("close") == [(4403, "HTTP 403")]

    play()
    (text,) = caplog.messages
    assert text.startswith("the client of ws://server/ws is permanently closed: code 4403 ")
    assert text.endswith('(HTTP 403; the server says: {"detail":"no such room"})')


def test_body_of_retried_rejection_is_logged_and_no_hint(caplog: pytest.LogCaptureFixture) -> None:
    """The body of a rejection that the client retries is logged, but `retry=` in it does not delay the client."""

    @virtually
    async def play() -> None:
        scene = Scene(first_connect_timeout=60)
        scene.failures = [TransportClosedError(4503, "HTTP 503", HttpRejection(503, "full; retry=250000"))]
        async with scene:
            await scene.redialled(1)
            assert scene.dials[1] - scene.dials[0] < 20

    play()
    assert "code 4503 (HTTP 503; the server says: full; retry=250000); next attempt" in caplog.messages[0]


@virtually
async def test_iteration_raises_unless_client_was_closed_locally() -> None:
    """`async for` yields the received messages, then ends after a local `close()` and raises after any other close."""
    for code in (None, 4410):
        async with Scene() as scene:
            await scene.opened()
            await scene.link.say({"type": "msg", "data": 1})
            loop = aiter(scene.client)
            if code is None:
                await scene.client.close()
            else:
                await scene.link.closes(code, "out")
            assert (await anext(loop)).data == 1
            with pytest.raises(StopAsyncIteration if code is None else ClientClosedError):
                await anext(loop)
            with pytest.raises(StopAsyncIteration if code is None else ClientClosedError):
                await anext(scene.client)


@virtually
async def test_closed_attribute_has_code_and_reason() -> None:
    """`closed` is `None` until the client is closed permanently, and then has the code and the reason."""
    async with Scene() as scene:
        await scene.opened()
        assert scene.client.closed is None
        await scene.client.close(1000, "done")
        closed = scene.client.closed
        assert closed is not None
        assert (closed.code, closed.reason) == (1000, "done")


@pytest.mark.parametrize("timeout", [3.0, 20.0])
def test_first_connect_timeout_closes_unconnected_client(timeout: float) -> None:
    """A client without a first connection in time is closed permanently; its error names the last failed attempt."""

    @virtually
    async def play() -> None:
        scene = Scene(first_connect_timeout=timeout)
        scene.failures = [TransportClosedError(1006, "refused") for _ in range(99)]
        at = now()
        with pytest.raises(ClientClosedError, match=r"no connection within .* code 1006 \(refused\)") as caught:
            await scene.client.__aenter__()
        assert (now() - at, caught.value.code) == (pytest.approx(timeout, abs=0.1), 4408)
        assert len(scene.client._tasks) == 0

    play()


@virtually
async def test_first_connect_timeout_error_has_last_rejection() -> None:
    """The error of a client that was never connected has the last response that rejected it."""
    scene = Scene(first_connect_timeout=3)
    scene.failures = [TransportClosedError(1006, "HTTP 418", HttpRejection(418, "teapot")) for _ in range(99)]
    with pytest.raises(ClientClosedError, match=r"\(HTTP 418\); the server says: teapot\)") as caught:
        await scene.client.__aenter__()
    assert caught.value.rejection == HttpRejection(418, "teapot")


@virtually
async def test_first_connect_timeout_ignores_connected_client() -> None:
    """A client that has been connected reconnects forever."""
    async with Scene(first_connect_timeout=2) as scene:
        await scene.opened()
        scene.failures = [TransportClosedError(1006, "refused") for _ in range(3)]
        await scene.link.closes(1006)
        await asyncio.sleep(60)
        assert scene.client.closed is None


# ── misuse ──


@virtually
async def test_client_misuse_error_names_correct_usage() -> None:
    """Each wrong use of `connect()` raises an error that names the correct one."""
    with pytest.raises(TypeError, match="async with connect"):
        await connect("ws://server")
    with pytest.raises(TypeError, match="async with connect"):
        with connect("ws://server"):
            pass
    with pytest.raises(TypeError, match="async for message in client"):
        list(connect("ws://server"))
    with pytest.raises(TypeError, match="url must be a string such as"):
        connect(None)  # type: ignore[arg-type]  # that is the mistake
    client = connect("ws://server")
    for wrong in (client.wait_open(), client.request("x"), anext(client)):
        with pytest.raises(NotStartedError, match=r"client\.start"):
            await wrong
    with pytest.raises(NotStartedError):
        aiter(client)
    await client.close()


@virtually
async def test_send_without_start_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """A message waits for `start()`; after a second, one warning says that the client was not started."""
    client = connect("ws://server")
    client.send("a")
    client.send("b")
    await asyncio.sleep(0.9)
    assert caplog.messages == []
    await asyncio.sleep(5)
    client.send("c")
    await asyncio.sleep(5)
    (warning,) = caplog.messages
    assert "client.start()" in warning
    await client.close()


@virtually
async def test_send_before_prompt_start_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    """Messages queued before `start()` are sent after it, without a warning."""
    async with Scene() as scene:
        scene.client.send("early")
        scene.client.start()
        await scene.opened()
        await asyncio.sleep(2)
        assert [frame["data"] for frame in scene.link.of("msg")] == ["early"]
        assert not any("start()" in text for text in caplog.messages)


def test_client_outside_event_loop_raises_helpful_error() -> None:
    """Creating a client without a running event loop raises an error that says how to create it."""
    with pytest.raises(RuntimeError, match=r"asyncio\.run"):
        connect("ws://server")


@virtually
async def test_message_event_falls_back_to_its_type() -> None:
    """`message.event` falls back to the `type` of the object, and `repr` shows the data, shortened."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "data": {"type": "done", "text": "x" * 5000}}, {"type": "msg", "data": 1})
        message = await anext(scene.client)
        assert (message.event, (await anext(scene.client)).event) == ("done", None)
        assert "data={'text': 'xxx" in repr(message)
        assert len(repr(message)) < 300


@virtually
async def test_close_reads_acks_behind_unread_messages() -> None:
    """While a client closes, acknowledgements are read even if unread messages pause reading."""
    async with Scene() as scene:
        await scene.opened()
        await scene.link.say({"type": "msg", "data": 0})
        loop = aiter(scene.client)
        await anext(loop)
        await scene.link.say(*({"type": "msg", "data": number} for number in range(1500)))
        sent = scene.client.send("x")
        await soon()
        closing = asyncio.ensure_future(scene.client.close())
        await scene.link.say({"type": "ack", "seq": 1})
        at = now()
        await closing
        assert (sent.exception(), now() - at < 1) == (None, True)
