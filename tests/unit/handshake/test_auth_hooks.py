"""Tests of the credentials of `stabilizer.v1.json` clients, and of their renewal."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
from fastapi import HTTPException, WebSocketException

from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_link import soon, virtually
from tests.support.stage import Peer, Stage


class Guarded(Stage):
    """Stage that requires the credential `good`.

    Attributes:
        shown: The credentials that the hook was called with.
        expires_in: The lifetime in seconds that the hook returns.
        verdict: The exception that the hook raises instead.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.shown: list[str | None] = []
        self.expires_in: float | None = None
        self.verdict: Exception | None = None

        @self.manager.on_auth
        async def look(ws: StableSocket, credential: str | None) -> float | None:
            self.shown.append(credential)
            if self.verdict is not None:
                raise self.verdict
            if credential != "good":
                raise HTTPException(401)
            return self.expires_in


def offered(credential: str) -> str:
    """Return a credential as a subprotocol."""
    return "stabilizer.auth." + base64.urlsafe_b64encode(credential.encode()).decode().rstrip("=")


@virtually
async def test_credential_in_hello_is_checked_before_other_hooks() -> None:
    """The credential in the hello is checked before any other hook is called."""
    async with Guarded() as stage:
        line = await Peer(stage).dial(auth="good")
        assert (stage.shown, line.outcome, stage.events) == (["good"], "none", ["connect ann"])


@virtually
async def test_credential_in_subprotocol_is_not_selected() -> None:
    """The credential in a subprotocol is decoded, but never selected as the subprotocol."""
    async with Guarded() as stage:
        line = await Peer(stage).dial(subprotocols=(offered("good"), SUBPROTOCOL))
        assert (stage.shown, line.outcome) == (["good"], "none")
        assert line.server.taken[0]["subprotocol"] == SUBPROTOCOL


@virtually
async def test_credential_in_hello_precedes_subprotocol() -> None:
    """A credential in the hello takes precedence over one in the handshake, because it is newer."""
    async with Guarded() as stage:
        await Peer(stage).dial(auth="good", subprotocols=(SUBPROTOCOL, offered("stale")))
        assert stage.shown == ["good"]


@pytest.mark.parametrize(
    "subprotocol",
    ["stabilizer.auth.é", "stabilizer.auth.", "stabilizer.auth.A", "stabilizer.auth._w", "stabilizer.auth.😀😀😀😀"],
)
@virtually
async def test_undecodable_credential_in_subprotocol_closes_4401(subprotocol: str) -> None:
    """A credential that cannot be decoded closes with 4401, without a traceback."""
    async with Guarded() as stage:
        line = await Peer(stage).dial(subprotocols=(SUBPROTOCOL, subprotocol))
        assert line.close_code == 4401
        assert stage.shown in ([None], [""])
        assert stage.bugs == []
        assert type(line.error) is WebSocketException


@virtually
async def test_missing_credential_closes_with_4401() -> None:
    """The hook is called without a credential too; its rejection closes with 4401 and leaves no session."""
    async with Guarded() as stage:
        line = await Peer(stage).dial()
        assert (stage.shown, line.close_code, line.of("welcome")) == ([None], 4401, [])
        assert (stage.events, stage.manager.get_session_counts()) == ([], {"sessions": 0, "away": 0})


@virtually
async def test_auth_rejection_with_retry_after_sends_retry_hint() -> None:
    """The Retry-After of an HTTPException(429) is the retry hint in the close reason."""
    async with Guarded() as stage:
        stage.verdict = HTTPException(429, headers={"Retry-After": "7"})
        line = await Peer(stage).dial(auth="good")
        ((code, reason),) = line.server.close_frames
        assert code == 4429
        assert "retry=7000" in reason


@virtually
async def test_failing_auth_hook_closes_with_1011() -> None:
    """A failing auth hook closes with 1011, is reported once, and creates no session."""
    async with Guarded() as stage:
        stage.verdict = RuntimeError("bug")
        line = await Peer(stage).dial(auth="good")
        assert (line.close_code, stage.bugs, stage.events) == (1011, ["auth_hook_failed"], [])
        assert stage.manager.get_session_counts() == {"sessions": 0, "away": 0}


@virtually
async def test_resume_checks_credential_again() -> None:
    """A resume checks the credential again: a bad one closes with 4401, and the session can still be resumed."""
    async with Guarded() as stage:
        peer = Peer(stage)
        await (await peer.dial(auth="good")).leaves()
        line = await peer.dial(auth="bad")
        assert (line.close_code, line.of("welcome")) == (4401, [])
        assert (await peer.dial(auth="good")).outcome == "full"
        assert stage.shown == ["good", "bad", "good"]
        assert stage.events == ["connect ann", "disconnect ann network_lost", "resume ann full"]


@virtually
async def test_resume_with_bad_credential_leaves_open_connection() -> None:
    """A resume with a bad credential does not close the connection that has the session."""
    async with Guarded() as stage:
        peer = Peer(stage)
        old = await peer.dial(auth="good")
        await peer.dial(auth="bad")
        assert old.close_code is None
        assert stage.socket() is old.socket


