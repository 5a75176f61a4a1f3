"""A page that counts clicks, and continues after a reconnect."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from fastapi_ws_stabilizer import StableSocket, StableSocketDep, WebSocketConfig, WebSocketConnectionManager

HERE = Path(__file__).parent

manager = WebSocketConnectionManager(WebSocketConfig.from_env())
app = FastAPI(lifespan=manager.lifespan)


@manager.on_connect  # a new client
@manager.on_resume  # a client with a valid reconnect token: rooms and user data are restored
async def begin(ws: StableSocket) -> None:
    if ws.session_id is None:  # a client of stabilizer.v1.json has its own token
        await ws.send({"type": "token", "token": ws.reconnect_token()})
    await ws.send({"type": "count", "count": ws.user_data.setdefault("clicks", 0)})


@manager.on_message("click")
async def click(ws: StableSocket) -> None:
    ws.user_data["clicks"] += 1
    await ws.send({"type": "count", "count": ws.user_data["clicks"]})


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(HERE / "page.html")


@app.get("/reconnecting_socket.js", include_in_schema=False)
async def script() -> FileResponse:
    return FileResponse(HERE / "reconnecting_socket.js", media_type="text/javascript")
