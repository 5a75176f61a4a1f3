"""App that counts how many connections open and close in one event loop iteration."""

from __future__ import annotations

import asyncio
import time

from fastapi import FastAPI

from fastapi_ws_stabilizer import StableSocket, StableSocketDep, WebSocketConfig, WebSocketConnectionManager

ROOMS = 20

manager = WebSocketConnectionManager(WebSocketConfig(heartbeat_type="off", presence_grace=0))
app = FastAPI(lifespan=manager.lifespan)


class Watch:
    """Counter of the connections that open or close in each event loop iteration.

    Attributes:
        rise: Most connections that opened in one iteration.
        fall: Most connections that closed in one iteration.
    """

    def __init__(self) -> None:
        self.rise = self.fall = self._count = 0
        self._on = False

    def start(self) -> None:
        """Start to count from zero."""
        self.rise = self.fall = 0
        self._count = manager.get_connection_count()
        if not self._on:
            self._on = True
            asyncio.get_running_loop().call_soon(self._look)

    def stop(self) -> None:
        """Stop to count."""
        self._on = False

    def _look(self) -> None:
        count = manager.get_connection_count()
        self.rise, self.fall = max(self.rise, count - self._count), max(self.fall, self._count - count)
        self._count = count
        if self._on:
            asyncio.get_running_loop().call_soon(self._look)


watch = Watch()


@manager.on_connect
async def connected(ws: StableSocket) -> None:
    for number in range(ROOMS):
        await ws.join(f"{ws.client_id} {number}")


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


@app.get("/block")
async def block(seconds: float) -> None:
    """Block the event loop, so that one iteration handles all that arrives until its end, and start to count."""
    watch.start()
    time.sleep(seconds)


@app.get("/count")
async def count() -> dict[str, int]:
    return {"connections": manager.get_connection_count(), "unfinished": len(manager._node.connections)}


@app.get("/stop")
async def stop() -> dict[str, int]:
    watch.stop()
    return {"rise": watch.rise, "fall": watch.fall}
