"""App of the tests of the garbage collector, which records full collections and the state after the shutdown."""

from __future__ import annotations

import gc
import json
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from fastapi_ws_stabilizer import StableSocketDep
from tests.support.live_apps import manager_from_env

manager = manager_from_env()
full: list[int] = []
"""Open connections at the start of each full collection."""


def record(phase: str, info: dict[str, int]) -> None:
    if phase == "start" and info["generation"] == 2:
        full.append(manager.get_connection_count())


def collector() -> dict[str, Any]:
    return {"thresholds": gc.get_threshold(), "frozen": gc.get_freeze_count(), "callbacks": len(gc.callbacks)}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.callbacks.append(record)
    gc.collect()
    before = collector()
    async with manager.lifespan(app) as state:
        yield state
    print("collector", json.dumps([before, collector()]), flush=True)


app = FastAPI(lifespan=lifespan)


@app.get("/probe")
async def probe() -> dict[str, Any]:
    return {"full": full, "connections": manager.get_connection_count(), **collector()}


@app.websocket("/ws")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
