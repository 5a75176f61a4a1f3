"""Tests of reading an upgrade request: what is read here, the parser of `websockets` reads in the same form."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.http11 import Request
from websockets.server import ServerProtocol

from fastapi_ws_stabilizer.servers.uvicorn.upgrade import MAX_BYTES, read_request, with_shared_parts
from tests.fuzz import strategies
from tests.unit.servers.test_uvicorn_protocol import REQUEST, FakeTransport, Reader, made

BROWSER = (
    b"GET /ws/ann?token=a%20b HTTP/1.1\r\nhost: example.com:8000\r\nconnection: keep-alive, Upgrade\r\n"
    b"upgrade: websocket\r\norigin: https://example.com\r\nsec-websocket-version: 13\r\nx-empty: \r\n"
    b"cookie: a=1\r\ncookie: b=2\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    b"sec-websocket-extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
)


def parsed_by_websockets(data: bytes) -> tuple[str, list[tuple[str, str]]] | None:
    """Return path and headers; `None` if the request is incomplete or invalid, or bytes follow it."""
    conn = ServerProtocol()
    conn.receive_data(data)
    events = conn.events_received()
    if conn.handshake_exc is not None or conn.reader.buffer or len(events) != 1 or not isinstance(events[0], Request):
        return None
    return events[0].path, list(events[0].headers.raw_items())


def read(data: bytes) -> tuple[str, list[tuple[str, str]]] | None:
    request = read_request(data)
    return None if request is None else (request.path, list(request.headers.raw_items()))


@pytest.mark.parametrize("data", [REQUEST, BROWSER], ids=["shortest", "browser"])
def test_request_is_read_like_by_websockets(data: bytes) -> None:
    """The usual requests are read, with the same path, and the same headers in the same order."""
    assert read(data) == parsed_by_websockets(data) is not None


@given(strategies.mutated(st.sampled_from([REQUEST, BROWSER])) | st.binary(max_size=60))
@example(BROWSER.replace(b"/ws", b"http://example.com/ws"))
@example(BROWSER.replace(b"x-empty: ", b"x-empty:\t a \t"))
def test_what_is_read_websockets_reads_the_same(data: bytes) -> None:
    """No bytes are read in a form in which the parser of `websockets` does not read them."""
    request = read(data)
    assert request is None or request == parsed_by_websockets(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(REQUEST[:-2], id="incomplete"),
        pytest.param(REQUEST + b"\x81", id="bytes behind it"),
        pytest.param(REQUEST.replace(b"GET", b"POST"), id="method"),
        pytest.param(REQUEST.replace(b"1.1", b"1.0"), id="version"),
        pytest.param(REQUEST.replace(b"GET /", b"GET /\xc3\xa9"), id="path not in ASCII"),
        pytest.param(REQUEST.replace(b"GET /", b"GET / /"), id="space in the path"),
        pytest.param(REQUEST.replace(b"testserver", b"\xff"), id="value not in ASCII"),
        pytest.param(REQUEST.replace(b"testserver", b"a\0b"), id="control character"),
        pytest.param(REQUEST.replace(b"testserver", b"a\r\n b"), id="folded line"),
        pytest.param(REQUEST.replace(b"testserver", b"a\nb: c"), id="bare line feed"),
        pytest.param(REQUEST.replace(b"Host:", b"Host :"), id="space before the colon"),
        pytest.param(REQUEST.replace(b"Host", b"Content-Length"), id="body"),
        pytest.param(REQUEST.replace(b"Host", b"TRANSFER-ENCODING"), id="chunked body"),
        pytest.param(REQUEST[:-2] + b"x: y\r\n" * 128 + b"\r\n", id="too many headers"),
        pytest.param(REQUEST.replace(b"GET /", b"GET /" + b"x" * MAX_BYTES), id="too large"),
    ],
)
def test_other_requests_are_left_to_websockets(data: bytes) -> None:
    """A request that is unusual in any respect is not read here."""
    assert read(data) is None


async def opened(reader: Reader, *reads: bytes, **patched: Any) -> tuple[Any, FakeTransport]:
    protocol, transport = await made(reader), FakeTransport()
    for name, value in patched.items():
        setattr(protocol.conn, name, value)
    protocol.connection_made(transport)
    for data in reads:
        protocol.data_received(data)
    return protocol, transport


async def finished(protocol: Any) -> None:
    """Wait for the application, which rejects and then reads the disconnect."""
    for task in list(protocol.tasks):
        await task
    protocol.connection_lost(None)


async def test_upgrade_does_not_parse_request_twice() -> None:
    """A request of uvicorn's HTTP protocols does not reach the parser of `websockets`."""
    protocol, transport = await opened(Reader("websocket.close"), BROWSER, receive_data=None)
    await finished(protocol)
    assert transport.written.startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize("at", [1, 30, len(BROWSER) - 1])
async def test_request_in_two_reads_is_answered(at: int) -> None:
    """A request in parts, which uvicorn's own HTTP protocols never pass on, is parsed by `websockets`."""
    protocol, transport = await opened(Reader("websocket.close"), BROWSER[:at], BROWSER[at:])
    await finished(protocol)
    assert transport.written.startswith(b"HTTP/1.1 403 ")
    assert protocol.scope["query_string"] == b"token=a%20b"


def test_frequent_header_parts_are_shared() -> None:
    """Connections share frequent names and values of headers, and other headers are unchanged."""
    headers = [(bytes(bytearray(b"host")), b"a.example"), (b"x-own", bytes(bytearray(b"websocket")))]
    first, second = with_shared_parts(headers), with_shared_parts(iter(list(headers)))
    assert first == second == headers
    assert first[0][0] is second[0][0] is with_shared_parts([(bytes(bytearray(b"host")), b"")])[0][0]
    assert first[1][1] is with_shared_parts([(b"upgrade", bytes(bytearray(b"websocket")))])[0][1]
