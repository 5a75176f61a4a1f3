"""App with handlers that query a database through SQLAlchemy and aiosqlite, and a route for the pool's state."""

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
"""Number of cancellations of each query that was cancelled."""

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
    """Run two slow queries, and count the calls that begin and that finish."""
    counts["begun"] += 1
    await session.execute(SLOW, {"rows": rows})
    await session.execute(SLOW, {"rows": rows})
    counts["finished"] += 1


@contextmanager
def recorded_cancellations() -> Iterator[None]:
    """Record how often a cancelled task was cancelled, in its query and while its session closed."""
    task: Any = asyncio.current_task()
    try:
        yield
    except asyncio.CancelledError:
        cancelled.append(task.cancelling() if hasattr(task, "cancelling") else 1)
        raise


@manager.on_message("ask")
async def handle_ask(ws: StableSocket, message: dict[str, Any]) -> None:
    with recorded_cancellations():
        async with new_session() as session:
            await ask(session, message["rows"])


async def database_session() -> AsyncIterator[AsyncSession]:
    async with new_session() as session:
        yield session


@app.websocket("/handler/{client_id}")
async def run_handlers(ws: StableSocketDep) -> None:
    await ws.run()


@app.websocket("/dependency/{client_id}")
async def use_dependency(session: Annotated[AsyncSession, Depends(database_session)], ws: StableSocketDep) -> None:
    with recorded_cancellations():
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
