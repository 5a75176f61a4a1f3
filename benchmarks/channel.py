"""Lines of JSON between the orchestrating process and its children."""

from __future__ import annotations

import json
import socket
import time
from typing import Any, Final

CONTROL_FD: Final = "BENCH_CONTROL_FD"
"""Environment variable with the number of the socket that a child inherits."""
OPTIONS: Final = "BENCH_OPTIONS"
"""Environment variable with the config of the measured server, as JSON."""
WS: Final = "BENCH_WS"
"""Environment variable with the value of uvicorn's `--ws`."""


class ChannelClosed(Exception):
    """The other process has ended."""


class Channel:
    """One end of a socket pair. It blocks, for a process that has nothing else to do."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pending = b""

    def send(self, message: dict[str, Any]) -> None:
        """Write one message.

        Raises:
            ChannelClosed: The other process has ended.
        """
        try:
            self._sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise ChannelClosed from error

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for one message.

        Raises:
            ChannelClosed: The other process has ended.
            TimeoutError: It has not answered in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._pending:
            self._sock.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
            try:
                data = self._sock.recv(65536)
            except TimeoutError:
                raise
            except OSError as error:
                raise ChannelClosed from error
            if not data:
                raise ChannelClosed
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Close the socket, so that the other process sees the end of this one."""
        self._sock.close()
