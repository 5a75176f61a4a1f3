"""Servers stop in time, whatever their sockets do."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.support.plain_client import received_close
from tests.support.raw import RawClient
from tests.support.server import ROOT, UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]


@pytest.mark.parametrize("kind", UVICORN)
async def test_sigterm_with_open_sockets_exits_in_time(serve: Serve, kind: str) -> None:
    """SIGTERM ends the process within disconnect_grace + 2 s, and clean-ups run before the end of the lifespan."""
    grace = 1.0
    server = serve(kind, config={"disconnect_grace": grace, "send_timeout": 30})
    with RawClient(server.port, "/flood/stalled", receive_buffer=4096) as stalled:
        stalled.handshake()
        await stop_with_sigterm(server, grace)


async def stop_with_sigterm(server: LiveServer, grace: float) -> None:
    async with connect(server.url("/idle/idle")) as idle, connect(server.url("/push/push")) as push:
        await push.recv()
        await until(lambda: server.probe()["connections"] == 3)
        await asyncio.sleep(0.5)  # the flood fills the buffers and stalls
        took = await asyncio.to_thread(server.terminate, grace + 2)
        assert (await received_close(push))[0] == 1012
        with pytest.raises(ConnectionClosed):
            await idle.recv()
    assert took < grace + 2
    log = server.log
    assert "server_shutdown 1012" in log
    assert log.index("NOTE released idle") < log.index("LIFESPAN ended")
    assert server.process.returncode in (0, -15)
    assert not server.errors()


@pytest.mark.parametrize("kind", UVICORN)
async def test_sigterm_with_full_inbox_exits_in_time(serve: Serve, kind: str) -> None:
    """A socket with paused reading ends at SIGTERM too."""
    server = serve(kind, config={"disconnect_grace": 0.5, "inbox_max_messages": 4, "heartbeat_type": "off"})
    with RawClient(server.port, "/idle/ann") as client:
        client.handshake()
        for _ in range(100):
            client.send(1, b"x")
        await until(lambda: "reading_paused" in server.log)
        assert await asyncio.to_thread(server.terminate, 2.5) < 2.5
    assert "NOTE released ann" in server.log
    assert not server.errors()


async def test_reload_with_open_socket_starts_new_worker(serve: Serve, tmp_path: Path) -> None:
    """With --reload a changed file starts a new worker within 5 s while a client holds its socket open."""
    package = tmp_path / "reloaded"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copy(ROOT / "tests/live/app.py", package / "main.py")
    server = serve(
        app="reloaded.main:app",
        cwd=tmp_path,
        config={"disconnect_grace": 0.5},
        args=("--reload", "--reload-dir", str(package)),
        env={"PYTHONPATH": str(ROOT)},
    )
    async with connect(server.url("/idle/ann")) as client:
        await until(lambda: server.probe()["connections"] == 1)
        changed_at = time.monotonic()
        (package / "main.py").write_text((package / "main.py").read_text() + "\n# changed\n")
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(client.recv(), 5)

        def answered() -> bool:
            try:
                return bool(server.probe()["connections"] == 0)
            except OSError:
                return False

        await until(answered, 5)
        assert time.monotonic() - changed_at < 5


async def test_graceful_shutdown_call_closes_all_and_reports(serve: Serve) -> None:
    """graceful_shutdown on a running server closes with 1012, waits for hooks, and returns correct counts."""
    server = serve(app="tests.live.shutdown_app:app")
    async with connect(server.url("/ws/ann")) as ann, connect(server.url("/ws/bob")) as bob:
        report = await asyncio.to_thread(server.post, "/shutdown?timeout=5")
        assert (report["closed_count"], report["failed_count"]) == (2, 0)
        assert report["disconnects"] == ["ann server_shutdown", "bob server_shutdown"]
        for client in (ann, bob):
            assert (await received_close(client, discard=False))[0] == 1012
    with pytest.raises(Exception, match="503"):
        async with connect(server.url("/ws/late")):
            pass


async def test_graceful_shutdown_respects_timeout(serve: Serve) -> None:
    """A hook that hangs delays graceful_shutdown by its timeout at most, and counts as failed."""
    server = serve(app="tests.live.shutdown_app:app")
    async with connect(server.url("/ws/hangs")):
        started = time.monotonic()
        report = await asyncio.to_thread(server.post, "/shutdown?timeout=0.5")
        assert time.monotonic() - started < 2
    assert (report["closed_count"], report["failed_count"]) == (0, 1)
