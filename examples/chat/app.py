"""A chat room whose members miss nothing: who is here, what they say, and why a member is away or has left.

The page speaks `stabilizer.v1.json`, so each tab has a session that outlives its connections. A plain client can take
part too: it connects to `/ws/{client_id}?name=Ann` and sends `{"type": "say", "text": "hello"}`.
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

# The heartbeat is short, so that a lost network shows after 3 + 5 seconds at the latest; the defaults are kinder.
manager = WebSocketConnectionManager(
    WebSocketConfig(
        heartbeat_interval=3, heartbeat_timeout=5, session_ttl=300, room_history=50, max_message_size=8 * 1024
    )
)
app = FastAPI(title="Chat", lifespan=manager.lifespan)
app.include_router(stats_router, prefix="/ws-stats")  # open to all in this demo; elsewhere add `dependencies=[...]`


class Person(BaseModel):
    id: str
    name: str
    away: bool = False


class Say(BaseModel):
    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]
    key: Annotated[str, StringConstraints(max_length=40)] = ""
    """Chosen by the sender, so that its page knows its own message when the room repeats it."""


# By client id. Each tab makes up a random client id, apart from the name, so that two people called Ann can both be
# here: a client id that connects again replaces its older connection. Other people see a digest of it only.
members: dict[str, Person] = {}


async def tell(kind: str, person: Person, **more: object) -> None:
    """Tell the room about a member. Newcomers get the list of members, so this need not be in the room's history."""
    event = {"type": kind, "who": person, "people": list(members.values()), **more}
    await manager.broadcast(event, room=ROOM, history=False)


async def welcome(ws: StableSocket) -> None:
    await ws.send({"type": "welcome", "you": members[ws.client_id], "people": list(members.values())}, volatile=True)


@manager.on_connect  # a new session
async def arrive(ws: StableSocket) -> None:
    name = " ".join(ws.query_params.get("name", "").split())
    if not 1 <= len(name) <= MAX_NAME:
        raise HTTPException(400, f"A name has 1 to {MAX_NAME} characters.")  # closes with 4400
    known = members.get(ws.client_id)  # the page was loaded again
    digest = hashlib.sha256(ws.client_id.encode()).hexdigest()[:8]
    person = members[ws.client_id] = Person(id=digest, name=name)
    await welcome(ws)
    await ws.join(ROOM, history=20)
    if known is None or known.away:
        await tell("joined" if known is None else "back", person)


@manager.on_disconnect  # the session waits for its client
async def go_away(ws: StableSocket, reason: DisconnectReason) -> None:
    person = members.get(ws.client_id)
    if person is not None and reason is not DisconnectReason.REPLACED:
        person.away = True
        await tell("away", person, why=reason)


@manager.on_resume  # the same session, with a new connection
async def come_back(ws: StableSocket) -> None:
    members[ws.client_id].away = False
    await welcome(ws)
    await tell("back", members[ws.client_id])


@manager.on_session_end  # the client said goodbye, or did not come back within `session_ttl`
async def leave(ws: StableSocket, reason: DisconnectReason) -> None:
    if manager.get_sockets(ws.client_id):
        return  # a newer session of the same tab has replaced this one
    person = members.pop(ws.client_id, None)
    if person is not None:
        await tell("left", person, why=reason)


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
