"""Threads that send to the clients of a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.asyncio.client import connect

from tests.live.threads_app import MESSAGES
from tests.support.server import SERVERS


@pytest.mark.parametrize("kind", SERVERS)
async def test_threaded_broadcasts_arrive_in_order_of_each_thread(serve: Any, kind: str) -> None:
    """`manager.from_thread.broadcast` of several threads loses no message and mixes no bytes."""
    server = serve(kind, app="tests.live.threads_app:app")
    async with connect(server.url("/ws/ann"), max_queue=None) as ann:
        results = await asyncio.to_thread(server.post, "/publish?path=from_thread")
        assert results == {"queued for 1": 3 * MESSAGES}
        messages = [str(await asyncio.wait_for(ann.recv(), 5)) for _ in range(3 * MESSAGES)]
    for name in range(3):
        from_this_thread = [message for message in messages if message.startswith(f"{name}:")]
        assert from_this_thread == [f"{name}:{number}:" + "x" * 200 for number in range(MESSAGES)]
    assert server.errors() == []


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_broadcast_on_loop_of_other_thread_raises(serve: Any, kind: str) -> None:
    """`asyncio.run(manager.broadcast(...))` in a thread raises `WrongLoopError`, and sends nothing."""
    server = serve(kind, app="tests.live.threads_app:app")
    async with connect(server.url("/ws/ann"), max_queue=None) as ann:
        assert await asyncio.to_thread(server.post, "/publish?path=own_loop") == {"WrongLoopError": 3 * MESSAGES}
        assert sum((await asyncio.to_thread(server.post, "/publish?path=from_thread")).values()) == 3 * MESSAGES
        assert str(await asyncio.wait_for(ann.recv(), 5)).split(":")[1] == "0"
    assert server.errors() == []
