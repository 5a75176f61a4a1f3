"""One client of the load: its socket, its handshake, and what it has received."""

from __future__ import annotations

import socket

from benchmarks.frames import TEXT, FrameReader, client_frame


class LoadError(Exception):
    """A server did not do what the load waited for."""


class Client:
    """One connection.

    Args:
        sock: The connected socket.
        hello: Text with which a client has to answer the first frame before it is served.
        slow: Whether the client is one of those that will stop reading.
        first: Whether the client sends its `hello` before the server has sent anything.
    """

    __slots__ = ("bytes", "fd", "first", "frames", "hello", "opened", "reader", "recv_into", "response", "slow", "sock")

    def __init__(self, sock: socket.socket, hello: str | None, slow: bool, first: bool = False) -> None:
        self.first = first
        self.sock = sock
        self.recv_into = sock.recv_into
        self.fd = sock.fileno()
        self.slow = slow
        self.bytes = 0
        self.frames = 0
        self.response = b""
        self.reader = FrameReader()
        self.hello = hello
        self.opened = False

    def open_with(self, data: memoryview) -> bool:
        """Continue the handshake; return `True` when it is complete.

        With a `hello`, it is complete when the server has sent a frame, was sent that text, and has sent another frame.
        With
        `first`, it is complete when the server was sent that text and has sent a frame.

        Raises:
            LoadError: The server rejected the handshake.
        """
        frames = 0
        if self.response.endswith(b"\r\n\r\n"):
            frames = len(self.reader.feed(data))
        else:
            self.response += data
            head, end, rest = self.response.partition(b"\r\n\r\n")
            if not end:
                return False
            if not head.startswith(b"HTTP/1.1 101"):
                raise LoadError(f"rejected: {head[:80].decode(errors='replace')}")
            self.response = head + end
            frames = len(self.reader.feed(memoryview(rest)))
            self.opened = self.hello is None
            if self.first and self.hello is not None:
                self.sock.send(client_frame(TEXT, self.hello.encode()))
                self.hello = None
        if frames and not self.opened:
            if self.hello is None:
                self.opened = True
            else:
                self.sock.send(client_frame(TEXT, self.hello.encode()))
                self.hello = None
        return self.opened
