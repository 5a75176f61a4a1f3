"""Clients that say something to an endpoint that does not read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.asyncio.client import connect

from fastapi_ws_stabilizer.client import connect as connect_client
from tests.live.server import SERVERS

SENT = 40
"""Messages: more than the inbox holds."""


@pytest.mark.parametrize("how", ["sends", "ignores", "waits", "subscribed"])
@pytest.mark.parametrize("kind", SERVERS)
async def test_a_client_of_an_endpoint_that_does_not_read_stays_connected(serve: Any, kind: str, how: str) -> None:
    """What the client says goes unread and is counted; what it is sent arrives long after inbox_pause_timeout."""
    server = serve(kind, app="tests.live.unread_app:app")
    async with connect(server.url(f"/{how}/ann"), ping_interval=None) as ws:
        for number in range(SENT):
            await ws.send(f"keepalive {number}")
        until = asyncio.get_running_loop().time() + 2.5
        while asyncio.get_running_loop().time() < until:
            if how == "waits":
                assert await asyncio.to_thread(server.post, "/broadcast") == 1
            assert await asyncio.wait_for(ws.recv(), 5) in ("tick", "news")
        await ws.send("the last")
    totals = server.get("/ws-stats/")
    assert totals["endings"] == {"client_close": 1}
    assert totals["messages_discarded"] >= SENT - 10
    assert server.errors() == []
    assert ("ignore_messages" in server.log) == (how in ("sends", "subscribed"))


async def test_a_request_to_an_endpoint_that_does_not_read_is_answered_with_an_error(serve: Any) -> None:
    """A request that is dropped unread is answered, so that its client does not wait in vain."""
    server = serve(app="tests.live.unread_app:app")
    async with connect_client(server.url("/ignores/ann")) as client:
        requests = [asyncio.ensure_future(client.request("ask", number, timeout=10)) for number in range(20)]
        done, rest = await asyncio.wait(requests, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert {str(one.exception()).partition(":")[0] for one in done} == {"not_read"}
        for one in rest:
            one.cancel()
