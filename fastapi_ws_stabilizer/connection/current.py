"""Connections that the current task has opened.

In an endpoint that calls `connect()` itself, they decide which connection a call with a client id refers to.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator

from fastapi_ws_stabilizer.connection.connection import Connection


class Opened:
    """Link in the list of connections that a task has opened.

    User code can leave tasks and timers running for the lifetime of the app, and each holds the context variables of
    the endpoint that started it. Therefore this object drops its reference when the connection is closed.

    Attributes:
        connection: The connection; `None` once it is closed and the task can no longer refer to it.
        previous: The link of the connection that the task opened before.
        connecting: Whether `connect()` has not returned yet, or has raised. In that case its caller outlives the
            connection and may still refer to it.
    """

    __slots__ = ("connecting", "connection", "previous")

    def __init__(self, connection: Connection, previous: Opened | None) -> None:
        self.connection: Connection | None = connection
        self.previous = previous
        self.connecting = False

    def on_task_done(self) -> None:
        """Drop the reference as soon as the connection is closed, because the task that opened it has ended."""
        connection = self.connection
        if connection is None:
            return
        connection.endpoint.mark_over()
        if connection.is_closed:
            self.connection = None
        else:
            connection.closed.add_done_callback(self._on_closed)

    def _on_closed(self, _: asyncio.Future[None]) -> None:
        self.connection = None


_last_opened: contextvars.ContextVar[Opened | None] = contextvars.ContextVar("last_opened", default=None)
"""Link of the connection that the current task opened last. It leads to the earlier ones."""


def bind_current(connection: Connection) -> Opened:
    """Record that the current task has opened a connection. Its child tasks and hooks inherit the record.

    Closed connections that the task opened earlier are removed from the list.
    """
    opened = newer = Opened(connection, _last_opened.get())
    while (previous := newer.previous) is not None:
        if previous.connection is None or previous.connection.is_closed:
            previous.connection, newer.previous = None, previous.previous
        else:
            newer = previous
    _last_opened.set(opened)
    return opened


def unbind_current(connection: Connection) -> None:
    """Drop references to a connection after its teardown, if its endpoint has ended with it."""
    if not connection.endpoint.tracked or connection.context is None:
        return
    for opened in _chain(connection.context.get(_last_opened)):
        if opened.connection is connection and not opened.connecting:
            opened.connection = None


def all_current() -> Iterator[Connection]:
    """Iterate over the connections that the current task or its parent has opened, newest first."""
    for opened in _chain(_last_opened.get()):
        if opened.connection is not None:
            yield opened.connection


def current_for(client_id: str) -> Connection | None:
    """Return the connection that the current task or its parent opened last under this client id.

    Returns:
        `None` if there is none, or if its endpoint has ended with it. In the latter case the current task outlives the
        endpoint and refers to the client's current connection.
    """
    for opened in _chain(_last_opened.get()):
        connection = opened.connection
        if connection is not None and connection.client_id == client_id:
            is_closed = connection.is_closed and connection.endpoint.tracked and not opened.connecting
            return None if is_closed else connection
    return None


def _chain(opened: Opened | None) -> Iterator[Opened]:
    while opened is not None:
        yield opened
        opened = opened.previous
