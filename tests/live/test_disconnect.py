"""A disconnect is detected in every state of the endpoint, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.support.raw import RawClient
from tests.support.server import SERVERS, UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]

GRACE = {"disconnect_grace": 0.3}


def clean_code(kind: str) -> int:
    """Return the code that a server reports for a close with 1000; hypercorn reports none."""
    return 1005 if kind == "hypercorn" else 1000


def own_tasks(server: LiveServer) -> list[str]:
    return [name for name in server.probe()["tasks"] if name.startswith("ws-")]


@pytest.mark.parametrize("kind", SERVERS)
async def test_idle_endpoint_is_cancelled_after_disconnect(serve: Serve, kind: str) -> None:
    """An endpoint that waits for another event ends within the grace, and its dependencies are closed completely."""
    server = serve(kind, config=GRACE)
    async with connect(server.url("/idle/ann")):
        await until(lambda: server.probe()["connections"] == 1)
    await server.until_event("released ann", 1.5)
    await until(lambda: not own_tasks(server), 1.0)
    assert server.probe()["connections"] == 0
    assert server.events("cancelled") == ["cancelled ann"]
    assert server.events("rollback") == ["rollback ann CancelledError"]
    assert server.events("disconnect") == [f"disconnect ann client_close {clean_code(kind)}"]
    assert not server.errors()


@pytest.mark.parametrize("kind", SERVERS)
async def test_sending_endpoint_gets_socket_closed_after_disconnect(serve: Serve, kind: str) -> None:
    """An endpoint that only sends gets SocketClosed at its next send, on every server."""
    server = serve(kind, config=GRACE)
    async with connect(server.url("/push/ann")) as client:
        assert await client.recv() == "tick"
    await server.until_event("push ended ann", 1.0)
    await server.until_event("released ann")
    await until(lambda: not own_tasks(server), 1.0)
    assert server.probe()["connections"] == 0
    assert server.events("disconnect") == [f"disconnect ann client_close {clean_code(kind)}"]
    assert not server.errors()


async def test_dependency_entered_before_socket_is_closed_completely(server: LiveServer) -> None:
    """A dependency before the socket gets the disconnect as an exception, and its clean-up runs."""
    async with connect(server.url("/idle-resource-first/first")):
        pass
    await server.until_event("released first", 3)
    assert server.events("rollback first") == ["rollback first WebSocketException"]
    assert not server.errors()


@pytest.mark.parametrize("kind", UVICORN)
@pytest.mark.parametrize("path", ["/await-tied/ann", "/group/ann"])
async def test_endpoint_with_tasks_ends_without_traceback(serve: Serve, kind: str, path: str) -> None:
    """An endpoint that awaits connection tasks or a task group ends without an error when its client disconnects."""
    server = serve(kind, config=GRACE)
    async with connect(server.url(path)) as client:
        assert await client.recv() == "tick"
    await server.until_event("disconnect ann client_close", 2)
    await until(lambda: not own_tasks(server), 2)
    assert server.events("error") == []
    assert not server.errors()


async def test_reader_task_gets_messages_received_before_disconnect(serve: Serve) -> None:
    """ws.run() in a connection task handles the messages that wait when the client disconnects."""
    server = serve(config={"disconnect_grace": 5})
    async with connect(server.url("/tied-run/ann")) as client:
        await until(lambda: server.events("connect"))
        for number in range(20):
            await client.send(f'{{"type":"wait","seconds":0.01,"name":"{number}"}}')
    await server.until_event("disconnect ann")
    assert server.events("handled") == [f"handled {number}" for number in range(20)]


@pytest.mark.parametrize("kind", SERVERS)
async def test_disconnect_behind_full_inbox_is_noticed(serve: Serve, kind: str) -> None:
    """A disconnect behind more messages than the inbox holds is detected, and no task hangs."""
    config = {"inbox_max_messages": 4, "inbox_pause_timeout": 1, "send_timeout": 1, **GRACE}
    server = serve(kind, config=config)
    with RawClient(server.port, "/idle/ann") as client:
        client.handshake()
        for _ in range(100):
            client.send(1, b"x")
        await until(lambda: "reading_paused" in server.log)
        client.reset()
        await server.until_event("disconnect ann", 5)
        await server.until_event("released ann")
    await until(lambda: not own_tasks(server), 2)
    assert server.probe()["connections"] == 0
    assert not server.errors()


@pytest.mark.parametrize("kind", SERVERS)
async def test_tcp_reset_leaves_no_task_or_entry(serve: Serve, kind: str) -> None:
    """Within 1 s of a TCP reset no task and no registry entry is left, and on_disconnect has run once."""
    server = serve(kind)
    before = len(server.probe()["tasks"])
    client = RawClient(server.port, "/run/ann")
    client.handshake()
    await until(lambda: server.probe()["connections"] == 1)
    client.reset()
    await server.until_event("disconnect ann network_lost 1006", 1.0)
    await until(lambda: len(server.probe()["tasks"]) <= before, 1.0)
    found = server.probe()
    assert (found["connections"], found["clients"]) == (0, [])
    assert server.events("disconnect") == ["disconnect ann network_lost 1006"]
    assert not server.errors()


async def test_messages_before_disconnect_are_handled_first(serve: Serve) -> None:
    """Messages that wait when the client disconnects reach their handlers, and on_disconnect runs after them."""
    server = serve()
    async with connect(server.url("/run/ann")) as client:
        await until(lambda: server.events("connect"))
        for number in range(5):
            await client.send(f'{{"type":"wait","seconds":0.05,"name":"{number}"}}')
    await server.until_event("disconnect ann")
    handled = [f"handled {number}" for number in range(5)]
    assert server.events()[1:] == [*handled, "disconnect ann client_close 1000"]


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-wsproto", "uvicorn-websockets"])
async def test_random_closes_during_sends_log_no_traceback(serve: Serve, kind: str) -> None:
    """Closes and resets at random moments during sends of three tasks log no traceback."""
    server = serve(kind)
    chance = random.Random(1)

    async def one(number: int) -> None:
        path = f"/three-senders/c{number}?delay={chance.uniform(0, 0.05):.4f}"
        try:
            async with connect(server.url(path), max_queue=None) as client:
                delay = chance.uniform(0, 0.06)
                reset = chance.random() < 0.3
                await asyncio.sleep(delay)
                if reset:
                    client.transport.abort()
        except (ConnectionClosed, OSError):
            pass

    rounds = 20 if kind == "uvicorn-sansio" else 5
    for start in range(rounds):
        await asyncio.gather(*(one(10 * start + number) for number in range(10)))
    await until(lambda: server.probe()["connections"] == 0)
    await until(lambda: len(server.events("disconnect")) == len(server.events("connect")))
    assert len(server.events("connect")) == 10 * rounds
    assert not server.errors()
    assert "Traceback" not in server.log


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-wsproto", "uvicorn-websockets"])
async def test_disconnect_before_accept_logs_no_traceback(serve: Serve, kind: str) -> None:
    """A reset during a slow dependency before the accept is not an error."""
    server = serve(kind)
    client = RawClient(server.port, "/slow-auth/ann")
    await asyncio.sleep(0.2)
    client.reset()
    async with connect(server.url("/slow-auth/bob")):
        await until(lambda: server.probe()["clients"] == ["bob"])
    await until(lambda: server.probe()["connections"] == 0)
    assert not server.errors()


async def test_connection_task_is_cancelled_on_disconnect(server: LiveServer) -> None:
    """Tasks of ws.create_task are cancelled when the client disconnects."""
    async with connect(server.url("/three-senders/tied?delay=60"), max_queue=None) as client:
        await client.recv()
        assert sum(name.startswith("ws-task-") for name in server.probe()["tasks"]) == 4
    await until(lambda: not own_tasks(server), 1.0)
    assert not server.errors()