@virtually
async def test_expiring_credential_is_requested_before_expiry() -> None:
    """The client is asked when a fifth of the lifetime is left; a new credential is confirmed, and later renewed."""
    async with Guarded() as stage:
        stage.expires_in = 10.0
        line = await Peer(stage).dial(auth="good")
        await asyncio.sleep(7.9)
        assert line.of("auth") == []
        await asyncio.sleep(0.2)
        assert line.of("auth") == [{"type": "auth", "in": 2000}]
        await line.say({"type": "auth", "token": "good"})
        assert line.of("auth")[1:] == [{"type": "auth", "ok": True, "in": 10_000}]
        await asyncio.sleep(7.9)
        assert len(line.of("auth")) == 2
        await asyncio.sleep(0.2)
        assert line.of("auth")[2:] == [{"type": "auth", "in": 2000}]
        assert stage.shown == ["good", "good"]


@virtually
async def test_renewed_credential_without_expiry_ends_requests() -> None:
    """After a renewal without an expiry the client is not asked again."""
    async with Guarded() as stage:
        stage.expires_in = 10.0
        line = await Peer(stage).dial(auth="good")
        await asyncio.sleep(8.5)
        stage.expires_in = None
        await line.say({"type": "auth", "token": "good"})
        await asyncio.sleep(100)
        assert line.of("auth") == [{"type": "auth", "in": 2000}, {"type": "auth", "ok": True}]
        assert line.close_code is None


@virtually
async def test_unrenewed_credential_closes_with_4401() -> None:
    """A credential that is not renewed closes the connection with 4401, and the session can still be resumed."""
    async with Guarded() as stage:
        stage.expires_in = 10.0
        peer = Peer(stage)
        line = await peer.dial(auth="good")
        await asyncio.sleep(9.9)
        assert line.close_code is None
        await asyncio.sleep(0.2)
        assert line.close_code == 4401
        assert stage.manager.get_session_counts() == {"sessions": 1, "away": 1}
        assert (await peer.dial(auth="good")).outcome == "full"


@virtually
async def test_rejected_renewal_closes_with_4401() -> None:
    """A renewal that the hook rejects closes the connection with the code of the hook."""
    async with Guarded() as stage:
        stage.expires_in = 10.0
        line = await Peer(stage).dial(auth="good")
        await line.say({"type": "auth", "token": "bad"})
        assert line.close_code == 4401


@virtually
async def test_failing_auth_hook_on_renewal_closes_with_1011() -> None:
    """An auth hook that fails during a renewal is reported and closes with 1011."""
    async with Guarded() as stage:
        line = await Peer(stage).dial(auth="good")
        stage.verdict = RuntimeError("bug")
        await line.say({"type": "auth", "token": "good"})
        assert (line.close_code, stage.bugs) == (1011, ["auth_hook_failed"])


@virtually
async def test_renewals_are_checked_one_at_a_time() -> None:
    """While one renewal is checked, further ones of the client start no hook."""
    async with Guarded() as stage:

        @stage.manager.on_auth
        async def slowly(ws: StableSocket) -> None:
            if stage.shown[1:]:
                await stage.gate.wait()

        line = await Peer(stage).dial(auth="good")
        await line.say(*[{"type": "auth", "token": "good"}] * 5)
        assert stage.shown == ["good", "good"]
        stage.gate.set()
        await soon()
        assert len(line.of("auth")) == 1


@virtually
async def test_renewal_timer_ends_with_connection() -> None:
    """The renewal timer of a credential ends with its connection and does not affect the next one."""
    async with Guarded() as stage:
        stage.expires_in = 10.0
        peer = Peer(stage)
        await (await peer.dial(auth="good")).leaves()
        await asyncio.sleep(5)
        stage.expires_in = None
        line = await peer.dial(auth="good")
        await asyncio.sleep(30)
        assert (line.of("auth"), line.close_code) == ([], None)


@virtually
async def test_shortest_expiry_of_several_auth_hooks_applies() -> None:
    """All auth hooks have to accept, and the shortest expiry applies."""
    async with Guarded() as stage:
        stage.expires_in = 100.0

        @stage.manager.on_auth
        async def shorter(ws: StableSocket) -> float:
            return 10.0

        line = await Peer(stage).dial(auth="good")
        await asyncio.sleep(8.1)
        assert len(line.of("auth")) == 1


@virtually
async def test_credential_is_in_no_event() -> None:
    """A credential is in no event."""
    async with Guarded() as stage:
        for credential in ("good", "secret-word"):
            await Peer(stage).dial(auth=credential, subprotocols=(SUBPROTOCOL, offered("secret-word")))
        assert "secret-word" not in repr(stage.heard.all)


@virtually
async def test_newer_of_two_waiting_attempts_gets_session() -> None:
    """The newer of two pending attempts gets the session, and the older one is closed with 4409."""
    async with Guarded() as stage:
        peer = Peer(stage)
        await (await peer.dial(auth="good")).leaves()
        token = peer.token

        @stage.manager.on_auth
        async def slowly(ws: StableSocket) -> None:
            await stage.gate.wait()

        lines = []
        for _ in range(2):
            peer.token = token
            lines.append(await peer.dial(auth="good"))
        stage.gate.set()
        await soon()
        assert [line.close_code for line in lines] == [4409, None]
        assert stage.socket() is lines[1].socket
        assert stage.manager.get_session_counts() == {"sessions": 1, "away": 0}
