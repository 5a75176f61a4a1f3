"""README code of the reference library, with only the import changed: Quick Start and patterns 1, 2, 4 and 5."""

# ruff: noqa
# mypy: ignore-errors

# ── Quick Start ──
import json
from contextlib import asynccontextmanager
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi_ws_stabilizer import WebSocketConnectionManager, WebSocketConfig

# Configure the manager
ws_config = WebSocketConfig(
    heartbeat_interval=30.0,
    heartbeat_timeout=60.0,
    max_connections=100,
)
ws_manager = WebSocketConnectionManager(ws_config)


# Setup lifespan events
@asynccontextmanager
async def lifespan(app: FastAPI):
    await ws_manager.start()
    yield
    await ws_manager.graceful_shutdown()


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws/{client_id}")
async def websocket_endpoint(websocket: WebSocket, client_id: str):
    await websocket.accept()

    try:
        # Register connection
        await ws_manager.connect(client_id, websocket)

        # Handle messages
        while True:
            data = await websocket.receive_text()

            # Handle heartbeat responses
            if data == "pong":
                await ws_manager.handle_pong(client_id)
                continue

            # Broadcast to all clients
            await ws_manager.broadcast(json.dumps({"user": client_id, "message": data}))

    except WebSocketDisconnect:
        await ws_manager.disconnect(client_id)


# ── Patterns 1 and 2, each in a route, because they are not complete programs ──
@app.post("/pattern-1/{sender_id}")
async def pattern_1(sender_id: str):
    # Send message to all clients
    await ws_manager.broadcast("System message")

    # Send to all except sender
    await ws_manager.broadcast(json.dumps({"message": "chat"}), exclude_client=sender_id)


@app.post("/pattern-2/{client_id}")
async def pattern_2(client_id: str):
    # Send to specific client
    success = await ws_manager.send_to_client(client_id, "Direct message")

    if not success:
        print(f"Client {client_id} is no longer connected")


# ── Pattern 4 ──
@app.get("/stats")
async def get_stats():
    return {
        "active_connections": ws_manager.get_connection_count(),
        "client_ids": ws_manager.get_active_connections(),
        "memory": ws_manager.get_memory_usage(),  # v1.1.0+
    }


# ── Pattern 5, on its own path ──
@app.websocket("/pattern-5/{client_id}")
async def websocket_endpoint(websocket: WebSocket, client_id: str):
    await websocket.accept()
    await ws_manager.connect(client_id, websocket)

    # Store user state per connection
    await ws_manager.set_user_data(client_id, "username", "Alice")
    await ws_manager.set_user_data(client_id, "room", "general")

    # Retrieve later
    username = await ws_manager.get_user_data(client_id, "username")
    print(f"{username} joined")  # "Alice joined"
