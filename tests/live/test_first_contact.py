"""First steps of a user: a fresh environment, a wrong path, and a manager in each kind of app."""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
import venv
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.support.server import ROOT, LiveServer, until

Serve = Callable[..., LiveServer]


def readme_quick_start() -> str:
    """Return the first complete app of the README."""
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        if "FastAPI(" in block and "@app.websocket" in block:
            return str(block)
    raise AssertionError("the README has no quick start")


@pytest.mark.timeout(300)
async def test_quick_start_runs_in_fresh_environment(serve: Serve, tmp_path: Path) -> None:
    """The README's quick start runs with the extra alone; without a WebSocket library the log says what to install."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{ROOT}[uvicorn]"]
    await asyncio.to_thread(subprocess.run, install, check=True, capture_output=True)
    (tmp_path / "main.py").write_text(readme_quick_start())
    path = "/ws/ann"
    server = serve(app="main:app", python=python, cwd=tmp_path)
    async with connect(server.url(path)) as client:
        await client.send("ping")
        while await asyncio.wait_for(client.recv(), 5) != "pong":
            pass
    assert "uvicorn has no WebSocket library" not in server.log
    server.stop()
    remove = [python, "-m", "pip", "uninstall", "--quiet", "-y", "websockets"]
    await asyncio.to_thread(subprocess.run, remove, check=True, capture_output=True)
    server = LiveServer(app="main:app", python=python, cwd=tmp_path, auto=True)
    with server:
        with pytest.raises(InvalidStatus, match="404"):
            async with connect(server.url(path)):
                pass
        assert "pip install" in server.log
        assert "uvicorn has no WebSocket library" in server.log


async def test_wrong_path_is_explained_in_log(server: LiveServer) -> None:
    """A handshake on an unknown path logs the paths that exist, at most ten times."""
    for number in range(30):
        with pytest.raises(InvalidStatus, match="403"):
            async with connect(server.url(f"/wrong/{number}")):
                pass
    lines = [line for line in server.log.splitlines() if "no_websocket_route" in line]
    assert len(lines) == 10
    assert "path=/wrong/0" in lines[0]
    assert "/echo/{client_id}" in lines[0]


MOUNTS = ["plain", "own_lifespan", "with_router", "mounted", "installed_twice", "never_started"]


@pytest.mark.alone
@pytest.mark.parametrize("mount", MOUNTS)
async def test_heartbeat_and_shutdown_run_once_per_manager(serve: Serve, mount: str) -> None:
    """Heartbeats have their configured rate, and a lifespan that runs shuts down once."""
    server = serve(app=f"tests.live.mounted_apps:{mount}")
    path = "/inner/ws" if mount in ("mounted", "never_started") else "/ws"
    async with connect(server.url(path)) as client:
        await client.recv()
        started = time.monotonic()
        for _ in range(5):
            await asyncio.wait_for(client.recv(), 2)
        assert 0.8 < time.monotonic() - started < 1.5
    await until(lambda: "connection_ended" in server.log)
    await asyncio.to_thread(server.terminate, 5)
    assert server.log.count(" shutdown closed_count=0 failed_count=0") == (0 if mount == "never_started" else 1)
    assert not server.errors()


def test_only_three_distributions_are_required() -> None:
    """The built project requires exactly three distributions; all others are extras."""
    required = [name for name in requires("fastapi-ws-stabilizer") or [] if "extra" not in name]
    assert sorted(re.split(r"[<>=!]", name)[0] for name in required) == [
        "fastapi",
        "pydantic",
        "typing-extensions",
    ]
