"""A server that sends on a schedule, and when a route of the app is called."""

import asyncio
import time
from typing import Any

from fastapi import FastAPI, HTTPException

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConnectionManager

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)


@app.websocket("/clock/{client_id}")
async def clock(ws: StableSocketDep) -> None:
    ws.ignore_messages()  # this endpoint only sends
    while True:  # send raises SocketClosed after the client disconnects; let it escape
        await ws.send({"type": "tick", "time": time.time()})
        await asyncio.sleep(1)


@app.websocket("/both/{client_id}")
async def both(ws: StableSocketDep) -> None:
    async def ticks() -> None:
        while True:
            await ws.send({"type": "tick", "time": time.time()})
            await asyncio.sleep(1)

    ws.create_task(ticks())  # cancelled when the connection ends
    async for message in ws:
        await ws.send({"type": "echo", "message": message})


@app.post("/notify/{client_id}")
async def notify(client_id: str, message: dict[str, Any]) -> dict[str, bool]:
    if not await manager.send_to_client(client_id, message):
        raise HTTPException(404, f"{client_id} is not connected")
    return {"queued": True}


@app.post("/announce")
async def announce(message: dict[str, Any]) -> dict[str, int]:
    result = await manager.broadcast(message)
    return {"queued": result.succeeded, "failed": result.failed}
