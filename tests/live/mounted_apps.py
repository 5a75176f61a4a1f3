"""Apps that differ in how the manager and its sockets are mounted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConfig, WebSocketConnectionManager, configure_logging

configure_logging()


def create_manager() -> WebSocketConnectionManager:
    return WebSocketConnectionManager(WebSocketConfig(heartbeat_interval=0.2))


async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


manager = create_manager()
plain = FastAPI(lifespan=manager.lifespan)
plain.websocket("/ws")(endpoint)

manager = create_manager()
own_manager = manager


@asynccontextmanager
async def wrapped_lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with own_manager.lifespan(app) as state:
        yield state


own_lifespan = FastAPI(lifespan=wrapped_lifespan)
own_lifespan.websocket("/ws")(endpoint)

manager = create_manager()
with_router = FastAPI(lifespan=manager.lifespan)
router = APIRouter()
router.websocket("/ws")(endpoint)
with_router.include_router(router)

manager = create_manager()
mounted = FastAPI(lifespan=manager.lifespan)
inner = FastAPI()
inner.websocket("/ws")(endpoint)
mounted.mount("/inner", inner)

manager = create_manager()
installed_twice = FastAPI()
manager.install(installed_twice)
manager.install(installed_twice)
installed_twice.websocket("/ws")(endpoint)

# The lifespan of a mounted app never runs, so the first socket starts this manager.
manager = create_manager()
never_started_inner = FastAPI(lifespan=manager.lifespan)
never_started_inner.websocket("/ws")(endpoint)
never_started = FastAPI()
never_started.mount("/inner", never_started_inner)
