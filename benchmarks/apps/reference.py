"""fastapi-websocket-stabilizer, used as in its README."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi_websocket_stabilizer import WebSocketConfig, WebSocketConnectionManager

from benchmarks.apps.control import NEVER, options
from benchmarks.apps.serving import serve_asgi

manager = WebSocketConnectionManager(WebSocketConfig(**{"heartbeat_interval": NEVER, **options()}))


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    await manager.start()
    yield
    await manager.graceful_shutdown()


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws/{client_id}")
async def endpoint(websocket: WebSocket, client_id: str) -> None:
    await websocket.accept()
    try:
        await manager.connect(client_id, websocket)
        while True:
            data = await websocket.receive_text()
            if data == "pong":
                await manager.handle_pong(client_id)
                continue
            await manager.send_to_client(client_id, data)
    except WebSocketDisconnect:
        await manager.disconnect(client_id)


if __name__ == "__main__":
    serve_asgi(app, manager.broadcast)
