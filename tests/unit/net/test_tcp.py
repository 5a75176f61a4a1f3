"""Tests of what the operating system counts for a TCP connection."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fastapi_ws_stabilizer.net import tcp
from tests.support.fake_websocket import eventually

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the bytes of a connection")


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Any, socket.socket]]:
    """A transport and the socket at its other end; each has sent the other a few bytes, as a handshake does."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        client.setblocking(False)
        accepted, _ = listener.accept()
        transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, accepted)
        transport.write(b"hello")
        await loop.sock_sendall(client, b"hello")
        assert await loop.sock_recv(client, 5) == b"hello"
        await eventually(lambda: tcp.unacknowledged_bytes(transport) in (0, None))
        await eventually(lambda: tcp.seconds_since_received(transport) is not None or sys.platform != "linux")
        yield transport, client
        transport.abort()


@on_linux
async def test_kernel_progress_is_visible_with_full_transport(pair: Any) -> None:
    """What the kernel has sent is progress, though nothing leaves the transport."""
    transport, client = pair
    transport.write(bytes(10_000_000))
    unflushed = tcp.unflushed_bytes(transport)
    before = tcp.progress(transport)
    assert unflushed
    assert before
    for _ in range(4):
        await asyncio.get_running_loop().sock_recv(client, 4096)
    await eventually(lambda: tcp.progress(transport) > before)
    assert tcp.unflushed_bytes(transport) == unflushed


@on_linux
async def test_unread_bytes_show_no_progress(pair: Any) -> None:
    """Bytes that wait for a client that reads nothing stay where they are, and are unsent."""
    transport, _ = pair
    transport.write(bytes(10_000_000))
    await asyncio.sleep(0.1)  # what fits into the client's buffer is taken
    before = tcp.progress(transport)
    await asyncio.sleep(0.3)
    assert tcp.progress(transport) == before
    assert 9_000_000 < tcp.unsent_bytes(transport) <= 10_000_000


@on_linux
async def test_partial_message_resets_time_since_receive(pair: Any) -> None:
    """The time since bytes came begins anew with each of them."""
    transport, client = pair
    await eventually(lambda: tcp.seconds_since_received(transport) > 0.2)
    await asyncio.get_running_loop().sock_sendall(client, b"x")
    await eventually(lambda: tcp.seconds_since_received(transport) < 0.2)


class Info:
    """A socket that answers as it is told to."""

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer

    def getsockopt(self, *_: object) -> bytes:
        """Answer, or fail."""
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def fileno(self) -> int:
        """No file of the system."""
        return -1

    def get_extra_info(self, _: str) -> Info:
        """It is its own transport."""
        return self

    unflushed = 7

    def get_write_buffer_size(self) -> int:
        """Bytes that are held."""
        return self.unflushed


@pytest.mark.parametrize("answer", [bytes(136), bytes(104), OSError("not TCP")], ids=["zeros", "short", "refused"])
def test_transport_without_tcp_info_uses_buffer_size(answer: bytes | Exception) -> None:
    """Progress is that what is unflushed shrinks; when bytes last came is not known."""
    transport = Info(answer)
    before = tcp.progress(transport)
    transport.unflushed = 5
    after = tcp.progress(transport)
    assert before is not None
    assert after is not None
    assert after > before
    assert tcp.seconds_since_received(transport) is None


def test_other_systems_use_buffer_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Linux is asked for more."""
    monkeypatch.setattr(tcp.sys, "platform", "darwin")
    assert tcp.progress(Info(bytes([1]) * 136)) == -7
    assert tcp.unacknowledged_bytes(Info(b"")) is None
    assert tcp.seconds_since_received(Info(bytes([1]) * 136)) is None


@pytest.mark.parametrize("transport", [None, object()])
def test_missing_transport_shows_nothing(transport: object) -> None:
    """A server that hides its transport is asked for nothing."""
    assert tcp.progress(transport) is None
    assert tcp.unsent_bytes(transport) is None
    assert tcp.seconds_since_received(transport) is None
