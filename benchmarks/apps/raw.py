"""The upper bound: frames built once and written to bare transports."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import socket
from typing import Any

from benchmarks.apps.serving import serve_socket
from benchmarks.frames import server_frame

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

transports: set[Any] = set()


class Client(asyncio.Protocol):
    """Protocol that answers the handshake and ignores what it receives afterwards."""

    def __init__(self) -> None:
        self._request = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        transports.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        if self._transport in transports:
            return
        self._request += data
        if not self._request.endswith(b"\r\n\r\n"):
            return
        key = self._request.lower().index(b"sec-websocket-key:")
        value = self._request[key:].split(b"\r\n", 1)[0].split(b":", 1)[1].strip()
        accept = base64.b64encode(hashlib.sha1(value + GUID, usedforsecurity=False).digest())
        self._transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        transports.add(self._transport)


async def start(sock: socket.socket) -> Any:
    return await asyncio.get_running_loop().create_server(Client, sock=sock)


async def broadcast(message: str) -> None:
    frame = server_frame(message.encode())
    for transport in transports:
        transport.write(frame)


async def burst(messages: list[str]) -> None:
    joined = b"".join(server_frame(message.encode()) for message in messages)
    for transport in transports:
        transport.write(joined)


if __name__ == "__main__":
    serve_socket(start, broadcast, burst)
