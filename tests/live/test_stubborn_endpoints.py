"""Endpoints that go on after their client disconnected, and delay neither the process nor its shutdown."""

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
"""Seconds. `disconnect_grace` is 0.5 s in these tests unless a test sets another."""


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """One server of each kind for all loops."""
    with LiveServer(request.param, app=APP) as server:
        yield server


async def connect_briefly(server: LiveServer, path: str, *messages: str, subprotocol: str | None = None) -> None:
    """Connect, send messages, and disconnect."""
    offered = [subprotocol] if subprotocol else None
    async with connect(server.url(path), subprotocols=offered) as ws:
        if subprotocol:
            await ws.send(json.dumps({"type": "hello", "v": 1, "n": 1, "client": "x"}))
            await ws.recv()
        with suppress(ConnectionClosed):  # some endpoints close at once
            for message in messages:
                await ws.send(message)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("call", SOCKET)
async def test_catch_all_loop_is_cancelled_after_grace(server: LiveServer, call: str) -> None:
    """A loop that catches every error of a socket is cancelled after `disconnect_grace`, and others are served."""
    before = server.events().count("ended")
    subprotocol = SUBPROTOCOL if call in ("request", "send_ack") else None
    await connect_briefly(server, f"/socket/{call}", "x", subprotocol=subprotocol)
    await until(lambda: server.events().count("ended") == before + 1, DEADLINE)


@pytest.mark.parametrize("call", WEBSOCKET)
async def test_catch_all_websocket_loop_is_cancelled_after_grace(server: LiveServer, call: str) -> None:
    """A loop that catches every error of Starlette's WebSocket is cancelled after `disconnect_grace`."""
    before = server.events().count("ended")
    await connect_briefly(server, f"/adopt/{call}")
    await until(lambda: server.events().count("ended") == before + 1, DEADLINE)


async def test_second_reader_catching_all_yields_to_event_loop(server: LiveServer) -> None:
    """A loop that catches the error of a second reader does not block the event loop while the client is connected."""
    before = server.events().count("ended")
    async with connect(server.url("/two-readers")) as ws:
        await asyncio.sleep(0.2)
        await ws.send("x")
        server.probe()
    await until(lambda: server.events().count("ended") == before + 1, DEADLINE)


async def test_endpoint_ignoring_close_is_logged_once_by_name(serve: Serve) -> None:
    """The log names an endpoint that goes on after the end of its connection, once."""
    server = serve(KINDS[0], app=APP)
    for _ in range(2):
        await connect_briefly(server, "/socket/receive")
    await until(lambda: server.events().count("ended") == 2, 5)
    lines = [line for line in server.log.splitlines() if "end_ignored" in line]
    assert len(lines) == 1
    assert "WARNING" in lines[0]
    assert "tests.live.stubborn_app.stubborn" in lines[0]


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
@pytest.mark.parametrize("call", ["receive", "send", "iter", "sleep"])
async def test_suppressed_cancellation_does_not_block_shutdown(serve: Serve, kind: str, call: str) -> None:
    """The log names an endpoint that suppresses its cancellation; other connections and SIGTERM do not wait for it."""
    server = serve(kind, app=APP, config={"disconnect_grace": 0.3})
    await connect_briefly(server, f"/swallows/{call}")
    await until(lambda: server.probe()["unfinished"] == 0, 5)
    assert "disconnect client_close" in server.events()
    await until(lambda: "endpoint_does_not_end endpoint=tests.live.stubborn_app.swallows" in server.log)
    assert server.terminate(8) < 5


async def test_suppressed_cancellation_on_open_socket_exits_in_time(serve: Serve) -> None:
    """An endpoint with an open socket that suppresses its cancellation ends with the process at SIGTERM."""
    server = serve("uvicorn-sansio", app=APP, config={"disconnect_grace": 0.3, "drain_window": 0})
    async with connect(server.url("/swallows/receive")):
        await asyncio.to_thread(server.terminate, 8)


# ── client_state ──


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_client_state_ends_loop_that_does_not_read(serve: Serve, kind: str) -> None:
    """A loop over `websocket.client_state` ends at the disconnect, without waiting for `disconnect_grace`."""
    server = serve(kind, app=APP, config={"disconnect_grace": 60})
    await connect_briefly(server, "/state/sleep")
    await until(lambda: "loop ended" in server.events(), DEADLINE)
    await until(lambda: "state DISCONNECTED" in server.events(), DEADLINE)


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_client_state_allows_reading_unread_messages(serve: Serve, kind: str) -> None:
    """A loop over `client_state` reads the messages that arrived before the end."""
    server = serve(kind, app=APP, config={"disconnect_grace": 60})
    with RawClient(server.port, "/state/read") as client:
        client.handshake()
        for number in range(50):
            client.send(1, b"%d" % number)
        client.send(8, b"\x03\xe8")
        await until(lambda: "loop ended" in server.events(), DEADLINE)
    assert server.events("read") == [f"read {number}" for number in range(50)]
    assert "raised WebSocketDisconnect" in server.events()


# ── tasks of the application ──


@pytest.mark.parametrize("call", ["adopt", "socket"])
async def test_forgotten_reader_and_writer_tasks_log_nothing(server: LiveServer, call: str) -> None:
    """`asyncio.wait` over a reader and a writer task leaves no traceback when the client disconnects."""
    before = server.events().count("returned")
    for _ in range(3):
        await connect_briefly(server, f"/wait/{call}")
    await until(lambda: server.events().count("returned") == before + 3, DEADLINE)
    server.probe()
    assert "never retrieved" not in server.log


async def test_forgotten_task_bug_is_still_logged(serve: Serve) -> None:
    """asyncio still logs another exception of a task that got the disconnect as an exception."""
    server = serve(KINDS[0], app=APP)
    await connect_briefly(server, "/forgotten-bug")
    await until(lambda: "ZeroDivisionError" in server.log, 3)
