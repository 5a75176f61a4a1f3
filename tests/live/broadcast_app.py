"""App with a handler that broadcasts more than a stalled client takes."""

from __future__ import annotations

from fastapi import FastAPI

from fastapi_ws_stabilizer import (
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
    configure_logging,
    stats_router,
)

configure_logging()
manager = WebSocketConnectionManager(WebSocketConfig(outbox_max_messages=2, heartbeat_type="off"))
app = FastAPI(lifespan=manager.lifespan)
app.include_router(stats_router, prefix="/ws-stats")


@manager.on_message("shout")
async def shout(ws: StableSocket) -> None:
    for _ in range(500):  # until the outbox of the slow client is full
        (await manager.broadcast("x" * 65536, exclude_client=ws.client_id)).raise_for_failure()
    raise AssertionError("the slow client took every message")


@manager.on_message("ask")
async def ask(ws: StableSocket) -> None:
    await ws.send("still here")


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
