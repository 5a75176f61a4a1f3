"""A database session for each message: SQLAlchemy in handlers, hooks and endpoints."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from fastapi_ws_stabilizer import StableSocket, StableSocketDep, WebSocketConnectionManager

engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite://"))
new_session = async_sessionmaker(engine)
manager = WebSocketConnectionManager()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS lines (author TEXT, line TEXT)"))
    async with manager.lifespan(app) as state:  # the sockets close before the engine does
        yield state
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


class Say(BaseModel):
    line: str


@manager.on_connect
async def load(ws: StableSocket) -> None:
    async with new_session() as database:
        rows = await database.execute(text("SELECT author, line FROM lines ORDER BY rowid DESC LIMIT 10"))
        latest = [{"author": author, "line": line} for author, line in reversed(rows.all())]
    await ws.send({"type": "latest", "lines": latest})


@manager.on_message("say")
async def say(ws: StableSocket, message: Say) -> None:
    said = {"author": ws.client_id, "line": message.line}
    async with new_session() as database, database.begin():  # commits, or rolls back if something raises
        await database.execute(text("INSERT INTO lines VALUES (:author, :line)"), said)
    await manager.broadcast({"type": "said", **said})  # after the commit


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


async def get_database() -> AsyncIterator[AsyncSession]:
    async with new_session() as database:
        yield database


@app.get("/lines")  # an HTTP route: one session for each request
async def lines(database: Annotated[AsyncSession, Depends(get_database)]) -> list[str]:
    return list((await database.execute(text("SELECT line FROM lines"))).scalars())


@app.websocket("/own-loop/{client_id}")  # one session for the connection: a transaction for each message
async def own_loop(ws: StableSocketDep, database: Annotated[AsyncSession, Depends(get_database)]) -> None:
    async for message in ws:
        async with database.begin():
            said = {"author": ws.client_id, "line": str(message)}
            await database.execute(text("INSERT INTO lines VALUES (:author, :line)"), said)
        await ws.send("stored")
