"""Endpoints that do not read what their clients send."""

from __future__ import annotations

import asyncio
import json
import os

from fastapi import FastAPI

from fastapi_ws_stabilizer import (
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
    stats_router,
)

options = {"heartbeat_type": "off"} | json.loads(os.environ.get("TEST_UNREAD_CONFIG", "{}"))
manager = WebSocketConnectionManager(WebSocketConfig(inbox_max_messages=8, inbox_pause_timeout=1, **options))
app = FastAPI(lifespan=manager.lifespan)
app.include_router(stats_router, prefix="/ws-stats")


@app.websocket("/{behaviour}/{client_id}")
async def endpoint(ws: StableSocketDep, behaviour: str) -> None:
    if behaviour == "waits":
        await ws.wait_closed()
    elif behaviour == "hangs":
        await ws.receive()
        await asyncio.Event().wait()
    elif behaviour == "works":
        ws.create_task(ws.run())
        await ws.wait_closed()
    elif behaviour == "subscribed":
        await ws.receive()
    elif behaviour == "ignores":
        ws.ignore_messages()
    while True:
        await ws.send("tick")
        await asyncio.sleep(0.05)


@manager.on_message("ask")
async def ask(ws: StableSocket, number: int) -> int:
    """Answer a request with its number."""
    return number


@app.post("/broadcast")
async def broadcast() -> int:
    return (await manager.broadcast("news")).succeeded
