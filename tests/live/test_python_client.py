"""Guarantees of the Python client on each real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from websockets.asyncio.client import connect as plain_connect

from fastapi_ws_stabilizer.client import ClientClosedError, RefusedError, RequestError, connect
from tests.support.server import SERVERS, LiveServer, until

Serve = Callable[..., LiveServer]

APP = "tests.live.client_app:app"


@pytest.mark.parametrize("kind", SERVERS)
async def test_client_loses_nothing_and_reports_rejected_messages(serve: Serve, kind: str) -> None:
    """The client flushes on exit, waits at the rate limit, reports rejections, and reads deep JSON of other clients."""
    server = serve(kind, app=APP)
    async with connect(server.url("/ws/cron")) as client:
        sent = [client.send(number, event="say") for number in range(150)]
    assert [one.exception() for one in sent] == [None] * 150
    assert server.get("/received/cron") == list(range(150))

    async with connect(server.url("/ws/ann")) as client:
        document: Any = "x"
        for _ in range(62):
            document = [document]
        async with plain_connect(server.url("/ws/other")) as other:
            await other.send(json.dumps({"type": "relay", "doc": document}))
            message = await asyncio.wait_for(anext(client), 5)
            assert (message.event, message.data["doc"]["doc"]) == ("relayed", document)
        with pytest.raises(RefusedError, match="unknown_type"):
            await asyncio.wait_for(client.send(1, event="nothing"), 5)
        with pytest.raises(RequestError, match="handler_failed"):
            await asyncio.wait_for(client.request("divide", 0), 5)
        await until(lambda: client.state == "open")
        assert await client.request("divide", 2) == 0.5

        client.send(None, event="leave")
        with pytest.raises(ClientClosedError, match="banned"):
            await asyncio.wait_for(anext(client), 5)
        assert client.closed is not None
        assert client.closed.code == 4403
    bugs = [line for line in server.errors() if "ZeroDivisionError" not in line]
    assert len(bugs) <= 1, bugs


@pytest.mark.parametrize("kind", SERVERS)
async def test_rejected_client_gets_body_of_http_response(serve: Serve, kind: str) -> None:
    """The error of a client that the server rejects has the HTTP status and the detail that the app gave."""
    server = serve(kind, app=APP)
    with pytest.raises(ClientClosedError, match="no room is called attic") as caught:
        async with connect(server.url("/rooms/attic")):
            pass
    assert (caught.value.code, caught.value.reason) == (4404, "HTTP 404")
    assert caught.value.rejection is not None
    assert caught.value.rejection.status == 404
    assert json.loads(caught.value.rejection.body) == {"detail": "no room is called attic"}
    assert not server.errors()
