"""The asyncio server of `websockets`, and its `broadcast`."""

import socket
from typing import Any

from websockets.asyncio.server import ServerConnection, broadcast, serve

from benchmarks.apps.serving import serve_socket

connections: set[ServerConnection] = set()


async def handler(connection: ServerConnection) -> None:
    connections.add(connection)
    try:
        await connection.wait_closed()
    finally:
        connections.discard(connection)


async def start(sock: socket.socket) -> Any:
    return await serve(handler, sock=sock, ping_interval=None)


async def send_to_all(message: str) -> None:
    broadcast(connections, message)


if __name__ == "__main__":
    serve_socket(start, send_to_all)
