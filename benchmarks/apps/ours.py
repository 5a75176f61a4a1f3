"""fastapi_ws_stabilizer, used as in its README."""

from fastapi import FastAPI

from benchmarks.apps.control import NEVER, options
from benchmarks.apps.serving import serve_asgi
from fastapi_ws_stabilizer import StableSocketDep, WebSocketConfig, WebSocketConnectionManager

manager = WebSocketConnectionManager(WebSocketConfig(**{"heartbeat_interval": NEVER, **options()}))
app = FastAPI(lifespan=manager.lifespan)


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    async for message in ws:
        await ws.send(message)


if __name__ == "__main__":
    serve_asgi(app, manager.broadcast)
