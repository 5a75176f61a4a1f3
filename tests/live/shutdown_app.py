"""App with a route that shuts its manager down."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI

from fastapi_ws_stabilizer import DisconnectReason, StableSocket, StableSocketDep, WebSocketConnectionManager

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)
disconnects: list[str] = []


@manager.on_disconnect
async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
    if ws.client_id == "hangs":
        await asyncio.sleep(3600)
    await asyncio.sleep(0.1)
    disconnects.append(f"{ws.client_id} {reason.value}")


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


@app.post("/shutdown")
async def shutdown(timeout: float) -> dict[str, Any]:
    report = await manager.graceful_shutdown(timeout)
    return {**asdict(report), "disconnects": sorted(disconnects)}
