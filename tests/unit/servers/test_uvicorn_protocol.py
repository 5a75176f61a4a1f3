"""Tests of the protocol class on known and unknown versions of uvicorn."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from fastapi_ws_stabilizer.compat.uvicorn import PushedEvents
from fastapi_ws_stabilizer.servers.direct import EXTENSION
from fastapi_ws_stabilizer.servers.uvicorn import compat as uvicorn_internals
from fastapi_ws_stabilizer.servers.uvicorn.compat import WebSocketsSansIOProtocol
from fastapi_ws_stabilizer.servers.uvicorn.deflate import DEFLATE
from fastapi_ws_stabilizer.servers.uvicorn.protocol import StableWebSocketProtocol
from tests.support.fake_websocket import eventually


@pytest.fixture(autouse=True)
def unexamined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was found in the class of uvicorn."""
    monkeypatch.setattr(uvicorn_internals, "_missing", {})
    monkeypatch.setattr(uvicorn_internals, "_missing_at_handshake", {})


class FakeTransport:
    """Transport without a network that records what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.reading = True
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.closed = True


class Reader:
    """Application that accepts a WebSocket when it may, and reads it to its end."""

    def __init__(self, answer: str = "websocket.accept") -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.answer = answer
        self.accepted = False
        self.texts: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await self.may_answer.wait()
        await send({"type": self.answer})
        self.accepted = True
        while (event := await receive())["type"] == "websocket.receive":
            self.texts.append(event["text"])


REQUEST = (
    b"GET / HTTP/1.1\r\nHost: testserver\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


CLOSE_FRAME = b"\x88\x80\0\0\0\0"
RESERVED_FRAME = b"\x83\x80\0\0\0\0"
PING_FRAME = b"\x89\x80\0\0\0\0"


def text_frame(data: bytes, *, first: bool = True, last: bool = True) -> bytes:
    """Return a frame of a short text, with a zero mask."""
    return bytes([(0x80 if last else 0) | (1 if first else 0), 0x80 | len(data), 0, 0, 0, 0]) + data


def become_older(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make uvicorn's protocol collect a message in one `bytearray`, as versions up to 0.48 at least do."""
    base = WebSocketsSansIOProtocol
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
    """Do nothing."""


async def made(app: Any = application, **options: Any) -> Any:
    config = Config(app, log_level="critical", **options)
    config.load()
    protocol = StableWebSocketProtocol(config, ServerState(), app_state={}, _loop=asyncio.get_running_loop())
    protocol.scope = {"type": "websocket", "headers": [], "extensions": {}}
    protocol.request = protocol.response = None
    return protocol


async def scope_of(protocol: Any) -> Any:
    protocol.handshake_complete, protocol.close_timer = True, asyncio.get_running_loop().call_later(60, print)
    await protocol.run_asgi()
    protocol.close_timer.cancel()
    return protocol.scope


async def test_direct_transport_is_offered_on_known_uvicorn() -> None:
    """On a known uvicorn the scope offers the direct transport."""
    protocol = await made()
    assert protocol.conn.available_extensions == [DEFLATE]
    assert EXTENSION in (await scope_of(protocol))["extensions"]


async def test_disabled_deflate_is_not_negotiated() -> None:
    """`--ws-per-message-deflate false` disables the negotiation."""
    assert not (await made(ws_per_message_deflate=False)).conn.available_extensions


