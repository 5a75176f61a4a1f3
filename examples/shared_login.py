"""One login dependency for HTTP routes and WebSockets."""

from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException

from fastapi_ws_stabilizer import StableSocket, WebSocketConnectionManager
from fastapi_ws_stabilizer.auth import Credential, bearer, cookie, subprotocol

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)

USERS = {"secret-of-ann": "ann", "session-of-ann": "ann"}  # replace: a session store, a JWT, ...
Token = Annotated[str, Depends(Credential(bearer(), cookie("session"), subprotocol("bearer")))]


def current_user(token: Token) -> str:
    if token not in USERS:
        raise HTTPException(401, "log in again", headers={"WWW-Authenticate": "Bearer"})
    return USERS[token]


@app.get("/me")
async def me(user: Annotated[str, Depends(current_user)]) -> dict[str, str]:
    return {"user": user}


@app.websocket("/ws")
async def endpoint(ws: Annotated[StableSocket, Depends(manager.socket_for(current_user))]) -> None:
    await ws.send({"user": ws.client_id})
    async for message in ws:
        await ws.send(message)
