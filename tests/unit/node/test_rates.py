"""Tests of clients that exceed their rates, both plain clients and clients of `stabilizer.v1.json`."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import pytest

from fastapi_ws_stabilizer.connection.quota import CONTROL_FRAMES
from fastapi_ws_stabilizer.events import THROTTLE_INTERVAL
from fastapi_ws_stabilizer.limits.inbound import IN_FLIGHT
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import ACK_EVERY, SUBPROTOCOL, deflated
from tests.support.fake_link import soon, virtually
from tests.support.stage import Line, Peer, Stage

LIMIT = {"max_message_rate": 10}
REFUSED = re.compile(r"too many messages; retry=(\d+)")


def note(number: int) -> str:
    """Return a message of a plain client."""
    return json.dumps({"type": "note", "number": number})


def retry_in(text: str) -> int:
    """Return the milliseconds after which the rejection allows a retry."""
    found = REFUSED.fullmatch(text)
    assert found, text
    return int(found.group(1))


def errors(line: Line) -> list[dict[str, Any]]:
    """Return the error frames that a client received."""
    return [frame for frame in map(json.loads, line.server.data) if frame.get("type") == "error"]


# ── plain clients ──


@virtually
async def test_flood_gets_warnings_and_closes_with_4429() -> None:
    """Each rejected message is answered with `rate_limited`; too many of them close with 4429."""
    async with Stage(**LIMIT) as stage:
        line = stage.plain()
        await line.say(*map(note, range(100)))
        ((code, reason),) = line.server.close_frames
        assert code == 4429
        assert 0 < retry_in(reason) <= 2000
        assert [frame["code"] for frame in errors(line)] == ["rate_limited"] * 11
        assert all(0 < retry_in(frame["message"]) <= 1100 for frame in errors(line))
        assert stage.manager.counters.messages_received == 10
        assert stage.manager.counters.messages_refused == 11
        assert stage.bugs == []


@virtually
async def test_double_message_rate_gets_warnings_only() -> None:
    """At twice the rate half of the messages are handled, and the connection stays open."""
    async with Stage(**LIMIT) as stage:
        line = stage.plain()
        for number in range(400):
            await line.say(note(number))
            await asyncio.sleep(0.05 - 0.001)
        assert line.close_code is None
        assert len(stage.notes) == pytest.approx(210, abs=3)
        assert len(errors(line)) == 400 - len(stage.notes)


@virtually
async def test_message_after_retry_delay_is_handled() -> None:
    """A message that is sent after the stated retry delay is handled."""
    async with Stage(**LIMIT) as stage:
        line = stage.plain()
        await line.say(*map(note, range(11)))
        await asyncio.sleep(retry_in(errors(line)[0]["message"]) / 1000)
        await line.say(note(11))
        assert len(stage.notes) == 11
        assert len(errors(line)) == 1


@virtually
async def test_connections_of_client_share_rate_limit() -> None:
    """Two connections of a client share one bucket, and another client has its own."""
    async with Stage(**LIMIT, on_duplicate="allow") as stage:
        lines = [stage.plain("ann"), stage.plain("ann"), stage.plain("bob")]
        await soon()
        for line in lines:
            await line.say(*map(note, range(8)))
        assert [len(errors(line)) for line in lines] == [0, 6, 0]


@virtually
async def test_reconnect_does_not_reset_rate_limit() -> None:
    """A client that reconnects before its retry delay, after a close with 4429, has no message handled."""
    async with Stage(**LIMIT) as stage:
        first = stage.plain()
        await first.say(*map(note, range(100)))
        for _ in range(3):
            again = stage.plain()
            await again.say(note(0))
            assert len(errors(again)) == 1
        assert stage.manager.counters.messages_received == 10
        await asyncio.sleep(2)
        later = stage.plain()
        await later.say(note(0))
        assert later.close_code is None
        assert errors(later) == []


@virtually
async def test_flood_closes_only_flooding_connection() -> None:
    """Only the connection that floods is closed; others of its client get `rate_limited` and stay open."""
    async with SearchStage(**LIMIT, on_duplicate="allow") as stage:
        quiet, flooding, searching = stage.plain(), stage.plain(), stage.plain()
        await soon()
        await searching.say(*[SEARCH] * 20)
        assert searching.close_code == 4429
        await quiet.say(SEARCH)
        await flooding.say(*map(note, range(100)))
        assert flooding.close_code == 4429
        await quiet.say(note(0))
        assert quiet.close_code is None
        assert [frame["code"] for frame in errors(quiet)] == ["rate_limited"] * 2


@virtually
async def test_max_message_burst_allows_burst_above_rate() -> None:
    """`max_message_burst` messages are accepted at once."""
    async with Stage(**LIMIT, max_message_burst=50) as stage:
        line = stage.plain()
        await line.say(*map(note, range(51)))
        assert (len(stage.notes), len(errors(line))) == (50, 1)


@virtually
async def test_byte_rate_allows_one_large_message_then_delays() -> None:
    """A quiet client may send one message of `max_message_size`; the next one has to wait for the byte rate."""
    async with Stage(max_byte_rate=1000, max_message_size=5000) as stage:
        big = '"' + "x" * 4998 + '"'
        stage.endpoint = record_all(stage)
        line = stage.plain()
        await line.say(big)
        assert stage.notes == [big]
        await line.say(big)
        assert retry_in(errors(line)[0]["message"]) == pytest.approx(5000, abs=5)
        await asyncio.sleep(5)
        await line.say(big)
        assert len(stage.notes) == 2
        assert line.close_code is None


@virtually
async def test_byte_rate_counts_utf8_bytes() -> None:
    """A text counts with its UTF-8 bytes, not with its characters."""
    async with Stage(max_byte_rate=1000, max_message_size=1000) as stage:
        stage.endpoint = record_all(stage)
        line = stage.plain()
        await line.say("🦊" * 250, "🦊")
        assert (len(stage.notes), len(errors(line))) == (1, 1)


def record_all(stage: Stage) -> Any:
    """Return an endpoint that records each message."""

    async def endpoint(ws: StableSocket) -> None:
        async for message in ws:
            stage.notes.append(message)

    return endpoint


@virtually
async def test_messages_without_rate_limit_are_unlimited() -> None:
    """Without rate options messages are unlimited."""
    async with Stage() as stage:
        line = stage.plain()
        await line.say(*map(note, range(5000)))
        assert (len(stage.notes), errors(line), line.close_code) == (5000, [], None)


@virtually
async def test_rate_limited_message_does_not_reset_idle_timeout() -> None:
    """Rejected messages do not reset `idle_timeout`, and accepted ones do."""
    async with Stage(max_message_rate=1, idle_timeout=10) as stage:
        line = stage.plain()
        await line.say(note(0))
        for _ in range(40):
            await asyncio.sleep(0.5)
            await line.say(note(1))
        assert line.close_code is None
        assert 18 <= len(stage.notes) <= 22


# ── log events ──


def limit_events(stage: Stage) -> list[tuple[int, Any, Any]]:
    """Return the rate events, each with level, option and message type."""
    events = stage.heard.of("rate_limited")
    assert all({"client_id", "connection_id"} <= event.fields.keys() for event in events)
    return [(event.level, event.fields["option"], event.fields.get("message_type")) for event in events]


@pytest.mark.parametrize(
    ("options", "sent", "option", "kind"),
    [
        ({"max_message_rate": 1}, note(0), "max_message_rate", None),
        ({"max_byte_rate": 30, "max_message_size": 30}, note(0), "max_byte_rate", None),
        ({}, '{"type":"search"}', "max_rate", "search"),
        ({}, "ping", "control_frames", None),
    ],
    ids=lambda value: value if isinstance(value, str) and "{" not in value else "",
)
@virtually
async def test_rate_limit_option_is_logged_once_per_minute(
    options: Any, sent: str, option: str, kind: str | None
) -> None:
    """A warning names the option that a client has exceeded, at most once a minute for each option."""
    async with SearchStage(**options) as stage:
        line = stage.plain()
        await line.say(*[sent] * 300)
        assert line.close_code == 4429
        assert limit_events(stage) == [(logging.WARNING, option, kind)]
        again = stage.plain()
        await again.say(*[sent] * 2)
        if option != "control_frames":  # the next connection has its own allowance of control frames
            assert limit_events(stage)[1:] == [(logging.DEBUG, option, kind)] * 2
        await asyncio.sleep(THROTTLE_INTERVAL)
        late = stage.plain("bob")
        await late.say(*[sent] * 300)
        assert limit_events(stage)[-1] == (logging.WARNING, option, kind)
        assert stage.heard.of("rate_limited")[-1].fields.get("more") == (None if option == "control_frames" else 2)


# ── per type of message ──


class SearchStage(Stage):
    """Stage with one message type that a client may send twice per second."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

        @self.manager.on_message("search", max_rate=2)
        async def search(ws: StableSocket, data: Any) -> Any:
            self.notes.append(data)
            return data


