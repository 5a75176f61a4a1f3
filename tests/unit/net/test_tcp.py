"""Tests of the TCP counters of the operating system."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fastapi_ws_stabilizer.net import tcp
from tests.support.fake_websocket import eventually

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the bytes of a connection")


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Any, socket.socket]]:
    """Yield a transport and the socket of its peer, after each has sent the other 5 bytes, as in a handshake."""
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
        await eventually(lambda: tcp.kernel_unacked_bytes(transport) in (0, None))
        await eventually(lambda: tcp.seconds_since_received(transport) is not None or sys.platform != "linux")
        yield transport, client
        transport.abort()


@on_linux
async def test_kernel_progress_is_visible_with_full_transport(pair: Any) -> None:
    """Bytes that the kernel sends are progress, even if the buffer of the transport stays full."""
    transport, client = pair
    transport.write(bytes(10_000_000))
    unflushed = tcp.unflushed_bytes(transport)
    before = tcp.send_progress(transport)
    assert unflushed
    assert before
    for _ in range(4):
        await asyncio.get_running_loop().sock_recv(client, 4096)
    await eventually(lambda: tcp.send_progress(transport) > before)
    assert tcp.unflushed_bytes(transport) == unflushed


@on_linux
async def test_unread_bytes_show_no_progress(pair: Any) -> None:
    """Bytes for a client that does not read show no progress and stay unsent."""
    transport, _ = pair
    transport.write(bytes(10_000_000))
    await asyncio.sleep(0.1)  # the receive buffer of the client fills
    before = tcp.send_progress(transport)
    await asyncio.sleep(0.3)
    assert tcp.send_progress(transport) == before
    assert 9_000_000 < tcp.unacked_bytes(transport) <= 10_000_000


@on_linux
async def test_partial_message_resets_time_since_receive(pair: Any) -> None:
    """Each received byte resets the time since the last receive."""
    transport, client = pair
    await eventually(lambda: tcp.seconds_since_received(transport) > 0.2)
    await asyncio.get_running_loop().sock_sendall(client, b"x")
    await eventually(lambda: tcp.seconds_since_received(transport) < 0.2)


def tls_context(protocol: int) -> ssl.SSLContext:
    """Return a context for TLS without certificates."""
    context = ssl.SSLContext(protocol)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
    return context


async def bytes_taken(limits: tuple[int | None, int] | None, *, tls: bool = False) -> int:
    """Return the bytes that the kernel and a transport take for a peer that reads nothing, until it pauses."""
    loop = asyncio.get_running_loop()
    context = tls_context(ssl.PROTOCOL_TLS_SERVER) if tls else None

    class Paused(asyncio.Protocol):
        paused = False

        def pause_writing(self) -> None:
            self.paused = True

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        accepting = loop.create_task(loop.connect_accepted_socket(Paused, accepted, ssl=context))
        peer = client
        if tls:
            wrap = tls_context(ssl.PROTOCOL_TLS_CLIENT).wrap_socket
            peer = await asyncio.to_thread(wrap, client)
        transport, protocol = await accepting
        if limits is not None:
            tcp.limit_buffers(transport, *limits)
        taken = 0
        while not protocol.paused:
            transport.write(bytes(1000))
            taken += 1000
            await asyncio.sleep(0)
        transport.abort()
        peer.close()
    return taken


@pytest.mark.skipif(not tcp.HAS_UNSENT_LOW_WATER, reason="the system has no TCP_NOTSENT_LOWAT")
@pytest.mark.parametrize("tls", [False, True], ids=["TCP", "TLS"])
async def test_limited_buffers_take_little_for_slow_peer(tls: bool) -> None:
    """With both limits, the kernel holds no more than a segment of 64 KiB unsent, and the transport one write."""
    limited = await bytes_taken((4096, 1), tls=tls)
    assert limited < (300_000 if tls else 100_000)  # TLS has a buffer of its own of 64 KiB
    assert await bytes_taken(None, tls=tls) > limited + 500_000


async def test_write_buffer_limit_alone_pauses_transport() -> None:
    """The limit of the transport works on every system, and `None` leaves the kernel as it is."""
    low, high = await bytes_taken((None, 1000)), await bytes_taken((None, 1_000_000))
    assert low + 500_000 < high


@pytest.mark.parametrize("transport", [None, object()])
def test_limits_of_missing_transport_have_no_effect(transport: object) -> None:
    """A transport that has no limits, or is closed, stays as it is."""
    tcp.limit_buffers(transport, 4096, 1)


class Info:
    """Socket and transport with a fixed answer."""

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer

    def getsockopt(self, *_: object) -> bytes:
        """Return the answer, or raise it."""
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def fileno(self) -> int:
        """Return no valid file descriptor."""
        return -1

    def get_extra_info(self, _: str) -> Info:
        """Return the object itself as the socket."""
        return self

    unflushed = 7

    def get_write_buffer_size(self) -> int:
        """Return the unflushed bytes."""
        return self.unflushed


@pytest.mark.parametrize("answer", [bytes(136), bytes(104), OSError("not TCP")], ids=["zeros", "short", "refused"])
def test_transport_without_tcp_info_uses_buffer_size(answer: bytes | Exception) -> None:
    """Without TCP info, progress is a shrinking buffer, and the time since the last receive is unknown."""
    transport = Info(answer)
    before = tcp.send_progress(transport)
    transport.unflushed = 5
    after = tcp.send_progress(transport)
    assert before is not None
    assert after is not None
    assert after > before
    assert tcp.seconds_since_received(transport) is None


def test_other_systems_use_buffer_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems other than Linux use the buffer size only."""
    monkeypatch.setattr(tcp.sys, "platform", "darwin")
    assert tcp.send_progress(Info(bytes([1]) * 136)) == -7
    assert tcp.kernel_unacked_bytes(Info(b"")) is None
    assert tcp.seconds_since_received(Info(bytes([1]) * 136)) is None


@pytest.mark.parametrize("transport", [None, object()])
def test_missing_transport_shows_nothing(transport: object) -> None:
    """Without a transport nothing is known."""
    assert tcp.send_progress(transport) is None
    assert tcp.unacked_bytes(transport) is None
    assert tcp.seconds_since_received(transport) is None
