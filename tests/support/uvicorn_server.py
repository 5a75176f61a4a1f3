"""A real uvicorn in the process and on the event loop of a test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from tests.support.fake_websocket import with_deadline


@asynccontextmanager
async def served(app: Any, **options: Any) -> AsyncIterator[str]:
    """Serve an app with options of uvicorn, on a free port of this machine, and yield the URL of its WebSocket."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **options))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined,method-assign]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            assert not task.done()
            await asyncio.sleep(0.01)
        try:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}/ws/ann"
        finally:
            server.should_exit = True
            await with_deadline(task)
