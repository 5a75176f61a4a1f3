"""Tests of the life of sessions through the hooks that are called."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import HTTPException

from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.stage import Peer, Stage

# ── calls of hooks ──


@virtually
async def test_clean_close_ends_connection_and_session() -> None:
    """A close with 1000 by the client calls on_disconnect and then on_session_end."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        await line.leaves(1000)
        assert stage.events == ["connect ann", "disconnect ann client_close", "session_end ann client_close"]
        assert stage.manager.get_session_counts() == {"sessions": 0, "away": 0}
    assert len(stage.events) == 3


@virtually
async def test_returning_endpoint_ends_session_with_4410() -> None:
    """The return of an endpoint closes with 4410 and ends the session."""
    async with Stage() as stage:

        async def receive_one(ws: StableSocket) -> None:
            await ws.receive()

        stage.endpoint = receive_one
        line = await Peer(stage).dial()
        await line.message("note", 1)
        assert line.close_code == 4410
        assert stage.events == ["connect ann", "disconnect ann completed", "session_end ann completed"]


@virtually
async def test_socket_close_ends_session_with_4410() -> None:
    """`ws.close()` closes a v1 client with 4410 and ends its session."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        await stage.socket().close()
        await soon()
        assert line.close_code == 4410
        assert stage.events == ["connect ann", "disconnect ann application", "session_end ann application"]


@virtually
async def test_reconnects_resume_session_without_connect_hook() -> None:
    """Each reconnect calls on_resume instead of on_connect, and the session ends once."""
    async with Stage() as stage:
        peer = Peer(stage)
        await (await peer.dial()).leaves()
        await (await peer.dial()).leaves()
        line = await peer.dial()
        await line.leaves(1000)
        once = ["disconnect ann network_lost", "resume ann full"]
        end = ["disconnect ann client_close", "session_end ann client_close"]
        assert stage.events == ["connect ann", *once, *once, *end]


@virtually
async def test_session_ends_after_session_ttl() -> None:
    """A session ends after session_ttl without a resume, not earlier, and with the cause of its last connection."""
    async with Stage(session_ttl=20) as stage:
        peer = Peer(stage)
        await (await peer.dial()).leaves()
        await asyncio.sleep(19)
        assert stage.events == ["connect ann", "disconnect ann network_lost"]
        assert stage.manager.get_session_counts() == {"sessions": 1, "away": 1}
        await asyncio.sleep(2)
        assert stage.events[2:] == ["session_end ann network_lost"]
        assert (await peer.dial()).outcome == "lost"


@virtually
async def test_half_open_connection_is_closed_4409_on_resume() -> None:
    """The new connection has the session at once; the old one is closed with 4409, and the session continues."""
    async with Stage() as stage:
        peer = Peer(stage)
        old = await peer.dial()
        new = await peer.dial()
        assert old.close_code == 4409
        assert stage.events == ["connect ann", "disconnect ann replaced", "resume ann full"]
        assert stage.manager.get_session_counts() == {"sessions": 1, "away": 0}
        await old.leaves()
        assert stage.socket() is new.socket
        await new.leaves(1000)
        assert stage.events[3:] == ["disconnect ann client_close", "session_end ann client_close"]


@virtually
async def test_frames_on_replaced_connection_are_ignored() -> None:
    """Frames that arrive on a connection after a handover are ignored."""
    async with Stage() as stage:
        peer = Peer(stage)
        old = await peer.dial()
        new = await peer.dial()
        assert old.socket is not None
        connection = old.socket._connection
        protocol = connection.protocol
        assert protocol.decode(connection, '{"type":"msg","seq":1,"event":"note","data":"late"}') is None
        assert protocol.decode(connection, '{"type":"ack","seq":99}') is None
        assert protocol.session.accepted == 0
        await new.message("note", "now")
        assert stage.notes == ["now"]


@virtually
async def test_sessions_over_max_sessions_away_end_oldest_first() -> None:
    """Above max_detached_sessions the session that detached first ends, with its hooks and an event."""
    async with Stage(max_detached_sessions=1) as stage:
        for name in ("ann", "bob"):
            await (await Peer(stage, name).dial()).leaves()
        await soon()
        assert stage.events[2] == "connect bob"
        assert sorted(stage.events[3:]) == ["disconnect bob network_lost", "session_end ann network_lost"]
        assert [event.fields["client_id"] for event in stage.heard.of("session_evicted")] == ["ann"]
        assert stage.manager.get_session_counts() == {"sessions": 1, "away": 1}


@virtually
async def test_shutdown_ends_all_sessions_once() -> None:
    """A graceful shutdown ends connected and detached sessions, each with its hooks, once."""
    async with Stage() as stage:
        await (await Peer(stage, "bob").dial()).leaves()
        line = await Peer(stage).dial()
        del stage.events[:]
        await stage.manager.graceful_shutdown(5.0)
        assert line.close_code == 1012
        assert [event for event in stage.events if "ann" in event] == [
            "disconnect ann server_shutdown",
            "session_end ann server_shutdown",
        ]
        assert [event.split()[0] for event in stage.events if "bob" in event] == ["session_end"]
        assert stage.manager.get_session_counts() == {"sessions": 0, "away": 0}


@virtually
async def test_failing_handler_closes_1011_and_session_resumes() -> None:
    """A failing handler closes with 1011; the session resumes, and the failing message is not handled again."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("bug", "x")
        assert line.close_code == 1011
        await line.leaves()
        line = await peer.dial()
        assert line.welcome["ack"] == 1
        await line.message("bug", "x")
        await line.message("note", "y", first=2)
        assert stage.events == ["connect ann", "disconnect ann error", "resume ann full"]
        assert stage.notes == ["y"]
        assert stage.bugs == ["endpoint_failed"]


