"""An app whose handlers ask a database, by SQLAlchemy and aiosqlite, and tell what became of its pool."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from fastapi_ws_stabilizer import (
    StableSocket,
    StableSocketDep,
)
from tests.support.live_apps import manager_from_env

manager = manager_from_env()
engine = create_async_engine(
    f"sqlite+aiosqlite:///{os.environ['TEST_DATABASE']}",
    poolclass=AsyncAdaptedQueuePool,
    pool_size=5,
    max_overflow=10,
    pool_timeout=10,
)
new_session = async_sessionmaker(engine)
counts = {"begun": 0, "finished": 0}
cancelled: list[int] = []
"""How many cancellations each query has got that got one."""

SLOW = text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows) SELECT count(*) FROM n")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS notes (note TEXT)"))
    async with manager.lifespan(app) as state:
        yield state
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


async def ask(session: AsyncSession, rows: int) -> None:
    """Write something, ask something slow, and count how it ended."""
    counts["begun"] += 1
    await session.execute(SLOW, {"rows": rows})
    await session.execute(SLOW, {"rows": rows})
    counts["finished"] += 1


@contextmanager
def counted_cancellations() -> Iterator[None]:
    """Note how often a task was cancelled that was: in its query, and while its session was closed after it."""
    task: Any = asyncio.current_task()
    try:
        yield
    except asyncio.CancelledError:
        cancelled.append(task.cancelling() if hasattr(task, "cancelling") else 1)
        raise


@manager.on_message("ask")
async def in_a_handler(ws: StableSocket, message: dict[str, Any]) -> None:
    with counted_cancellations():
        async with new_session() as session:
            await ask(session, message["rows"])


async def a_session() -> AsyncIterator[AsyncSession]:
    async with new_session() as session:
        yield session


@app.websocket("/handler/{client_id}")
async def with_handlers(ws: StableSocketDep) -> None:
    await ws.run()


@app.websocket("/dependency/{client_id}")
async def with_a_dependency(session: Annotated[AsyncSession, Depends(a_session)], ws: StableSocketDep) -> None:
    with counted_cancellations():
        async for message in ws:
            await ask(session, json.loads(message)["rows"])


@app.get("/pool")
async def pool() -> dict[str, Any]:
    return {
        **counts,
        "cancelled": cancelled,
        "checked_out": engine.pool.checkedout(),  # type: ignore[attr-defined]
        "connections": manager.get_connection_count(),
        "unfinished": len(manager._node.connections),
    }
