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
        before: What the task had opened before.
        connecting: Whether `connect()` has not returned yet, or has raised: then the code that called it outlives the
            connection, and may still mean it.
    """

    __slots__ = ("before", "connecting", "connection")

    def __init__(self, connection: Connection, before: Opened | None) -> None:
        self.connection: Connection | None = connection
        self.before = before
        self.connecting = False

    def task_is_over(self) -> None:
        """The task that has opened the connection means it no more: let it go as soon as it is over."""
        connection = self.connection
        if connection is not None and connection.is_finished:
            self.connection = None
        elif connection is not None:
            connection.finished.add_done_callback(lambda _: self.task_is_over())


_own: contextvars.ContextVar[Opened | None] = contextvars.ContextVar("own_connections", default=None)
"""The last connection that the current task has opened, which leads to those before."""


def bind_current(connection: Connection) -> Opened:
    """The current task has opened a connection. Its child tasks and hooks inherit that.

    What it had opened before, and is over, it means no more.
    """
    opened = link = Opened(connection, _own.get())
    while (before := link.before) is not None:
        if before.connection is None or before.connection.is_finished:
            before.connection, link.before = None, before.before
        else:
            link = before
    _own.set(opened)
    return opened


def finished(connection: Connection) -> None:
    """Everything is done for a connection. Where its endpoint has ended with it, nothing means it any more."""
    if not connection.endpoint.tracked or connection.context is None:
        return
    for opened in _chain(connection.context.get(_own)):
        if opened.connection is connection and not opened.connecting:
            opened.connection = None


def all_current() -> Iterator[Connection]:
    """The connections that the current task, or the one that has started it, has opened, the last one first."""
    for opened in _chain(_own.get()):
        if opened.connection is not None:
            yield opened.connection


def current_for(client_id: str) -> Connection | None:
    """The connection that the current task, or the one that has started it, has opened last under this client id.

    `None` also if its endpoint is over: then this is a task that outlives it, and means whoever is connected now.
    """
    for opened in _chain(_own.get()):
        connection = opened.connection
        if connection is not None and connection.client_id == client_id:
            is_over = connection.is_finished and connection.endpoint.tracked and not opened.connecting
            return None if is_over else connection
    return None


def _chain(opened: Opened | None) -> Iterator[Opened]:
    while opened is not None:
        yield opened
        opened = opened.before
