"""Rooms with presence, typing, a moderator, and a database session for each message."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import StaticPool

from fastapi_ws_stabilizer import (
    Presence,
    Room,
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
)

manager = WebSocketConnectionManager(WebSocketConfig(room_history=20, presence_grace=0.3, session_ttl=20))
engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
new_session = async_sessionmaker(engine)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE lines (room TEXT, client TEXT, line TEXT)"))
    async with manager.lifespan(app) as state:
        yield state
    await engine.dispose()


app = FastAPI(lifespan=lifespan)

RoomName = Annotated[str, Field(min_length=1, max_length=64)]


class Join(BaseModel):
    room: RoomName


class Say(BaseModel):
    room: RoomName
    line: Annotated[str, Field(max_length=500)]


def with_database(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Give a handler a database session, committed when it returns and rolled back when it raises."""

    @functools.wraps(handler)
    async def wrapped(ws: StableSocket, message: Any) -> Any:
        async with new_session() as database, database.begin():
            return await handler(ws, message, database)

    return wrapped


@manager.on_message("join")
async def join(ws: StableSocket, message: Join) -> None:
    await ws.join(message.room, history=10)
    await ws.send({"type": "here", "clients": manager.room(message.room).clients})


@manager.on_message("say")
@with_database
async def say(ws: StableSocket, message: Say, database: AsyncSession) -> None:
    if message.room not in ws.rooms:
        await ws.send({"type": "refused"})
        return
    values = {"room": message.room, "client": ws.client_id, "line": message.line}
    await database.execute(text("INSERT INTO lines VALUES (:room, :client, :line)"), values)
    if message.line == "fail":
        raise RuntimeError("rolled back")
    await manager.room(message.room).send({"type": "said", "who": ws.client_id, "line": message.line})


@manager.on_message("typing")
async def typing(ws: StableSocket, message: Join) -> None:
    """Tell the connected members. Detached members and new ones do not get it."""
    event = {"type": "typing", "who": ws.client_id}
    await manager.broadcast(event, room=message.room, exclude=ws.client_id, volatile=True)


@manager.on_join
async def came(room: Room, presence: Presence) -> None:
    await room.send({"type": "came", "who": presence.client_id}, exclude=presence.client_id, history=False)


@manager.on_leave
async def went(room: Room, presence: Presence) -> None:
    await room.send({"type": "went", "who": presence.client_id}, history=False)


@app.post("/rooms/{name}/kick/{client_id}")
async def kick(name: str, client_id: str) -> None:
    """Take a member out of a room, connected or away."""
    if not await manager.room(name).remove(client_id):
        raise HTTPException(404, "no such member")


@app.post("/ban/{client_id}")
async def ban(client_id: str) -> None:
    """End a client's connection or session; it hears the code, at once or when it comes back."""
    await manager.disconnect(client_id, 4403, "banned")


@app.get("/lines")
async def lines() -> list[str]:
    async with new_session() as database:
        return list((await database.execute(text("SELECT line FROM lines"))).scalars())


@app.get("/rooms/{name}")
async def members(name: str) -> list[str]:
    room = manager.room(name)
    if not room:
        raise HTTPException(404, "no such room")
    return room.clients


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
