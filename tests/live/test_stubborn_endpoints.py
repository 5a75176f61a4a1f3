"""An endpoint that goes on when its client has left costs itself, and neither the process nor its shutdown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.live.stubborn_app import SOCKET, WEBSOCKET
from tests.support.raw import RawClient
from tests.support.server import LiveServer, until

APP = "tests.live.stubborn_app:app"
KINDS = ("uvicorn-sansio", "uvicorn-wsproto", "uvicorn-stable")

Serve = Callable[..., LiveServer]

DEADLINE = 8.0
"""Seconds. `disconnect_grace` is half a second in these tests, but where it is said."""


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """One server of each kind for all loops."""
    with LiveServer(request.param, app=APP) as server:
        yield server


async def visit(server: LiveServer, path: str, *messages: str, subprotocol: str | None = None) -> None:
    """Connect, send something, and leave."""
    offered = [subprotocol] if subprotocol else None
    async with connect(server.url(path), subprotocols=offered) as ws:
        if subprotocol:
            await ws.send(json.dumps({"type": "hello", "v": 1, "n": 1, "client": "x"}))
            await ws.recv()
        with suppress(ConnectionClosed):  # some endpoints close at once
            for message in messages:
                await ws.send(message)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("way", SOCKET)
async def test_catch_all_loop_is_cancelled_after_grace(server: LiveServer, way: str) -> None:
    """A loop that catches every error of a socket is cancelled after `disconnect_grace`, and others are served."""
    before = server.events().count("ended")
    subprotocol = SUBPROTOCOL if way in ("request", "send_ack") else None
    await visit(server, f"/socket/{way}", "x", subprotocol=subprotocol)
    await until(lambda: server.events().count("ended") == before + 1, DEADLINE)


@pytest.mark.parametrize("way", WEBSOCKET)
async def test_catch_all_websocket_loop_is_cancelled_after_grace(server: LiveServer, way: str) -> None:
    """A loop that catches every error of Starlette's WebSocket is cancelled after `disconnect_grace`."""
    before = server.events().count("ended")
    await visit(server, f"/hand/{way}")
    await until(lambda: server.events().count("ended") == before + 1, DEADLINE)


async def test_second_reader_catching_all_yields_to_event_loop(server: LiveServer) -> None:
    """A loop that catches the error of a second reader does not hold the event loop, while the client is there."""
    before = server.events().count("ended")
    async with connect(server.url("/two-readers")) as ws:
        await asyncio.sleep(0.2)
        await ws.send("x")
        server.probe()
    await until(lambda: server.events().count("ended") == before + 1, DEADLINE)


async def test_endpoint_ignoring_close_is_logged_once_by_name(serve: Serve) -> None:
    """The log names the endpoint that goes on after the end of its connection, once."""
    server = serve(KINDS[0], app=APP)
    for _ in range(2):
        await visit(server, "/socket/receive")
    await until(lambda: server.events().count("ended") == 2, 5)
    lines = [line for line in server.log.splitlines() if "end_ignored" in line]
    assert len(lines) == 1
    assert "WARNING" in lines[0]
    assert "tests.live.stubborn_app.stubborn" in lines[0]


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
@pytest.mark.parametrize("way", ["receive", "send", "iter", "sleep"])
async def test_suppressed_cancellation_does_not_block_shutdown(serve: Serve, kind: str, way: str) -> None:
    """An endpoint that swallows its cancellation is named in the log, and neither others nor SIGTERM wait for it."""
    server = serve(kind, app=APP, config={"disconnect_grace": 0.3})
    await visit(server, f"/swallows/{way}")
    await until(lambda: server.probe()["unfinished"] == 0, 5)
    assert "disconnect client_close" in server.events()
    await until(lambda: "endpoint_does_not_end endpoint=tests.live.stubborn_app.swallows" in server.log)
    assert server.terminate(8) < 5


async def test_suppressed_cancellation_on_open_socket_exits_in_time(serve: Serve) -> None:
    """An endpoint whose client is there, and that swallows its cancellation, ends with the process at SIGTERM."""
    server = serve("uvicorn-sansio", app=APP, config={"disconnect_grace": 0.3, "drain_window": 0})
    async with connect(server.url("/swallows/receive")):
        await asyncio.to_thread(server.terminate, 8)


# ── client_state ──


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_client_state_ends_loop_that_does_not_read(serve: Serve, kind: str) -> None:
    """A loop over `websocket.client_state` ends when the client has left, and does not wait for `disconnect_grace`."""
    server = serve(kind, app=APP, config={"disconnect_grace": 60})
    await visit(server, "/state/sleep")
    await until(lambda: "loop over" in server.events(), DEADLINE)
    await until(lambda: "state DISCONNECTED" in server.events(), DEADLINE)


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_client_state_allows_reading_unread_messages(serve: Serve, kind: str) -> None:
    """Messages that came in before the end are read by a loop over `client_state`."""
    server = serve(kind, app=APP, config={"disconnect_grace": 60})
    with RawClient(server.port, "/state/read") as client:
        client.handshake()
        for number in range(50):
            client.send(1, b"%d" % number)
        client.send(8, b"\x03\xe8")
        await until(lambda: "loop over" in server.events(), DEADLINE)
    assert server.events("read") == [f"read {number}" for number in range(50)]
    assert "raised WebSocketDisconnect" in server.events()


# ── tasks of the application ──


@pytest.mark.parametrize("way", ["hand", "socket"])
async def test_forgotten_reader_and_writer_tasks_log_nothing(server: LiveServer, way: str) -> None:
    """`asyncio.wait` over a reader and a writer task leaves no traceback when the client leaves."""
    before = server.events().count("returned")
    for _ in range(3):
        await visit(server, f"/wait/{way}")
    await until(lambda: server.events().count("returned") == before + 3, DEADLINE)
    server.probe()
    assert "never retrieved" not in server.log


async def test_forgotten_task_bug_is_still_logged(serve: Serve) -> None:
    """Another exception of a task that was told of the end is logged by asyncio as ever."""
    server = serve(KINDS[0], app=APP)
    await visit(server, "/forgotten-bug")
    await until(lambda: "ZeroDivisionError" in server.log, 3)
