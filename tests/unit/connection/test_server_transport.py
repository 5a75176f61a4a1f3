"""Tests of access to the server's transport through the two ASGI callables."""

from __future__ import annotations

import asyncio
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fastapi_ws_stabilizer.connection import server_transport as server_side_module
from fastapi_ws_stabilizer.connection.server_transport import ServerTransport
from fastapi_ws_stabilizer.servers.direct import EXTENSION
from tests.support.fake_websocket import eventually, settle


class Transport:
    """Transport that counts calls."""

    def __init__(self, buffered: Any = 0, error: Exception | None = None) -> None:
        self.buffered = buffered
        self.error = error
        self.aborted = 0

    def abort(self) -> None:
        """Count an abort."""
        self.aborted += 1
        if self.error is not None:
            raise self.error

    def get_write_buffer_size(self) -> int:
        """Return the unflushed bytes."""
        if isinstance(self.buffered, Exception):
            raise self.buffered
        return int(self.buffered)


class Protocol:
    """Protocol object of a server, with the ASGI callables as its methods."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    async def receive(self) -> Any:
        """Implement the ASGI `receive`."""

    async def send(self, message: Any) -> None:
        """Implement the ASGI `send`."""


def side(**attributes: Any) -> ServerTransport:
    """Return the server transport for a protocol object with these attributes."""
    protocol = Protocol(**attributes)
    return ServerTransport(protocol.receive, protocol.send)


def hidden() -> ServerTransport:
    """Return the server transport behind a middleware."""

    async def receive() -> Any:
        return None

    return ServerTransport(receive, lambda message: None)


def test_visible_transport_is_aborted() -> None:
    """When the server's transport is accessible, the connection can be aborted."""
    transport = Transport()
    server = side(transport=transport)
    assert server.can_abort
    assert server.abort()
    assert transport.aborted == 1


@pytest.mark.parametrize("server", [hidden(), side(), side(transport=None), side(transport=object())])
def test_abort_of_hidden_transport_does_nothing(server: ServerTransport) -> None:
    """When the transport is hidden, aborting returns `False` and raises nothing."""
    assert not server.can_abort
    assert not server.abort()


@pytest.mark.parametrize("server", [hidden(), side(in_use=True)])
def test_hidden_or_used_direct_transport_is_not_used(server: ServerTransport) -> None:
    """Behind a middleware that wraps both callables, or while a call of one waits, frames go through ASGI."""
    assert server.direct_transport({"extensions": {EXTENSION: {}}}) is None


def test_direct_transport_needs_extension_of_server() -> None:
    """The scope says whether the server has a direct transport."""
    server = side(in_use=False)
    assert server.direct_transport({"extensions": {EXTENSION: {}}}) is not None
    assert server.direct_transport({"extensions": None}) is None


@pytest.mark.parametrize(
    ("named", "peer"),
    [
        (("127.0.0.1", 4711), "127.0.0.1"),
        (("::1", 4711, 0, 0), "::1"),
        ("", ""),
        (b"\x00abstract", ""),
        (None, None),
        (OSError("gone"), None),
    ],
    ids=str,
)
def test_peer_address_comes_from_transport(named: Any, peer: str | None) -> None:
    """The address comes from the transport: empty for a Unix socket, and `None` where it is unknown."""
    transport = Transport()
    transport.get_extra_info = lambda name: {"peername": raised(named)}[name]  # type: ignore[attr-defined]
    assert side(transport=transport).peer == peer


@pytest.mark.parametrize("server", [hidden(), side(), side(transport=Transport())])
def test_peer_address_of_hidden_transport_is_unknown(server: ServerTransport) -> None:
    """When the transport is hidden, or has no address, the result is `None`."""
    assert server.peer is None


def raised(value: Any) -> Any:
    """Raise an exception, or return any other value."""
    if isinstance(value, Exception):
        raise value
    return value


def test_failing_transport_abort_raises_nothing() -> None:
    """Exceptions of a foreign transport do not propagate."""
    assert not side(transport=Transport(error=RuntimeError("gone"))).abort()


@pytest.mark.parametrize(("buffered", "aborted"), [(0, 0), (100, 1), (RuntimeError("gone"), 0)])
async def test_transport_without_flush_progress_is_aborted(
    monkeypatch: pytest.MonkeyPatch, buffered: Any, aborted: int
) -> None:
    """A client that does not take its bytes in time is aborted, and a flushed connection is not."""
    monkeypatch.setattr(server_side_module, "FLUSH_GRACE", 0.0)
    transport = Transport(buffered)
    side(transport=transport).abort_unless_flushed()
    await settle()
    assert transport.aborted == aborted


@pytest.mark.parametrize(("most", "looks"), [(0.0, 2), (0.045, 4)])
async def test_slowly_flushing_transport_gets_bounded_grace(most: float, looks: int) -> None:
    """A client that takes bytes between two checks is not aborted until a total limit."""
    held = iter(range(100, 0, -1))
    transport = Transport(100)
    asked: list[int] = []
    transport.get_write_buffer_size = lambda: asked.append(1) or next(held)  # type: ignore[method-assign]
    side(transport=transport).abort_unless_flushed(0.02, most)
    await eventually(lambda: transport.aborted == 1)
    assert len(asked) == 2 * looks  # one check reads whether there are bytes, and how many


