"""Tests of the answer to a handshake: its subprotocol and its headers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from starlette.testclient import TestClient

from fastapi_ws_stabilizer.auth.credentials import Credential, subprotocol
from fastapi_ws_stabilizer.dependencies import StableSocketDep
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_websocket import FakeServer, eventually, with_deadline
from tests.unit.conftest import EventRecorder

OCPP = ("ocpp2.1", "ocpp1.6")


def app_of(manager: WebSocketConnectionManager, dependency: Any, path: str = "/ws/{client_id}") -> FastAPI:
    """Return an app with an endpoint that sends the subprotocol of its socket."""
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket(path)
    async def endpoint(ws: StableSocket = Depends(dependency)) -> None:
        await ws.send(ws.subprotocol or "none")

    return app


def answer(app: FastAPI, offered: list[str] | None, path: str = "/ws/ann") -> tuple[str | None, str]:
    """Return the subprotocol of the answer, and the one that the endpoint sees."""
    with TestClient(app) as client, client.websocket_connect(path, subprotocols=offered) as ws:
        return ws.accepted_subprotocol, ws.receive_text()


def user() -> str:
    """Return an identity."""
    return "ann"


@asynccontextmanager
async def served(
    manager: WebSocketConnectionManager, spoken: tuple[str, ...] = (), offered: list[str] | None = None
) -> AsyncIterator[tuple[FakeServer, StableSocket]]:
    """Serve a connection, and yield its server and its socket."""
    server = FakeServer(subprotocols=offered or [])
    async with manager.serve(server.websocket, "ann", subprotocols=spoken) as ws:
        yield server, ws
        server.feed_disconnect(1000)
        await with_deadline(ws.wait_closed())


@pytest.mark.parametrize("identify", [None, user])
@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        (["ocpp1.6"], "ocpp1.6"),
        (["ocpp2.0.1", "ocpp1.6"], "ocpp1.6"),
        (["ocpp1.6", "ocpp2.1"], "ocpp2.1"),
        (["OCPP1.6"], None),
        (["ocpp2.0.1"], None),
        ([], None),
        (None, None),
        ([SUBPROTOCOL + "x", "ocpp1.6"], "ocpp1.6"),
    ],
)
def test_first_served_subprotocol_offered_is_selected(
    identify: Callable[[], str] | None, offered: list[str] | None, expected: str | None
) -> None:
    """The first of the server's subprotocols that the client offers is selected, and is `ws.subprotocol`."""
    manager = WebSocketConnectionManager()
    app = app_of(manager, manager.socket_for(identify, subprotocols=OCPP))
    assert answer(app, offered) == (expected, expected or "none")


def test_single_subprotocol_may_be_string() -> None:
    """A single subprotocol may be a string."""
    manager = WebSocketConnectionManager()
    assert answer(app_of(manager, manager.socket_for(subprotocols="ocpp1.6")), ["ocpp1.6"])[0] == "ocpp1.6"


def test_identity_is_optional_with_subprotocols() -> None:
    """Without an identity the client id comes from the path, as with `manager.socket`."""
    manager, app = WebSocketConnectionManager(), FastAPI()

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocket = Depends(manager.socket_for(subprotocols=OCPP))) -> None:
        await ws.send(ws.client_id)

    assert answer(app, ["ocpp1.6"], "/ws/bob") == ("ocpp1.6", "bob")


@pytest.mark.parametrize("options", [{"key": str}, {"expires_at": lambda _: None}])
def test_identity_options_without_identity_raise(options: dict[str, Any]) -> None:
    """`key` and `expires_at` raise without an identity, because they read its result."""
    with pytest.raises(TypeError, match="needs a dependency that identifies the client"):
        WebSocketConnectionManager().socket_for(**options)


@pytest.mark.parametrize("wrong", ["", "two words", "a,b", "caf\xe9", "stabilizer.v1.json", "stabilizer.auth.x"])
def test_invalid_subprotocol_name_raises(wrong: str) -> None:
    """A name that RFC 6455 does not allow, or that the library reserves, raises at once."""
    manager = WebSocketConnectionManager()
    for make in (
        lambda: manager.socket_for(subprotocols=(wrong,)),
        lambda: manager.serve(FakeServer().websocket, subprotocols=[wrong]),
    ):
        with pytest.raises(ValueError, match="subprotocol"):
            make()


def test_stabilizer_subprotocol_precedes_app_subprotocols() -> None:
    """`stabilizer.v1.json` takes precedence over the application's subprotocols."""
    manager = WebSocketConnectionManager()
    app = app_of(manager, manager.socket_for(subprotocols=OCPP))
    with TestClient(app) as client, client.websocket_connect("/ws/ann", subprotocols=["ocpp1.6", SUBPROTOCOL]) as ws:
        assert ws.accepted_subprotocol == SUBPROTOCOL
        ws.send_json({"type": "hello", "v": 1, "n": 1})
        assert ws.receive_json()["type"] == "welcome"
        assert ws.receive_json()["data"] == SUBPROTOCOL


def test_app_subprotocol_precedes_credential_marker() -> None:
    """A client that sends its token as a subprotocol gets the application's subprotocol instead of the marker."""
    manager = WebSocketConnectionManager()
    login = Credential(subprotocol("bearer"))

    async def identity(token: str = Depends(login)) -> str:
        return token

    app = app_of(manager, manager.socket_for(identity, subprotocols=OCPP))
    assert answer(app, ["bearer", "secret", "ocpp1.6"]) == ("ocpp1.6", "ocpp1.6")
    assert answer(app, ["bearer", "secret"]) == ("bearer", "bearer")


