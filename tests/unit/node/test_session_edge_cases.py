"""Tests of sessions and detached state when events overlap, come in an unusual order or exceed a timeout."""

from __future__ import annotations

import asyncio
import contextvars
import gc
from typing import Any

import pytest

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_link import soon, virtually
from tests.support.stage import Line, Peer, Stage

user: contextvars.ContextVar[str | None] = contextvars.ContextVar("user", default=None)


def session_ends(stage: Stage) -> list[str]:
    """Return the session end events."""
    return [event for event in stage.events if event.startswith("session_end")]


async def plain(stage: Stage, client_id: str | None = "ann", *, token: str | None = None) -> Line:
    """Connect a plain client."""
    line = stage.plain(client_id, token=token)
    await soon()
    return line


def token_of(stage: Stage, client_id: str = "ann") -> str:
    """Generate a reconnect token."""
    return stage.manager.generate_reconnect_token(client_id)


# ── tokens ──


@virtually
async def test_used_token_does_not_identify_client_in_handshake() -> None:
    """A used token, which may come from an access log, does not identify its finder to on_handshake."""
    async with Stage() as stage:
        seen = []

        @stage.manager.on_handshake
        async def look(ws: StableSocket) -> None:
            seen.append(ws.client_id)
            ws.user_data["account"] = f"account of {ws.client_id}"

        token = token_of(stage)
        await (await plain(stage, None, token=token)).leaves()
        stranger = await plain(stage, None, token=token)
        assert seen[0] == "ann"
        assert seen[1] != "ann"
        assert stranger.socket is not None
        assert stranger.socket.user_data == {"account": f"account of {seen[1]}"}


@virtually
async def test_slower_handshake_with_same_token_closes_with_4401() -> None:
    """Of two handshakes with the same token, the slower one closes with 4401, after on_handshake."""
    async with Stage() as stage:
        gates = [asyncio.Event(), asyncio.Event()]
        waiting = iter(gates)

        @stage.manager.on_handshake
        async def wait(ws: StableSocket) -> None:
            await next(waiting).wait()

        token = token_of(stage)
        first, second = stage.plain(None, token=token), stage.plain(None, token=token)
        await soon()
        gates[1].set()
        await soon()
        gates[0].set()
        await soon()
        assert second.socket is not None
        assert second.socket.client_id == "ann"
        assert first.socket is None
        assert getattr(first.error, "code", None) == 4401


# ── plain clients during handover ──


@pytest.mark.parametrize("loss", ["lost", "half-open", "shutdown"])
@virtually
async def test_claimed_but_unused_state_ends_session_once(loss: str) -> None:
    """A client that is lost while it waits for its old connection ends its session once, with a hook."""
    async with Stage(session_ttl=2, disconnect_grace=5) as stage:
        token = token_of(stage)
        line = await plain(stage)
        await line.say({"type": "wait", "data": 1})
        if loss != "half-open":
            await line.leaves()
        new = await plain(stage, token=token)
        if loss == "shutdown":
            await stage.manager.graceful_shutdown(30)
        else:
            await new.leaves()
        await asyncio.sleep(60)
        assert len(session_ends(stage)) == 1
        assert stage.events[-1] == session_ends(stage)[0]


@virtually
async def test_claimed_but_unused_state_can_be_claimed_again() -> None:
    """State that was claimed but never used can be claimed with the next token."""
    async with Stage(session_ttl=60, disconnect_grace=5) as stage:
        tokens = [token_of(stage), token_of(stage)]
        line = await plain(stage)
        assert line.socket is not None
        await line.socket.join("room")
        line.socket.user_data["x"] = 1
        await line.say({"type": "wait", "data": 1})
        await line.leaves()
        await (await plain(stage, token=tokens[0])).leaves()
        await asyncio.sleep(30)
        third = await plain(stage, token=tokens[1])
        assert third.socket is not None
        assert (third.socket.rooms, third.socket.user_data) == (("room",), {"x": 1})


@virtually
async def test_session_end_hook_follows_disconnect_hook() -> None:
    """`on_session_end` follows `on_disconnect`, also after a slow handler or when another connection closes between."""
    async with Stage(session_ttl=2, disconnect_grace=8) as stage:
        token_of(stage)
        line = await plain(stage)
        await line.say({"type": "wait", "data": 1})
        await line.leaves()
        await asyncio.sleep(60)
        assert stage.events[-1].startswith("session_end")
    async with Stage(session_ttl=60, on_duplicate="allow") as stage:
        token_of(stage)
        lines = [await plain(stage), await plain(stage)]
        for line in lines:
            line.server.feed_disconnect(1006)
        await asyncio.sleep(1)
        assert stage.events.index("disconnect ann network_lost") < stage.events.index(session_ends(stage)[0])