async def test_transport_flushing_within_grace_is_not_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second check decides, so the client has a moment."""
    monkeypatch.setattr(server_side_module, "FLUSH_GRACE", 0.0)
    transport = Transport(100)
    asked: list[int] = []
    transport.get_write_buffer_size = lambda: asked.append(1) or (100 if len(asked) == 1 else 0)  # type: ignore[method-assign]
    side(transport=transport).abort_unless_flushed()
    await eventually(lambda: len(asked) == 2)
    assert transport.aborted == 0


async def test_hidden_transport_is_left_to_server() -> None:
    """Without an accessible transport there is no check."""
    server = hidden()
    server.abort_unless_flushed()
    assert not server.can_abort


@pytest.mark.parametrize(
    ("taken", "buffered", "closing", "aborted"),
    [
        (False, 0, False, 1),
        (False, 100, False, 1),
        (False, 0, True, 0),
        (True, 0, False, 0),  # what its client has taken is unknown
        (True, 100, False, 0),
    ],
)
async def test_unanswered_close_frame_aborts_transport(
    monkeypatch: pytest.MonkeyPatch, taken: bool, buffered: int, closing: bool, aborted: int
) -> None:
    """The transport is aborted unless the answer came, or the client may still have bytes to read."""
    monkeypatch.setattr(server_side_module, "CLOSE_HANDSHAKE_TIMEOUT", 0.0)
    transport = Transport(buffered)
    side(transport=transport).abort_unless_answered(taken=taken)
    transport.is_closing = lambda: closing  # type: ignore[attr-defined]
    await settle()
    assert transport.aborted == aborted


async def test_closing_transport_gets_no_timer() -> None:
    """A closed connection gets no timer."""
    transport = Transport()
    transport.is_closing = lambda: True  # type: ignore[attr-defined]
    server = side(transport=transport)
    server.abort_unless_answered()
    hidden().abort_unless_answered()
    assert not asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports what a client has acknowledged")
async def test_slow_client_is_not_aborted_before_kernel_buffer_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes in the buffer of the operating system count, and are read to the end."""
    monkeypatch.setattr(server_side_module, "CLOSE_HANDSHAKE_TIMEOUT", 0.0)
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(listener.getsockname())
    accepted, _ = listener.accept()
    client.setblocking(False)
    transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, accepted)
    with listener, client:
        server = side(transport=transport)
        sent = 100_000
        transport.write(bytes(sent))
        assert server.unflushed_bytes == 0
        server.abort_unless_answered()
        await settle()
        assert not transport.is_closing()
        while sent:
            sent -= len(await loop.sock_recv(client, sent))
        await eventually(lambda: server._untaken_bytes() == 0)
        server.abort_unless_answered()
        await eventually(transport.is_closing)
        assert await loop.sock_recv(client, 1) == b""


@pytest.mark.parametrize(
    ("event", "seen"),
    [
        ({"code": 1000}, True),
        ({"code": 1001, "reason": ""}, True),
        ({"code": 4000, "reason": "bye"}, True),
        ({"code": 1005}, False),
        ({"code": 1005, "reason": None}, False),
        ({"code": 1005, "reason": ""}, True),
        ({"code": 1006}, False),
        ({"code": 1006, "reason": ""}, False),
        ({}, False),
    ],
)
def test_event_distinguishes_close_frame_from_lost_connection(event: dict[str, Any], seen: bool) -> None:
    """Without access to the server's protocol, code and reason of the event decide."""
    assert hidden().saw_close_frame(event) is seen


@pytest.mark.parametrize(("received", "seen"), [(None, False), (object(), True)])
def test_websockets_protocol_knows_received_close_frame(received: Any, seen: bool) -> None:
    """uvicorn's protocol on `websockets` stores the received close frame, whatever the event says."""
    server = side(conn=SimpleNamespace(close_rcvd=received))
    assert server.saw_close_frame({"code": 1006}) is seen
    assert server.saw_close_frame({"code": 1000}) is seen


@pytest.mark.parametrize(
    ("state", "seen"), [("CLOSED", True), ("REMOTE_CLOSING", True), ("OPEN", False), ("LOCAL_CLOSING", False)]
)
@pytest.mark.parametrize("where", ["conn", "connection"])
def test_wsproto_protocol_knows_received_close_frame(where: str, state: str, seen: bool) -> None:
    """The protocols of uvicorn and hypercorn on `wsproto` have a state that decides."""
    server = side(**{where: SimpleNamespace(state=SimpleNamespace(name=state))})
    assert server.saw_close_frame({"code": 1005 if seen else 1000}) is seen


def test_unknown_protocol_state_defers_to_event() -> None:
    """An unknown protocol state decides nothing."""
    server = side(conn=SimpleNamespace(state=SimpleNamespace(name="CONNECTING")))
    assert server.saw_close_frame({"code": 1000})
    assert not server.saw_close_frame({"code": 1006})


def _wrapped(send: Any) -> Any:
    """Return a `send` inside two closures, as Starlette's middleware creates them."""

    def once(send: Any) -> Any:
        async def sender(message: Any) -> None:
            await send(message)

        return sender

    return once(once(send))


def test_server_send_is_found_inside_middleware_closures() -> None:
    """Hypercorn's protocol is found behind the `send` that Starlette's exception middleware wraps."""
    protocol = Protocol(connection=SimpleNamespace(state=SimpleNamespace(name="CLOSED")))
    server = ServerTransport(lambda: None, _wrapped(protocol.send))
    assert server.saw_close_frame({"code": 1006})


def test_endless_closure_chain_is_abandoned() -> None:
    """A `send` that wraps itself is unwrapped a few times only."""

    async def send(message: Any) -> None:
        await send(message)

    assert not ServerTransport(lambda: None, send).saw_close_frame({"code": 1006})


def test_closure_with_deleted_variable_is_abandoned() -> None:
    """A wrapper that has deleted the server's `send` hides it, and nothing fails."""

    server_send = None

    def make() -> Any:
        if server_send is not None:
            send = server_send

        async def sender(message: Any) -> None:
            await send(message)

        return sender

    assert not ServerTransport(lambda: None, make()).saw_close_frame({"code": 1006})
