"""Tests of the bound of what a client has not confirmed to have read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from websockets.asyncio.client import connect

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConfig, WebSocketConnectionManager
from fastapi_ws_stabilizer.connection.read_window import MAX_UNREAD_BYTES, ReadWindow
from tests.support.fake_websocket import with_deadline
from tests.support.uvicorn_server import served
from tests.support.versions import HAS_DIRECT_TRANSPORT

HALF = MAX_UNREAD_BYTES // 2


class Direct:
    """Direct transport that records pings."""

    def __init__(self) -> None:
        self.pings: list[bytes] = []

    def ping(self, payload: bytes) -> None:
        self.pings.append(payload)


def made() -> tuple[ReadWindow, Direct]:
    direct: Any = Direct()
    return ReadWindow(direct), direct


def test_half_window_asks_for_one_confirmation() -> None:
    """A ping follows the byte that uses half of the window, and no other until it is answered."""
    window, direct = made()
    window.sent(HALF - 1)
    assert direct.pings == []
    window.sent(1)
    window.sent(HALF)
    assert len(direct.pings) == 1
    assert window.room == 0


def test_pong_confirms_bytes_before_its_ping_only() -> None:
    """Bytes after the ping stay unread, and a new ping asks for them."""
    window, direct = made()
    window.sent(HALF + 100)
    window.sent(HALF - 100)
    assert window.confirm(direct.pings[0])
    assert window.room == MAX_UNREAD_BYTES - (HALF - 100)
    window.sent(100)
    assert len(direct.pings) == 2
    assert direct.pings[1] != direct.pings[0]
    assert window.confirm(direct.pings[1])
    assert window.room == MAX_UNREAD_BYTES


def test_pong_asks_again_if_half_is_still_unread() -> None:
    """A pong behind which half of the window is unread is followed by the next ping at once."""
    window, direct = made()
    window.sent(HALF)
    window.sent(HALF)
    assert window.confirm(direct.pings[0])
    assert len(direct.pings) == 2


def test_other_pongs_confirm_nothing() -> None:
    """A pong without a ping, an earlier one, or one of another ping is not for this window."""
    window, direct = made()
    assert not window.confirm(b"")
    window.sent(MAX_UNREAD_BYTES)
    assert not window.confirm(b"other")
    assert window.confirm(direct.pings[0])
    assert not window.confirm(direct.pings[0])


def test_message_beyond_window_leaves_no_room() -> None:
    """A message larger than the window leaves no room, instead of a negative one."""
    window, _ = made()
    window.sent(10 * MAX_UNREAD_BYTES)
    assert window.room == 0


@pytest.mark.skipif(not HAS_DIRECT_TRANSPORT, reason="uvicorn has no direct transport")
async def test_full_inbox_does_not_keep_values_from_reading_client() -> None:
    """An endpoint that answers many messages with values waits for no pong behind them, which it would never read."""
    options: dict[str, Any] = {"inbox_max_messages": 5, "outbox_max_messages": 50}
    manager = WebSocketConnectionManager(WebSocketConfig(handle_signals=False, **options))
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        async for message in ws:
            for key in range(10):
                await ws.send(f"{message} {key}".ljust(1000), coalesce_key=f"{message} {key}")

    async with (
        served(app, **manager.uvicorn_options()) as url,
        connect(url, compression=None, max_queue=None) as client,
    ):
        sending = asyncio.gather(*(client.send(str(number)) for number in range(100)))
        got = [str(await with_deadline(client.recv())).rstrip() for _ in range(1000)]
        await with_deadline(sending)
        assert got == [f"{number} {key}" for number in range(100) for key in range(10)]
