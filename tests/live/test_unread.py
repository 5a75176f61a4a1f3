"""Clients that send to an endpoint that does not read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from fastapi_ws_stabilizer.client import connect as connect_client
from tests.support.plain_client import received_close
from tests.support.server import SERVERS

SENT = 40
"""Messages, more than the inbox holds."""


@pytest.mark.parametrize("behaviour", ["sends", "ignores", "waits", "subscribed"])
@pytest.mark.parametrize("kind", SERVERS)
async def test_client_of_non_reading_endpoint_stays_connected(serve: Any, kind: str, behaviour: str) -> None:
    """Messages of the client are discarded and counted, and it gets messages long after inbox_pause_timeout."""
    server = serve(kind, app="tests.live.unread_app:app")
    async with connect(server.url(f"/{behaviour}/ann"), ping_interval=None) as ws:
        for number in range(SENT):
            await ws.send(f"keepalive {number}")
        deadline = asyncio.get_running_loop().time() + 2.5
        while asyncio.get_running_loop().time() < deadline:
            if behaviour == "waits":
                assert await asyncio.to_thread(server.post, "/broadcast") == 1
            assert await asyncio.wait_for(ws.recv(), 5) in ("tick", "news")
        await ws.send("the last")
    counters = server.get("/ws-stats/")
    assert counters["endings"] == {"client_close": 1}
    assert counters["messages_discarded"] >= SENT - 10
    assert server.errors() == []
    assert ("ignore_messages" in server.log) == (behaviour in ("sends", "subscribed"))


@pytest.mark.parametrize("behaviour", ["ignores", "waits"])
@pytest.mark.parametrize("kind", SERVERS)
async def test_request_to_non_reading_endpoint_gets_error(serve: Any, kind: str, behaviour: str) -> None:
    """A request that no code reads gets an error at once, so its client does not wait."""
    server = serve(kind, app="tests.live.unread_app:app")
    async with connect_client(server.url(f"/{behaviour}/ann")) as client:
        requests = [client.request("ask", number, timeout=10) for number in range(20)]
        answers = await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 5)
        assert {str(one).partition(":")[0] for one in answers} == {"not_read"}


async def test_request_is_handled_beside_wait_closed(serve: Any) -> None:
    """An endpoint in wait_closed with a task that reads answers every request."""
    server = serve(app="tests.live.unread_app:app")
    async with connect_client(server.url("/works/ann")) as client:
        answers = await asyncio.wait_for(asyncio.gather(*(client.request("ask", n) for n in range(20))), 5)
        assert answers == list(range(20))


@pytest.mark.parametrize("kind", SERVERS)
async def test_messages_to_hanging_endpoint_wait_for_next_connection(serve: Any, kind: str) -> None:
    """A hanging endpoint is closed with 1013 despite heartbeats, and no message is counted as discarded."""
    beats = json.dumps({"heartbeat_type": "ping", "heartbeat_interval": 0.2, "heartbeat_timeout": 5})
    server = serve(kind, app="tests.live.unread_app:app", env={"TEST_UNREAD_CONFIG": beats})
    async with connect(server.url("/hangs/ann"), subprotocols=[Subprotocol("stabilizer.v1.json")]) as ws:
        await ws.send(json.dumps({"type": "hello", "v": 1, "n": 0, "seq": 0}))
        for number in range(1, 17):  # the last ones are read by the server after its close
            await ws.send(json.dumps({"type": "msg", "seq": number, "data": number}))
        assert (await received_close(ws))[0] == 1013
    assert server.get("/ws-stats/")["messages_discarded"] == 0
