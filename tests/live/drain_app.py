"""The app of the drain tests: says what ran before the lifespan ended."""

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
"""When the end of each connection was told, on the clock that all processes share."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with manager.lifespan(app) as state:
        yield state
    print("LIFESPAN over", json.dumps(counts), flush=True)
    print("REASONS", json.dumps(reasons), flush=True)
    print("ENDED AT", json.dumps(ended_at), flush=True)


app = FastAPI(lifespan=lifespan)
app.include_router(stats_router, prefix="/ws-stats")


@manager.on_disconnect
async def gone(ws: StableSocket, reason: DisconnectReason) -> None:
    counts["hooks"] += 1
    ended_at.append(time.monotonic())
    if len(reasons) < 10:
        reasons.append(f"{ws.client_id} {reason.value}")


@manager.on_session_end
async def session_over(ws: StableSocket, reason: DisconnectReason) -> None:
    if len(reasons) < 10:
        reasons.append(f"{ws.client_id} session {reason.value}")


@manager.events.subscribe
def tell(report: Any) -> None:
    if report.event in ("drain_started", "shutdown"):
        print(report.event.upper(), json.dumps(dict(report.fields)), flush=True)


@manager.on_message("say")
async def say(ws: StableSocket, message: int) -> int:
    return message


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    try:
        await ws.run()
    finally:
        counts["clean-ups"] += 1
