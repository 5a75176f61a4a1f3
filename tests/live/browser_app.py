"""Browser client example, with routes through which its tests act on the server."""

from __future__ import annotations

import json
import os
from typing import Any

from fastapi_ws_stabilizer import WebSocketConfig

for option, value in json.loads(os.environ.get("TEST_WS_CONFIG", "{}")).items():
    os.environ[f"WS_{option.upper()}"] = json.dumps(value)

from examples.browser_client.app import app, manager  # noqa: E402

assert WebSocketConfig.from_env() == manager.config


@app.get("/clients")
async def clients() -> list[dict[str, Any]]:
    """Return every connection with its round trip."""
    return [{"client": ws.client_id, "rtt": ws.rtt} for ws in manager.get_sockets()]


@app.post("/close")
async def close(close_frame: dict[str, Any]) -> int:
    """Close all connections with a code and a reason."""
    sockets = manager.get_sockets()
    for ws in sockets:
        await ws.close(close_frame["code"], close_frame["reason"])
    return len(sockets)