SEARCH = '{"type":"search"}'


@virtually
async def test_handler_rate_limits_one_message_type() -> None:
    """Messages of other types are still handled."""
    async with SearchStage() as stage:
        line = stage.plain()
        await line.say(SEARCH, SEARCH, SEARCH, note(1))
        assert [message["type"] for message in stage.notes] == ["search", "search", "note"]
        assert [frame["code"] for frame in errors(line)] == ["rate_limited"]


@virtually
async def test_flood_of_one_message_type_closes_with_4429() -> None:
    """A flood of one message type gets warnings for one burst, then 4429."""
    async with SearchStage() as stage:
        line = stage.plain()
        await line.say(*[SEARCH] * 20)
        ((code, reason),) = line.server.close_frames
        assert (code, len(stage.notes), len(errors(line))) == (4429, 2, 3)
        assert retry_in(reason) > 0


@virtually
async def test_handler_rate_is_shared_by_connections_of_client() -> None:
    """All connections of one client share the handler's rate, and another client has its own."""
    async with SearchStage(on_duplicate="allow") as stage:
        lines = [stage.plain("ann"), stage.plain("ann"), stage.plain("bob")]
        await soon()
        for line in lines:
            await line.say(SEARCH, SEARCH)
        assert [len(errors(line)) for line in lines] == [0, 2, 0]