def test_rejected_browser_gets_selected_subprotocol() -> None:
    """A rejected page that offers subprotocols gets the selected one, so that it can read the close code."""
    manager = WebSocketConnectionManager()

    async def refuse() -> str:
        raise HTTPException(401)

    app = app_of(manager, manager.socket_for(refuse, subprotocols=OCPP))
    with TestClient(app, headers={"origin": "http://testserver"}) as client:
        with client.websocket_connect("/ws/ann", subprotocols=["ocpp1.6"]) as ws:
            assert ws.accepted_subprotocol == "ocpp1.6"
            assert ws.receive()["code"] == 4401


async def test_subprotocol_is_readable_in_hooks() -> None:
    """Connect and disconnect hooks see the subprotocol, but before accept it is None."""
    manager = WebSocketConnectionManager()
    seen: list[str | None] = []
    manager.on_handshake(lambda ws: seen.append(ws.subprotocol))
    manager.on_connect(lambda ws: seen.append(ws.subprotocol))
    manager.on_disconnect(lambda ws: seen.append(ws.subprotocol))
    async with served(manager, OCPP, ["ocpp1.6"]):
        pass
    await eventually(lambda: len(seen) == 3)
    assert seen == [None, "ocpp1.6", "ocpp1.6"]


# ── offered, but not answered ──


def heard_by(manager: WebSocketConnectionManager) -> EventRecorder:
    """Return the recorded events of a manager."""
    heard = EventRecorder()
    manager.events.subscribe(heard)
    return heard


def test_unanswered_subprotocols_are_reported_once_per_route() -> None:
    """A route that answers none of the offered subprotocols is reported once, without their names."""
    manager = WebSocketConnectionManager()
    heard = heard_by(manager)
    app = app_of(manager, manager.socket)
    router = APIRouter(prefix="/v2")

    @router.websocket("/{client_id}")
    async def other(ws: StableSocket = Depends(manager.socket_for(subprotocols="chat.v2"))) -> None:
        """Serve another subprotocol."""

    app.include_router(router)
    with TestClient(app) as client:
        for path in ("/ws/ann", "/ws/bob", "/v2/ann", "/v2/bob"):
            with client.websocket_connect(path, subprotocols=["secret", "ocpp1.6"]):
                pass
        for offered in (None, [], [SUBPROTOCOL]):
            with client.websocket_connect("/ws/ann", subprotocols=offered) as ws:
                if offered:
                    ws.send_json({"type": "hello", "v": 1, "n": 1})
    first, second = heard.of("subprotocol_unanswered")
    assert first.level == logging.WARNING
    assert first.fields["route"] == "/ws/{client_id}"
    assert (first.fields["offered"], first.fields["served"]) == (2, "none")
    assert second.fields["route"].endswith("/{client_id}")
    assert second.fields["served"] == "chat.v2"
    assert "socket_for(subprotocols=" in first.fields["advice"]
    assert "secret" not in repr([event.fields for event in heard.all])


async def test_subprotocol_accepted_by_hook_is_not_reported() -> None:
    """A subprotocol that a handshake hook accepts itself is not reported."""
    manager = WebSocketConnectionManager()
    heard = heard_by(manager)

    @manager.on_handshake
    async def choose(ws: StableSocket) -> None:
        await ws.websocket.accept("ocpp1.6")

    async with served(manager, (), ["ocpp2.1", "ocpp1.6"]) as (server, ws):
        assert server.taken[0]["subprotocol"] == "ocpp1.6"
        assert ws.subprotocol is None
    assert heard.of("subprotocol_unanswered") == []


# ── headers ──


async def test_accept_headers_of_handshake_hook_are_sent() -> None:
    """Headers that `on_handshake` sets in `ws.accept_headers` are in the answer to the handshake."""
    manager = WebSocketConnectionManager()

    @manager.on_handshake
    def cookies(ws: StableSocket) -> None:
        ws.accept_headers.append("Set-Cookie", "a=1; HttpOnly")
        ws.accept_headers.append("Set-Cookie", "b=2")
        ws.accept_headers["X-Node"] = "n1"

    async with served(manager) as (server, ws):
        assert server.taken[0]["type"] == "websocket.accept"
        assert server.taken[0]["headers"] == [
            (b"set-cookie", b"a=1; HttpOnly"),
            (b"set-cookie", b"b=2"),
            (b"x-node", b"n1"),
        ]
        with pytest.raises(RuntimeError, match="on_handshake"):
            _ = ws.accept_headers


async def test_accept_without_headers_sends_none() -> None:
    """Without `ws.accept_headers` the answer has no headers."""
    async with served(WebSocketConnectionManager()) as (server, _):
        assert server.taken[0] == {"type": "websocket.accept", "subprotocol": None, "headers": []}


@pytest.mark.parametrize(("name", "value"), [("X-A", "1\r\nX-B: 2"), ("X\nA", "1"), ("X-A", "1\x00")])
async def test_accept_header_with_line_break_fails_handshake(name: str, value: str) -> None:
    """A line break in a header fails the handshake and is reported; the header is never sent."""
    manager = WebSocketConnectionManager()
    heard = heard_by(manager)
    manager.on_handshake(lambda ws: ws.accept_headers.append(name, value))
    server = FakeServer()
    with pytest.raises(Exception, match=r"line break|500"):
        async with manager.serve(server.websocket, "ann"):
            pass
    await asyncio.sleep(0)
    assert not [one for one in server.taken if one["type"] == "websocket.accept"]
    assert heard.of("handshake_hook_failed")


def test_socket_of_plain_dependency_has_subprotocol() -> None:
    """A socket of `StableSocketDep` has a readable subprotocol."""
    manager, app = WebSocketConnectionManager(), FastAPI()
    manager.install(app)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        await ws.send(repr(ws.subprotocol))

    assert answer(app, ["chat"]) == (None, "None")
