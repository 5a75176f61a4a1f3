"""Stream the answer of a language model to a client that may stop it or lose its connection."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import FastAPI
from pydantic import BaseModel

from fastapi_ws_stabilizer import (
    ResumeOutcome,
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
)

manager = WebSocketConnectionManager(WebSocketConfig(replay_max_messages=4096))
app = FastAPI(lifespan=manager.lifespan)


class Ask(BaseModel):
    question: str


@dataclass
class Answer:
    text: str = ""
    task: asyncio.Task[None] | None = None


async def tokens(question: str) -> AsyncGenerator[str, None]:  # yours: the stream of your model's SDK
    for word in f"You have asked: {question}".split():
        await asyncio.sleep(0.01)
        yield f"{word} "


async def stream(client_id: str, answer: Answer, question: str) -> None:
    try:
        async with aclosing(tokens(question)) as parts:  # closed at once when the task is cancelled
            async for part in parts:
                answer.text += part
                await manager.send_to_client(client_id, {"type": "part", "text": part})  # also if detached
        await manager.send_to_client(client_id, {"type": "done"})
    except Exception:  # nothing else awaits this task
        logging.getLogger(__name__).exception("the answer to %s failed", client_id)
        await manager.send_to_client(client_id, {"type": "failed"})


@manager.on_message("stop")
async def stop(ws: StableSocket) -> None:
    answer: Answer | None = ws.user_data.pop("answer", None)
    if answer is not None and answer.task is not None and answer.task.cancel():
        await ws.send({"type": "stopped"})


@manager.on_message("ask")
async def ask(ws: StableSocket, message: Ask) -> None:
    await stop(ws)
    await ws.send({"type": "started"})
    answer = ws.user_data["answer"] = Answer()
    answer.task = asyncio.create_task(stream(ws.client_id, answer, message.question))


@manager.on_resume
async def go_on(ws: StableSocket, outcome: ResumeOutcome) -> None:
    answer: Answer | None = ws.user_data.get("answer")
    if answer is not None and answer.task is not None and outcome is not ResumeOutcome.FULL:
        await ws.send({"type": "so far", "text": answer.text, "done": answer.task.done()})


@manager.on_session_end
async def end(ws: StableSocket) -> None:  # the client does not come back: spend no more tokens on it
    answer: Answer | None = ws.user_data.get("answer")
    if answer is not None and answer.task is not None:
        answer.task.cancel()


@manager.on_connect
@manager.on_resume
async def give_token(ws: StableSocket) -> None:
    if ws.session_id is None:  # a plain client needs a token to come back to its session
        await ws.send({"type": "token", "token": ws.reconnect_token()})


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
