"""Connections that open and close leave no memory behind."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Callable

import pytest

from tests.support.server import LiveServer, until

Serve = Callable[..., LiveServer]

CONNECTIONS = 1000
ROUNDS = 16
WARM_UP = 6  # rounds until the allocator is warm; the number of objects is constant from the first round


async def connect_raw(port: int, number: int) -> asyncio.StreamWriter:
    """Open a WebSocket with the least client code."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(
        f"GET /run/c{number} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    return writer


@pytest.mark.soak
@pytest.mark.timeout(180)
async def test_memory_is_flat_during_connection_churn(serve: Serve) -> None:
    """From the seventh of sixteen rounds memory grows by at most 5 %, objects by at most 1 %, and no task is left."""
    # With the system's allocator for all Python objects, freed memory returns to the system and is not counted.
    server = serve(
        args=("--log-level", "warning"),
        config={"log_level": "WARNING"},
        env={"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1"},
    )
    tasks = len(server.probe()["tasks"])
    found = []
    for _ in range(ROUNDS):
        writers = []
        for start in range(0, CONNECTIONS, 100):
            writers += await asyncio.gather(*(connect_raw(server.port, start + n) for n in range(100)))
        await until(lambda: server.probe()["connections"] == CONNECTIONS, 20)
        for number, writer in enumerate(writers):
            if number % 2:
                writer.transport.abort()
            else:
                writer.close()
        await until(lambda: server.probe()["connections"] == 0, 20)
        await until(lambda: len(server.probe()["tasks"]) <= tasks, 20)
        server.post("/forget")
        found.append(server.post("/collect"))
    memory = [measured["rss"] for measured in found[WARM_UP:]]
    objects = [measured["objects"] for measured in found]
    assert max(memory) <= 1.05 * memory[0], memory
    assert max(objects) <= 1.01 * objects[0], objects
