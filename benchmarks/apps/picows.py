"""picows with its own API: one send for each transport."""

import socket
from typing import Any

from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

from benchmarks.apps.serving import serve_socket

transports: set[WSTransport] = set()


class Listener(WSListener):
    def on_ws_connected(self, transport: WSTransport) -> None:
        transports.add(transport)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        transports.discard(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()


def listener(_: WSUpgradeRequest) -> Listener:
    return Listener()


async def start(sock: socket.socket) -> Any:
    return await ws_create_server(listener, sock=sock)


async def broadcast(message: str) -> None:
    data = message.encode()
    for transport in transports:
        transport.send(WSMsgType.TEXT, data)


if __name__ == "__main__":
    serve_socket(start, broadcast)
