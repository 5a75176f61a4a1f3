"""Handshake responses on real servers: a subprotocol, headers, or 403 behind static files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from tests.support.server import SERVERS, LiveServer, until

Serve = Callable[..., LiveServer]
OFFER = [Subprotocol("ocpp2.0.1"), Subprotocol("ocpp1.6")]


@pytest.mark.parametrize("kind", SERVERS)
async def test_handshake_answer_has_subprotocol_and_headers(serve: Serve, kind: str) -> None:
    """Each server answers with the endpoint's subprotocol, and all except granian with the headers of a hook."""
    server = serve(kind, app="tests.live.subprotocol_app:app")
    async with connect(server.url("/speaks/cp1"), subprotocols=OFFER) as client:
        assert client.subprotocol == "ocpp1.6"
        assert json.loads(await asyncio.wait_for(client.recv(), 5)) == {"subprotocol": "ocpp1.6"}
        assert client.response is not None
        cookies = [] if kind == "granian" else ["seen=cp1; HttpOnly", "node=n1"]  # granian sends no accept headers
        assert client.response.headers.get_all("set-cookie") == cookies
        await client.send("ping me")
        assert await asyncio.wait_for(client.recv(), 5) == "ping me"


@pytest.mark.parametrize("kind", SERVERS)
async def test_unanswered_subprotocols_are_logged_once(serve: Serve, kind: str) -> None:
    """A client with unanswered subprotocols is accepted without one, and the log shows the fix once."""
    server = serve(kind, app="tests.live.subprotocol_app:app")
    for number in range(3):
        async with connect(server.url(f"/speaks-none/cp{number}"), subprotocols=OFFER) as client:
            assert client.subprotocol is None
            assert json.loads(await asyncio.wait_for(client.recv(), 5)) == {"subprotocol": None}
    await until(lambda: "subprotocol_unanswered" in server.log, what="the warning")
    lines = [line for line in server.log.splitlines() if "subprotocol_unanswered" in line]
    assert len(lines) == 1
    assert "route=/speaks-none/{client_id}" in lines[0]
    assert "socket_for(subprotocols=" in lines[0]
    assert "ocpp" not in lines[0]


@pytest.mark.parametrize("kind", SERVERS)
async def test_wrong_path_behind_static_files_is_logged(serve: Serve, kind: str) -> None:
    """A WebSocket on a path of a static mount is rejected, with a log line instead of a traceback."""
    server = serve(kind, app="tests.live.subprotocol_app:app")
    with pytest.raises(InvalidStatus) as refused:
        async with connect(server.url("/wrong/cp1")):
            pass
    assert refused.value.response.status_code == 403
    await until(lambda: "no_websocket_route" in server.log, what="the line")
    (line,) = [line for line in server.log.splitlines() if "no_websocket_route" in line]
    assert "path=/wrong/cp1" in line
    assert 'taken_by="the mount at /"' in line
    assert "Traceback" not in server.log
    assert "D20" not in server.log