async def test_invalid_handler_rate_raises() -> None:
    """An invalid rate raises at registration, not at the first message."""
    stage = Stage()
    with pytest.raises(ValueError, match="above zero"):
        stage.manager.on_message("x", max_rate=0)
    with pytest.raises(ValueError, match="set the rate too"):
        stage.manager.on_message("x", max_burst=5)


# ── clients of stabilizer.v1.json ──


@virtually
async def test_rate_limited_message_of_v1_client_is_acked() -> None:
    """A rejected message is acknowledged, so the client does not send it again and the next one is in sequence."""
    async with Stage(**LIMIT) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("note", *range(12))
        assert [frame["seq"] for frame in line.of("error")] == [11, 12]
        assert {frame["code"] for frame in line.of("error")} == {"rate_limited"}
        await asyncio.sleep(1)
        await line.message("note", 12, first=13)
        assert stage.notes == [*range(10), 12]
        assert line.close_code is None
        await line.leaves()
        assert (await peer.dial()).welcome["ack"] == 13


@virtually
async def test_rate_limited_message_with_retry_cap_is_not_acked() -> None:
    """The server states a retry delay, ignores messages behind the rejected one, and accepts them later in order."""
    async with Stage(**LIMIT) as stage:
        peer = Peer(stage)
        line = await peer.dial(caps=["retry"])
        await line.message("note", *range(15))
        (error,) = line.of("error")
        assert (error["seq"], error["code"]) == (11, "rate_limited")
        assert 0 < error["retry"] <= 1000
        await line.say({"type": "reply", "seq": 16, "re": "x", "data": 1})
        await asyncio.sleep(error["retry"] / 1000)
        await line.message("note", 10, first=11)
        assert stage.notes == [*range(11)]
        await asyncio.sleep(1)
        await line.message("note", 11, 12, 13, 14, first=12)
        assert (stage.notes, line.close_code) == ([*range(15)], None)
        await line.message("note", 99, first=18)
        assert line.close_code == 4412, "a gap after an accepted number closes"


