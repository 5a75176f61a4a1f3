"""Start of an app's server, with the same settings for all: uvloop, one socket, no access log."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import uvloop

from benchmarks.apps.control import Broadcast, Burst, Control
from benchmarks.channel import WS

BACKLOG = 4096


def listening_socket() -> socket.socket:
    """Return a listening socket on a port that the system chooses."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop, with as many open files as the system allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if sys.version_info >= (3, 11):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main)
    else:
        uvloop.install()
        asyncio.run(main)


def serve_asgi(app: Any, broadcast: Broadcast) -> None:
    """Serve an ASGI app with uvicorn until the parent process stops it.

    uvicorn's own pings and its access log are off. Everything else is its default.
    """
    import uvicorn  # servers without ASGI run in environments that may lack uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit and sockets:
                await Control.open(broadcast, sockets[0].getsockname()[1])

    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="h11",
        ws=os.environ.get(WS, "websockets-sansio"),
        ws_ping_interval=None,
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
    )
    run(Server(config).serve(sockets=[listening_socket()]))


def serve_socket(
    start: Callable[[socket.socket], Awaitable[object]], broadcast: Broadcast, burst: Burst | None = None
) -> None:
    """Serve with a server that is not ASGI: `start` begins to listen and returns an object to hold a reference to."""

    async def main() -> None:
        sock = listening_socket()
        listener = await start(sock)
        await Control.open(broadcast, sock.getsockname()[1], burst)
        await asyncio.Event().wait()
        del listener

    run(main())
