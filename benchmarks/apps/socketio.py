"""python-socketio on ASGI, without a namespace or room: `emit` to all clients."""

import socketio

from benchmarks.apps.control import NEVER
from benchmarks.apps.serving import serve_asgi

sio = socketio.AsyncServer(async_mode="asgi", ping_interval=NEVER, cors_allowed_origins="*")
app = socketio.ASGIApp(sio)


async def broadcast(message: str) -> None:
    await sio.emit("message", message)


if __name__ == "__main__":
    serve_asgi(app, broadcast)
