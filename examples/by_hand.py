"""An endpoint with its own accept and receive loop, which registers its connection with the manager."""

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from fastapi_ws_stabilizer import WebSocketConfig, WebSocketConnectionManager

manager = WebSocketConnectionManager(WebSocketConfig(heartbeat_interval=25))
app = FastAPI(lifespan=manager.lifespan)


@app.websocket("/ws/{client_id}")
async def endpoint(websocket: WebSocket, client_id: str) -> None:
    await websocket.accept()
    try:
        await manager.connect(client_id, websocket, metadata={"plan": websocket.query_params.get("plan", "free")})
        while True:
            text = await websocket.receive_text()
            await manager.broadcast({"user": client_id, "message": text}, exclude_client=client_id)
    except WebSocketDisconnect:
        await manager.disconnect(client_id)
