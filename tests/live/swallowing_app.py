"""App with a signal handler that stops nothing."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConfig, WebSocketConnectionManager

manager = WebSocketConnectionManager(WebSocketConfig(drain_window=0))


def swallow(number: int, frame: Any) -> None:
    print("SWALLOWED", flush=True)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
    signal.signal(signal.SIGTERM, swallow)
    async with manager.lifespan(app) as state:
        yield state


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
