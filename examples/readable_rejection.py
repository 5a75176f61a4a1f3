"""Rejections that a browser can read, and an origin check for your own site."""

from typing import Annotated

from fastapi import Cookie, Depends, FastAPI, HTTPException

from fastapi_ws_stabilizer import StableSocket, WebSocketConfig, WebSocketConnectionManager

manager = WebSocketConnectionManager(WebSocketConfig(allowed_origins=["https://example.com"]))
app = FastAPI(lifespan=manager.lifespan)

SESSIONS = {"session-of-ann": "ann"}


def session_user(session: Annotated[str, Cookie()] = "") -> str:
    if session not in SESSIONS:
        raise HTTPException(401, "log in first")  # browsers get close code 4401, other clients HTTP 401
    return SESSIONS[session]


@app.websocket("/ws")
async def endpoint(ws: Annotated[StableSocket, Depends(manager.socket_for(session_user))]) -> None:
    await ws.send(f"hello {ws.client_id}")
    async for message in ws:
        await ws.send(message)
