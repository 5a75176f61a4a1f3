"""App with handshakes that hang in user code while the server stops or the client disconnects."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from typing import Any

from fastapi import Depends, FastAPI, WebSocket

from fastapi_ws_stabilizer import DisconnectReason, StableSocket, StableSocketDep
from tests.support.live_apps import manager_from_env

manager = manager_from_env(logs=False)
app = FastAPI(lifespan=manager.lifespan)
events: list[str] = []


@manager.on_handshake
async def handshake(ws: StableSocket) -> None:
    if ws.client_id == "hangs":
        await hang()


@manager.on_auth
async def auth(ws: StableSocket, credential: str | None) -> None:
    if ws.client_id == "auth":
        await hang()


@manager.on_connect
async def connected(ws: StableSocket) -> None:
    if ws.client_id == "drains in connect":
        events.append(f"drained {asdict(await manager.drain())}")


@manager.on_disconnect
async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
    events.append(f"disconnect {ws.client_id} {reason.value}")


@manager.on_message("drain")
async def drain_in_handler(ws: StableSocket) -> None:
    events.append(f"drained {asdict(await manager.drain())}")


@manager.on_message("shut down")
async def shut_down_in_handler(ws: StableSocket) -> None:
    report = await manager.graceful_shutdown()
    events.append(f"drained {asdict(report)}")
    print("SHUT DOWN", json.dumps(asdict(report)), flush=True)


async def hang() -> None:
    events.append("hangs")
    try:
        await asyncio.sleep(3600)
    finally:
        events.append("cancelled")


async def never() -> str:
    await hang()
    return "never"


def slow_in_thread() -> str:
    events.append("hangs")
    time.sleep(4)
    return "slow"


async def ignore_one_cancellation() -> str:
    events.append("hangs")
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        events.append("ignored")
    return "stubborn"


@app.websocket("/hook/{client_id}")
async def by_hook(ws: StableSocketDep) -> None:
    events.append(f"served {ws.client_id}")
    await ws.run()


@app.websocket("/identity")
async def by_identity(ws: StableSocket = Depends(manager.socket_for(never))) -> None:
    await ws.run()


@app.websocket("/thread")
async def by_thread(ws: StableSocket = Depends(manager.socket_for(slow_in_thread))) -> None:
    await ws.run()


@app.websocket("/stubborn")
async def by_stubborn(ws: StableSocket = Depends(manager.socket_for(ignore_one_cancellation))) -> None:
    await ws.run()


@app.websocket("/endpoint/{client_id}")
async def by_endpoint(ws: StableSocketDep) -> None:
    await ws.receive()
    events.append(f"drained {asdict(await manager.drain())}")


@app.websocket("/adopt/{client_id}")
async def adopt(websocket: WebSocket, client_id: str) -> None:
    await websocket.accept()
    await manager.connect(client_id, websocket)
    while True:
        await websocket.receive_text()


@app.get("/probe")
async def probe() -> dict[str, Any]:
    return {
        "handshakes": len(manager._node.admission._handshakes),
        "connections": manager.get_connection_count(),
        "events": events,
    }


@app.post("/drain")
async def drain() -> dict[str, Any]:
    return asdict(await manager.drain())
