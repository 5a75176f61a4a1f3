"""Stats that require a key, and a log with one JSON object per line."""

import os
import secrets
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException

from fastapi_ws_stabilizer import (
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
    configure_logging,
    stats_router,
)

configure_logging(json_lines=True)
manager = WebSocketConnectionManager(WebSocketConfig.from_env())  # WS_LOG_LEVEL, WS_HEARTBEAT_INTERVAL, ...
app = FastAPI(lifespan=manager.lifespan)


def operator(x_stats_key: Annotated[str, Header()] = "") -> None:
    key = os.environ.get("STATS_KEY", "")
    if not key or not secrets.compare_digest(x_stats_key.encode(), key.encode()):
        raise HTTPException(403)


app.include_router(stats_router, prefix="/ws-stats", dependencies=[Depends(operator)])


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    async for message in ws:
        await ws.send(message)
