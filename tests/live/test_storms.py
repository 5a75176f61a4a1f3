"""Very many clients connect or vanish at once: each event loop iteration handles a part of them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from tests.support.server import LiveServer, until

CLIENTS = 600
MOST_AT_ONCE = CLIENTS // 2
BLOCK = 1.0
"""Seconds in which the event loop is blocked while the clients connect or vanish."""

REQUEST = (
    "GET /ws/client-{number} HTTP/1.1\r\nHost: server\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Crowd:
    """Raw clients that do everything at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sockets: list[socket.socket] = []

    def connect(self) -> None:
        """Send all handshakes, without waiting for an answer."""
        for number in range(CLIENTS):
            client = socket.create_connection(("127.0.0.1", self._port), timeout=30)
            client.sendall(REQUEST.format(number=number).encode())
            self._sockets.append(client)

    def close(self) -> None:
        """Close all sockets without a closing handshake."""
        for client in self._sockets:
            client.close()
        self._sockets.clear()


@pytest.fixture
def crowd() -> Iterator[Callable[[int], Crowd]]:
    """Return a function that makes a crowd; its sockets are closed at the end."""
    made: list[Crowd] = []

    def make(port: int) -> Crowd:
        made.append(Crowd(port))
        return made[-1]

    yield make
    for one in made:
        one.close()


async def at_once(server: LiveServer, action: Callable[[], None]) -> None:
    """Run an action while the event loop of the server is blocked."""
    blocking = asyncio.ensure_future(asyncio.to_thread(server.get, f"/block?seconds={BLOCK}"))
    await asyncio.sleep(BLOCK / 4)
    await asyncio.to_thread(action)
    await blocking


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_storm_is_cut_into_event_loop_iterations(
    serve: Callable[..., LiveServer], crowd: Callable[[int], Crowd], kind: str
) -> None:
    """Clients that connect at once, and then vanish at once, are handled in several iterations of the event loop."""
    # uvloop accepts one connection in each iteration, so only a disconnect would be a storm there.
    server = serve(kind, app="tests.live.storm_app:app", args=("--backlog", "2048", "--loop", "asyncio"))
    with closing(crowd(server.port)) as clients:
        await at_once(server, clients.connect)
        await until(lambda: server.get("/count")["connections"] == CLIENTS, 60, "all are connected")
        assert 0 < server.get("/stop")["rise"] <= MOST_AT_ONCE
        await at_once(server, clients.close)
        await until(lambda: server.get("/count") == {"connections": 0, "unfinished": 0}, 60, "all have ended")
        assert 0 < server.get("/stop")["fall"] <= MOST_AT_ONCE
