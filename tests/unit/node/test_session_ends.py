"""Tests of sessions: their acceptance, their loss, and the on_session_end call, exactly once in any order of events."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import HTTPException, WebSocketException

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.sessions.store import MAX_DETACHED_PER_CLIENT
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_link import soon, virtually
from tests.support.stage import Line, Peer, Stage
from tests.unit.node.test_python_client import World


def session_ends(stage: Stage, client_id: str = "ann") -> list[str]:
    """Return the session end events of a client."""
    return [event for event in stage.events if event.startswith(f"session_end {client_id}")]


# ── acceptance ──


@pytest.mark.parametrize("error", [HTTPException(401), HTTPException(429), WebSocketException(1008), RuntimeError()])
@virtually
async def test_session_rejected_by_on_connect_cannot_be_resumed(error: Exception) -> None:
    """A session that on_connect rejected has ended: its token cannot be used to skip on_connect."""
    async with Stage() as stage:
        stage.rejection = error
        peer = Peer(stage)
        await (await peer.dial()).leaves()
        again = await peer.dial()
        assert again.socket is None
        assert not [event for event in stage.events if event.startswith("resume")]
        stage.rejection = None
        assert (await peer.dial()).socket is not None
        assert stage.events[-1] == "connect ann"


@virtually
async def test_session_lost_during_on_connect_runs_on_connect_again() -> None:
    """A session that is lost before on_connect has returned runs on_connect again instead of on_resume."""
    async with Stage(disconnect_grace=3) as stage:

        @stage.manager.on_connect
        async def slow(ws: StableSocket) -> None:
            await stage.gate.wait()

        peer = Peer(stage)
        await (await peer.dial()).leaves()
        await asyncio.sleep(20)
        stage.gate.set()
        await peer.dial()
        assert not [event for event in stage.events if event.startswith("resume")]
        assert stage.events.count("connect ann") == 2


@virtually
async def test_handover_during_on_connect_runs_on_connect_again() -> None:
    """A connection that replaces a half-open one during its on_connect runs on_connect again instead of on_resume."""
    async with Stage(disconnect_grace=3) as stage:

        @stage.manager.on_connect
        async def slow(ws: StableSocket) -> None:
            await stage.gate.wait()

        peer = Peer(stage)
        await peer.dial()
        line = await peer.dial()
        await asyncio.sleep(20)
        stage.gate.set()
        await soon()
        assert line.socket is not None
        assert stage.events.count("connect ann") == 2
        assert not [event for event in stage.events if event.startswith("resume")]


# ── a chain of connections ──


@pytest.mark.parametrize("half_open", [False, True], ids=["lost", "half-open"])
@virtually
async def test_third_connection_waits_for_handler_of_first(half_open: bool) -> None:
    """A message in progress is handled before later messages, over any number of reconnects."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("wait", "in hand")
        if not half_open:
            await line.leaves()
        second = await peer.dial()
        if not half_open:
            await second.leaves()
        third = await peer.dial()
        await third.message("note", "new", first=2)
        stage.gate.set()
        await soon()
        assert stage.notes == ["in hand", "new"]


@virtually
async def test_connection_lost_during_handover_runs_no_hooks() -> None:
    """A connection that is lost while it waits for the previous one runs no hooks."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("wait", "in hand")
        await line.leaves()
        await (await peer.dial()).leaves()
        stage.gate.set()
        await soon()
        await peer.dial()
        assert stage.events == ["connect ann", "disconnect ann network_lost", "resume ann full"]


@pytest.mark.parametrize("cause", ["clean close", "ttl", "manager.disconnect"])
@virtually
async def test_session_end_hook_runs_after_loss_during_handover(cause: str) -> None:
    """`on_session_end` is called once, also if the last connection of the session ran no hooks."""
    async with Stage(session_ttl=2, disconnect_grace=5) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("wait", "in hand")
        await line.leaves()
        second = await peer.dial()
        if cause == "manager.disconnect":
            await stage.manager.disconnect("ann")
        else:
            await second.leaves(1000 if cause == "clean close" else 1006)
        await asyncio.sleep(60)
        assert len(session_ends(stage)) == 1
        assert stage.events[-1] == session_ends(stage)[0]


@pytest.mark.parametrize("cause", ["ttl", "manager.disconnect", "evicted", "shutdown"])
@virtually
async def test_session_end_hook_runs_while_endpoint_finishes(cause: str) -> None:
    """`on_session_end` is called once if a session ends between its disconnect hooks and the endpoint's return."""
    ttl = 3 if cause == "ttl" else 100
    async with Stage(session_ttl=ttl, disconnect_grace=8, max_detached_sessions=1) as stage:

        async def endpoint(ws: StableSocket) -> None:
            async for _ in ws:
                pass
            if ws.client_id == "ann":
                await asyncio.sleep(5)

        stage.endpoint = endpoint
        await (await Peer(stage).dial()).leaves()
        await asyncio.sleep(1)
        if cause == "manager.disconnect":
            await stage.manager.disconnect("ann")
        elif cause == "evicted":
            await (await Peer(stage, "bob").dial()).leaves()
        elif cause == "shutdown":
            await stage.manager.graceful_shutdown(2)
        await asyncio.sleep(20)
        assert len(session_ends(stage)) == 1


