"""Endpoints that do not read what their clients send."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConfig, WebSocketConnectionManager, stats_router

manager = WebSocketConnectionManager(WebSocketConfig(inbox_max_messages=8, inbox_pause_timeout=1, heartbeat_type="off"))
app = FastAPI(lifespan=manager.lifespan)
app.include_router(stats_router, prefix="/ws-stats")


@app.websocket("/{how}/{client_id}")
async def endpoint(ws: StableSocketDep, how: str) -> None:
    if how == "waits":
        await ws.wait_closed()
    elif how == "subscribed":
        await ws.receive()
    elif how == "ignores":
        ws.ignore_messages()
    while True:
        await ws.send("tick")
        await asyncio.sleep(0.05)


@app.post("/broadcast")
async def broadcast() -> int:
    return (await manager.broadcast("news")).succeeded
