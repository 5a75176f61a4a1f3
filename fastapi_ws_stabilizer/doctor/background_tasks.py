"""Detection of WebSocket routes that take `BackgroundTasks`, which FastAPI never runs there (D23)."""

from __future__ import annotations

from typing import Any

from fastapi_ws_stabilizer.compat.fastapi import takes_background_tasks
from fastapi_ws_stabilizer.doctor.context import dependants_of
from fastapi_ws_stabilizer.handshake.routes import websocket_routes


def routes_with_background_tasks(app: Any) -> tuple[str, ...]:
    """Return the paths of the WebSocket routes with `BackgroundTasks` in the endpoint or a dependency."""
    return tuple(
        path
        for path, route in websocket_routes(getattr(app, "routes", ()))
        if any(map(takes_background_tasks, dependants_of(route)))
    )
