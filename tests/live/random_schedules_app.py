"""App of the random schedules, with endpoints and handlers that do anything, and a route for what remains."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, WebSocket

from fastapi_ws_stabilizer import (
    DisconnectReason,
    Presence,
    RequestError,
    Room,
    SocketClosed,
    StableSocket,
    StableSocketDep,
    WebSocketStabilizerError,
)
from tests.live.random_schedules import EXPECTED_BUG
from tests.support.live_apps import manager_from_env

manager = manager_from_env()
app = FastAPI(lifespan=manager.lifespan)
chance = random.Random(os.environ.get("TEST_SEED", "0"))

ROOMS = ("red", "green", "blue")
connects: Counter[str] = Counter()
disconnects: Counter[str] = Counter()
session_ends: Counter[str] = Counter()
clean_ups: Counter[str] = Counter()
resumes = 0


class ExpectedBug(Exception):
    """Deliberate bug of user code."""

    def __init__(self) -> None:
        super().__init__(EXPECTED_BUG)


@app.exception_handler(ZeroDivisionError)
async def divided(websocket: WebSocket, error: ZeroDivisionError) -> None:
    await websocket.close(4290, "divided")


# ── hooks ──


@manager.on_handshake
async def handshake(ws: StableSocket) -> None:
    if (roll := chance.random()) < 0.05:
        raise HTTPException(403, "not you")
    if roll < 0.15:
        await asyncio.sleep(chance.uniform(0, 0.05))


@manager.on_connect
async def connected(ws: StableSocket) -> None:
    connects[ws.connection_id] += 1
    await misbehave(ws, 0.2)


@manager.on_resume
async def resumed(ws: StableSocket, outcome: Any) -> None:
    global resumes
    resumes += 1
    connects[ws.connection_id] += 1
    await misbehave(ws, 0.2)


@manager.on_disconnect
async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
    disconnects[ws.connection_id] += 1
    with suppress(SocketClosed):
        await ws.send("a message that cannot arrive")
    await misbehave(ws, 0.2)


@manager.on_session_end
async def session_ended(ws: StableSocket, reason: DisconnectReason) -> None:
    session_ends[ws.connection_id] += 1
    await misbehave(ws, 0.2)


@manager.on_join
async def joined(room: Room, entry: Presence) -> None:
    await room.send({"type": "joined", "client_id": entry.client_id})


@manager.on_leave
async def left(room: Room, entry: Presence) -> None:
    await room.send({"type": "left", "client_id": entry.client_id})


# ── user code ──


async def call_anything(ws: StableSocket) -> None:
    """Call a random function of the library, as user code may at any moment."""
    other = chance.choice(manager.get_active_connections() or ["alone"])
    room = chance.choice(ROOMS)
    call = chance.choice(
        (
            lambda: ws.send({"type": "hi"}),
            lambda: ws.send("x" * chance.choice((1, 100, 20_000)), volatile=chance.random() < 0.5),
            lambda: ws.send_bytes(b"y" * chance.randrange(2_000)),
            lambda: ws.join(room, {"colour": room}, history=chance.randrange(4)),
            lambda: ws.leave(room),
            lambda: manager.broadcast("to all", coalesce_key="all"),
            lambda: manager.broadcast("to a room", room=room, exclude=other),
            lambda: manager.send_to_client(other, "psst"),
            lambda: manager.disconnect(other, 4403, "kicked"),
            lambda: manager.room(room).disconnect(4410, "room closed"),
            lambda: manager.room(room).close(),
            lambda: ws.close(chance.choice((1000, 4001, 4410)), "enough"),
            lambda: ws.request("question", 1, timeout=0.2),
            lambda: ws.send("acknowledged?", ack=True),
            lambda: ws.wait_closed(),
        )
    )
    with suppress(TimeoutError, asyncio.TimeoutError, RequestError):
        await asyncio.wait_for(call(), 0.3)
    ws.user_data["said"] = "z" * chance.randrange(1000)
    manager.get_memory_usage()
    ws.create_task(asyncio.sleep(chance.uniform(0, 0.3)), name="user-nap")
    if manager.config.enable_reconnect and chance.random() < 0.2:
        manager.generate_reconnect_token(ws.client_id)


async def misbehave(ws: StableSocket, probability: float) -> None:
    """Raise, sleep, cancel the current task or call the library, with the given probability."""
    if chance.random() > probability:
        return
    roll = chance.randrange(7)
    if roll == 0:
        raise ExpectedBug
    if roll == 1:
        await asyncio.sleep(chance.uniform(0, 0.4))
    elif roll == 2:
        raise HTTPException(chance.choice((401, 403, 404)), EXPECTED_BUG)
    elif roll == 3:
        raise 1 / 0  # type: ignore[misc]
    elif roll == 4:
        task = asyncio.current_task()
        assert task is not None
        if task.get_name().startswith("user-"):  # user code does not cancel tasks of the server
            task.cancel()
        await asyncio.sleep(0)
    else:
        with suppress(WebSocketStabilizerError):
            await call_anything(ws)


async def resource(websocket: WebSocket) -> AsyncIterator[str]:
    clean_ups["begun"] += 1
    try:
        yield "resource"
    finally:
        if chance.random() < 0.2:
            await asyncio.sleep(chance.uniform(0, 0.1))
        clean_ups["done"] += 1


Resource = Annotated[str, Depends(resource)]


@manager.on_message("any")
async def handle_any(ws: StableSocket, message: dict[str, Any]) -> Any:
    await misbehave(ws, 0.9)
    return {"type": "answer"}


@manager.on_message("say")
async def handle_say(ws: StableSocket, message: Any) -> None:
    await manager.broadcast({"type": "said"}, room=chance.choice(ROOMS))


# ── endpoints ──


@app.websocket("/run/{client_id}")
async def run(before: Resource, ws: StableSocketDep) -> None:
    await ws.join(chance.choice(ROOMS))
    await ws.run()


@app.websocket("/loop/{client_id}")
async def loop(ws: StableSocketDep, after: Resource) -> None:
    async for _ in ws:
        await misbehave(ws, 0.5)


@app.websocket("/catch-all/{client_id}")
async def catch_all(ws: StableSocketDep, after: Resource) -> None:
    """Read in a loop that catches every exception, as applications often do."""
    while True:
        try:
            await ws.receive_text()
            await misbehave(ws, 0.5)
        except Exception:
            if chance.random() < 0.05:
                return


@app.websocket("/tasks/{client_id}")
async def tasks(before: Resource, ws: StableSocketDep) -> None:
    async def read() -> None:
        async for _ in ws:
            await misbehave(ws, 0.3)

    async def write() -> None:
        while True:
            await ws.send({"type": "tick"})
            await asyncio.sleep(0.02)

    both = {asyncio.create_task(read(), name="user-read"), asyncio.create_task(write(), name="user-write")}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)


@app.websocket("/push/{client_id}")
async def push(ws: StableSocketDep) -> None:
    ws.create_task(ws.run(), name="user-run")
    for _ in range(chance.randrange(30)):
        await ws.send({"type": "tick"})
        await asyncio.sleep(0.01)


@app.websocket("/busy/{client_id}")
async def busy(ws: StableSocketDep) -> None:
    await asyncio.sleep(chance.uniform(0, 1.5))


@app.websocket("/adopt/{client_id}")
async def adopt(websocket: WebSocket, client_id: str, after: Resource) -> None:
    await websocket.accept()
    ws = await manager.connect(client_id, websocket)
    try:
        while True:
            if (await websocket.receive())["type"] == "websocket.disconnect":
                return
            await misbehave(ws, 0.5)
    finally:
        with suppress(WebSocketStabilizerError):
            await manager.disconnect(client_id)


# ── what remains ──


@app.post("/broadcast")
async def broadcast() -> None:
    await manager.broadcast("z" * chance.randrange(5_000))


@app.get("/state")
async def state() -> dict[str, Any]:
    """Return what is not empty, zero or equal, as it must be once no client is connected."""
    node = manager._node
    admission = node.admission.limiter
    own = asyncio.current_task()
    running = [task.get_name() for task in asyncio.all_tasks() if task is not own]
    empty = {
        "tasks": [name for name in running if name.startswith(("ws-", "user-"))],
        "connections": manager.get_connection_count(),
        "rooms": manager.get_rooms(),
        "room members": dict(node.hub.rooms._members),
        "presence": len(node.hub.presence),
        "presence in grace": len(node.hub.presence._graces),
        "sessions": len(node.sessions),
        "detached sessions": node.sessions.detached_count,
        "detached plain clients": len(node.detached.states),
        "reservations": (admission._established, admission._pending),
        "reservations by client": dict(admission._of_client._counts),
        "reservations by address": [dict(admission._from_address._counts), dict(admission._pending_from._counts)],
        "handshakes": len(node.admission._handshakes),
        "handshakes without hello": len(node._hello_reader._awaiting_hello),
        "unfinished": len(node.connections),
        "closing": len(node._closing),
        "memory total": node.budget.total,
        "memory accounts": len(node.budget._entries),
        "heartbeats": len(node.heartbeat),
        "connects without disconnect": len(connects - disconnects),
        "disconnects without connect": len(disconnects - connects),
        "hooks called twice": [
            one for one in (connects, disconnects, session_ends) if max(one.values(), default=0) > 1
        ],
        "dependencies not cleaned up": clean_ups["begun"] - clean_ups["done"],
    }
    left = {name: str(value) for name, value in empty.items() if value and value != (0, 0) and value != [{}, {}]}
    endings = {reason.value: count for reason, count in manager.counters.endings.items()}
    return {"left": left, "connects": len(connects), "resumes": resumes, "endings": endings}
