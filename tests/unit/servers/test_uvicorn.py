"""Tests of the protocol class where it meets a uvicorn that it does not know."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from fastapi_ws_stabilizer.servers import uvicorn as module
from fastapi_ws_stabilizer.servers.deflate import DEFLATE
from fastapi_ws_stabilizer.servers.link import EXTENSION


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Does nothing."""


async def made(**options: Any) -> Any:
    config = Config(application, log_level="critical", **options)
    config.load()
    protocol = module.StableWebSocketProtocol(config, ServerState(), app_state={}, _loop=asyncio.get_running_loop())
    protocol.scope = {"type": "websocket", "extensions": {}}
    return protocol


async def scope_of(protocol: Any) -> Any:
    protocol.handshake_complete, protocol.close_timer = True, asyncio.get_running_loop().call_later(60, print)
    await protocol.run_asgi()
    protocol.close_timer.cancel()
    return protocol.scope


async def test_the_extension_is_offered_with_compression_of_our_kind() -> None:
    """On a uvicorn that it knows the application is told of the link."""
    protocol = await made()
    assert protocol.conn.available_extensions == [DEFLATE]
    assert EXTENSION in (await scope_of(protocol))["extensions"]


async def test_without_deflate_none_is_offered() -> None:
    """`--ws-per-message-deflate false` is obeyed."""
    assert not (await made(ws_per_message_deflate=False)).conn.available_extensions


@pytest.mark.parametrize("name", ["_OURS", "_OURS_OF_CONN", "_METHODS"])
async def test_unknown_internals_make_it_uvicorns_own_and_are_told_once(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where something that it stands on is missing, no link is offered, and the log says what, once."""
    monkeypatch.setattr(module, name, (*getattr(module, name), f"moved_{name}"))
    with caplog.at_level(logging.WARNING, "fastapi_ws_stabilizer"):
        protocols = [await made() for _ in range(3)]
    assert [record.message for record in caplog.records if f"moved_{name}" in record.message] != []
    assert len(caplog.records) == 1
    assert EXTENSION not in (await scope_of(protocols[0]))["extensions"]
    assert DEFLATE not in protocols[0].conn.available_extensions


async def test_who_reads_past_the_socket_is_told_so() -> None:
    """The queue is gone once a connection is attached; whoever waits for it gets an error instead of silence."""
    sink = module._ToSink(object())  # type: ignore[arg-type]
    assert sink.empty()
    with pytest.raises(RuntimeError, match="StableSocket"):
        await sink.get()
    sink.sink = None
    sink.put_nowait({"type": "websocket.disconnect"})
