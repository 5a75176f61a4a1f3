"""Process that plays all clients of one server: `python -m benchmarks.load`, controlled over a socket.

It is one thread with epoll that reads into one buffer and does no more for a message than the measurement needs: in
the simplest mode it adds up bytes. So it uses a fraction of the CPU that any server uses for the same message, and
reports with each answer which share of a core it used.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import socket
import struct
import time
from array import array
from collections.abc import Callable
from typing import Any

from benchmarks.channel import CONTROL_FD, Channel, ChannelClosed
from benchmarks.client import Client, LoadError
from benchmarks.frames import CLOSE, PING, PONG, TEXT, client_frame, handshake
from benchmarks.messages import STAMP_DIGITS

BUFFER_BYTES = 1 << 18
MAX_EVENTS = 4096
SLOW_BUFFER_BYTES = 4096
SLOW_SEGMENT_BYTES = 1024
"""A client that will stop reading has small kernel buffers: its own, and through its small segments the server's."""

IP_BIND_ADDRESS_NO_PORT = 24
"""Option of Linux, which Python 3.10 does not name: the port is chosen when the socket is connected."""

_CLOSE_FRAME = client_frame(CLOSE, struct.pack("!H", 1000))
_PONG_TEXT = client_frame(TEXT, b"pong")
_RESET = struct.pack("ii", 1, 0)

Handle = Callable[[Client, int], None]


def _nothing(_: Client) -> None:
    """Do nothing with a connection that stays open."""


