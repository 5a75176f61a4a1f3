"""Tests of reconnect tokens of plain clients, in the query and with explicit `connect()`."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from fastapi_ws_stabilizer.auth import signed_tokens as tokens_module
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import InvalidTokenError, SocketClosed, TokenExpiredError
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.stats.router import connections, overview
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Line, Peer, Stage

OLD, NEW = "the secret of last year", "the secret of this year"


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a wall clock that a test can set."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(tokens_module, "wall", lambda: now[0])
    return now


async def detach_client(stage: Stage, client_id: str = "ann") -> str:
    """Detach a plain client with rooms and user data, and return its token."""
    line = stage.plain(client_id)
    await soon()
    await stage.socket(client_id).join("lobby", {"name": "Ann"})
    await stage.socket(client_id).join("kitchen")
    stage.socket(client_id).user_data["orders"] = 3
    token = stage.manager.generate_reconnect_token(client_id)
    await line.leaves()
    return token


async def reconnect(stage: Stage, token: str, client_id: str | None = "ann") -> Line:
    """Connect a plain client with a token."""
    line = stage.plain(client_id, token=token)
    await soon()
    assert line.socket is not None
    return line


def assert_not_restored(line: Line) -> None:
    """Assert that the client has no restored state."""
    assert line.socket is not None
    assert (line.socket.rooms, line.socket.user_data, line.socket.resumed.value) == ((), {}, "none")


# ── ?token= ──


@virtually
async def test_token_restores_rooms_presence_and_user_data() -> None:
    """Rooms, presence metadata and user data are restored; the outcome is gap, because messages were missed."""
    async with Stage() as stage:
        token = await detach_client(stage)
        await stage.manager.room("lobby").send("missed")
        line = await reconnect(stage, token)
        assert line.socket is not None
        assert (line.socket.rooms, line.socket.user_data) == (("lobby", "kitchen"), {"orders": 3})
        assert line.socket.resumed is ResumeOutcome.GAP
        assert [dict(entry.metadata) for entry in stage.manager.room("lobby").presence] == [{"name": "Ann"}]
        assert (stage.events[2:], line.server.data) == (["resume ann gap"], [])
        assert stage.manager.counters.sessions_resumed == 1


@virtually
async def test_return_within_presence_grace_is_not_announced() -> None:
    """A return within the presence grace calls no `on_leave` hook."""
    async with Stage(presence_grace=5) as stage:
        left_rooms: list[str] = []

        @stage.manager.on_leave
        async def left(room: Any, recipient: Any) -> None:
            left_rooms.append(room.name)

        await reconnect(stage, await detach_client(stage))
        await asyncio.sleep(10)
        assert left_rooms == []
        assert stage.manager.room("lobby").clients == ["ann"]


@virtually
async def test_token_after_session_ttl_has_outcome_lost() -> None:
    """A token of an expired session is valid, but the client gets a new session with the outcome lost."""
    async with Stage(session_ttl=20) as stage:
        token = await detach_client(stage)
        await asyncio.sleep(30)
        line = await reconnect(stage, token)
        assert line.socket is not None
        assert (line.socket.rooms, line.socket.user_data) == ((), {})
        assert line.socket.resumed is ResumeOutcome.LOST
        assert [event.fields["why"] for event in stage.heard.of("session_lost")] == ["unknown"]
        assert stage.events[-1] == "connect ann"


@virtually
async def test_token_after_clean_close_has_outcome_lost() -> None:
    """A clean close of the client discards its state, so that its token has the outcome lost."""
    async with Stage() as stage:
        line = stage.plain()
        await soon()
        stage.socket().user_data["orders"] = 3
        token = stage.manager.generate_reconnect_token("ann")
        await line.leaves(1000)
        assert stage.events == ["connect ann", "disconnect ann client_close", "session_end ann client_close"]
        line = await reconnect(stage, token)
        assert line.socket is not None
        assert (line.socket.user_data, line.socket.resumed) == ({}, ResumeOutcome.LOST)


@pytest.mark.parametrize("why", ["other_client", "signature", "malformed", "used", "expired"])
def test_invalid_token_has_outcome_lost_and_emits_cause(why: str, wall_clock: list[float]) -> None:
    """A client with an invalid token connects without any restored state, and an event has the cause."""

    @virtually
    async def play() -> None:
        async with Stage(reconnect_token_ttl=timedelta(seconds=60)) as stage:
            token, client_id = await detach_client(stage), "ann"
            if why == "other_client":
                client_id = "bob"
            elif why == "signature":
                token = WebSocketConnectionManager().generate_reconnect_token("ann")
            elif why == "malformed":
                token = token[:40]
            elif why == "used":
                await (await reconnect(stage, token)).leaves(1000)
            else:
                wall_clock[0] += 61
            line = await reconnect(stage, token, client_id)
            assert_not_restored(line)
            (event,) = stage.heard.of("session_lost")
            assert (event.fields["why"], event.fields["client_id"]) == (why, client_id)
            assert stage.events[-1] == f"connect {client_id}"
            assert stage.bugs == []

    play()


@virtually
async def test_token_presented_by_other_client_is_not_consumed() -> None:
    """A token that another client presents restores nothing for it, and its own client can still use it."""
    async with Stage() as stage:
        token = await detach_client(stage)
        assert_not_restored(await reconnect(stage, token, "bob"))
        line = await reconnect(stage, token)
        assert line.socket is not None
        assert line.socket.user_data == {"orders": 3}


@virtually
async def test_app_token_in_query_is_ignored() -> None:
    """A `token` parameter that is not a reconnect token is left to the application, without an event."""
    async with Stage() as stage:
        await detach_client(stage)
        line = await reconnect(stage, "eyJhbGciOi")
        assert_not_restored(line)
        assert line.socket is not None
        assert line.socket.query_params["token"] == "eyJhbGciOi"
        assert stage.heard.of("session_lost") == []
        assert stage.manager.counters.sessions_lost == 0


@virtually
async def test_token_restores_state_of_last_connection() -> None:
    """The token restores the state of the last connection to close; the sessions of the others end at once."""
    async with Stage(on_duplicate="allow") as stage:
        lines = [stage.plain(), stage.plain()]
        await soon()
        for number, line in enumerate(lines):
            assert line.socket is not None
            line.socket.user_data["number"] = number
        token = stage.manager.generate_reconnect_token("ann")
        for line in lines:
            await line.leaves()
        assert stage.events.count("session_end ann network_lost") == 1
        line = await reconnect(stage, token)
        assert line.socket is not None
        assert line.socket.user_data == {"number": 1}


@virtually
async def test_detached_state_is_bounded_by_max_sessions_away() -> None:
    """Above max_detached_sessions, the state of the plain client that detached first is discarded."""
    async with Stage(max_detached_sessions=1) as stage:
        token = await detach_client(stage)
        await detach_client(stage, "bob")
        await soon()
        assert stage.events.count("session_end ann network_lost") == 1
        line = await reconnect(stage, token)
        assert line.socket is not None
        assert line.socket.resumed is ResumeOutcome.LOST


@virtually
async def test_shutdown_ends_detached_plain_sessions() -> None:
    """A shutdown ends detached plain sessions, each once."""
    async with Stage() as stage:
        await detach_client(stage)
        await stage.manager.graceful_shutdown(1.0)
        assert [event.split()[0] for event in stage.events] == ["connect", "disconnect", "session_end"]


# ── explicit connect ──


async def connect_explicitly(stage: Stage, token: str, client_id: str) -> Any:
    """Validate the token, then connect the client explicitly."""
    server = FakeServer()
    websocket = await server.accepted()
    if await stage.manager.validate_reconnect_token(token) == client_id:
        return await stage.manager.connect(client_id, websocket)
    return None


@virtually
async def test_validated_token_restores_state_in_same_task() -> None:
    """The next `connect` of that client in the same task restores its state."""
    async with Stage() as stage:
        token = await detach_client(stage)
        socket = await connect_explicitly(stage, token, "ann")
        assert (socket.rooms, socket.user_data) == (("lobby", "kitchen"), {"orders": 3})
        assert socket.resumed is ResumeOutcome.GAP
        assert stage.events[-1] == "resume ann gap"


@virtually
async def test_token_validated_in_other_task_restores_nothing() -> None:
    """A token that another task validated restores nothing for this task's `connect`."""
    async with Stage() as stage:
        token = await detach_client(stage)
        assert await asyncio.ensure_future(stage.manager.validate_reconnect_token(token)) == "ann"
        websocket = await FakeServer().accepted()
        socket = await stage.manager.connect("ann", websocket)
        assert (socket.rooms, socket.user_data, socket.resumed) == ((), {}, ResumeOutcome.NONE)


