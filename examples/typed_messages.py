"""Message handlers by type; the annotation of each handler decides how its message is validated."""

import time
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, Field

from fastapi_ws_stabilizer import StableSocket, StableSocketDep, WebSocketConnectionManager

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)


class Move(BaseModel):
    x: Annotated[int, Field(ge=0, le=7)]
    y: Annotated[int, Field(ge=0, le=7)]


@manager.on_message("move")  # {"type": "move", "x": 1, "y": 2}
async def move(ws: StableSocket, message: Move) -> None:
    await manager.broadcast({"type": "moved", "who": ws.client_id, "x": message.x, "y": message.y})


@manager.on_message("resign")  # a handler without a message parameter gets the socket only
async def resign(ws: StableSocket) -> None:
    await ws.close(4001, "resigned")


@manager.on_message("report")  # not async: runs in the thread pool and does not block the event loop
def report(ws: StableSocket, message: dict[str, Any]) -> None:
    time.sleep(0.01)
    ws.user_data["last_report"] = message.get("text")


@manager.on_message  # every message that no handler above takes
async def anything_else(ws: StableSocket, message: str) -> None:
    await ws.send({"type": "echo", "text": message})


@manager.on_error
async def report_error(ws: StableSocket, error: BaseException) -> None:
    ws.user_data["error"] = repr(error)  # replace: an error tracker; the log has the error already


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
