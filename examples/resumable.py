"""A dashboard with sessions that outlive their connections, requests, and room history."""

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
    await ws.join("orders", history=10)  # sends the last 10 messages of the room first


@manager.on_resume  # the same session on a new connection, with its rooms, user data and missed messages
async def go_on(ws: StableSocket, outcome: ResumeOutcome) -> None:
    if outcome is ResumeOutcome.GAP:
        await ws.send({"type": "reload"})  # some messages are lost; the client gets a gap report too


@manager.on_session_end  # closed, or not resumed within session_ttl; at once for a plain client without a token
async def end(ws: StableSocket, reason: DisconnectReason) -> None:
    print(f"{ws.client_id} placed {ws.user_data.get('orders', 0)} orders; session ended: {reason.value}")


@manager.on_message("order")  # the return value answers a request
async def order(ws: StableSocket, message: Order) -> dict[str, int]:
    if message.article not in PRICES:
        raise RequestError("no_such_article", message.article)
    ws.user_data["orders"] += 1
    await manager.broadcast({"type": "ordered", "article": message.article}, room="orders")
    return {"total": PRICES[message.article] * message.count}


@app.post("/announce")  # detached sessions get it when they resume
async def announce(text: str) -> int:
    result = await manager.broadcast({"type": "announcement", "text": text}, room="orders")
    return result.succeeded


@app.post("/confirm/{client_id}")  # sends a request to the client and waits for the answer
async def confirm(client_id: str, question: str) -> bool:
    for ws in manager.get_sockets(client_id):
        return bool(await ws.request("confirm", question, timeout=30))
    raise HTTPException(404, f"{client_id} is not connected")


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