# ── several connections of one client ──


@virtually
async def test_reject_policy_closes_returning_duplicate_with_4409() -> None:
    """The client is closed with 4409 before its token is used, and its older session has ended."""
    async with Stage(on_duplicate="reject") as stage:
        peer = Peer(stage)
        await (await peer.dial()).leaves()
        await Peer(stage).dial()
        assert (await peer.dial()).close_code == 4409
        assert len(session_ends(stage)) == 1


@virtually
async def test_two_clients_with_one_id_do_not_reconnect_forever() -> None:
    """The older client is closed with 4410, which is final, so that the two do not replace each other repeatedly."""
    async with World() as world:
        clients = [world.client(base_delay=1.0) for _ in range(2)]
        for client in clients:
            client.start()
        await asyncio.sleep(600)
        assert sum(client.attempts for client in clients) == 2


@virtually
async def test_replace_policy_ends_detached_sessions_of_client() -> None:
    """With on_duplicate="replace" a new session ends the detached sessions of its client."""
    async with Stage(on_duplicate="replace") as stage:
        await (await Peer(stage).dial()).leaves()
        await Peer(stage).dial()
        assert stage.manager.get_session_counts() == {"sessions": 1, "away": 0}
        await soon()
        assert session_ends(stage) == ["session_end ann replaced"]


@virtually
async def test_allow_policy_bounds_detached_sessions_of_client() -> None:
    """With on_duplicate="allow" the number of detached sessions of a client is bounded."""
    async with Stage(on_duplicate="allow") as stage:
        for _ in range(MAX_DETACHED_PER_CLIENT + 4):
            await (await Peer(stage).dial()).leaves()
        assert stage.manager.get_session_counts() == {
            "sessions": MAX_DETACHED_PER_CLIENT,
            "away": MAX_DETACHED_PER_CLIENT,
        }
        await soon()
        assert len(session_ends(stage)) == 4


# ── plain clients with a token ──


@pytest.mark.parametrize("half_open", [False, True], ids=["lost", "half-open"])
@virtually
async def test_returning_plain_client_waits_for_on_disconnect(half_open: bool) -> None:
    """User data that on_disconnect of the old connection writes is in the new connection."""
    async with Stage() as stage:

        @stage.manager.on_disconnect
        async def save(ws: StableSocket) -> None:
            ws.user_data["saved"] = True

        line = stage.plain()
        await soon()
        token = stage.manager.generate_reconnect_token("ann")
        if not half_open:
            await line.say({"type": "wait"})
            await line.leaves()
        new = stage.plain(token=token)
        await soon()
        stage.gate.set()
        await soon()
        cause = "replaced" if half_open else "network_lost"
        assert stage.events == ["connect ann", f"disconnect ann {cause}", "resume ann gap"]
        assert new.socket is not None
        assert new.socket.user_data == {"saved": True}


@virtually
async def test_reject_policy_allows_plain_takeover_with_token() -> None:
    """With on_duplicate="reject" a client with a token for its own connection is not a duplicate."""
    async with Stage(on_duplicate="reject") as stage:
        line = stage.plain()
        await soon()
        assert line.socket is not None
        line.socket.user_data["x"] = 1
        token = stage.manager.generate_reconnect_token("ann")
        new = stage.plain(token=token)
        await soon()
        assert new.socket is not None
        assert new.socket.user_data == {"x": 1}
        assert line.close_code == 4409


