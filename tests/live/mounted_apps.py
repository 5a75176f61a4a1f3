"""One app for each place that a manager and its sockets can have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConfig, WebSocketConnectionManager, configure_logging

configure_logging()


def make_manager() -> WebSocketConnectionManager:
    return WebSocketConnectionManager(WebSocketConfig(heartbeat_interval=0.2))


async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


manager = make_manager()
plain = FastAPI(lifespan=manager.lifespan)
plain.websocket("/ws")(endpoint)

manager = make_manager()
own_manager = manager


@asynccontextmanager
async def own(app: FastAPI) -> AsyncIterator[Any]:
    async with own_manager.lifespan(app) as state:
        yield state


own_lifespan = FastAPI(lifespan=own)
own_lifespan.websocket("/ws")(endpoint)

manager = make_manager()
with_router = FastAPI(lifespan=manager.lifespan)
router = APIRouter()
router.websocket("/ws")(endpoint)
with_router.include_router(router)

manager = make_manager()
mounted = FastAPI(lifespan=manager.lifespan)
inner = FastAPI()
inner.websocket("/ws")(endpoint)
mounted.mount("/inner", inner)

manager = make_manager()
installed_twice = FastAPI()
manager.install(installed_twice)
manager.install(installed_twice)
installed_twice.websocket("/ws")(endpoint)

# The lifespan of a mounted app is never run, so this manager is started by its first socket.
manager = make_manager()
never_started_inner = FastAPI(lifespan=manager.lifespan)
never_started_inner.websocket("/ws")(endpoint)
never_started = FastAPI()
never_started.mount("/inner", never_started_inner)
