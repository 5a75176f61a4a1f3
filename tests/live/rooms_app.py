"""An app with rooms, whose hooks tell the room who has come and gone, and its probe who was slow."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from fastapi_ws_stabilizer import (
    DisconnectReason,
    Presence,
    Room,
    SlowConsumer,
    StableSocket,
    StableSocketDep,
)
from tests.support.live_apps import manager_from_env

manager = manager_from_env()
app = FastAPI(lifespan=manager.lifespan)
events: list[str] = []


class InRoom(BaseModel):
    room: str
    text: str = ""


@manager.on_message("join")
async def join(ws: StableSocket, message: InRoom) -> None:
    people = await ws.join(message.room, {"mood": message.text})
    await ws.send({"type": "here", "people": {who.client_id: who.connections for who in people}})


@manager.on_message("who")
async def list_present(ws: StableSocket, message: InRoom) -> None:
    people = manager.room(message.room).presence
    await ws.send({"type": "here", "people": {who.client_id: who.connections for who in people}})


@manager.on_message("leave")
async def leave(ws: StableSocket, message: InRoom) -> None:
    await ws.leave(message.room)


@manager.on_message("say")
async def say(ws: StableSocket, message: InRoom) -> None:
    await manager.broadcast({"type": "said", "who": ws.client_id, "text": message.text}, room=message.room, exclude=ws)


@manager.on_join
async def came(room: Room, who: Presence) -> None:
    await room.send({"type": "came", "who": who.client_id, "mood": who.metadata["mood"]}, exclude=who.client_id)
    events.append(f"came {who.client_id}")


@manager.on_leave
async def went(room: Room, who: Presence) -> None:
    events.append(f"went {who.client_id}")
    if room:
        await room.send({"type": "went", "who": who.client_id})


@manager.on_slow
async def slow(ws: StableSocket, how: SlowConsumer) -> None:
    events.append(f"slow {ws.client_id} {how.value}")


@manager.on_disconnect
async def gone(ws: StableSocket, reason: DisconnectReason) -> None:
    events.append(f"disconnect {ws.client_id} {reason.value}")


@app.post("/tell/{room}")
async def tell(room: str, first: int, count: int, size: int, key: str | None = None) -> list[dict[str, Any]]:
    """Send numbered messages to a room, and say what became of each."""
    return [
        asdict(await manager.broadcast(f"{number:08d}".ljust(size, "x"), room=room, coalesce_key=key))
        for number in range(first, first + count)
    ]


@app.get("/probe")
async def probe() -> dict[str, Any]:
    return {
        "connections": manager.get_connection_count(),
        "rooms": {name: manager.room(name).clients for name in manager.get_rooms()},
        "events": events,
        "dropped": manager.counters.messages_dropped,
        "coalesced": manager.counters.messages_coalesced,
    }


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
