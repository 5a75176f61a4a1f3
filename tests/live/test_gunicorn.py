"""Protocol class under gunicorn, configured as on the page about servers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import pytest
from websockets.asyncio.client import connect

from tests.support.server import LiveServer, until


@pytest.mark.timeout(60)
async def test_worker_class_with_config_kwargs_uses_protocol_class(serve: Callable[..., LiveServer]) -> None:
    """A worker class with `uvicorn_options()` in its `CONFIG_KWARGS` uses the protocol class, and drains."""
    server = serve("gunicorn", app="tests.live.gunicorn_app:app", args=("-k", "tests.live.gunicorn_app.StableWorker"))
    async with connect(server.url("/ws/ann")) as client:
        await client.send("hi")
        assert await asyncio.wait_for(client.recv(), 5) == "hi"
        assert server.get("/direct") == [True]
        server.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(client.wait_closed(), 10)
        assert client.close_code == 1012
        assert (client.close_reason or "").startswith("server shutdown; retry=")
    await until(lambda: server.process.poll() is not None, 20)
    assert not server.errors()