@virtually
async def test_validated_token_restores_nothing_for_other_client() -> None:
    """A validated token restores nothing for another client that the same task connects."""
    async with Stage() as stage:
        await stage.manager.validate_reconnect_token(await detach_client(stage))
        websocket = await FakeServer().accepted()
        socket = await stage.manager.connect("bob", websocket)
        assert (socket.rooms, socket.resumed) == ((), ResumeOutcome.NONE)


def test_invalid_token_raises_error_with_problem(wall_clock: list[float]) -> None:
    """Each kind of invalid token has its own problem, and each has the code 4401."""

    @virtually
    async def play() -> None:
        async with Stage(reconnect_token_ttl=timedelta(seconds=60)) as stage:
            validate, make = stage.manager.validate_reconnect_token, stage.manager.generate_reconnect_token
            token = make("ann")
            assert await validate(token) == "ann"
            foreign = WebSocketConnectionManager().generate_reconnect_token("ann")
            for bad, problem in ((token, "used"), (foreign, "signature"), ("x", "malformed"), ("wsr1.é", "malformed")):
                with pytest.raises(InvalidTokenError) as caught:
                    await validate(bad)
                assert (caught.value.problem, caught.value.code) == (problem, 4401)
            token = make("ann")
            wall_clock[0] += 61
            with pytest.raises(TokenExpiredError) as expired:
                await validate(token)
            assert expired.value.code == 4401

    play()


