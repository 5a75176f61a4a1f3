"""The app of the drain tests: says what ran before the lifespan ended."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from fastapi_ws_stabilizer import DisconnectReason, StableSocket, StableSocketDep, WebSocketConfig, stats_router
from fastapi_ws_stabilizer import WebSocketConnectionManager as Manager

manager = Manager(WebSocketConfig(**json.loads(os.environ.get("TEST_WS_CONFIG", "{}"))))
counts = {"hooks": 0, "clean-ups": 0}
stolen = 0.0
"""Seconds, since the drain began, for which the event loop once stood still while this process was not at work."""

LOOKS = 0.01


async def watch_the_machine() -> None:
    """Note what the machine takes: how late the event loop is, without what this process has done meanwhile."""
    global stolen
    while True:
        before, worked = time.monotonic(), time.process_time()
        await asyncio.sleep(LOOKS)
        stolen = max(stolen, time.monotonic() - before - LOOKS - (time.process_time() - worked))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with manager.lifespan(app) as state:
        watching = asyncio.create_task(watch_the_machine())
        yield state
    watching.cancel()
    print("LIFESPAN over", json.dumps(counts), flush=True)
    print("MACHINE", json.dumps({"stolen": stolen}), flush=True)


app = FastAPI(lifespan=lifespan)
app.include_router(stats_router, prefix="/ws-stats")


@manager.on_disconnect
async def gone(ws: StableSocket, reason: DisconnectReason) -> None:
    counts["hooks"] += 1


@manager.reports.subscribe
def tell(report: Any) -> None:
    global stolen
    if report.event == "drain_started":
        stolen = 0.0
    if report.event in ("drain_started", "shutdown"):
        print(report.event.upper(), json.dumps(dict(report.facts)), flush=True)


@manager.on_message("say")
async def say(ws: StableSocket, message: int) -> int:
    return message


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    try:
        await ws.run()
    finally:
        counts["clean-ups"] += 1
