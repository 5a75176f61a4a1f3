"""The quick start of the README: `uvicorn examples.quickstart:app`."""

from fastapi import Depends, FastAPI
from pydantic import BaseModel

from fastapi_ws_stabilizer import DisconnectReason, StableSocket, WebSocketConnectionManager, stable_socket

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)


class Say(BaseModel):
    text: str


@manager.on_connect
async def joined(ws: StableSocket) -> None:
    await manager.broadcast({"type": "joined", "who": ws.client_id})


@manager.on_disconnect
async def left(ws: StableSocket, reason: DisconnectReason) -> None:
    await manager.broadcast({"type": "left", "who": ws.client_id, "why": reason})


@manager.on_message("say")  # {"type": "say", "text": "hello"}
async def say(ws: StableSocket, message: Say) -> None:
    await manager.broadcast({"type": "said", "who": ws.client_id, "text": message.text})


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocket = Depends(stable_socket)) -> None:
    await ws.run()
