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
from tests.unit.fake_websocket import eventually


class FakeTransport:
    """Takes what is written, and knows nothing of a network."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    resume_reading = close = pause_reading


class Reader:
    """An application that accepts a WebSocket and reads it to its end."""

    def __init__(self) -> None:
        self.accepted = False
        self.texts: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        self.accepted = True
        while (event := await receive())["type"] == "websocket.receive":
            self.texts.append(event["text"])


REQUEST = (
    b"GET / HTTP/1.1\r\nHost: testserver\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def text_frame(data: bytes, *, first: bool = True, last: bool = True) -> bytes:
    """A frame of a short text, under a mask that changes nothing."""
    return bytes([(0x80 if last else 0) | (1 if first else 0), 0x80 | len(data), 0, 0, 0, 0]) + data


def become_older(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let uvicorn's protocol collect a message in one `bytearray`, as versions up to 0.48 at least have done."""
    base = module.WebSocketsSansIOProtocol
    init = base.__init__

    def older_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.__dict__.pop("frames", None)

    def handle_text(self: Any, event: Any) -> None:
        self.bytes = bytearray(event.data)
        if event.fin:
            self.send_receive_event_to_app()

    def handle_cont(self: Any, event: Any) -> None:
        self.bytes.extend(event.data)
        if event.fin:
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self: Any) -> None:
        self.queue.put_nowait({"type": "websocket.receive", "text": self.bytes.decode()})

    monkeypatch.setattr(base, "__init__", older_init)
    for method in (handle_text, handle_cont, send_receive_event_to_app):
        monkeypatch.setattr(base, method.__name__, method)


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Does nothing."""


async def made(app: Any = application, **options: Any) -> Any:
    config = Config(app, log_level="critical", **options)
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


@pytest.mark.parametrize("unknown", ["nothing", "one-bytearray", "_OURS", "_OURS_OF_CONN", "_METHODS"])
async def test_without_a_link_messages_arrive_as_uvicorn_reads_them(
    unknown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or in fragments, on a uvicorn that is known and on one that is not."""
    if unknown == "one-bytearray":
        become_older(monkeypatch)
    elif unknown != "nothing":
        monkeypatch.setattr(module, unknown, (*getattr(module, unknown), f"no_{unknown}"))
    reader = Reader()
    protocol = await made(reader)
    assert protocol.known == (unknown == "nothing")
    protocol.connection_made(FakeTransport())
    protocol.data_received(REQUEST)
    await eventually(lambda: reader.accepted)
    protocol.data_received(text_frame(b"whole"))
    protocol.data_received(text_frame(b"hel", last=False) + text_frame(b"l", first=False, last=False))
    protocol.data_received(text_frame(b"o", first=False))
    await eventually(lambda: len(reader.texts) == 2)
    assert reader.texts == ["whole", "hello"]
    protocol.connection_lost(None)
    await eventually(lambda: not protocol.tasks)


async def test_who_reads_past_the_socket_is_told_so() -> None:
    """The queue is gone once a connection is attached; whoever waits for it gets an error instead of silence."""
    sink = module._ToSink(object())  # type: ignore[arg-type]
    assert sink.empty()
    with pytest.raises(RuntimeError, match="StableSocket"):
        await sink.get()
    sink.sink = None
    sink.put_nowait({"type": "websocket.disconnect"})
