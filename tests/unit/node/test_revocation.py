"""Tests of revocation and of identities that expire during the handshake."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.errors import InvalidTokenError
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Line, Peer, Stage


def hold_handshakes(stage: Stage) -> None:
    """Hold each handshake until the gate of the stage opens."""

    @stage.manager.on_handshake
    async def wait(ws: StableSocket) -> None:
        await stage.gate.wait()


@virtually
async def test_revoke_closes_connections_and_sessions_with_4410() -> None:
    """`revoke()` closes plain and v1 connections and ends detached sessions; other clients stay connected."""
    async with Stage(on_duplicate="allow") as stage:
        detached, connected = Peer(stage), Peer(stage)
        await (await detached.dial()).leaves()
        numbered, plain, other = await connected.dial(), stage.plain(), stage.plain("bob")
        await soon()
        assert await stage.manager.revoke("ann") == 3
        await soon()
        assert [line.close_code for line in (numbered, plain, other)] == [4410, 4410, None]
        assert stage.manager.get_session_counts() == {"sessions": 0, "away": 0}
        assert stage.events.count("session_end ann application") == 3
        # A network that is already dead loses the close frame, so that both clients may try again.
        assert [(await peer.dial()).close_code for peer in (detached, connected)] == [4410, 4410]


@virtually
async def test_revoke_invalidates_only_earlier_tokens_and_tickets() -> None:
    """Earlier tokens and tickets are rejected; later ones, and those of another client, are valid."""
    async with Stage() as stage:
        manager = stage.manager
        token, ticket, bobs = (
            manager.generate_reconnect_token("ann"),
            manager.issue_ticket("ann"),
            manager.issue_ticket("bob"),
        )
        await manager.revoke("ann")
        with pytest.raises(InvalidTokenError, match="revoked"):
            await manager.validate_reconnect_token(token)
        for one, client_id in ((manager.issue_ticket("ann"), "ann"), (bobs, "bob")):
            assert manager._tickets.consume(one).client_id == client_id
        with pytest.raises(InvalidTokenError, match="revoked"):
            manager._tickets.consume(ticket)
        assert await manager.validate_reconnect_token(manager.generate_reconnect_token("ann")) == "ann"


@pytest.mark.parametrize("client_id", ["", None, 7])
@virtually
async def test_revoke_with_invalid_client_id_raises(client_id: Any) -> None:
    """An id that is not a non-empty string raises, because it would revoke nothing without an error."""
    async with Stage() as stage:
        with pytest.raises(ValueError, match="client_id must be a non-empty str"):
            await stage.manager.revoke(client_id)


@pytest.mark.parametrize("subprotocols", [(), (SUBPROTOCOL,)], ids=["plain", "v1"])
@virtually
async def test_revoke_during_handshake_closes_with_4410(subprotocols: tuple[str, ...]) -> None:
    """A client that is revoked during its handshake is closed with 4410, and none of its state remains."""
    async with Stage() as stage:
        hold_handshakes(stage)
        line = Line(stage, subprotocols=subprotocols)
        await line.say({"type": "hello", "v": 1, "n": 1})
        assert await stage.manager.revoke("ann") == 0
        stage.gate.set()
        await soon()
        assert line.close_code == 4410
        assert stage.events == []
        assert stage.manager.get_connection_count() == 0
        assert stage.manager.get_session_counts() == {"sessions": 0, "away": 0}
        later = Line(stage, subprotocols=subprotocols)
        await later.say({"type": "hello", "v": 1, "n": 2})
        assert later.close_code is None
        assert stage.events == ["connect ann"]


@virtually
async def test_admission_forgets_finished_handshakes() -> None:
    """Accepted, failed and cancelled handshakes leave the set of pending handshakes."""
    async with Stage() as stage:
        peer = Peer(stage)
        lines = [stage.plain(), await peer.dial()]
        await soon()
        assert stage.manager._node.admission._handshakes == set()
        hold_handshakes(stage)
        lines.append(stage.plain("bob"))
        await soon()
        assert len(stage.manager._node.admission._handshakes) == 1
        lines[-1].task.cancel()
        await asyncio.wait([lines.pop().task])
        stage.lines.pop()
        assert stage.manager._node.admission._handshakes == set()


class Expiring(Line):
    """Connection with an identity that expires after 2 s."""

    async def _serve(self) -> None:
        serve = self._stage.manager.serve
        try:
            async with serve(self.server.websocket, expires_in=2.0) as self.socket:
                await self._stage.endpoint(self.socket)
        except Exception as error:
            self.error = error


@pytest.mark.parametrize("late", [0.0, 1.5, 5.0])
@pytest.mark.parametrize("subprotocols", [(), (SUBPROTOCOL,)], ids=["plain", "v1"])
@virtually
async def test_identity_expiry_includes_handshake_time(subprotocols: tuple[str, ...], late: float) -> None:
    """Identity expiry includes the time that a hook or the client's hello takes."""
    async with Stage() as stage:
        hold_handshakes(stage)
        line = Expiring(stage, subprotocols=subprotocols)
        await asyncio.sleep(late)
        stage.gate.set()
        await line.say({"type": "hello", "v": 1, "n": 1})
        await asyncio.sleep(max(0.0, 1.9 - late))
        assert line.close_code == (None if late < 2 else 4401)
        await asyncio.sleep(0.2)
        assert line.close_code == 4401


@virtually
async def test_connect_with_token_revoked_after_validation_raises() -> None:
    """`connect` raises if `revoke` is called after `validate_reconnect_token`."""
    async with Stage() as stage:
        manager, server = stage.manager, FakeServer()
        await manager.validate_reconnect_token(manager.generate_reconnect_token("ann"))
        await manager.revoke("ann")
        with pytest.raises(InvalidTokenError, match="revoked"):
            await manager.connect("ann", await server.accepted())
        assert manager.get_connection_count() == 0


@virtually
async def test_renewal_without_credential_is_not_checked() -> None:
    """An `on_auth` hook that accepted a missing credential is not called for a renewal without one."""
    async with Stage() as stage:
        asked: list[str | None] = []

        @stage.manager.on_auth
        async def look(ws: StableSocket, credential: str | None) -> None:
            asked.append(credential)

        line = await Peer(stage).dial()
        await line.say({"type": "auth"})
        await soon()
        assert asked == [None]
        assert line.frames[-1]["code"] == "auth_refused"
