"""Messages to clients from other threads: a `def` route, and a thread that reads a sensor."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException

from fastapi_ws_stabilizer import ConnectionNotFoundError, StableSocketDep, WebSocketConnectionManager

manager = WebSocketConnectionManager()


def read_sensor(stopped: threading.Event) -> None:
    """Send readings from a separate thread, where the callbacks of an MQTT client run too."""
    while not stopped.wait(0.5):
        manager.from_thread.broadcast({"type": "temperature", "celsius": 21.5}, room="sensors", volatile=True)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    stopped = threading.Event()
    thread = threading.Thread(target=read_sensor, args=(stopped,))
    async with manager.lifespan(app) as state:
        thread.start()
        yield state
        stopped.set()
        await asyncio.to_thread(thread.join)  # before the event loop that the thread calls stops


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.join("sensors")
    await ws.run()


@app.post("/announce")
def announce(text: str) -> dict[str, int]:  # not async: FastAPI runs it in the thread pool
    result = manager.from_thread.broadcast({"type": "announcement", "text": text})
    return {"queued": result.succeeded}


@app.post("/kick/{client_id}")
def kick(client_id: str) -> None:
    try:
        manager.from_thread.disconnect(client_id, 4403, "kicked")
    except ConnectionNotFoundError as error:
        raise HTTPException(404, str(error)) from error