# ── options ──


@virtually
async def test_reconnect_disabled_issues_no_token_and_ends_sessions() -> None:
    """With enable_reconnect=False no tokens are issued or accepted, and sessions end with their connections."""
    async with Stage(enable_reconnect=False) as stage:
        for call in (stage.manager.generate_reconnect_token,):
            with pytest.raises(InvalidTokenError) as caught:
                call("ann")
            assert caught.value.problem == "disabled"
        with pytest.raises(InvalidTokenError) as caught:
            await stage.manager.validate_reconnect_token("wsr1.x")
        assert caught.value.problem == "disabled"
        peer = Peer(stage)
        line = await peer.dial()
        assert line.welcome["ttl"] == 0
        await line.leaves()
        assert stage.events == ["connect ann", "disconnect ann network_lost", "session_end ann network_lost"]
        assert (await peer.dial()).outcome == "lost"


@virtually
async def test_valid_token_with_reconnect_disabled_restores_nothing() -> None:
    """With enable_reconnect=False a token of another worker restores nothing."""
    issuer = WebSocketConnectionManager(WebSocketConfig(reconnect_secret=NEW))
    async with Stage(enable_reconnect=False, reconnect_secret=NEW) as stage:
        line = await reconnect(stage, issuer.generate_reconnect_token("ann"))
        assert line.socket is not None
        assert line.socket.user_data == {}
        assert stage.events == ["connect ann"]


def test_rotated_secrets_verify_old_tokens() -> None:
    """The first secret signs and all verify: old tokens are valid until the old secret is removed."""

    @virtually
    async def play() -> None:
        before = WebSocketConnectionManager(WebSocketConfig(reconnect_secret=OLD))
        during = WebSocketConnectionManager(WebSocketConfig(reconnect_secret=[NEW, OLD]))
        after = WebSocketConnectionManager(WebSocketConfig.from_env(environ={"WS_RECONNECT_SECRET": NEW}))
        from_env = WebSocketConnectionManager(
            WebSocketConfig.from_env(environ={"WS_RECONNECT_SECRET": f"{NEW}, {OLD}"})
        )
        old, new = before.generate_reconnect_token("ann"), during.generate_reconnect_token("ann")
        for manager in (during, from_env):
            assert [await manager.validate_reconnect_token(token) for token in (old, new)] == ["ann", "ann"]
        assert await after.validate_reconnect_token(new) == "ann"
        for manager, token in ((after, old), (before, new)):
            with pytest.raises(InvalidTokenError) as caught:
                await manager.validate_reconnect_token(token)
            assert caught.value.problem == "signature"

    play()