@virtually
async def test_retry_client_ignoring_rate_limit_closes_with_4429() -> None:
    """No message behind a rejected one is accepted, and more of them than can be in flight close with 4429."""
    async with Stage(**LIMIT) as stage:
        peer = Peer(stage)
        line = await peer.dial(caps=["retry"])
        await line.message("note", *range(IN_FLIGHT + 30))
        assert (line.close_code, stage.notes) == (4429, [*range(10)])
        assert len(line.of("error")) == 1
        await asyncio.sleep(3)
        assert (await peer.dial()).welcome["ack"] == 10


@virtually
async def test_rate_limited_request_gets_error_reply() -> None:
    """A rejected request gets an error reply, in sequence, also after a resume."""
    async with Stage(**LIMIT) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("note", *range(10))
        await line.message("echo", "?", first=11, id="q1")
        (reply,) = line.of("reply")
        assert (reply["re"], reply["error"]["code"]) == ("q1", "rate_limited")
        assert line.of("error") == []
        await line.leaves()
        assert (await peer.dial(seq=0)).of("reply") == [reply]


@virtually
async def test_last_message_of_flood_gets_error_before_4429() -> None:
    """The last rejected message is acknowledged, so its error is sent before 4429."""
    async with Stage(**LIMIT) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("note", *range(100))
        assert line.close_code == 4429
        rejected = [frame["seq"] for frame in line.of("error")]
        assert rejected == list(range(11, 11 + len(rejected)))
        await asyncio.sleep(3)
        assert (await peer.dial()).welcome["ack"] == rejected[-1]
        assert stage.notes == list(range(10))


@virtually
async def test_last_request_of_flood_gets_reply_after_resume() -> None:
    """The reply to the last request is in the replay buffer, and the client gets it after its resume."""
    async with Stage(**LIMIT) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        for number in range(1, 40):
            await line.say({"type": "msg", "seq": number, "event": "echo", "data": number, "id": f"q{number}"})
        assert line.close_code == 4429
        await asyncio.sleep(3)
        again = await peer.dial()
        answered = {frame["re"] for frame in again.of("reply")}
        assert answered == {f"q{number}" for number in range(1, again.welcome["ack"] + 1)}


@virtually
async def test_rate_limited_message_releases_idempotency_key() -> None:
    """A rejected message that is sent again within the rate is handled."""
    async with Stage(**LIMIT) as stage:
        line = await Peer(stage).dial()
        await line.message("note", *range(10))
        await line.message("echo", "it", first=11, id="q1", key="k")
        await asyncio.sleep(1)
        await line.message("echo", "it", first=12, id="q2", key="k")
        assert [(frame["re"], "error" in frame) for frame in line.of("reply")] == [("q1", True), ("q2", False)]
        assert stage.notes.count("it") == 1


@virtually
async def test_rate_limited_duplicate_retains_idempotency_key() -> None:
    """The key of a handled message stays used when a duplicate is rejected, so nothing is handled twice."""
    async with Stage(**LIMIT) as stage:
        line = await Peer(stage).dial()
        await line.message("echo", "it", key="k", id="q1")
        await line.message("note", *range(9), first=2)
        await line.message("echo", "it", first=11, key="k", id="q2")  # rejected, or answered from the stored result
        await asyncio.sleep(1)
        await line.message("echo", "it", first=12, key="k", id="q3")
        assert stage.notes.count("it") == 1
        assert line.of("reply")[-1] == {"type": "reply", "re": "q3", "data": "it"}


@virtually
async def test_handler_rate_limit_releases_idempotency_key() -> None:
    """A message rejected by the handler's rate is handled when sent again, also the one that closed the connection."""
    async with SearchStage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        for number in range(1, 21):
            await line.say(
                {
                    "type": "msg",
                    "seq": number,
                    "event": "search",
                    "data": number,
                    "id": f"q{number}",
                    "key": f"k{number}",
                }
            )
        assert line.close_code == 4429
        await asyncio.sleep(3)
        again = await peer.dial()
        last = again.welcome["ack"]
        assert {frame["re"] for frame in again.of("reply")} == {f"q{number}" for number in range(1, last + 1)}
        await again.message("search", "again", first=last + 1, key=f"k{last}", id="again")
        assert again.of("reply")[-1] == {"type": "reply", "re": "again", "data": "again"}


