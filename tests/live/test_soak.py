"""20 s of every kind of client at once."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.support.raw import RawClient
from tests.support.server import UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]

SECONDS = 20.0
CLIENTS = 40


def first_traceback(server: LiveServer) -> str:
    """Return the log around its first traceback."""
    log = server.log
    return log[max(0, log.find("Traceback") - 500) :][:5000]


@pytest.mark.soak
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", UVICORN)
async def test_mixed_abusive_clients_leave_no_task_or_traceback(serve: Serve, kind: str) -> None:
    """Clients that talk, stall, reset, send garbage and share ids leave no task and no traceback."""
    config = {
        "heartbeat_interval": 0.5,
        "heartbeat_timeout": 1.0,
        "send_timeout": 1.0,
        "max_bad_messages": 3,
        "inbox_max_messages": 8,
        "outbox_max_messages": 64,
        "max_message_size": 100_000,
        "log_level": "WARNING",
    }
    server = serve(kind, config=config)
    ends = time.monotonic() + SECONDS
    chance = random.Random(kind)

    async def talk(path: str) -> None:
        async with connect(server.url(path), max_queue=None, open_timeout=10) as client:
            for _ in range(chance.randrange(20)):
                await client.send(chance.choice(["hello", "ping", "pong", '{"type":"echo"}']))
                await asyncio.sleep(chance.uniform(0, 0.05))

    async def send_garbage(path: str) -> None:
        if path.startswith("/adopt"):
            path = path.replace("/adopt", "/run")  # Starlette's receive_text raises KeyError for bytes
        async with connect(server.url(path), max_queue=None, open_timeout=10) as client:
            for _ in range(8):
                await client.send(chance.choice([b"\xff", "{", '{"type":3}', "x" * 100_001, ""]))

    async def stall(path: str) -> None:
        def run() -> None:
            with RawClient(server.port, path.replace("/echo", "/flood"), receive_buffer=4096) as client:
                client.handshake()
                time.sleep(chance.uniform(0, 3))

        await asyncio.to_thread(run)

    async def reset(path: str) -> None:
        def run() -> None:
            client = RawClient(server.port, path)
            client.handshake()
            client.send(1, b'{"type":"wait","seconds":0.2,"name":"n"}')
            time.sleep(chance.uniform(0, 0.2))
            client.reset()

        await asyncio.to_thread(run)

    async def break_protocol(path: str) -> None:
        def run() -> None:
            with RawClient(server.port, path) as client:
                client.handshake()
                client.send(chance.choice([0, 3, 15]), b"?" * chance.randrange(200))
                client.socket.settimeout(1)
                try:
                    client.close_frame(1)
                except (OSError, ConnectionError):
                    pass

        await asyncio.to_thread(run)

    async def run_client(number: int) -> None:
        actions = [talk, talk, talk, send_garbage, stall, reset, break_protocol]
        paths = ["/echo", "/run", "/adopt", "/idle", "/push", "/three-senders"]
        while time.monotonic() < ends:
            query = "?delay=0.2" if (path := chance.choice(paths)) == "/three-senders" else ""
            try:
                await chance.choice(actions)(f"{path}/{chance.randrange(CLIENTS // 2)}{query}")
            except (ConnectionClosed, InvalidHandshake, OSError):
                pass

    async def broadcast() -> None:
        while time.monotonic() < ends:
            await asyncio.to_thread(server.post, f"/broadcast?count=5&size={chance.randrange(5000)}")
            await asyncio.sleep(0.05)

    clients = [asyncio.create_task(run_client(number)) for number in range(CLIENTS)]
    results = await asyncio.gather(*clients, broadcast(), return_exceptions=True)
    # A broadcast to slow recipients alone fails with 500 here; everything else must succeed.
    problems = [repr(result) for result in results if result is not None and "500" not in repr(result)]
    assert not problems
    await until(lambda: server.probe()["connections"] == 0, 10)
    await until(lambda: not [name for name in server.probe()["tasks"] if name.startswith("ws-")], 15)
    events = server.events()
    assert sum(e.startswith("disconnect ") for e in events) == sum(e.startswith("connect ") for e in events)
    assert json.dumps(server.probe()["endings"]).count(":") >= 5
    unexpected = [line for line in server.errors() if "Traceback" in line or "fastapi_ws_stabilizer" in line]
    assert not unexpected, first_traceback(server)
