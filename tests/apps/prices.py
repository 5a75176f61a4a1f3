"""A price board: one publisher for all, newest prices only, and statistics behind a password."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from fastapi_ws_stabilizer import (
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
    stats_router,
)

manager = WebSocketConnectionManager(
    WebSocketConfig(outbox_max_messages=64, outbox_max_bytes=64_000, send_timeout=1, enable_metrics=True)
)
PADDING = "x" * 2_000  # other fields of a price; they fill the buffers of a client that does not read


async def publish() -> None:
    """Broadcast prices for ever. A client that does not read is no reason to stop, so nothing is caught here."""
    for number in itertools.count():
        await manager.broadcast({"type": "price", "number": number, "more": PADDING}, room="prices")
        await asyncio.sleep(0.002)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with manager.lifespan(app) as state:
        publisher = asyncio.create_task(publish())
        yield state
        publisher.cancel()


app = FastAPI(lifespan=lifespan)


def admin(credentials: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> None:
    if not secrets.compare_digest(credentials.password.encode(), b"password of the admin"):
        raise HTTPException(401)


app.include_router(stats_router, prefix="/ws-stats", dependencies=[Depends(admin)])


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.join("prices")
    await ws.wait_closed()