@pytest.mark.parametrize("secret", ["short", [NEW, "short"], b"short"])
def test_short_reconnect_secret_raises(secret: Any) -> None:
    """A secret below 16 bytes raises, and no secret is in the repr of the config."""
    with pytest.raises(ValidationError) as caught:
        WebSocketConfig(reconnect_secret=secret)
    assert "at least 16 bytes" in str(caught.value)
    assert NEW not in repr(WebSocketConfig(reconnect_secret=NEW))


@pytest.mark.parametrize(("several", "secret"), [(True, None), (True, NEW), (False, None)])
def test_several_workers_without_secret_emit_warning(
    monkeypatch: pytest.MonkeyPatch, several: bool, secret: str | None
) -> None:
    """With several workers and no shared secret, issuing tokens emits one warning."""
    monkeypatch.setattr("fastapi_ws_stabilizer.sessions.reconnect_tokens.has_several_workers", lambda: several)

    @virtually
    async def play() -> None:
        async with Stage(reconnect_secret=secret) as stage:
            for _ in range(3):
                stage.manager.generate_reconnect_token("ann")
            warnings = stage.heard.of("reconnect_secret_missing")
            assert [event.level for event in warnings] == ([logging.WARNING] if several and secret is None else [])

    play()


def test_tokens_and_secrets_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """No token and no secret is in a log record or event, including invalid tokens and the tokens of a welcome."""
    caplog.set_level(logging.DEBUG)

    @virtually
    async def play() -> None:
        async with Stage(reconnect_secret=NEW, log_level="DEBUG") as stage:
            token = await detach_client(stage)
            words = [token, NEW]
            for bad in (token[:-3], f"{token}x"):
                await (await reconnect(stage, bad)).leaves()
                words.append(bad)
            line = await reconnect(stage, token)
            await line.leaves()
            await (await reconnect(stage, token)).leaves()
            peer = Peer(stage, "bob")
            await (await peer.dial()).leaves()
            words += [peer.token or "", "bogus.bogus"]
            await (await peer.dial(token="bogus.bogus")).leaves()
            await stage.manager.graceful_shutdown(1.0)
            logged = [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
            assert len(logged) > 10
            for word in words:
                assert word not in "".join(logged)
                assert word not in repr(stage.heard.all)

    play()


# ── client ids that are not in the path ──


@virtually
async def test_resumed_v1_client_retains_generated_client_id() -> None:
    """Without a client id in the URL, a v1 client that resumes its session has the same client id."""
    async with Stage() as stage:
        peer = Peer(stage, None)
        line = await peer.dial()
        (name,) = stage.manager.get_active_connections()
        await line.leaves()
        assert (await peer.dial()).outcome == "full"
        assert stage.manager.get_active_connections() == [name]


@virtually
async def test_guessed_session_id_grants_no_client_id() -> None:
    """Without a client id in the URL, a session id without its secret does not grant the session's client id."""
    async with Stage() as stage:
        line = await Peer(stage, None).dial()
        (name,) = stage.manager.get_active_connections()
        stranger = await Peer(stage, None).dial(token=f"{line.welcome['session']}.guess")
        assert (stranger.outcome, stranger.welcome["why"]) == ("lost", "unknown")
        assert line.close_code is None
        assert len(set(stage.manager.get_active_connections())) == 2
        assert name in stage.manager.get_active_connections()


@virtually
async def test_returning_plain_client_retains_generated_client_id() -> None:
    """Without a client id in the URL, a reconnect token determines the client id."""
    async with Stage() as stage:
        line = stage.plain(None)
        await soon()
        (name,) = stage.manager.get_active_connections()
        stage.socket(name).user_data["orders"] = 3
        token = stage.manager.generate_reconnect_token(name)
        await line.leaves()
        line = await reconnect(stage, token, None)
        assert line.socket is not None
        assert (line.socket.client_id, line.socket.user_data) == (name, {"orders": 3})


@virtually
async def test_session_token_of_other_client_is_denied_unconsumed() -> None:
    """A token of another client's session is denied and not consumed: its own client can still resume."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        first = peer.token
        await line.say({"type": "ack", "seq": 0})
        await line.leaves()
        line = await peer.dial()  # the client does not get its welcome, which has a second token
        second, peer.token = peer.token, first
        await line.leaves()
        thief = Peer(stage, "bob")
        thief.dials = 50
        stolen = await thief.dial(token=second)
        assert (stolen.outcome, stolen.welcome["why"]) == ("lost", "denied")
        assert (await peer.dial()).outcome == "full"
        assert "resume bob full" not in stage.events


# ── stats ──


@virtually
async def test_stats_count_sessions_and_resume_outcomes() -> None:
    """The stats router counts sessions, detached sessions and resume outcomes."""
    async with Stage(replay_max_messages=1) as stage:
        peer = Peer(stage)
        await (await peer.dial()).leaves()
        line = await peer.dial()
        await line.leaves()
        for number in range(3):
            await stage.manager.send_to_client("ann", number)
        assert (await peer.dial()).outcome == "gap"
        await (await Peer(stage, "bob").dial()).leaves()
        await Peer(stage, "joe").dial(token="no.token")
        stage.plain("sue")
        await soon()
        counters = await overview(stage.manager)
        page = await connections(stage.manager, offset=0, limit=100)
        names = ("sessions", "sessions_away", "sessions_resumed", "session_gaps", "sessions_lost")
        assert [getattr(counters, name) for name in names] == [3, 1, 1, 1, 1]
        of_client = {one.client_id: one.session_id for one in page.connections}
        assert of_client["ann"] == stage.socket().session_id
        assert of_client["sue"] is None


# ── tokens of several connections ──


async def tabs(stage: Stage, *rooms: str) -> list[Line]:
    """Open connections of one client, each in its own room and with its own user data."""
    lines = []
    for room in rooms:
        line = stage.plain()
        await soon()
        assert line.socket is not None
        await line.socket.join(room)
        line.socket.user_data["room"] = room
        lines.append(line)
    return lines


@pytest.mark.parametrize("leaving", [(0, 1), (1, 0)])
@pytest.mark.parametrize("by_socket", [True, False], ids=["ws.reconnect_token()", "generate_reconnect_token(ws)"])
@virtually
async def test_connection_token_restores_state_of_that_connection(leaving: tuple[int, int], by_socket: bool) -> None:
    """A token names a connection: in any order of closing, each token restores the state of its own connection."""
    async with Stage(on_duplicate="allow") as stage:
        lines = await tabs(stage, "one", "two")
        sockets = [line.socket for line in lines if line.socket is not None]
        generate = stage.manager.generate_reconnect_token
        tokens = [socket.reconnect_token() if by_socket else generate(socket) for socket in sockets]
        for index in leaving:
            await lines[index].leaves()
        resumed = [stage.plain(token=token) for token in tokens]
        await soon()
        assert [line.socket and (line.socket.rooms, line.socket.user_data["room"]) for line in resumed] == [
            (("one",), "one"),
            (("two",), "two"),
        ]


@virtually
async def test_second_connection_token_restores_successor_state() -> None:
    """A second token of a connection restores the state of the connection that resumed with the first token."""
    async with Stage(on_duplicate="allow") as stage:
        first, other = await tabs(stage, "one", "two")
        assert first.socket is not None
        assert other.socket is not None
        tokens = [first.socket.reconnect_token(), first.socket.reconnect_token(), other.socket.reconnect_token()]
        await first.leaves()
        again = stage.plain(token=tokens[0])
        await soon()
        assert again.socket is not None
        again.socket.user_data["more"] = 1
        await again.leaves()
        await other.leaves()
        third = stage.plain(token=tokens[1])
        await soon()
        assert third.socket is not None
        assert (third.socket.rooms, third.socket.user_data) == (("one",), {"room": "one", "more": 1})


@virtually
async def test_client_token_names_current_or_newest_connection() -> None:
    """In an endpoint the token names that connection; elsewhere it names the newest one."""
    async with Stage(on_duplicate="allow") as stage:
        own: list[str] = []

        async def endpoint(ws: StableSocket) -> None:
            await stage.gate.wait()
            own.append(stage.manager.generate_reconnect_token("ann"))
            await ws.run()

        stage.endpoint = endpoint
        lines = await tabs(stage, "one", "two", "three")
        elsewhere = stage.manager.generate_reconnect_token("ann")
        stage.gate.set()
        await soon()
        for line in lines:
            await line.leaves()
        resumed = [stage.plain(token=token) for token in (elsewhere, *own[:2])]
        await soon()
        assert [line.socket and line.socket.rooms for line in resumed] == [("three",), ("one",), ("two",)]


@virtually
async def test_session_without_token_ends_without_ttl() -> None:
    """`on_session_end` is called after `session_ttl` if a token was issued, and at once otherwise."""
    async with Stage(on_duplicate="allow", session_ttl=60) as stage:
        first, second = await tabs(stage, "one", "two")
        assert first.socket is not None
        first.socket.reconnect_token()
        await second.leaves()
        await asyncio.sleep(5)
        assert len([event for event in stage.events if event.startswith("session_end")]) == 1
        await first.leaves()
        await asyncio.sleep(50)
        assert len([event for event in stage.events if event.startswith("session_end")]) == 1
        await asyncio.sleep(20)
        assert len([event for event in stage.events if event.startswith("session_end")]) == 2


@pytest.mark.parametrize("query", ["token=login&reconnect_token={}", "reconnect_token={}", "token={}"])
@virtually
async def test_reconnect_token_is_read_from_either_query_parameter(query: str) -> None:
    """The manager reads `?reconnect_token=`, and `?token=` too if that is a reconnect token."""
    async with Stage() as stage:
        (line,) = await tabs(stage, "one")
        assert line.socket is not None
        token = line.socket.reconnect_token()
        await line.leaves()
        resumed = Line(stage, query=query.format(token))
        await soon()
        assert resumed.socket is not None
        assert (resumed.socket.rooms, resumed.socket.resumed.value) == (("one",), "gap")


@virtually
async def test_reconnect_token_of_closed_socket_raises() -> None:
    """`reconnect_token()` of a closed connection raises, because it would restore nothing."""
    async with Stage() as stage:
        (line,) = await tabs(stage, "one")
        await line.leaves()
        assert line.socket is not None
        for call in (line.socket.reconnect_token, lambda: stage.manager.generate_reconnect_token(line.socket)):  # type: ignore[arg-type]
            with pytest.raises(SocketClosed):
                call()
    async with Stage(enable_reconnect=False) as stage:
        (line,) = await tabs(stage, "one")
        assert line.socket is not None
        with pytest.raises(InvalidTokenError, match="enable_reconnect"):
            line.socket.reconnect_token()


async def test_send_to_detached_plain_client_returns_false() -> None:
    """`send_to_client` returns False for a plain client that may return with a token, and does not raise."""
    async with Stage() as stage:
        line = stage.plain("ann")
        await line.server.until(lambda: bool(stage.manager.get_sockets("ann")))
        stage.manager.generate_reconnect_token("ann")
        line.server.feed_disconnect(1006)
        await asyncio.wait_for(line.task, 5)
        assert stage.manager.get_active_connections() == []
        assert await stage.manager.send_to_client("ann", "hi") is False


@virtually
async def test_connection_token_records_expire_with_tokens() -> None:
    """With several connections of a client, the record that maps a token to its connection expires with the token."""
    async with Stage(on_duplicate="allow", reconnect_token_ttl=timedelta(minutes=10)) as stage:
        (line,) = await tabs(stage, "one")
        assert line.socket is not None
        node = stage.manager._node
        for _ in range(20):
            line.socket.reconnect_token()
        assert len(node.tokens._keys) == 20
        await asyncio.sleep(601)
        line.socket.reconnect_token()
        assert (len(node.tokens._keys), len(node.tokens._expected)) == (1, 1)
