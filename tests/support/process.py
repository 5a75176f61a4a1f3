"""What tests see of a server process from outside: its log and its CPU time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.server import LiveServer

UVICORN_REJECTION = "ASGI callable returned without completing handshake"
"""Error that the protocol classes of uvicorn log for each rejected handshake; `StableWebSocketProtocol` does not."""


@contextmanager
def no_new_errors(server: LiveServer, *allowed: str) -> Iterator[None]:
    """Fail if the server logs an error within the block.

    Args:
        server: The server.
        allowed: Texts of errors that may be logged.
    """
    before = len(server.errors())
    yield
    assert [line for line in server.errors()[before:] if not any(text in line for text in allowed)] == []


def cpu_seconds(server: LiveServer) -> float:
    """Return the CPU time of the server process, user and system, in seconds."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