@virtually
async def test_connect_hook_403_closes_4403_and_ends_session() -> None:
    """A connect hook that raises 403 closes with 4403 and ends the session."""
    async with Stage() as stage:
        stage.rejection = HTTPException(403)
        line = await Peer(stage).dial()
        assert line.close_code == 4403
        assert stage.events == ["connect ann", "disconnect ann policy", "session_end ann policy"]
        assert stage.manager.get_session_counts() == {"sessions": 0, "away": 0}


@virtually
async def test_replace_policy_closes_older_client_with_4410() -> None:
    """With on_duplicate="replace" the older client is closed with 4410, which is final, and its session ends."""
    async with Stage(on_duplicate="replace") as stage:
        old, new = await Peer(stage).dial(), await Peer(stage).dial()
        assert old.close_code == 4410
        assert sorted(stage.events) == [
            "connect ann",
            "connect ann",
            "disconnect ann replaced",
            "session_end ann replaced",
        ]
        assert stage.socket() is new.socket
        assert stage.manager.get_session_counts() == {"sessions": 1, "away": 0}


@virtually
async def test_reject_policy_closes_newer_client_with_4409() -> None:
    """With on_duplicate="reject" the newer client is closed with 4409 without hooks, and leaves no session."""
    async with Stage(on_duplicate="reject") as stage:
        old, new = await Peer(stage).dial(), await Peer(stage).dial()
        assert new.close_code == 4409
        assert stage.events == ["connect ann"]
        assert stage.socket() is old.socket
        assert stage.manager.get_session_counts() == {"sessions": 1, "away": 0}


@virtually
async def test_reject_policy_allows_resume_of_own_session() -> None:
    """With on_duplicate="reject" a client that resumes its own session is not a duplicate."""
    async with Stage(on_duplicate="reject") as stage:
        peer = Peer(stage)
        await peer.dial()
        line = await peer.dial()
        assert line.close_code is None
        assert stage.events == ["connect ann", "disconnect ann replaced", "resume ann full"]


@virtually
async def test_allow_policy_gives_each_client_its_own_session() -> None:
    """With on_duplicate="allow" each client has its own session and resumes that one."""
    async with Stage(on_duplicate="allow") as stage:
        peers = [Peer(stage), Peer(stage)]
        lines = [await peer.dial() for peer in peers]
        ids = [line.welcome["session"] for line in lines]
        for line in lines:
            await line.leaves()
        again = [await peer.dial() for peer in reversed(peers)]
        assert [line.welcome["session"] for line in again] == list(reversed(ids))
        assert stage.events.count("resume ann full") == 2


@virtually
async def test_session_of_plain_client_without_token_ends_at_close() -> None:
    """A plain client without a token cannot resume: on_session_end follows on_disconnect."""
    async with Stage() as stage:
        line = stage.plain()
        await soon()
        await line.leaves()
        assert stage.events == ["connect ann", "disconnect ann network_lost", "session_end ann network_lost"]


@virtually
async def test_session_of_plain_client_with_token_ends_after_ttl() -> None:
    """A plain client with a token may resume: on_session_end is called after session_ttl."""
    async with Stage(session_ttl=20) as stage:
        line = stage.plain()
        await soon()
        stage.manager.generate_reconnect_token("ann")
        await line.leaves()
        await asyncio.sleep(19)
        assert stage.events == ["connect ann", "disconnect ann network_lost"]
        await asyncio.sleep(2)
        assert stage.events[2:] == ["session_end ann network_lost"]


@virtually
async def test_returning_plain_client_resumes_with_gap() -> None:
    """A plain client that returns with a token resumes with a gap, and its session ends once."""
    async with Stage(session_ttl=20) as stage:
        line = stage.plain()
        await soon()
        token = stage.manager.generate_reconnect_token("ann")
        await line.leaves()
        resumed = stage.plain(token=token)
        await soon()
        await resumed.leaves(1000)
        await asyncio.sleep(60)
        first, second = (
            ["connect ann", "disconnect ann network_lost"],
            ["resume ann gap", "disconnect ann client_close"],
        )
        assert stage.events == [*first, *second, "session_end ann client_close"]


