"""App with subprotocols, and cookies in the handshake response, beside a mount of static files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from starlette.staticfiles import StaticFiles

from fastapi_ws_stabilizer import (
    StableSocket,
    StableSocketDep,
)
from tests.support.live_apps import manager_from_env

manager = manager_from_env()
app = FastAPI(lifespan=manager.lifespan)


@manager.on_handshake
async def cookies(ws: StableSocket) -> None:
    ws.accept_headers.append("set-cookie", f"seen={ws.client_id}; HttpOnly")
    ws.accept_headers.append("set-cookie", "node=n1")


@app.websocket("/speaks/{client_id}")
async def speaks(
    ws: Annotated[StableSocket, Depends(manager.socket_for(subprotocols=("ocpp2.1", "ocpp1.6")))],
) -> None:
    await ws.send({"subprotocol": ws.subprotocol})
    await ws.run()


@app.websocket("/speaks-none/{client_id}")
async def speaks_none(ws: StableSocketDep) -> None:
    await ws.send({"subprotocol": ws.subprotocol})
    await ws.run()


app.mount("/", StaticFiles(directory=Path(__file__).parent))


@manager.on_message
async def echo(ws: StableSocket, message: Any) -> None:
    await ws.send(message)
