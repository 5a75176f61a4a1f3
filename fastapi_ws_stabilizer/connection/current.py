"""Which connections the current task has opened: what a call with a client id means in an endpoint by hand."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator

from fastapi_ws_stabilizer.connection.connection import Connection


class Opened:
    """A connection that a task has opened, and the one that the task had opened before it.

    Your code may leave tasks and timers running for as long as the app runs, and each keeps the context variables of
    the endpoint that has started it. So this lets the connection go when it is over.

    Attributes:
        connection: The connection; `None` if it is over, and the task cannot mean it any more.
        previous: What the task had opened before.
        connecting: Whether `connect()` has not returned yet, or has raised: then the code that called it outlives the
            connection, and may still mean it.
    """

    __slots__ = ("connecting", "connection", "previous")

    def __init__(self, connection: Connection, previous: Opened | None) -> None:
        self.connection: Connection | None = connection
        self.previous = previous
        self.connecting = False

    def on_task_done(self) -> None:
        """The task that has opened the connection means it no more: let it go as soon as it is over."""
        connection = self.connection
        if connection is not None and connection.is_finished:
            self.connection = None
        elif connection is not None:
            connection.finished.add_done_callback(lambda _: self.on_task_done())


_last_opened: contextvars.ContextVar[Opened | None] = contextvars.ContextVar("own_connections", default=None)
"""The last connection that the current task has opened, which leads to those before."""


def bind_current(connection: Connection) -> Opened:
    """The current task has opened a connection. Its child tasks and hooks inherit that.

    What it had opened before, and is over, it means no more.
    """
    opened = newer = Opened(connection, _last_opened.get())
    while (previous := newer.previous) is not None:
        if previous.connection is None or previous.connection.is_finished:
            previous.connection, newer.previous = None, previous.previous
        else:
            newer = previous
    _last_opened.set(opened)
    return opened


def finished(connection: Connection) -> None:
    """Everything is done for a connection. Where its endpoint has ended with it, nothing means it any more."""
    if not connection.endpoint.tracked or connection.context is None:
        return
    for opened in _chain(connection.context.get(_last_opened)):
        if opened.connection is connection and not opened.connecting:
            opened.connection = None


def all_current() -> Iterator[Connection]:
    """The connections that the current task, or the one that has started it, has opened, the last one first."""
    for opened in _chain(_last_opened.get()):
        if opened.connection is not None:
            yield opened.connection


def current_for(client_id: str) -> Connection | None:
    """The connection that the current task, or the one that has started it, has opened last under this client id.

    `None` also if its endpoint is over: then this is a task that outlives it, and means whoever is connected now.
    """
    for opened in _chain(_last_opened.get()):
        connection = opened.connection
        if connection is not None and connection.client_id == client_id:
            is_closed = connection.is_finished and connection.endpoint.tracked and not opened.connecting
            return None if is_closed else connection
    return None


def _chain(opened: Opened | None) -> Iterator[Opened]:
    while opened is not None:
        yield opened
        opened = opened.previous
