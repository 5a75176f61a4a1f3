"""A chat room: who is here, what they say, and why somebody has left.

A tab connects to `/ws/{client_id}?name=Ann` and says `{"type": "say", "text": "hello"}`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import FileResponse
from pydantic import BaseModel, StringConstraints

from fastapi_ws_stabilizer import (
    DisconnectReason,
    StableSocket,
    WebSocketConfig,
    WebSocketConnectionManager,
    stable_socket,
    stats_router,
)

MAX_NAME = 24

# Short, so that a lost network shows after 3 + 5 seconds at the latest. Outside a demo the defaults are kinder.
manager = WebSocketConnectionManager(
    WebSocketConfig(heartbeat_interval=3, heartbeat_timeout=5, max_message_size=8 * 1024)
)
app = FastAPI(title="Chat", lifespan=manager.lifespan)
app.include_router(stats_router, prefix="/ws-stats")  # for all to see here; elsewhere add `dependencies=[...]`


class Person(BaseModel):
    id: str
    name: str


class Say(BaseModel):
    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]


# By client id. Each tab makes up its own random one, apart from the name, so that two people called Ann can both be
# here: a client id that connects again takes the place of its older connection. That is also why nobody is shown the
# client id of another, only a digest of it.
here: dict[str, Person] = {}


@manager.on_connect
async def arrive(ws: StableSocket) -> None:
    name = " ".join(ws.query_params.get("name", "").split())
    if not 1 <= len(name) <= MAX_NAME:
        raise HTTPException(400, f"A name has 1 to {MAX_NAME} characters.")  # closes with 4400
    returns = ws.client_id in here  # the old connection of this tab was lost, and nobody has noticed yet
    person = Person(id=hashlib.sha256(ws.client_id.encode()).hexdigest()[:8], name=name)
    here[ws.client_id] = ws.user_data["person"] = person
    heartbeat = {"interval": manager.config.heartbeat_interval, "timeout": manager.config.heartbeat_timeout}
    await ws.send({"type": "welcome", "you": person, "people": list(here.values()), "heartbeat": heartbeat})
    if not returns:
        await manager.broadcast({"type": "joined", "who": person, "people": list(here.values())})


@manager.on_disconnect
async def leave(ws: StableSocket, reason: DisconnectReason) -> None:
    if manager.get_sockets(ws.client_id):
        return  # the same tab is back already, on a newer connection
    person = here.pop(ws.client_id, None)
    if person is not None:
        await manager.broadcast({"type": "left", "who": person, "why": reason, "people": list(here.values())})


@manager.on_message("say")
async def say(ws: StableSocket, message: Say) -> None:
    await manager.broadcast({"type": "said", "who": ws.user_data["person"], "text": message.text})


@app.websocket("/ws/{client_id}")
async def chat(ws: Annotated[StableSocket, Depends(stable_socket)]) -> None:
    await ws.run()


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))
