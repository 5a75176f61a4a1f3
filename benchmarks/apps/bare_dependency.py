"""A FastAPI WebSocket endpoint with a `yield` dependency that accepts.

With the option `gc_pacing`, the library paces the garbage collector, and does nothing else.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect

from benchmarks.apps.control import options
from benchmarks.apps.serving import serve_asgi

connected: set[WebSocket] = set()


@asynccontextmanager
async def paced(_: FastAPI) -> AsyncIterator[None]:
    from fastapi_ws_stabilizer.events import EventBus  # here: the unpaced app runs without the library
    from fastapi_ws_stabilizer.gc_pacing import PacedConnections

    connections = PacedConnections(EventBus(), connected.__len__, enabled=True)
    connections.start()
    yield
    connections.stop()


app = FastAPI(lifespan=paced if options().get("gc_pacing") else None)


async def accepted(ws: WebSocket) -> AsyncIterator[WebSocket]:
    await ws.accept()
    connected.add(ws)
    yield ws
    connected.discard(ws)


@app.websocket("/ws/{client_id}")
async def endpoint(ws: Annotated[WebSocket, Depends(accepted)]) -> None:
    try:
        while True:
            await ws.send_text(await ws.receive_text())
    except WebSocketDisconnect:
        pass


async def broadcast(message: str) -> None:
    raise NotImplementedError(message)


if __name__ == "__main__":
    serve_asgi(app, broadcast)
