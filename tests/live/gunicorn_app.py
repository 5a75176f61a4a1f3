"""The example of a gunicorn worker, which says whether its connections have the protocol class."""

from __future__ import annotations

from examples.gunicorn_worker import StableWorker, app, manager

__all__ = ["StableWorker", "app"]


@app.get("/linked")
async def linked() -> list[bool]:
    return [connection.is_direct for connection in manager._node.connections]
