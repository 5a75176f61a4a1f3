"""Tests of the connections of the `websockets` library, against a real server of that library."""

from __future__ import annotations

import asyncio
import http
import re
import ssl
import sys
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection, serve

from fastapi_ws_stabilizer.client import websockets_transport as over_websockets
from fastapi_ws_stabilizer.client.backoff import ReconnectAction, action_for
from fastapi_ws_stabilizer.client.errors import ClientClosedError, HttpRejection
from fastapi_ws_stabilizer.client.transport import TransportClosedError, UnreadableMessageError
from fastapi_ws_stabilizer.client.websockets_transport import connector
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_websocket import eventually, with_deadline

NO_PROXY: dict[str, Any] = {"proxy": None} if int(websockets.__version__.split(".")[0]) >= 15 else {}
"""The option of `websockets.connect` by which the environment names no proxy; older ones know none."""


@asynccontextmanager
async def served(handler: Callable[[ServerConnection], Awaitable[None]], **options: Any) -> Any:
    """Run a server on this machine; yield its URL."""
    async with serve(handler, "127.0.0.1", 0, **options) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"


async def echo(connection: ServerConnection) -> None:
    """Send everything back."""
    async for message in connection:
        await connection.send(message)


async def test_text_and_bytes_travel_in_both_directions() -> None:
    """A transport sends and receives text and bytes unchanged, in the subprotocol that the server selects."""
    async with served(echo, subprotocols=[SUBPROTOCOL]) as url:
        transport = await with_deadline(connector({})(url, [SUBPROTOCOL]))
        assert transport.subprotocol == SUBPROTOCOL
        for message in ("ü", b"\x00\xff", "", b""):
            await transport.send(message)
            assert await with_deadline(transport.receive()) == message
        await transport.close(1000, "bye")
        with pytest.raises(TransportClosedError):
            await transport.send("late")


async def test_incomplete_message_bytes_are_counted() -> None:
    """A transport knows how much of an incomplete message it has received, and how much the server has taken."""
    may_end = asyncio.Event()

    async def parts() -> Any:
        yield "a" * 1000
        await may_end.wait()
        yield "b"

    async def slow(connection: ServerConnection) -> None:
        await connection.send(parts())
        await connection.wait_closed()

    async with served(slow) as url:
        transport: Any = await with_deadline(connector({"compression": None})(url, [SUBPROTOCOL]))
        await eventually(lambda: transport.received()[0] >= 1000)
        count, at = transport.received()
        assert 0.0 < at <= monotonic()
        may_end.set()
        assert await with_deadline(transport.receive()) == "a" * 1000 + "b"
        assert transport.received()[0] > count
        before = transport.send_progress()
        await transport.send("x" * 1000)
        await eventually(lambda: transport.send_progress() > before or sys.platform != "linux")
        await transport.close(1000, "")


async def test_custom_create_connection_counts_no_bytes() -> None:
    """`create_connection` can be overridden; then only whole messages are counted."""
    async with served(echo) as url:
        dial = connector({"create_connection": ClientConnection})
        transport: Any = await with_deadline(dial(url, [SUBPROTOCOL]))
        assert transport.received() == (0, 0.0)
        await transport.close(1000, "")


async def test_server_without_subprotocol_reports_none() -> None:
    """The connection opens without a subprotocol, and the transport reports that."""
    async with served(echo) as url:
        transport = await with_deadline(connector({})(url, [SUBPROTOCOL]))
        assert transport.subprotocol is None
        await transport.close(1000, "")


async def test_server_close_frame_reaches_reader_and_writer() -> None:
    """Reader and writer both get the code and the reason that the server has sent."""

    async def close(connection: ServerConnection) -> None:
        await connection.close(4503, "draining; retry=250")

    async with served(close) as url:
        transport = await with_deadline(connector({})(url, [SUBPROTOCOL]))
        for _ in range(2):
            with pytest.raises(TransportClosedError) as caught:
                await with_deadline(transport.receive())
            assert (caught.value.code, caught.value.reason) == (4503, "draining; retry=250")
        with pytest.raises(TransportClosedError) as caught:
            await transport.send("x")
        assert caught.value.code == 4503


async def test_broken_connection_closes_with_1006() -> None:
    """Without a close frame the code is 1006."""

    async def cut(connection: ServerConnection) -> None:
        connection.transport.abort()

    async with served(cut) as url:
        transport = await with_deadline(connector({})(url, [SUBPROTOCOL]))
        with pytest.raises(TransportClosedError) as caught:
            await with_deadline(transport.receive())
        assert caught.value.code == 1006


async def test_oversized_message_requests_resync() -> None:
    """A message that the library rejects requests a resynchronisation, and the reason has the library's code."""

    async def much(connection: ServerConnection) -> None:
        await connection.send("x" * 2000)
        await connection.wait_closed()

    async with served(much) as url:
        transport = await with_deadline(connector({"max_size": 1000})(url, [SUBPROTOCOL]))
        with pytest.raises(UnreadableMessageError, match="1009") as caught:
            await with_deadline(transport.receive())
        assert caught.value.code == 4412


