"""Refuse after the accept, so that a browser can read why; and let only pages of your own site connect."""

from typing import Annotated
from uuid import uuid4

from fastapi import Cookie, Depends, FastAPI, HTTPException

from fastapi_ws_stabilizer import StableSocket, WebSocketConnectionManager

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)

ORIGINS = {"https://example.com", "http://localhost:8000"}
SESSIONS = {"session-of-ann": "ann"}


def session_user(session: Annotated[str, Cookie()] = "") -> str | None:
    return SESSIONS.get(session)


@manager.on_handshake
async def only_from_our_pages(ws: StableSocket) -> None:
    if ws.headers.get("origin") not in ORIGINS:
        raise HTTPException(403)  # before the accept: HTTP 403


@manager.on_connect
async def only_logged_in(ws: StableSocket) -> None:
    if ws.identity is None:
        raise HTTPException(401, "log in first")  # after the accept: close code 4401


SessionSocket = Annotated[
    StableSocket, Depends(manager.socket_for(session_user, key=lambda user: user or f"stranger-{uuid4().hex}"))
]


@app.websocket("/ws")
async def endpoint(ws: SessionSocket) -> None:
    await ws.send(f"hello {ws.identity}")
    async for message in ws:
        await ws.send(message)
