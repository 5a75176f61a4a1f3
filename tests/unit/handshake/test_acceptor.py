"""Tests of the order of a handshake: what the hooks decide before a connection is built."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import HTTPException

from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.inbox import Inbox
from fastapi_ws_stabilizer.connection.outbox import Outbox
from fastapi_ws_stabilizer.errors import NotOpenError
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Line, Peer, Stage


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the classes whose objects are built for connections."""
    built: list[str] = []
    for kind in (Connection, Inbox, Outbox):
        real = kind.__init__

        def init(
            self: Any, *args: Any, real: Callable[..., None] = real, name: str = kind.__name__, **options: Any
        ) -> None:
            built.append(name)
            real(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", init)
    return built


@pytest.mark.parametrize("reject", [True, False], ids=["rejected", "accepted"])
def test_rejected_handshake_builds_no_connection(built: list[str], reject: bool) -> None:
    """A handshake that a hook rejects builds no connection, no inbox and no outbox."""

    @virtually
    async def play() -> None:
        async with Stage() as stage:

            @stage.manager.on_handshake
            async def check(ws: StableSocket) -> None:
                if reject:
                    raise HTTPException(403)

            stage.plain()
            await soon()
            assert sorted(built) == ([] if reject else ["Connection", "Inbox", "Outbox"])

    play()


def test_rejected_credential_builds_no_connection(built: list[str]) -> None:
    """A hello with a credential that a hook rejects builds no connection."""

    @virtually
    async def play() -> None:
        async with Stage() as stage:

            @stage.manager.on_auth
            async def check(ws: StableSocket, credential: str | None) -> None:
                raise HTTPException(401)

            line = await Peer(stage).dial(auth="wrong")
            assert line.close_code == 4401
            assert built == []

    play()


async def connect(stage: Stage, kind: str) -> Line:
    """Connect a client of the given kind."""
    if kind == "v1":
        return await Peer(stage).dial()
    line = stage.plain()
    await soon()
    return line


@pytest.mark.parametrize("kind", ["plain", "v1"])
@virtually
async def test_hook_socket_becomes_connection_socket(kind: str) -> None:
    """The socket of the handshake and auth hooks is the one of the endpoint, with the same ids."""
    async with Stage() as stage:
        seen: list[tuple[StableSocket, str]] = []

        @stage.manager.on_handshake
        async def shake(ws: StableSocket) -> None:
            seen.append((ws, ws.connection_id))

        @stage.manager.on_auth
        async def check(ws: StableSocket, credential: str | None) -> None:
            seen.append((ws, ws.connection_id))

        line = await connect(stage, kind)
        assert line.socket is not None
        assert seen == [(line.socket, line.socket.connection_id)] * (2 if kind == "v1" else 1)
        assert stage.manager.get_sockets("ann") == [line.socket]
        await seen[0][0].send("hi")
        await soon()
        assert [one for one in line.server.data if "hi" in one]


@virtually
async def test_task_before_accept_is_closed_and_rejected() -> None:
    """A coroutine that a handshake hook wants to run as a task is closed, so that Python does not warn about it."""
    async with Stage() as stage:
        work = asyncio.sleep(0)

        @stage.manager.on_handshake
        async def shake(ws: StableSocket) -> None:
            with pytest.raises(NotOpenError):
                ws.create_task(work)

        stage.plain()
        await soon()
        assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


@virtually
async def test_socket_before_accept_shows_facts_of_new_connection() -> None:
    """Before the accept, a socket shows the client and the handshake, and empty queues."""
    async with Stage() as stage:
        seen: dict[str, Any] = {}

        @stage.manager.on_handshake
        async def shake(ws: StableSocket) -> None:
            seen["client"] = ws.client_id, ws.headers["host"], ws.address, ws.session_id, ws.resumed, repr(ws)
            seen["state"] = ws.closed, ws.close_info, ws.reason, ws.rtt, ws.rooms, await ws.leave("lobby")
            seen["queues"] = ws.queued_messages, ws.queued_bytes, ws.unread_messages, ws.unread_bytes
            seen["ages"] = ws.connected_seconds, ws.silent_seconds, ws.dropped_messages, ws.held_bytes

        line = stage.plain()
        await soon()
        assert line.socket is not None
        client = f"<StableSocket client_id='ann' connection_id={line.socket.connection_id} open>"
        assert seen["client"] == ("ann", "testserver", "10.0.0.7", None, ResumeOutcome.NONE, client)
        assert seen["state"] == (False, None, None, None, (), False)
        assert seen["queues"] == (0, 0, 0, 0)
        assert seen["ages"] == (0, 0, 0, 0)


async def called(function: Callable[[], Any]) -> Any:
    """Return the result of a function."""
    return function()


ACTIONS: dict[str, Callable[[StableSocket], Awaitable[Any]]] = {
    "send": lambda ws: ws.send("early"),
    "send with ack": lambda ws: ws.send("early", ack=True),
    "send_text": lambda ws: ws.send_text("early"),
    "request": lambda ws: ws.request("early"),
    "receive": lambda ws: ws.receive(),
    "receive_json": lambda ws: ws.receive_json(),
    "async for": lambda ws: ws.__anext__(),  # type: ignore[dict-item, return-value]
    "join": lambda ws: ws.join("lobby"),
    "run": lambda ws: ws.run(),
    "close": lambda ws: ws.close(),
    "ignore_messages": lambda ws: called(ws.ignore_messages),
    "reconnect_token": lambda ws: called(ws.reconnect_token),
}


@pytest.mark.parametrize("name", ACTIONS)
async def test_action_before_accept_raises_not_open(manager_with: Any, name: str) -> None:
    """Before the accept, every action of a socket raises `NotOpenError`, and the handshake goes on."""
    manager, _ = manager_with()
    raised: list[str] = []

    @manager.on_handshake
    async def shake(ws: StableSocket) -> None:
        with pytest.raises(NotOpenError, match="not accepted yet") as error:
            await ACTIONS[name](ws)
        raised.append(type(error.value).__name__)

    server = FakeServer()
    async with manager.serve(server.websocket, "ann"):
        assert raised == ["NotOpenError"]


async def test_loop_that_ignores_not_open_lets_others_run(manager_with: Any) -> None:
    """A hook that sends in a loop and catches all errors yields to the event loop each time."""
    manager, _ = manager_with()
    turns: list[int] = []

    @manager.on_handshake
    async def shake(ws: StableSocket) -> None:
        counting = asyncio.ensure_future(count())
        for _ in range(100):
            with contextlib.suppress(NotOpenError):
                await ws.send("early")
        counting.cancel()

    async def count() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    server = FakeServer()
    async with manager.serve(server.websocket, "ann"):
        assert len(turns) >= 99


@pytest.mark.parametrize("reject", [False, True])
@virtually
async def test_wait_closed_before_accept_waits_for_connection(reject: bool) -> None:
    """A wait for the close that a hook starts ends with the connection, or with an error if there is none."""
    async with Stage() as stage:
        waiting: list[asyncio.Future[Any]] = []

        @stage.manager.on_handshake
        async def shake(ws: StableSocket) -> None:
            waiting.append(asyncio.ensure_future(ws.wait_closed()))
            await asyncio.sleep(0)
            if reject:
                raise HTTPException(403)

        line = stage.plain()
        await soon()
        assert waiting[0].done() == reject
        if reject:
            assert isinstance(waiting[0].exception(), NotOpenError)
            return
        assert line.socket is not None
        await line.leaves()
        assert waiting[0].result() == line.socket.close_info
