"""Code of the reference library runs with only its import changed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from websockets.asyncio.client import connect

from tests.support.plain_client import received_close
from tests.support.server import UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]


@pytest.mark.parametrize("kind", UVICORN)
async def test_seed_readme_examples_run_as_written(serve: Serve, kind: str) -> None:
    """Quick Start and patterns 1, 2, 4 and 5 do what their comments say, and end without a traceback."""
    server = serve(kind, app="tests.live.seed_app:app")
    async with connect(server.url("/ws/ann@example.com")) as ann, connect(server.url("/ws/bob")) as bob:
        await until(lambda: server.get("/stats")["active_connections"] == 2)
        await ann.send("hello")
        for client in (ann, bob):
            assert json.loads(await client.recv()) == {"user": "ann@example.com", "message": "hello"}
        await ann.send("pong")

        await asyncio.to_thread(server.post, "/pattern-1/bob")
        assert [await ann.recv(), await ann.recv()] == ["System message", '{"message": "chat"}']
        assert await bob.recv() == "System message"

        await asyncio.to_thread(server.post, "/pattern-2/bob")
        assert await bob.recv() == "Direct message"
        await asyncio.to_thread(server.post, "/pattern-2/unknown")
        await until(lambda: "Client unknown is no longer connected" in server.log)

        stats = server.get("/stats")
        assert stats["client_ids"] == ["ann@example.com", "bob"]
        assert stats["memory"]["connection_count"] == 2

    async with connect(server.url("/pattern-5/carol")) as carol:
        assert (await received_close(carol, discard=False))[0] == 1000
    await until(lambda: "Alice joined" in server.log)
    await until(lambda: server.get("/stats")["active_connections"] == 0)
    await asyncio.to_thread(server.terminate, 5)
    assert not server.errors()


async def test_seed_endpoint_cleanup_does_not_end_new_session(serve: Serve) -> None:
    """disconnect(client_id) in a replaced endpoint leaves the newer connection open, unlike in the reference."""
    server = serve(app="tests.live.seed_app:app")
    async with connect(server.url("/ws/ann")) as old:
        await until(lambda: server.get("/stats")["active_connections"] == 1)
        async with connect(server.url("/ws/ann")) as new:
            assert (await received_close(old, discard=False))[0] == 4409
            await new.send("I am here")
            assert json.loads(await new.recv())["message"] == "I am here"
            assert server.get("/stats")["client_ids"] == ["ann"]
    assert not server.errors()
