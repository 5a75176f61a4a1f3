"""A FastAPI WebSocket endpoint with a `yield` dependency that accepts, and without any library."""

import gc
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect

from benchmarks.apps.control import options
from benchmarks.apps.serving import serve_asgi

app = FastAPI()


async def accepted(ws: WebSocket) -> AsyncIterator[WebSocket]:
    await ws.accept()
    yield ws


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
    if options().get("gc_thresholds"):
        gc.set_threshold(*options()["gc_thresholds"])
    serve_asgi(app, broadcast)
