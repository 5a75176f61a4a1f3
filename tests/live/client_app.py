"""App of the Python client tests, with handlers that relay, fail and ban."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI, HTTPException

from fastapi_ws_stabilizer import StableSocket, StableSocketDep, WebSocketConfig, WebSocketConnectionManager

manager = WebSocketConnectionManager(WebSocketConfig(max_message_rate=100, max_message_burst=100))
app = FastAPI(lifespan=manager.lifespan)

received: dict[str, list[Any]] = {}


@manager.on_message("say")
async def say(ws: StableSocket, message: Any) -> None:
    received.setdefault(ws.client_id, []).append(message)


@manager.on_message("relay")
async def relay(ws: StableSocket, message: dict[str, Any]) -> None:
    await manager.broadcast({"type": "relayed", "doc": message}, exclude=ws)


@manager.on_message("divide")
async def divide(ws: StableSocket, message: int) -> float:
    return 1 / message


@manager.on_message("leave")
async def ban(ws: StableSocket) -> None:
    await ws.close(4403, "banned")


@app.get("/received/{client_id}")
async def list_received(client_id: str) -> list[Any]:
    return received.get(client_id, [])


def unknown_room(room: str) -> str:
    raise HTTPException(404, f"no room is called {room}")


@app.websocket("/rooms/{room}")
async def enter_room(ws: StableSocket = Depends(manager.socket_for(unknown_room))) -> None:
    await ws.run()


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()
