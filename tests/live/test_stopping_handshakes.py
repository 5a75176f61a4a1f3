"""Handshakes in progress while the server stops, or while the client disconnects, on real servers."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fastapi_ws_stabilizer.shutdown.signals import STILL_RUNNING_DELAY
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.raw import RawClient
from tests.support.server import UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]

APP = "tests.live.handshake_app:app"
CONFIG = {"drain_window": 0, "drain_timeout": 3, "disconnect_grace": 1.0, "hello_timeout": 60}
PENDING = {"hook": "/hook/hangs", "identity": "/identity", "thread": "/thread", "ignores cancellation": "/stubborn"}

pytestmark = pytest.mark.timeout(60)


async def start_handshake(server: LiveServer, path: str, **options: Any) -> asyncio.Task[Any]:
    """Start a handshake, and wait until it hangs in user code."""
    handshake = asyncio.ensure_future(connect(server.url(path), open_timeout=20, **options).__aenter__())
    await server.until_event("hangs")
    return handshake


async def rejection_of(handshake: asyncio.Task[Any]) -> tuple[int, int]:
    """Return the HTTP status of a rejected handshake, and the seconds of `Retry-After`."""
    with pytest.raises(InvalidStatus) as refused:
        await asyncio.wait_for(handshake, 10)
    response = refused.value.response
    return response.status_code, int(response.headers["retry-after"])


@pytest.mark.parametrize("source", PENDING)
@pytest.mark.parametrize("kind", UVICORN)
async def test_sigterm_answers_pending_handshake_with_503(serve: Serve, kind: str, source: str) -> None:
    """A handshake that waits for user code gets 503 with `Retry-After` at once, and the process exits in time."""
    server = serve(kind, app=APP, config=CONFIG)
    handshake = await start_handshake(server, PENDING[source])
    since = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    status, retry_after = await rejection_of(handshake)
    assert (status, retry_after >= 1) == (503, True)
    assert time.monotonic() - since < 2.5
    await asyncio.to_thread(server.process.wait, 10)
    assert time.monotonic() - since < 8
    assert not server.errors()


@pytest.mark.parametrize("source", ["hook", "identity"])
@pytest.mark.parametrize("kind", ["hypercorn", "granian"])
async def test_drain_rejects_pending_handshake_on_other_servers(serve: Serve, kind: str, source: str) -> None:
    """On other servers a drain rejects handshakes in progress too, and returns after their answers."""
    server = serve(kind, app=APP, config=CONFIG)
    handshake = await start_handshake(server, PENDING[source])
    draining = asyncio.create_task(asyncio.to_thread(server.post, "/drain"))
    status, retry_after = await rejection_of(handshake)
    assert (status, retry_after >= 1) == (503, True)
    assert (await draining)["duration_seconds"] < 2.5
    assert server.probe()["handshakes"] == 0


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_drain_closes_client_during_credential_check(serve: Serve, kind: str) -> None:
    """A client that has sent a hello to a hanging `on_auth` hook is closed with 1012 and `retry=`."""
    server = serve(kind, app=APP, config=CONFIG)
    async with connect(server.url("/hook/auth"), subprotocols=[SUBPROTOCOL]) as client:  # type: ignore[list-item]
        await client.send(json.dumps({"type": "hello", "v": 1, "n": 1}))
        await server.until_event("hangs")
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(client.recv(), 5)
        assert client.close_code == 1012
        assert (client.close_reason or "").startswith("server shutdown; retry=")
    await asyncio.to_thread(server.process.wait, 10)
    assert not server.errors()


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_second_sigterm_ends_pending_handshake(serve: Serve, kind: str) -> None:
    """A second signal during the drain ends the process, whatever a handshake waits for."""
    server = serve(kind, app=APP, config={**CONFIG, "drain_timeout": 30, "drain_window": 20})
    clients = [await connect(server.url(f"/hook/{number}")) for number in range(3)]
    handshake = await start_handshake(server, "/identity")
    server.process.send_signal(signal.SIGTERM)
    assert (await rejection_of(handshake))[0] == 503
    await asyncio.sleep(0.6)  # a signal within DUPLICATE_SIGNAL_WINDOW counts as the first one
    server.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(server.process.wait, 10)
    for client in clients:
        await client.wait_closed()
        assert client.close_code == 1012
    assert not server.errors()


@pytest.mark.parametrize("source", ["hook", "identity"])
@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("kind", UVICORN)
async def test_client_disconnect_ends_pending_handshake(serve: Serve, kind: str, how: str, source: str) -> None:
    """Code that a handshake waits for is cancelled after its client disconnects, and no error is logged."""
    server = serve(kind, app=APP, config=CONFIG)
    client = RawClient(server.port, PENDING[source])
    await server.until_event("hangs")
    if how == "reset":
        client.reset()
    else:
        client.socket.close()
    await server.until_event("cancelled")
    await until(lambda: server.probe()["handshakes"] == 0)
    server.terminate(8)
    assert not server.errors()


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "granian"])
async def test_slow_handshake_hook_is_cancelled_with_500(serve: Serve, kind: str) -> None:
    """A handshake hook that exceeds `hello_timeout` is cancelled and reported, and its client gets 500."""
    server = serve(kind, app=APP, config={**CONFIG, "hello_timeout": 1})
    handshake = await start_handshake(server, "/hook/hangs")
    with pytest.raises(InvalidStatus) as refused:
        await asyncio.wait_for(handshake, 10)
    assert refused.value.response.status_code == 500
    await server.until_event("cancelled")
    assert "a hook took longer than hello_timeout, 1.0 seconds" in server.log


@pytest.mark.parametrize("kind", [*UVICORN, "hypercorn", "granian"])
async def test_connect_during_drain_closes_with_1012(serve: Serve, kind: str) -> None:
    """`connect()` during a drain closes the client with 1012 and `retry=`, and logs no traceback."""
    server = serve(kind, app=APP, config={**CONFIG, "drain_window": 4, "drain_timeout": 20})
    clients = await asyncio.gather(*(connect(server.url(f"/adopt/{number}")) for number in range(150)))
    draining = asyncio.create_task(asyncio.to_thread(server.post, "/drain"))
    await until(lambda: "drain_started" in server.log or draining.done())
    async with connect(server.url("/adopt/late")) as late:
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(late.recv(), 5)
        assert late.close_code == 1012
        assert (late.close_reason or "").startswith("server shutdown; retry=")
    assert "Traceback" not in server.log
    await draining
    for client in clients:
        await client.close()


DRAIN_SOURCES = {
    "handler": ("/hook/ann", json.dumps({"type": "drain"})),
    "endpoint": ("/endpoint/ann", "drain"),
    "connect hook": ("/hook/drains%20in%20connect", None),
}


@pytest.mark.parametrize("source", DRAIN_SOURCES)
@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_drain_from_own_socket_does_not_wait_for_itself(serve: Serve, kind: str, source: str) -> None:
    """Socket code that drains goes on once all other connections have ended; its own is closed like them."""
    server = serve(kind, app=APP, config={**CONFIG, "drain_timeout": 20, "disconnect_grace": 10})
    other = await connect(server.url("/hook/other"))
    path, message = DRAIN_SOURCES[source]
    async with connect(server.url(path)) as client:
        since = time.monotonic()
        if message is not None:
            await client.send(message)
        await server.until_event("drained {'closed_count': 1, 'failed_count': 0")
        assert time.monotonic() - since < 4
        await client.wait_closed()
        assert client.close_code == 1012
    await other.wait_closed()
    assert other.close_code == 1012
    await until(lambda: len(server.events("disconnect ")) == 2)
    assert not server.errors()


async def test_shutdown_from_own_handler_does_not_wait_for_itself(serve: Serve) -> None:
    """`graceful_shutdown()` in a handler returns, and its own client and all others get 1012."""
    server = serve(app=APP, config={**CONFIG, "drain_timeout": 20, "disconnect_grace": 10})
    async with connect(server.url("/hook/other")) as other, connect(server.url("/hook/ann")) as client:
        await client.send(json.dumps({"type": "shut down"}))
        await until(lambda: "SHUT DOWN" in server.log)
        await client.wait_closed()
        await other.wait_closed()
        assert (client.close_code, other.close_code) == (1012, 1012)
    await until(lambda: len(server.events("disconnect ")) == 2)
    assert not server.errors()


async def test_app_that_swallows_sigterm_is_logged(serve: Serve) -> None:
    """A warning after the drain names a signal handler of the app that stops nothing."""
    server = serve(app="tests.live.swallowing_app:app", args=("--log-level", "error"))
    server.process.send_signal(signal.SIGTERM)
    await until(lambda: "SWALLOWED" in server.log)
    await until(lambda: "still_running" in server.log, STILL_RUNNING_DELAY + 3)
    assert "handler=tests.live.swallowing_app.swallow" in server.log
    assert server.process.poll() is None