@virtually
async def test_second_connection_with_token_has_own_user_data() -> None:
    """With on_duplicate="allow" both connections stay, with separate user data, and each session ends once."""
    async with Stage(on_duplicate="allow") as stage:
        first = stage.plain()
        await soon()
        assert first.socket is not None
        first.socket.user_data["x"] = 1
        second = stage.plain(token=stage.manager.generate_reconnect_token("ann"))
        await soon()
        assert second.socket is not None
        second.socket.user_data["y"] = 2
        assert first.socket.user_data == {"x": 1}
        await first.leaves(1000)
        await second.leaves(1000)
        await soon()
        assert len(session_ends(stage)) == 2


@virtually
async def test_token_with_reconnect_disabled_identifies_no_client() -> None:
    """With enable_reconnect=False a token does not determine the client id."""
    issuer = WebSocketConnectionManager(WebSocketConfig(reconnect_secret="x" * 20))
    async with Stage(enable_reconnect=False, reconnect_secret="x" * 20) as stage:
        line = stage.plain(None, token=issuer.generate_reconnect_token("ann"))
        await soon()
        assert line.socket is not None
        assert line.socket.client_id != "ann"


# ── shutdown ──


@virtually
async def test_shutdown_closes_connection_awaiting_hello_with_1012() -> None:
    """A shutdown closes a connection that awaits its hello with 1012, like all others."""
    async with Stage() as stage:
        line = Line(stage, subprotocols=(SUBPROTOCOL,))
        await soon()
        await stage.manager.graceful_shutdown(1)
        await soon()
        assert line.close_code == 1012


@virtually
async def test_shutdown_during_handover_leaks_no_cancellation() -> None:
    """The dependency of a connection that waits for handover ends without a cancellation."""
    async with Stage(disconnect_grace=5) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("wait", "in hand")
        await line.leaves()
        new = await peer.dial()
        await stage.manager.graceful_shutdown(3)
        await asyncio.sleep(20)
        assert not new.task.cancelled()


@virtually
async def test_slow_on_auth_after_shutdown_creates_no_session() -> None:
    """An on_auth hook that returns after the shutdown creates no session."""
    async with Stage() as stage:

        @stage.manager.on_auth
        async def slow(ws: StableSocket, credential: str | None) -> None:
            await stage.gate.wait()

        line = await Peer(stage).dial()
        await stage.manager.graceful_shutdown(1)
        stage.gate.set()
        await soon()
        assert stage.manager.get_session_counts() == {"sessions": 0, "away": 0}
        assert line.close_code == 1012


# ── credentials and presence ──


@virtually
async def test_on_auth_over_hello_timeout_closes_with_1011() -> None:
    """An on_auth hook that exceeds `hello_timeout` closes with 1011 and is reported as a bug."""
    async with Stage(hello_timeout=2) as stage:

        @stage.manager.on_auth
        async def hangs(ws: StableSocket, credential: str | None) -> None:
            await asyncio.Event().wait()

        line = await Peer(stage).dial()
        await asyncio.sleep(3)
        assert (line.close_code, stage.bugs) == (1011, ["auth_hook_failed"])


@virtually
async def test_on_auth_sees_client_id_of_session() -> None:
    """If the endpoint sets no client id, the session token determines it before on_auth is called."""
    async with Stage() as stage:
        seen = []

        @stage.manager.on_auth
        async def look(ws: StableSocket, credential: str | None) -> None:
            seen.append(ws.client_id)

        peer = Peer(stage, None)
        await (await peer.dial()).leaves()
        await peer.dial()
        assert len(set(seen)) == 1
        assert seen == [socket.client_id for socket in stage.manager.get_sockets()] * 2


@virtually
async def test_infinite_credential_expiry_is_accepted() -> None:
    """An infinite expiry is accepted, because JWT libraries return it for a token without an end."""
    async with Stage() as stage:

        @stage.manager.on_auth
        async def look(ws: StableSocket, credential: str | None) -> float:
            return float("inf")

        line = await Peer(stage).dial()
        await line.say({"type": "auth", "token": "x"})
        assert stage.bugs == []
        assert line.of("auth")[-1]["ok"]


@virtually
async def test_presence_set_while_detached_survives_resume() -> None:
    """A resume does not restore presence metadata older than what was set while detached."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await stage.socket().join("lobby", {"n": 1})
        await line.leaves()
        room = stage.manager.room("lobby")
        assert room.set_presence("ann", n=2)
        await peer.dial()
        assert [dict(entry.metadata) for entry in room.presence] == [{"n": 2}]