@virtually
async def test_plain_client_gets_no_state_of_v1_session() -> None:
    """The state of a v1 session ends with it, and a plain client of the same id does not get it."""
    async with Stage(on_duplicate="replace") as stage:
        line = await Peer(stage).dial()
        assert line.socket is not None
        line.socket.user_data["x"] = 1
        new = await plain(stage, token=token_of(stage))
        assert new.socket is not None
        assert new.socket.user_data == {}
        assert new.socket.resumed.value == "lost"


# ── messages in progress ──


@virtually
async def test_interrupted_handler_uses_up_idempotency_key() -> None:
    """A handler that was interrupted uses up its key: the same key again gets an error, and no second execution."""
    async with Stage() as stage:

        @stage.manager.on_message("charge")
        async def charge(ws: StableSocket, data: Any) -> None:
            stage.notes.append(data)
            await stage.gate.wait()
            await ws.send("ok")

        peer = Peer(stage)
        line = await peer.dial()
        await line.message("charge", 5, key="k1")
        await line.leaves()
        stage.gate.set()
        await soon()
        peer.token = None
        again = await peer.dial()
        await again.say({"type": "msg", "seq": 1, "event": "charge", "data": 5, "key": "k1", "id": "q"})
        assert stage.notes == [5]
        assert again.of("reply")[-1]["error"]["code"] == "handled_before"


@virtually
async def test_failed_send_in_one_handler_does_not_stop_others() -> None:
    """A handler that fails to send does not stop the handlers registered after it."""
    async with Stage() as stage:

        @stage.manager.on_message
        async def first(ws: StableSocket, data: Any) -> None:
            await stage.gate.wait()
            await ws.send("ok")

        @stage.manager.on_message
        async def second(ws: StableSocket, data: Any) -> None:
            stage.notes.append(data)

        line = await Peer(stage).dial()
        await line.message("two", 5)
        await line.leaves()
        stage.gate.set()
        await soon()
        assert stage.notes == ["5"]


@virtually
async def test_user_data_of_session_is_one_dict() -> None:
    """What a running handler writes to user data is in the next connection, beside what the hooks set there."""
    async with Stage() as stage:

        @stage.manager.on_auth
        async def auth(ws: StableSocket, credential: str | None) -> None:
            ws.user_data["user"] = 1

        @stage.manager.on_message("fill")
        async def fill(ws: StableSocket, data: Any) -> None:
            mine = ws.user_data
            await stage.gate.wait()
            mine["filled"] = data

        peer = Peer(stage)
        line = await peer.dial()
        await line.message("fill", 5)
        await line.leaves()
        new = await peer.dial()
        stage.gate.set()
        await soon()
        assert new.socket is not None
        assert new.socket.user_data == {"user": 1, "filled": 5}


# ── resume with a full replay buffer ──


@virtually
async def test_full_replay_on_resume_does_not_overflow_outbox() -> None:
    """A full replay takes no outbox space from live messages, even while the network accepts no data."""
    async with Stage() as stage:
        peer = Peer(stage)
        await (await peer.dial()).leaves()
        for number in range(520):
            await stage.manager.send_to_client("ann", number)
        peer.dials += 1
        line = Line(stage, "ann", subprotocols=(SUBPROTOCOL,))
        await soon()
        line.server.block()
        resume = {"token": peer.token, "seq": 8}
        await line.say({"type": "hello", "v": 1, "n": peer.dials, "client": peer.instance, "resume": resume})
        await stage.manager.send_to_client("ann", "live")
        await soon()
        line.server.release()
        await soon()
        assert line.close_code is None
        assert [frame["data"] for frame in line.of("msg")] == [*range(8, 520), "live"]


@pytest.mark.parametrize("replayed", [1, 2, 8])
@virtually
async def test_burst_of_broadcasts_does_not_close_v1_client(replayed: int) -> None:
    """A burst above `replay_max_messages` reaches a connected client whole and does not close it."""
    async with Stage(replay_max_messages=replayed) as stage:
        line = await Peer(stage).dial()
        for number in range(40):
            await stage.manager.broadcast(number)
        await soon()
        assert line.close_code is None
        assert len(line.of("msg")) == 40


# ── contexts ──


