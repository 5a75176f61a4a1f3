"""Real ASGI servers in subprocesses."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

QUICK = {"disconnect_grace": 0.5, "heartbeat_interval": 1000}
"""Default options of the test apps: no waits at shutdown, no pings among the messages."""

UVICORN = ("uvicorn-sansio", "uvicorn-wsproto", "uvicorn-websockets", "uvicorn-stable")
SERVERS = (*UVICORN, "hypercorn", "granian")


_PORTS = 1_500
_FIRST_PORT = 20_000 + _PORTS * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8)
"""Below the ports that systems assign, and different for each process of a test run.

So no other process takes a port between our check and the server's bind.
"""

_tried = itertools.count(os.getpid() * 7)  # another test run begins at another port


def free_port() -> int:
    """Return a free port of the loopback that this process has not returned before."""
    for _ in range(_PORTS):
        port = _FIRST_PORT + next(_tried) % _PORTS
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"the ports {_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1} are all taken")


async def until(condition: Callable[[], Any], timeout: float = 5.0, what: str = "") -> Any:
    """Wait for something that another process does; return the true result of `condition`."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or condition}"
        await asyncio.sleep(0.01)


class LiveServer:
    """One server process, which serves one of the test apps.

    Args:
        kind: One of `SERVERS`.
        app: The application, `module:name`.
        config: Options of its `WebSocketConfig`, for apps that read them.
        args: Further command line arguments.
        python: The interpreter.
        cwd: Its working directory.
        auto: Whether uvicorn chooses its WebSocket implementation itself.
        port: The port; a free one when left out.
    """

    def __init__(
        self,
        kind: str = "uvicorn-sansio",
        *,
        app: str = "tests.live.app:app",
        config: dict[str, Any] | None = None,
        args: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        python: str = sys.executable,
        cwd: Path = ROOT,
        auto: bool = False,
        port: int | None = None,
    ) -> None:
        self.kind = kind
        self._auto = auto
        self.port = port or free_port()
        self._log = tempfile.NamedTemporaryFile(mode="w+", suffix=f"-{kind}.log", delete=False)  # noqa: SIM115 (closed in stop)
        command = [python, "-m", *self._command(app), *args]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "TEST_WS_CONFIG": json.dumps({**QUICK, **(config or {})}),
                "PYTHONUNBUFFERED": "1",
                **(env or {}),
            },
            start_new_session=True,
        )

    def _command(self, app: str) -> list[str]:
        port = str(self.port)
        if self.kind == "hypercorn":
            return ["hypercorn", app, "--bind", f"127.0.0.1:{port}", "--error-logfile", "-", "--graceful-timeout", "2"]
        if self.kind == "granian":
            return ["granian", "--interface", "asgi", "--host", "127.0.0.1", "--port", port, "--workers", "1", app]
        if self.kind == "gunicorn":
            worker = "uvicorn_worker.UvicornWorker"
            return ["gunicorn", app, "-k", worker, "-b", f"127.0.0.1:{port}", "-w", "1"]
        if self._auto:
            return ["uvicorn", app, "--port", port]
        implementation = self.kind.removeprefix("uvicorn-")
        implementation = {
            "sansio": "websockets-sansio",
            "stable": "fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol",
        }.get(implementation, implementation)
        return ["uvicorn", app, "--port", port, "--ws", implementation]

    def __enter__(self) -> LiveServer:
        try:
            self.wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_up(self, timeout: float = 20.0) -> None:
        """Wait until it accepts connections."""

        deadline = time.monotonic() + timeout
        while True:
            assert self.process.poll() is None, f"the server did not start:\n{self.log}"
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert time.monotonic() < deadline, f"not up within {timeout} s:\n{self.log}"
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """End the process and all processes that it has started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(4)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self._log.close()
        Path(self._log.name).unlink(missing_ok=True)

    def terminate(self, timeout: float) -> float:
        """Send SIGTERM; return the seconds until the process ended, at most `timeout`."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running {timeout} s after SIGTERM:\n{self.log}") from None
        return time.monotonic() - started

    @property
    def log(self) -> str:
        """Return everything that it has printed."""
        return Path(self._log.name).read_text(errors="replace")

    def url(self, path: str) -> str:
        """Return the address of a WebSocket route."""
        return f"ws://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> Any:
        """GET JSON."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
            return json.load(response)

    def post(self, path: str, body: Any = None) -> Any:
        """POST JSON."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def probe(self) -> dict[str, Any]:
        """Return what the test app reports: connections, tasks, events."""
        found: dict[str, Any] = self.get("/probe")
        return found

    def events(self, prefix: str = "") -> list[str]:
        """Return the events that the app has recorded."""
        return [event for event in self.probe()["events"] if event.startswith(prefix)]

    async def until_event(self, event: str, timeout: float = 5.0) -> None:
        """Wait until the app has recorded an event with this beginning."""
        try:
            await until(lambda: self.events(event), timeout, f"event {event!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}, but {self.events()}") from None

    def errors(self) -> list[str]:
        """Return lines of the log that indicate a crash."""
        marks = ("Traceback", "Exception in ASGI", "Error in ASGI", "panicked", "ERROR", "CRITICAL")
        return [line for line in self.log.splitlines() if any(mark in line for mark in marks)]
