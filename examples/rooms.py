"""Rooms, and who is in them: a client joins, speaks to its room, and sees who comes and goes."""

from typing import Annotated

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from fastapi_ws_stabilizer import Presence, Room, StableSocket, StableSocketDep, WebSocketConnectionManager

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)

RoomName = Annotated[str, Field(min_length=1, max_length=64)]


class Join(BaseModel):
    room: RoomName
    name: Annotated[str, Field(max_length=40)]


class Leave(BaseModel):
    room: RoomName


class Say(BaseModel):
    room: RoomName
    text: str


@manager.on_message("join")  # {"type": "join", "room": "lobby", "name": "Ann"}
async def join(ws: StableSocket, message: Join) -> None:
    people = await ws.join(message.room, {"name": message.name})
    here = [{"id": who.client_id, **who.metadata} for who in people]
    await ws.send({"type": "here", "room": message.room, "people": here})


@manager.on_message("leave")
async def leave(ws: StableSocket, message: Leave) -> None:
    await ws.leave(message.room)


@manager.on_message("say")
async def say(ws: StableSocket, message: Say) -> None:
    if message.room not in ws.rooms:  # joining is what your rules can refuse, so speaking needs it
        await ws.send({"type": "refused", "room": message.room})
        return
    await manager.room(message.room).send({"type": "said", "who": ws.client_id, "text": message.text}, exclude=ws)


@manager.on_join  # once for a person, however many tabs it has
async def came(room: Room, who: Presence) -> None:
    await room.send({"type": "came", "room": room.name, "who": who.client_id}, exclude=who.client_id)


@manager.on_leave  # not for a reload: a connection that broke has `presence_grace` to come back
async def went(room: Room, who: Presence) -> None:
    if room:
        await room.send({"type": "went", "room": room.name, "who": who.client_id})


@app.get("/rooms/{name}")
async def who_is_in(name: str) -> dict[str, list[str]]:
    room = manager.room(name)
    if not room:
        raise HTTPException(404, "nobody is there")
    return {"clients": room.clients}


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