@virtually
async def test_volatile_message_counts_for_rate_limit() -> None:
    """A volatile message counts like others, and its rejection names no sequence number."""
    async with Stage(**LIMIT) as stage:
        line = await Peer(stage).dial()
        await line.say(*[{"type": "msg", "event": "note", "data": number} for number in range(12)])
        assert len(stage.notes) == 10
        assert ["seq" in frame for frame in line.of("error")] == [False, False]


@virtually
async def test_resume_does_not_reset_rate_limit() -> None:
    """The bucket belongs to the client, not to the connection."""
    async with Stage(**LIMIT) as stage:
        peer = Peer(stage)
        await (await peer.dial()).message("note", *range(10))
        line = await peer.dial()
        await line.message("note", 10, first=11)
        assert [frame["code"] for frame in line.of("error")] == ["rate_limited"]


@virtually
async def test_compressed_message_counts_inflated_size() -> None:
    """A compressed message counts with its inflated size against the byte rate."""
    async with Stage(max_byte_rate=1000, max_message_size=5000) as stage:
        line = Line(stage, subprotocols=(SUBPROTOCOL,))
        await line.say({"type": "hello", "v": 1, "n": 1, "caps": ["deflate-raw"]})
        assert line.welcome["caps"] == ["deflate-raw"]
        for seq in (1, 2):
            text = json.dumps({"type": "msg", "seq": seq, "event": "note", "data": "x" * 4000})
            packed = deflated(text)
            assert packed is not None
            assert len(packed) < 200
            line.server.feed_bytes(packed)
        await soon()
        assert stage.notes == ["x" * 4000]
        assert [frame["seq"] for frame in line.of("error")] == [2]


# ── control frames ──

ABOVE = int(CONTROL_FRAMES.burst) + 1


@pytest.mark.parametrize("frame", ["ping", "pong", '{"type":"ping"}', '{"type":"pong","ts":1}'])
@virtually
async def test_control_frame_flood_of_plain_client_closes_with_4429(frame: str) -> None:
    """A plain client that sends more pings and pongs than the allowance is closed with 4429."""
    async with Stage() as stage:
        line = stage.plain()
        await line.say(*[frame] * (ABOVE - 1))
        assert line.close_code is None
        await line.say(frame)
        ((code, reason),) = line.server.close_frames
        assert code == 4429
        assert re.fullmatch(r"too many control frames; retry=\d+", reason)


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "ping"},
        {"type": "pong"},
        {"type": "auth", "token": "x"},
        {"type": "from the future"},
        {"type": "reply", "seq": 1, "re": "nothing"},
        {"type": "ack", "seq": 0},
        '{ "type": "ack", "seq": 0 }',
        {"type": "msg", "seq": 1, "event": "note", "data": 1},
    ],
    ids=str,
)
@virtually
async def test_redundant_frames_of_v1_client_close_with_4429(frame: dict[str, Any] | str) -> None:
    """Duplicates, repeated acknowledgements and unrequested replies count as control frames."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        await line.say(*[frame] * (ABOVE - 3))
        assert line.close_code is None
        await line.say(*[frame] * 5)
        assert line.close_code == 4429


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "ping", "ts": "x" * 5000},
        {"type": "pong", "more": "x" * 5000},
        {"type": "ack", "seq": 0, "more": "€" * 2000},
        {"type": "from the future", "more": "x" * 5000},
    ],
    ids=lambda frame: frame["type"],
)
@virtually
async def test_long_control_frame_closes_with_4400(frame: dict[str, Any]) -> None:
    """A control frame above 4096 bytes closes with 4400, so that it cannot carry as much as a message."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        await line.say(json.dumps(frame, ensure_ascii=False))
        assert line.server.close_frames == [(4400, "a control frame may have at most 4096 bytes")]
        assert line.of("pong") == []


