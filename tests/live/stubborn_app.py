"""Endpoints that go on after their client disconnected, in loops that catch every error of each call."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer import (
    StableSocket,
    StableSocketDep,
)
from tests.support.live_apps import manager_from_env

manager = manager_from_env(logs="TEST_WS_CONFIG" in os.environ)  # a test imports the tables below, without logs
app = FastAPI(lifespan=manager.lifespan)
events: list[str] = []


@app.get("/probe")
async def probe() -> dict[str, Any]:
    return {"events": events, "unfinished": len(manager._node.connections)}


@manager.on_disconnect
async def disconnected(ws: StableSocket, reason: Any) -> None:
    events.append(f"state {ws.websocket.client_state.name}")
    events.append(f"disconnect {reason.value}")


async def read_all(messages: Any) -> None:
    async for _ in messages:
        pass


SOCKET: dict[str, Callable[[StableSocket], Awaitable[Any]]] = {
    "receive": lambda ws: ws.receive(),
    "receive_text": lambda ws: ws.receive_text(),
    "receive_bytes": lambda ws: ws.receive_bytes(),
    "receive_json": lambda ws: ws.receive_json(),
    "iter": read_all,
    "iter_text": lambda ws: read_all(ws.iter_text()),
    "iter_bytes": lambda ws: read_all(ws.iter_bytes()),
    "iter_json": lambda ws: read_all(ws.iter_json()),
    "run": lambda ws: ws.run(),
    "send": lambda ws: ws.send("x"),
    "send_text": lambda ws: ws.send_text("x"),
    "send_bytes": lambda ws: ws.send_bytes(b"x"),
    "send_json": lambda ws: ws.send_json({}),
    "send_ack": lambda ws: ws.send("x", ack=True),
    "request": lambda ws: ws.request("x"),
    "join": lambda ws: ws.join("room"),
    "wait_closed": lambda ws: ws.wait_closed(),
    "close": lambda ws: ws.close(),
}

WEBSOCKET: dict[str, Callable[[WebSocket], Awaitable[Any]]] = {
    "receive": lambda ws: ws.receive(),
    "receive_text": lambda ws: ws.receive_text(),
    "receive_bytes": lambda ws: ws.receive_bytes(),
    "receive_json": lambda ws: ws.receive_json(),
    "iter_text": lambda ws: read_all(ws.iter_text()),
    "send_text": lambda ws: ws.send_text("x"),
    "send_json": lambda ws: ws.send_json({}),
    "close": lambda ws: ws.close(),
    "close_and_read": lambda ws: close_and_read(ws),
    "close_and_send": lambda ws: close_and_send(ws),
}


async def close_and_read(ws: WebSocket) -> None:
    if ws.application_state is WebSocketState.CONNECTED:
        await ws.close()
    await ws.receive_text()


async def close_and_send(ws: WebSocket) -> None:
    if ws.application_state is WebSocketState.CONNECTED:
        await ws.close()
    await ws.send_text("x")


async def catch_all(act: Callable[[Any], Awaitable[Any]], ws: Any, pause: float) -> None:
    try:
        while True:
            try:
                await act(ws)
            except Exception:
                pass
            else:
                await asyncio.sleep(pause)
    finally:
        events.append("ended")


@app.websocket("/socket/{call}")
async def stubborn(ws: StableSocketDep, call: str) -> None:
    pause = 0.01 if call.startswith(("send", "join")) else 0.0
    if call in ("iter", "iter_text", "iter_bytes", "iter_json", "run", "wait_closed", "close"):
        try:
            while True:  # after the end these calls raise nothing and do not wait
                try:
                    await SOCKET[call](ws)
                except Exception:
                    pass
        finally:
            events.append("ended")
    await catch_all(SOCKET[call], ws, pause)


@app.websocket("/adopt/{call}")
async def stubborn_adopted(websocket: WebSocket, call: str) -> None:
    await websocket.accept()
    await manager.connect("ann", websocket)
    await catch_all(WEBSOCKET[call], websocket, 0.01)


@app.websocket("/two-readers")
async def two_readers(ws: StableSocketDep) -> None:
    ws.create_task(read_all(ws))
    await asyncio.sleep(0.05)
    await catch_all(SOCKET["receive"], ws, 0.0)


@app.websocket("/swallows/{call}")
async def swallows(ws: StableSocketDep, call: str) -> None:
    while True:
        try:
            if call == "sleep":
                await asyncio.sleep(0.05)
            else:
                await SOCKET[call](ws)
        except BaseException:
            pass
        else:
            if ws.close_info is None:
                await asyncio.sleep(0.01)


@app.websocket("/state/{call}")
async def state(websocket: WebSocket, call: str) -> None:
    await websocket.accept()
    await manager.connect("ann", websocket)
    try:
        while websocket.client_state is WebSocketState.CONNECTED:
            if call == "sleep":
                await asyncio.sleep(0.02)
            else:
                events.append(f"read {await websocket.receive_text()}")
    except Exception as error:
        events.append(f"raised {type(error).__name__}")
    events.append("loop ended")


async def reader(ws: Any) -> None:
    while True:
        await ws.receive_text()


async def writer(ws: Any) -> None:
    while True:
        await ws.send_text("tick")
        await asyncio.sleep(0.02)


@app.websocket("/wait/{call}")
async def wait_for_two(websocket: WebSocket, call: str) -> None:
    ws: Any = websocket
    if call == "adopt":
        await websocket.accept()
        await manager.connect("ann", websocket)
        await _wait_for_two(ws)
    else:
        async with manager.serve(websocket) as ws:
            await _wait_for_two(ws)
    events.append("returned")


async def _wait_for_two(ws: Any) -> None:
    tasks = {asyncio.create_task(reader(ws)), asyncio.create_task(writer(ws))}
    _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()


@app.websocket("/forgotten-bug")
async def forgotten_bug(ws: StableSocketDep) -> None:
    async def fails() -> None:
        try:
            await ws.receive()
        except Exception:
            raise ZeroDivisionError("a bug") from None

    task = asyncio.create_task(fails())
    await asyncio.wait({task})
