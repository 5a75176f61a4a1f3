"""The final state of `app.py` in the tutorial: `uvicorn examples.tutorial:app`."""

from fastapi import Depends, FastAPI, Header, HTTPException
from pydantic import BaseModel

from fastapi_ws_stabilizer import (
    DisconnectReason,
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
    configure_logging,
    stats_router,
)

manager = WebSocketConnectionManager(WebSocketConfig(on_duplicate="allow"))
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
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


configure_logging()


def require_stats_key(x_stats_key: str = Header(default="")) -> None:
    if x_stats_key != "let me see":  # replace: a real secret, or a login
        raise HTTPException(403)


app.include_router(stats_router, prefix="/ws-stats", dependencies=[Depends(require_stats_key)])