@pytest.mark.parametrize("name", ["REQUIRED_ATTRIBUTES", "_OURS_OF_CONN", "_METHODS"])
async def test_missing_uvicorn_internals_disable_direct_transport(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If an internal of uvicorn is missing, no direct transport is offered, and the log names it once."""
    monkeypatch.setattr(uvicorn_internals, name, (*getattr(uvicorn_internals, name), f"moved_{name}"))
    with caplog.at_level(logging.WARNING, "fastapi_ws_stabilizer"):
        protocols = [await made() for _ in range(3)]
    assert [record.message for record in caplog.records if f"moved_{name}" in record.message] != []
    assert len(caplog.records) == 1
    assert EXTENSION not in (await scope_of(protocols[0]))["extensions"]
    assert DEFLATE not in protocols[0].conn.available_extensions


async def test_internals_are_examined_once_per_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first object of a class is examined, before its handshake and after it."""
    await scope_of(await made())
    for name in ("REQUIRED_ATTRIBUTES", "HANDSHAKE_ATTRIBUTES"):
        monkeypatch.setattr(uvicorn_internals, name, ("moved_later",))
    assert EXTENSION in (await scope_of(await made()))["extensions"]


async def test_missing_handshake_internals_disable_direct_transport(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If uvicorn does not set an attribute at the handshake, no direct transport is offered, and the log names it."""
    monkeypatch.setattr(uvicorn_internals, "HANDSHAKE_ATTRIBUTES", ("scope", "moved_at_handshake"))
    with caplog.at_level(logging.WARNING, "fastapi_ws_stabilizer"):
        assert EXTENSION not in (await scope_of(await made()))["extensions"]
    assert "moved_at_handshake" in caplog.text


@pytest.mark.parametrize("unknown", ["nothing", "one-bytearray", "REQUIRED_ATTRIBUTES", "_OURS_OF_CONN", "_METHODS"])
async def test_messages_arrive_without_direct_transport(unknown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages arrive whole or in fragments, on a known uvicorn and on an unknown one."""
    if unknown == "one-bytearray":
        become_older(monkeypatch)
    elif unknown != "nothing":
        monkeypatch.setattr(uvicorn_internals, unknown, (*getattr(uvicorn_internals, unknown), f"no_{unknown}"))
    reader = Reader()
    protocol = await made(reader)
    assert protocol.is_supported == (unknown in ("nothing", "one-bytearray"))
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


@pytest.mark.parametrize("header", [b"Sec-WebSocket-Key: \xff", b"Upgrade: \xe9", b"Sec-WebSocket-Extensions: \x80"])
async def test_non_ascii_handshake_is_rejected_with_http_answer(header: bytes) -> None:
    """The handshake gets an answer in HTTP, although it cannot be quoted in it."""
    protocol, transport = await made(), FakeTransport()
    protocol.connection_made(transport)
    name = header.partition(b":")[0]
    lines = [line for line in REQUEST.split(b"\r\n") if not line.startswith(name + b":")]
    protocol.data_received(b"\r\n".join([lines[0], header, *lines[1:]]))
    assert transport.written.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))
    assert transport.closed
    protocol.connection_lost(None)


async def test_non_ascii_path_is_answered() -> None:
    """With websockets 17 the application gets the path; earlier versions cannot read it, and the answer is 400."""
    protocol, transport = await made(), FakeTransport()
    protocol.connection_made(transport)
    protocol.data_received(REQUEST.replace(b"GET /", b"GET \x80", 1))
    assert protocol.tasks or (transport.written.startswith(b"HTTP/1.1 400") and transport.closed)
    protocol.connection_lost(None)


async def early(answer: str, *frames: bytes) -> tuple[FakeTransport, Reader]:
    """Return a client that sends before its handshake is answered, and the answer."""
    reader, transport = Reader(answer), FakeTransport()
    reader.may_answer.clear()
    protocol = await made(reader)
    protocol.connection_made(transport)
    protocol.data_received(REQUEST)
    for frame in frames:
        protocol.data_received(frame)
    assert transport.written == b""
    assert not transport.reading
    reader.may_answer.set()
    await eventually(lambda: transport.written)
    assert transport.reading or transport.closed
    protocol.connection_lost(None)
    await eventually(lambda: not protocol.tasks)
    return transport, reader


@pytest.mark.parametrize(
    ("frame", "code"), [(RESERVED_FRAME, 1002), (text_frame(b"\xff"), 1007), (CLOSE_FRAME, None), (PING_FRAME, None)]
)
async def test_frames_before_handshake_answer_are_parsed_after_it(frame: bytes, code: int | None) -> None:
    """No frame is sent before the answer to a handshake, and an invalid one raises nothing there."""
    transport, _ = await early("websocket.accept", frame)
    head, _, frames = transport.written.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert frames[:1] == (b"\x8a" if frame is PING_FRAME else b"\x88")
    assert code is None or frames[2:4] == code.to_bytes(2, "big")


async def test_messages_before_handshake_answer_are_read_after_it() -> None:
    """A client that sends early loses nothing."""
    _, reader = await early("websocket.accept", text_frame(b"a"), text_frame(b"b"))
    assert reader.texts == ["a", "b"]


async def test_frames_before_rejection_are_not_parsed() -> None:
    """After a rejection nothing is written."""
    transport, _ = await early("websocket.close", RESERVED_FRAME, PING_FRAME)
    assert transport.written.startswith(b"HTTP/1.1 403 ")
    assert transport.written.count(b"\r\n\r\n") == 1
    assert transport.written.endswith(b"\r\n\r\n")