@virtually
async def test_frames_with_data_may_exceed_control_frame_limit() -> None:
    """Messages, replies and credentials may exceed 4096 bytes, and a shorter ping is answered."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        asking = asyncio.ensure_future(stage.socket().request("sum"))
        await soon()
        (request,) = line.of("msg")
        await line.say(
            {"type": "msg", "seq": 1, "event": "note", "data": "x" * 5000},
            {"type": "reply", "seq": 2, "re": request["id"], "data": "x" * 5000},
            {"type": "auth", "token": "x" * 5000},
            {"type": "ping", "note": "x" * 4000},
        )
        assert line.close_code is None
        assert (stage.notes, await asking) == (["x" * 5000], "x" * 5000)
        assert len(line.of("pong")) == 1


@virtually
async def test_heartbeat_pongs_stay_below_control_frame_limit() -> None:
    """A client that answers 20 pings per second, and sends as many of its own, stays connected."""
    async with Stage(heartbeat_type="ping", heartbeat_interval=0.05, heartbeat_timeout=5) as stage:
        line = stage.plain()
        for _ in range(600):
            await line.say("ping", '{"type":"pong"}')
            await asyncio.sleep(0.05)
        assert line.close_code is None


@virtually
async def test_regular_acks_do_not_count_as_control_frames() -> None:
    """A client that gets 20,000 messages per second may acknowledge 625 times per second."""
    async with Stage(replay_max_messages=100_000, replay_max_bytes=1 << 30, outbox_max_messages=100_000) as stage:
        line = await Peer(stage).dial()
        acknowledged = sent = 0
        for _ in range(40):  # 2 s
            for _ in range(1000):
                await stage.manager.send_to_client("ann", "tick")
            await asyncio.sleep(0.045)
            sent += len(line.got)
            line.server.taken.clear()
            while acknowledged + ACK_EVERY <= sent:
                acknowledged += ACK_EVERY
                line.server.feed_text(f'{{"type":"ack","seq":{acknowledged}}}')
            await soon()
        assert acknowledged >= 39_000
        assert line.close_code is None


@virtually
async def test_replies_to_requests_do_not_count_as_control_frames() -> None:
    """Replies to 300 concurrent requests do not count as control frames."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        asking = [asyncio.ensure_future(stage.socket().request("sum", number)) for number in range(300)]
        await soon()
        replies = [
            {"type": "reply", "seq": seq, "re": frame["id"], "data": frame["data"]}
            for seq, frame in enumerate(line.of("msg"), start=1)
        ]
        await line.say(*replies)
        assert line.close_code is None
        assert await asyncio.gather(*asking) == list(range(300))


@virtually
async def test_requested_pongs_do_not_count_as_control_frames() -> None:
    """Each `send(ack=True)` sends a ping, and the pong to it does not count as a control frame."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        for number in range(300):
            sending = asyncio.ensure_future(stage.socket().send(number, ack=True))
            await soon()
            (ping,) = line.of("ping")
            line.server.taken.clear()
            await line.say({"type": "pong", "ack": ping["seq"]})
            await sending
        assert line.close_code is None


@virtually
async def test_one_ping_requests_acks_for_all_waiting_senders() -> None:
    """The acknowledgements of 300 senders in one loop iteration come with one pong."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        sending = asyncio.gather(*(stage.socket().send(number, ack=True) for number in range(300)))
        await soon()
        (ping,) = line.of("ping")
        assert ping["seq"] == 300
        await line.say({"type": "pong", "ack": 300})
        assert sending.done()
        assert line.close_code is None


async def pings_until_the_next(line: Line) -> int:
    """Wait until a ping is due and return the number of pings after it; no other follows for most of the interval."""
    before = len(line.of("ping"))
    while len(line.of("ping")) == before:
        await soon()
    return before + 1


@virtually
async def test_pongs_to_server_pings_do_not_count_as_control_frames() -> None:
    """After a stall a client may send one pong for each ping; only the pongs beyond count as control frames."""
    async with Stage(heartbeat_type="ping", heartbeat_interval=0.1, heartbeat_timeout=60) as stage:
        line = stage.plain()
        await asyncio.sleep(30)
        pings = await pings_until_the_next(line)
        assert pings > ABOVE
        await line.say(*['{"type":"pong"}'] * (pings + ABOVE - 1))
        assert line.close_code is None
        await line.say('{"type":"pong"}')
        assert line.close_code == 4429
