"""App of the memory tests, which stores user data on request and reports its memory."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, WebSocket

from fastapi_ws_stabilizer import (
    DisconnectReason,
    MemoryLimitExceededError,
    StableSocket,
    StableSocketDep,
)
from tests.support.live_apps import manager_from_env

manager = manager_from_env()
app = FastAPI(lifespan=manager.lifespan)
events: list[str] = []


@manager.on_disconnect
async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
    events.append(f"disconnect {ws.client_id} {reason.value}")
    if ws.client_id == "slow":
        await asyncio.sleep(3)
    events.append(f"hook done {ws.client_id}")


@manager.on_message("store")
async def store(ws: StableSocket, message: dict[str, Any]) -> None:
    ws.user_data[message["key"]] = "x" * message["size"]
    await ws.send("stored")


@app.post("/store/{client_id}")
async def store_for(client_id: str, size: int, key: str = "data") -> dict[str, Any]:
    """Store bytes for a client, three containers deep."""
    try:
        await manager.set_user_data(client_id, key, {"a": [{"b": bytearray(size)}]})
    except MemoryLimitExceededError as error:
        return {"refused": error.option, "limit": error.limit}
    return {"stored": size}


@app.post("/push/{client_id}/{count}")
async def push(client_id: str, count: int, size: int) -> bool:
    return all([await manager.send_to_client(client_id, "x" * size) for _ in range(count)])


@app.post("/broadcast/{count}")
async def broadcast(count: int, size: int) -> None:
    for _ in range(count):
        await manager.broadcast("x" * size)


@app.get("/keys/{client_id}")
async def keys(client_id: str) -> list[str]:
    return [key for socket in manager.get_sockets(client_id) for key in socket.user_data]


@app.get("/probe")
async def probe() -> dict[str, Any]:
    return {
        **manager.get_memory_usage(),
        "events": events,
        "clients": manager.get_active_connections(),
        "evictions": manager.counters.evictions,
    }


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


@app.websocket("/adopt/{client_id}/{size}")
async def adopt(websocket: WebSocket, client_id: str, size: int) -> None:
    await websocket.accept()
    started = time.monotonic()
    await manager.connect(client_id, websocket, {"data": bytearray(size)})
    await websocket.send_text(str(time.monotonic() - started))
    await websocket.receive_text()