async def test_invalid_utf8_before_close_fails_with_1007() -> None:
    """In one read, without a direct transport, invalid UTF-8 fails the connection, and the close frame is ignored."""
    reader, transport = Reader(), FakeTransport()
    protocol = await made(reader)
    protocol.connection_made(transport)
    protocol.data_received(REQUEST)
    await eventually(lambda: reader.accepted)
    protocol.data_received(text_frame(b"\xff") + CLOSE_FRAME)
    await eventually(lambda: transport.closed)
    assert transport.written.partition(b"\r\n\r\n")[2] == b"\x88\x13\x03\xeftext is not UTF-8"
    assert reader.texts == []
    protocol.connection_lost(None)
    await eventually(lambda: not protocol.tasks)


async def test_receive_after_attach_raises() -> None:
    """After the attach there is no queue, so a waiting `receive` raises."""
    queue = PushedEvents(object())  # type: ignore[arg-type]
    assert queue.empty()
    with pytest.raises(RuntimeError, match="StableSocket"):
        await queue.get()
    queue.stop()
    queue.put_nowait({"type": "websocket.disconnect"})


class CallingSink:
    """Sink that calls a function at the first message."""

    def __init__(self, act: Any) -> None:
        self.act = act
        self.gone_with: list[Any] = []

    def data_received(self) -> bool:
        return True

    def message_received(self, message: str | bytes) -> None:
        self.act()

    def violation_received(self, fail: Any) -> None:
        fail()

    def before_shutdown(self) -> None:
        pass

    def connection_lost(self, event: Any) -> None:
        self.gone_with.append(event.get("code"))


async def test_direct_close_before_received_close_frame_is_answered() -> None:
    """A close by a message takes the client's close frame behind it as the answer, and sends no second frame."""
    reader, transport = Reader(), FakeTransport()
    protocol = await made(reader)
    protocol.connection_made(transport)
    protocol.data_received(REQUEST)
    await eventually(lambda: reader.accepted)
    sink = CallingSink(lambda: protocol.close(4503, "out of memory"))
    protocol.attach(sink, max_message_bytes=1000, own_pings=True)
    protocol.data_received(text_frame(b"a") + CLOSE_FRAME)
    assert transport.written.partition(b"\r\n\r\n")[2] == b"\x88\x0f\x11\x97out of memory"
    assert transport.closed
    assert sink.gone_with == []
    protocol.connection_lost(None)


async def test_attached_protocol_has_small_dict() -> None:
    """The attributes of an attached instance fit into a table of 64 entries, of which Python uses two thirds.

    So those that this class adds to uvicorn's are slots.
    """
    reader, transport = Reader(), FakeTransport()
    protocol = await made(reader)
    protocol.connection_made(transport)
    protocol.data_received(REQUEST)
    await eventually(lambda: reader.accepted)
    protocol.attach(CallingSink(print), max_message_bytes=1000, own_pings=True)
    assert len(vars(protocol)) <= 42
    made_by_uvicorn = vars(WebSocketsSansIOProtocol(protocol.config, ServerState(), {})).keys()
    assert vars(protocol).keys() - made_by_uvicorn <= {"scope", "request", "response"}  # made by its handshake
    assert sys.getsizeof(vars(protocol)) == sys.getsizeof(dict(vars(protocol)))
    protocol.connection_lost(None)


@pytest.mark.parametrize("error", [OSError(107, "Transport endpoint is not connected"), BrokenPipeError()])
async def test_half_close_of_reset_connection_is_silent(error: OSError) -> None:
    """When the client has reset its connection, the half-close raises nothing."""
    reader, transport = Reader(), FakeTransport()

    def write_eof() -> None:
        raise error

    transport.can_write_eof = lambda: True  # type: ignore[attr-defined]
    transport.write_eof = write_eof  # type: ignore[attr-defined]
    protocol = await made(reader)
    protocol.connection_made(transport)
    protocol.data_received(REQUEST)
    await eventually(lambda: reader.accepted)
    protocol.attach(CallingSink(lambda: None), max_message_bytes=1000, own_pings=True)
    protocol.data_received(RESERVED_FRAME)
    assert protocol.close_timer is not None
    protocol.close_timer.cancel()
    protocol.connection_lost(None)