@pytest.mark.parametrize(
    ("status", "headers", "code", "reason"),
    [
        (400, {}, 4400, "HTTP 400"),
        (401, {}, 4401, "HTTP 401"),
        (403, {}, 4403, "HTTP 403"),
        (404, {}, 4404, "HTTP 404"),
        (410, {}, 4410, "HTTP 410"),
        (429, {"Retry-After": "7"}, 4429, r"HTTP 429; retry=7\d\d\d"),
        (503, {"Retry-After": "soon"}, 4503, "HTTP 503"),
        (503, {}, 4503, "HTTP 503"),
        (500, {}, 1006, "HTTP 500"),
    ],
)
async def test_rejected_handshake_becomes_close_code(
    status: int, headers: dict[str, str], code: int, reason: str
) -> None:
    """The HTTP status of a rejection becomes its close code, and `Retry-After` becomes a hint."""

    def refuse(connection: ServerConnection, _: object) -> Any:
        response = connection.respond(http.HTTPStatus(status), "")
        response.headers.update(headers)
        return response

    async with served(echo, process_request=refuse) as url:
        with pytest.raises(TransportClosedError) as caught:
            await with_deadline(connector(NO_PROXY)(url, [SUBPROTOCOL]))
    assert caught.value.code == code
    assert re.fullmatch(reason, caught.value.reason), "the client chooses the fraction of a second"


@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [
        (403, b'{"detail":"no such room"}', '{"detail":"no such room"}'),
        (500, b"<html>\r\n  <h1>Oops</h1>\n\x00\x1b[31m</html>", "<html> <h1>Oops</h1> [31m</html>"),
        (503, "ü".encode() * 1000, "ü" * 199 + "…"),
        (429, b"\xff\xfe", "\ufffd\ufffd"),
        (404, b"", ""),
    ],
)
async def test_rejection_has_status_and_start_of_body(status: int, body: bytes, shown: str) -> None:
    """The error of a rejected handshake has the status, and one line of at most 200 characters of the body."""

    def refuse(connection: ServerConnection, _: object) -> Any:
        response = connection.respond(http.HTTPStatus(status), "")
        del response.headers["Content-Length"]
        response.headers["Content-Length"] = str(len(body))
        response.body = body
        return response

    async with served(echo, process_request=refuse) as url:
        with pytest.raises(TransportClosedError) as caught:
            await with_deadline(connector(NO_PROXY)(url, [SUBPROTOCOL]))
    assert caught.value.rejection == HttpRejection(status, shown)
    assert shown not in caught.value.reason or not shown


async def test_answer_that_is_no_http_is_shown() -> None:
    """If the server does not speak HTTP, the reason has the start of what it sent, as printable text."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH_9.9\x1b[31m\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(TransportClosedError, match=r"HTTP.*SSH-2\.0-OpenSSH_9\.9") as caught:
            await with_deadline(connector(NO_PROXY)(f"ws://127.0.0.1:{port}/", [SUBPROTOCOL]))
    assert (caught.value.code, caught.value.reason.isprintable()) == (1006, True)


async def test_unreachable_server_is_lost_connection() -> None:
    """An unreachable server counts like a broken connection."""
    async with served(echo) as url:
        pass
    with pytest.raises(TransportClosedError) as caught:
        await with_deadline(connector({})(url, [SUBPROTOCOL]))
    assert caught.value.code == 1006


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("not a url", {}),
        ("http://127.0.0.1/ws", {}),
        ("ws://127.0.0.1:1/ws", {"no_such_option": 1}),
        ("ws://127.0.0.1:1/ws", {"ssl": ssl.create_default_context()}),
    ],
    ids=["no URL", "scheme", "TypeError", "ValueError"],
)
async def test_invalid_target_is_terminal(url: str, options: dict[str, Any]) -> None:
    """A wrong URL or option is reported with a close code after which no client reconnects."""
    with pytest.raises(ClientClosedError, match="invalid URL or options: ") as caught:
        await with_deadline(connector(options)(url, [SUBPROTOCOL]))
    assert action_for(caught.value.code) is ReconnectAction.STOP


async def test_invalid_certificate_is_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate error is a `ValueError` too, but a later attempt may succeed, so it is not terminal."""

    async def refuse(*_: Any, **__: Any) -> None:
        raise ssl.SSLCertVerificationError("certificate has expired")

    monkeypatch.setattr(over_websockets, "connect", refuse)
    with pytest.raises(TransportClosedError) as caught:
        await connector({})("wss://127.0.0.1/ws", [SUBPROTOCOL])
    assert caught.value.code == 1006


async def test_cancelled_close_aborts_connection() -> None:
    """Cancelling a close cuts the connection."""
    held = asyncio.Event()

    async def hold(connection: ServerConnection) -> None:
        connection.transport.pause_reading()
        await held.wait()

    async with served(hold, close_timeout=0.01) as url:
        transport = await with_deadline(connector({"close_timeout": 60})(url, [SUBPROTOCOL]))
        closing = asyncio.ensure_future(transport.close(4000, "drain"))
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait({closing}, timeout=5)
        assert closing.cancelled()
        with pytest.raises(TransportClosedError):
            await with_deadline(transport.receive())
        held.set()


async def test_close_frame_counts_when_network_stays_open() -> None:
    """A server that sends a close frame but does not close TCP is disconnected after 0.5 s, with its code."""

    async def close_and_stay(connection: ServerConnection) -> None:
        connection.transport.write(b"\x88\x05" + (4429).to_bytes(2, "big") + b"why")
        connection.transport.pause_reading()
        await connection.wait_closed()

    async with served(close_and_stay, close_timeout=0.1) as url:
        transport = await with_deadline(connector({})(url, [SUBPROTOCOL]))
        with pytest.raises(TransportClosedError) as caught:
            await asyncio.wait_for(transport.receive(), 3)
        assert (caught.value.code, caught.value.reason) == (4429, "why")
