"""App of the admission tests, with one manager for each set of options and the same routes for each."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket

from fastapi_ws_stabilizer import (
    ConnectionLimitExceededError,
    StableSocket,
    WebSocketConfig,
    WebSocketConnectionManager,
    configure_logging,
)
from fastapi_ws_stabilizer.auth.credentials import Credential, bearer, query, subprotocol
from tests.support.live_apps import collect_garbage

TOKEN = Credential(bearer(), query("token"), subprotocol("bearer"))

configure_logging()
app = FastAPI()
events: list[str] = []


async def current_user(token: Annotated[str, Depends(TOKEN)], slow: float = 0.0) -> str:
    await asyncio.sleep(slow)
    if not token.startswith("good-"):
        raise HTTPException(401, "bad token")
    return token.removeprefix("good-")


def create_routes(options: dict[str, Any]) -> APIRouter:
    """Return the routes of a manager with these options."""
    config = {"heartbeat_type": "off", "disconnect_grace": 0.5, "hello_timeout": 1, **options}
    manager = WebSocketConnectionManager(WebSocketConfig(**config, handle_signals=False))
    router = APIRouter()

    async def echo(ws: StableSocket) -> None:
        events.append(f"served {ws.client_id}")
        async for message in ws:
            await ws.send(message)

    async def by_path(websocket: WebSocket) -> AsyncIterator[StableSocket]:
        async with manager.serve(websocket) as ws:
            yield ws

    @router.websocket("/path/{client_id}")
    async def path(ws: StableSocket = Depends(by_path)) -> None:
        await echo(ws)

    @router.websocket("/identity")
    async def by_identity(ws: StableSocket = Depends(manager.socket_for(current_user))) -> None:
        await echo(ws)

    @router.websocket("/adopt/{client_id}")
    async def adopt(websocket: WebSocket, client_id: str) -> None:
        await websocket.accept()
        try:
            ws = await manager.connect(client_id, websocket)
        except ConnectionLimitExceededError as error:
            events.append(f"adopt: {error.option}")
            raise
        await echo(ws)

    @router.get("/counts")
    async def counts() -> dict[str, Any]:
        node = manager._node
        return {
            "established": len(node.admission.limiter),
            "pending": node.admission.limiter._pending,
            "connections": manager.get_connection_count(),
            "unfinished": len(node.connections),
            "sessions": len(node.sessions),
            "refusals": manager.counters.refusals,
        }

    @router.post("/drain")
    async def drain() -> bool:
        manager._node.stop_accepting()
        return True

    return router


for name, options in json.loads(os.environ.get("TEST_LIMITS", "{}")).items():
    app.include_router(create_routes(options), prefix=f"/{name}")


@app.get("/me")
async def me(user: Annotated[str, Depends(current_user)]) -> str:
    return user


@app.get("/events")
async def list_events() -> list[str]:
    return events


@app.post("/collect")
async def collect() -> dict[str, int]:
    return {**collect_garbage(), "tasks": len(asyncio.all_tasks())}
