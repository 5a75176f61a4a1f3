"""A dashboard that misses nothing: sessions that outlive their connections, requests, and a room's last messages."""

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from fastapi_ws_stabilizer import (
    DisconnectReason,
    RequestError,
    ResumeOutcome,
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
)

manager = WebSocketConnectionManager(WebSocketConfig(room_history=50, session_ttl=300))
app = FastAPI(lifespan=manager.lifespan)

PRICES = {"apples": 3, "pears": 4}


class Order(BaseModel):
    article: str
    count: int


@manager.on_connect  # a new session
async def begin(ws: StableSocket) -> None:
    ws.user_data["orders"] = 0
    await ws.join("orders", history=10)  # the last ten messages of the room, and then everything


@manager.on_resume  # the same session, in a new connection: rooms, user data, and what was sent meanwhile
async def go_on(ws: StableSocket, outcome: ResumeOutcome) -> None:
    if outcome is ResumeOutcome.GAP:
        await ws.send({"type": "reload"})  # some messages are gone: the client was told, and so are you


@manager.on_session_end  # goodbye, or not back within session_ttl; a plain client without a token: at once
async def end(ws: StableSocket, reason: DisconnectReason) -> None:
    print(f"{ws.client_id} has placed {ws.user_data.get('orders', 0)} orders and is gone: {reason.value}")


@manager.on_message("order")  # what it returns is the answer, if the client has asked for one
async def order(ws: StableSocket, message: Order) -> dict[str, int]:
    if message.article not in PRICES:
        raise RequestError("no_such_article", message.article)
    ws.user_data["orders"] += 1
    await manager.broadcast({"type": "ordered", "article": message.article}, room="orders")
    return {"total": PRICES[message.article] * message.count}


@app.post("/announce")  # kept for those who are away
async def announce(text: str) -> int:
    result = await manager.broadcast({"type": "announcement", "text": text}, room="orders")
    return result.succeeded


@app.post("/confirm/{client_id}")  # asks the client, and waits for its answer
async def confirm(client_id: str, question: str) -> bool:
    for ws in manager.get_sockets(client_id):
        return bool(await ws.request("confirm", question, timeout=30))
    raise HTTPException(404, f"{client_id} is not connected")


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