@pytest.mark.parametrize("session", [False, True], ids=["plain", "v1"])
@virtually
async def test_late_session_end_hook_runs_in_no_client_context(session: bool) -> None:
    """A late on_session_end hook does not see context variables of another client's connection."""
    async with Stage(session_ttl=5) as stage:
        seen = []

        @stage.manager.on_handshake
        async def enter(ws: StableSocket) -> None:
            user.set(ws.client_id)

        @stage.manager.on_session_end
        async def end(ws: StableSocket) -> None:
            seen.append((ws.client_id, user.get()))

        lines = []
        for client_id in ("ann", "bob"):
            token_of(stage, client_id)
            lines.append(await Peer(stage, client_id).dial() if session else await plain(stage, client_id))
        for line in lines:
            await line.leaves()
            await asyncio.sleep(1)
        await asyncio.sleep(30)
        assert seen == [("ann", None), ("bob", None)]


@pytest.mark.parametrize("session", [False, True], ids=["plain", "v1"])
@virtually
async def test_session_timer_does_not_hold_closed_connection(session: bool) -> None:
    """A session timer does not keep a closed connection in memory."""
    async with Stage(session_ttl=5) as stage:
        first = None
        for number in range(20):
            client_id = f"client {number}"
            token_of(stage, client_id)
            line = await Peer(stage, client_id).dial() if session else await plain(stage, client_id)
            assert line.socket is not None
            first = first or line.socket.connection_id
            await line.leaves()
            stage.lines.remove(line)
            await asyncio.sleep(2)
        del line
        gc.collect()
        remaining = [one for one in gc.get_objects() if isinstance(one, Connection) and one.connection_id == first]
        assert remaining == []


@virtually
async def test_context_set_by_on_auth_reaches_handlers() -> None:
    """A context variable that on_auth sets is visible in the endpoint and the handlers."""
    async with Stage() as stage:

        @stage.manager.on_auth
        async def auth(ws: StableSocket, credential: str | None) -> None:
            user.set("ann!")

        @stage.manager.on_message("user")
        async def get_user(ws: StableSocket) -> None:
            stage.notes.append(user.get())

        await (await Peer(stage).dial()).message("user", 1)
        assert stage.notes == ["ann!"]


# ── timeouts ──


@pytest.mark.parametrize("kind", ["plain", "session", "clean close"])
@pytest.mark.parametrize("slow_part", ["hook", "handler"])
@virtually
async def test_shutdown_timeout_still_runs_every_session_end_hook(kind: str, slow_part: str) -> None:
    """A disconnect hook or handler that exceeds the shutdown timeout does not suppress on_session_end."""
    async with Stage(disconnect_grace=20) as stage:

        @stage.manager.on_disconnect
        async def slow(ws: StableSocket) -> None:
            await asyncio.sleep(15 if slow_part == "hook" else 0)

        @stage.manager.on_message("stubborn")
        async def stubborn(ws: StableSocket, data: Any) -> None:
            for _ in range(5):
                try:
                    await asyncio.sleep(3)
                except asyncio.CancelledError:
                    pass

        line = await plain(stage) if kind == "plain" else await Peer(stage).dial()
        if slow_part == "handler" and kind == "plain":
            await line.say({"type": "stubborn", "data": 1})
        elif slow_part == "handler":
            await line.message("stubborn", 1)
        if kind == "clean close":
            await line.leaves(1000)
        await stage.manager.graceful_shutdown(1.0)
        await asyncio.sleep(60)
        assert len(session_ends(stage)) == 1


# ── failed handshakes and duplicates ──


@virtually
async def test_disconnect_during_hello_reports_no_error() -> None:
    """A connection that fails during the hello emits no error event, and the dependency raises no other exception."""
    async with Stage() as stage:
        line = Line(stage, "ann", subprotocols=(SUBPROTOCOL,))
        await soon()
        line.server.fail(OSError("gone"))
        await line.say("nonsense")
        other = Line(stage, "bob", subprotocols=(SUBPROTOCOL,))
        await soon()
        other.server.feed(OSError("gone"))
        await soon()
        assert stage.bugs == []
        assert {type(line.error).__name__, type(other.error).__name__} == {"WebSocketException"}


@virtually
async def test_client_with_lost_welcome_is_not_rejected_as_duplicate() -> None:
    """With on_duplicate="reject" a client that lost its welcome may replace its own half-open connection."""
    async with Stage(on_duplicate="reject") as stage:
        peer = Peer(stage)
        await peer.dial()
        peer.token = None
        assert (await peer.dial()).of("welcome")
        assert (await Peer(stage).dial()).close_code == 4409


@virtually
async def test_drain_request_to_ended_connection_returns_false() -> None:
    """A drain request to a closed connection returns False and leaves no record."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        assert line.socket is not None
        connection = line.socket._connection
        await line.leaves()
        assert not connection.request_drain(0.0, 1.0, DisconnectReason.LIFETIME)
        assert connection.resources.drain_requests == {}
