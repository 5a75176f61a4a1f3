"""The garbage collector of a server with many connections."""

from __future__ import annotations

import base64
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from fastapi_ws_stabilizer.gc_pacing import MAX_FROZEN_BY_INTERPRETER, MIN_CONNECTIONS
from tests.support.server import LiveServer, until

Serve = Callable[..., LiveServer]

CLIENTS = 2000
AT_A_TIME = 50
APP = "tests.live.gc_app:app"


@pytest.fixture(autouse=True)
def many_open_files() -> Iterator[None]:
    """Allow as many open files as the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def storm(server: LiveServer) -> Iterator[None]:
    """Open `CLIENTS` connections, some at a time, and close them at the end without a closing handshake."""
    key = base64.b64encode(os.urandom(16)).decode()
    request = (
        f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()
    with ExitStack() as stack:
        for _ in range(CLIENTS // AT_A_TIME):
            opening = [
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10)) for _ in range(AT_A_TIME)
            ]
            for client in opening:
                client.sendall(request)
            for client in opening:
                assert client.recv(4096).startswith(b"HTTP/1.1 101")
        yield


def collectors(server: LiveServer) -> Any:
    """Return the state of the collector before the start of the manager, and after its shutdown."""
    line = next(line for line in server.log.splitlines() if line.startswith("collector "))
    return json.loads(line.removeprefix("collector "))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_storm_of_connects_runs_no_full_collection(serve: Serve, kind: str) -> None:
    """No full collection visits the open connections while 2,000 clients connect. All is as found after a shutdown."""
    server = serve(kind, app=APP, config={"drain_window": 0.0, "log_level": "DEBUG"})
    with storm(server):
        await until(lambda: server.get("/probe")["connections"] == CLIENTS, 20)
        found = server.get("/probe")
    assert [connections for connections in found["full"] if connections >= MIN_CONNECTIONS] == []
    assert found["frozen"] > 100 * CLIENTS
    await until(lambda: "gc_pacing_ended" in server.log, 20)
    assert server.get("/probe")["frozen"] <= MAX_FROZEN_BY_INTERPRETER
    server.terminate(20)
    before, after = collectors(server)
    assert after["frozen"] <= MAX_FROZEN_BY_INTERPRETER
    assert (after["thresholds"], after["callbacks"]) == (before["thresholds"], before["callbacks"])
    assert server.log.count("gc_pacing_started") == 1


@pytest.mark.timeout(180)
async def test_shutdown_with_connections_gives_collector_back(serve: Serve) -> None:
    """A shutdown with many open connections leaves nothing frozen."""
    server = serve("uvicorn-stable", app=APP, config={"drain_window": 0.0})
    with storm(server):
        assert server.get("/probe")["frozen"] > MAX_FROZEN_BY_INTERPRETER
        server.terminate(20)
    before, after = collectors(server)
    assert after["frozen"] <= MAX_FROZEN_BY_INTERPRETER
    assert (after["thresholds"], after["callbacks"]) == (before["thresholds"], before["callbacks"])


@pytest.mark.timeout(180)
async def test_storm_without_pacing_runs_full_collections(serve: Serve) -> None:
    """With `gc_pacing="off"` the collector is that of the interpreter: it visits the open connections while more open.

    If this fails, the interpreter has another collector, and the pacing may have lost its purpose.
    """
    server = serve("uvicorn-stable", app=APP, config={"drain_window": 0.0, "gc_pacing": "off"})
    with storm(server):
        found = server.get("/probe")
    assert [connections for connections in found["full"] if connections >= MIN_CONNECTIONS]
    assert found["frozen"] <= MAX_FROZEN_BY_INTERPRETER
