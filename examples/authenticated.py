"""Client ids that come from a login; other handshakes are rejected."""

from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Query
from pydantic import BaseModel

from fastapi_ws_stabilizer import StableSocket, WebSocketConnectionManager

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)


class User(BaseModel):
    id: int
    name: str


USERS = {"secret-of-ann": User(id=1, name="Ann")}  # replace: a session store, a JWT, ...


def current_user(
    authorization: Annotated[str, Header()] = "",
    token: Annotated[str, Query()] = "",  # browsers cannot set headers on a WebSocket
) -> User:
    user = USERS.get(authorization.removeprefix("Bearer ") or token)
    if user is None:
        raise HTTPException(401, "log in first")
    return user


UserSocket = Annotated[StableSocket, Depends(manager.socket_for(current_user, key=lambda user: user.id))]


@app.websocket("/ws")
async def endpoint(ws: UserSocket) -> None:
    await ws.send({"hello": ws.identity.name, "client_id": ws.client_id})
    async for message in ws:
        await ws.send(message)
