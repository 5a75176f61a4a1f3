"""gunicorn worker example, with a route that shows whether its connections use the protocol class."""

from __future__ import annotations

from examples.gunicorn_worker import StableWorker, app, manager

__all__ = ["StableWorker", "app"]


@app.get("/direct")
async def list_direct() -> list[bool]:
    return [connection.is_direct for connection in manager._node.connections]
