"""A chat room with sessions: members get missed messages after a reconnect, and see why other members disconnect.

The page speaks `stabilizer.v1.json`, so each tab has a session that outlives its connections. Plain clients work too:
they connect to `/ws/{client_id}?name=Ann` and send `{"type": "say", "text": "hello"}`.
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
ROOM = "chat"

# A short heartbeat detects a lost network within 3 + 5 seconds. The defaults cost less traffic.
manager = WebSocketConnectionManager(
    WebSocketConfig(
        heartbeat_interval=3, heartbeat_timeout=5, session_ttl=300, room_history=50, max_message_size=8 * 1024
    )
)
app = FastAPI(title="Chat", lifespan=manager.lifespan)
app.include_router(stats_router, prefix="/ws-stats")  # unprotected in this demo; in production add `dependencies=[...]`


class Person(BaseModel):
    id: str
    name: str
    away: bool = False


class Say(BaseModel):
    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]
    key: Annotated[str, StringConstraints(max_length=40)] = ""
    """Chosen by the sender. Its page recognises its own message in the broadcast by this key."""


# By client id. Each tab generates a random client id in addition to the name, so that two people called Ann can both be
# members: a client id that connects again replaces its older connection. Other members see only a digest of it.
members: dict[str, Person] = {}


async def announce(kind: str, person: Person, **more: object) -> None:
    """Tell the room about a member, outside its history: new members get the current list anyway."""
    event = {"type": kind, "who": person, "people": list(members.values()), **more}
    await manager.broadcast(event, room=ROOM, history=False)


async def send_welcome(ws: StableSocket) -> None:
    await ws.send({"type": "welcome", "you": members[ws.client_id], "people": list(members.values())}, volatile=True)


@manager.on_connect  # a new session
async def join_chat(ws: StableSocket) -> None:
    name = " ".join(ws.query_params.get("name", "").split())
    if not 1 <= len(name) <= MAX_NAME:
        raise HTTPException(400, f"A name has 1 to {MAX_NAME} characters.")  # closes with 4400
    known = members.get(ws.client_id)  # the page was reloaded
    digest = hashlib.sha256(ws.client_id.encode()).hexdigest()[:8]
    person = members[ws.client_id] = Person(id=digest, name=name)
    await send_welcome(ws)
    await ws.join(ROOM, history=20)
    if known is None or known.away:
        await announce("joined" if known is None else "back", person)


@manager.on_disconnect  # the session is detached
async def mark_away(ws: StableSocket, reason: DisconnectReason) -> None:
    person = members.get(ws.client_id)
    if person is not None and reason is not DisconnectReason.REPLACED:
        person.away = True
        await announce("away", person, why=reason)


@manager.on_resume  # the same session on a new connection
async def mark_back(ws: StableSocket) -> None:
    members[ws.client_id].away = False
    await send_welcome(ws)
    await announce("back", members[ws.client_id])


@manager.on_session_end  # the client closed it, or did not resume within `session_ttl`
async def leave_chat(ws: StableSocket, reason: DisconnectReason) -> None:
    if manager.get_sockets(ws.client_id):
        return  # a newer session of the same tab has replaced this one
    person = members.pop(ws.client_id, None)
    if person is not None:
        await announce("left", person, why=reason)


@manager.on_message("say")
async def say(ws: StableSocket, message: Say) -> None:
    said = {"type": "said", "who": members[ws.client_id], "text": message.text, "key": message.key}
    await manager.broadcast(said, room=ROOM)


@app.websocket("/ws/{client_id}")
async def chat(ws: Annotated[StableSocket, Depends(stable_socket)]) -> None:
    await ws.run()


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))