@virtually
async def test_plain_client_with_token_replaces_half_open_connection() -> None:
    """A plain client with a token resumes while its old connection is half-open, and the session continues."""
    async with Stage(presence_grace=5) as stage:
        old = stage.plain()
        await soon()
        await stage.socket().join("lobby")
        stage.socket().user_data["name"] = "Ann"
        token = stage.manager.generate_reconnect_token("ann")
        new = stage.plain(token=token)
        await soon()
        assert old.close_code == 4409
        assert stage.socket() is new.socket
        assert (stage.socket().rooms, stage.socket().user_data) == (("lobby",), {"name": "Ann"})
        assert sorted(stage.events) == ["connect ann", "disconnect ann replaced", "resume ann gap"]


@virtually
async def test_expired_detached_state_ends_session_before_timer() -> None:
    """A token that comes after session_ttl but before the timer gets a new session, and the old one ends."""
    async with Stage(session_ttl=20) as stage:
        line = stage.plain()
        await soon()
        token = stage.manager.generate_reconnect_token("ann")
        line.server.feed_disconnect(1006)
        await asyncio.sleep(20.005)  # the timer fires 0.01 s after the end
        assert stage.events == ["connect ann", "disconnect ann network_lost"]
        stage.plain(token=token)
        await soon()
        assert sorted(stage.events[2:]) == ["connect ann", "session_end ann network_lost"]


@virtually
async def test_failing_session_end_hook_is_reported_and_others_run() -> None:
    """A failing session end hook is reported as a bug, and the others are called."""
    async with Stage() as stage:

        @stage.manager.on_session_end
        async def fail(ws: StableSocket) -> None:
            raise RuntimeError

        line = await Peer(stage).dial()
        await line.leaves(1000)
        assert stage.events[-1] == "session_end ann client_close"
        assert stage.bugs == ["session_end_hook_failed"]


# ── malformed frames and counters ──


@pytest.mark.parametrize(
    "frame",
    [
        '{"type":"ack","seq":}',
        '{"type":"ack","seq":00}',
        '{"type":"ack","seq":-1}',
        '{"type":"ack","seq":1.5}',
        '{"type":"ack","seq":"0"}',
        '{"type":"ack","seq":\u0660}',
        '{"type":"ack","seq":0}}',
        '{"type":"ack","seq":00000000000000000000}',
        '{"type":"ack","seq":99999999999999999999}',
        '{"type":"ack","seq":1}',
        '{"type":"ack","seq":0',
    ],
)
@virtually
async def test_malformed_ack_closes_with_4400(frame: str) -> None:
    """The fast path for acknowledgements rejects all frames that the slow path rejects."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        await line.say(frame)
        assert line.close_code == 4400
        assert stage.bugs == []


@virtually
async def test_ping_with_long_timestamp_closes_with_4400() -> None:
    """A ping with a timestamp above 64 characters closes with 4400, so that queued pongs stay small."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        line.server.block()
        await line.say({"type": "ping", "ts": "x" * 64})
        await line.say({"type": "ping", "ts": "x" * 65})
        line.server.release()
        await soon()
        assert line.close_code == 4400
        assert [pong["ts"] for pong in line.of("pong")] == ["x" * 64]
        assert stage.bugs == []


@virtually
async def test_protocol_violation_closes_4400_and_ends_session() -> None:
    """A protocol violation closes with 4400 and ends the session, because 4400 is final."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        await line.say("no json")
        assert stage.events == ["connect ann", "disconnect ann policy", "session_end ann policy"]


@virtually
async def test_session_counts_and_memory_include_detached() -> None:
    """Session counts and held memory include detached sessions."""
    async with Stage() as stage:
        before = stage.manager.get_memory_usage()["total_memory"]
        peer = Peer(stage)
        line = await peer.dial()
        await Peer(stage, "bob").dial()
        assert stage.manager.get_session_counts() == {"sessions": 2, "away": 0}
        await line.leaves()
        assert stage.manager.get_session_counts() == {"sessions": 2, "away": 1}
        await stage.manager.send_to_client("ann", "x" * 10_000)
        assert stage.manager.get_memory_usage()["total_memory"] >= before + 10_000
        assert stage.manager.get_memory_usage()["connection_count"] == 1
        line = await peer.dial()
        assert line.got == ["x" * 10_000]
        await line.say({"type": "ack", "seq": 1})
        assert stage.manager.get_memory_usage()["total_memory"] < before + 10_000
        line.socket.user_data["page"] = "y" * 50_000  # type: ignore[union-attr]
        await line.leaves()
        assert stage.manager.get_memory_usage()["total_memory"] >= before + 50_000
