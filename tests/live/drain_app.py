"""App of the drain tests, which prints what ran before the lifespan ended."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from fastapi_ws_stabilizer import DisconnectReason, StableSocket, StableSocketDep, stats_router
from tests.support.live_apps import manager_from_env

manager = manager_from_env(logs=False)
counts = {"hooks": 0, "clean-ups": 0}
reasons: list[str] = []
ended_at: list[float] = []
"""Time of each `on_disconnect`, on the monotonic clock that all processes share."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with manager.lifespan(app) as state:
        yield state
    print("LIFESPAN ended", json.dumps(counts), flush=True)
    print("REASONS", json.dumps(reasons), flush=True)
    print("ENDED AT", json.dumps(ended_at), flush=True)


app = FastAPI(lifespan=lifespan)
app.include_router(stats_router, prefix="/ws-stats")


@manager.on_disconnect
async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
    counts["hooks"] += 1
    ended_at.append(time.monotonic())
    if len(reasons) < 10:
        reasons.append(f"{ws.client_id} {reason.value}")


@manager.on_session_end
async def session_ended(ws: StableSocket, reason: DisconnectReason) -> None:
    if len(reasons) < 10:
        reasons.append(f"{ws.client_id} session {reason.value}")


@manager.events.subscribe
def print_shutdown(event: Any) -> None:
    if event.event in ("drain_started", "shutdown"):
        print(event.event.upper(), json.dumps(dict(event.fields)), flush=True)


@manager.on_message("say")
async def say(ws: StableSocket, message: int) -> int:
    return message


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    try:
        await ws.run()
    finally:
        counts["clean-ups"] += 1
