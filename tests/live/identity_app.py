"""App of the rate and identity tests, with one login for HTTP and sockets, and notes of each call."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse

from fastapi_ws_stabilizer import (
    DisconnectReason,
    StableSocket,
    StableSocketDep,
    WebSocketConnectionManager,
    configure_logging,
)
from fastapi_ws_stabilizer.auth import Credential, bearer, cookie, first_message, subprotocol
from tests.support.live_apps import config_from_env

config = config_from_env()
configure_logging(level=config.log_level)
manager = WebSocketConnectionManager(config)
app = FastAPI(lifespan=manager.lifespan)
notes: list[Any] = []

if os.environ.get("TEST_DENY_ALL"):

    class RequireLogin(BaseHTTPMiddleware):
        """Middleware that rejects every HTTP request except `/notes`."""

        async def dispatch(self, request: Request, call_next: Any) -> Any:
            if request.url.path.startswith("/notes"):
                return await call_next(request)
            return PlainTextResponse("unauthorized", status_code=401)

    app.add_middleware(RequireLogin)

    @app.websocket("/open/{client_id}")
    async def unauthenticated(ws: StableSocketDep) -> None:
        notes.append(f"open {ws.client_id}")


@dataclass
class User:
    """Name and expiry that a token stands for."""

    name: str
    expires_at: float | None


def user_of(token: str | None) -> User:
    """Parse a token of the tests, `name` or `name~until`, as an application parses a JWT."""
    name, _, until = (token or "").partition("~")
    if name not in ("ann", "bob"):
        raise HTTPException(401, "log in again", headers={"WWW-Authenticate": "Bearer"})
    return User(name, float(until) if until else None)


Token = Annotated[str, Depends(Credential(bearer(), cookie("session"), subprotocol("bearer"), first_message()))]


def current_user(token: Token) -> User:
    return user_of(token)


Users = Annotated[
    StableSocket,
    Depends(
        manager.socket_for(current_user, key=lambda user: user.name, expires_at=lambda user: user.expires_at),
    ),
]
Tickets = Annotated[StableSocket, Depends(manager.socket_for(manager.ticket))]


async def renew(ws: StableSocket, credential: str | None) -> float | None:
    """Check a credential that the client sends later; the dependency checks the first one."""
    if ws.identity is None or credential is None:
        return None
    user = user_of(credential)
    if user.name != ws.client_id:
        raise HTTPException(403, "the credential belongs to another client")
    return None if user.expires_at is None else user.expires_at - time.time()


if not os.environ.get("TEST_DENY_ALL"):  # with this hook the doctor reports no unguarded socket
    manager.on_auth(renew)


@manager.on_disconnect
async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
    assert ws.close_info is not None
    notes.append(f"disconnected {ws.client_id} {reason.value} {ws.close_info.code}")


@manager.on_message("say")
async def say(ws: StableSocket, message: Any) -> None:
    notes.append(f"said {ws.client_id}")


@manager.on_message("search", max_rate=2)
async def search(ws: StableSocket, message: Any) -> None:
    notes.append(f"searched {ws.client_id}")


@manager.on_message("confirm")
async def confirm(ws: StableSocket, message: Any) -> None:
    for number in range(300):
        await ws.send(number, ack=True)
    notes.append(f"confirmed {ws.client_id}")


@app.get("/notes")
async def list_notes() -> list[Any]:
    return notes


@app.get("/me")
async def me(user: Annotated[User, Depends(current_user)]) -> str:
    return user.name


@app.post("/tickets")
async def ticket(user: Annotated[User, Depends(current_user)]) -> str:
    return manager.issue_ticket(user.name)


@app.post("/token/{client_id}")
async def reconnect_token(client_id: str) -> str:
    return manager.generate_reconnect_token(client_id)


@app.post("/ticket/{client_id}")
async def issue_ticket(client_id: str) -> str:
    return manager.issue_ticket(client_id)


@app.post("/revoke/{client_id}")
async def revoke(client_id: str) -> int:
    return await manager.revoke(client_id)


@app.post("/disconnect/{client_id}")
async def disconnect(client_id: str) -> None:
    await manager.disconnect(client_id, code=4410, reason="logged out")


@app.get("/sessions")
async def sessions() -> dict[str, int]:
    return {**manager.get_session_counts(), "connections": manager.get_connection_count()}


@app.websocket("/run/{client_id}")
async def run(ws: StableSocketDep) -> None:
    await ws.run()


@app.websocket("/echo/{client_id}")
async def echo(ws: StableSocketDep) -> None:
    async for message in ws:
        notes.append(f"echo {len(message)}")
        await ws.send(message)


@app.websocket("/adopt/{client_id}")
async def adopt(websocket: WebSocket, client_id: str, token: str | None = None) -> None:
    await websocket.accept()
    if token is not None:
        client_id = await manager.validate_reconnect_token(token)
    await manager.connect(client_id, websocket)
    await websocket.send_text(f"hello {client_id}")
    while True:
        await websocket.send_text(await websocket.receive_text())


@app.websocket("/me")
async def my_socket(ws: Users) -> None:
    notes.append(f"ran {ws.client_id}")
    await ws.send(ws.client_id)
    async for message in ws:
        await ws.send(message)


@app.websocket("/ticket")
async def ticket_socket(ws: Tickets) -> None:
    await ws.send(ws.client_id)
    await ws.run()
