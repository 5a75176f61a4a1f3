"""App with rooms, which announces joins and leaves to the room and reports slow clients in its probe."""

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
    entries = await ws.join(message.room, {"mood": message.text})
    await ws.send({"type": "present", "clients": {entry.client_id: entry.connections for entry in entries}})


@manager.on_message("presence")
async def list_present(ws: StableSocket, message: InRoom) -> None:
    entries = manager.room(message.room).presence
    await ws.send({"type": "present", "clients": {entry.client_id: entry.connections for entry in entries}})


@manager.on_message("leave")
async def leave(ws: StableSocket, message: InRoom) -> None:
    await ws.leave(message.room)


@manager.on_message("say")
async def say(ws: StableSocket, message: InRoom) -> None:
    await manager.broadcast({"type": "said", "from": ws.client_id, "text": message.text}, room=message.room, exclude=ws)


@manager.on_join
async def joined(room: Room, entry: Presence) -> None:
    await room.send(
        {"type": "joined", "client_id": entry.client_id, "mood": entry.metadata["mood"]}, exclude=entry.client_id
    )
    events.append(f"joined {entry.client_id}")


@manager.on_leave
async def left(room: Room, entry: Presence) -> None:
    events.append(f"left {entry.client_id}")
    if room:
        await room.send({"type": "left", "client_id": entry.client_id})


@manager.on_slow
async def slow(ws: StableSocket, state: SlowConsumer) -> None:
    events.append(f"slow {ws.client_id} {state.value}")


@manager.on_disconnect
async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
    events.append(f"disconnect {ws.client_id} {reason.value}")


@app.post("/send/{room}")
async def send(room: str, first: int, count: int, size: int, key: str | None = None) -> list[dict[str, Any]]:
    """Send numbered messages to a room, and return the result of each."""
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
