"""Which connections the current task has opened: what a call with a client id means in an endpoint by hand."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from typing import Any

from fastapi_ws_stabilizer.connection.lifecycle import Connection

_Own = tuple[str, Connection, Any]
_own: contextvars.ContextVar[_Own | None] = contextvars.ContextVar("own_connections", default=None)
"""The connections that the current task has opened, by client id. Replaced, never changed."""


def remember(connection: Connection) -> None:
    """The current task has opened a connection. Its child tasks and hooks inherit that."""
    _own.set((connection.client_id, connection, _own.get()))


def all_own() -> Iterator[Connection]:
    """The connections that the current task, or the one that has started it, has opened, the last one first."""
    known = _own.get()
    while known is not None:
        yield known[1]
        known = known[2]


def own(client_id: str) -> Connection | None:
    """The connection that the current task, or the one that has started it, has opened last under this client id."""
    known = _own.get()
    while known is not None and known[0] != client_id:
        known = known[2]
    return None if known is None else known[1]