class Load:
    """All clients. Each `do_...` method is a command; it returns the answer."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._clients: dict[int, Client] = {}
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._stalled: list[Client] = []
        self._lost = 0
        self._pings = 0
        self._next_id = 0

    def do_connect(
        self,
        count: int,
        port: int,
        path: str,
        *,
        deflate: bool = False,
        hello: str | None = None,
        subprotocol: str | None = None,
        slow: int = 0,
        addresses: int = 1,
        timeout: float = 60.0,
    ) -> dict[str, Any]:
        """Open `count` connections, a limited number at a time; the first `slow` of them with small buffers.

        The clients have `addresses` loopback addresses, because each address has a limited number of ports.
        """
        begun = time.monotonic()
        how: dict[str, Any] = {"deflate": deflate, "hello": hello, "subprotocol": subprotocol, "slow": slow}
        how["addresses"] = addresses
        self._open_and(count, port, path, _nothing, **how, timeout=timeout)
        agreed = sum(b"permessage-deflate" in client.response for client in self._clients.values())
        return {"connected": len(self._clients), "seconds": time.monotonic() - begun, "deflate": agreed}

    def do_churn(self, count: int, port: int, path: str, timeout: float = 60.0) -> dict[str, Any]:
        """Open and close `count` connections, a limited number at a time, with the closing handshake."""
        begun = time.monotonic()
        self._open_and(count, port, path, lambda client: client.sock.send(_CLOSE_FRAME), timeout=timeout, close=True)
        return {"seconds": time.monotonic() - begun}

    def do_bytes(self, total: int, timeout: float = 60.0) -> dict[str, Any]:
        """Read until all clients together have received `total` bytes since the last `mark`."""
        deadline = time.monotonic() + timeout
        clients, buffer, poll = self._clients, self._buffer, self._epoll.poll
        left = total - sum(client.bytes for client in clients.values())
        while left > 0:
            events = poll(max(0.0, deadline - time.monotonic()), MAX_EVENTS)
            if not events:
                raise LoadError(f"{left} of {total} bytes missing after {timeout} s")
            for fd, _ in events:
                client = clients[fd]
                try:
                    read = client.recv_into(buffer)
                except OSError:
                    read = 0
                if not read:
                    self._lose(client)
                client.bytes += read
                left -= read
        return self._counts()

    def do_quiet(self, quiet: float = 0.25, timeout: float = 30.0) -> dict[str, Any]:
        """Read until nothing has arrived for a while."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self._pump(self._count_bytes, quiet):
            pass
        return self._counts()

    def do_frames(self, total: int, timeout: float = 60.0) -> dict[str, Any]:
        """Read until all clients together have received `total` whole frames since the last `mark`."""
        deadline = time.monotonic() + timeout
        left = total - sum(client.frames for client in self._clients.values())

        def count(client: Client, read: int) -> None:
            nonlocal left
            frames = len(client.reader.feed(self._view[:read]))
            client.bytes += read
            client.frames += frames
            left -= frames

        while left > 0:
            if not self._pump(count, deadline - time.monotonic()):
                raise LoadError(f"{left} of {total} frames missing after {timeout} s")
        return self._counts()

    def do_stamps(self, each: int, timeout: float = 60.0) -> dict[str, Any]:
        """Read until each reading client has received `each` stamped frames; report their latencies."""
        deadline = time.monotonic() + timeout
        fast = [client for client in self._clients.values() if client not in self._stalled]
        left = each * len(fast)
        delays = array("d")

        def note(client: Client, read: int) -> None:
            nonlocal left
            now = time.monotonic_ns()
            frames = client.reader.feed(self._view[:read])
            client.frames += len(frames)
            left -= len(frames)
            if not client.slow:
                delays.extend((now - int(bytes(payload[:STAMP_DIGITS]))) / 1e9 for _, payload in frames)

        gc.disable()
        try:
            while left > 0 and self._pump(note, deadline - time.monotonic()):
                pass
        finally:
            gc.enable()
        ordered = sorted(delays)
        return {
            "complete": sum(client.frames == each for client in fast),
            "clients": len(fast),
            "p50": ordered[len(ordered) // 2] if ordered else 0.0,
            "p99": ordered[int(len(ordered) * 0.99)] if ordered else 0.0,
        }

    def do_answer(self, seconds: float) -> dict[str, Any]:
        """Answer pings for some seconds: protocol pings with a pong, text pings with the text `pong`."""
        end = time.monotonic() + seconds
        self._pings = 0
        while (left := end - time.monotonic()) > 0:
            self._pump(self._answer, left)
        return {"pings": self._pings, "lost": self._lost}

    def do_echo(self, seconds: float, size: int, reply_bytes: int) -> dict[str, Any]:
        """Let each client send, wait for the reply, and send again, for some seconds."""
        frame = client_frame(TEXT, b"x" * size)
        replies = 0
        sending = True

        def reply(client: Client, read: int) -> None:
            nonlocal replies
            client.bytes += read
            if client.bytes >= reply_bytes:
                client.bytes = 0
                replies += 1
                if sending:
                    client.sock.send(frame)

        begun = time.monotonic()
        for client in self._clients.values():
            client.bytes = 0
            client.sock.send(frame)
        sent = len(self._clients)
        while time.monotonic() < begun + seconds:
            if not self._pump(reply, 5.0):
                raise LoadError("no reply within 5 s")
        took, in_time = time.monotonic() - begun, replies
        sending = False
        while replies < in_time + sent and self._pump(reply, 1.0):
            pass
        return {"in_time": in_time, "replies": replies, "seconds": took, "lost": self._lost}

    def do_say(self, text: str) -> dict[str, Any]:
        """Let each client send a text."""
        frame = client_frame(TEXT, text.encode())
        for client in self._clients.values():
            client.sock.send(frame)
        return {}

    def do_mark(self) -> dict[str, Any]:
        """Set the counters to zero."""
        for client in self._clients.values():
            client.bytes = client.frames = 0
        return {}

    def do_stall(self) -> dict[str, Any]:
        """Let the slow clients stop reading."""
        self._stalled = [client for client in self._clients.values() if client.slow]
        for client in self._stalled:
            self._epoll.unregister(client.fd)
        return {"stalled": len(self._stalled)}

    def do_revive(self, seconds: float) -> dict[str, Any]:
        """Let the stalled clients read again; report how many of them find their connection closed."""
        stalled, self._stalled = self._stalled, []
        for client in stalled:
            self._epoll.register(client.fd, select.EPOLLIN)
        end = time.monotonic() + seconds
        while any(client.fd in self._clients for client in stalled) and (left := end - time.monotonic()) > 0:
            self._pump(self._count_bytes, left)
        return {"closed": sum(client.fd not in self._clients for client in stalled)}

    def do_vanish(self) -> dict[str, Any]:
        """Close all connections at once, without a closing handshake, as when the clients lose their network."""
        clients = list(self._clients.values())
        self._clients.clear()
        self._epoll.close()
        for client in clients:
            client.sock.close()
        self._epoll = select.epoll()
        return {"vanished": len(clients)}

    def do_drop(self) -> dict[str, Any]:
        """Cut the connections of the slow clients at once."""
        dropped = [client for client in self._clients.values() if client.slow]
        for client in dropped:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._lose(client)
        self._lost -= len(dropped)
        return {"dropped": len(dropped)}

    def _open_and(
        self,
        count: int,
        port: int,
        path: str,
        then: Callable[[Client], object],
        *,
        timeout: float,
        deflate: bool = False,
        hello: str | None = None,
        subprotocol: str | None = None,
        slow: int = 0,
        addresses: int = 1,
        window: int = 50,
        close: bool = False,
    ) -> None:
        """Open connections, `window` at a time; with `close`, each has to end before the next one begins."""
        deadline = time.monotonic() + timeout
        begun = done = 0

        def progress(client: Client, read: int) -> None:
            nonlocal done
            if client.opened:
                self._answer(client, read)
            elif client.open_with(self._view[:read]):
                then(client)
                done += not close

        while done < count:
            while begun < count and begun - done < window:
                address = path.format(n=self._next_id)
                self._next_id += 1
                request = handshake(port, address, deflate=deflate, subprotocol=subprotocol)
                source = f"127.0.0.{1 + begun % addresses}"
                self._dial(port, source, request, hello, slow=begun < slow, first=subprotocol is not None)
                begun += 1
            lost = self._lost
            if not self._pump(progress, deadline - time.monotonic()):
                raise LoadError(f"{done} of {count} connections after {timeout} s")
            if close:
                done += self._lost - lost
            elif self._lost:
                raise LoadError("a connection was closed at once")
        if close:
            self._lost = 0

    def _dial(self, port: int, source: str, request: bytes, hello: str | None, *, slow: bool, first: bool) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((source, 0))
        if slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SLOW_SEGMENT_BYTES)
        sock.connect(("127.0.0.1", port))
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = Client(sock, hello, slow, first)
        self._clients[client.fd] = client
        self._epoll.register(client.fd, select.EPOLLIN)
        sock.send(request)

    def _pump(self, handle: Handle, timeout: float) -> bool:
        """Dispatch what can be read, and wait for it if necessary; return `False` if nothing came in time."""
        events = self._epoll.poll(max(0.0, timeout), MAX_EVENTS)
        for fd, _ in events:
            client = self._clients[fd]
            try:
                read = client.recv_into(self._buffer)
            except OSError:
                read = 0
            if read:
                handle(client, read)
            else:
                self._lose(client)
        return bool(events)

    def _lose(self, client: Client) -> None:
        self._lost += 1
        self._epoll.unregister(client.fd)
        del self._clients[client.fd]
        client.sock.close()

    def _answer(self, client: Client, read: int) -> None:
        for first, payload in client.reader.feed(self._view[:read]):
            if first & 0x0F == PING:
                client.sock.send(client_frame(PONG, bytes(payload)))
                self._pings += 1
            elif b'"ping"' in bytes(payload):
                client.sock.send(_PONG_TEXT)
                self._pings += 1

    def _count_bytes(self, client: Client, read: int) -> None:
        client.bytes += read

    def _counts(self) -> dict[str, Any]:
        counts = [client.bytes for client in self._clients.values()] or [0]
        return {"bytes": sum(counts), "least": min(counts), "most": max(counts), "lost": self._lost}


def main() -> None:
    """Execute commands until the other end is closed."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    channel = Channel(socket.socket(fileno=int(os.environ[CONTROL_FD])))
    load = Load()
    try:
        while True:
            command = channel.receive()
            cpu, begun = time.process_time(), time.monotonic()
            try:
                answer = getattr(load, "do_" + command.pop("do"))(**command)
            except (LoadError, OSError) as error:
                answer = {"error": str(error)}
            channel.send({**answer, "load_cpu": time.process_time() - cpu, "load_wall": time.monotonic() - begun})
    except ChannelClosed:
        pass


if __name__ == "__main__":
    main()
