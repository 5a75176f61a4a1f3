"""An assistant that streams its answers: an answer outlives the connection, and no token of it is lost."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel

from fastapi_ws_stabilizer import (
    DisconnectReason,
    ResumeOutcome,
    StableSocket,
    WebSocketConfig,
    WebSocketConnectionManager,
)
from fastapi_ws_stabilizer.auth import Credential, bearer, query

TOKENS = 200

manager = WebSocketConnectionManager(WebSocketConfig(on_duplicate="allow", session_ttl=60, presence_grace=0.2))
app = FastAPI(lifespan=manager.lifespan)
ended: list[str] = []

USERS = {"secret-of-ann": "ann"}


def current_user(token: Annotated[str, Depends(Credential(bearer(), query("token")))]) -> str:
    if token not in USERS:
        raise HTTPException(401, "log in again")
    return USERS[token]


class Ask(BaseModel):
    question: str


async def answer(room: str, said: dict[str, Any], question: str) -> None:
    """Send the tokens of an answer to its room, in which the session is whether its client is connected or away."""
    for number in range(TOKENS):
        await asyncio.sleep(0.005)  # the model
        token = f"{question}{number} "
        said["text"] += token
        await manager.room(room).send({"type": "token", "text": token})
    await manager.room(room).send({"type": "done"})


@manager.on_connect
async def send_hello(ws: StableSocket) -> None:
    ws.user_data["said"] = {"text": ""}
    await ws.send({"type": "hello", "reconnect_token": ws.reconnect_token()})


@manager.on_resume
async def go_on(ws: StableSocket, outcome: ResumeOutcome) -> None:
    if outcome is not ResumeOutcome.FULL:  # a plain client: it has missed tokens, and gets the text so far
        text = ws.user_data["said"]["text"]
        await ws.send({"type": "so far", "text": text, "reconnect_token": ws.reconnect_token()})


@manager.on_session_end
async def end(ws: StableSocket, reason: DisconnectReason) -> None:
    ended.append(reason.value)
    if task := ws.user_data.get("answer"):
        task.cancel()


@manager.on_message("ask")
async def ask(ws: StableSocket, message: Ask) -> None:
    room = f"answers of {ws.connection_id}"
    await ws.join(room)
    ws.user_data["answer"] = asyncio.create_task(answer(room, ws.user_data["said"], message.question))


@manager.on_message("think")
async def think(ws: StableSocket) -> None:
    """Compute between two sends without an await, as a model in the same process does."""
    for number in range(4):
        await ws.send({"type": "thought", "number": number})
        time.sleep(0.3)


@app.websocket("/ws")
async def endpoint(ws: Annotated[StableSocket, Depends(manager.socket_for(current_user))]) -> None:
    await ws.run()


@app.get("/ended")
async def get_ended() -> list[str]:
    return ended
