"""App of the session tests, which records received messages and the calls of its hooks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, WebSocket

from fastapi_ws_stabilizer import (
    DisconnectReason,
    ResumeOutcome,
    StableSocket,
    StableSocketDep,
    TokenExpiredError,
)
from tests.support.live_apps import manager_from_env

manager = manager_from_env(logs=False)
app = FastAPI(lifespan=manager.lifespan)

received: dict[str, list[Any]] = {}
events: list[str] = []
background: set[asyncio.Future[None]] = set()


@manager.on_connect
async def connected(ws: StableSocket) -> None:
    events.append(f"connect {ws.client_id} {ws.resumed.value}")
    if room := ws.query_params.get("room"):
        await ws.join(room, {"name": ws.client_id})


@manager.on_resume
async def resumed(ws: StableSocket, outcome: ResumeOutcome) -> None:
    events.append(f"resume {ws.client_id} {outcome.value} rooms={','.join(ws.rooms)} data={ws.user_data.get('note')}")


@manager.on_disconnect
async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
    events.append(f"disconnect {ws.client_id} {reason.value}")


@manager.on_session_end
async def session_ended(ws: StableSocket, reason: DisconnectReason) -> None:
    events.append(f"session_end {ws.client_id} {reason.value}")


@manager.on_message("say")
async def say(ws: StableSocket, message: int | str) -> None:
    received.setdefault(ws.client_id, []).append(message)


@manager.on_message("note")
async def note(ws: StableSocket, message: str) -> str:
    ws.user_data["note"] = message
    return message


@manager.on_message("add")
async def add(ws: StableSocket, message: list[int]) -> int:
    return sum(message)


@manager.on_message("ask_back")
async def ask_back(ws: StableSocket, message: str) -> None:
    async def ask() -> None:
        received.setdefault("answers", []).append(await ws.request("question", message, timeout=10))

    background.add(asyncio.ensure_future(ask()))  # a task that outlives the connection


@app.get("/received/{client_id}")
async def list_received(client_id: str) -> list[Any]:
    return received.get(client_id, [])


@app.get("/events")
async def list_events() -> list[str]:
    return events


@app.get("/count")
async def count() -> dict[str, int]:
    sessions = manager._node.sessions
    return {
        "connections": manager.get_connection_count(),
        "sessions": len(sessions),
        "detached": sessions.detached_count,
    }


@app.post("/push/{client_id}")
async def push(client_id: str, message: dict[str, Any]) -> bool:
    return await manager.send_to_client(client_id, message)


@app.post("/push-many/{client_id}/{count}")
async def push_many(client_id: str, count: int) -> bool:
    return all([await manager.send_to_client(client_id, {"number": number}) for number in range(count)])


@app.post("/prices/{client_id}")
async def push_prices(client_id: str, seconds: float) -> dict[str, int]:
    """Send 1,000 prices and cursors a second, and a note after each hundred; count them and what is stored then."""
    count = 0
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        while count < 1000 * (time.monotonic() - begun):
            await manager.send_to_client(client_id, {"price": count}, coalesce_key="price")
            await manager.send_to_client(client_id, {"cursor": count}, coalesce_key=("cursor", 1))
            if count % 100 == 0:
                await manager.send_to_client(client_id, {"note": count})
            count += 1
        await asyncio.sleep(0.001)
    (session,) = manager._node.sessions._by_id.values()
    return {"last": count - 1, "stored": len(session.buffer.entries), "coalesced": manager.counters.messages_coalesced}


@app.post("/reconnect-token/{client_id}")
async def get_reconnect_token(client_id: str) -> dict[str, str]:
    return {"token": manager.generate_reconnect_token(client_id)}


@app.post("/end/{what}/{client_id}")
async def end(what: str, client_id: str) -> int:
    room = manager.room("lobby")
    if what == "client":
        await manager.disconnect(client_id, 4403, "banned")
        return 1
    if what == "members":
        return await room.disconnect(4403, "banned")
    return await room.close() if what == "room" else int(await room.remove(client_id))


@app.post("/say/{room}")
async def say_in(room: str, text: str) -> int:
    return (await manager.room(room).send(text)).succeeded


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


@app.websocket("/history/{client_id}")
async def join_with_history(ws: StableSocketDep) -> None:
    await ws.join("lobby", history=10)
    await ws.run()


@app.websocket("/seed/{client_id}")
async def seed_pattern_3(websocket: WebSocket, client_id: str, token: str | None = None) -> None:
    await websocket.accept()
    if token:
        try:
            restored_id = await manager.validate_reconnect_token(token)
            events.append(f"restored {restored_id}")
        except TokenExpiredError:
            await websocket.close(code=1008, reason="Token expired")
            return
    ws = await manager.connect(client_id, websocket)
    events.append(f"seed {client_id} {ws.resumed.value} rooms={','.join(ws.rooms)} data={ws.user_data.get('note')}")
    await ws.join("lobby")
    ws.user_data["note"] = "mine"
    while True:
        await websocket.receive_text()
