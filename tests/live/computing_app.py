"""Endpoints and handlers that block the event loop between sends, as a model does for each token."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, WebSocket

from fastapi_ws_stabilizer import StableSocket, StableSocketDep, WebSocketConfig, WebSocketConnectionManager
from tests.live.computing import STEPS

FOLDER = Path(os.environ["COMPUTING_FOLDER"])

manager = WebSocketConnectionManager(WebSocketConfig(heartbeat_type="off", room_history=10))
app = FastAPI(lifespan=manager.lifespan)


def compute(step: int) -> None:
    """Block the event loop until the client confirms what was sent before, for at most 3 s."""
    deadline = time.monotonic() + 3
    while not (FOLDER / str(step)).exists():
        if time.monotonic() > deadline:
            (FOLDER / "late").touch()
            return
        time.sleep(0.002)


async def speak(ws: StableSocket, call: str) -> None:
    for step in range(STEPS):
        if call == "send":
            await ws.send({"step": step})
        elif call == "send_json":
            await ws.send_json({"step": step})
        elif call == "send_text":
            await ws.send_text(f'{{"step":{step}}}')
        elif call == "send_bytes":
            await ws.send_bytes(b'{"step":%d}' % step)
        elif call == "keyed":
            await ws.send({"step": step}, coalesce_key="progress")
        elif call == "volatile":
            await ws.send({"step": step}, volatile=True)
        elif call == "to_client":
            await manager.send_to_client(ws.client_id, {"step": step})
        elif call == "two":
            await ws.send({"before": step})
            await ws.send({"step": step})
        elif call == "after broadcast":
            await manager.broadcast({"before": step})
            await ws.send({"step": step})
        elif call == "websocket":
            await ws.websocket.send_json({"step": step})
        elif call == "history":
            await manager.broadcast({"step": step}, room=f"room-{step}")
            await ws.join(f"room-{step}", history=1)
        compute(step)


@manager.on_message("speak")
async def handler(ws: StableSocket, message: dict[str, Any]) -> None:
    await speak(ws, message["call"])


@manager.on_message("ask")
async def answer(ws: StableSocket, message: dict[str, Any]) -> dict[str, int]:
    if message["step"]:  # the answer to the previous message is sent
        compute(message["step"] - 1)
    return {"step": message["step"]}


@app.websocket("/endpoint/{client_id}")
async def endpoint(ws: StableSocketDep, call: str) -> None:
    await speak(ws, call)


@app.websocket("/handler/{client_id}")
async def run(ws: StableSocketDep) -> None:
    await ws.run()


@app.websocket("/adopt/{client_id}")
async def adopt(websocket: WebSocket, client_id: str) -> None:
    await websocket.accept()
    await manager.connect(client_id, websocket)
    for step in range(STEPS):
        await websocket.send_json({"step": step})
        compute(step)
