"""Rooms with presence: a client joins, sends to its room, and learns when other clients join and leave."""

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
    present = await ws.join(message.room, {"name": message.name})
    clients = [{"id": presence.client_id, **presence.metadata} for presence in present]
    await ws.send({"type": "presence", "room": message.room, "clients": clients})


@manager.on_message("leave")
async def leave(ws: StableSocket, message: Leave) -> None:
    await ws.leave(message.room)


@manager.on_message("say")
async def say(ws: StableSocket, message: Say) -> None:
    if message.room not in ws.rooms:  # your rules are checked at the join, so sending requires one
        await ws.send({"type": "rejected", "room": message.room})
        return
    await manager.room(message.room).send({"type": "said", "who": ws.client_id, "text": message.text}, exclude=ws)


@manager.on_join  # once for each client id, also with several tabs
async def joined(room: Room, presence: Presence) -> None:
    await room.send({"type": "joined", "room": room.name, "who": presence.client_id}, exclude=presence.client_id)


@manager.on_leave  # not for a reload: after a lost connection a client has `presence_grace` to reconnect
async def left(room: Room, presence: Presence) -> None:
    if room:
        await room.send({"type": "left", "room": room.name, "who": presence.client_id})


@app.get("/rooms/{name}")
async def clients_in_room(name: str) -> dict[str, list[str]]:
    room = manager.room(name)
    if not room:
        raise HTTPException(404, "no such room")
    return {"clients": room.clients}


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
