"""User code of connections: the task of an endpoint, its cancellation, and the connections that a task has opened.

In an endpoint that calls `connect()` itself, the latter decide which connection a call with a client id refers to.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from fastapi_ws_stabilizer.compat.fastapi import find_exit_stack
from fastapi_ws_stabilizer.tasks import LazyEvent

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection

_CANCEL_MESSAGE: Final = "the connection is closed and its disconnect_grace has passed"


class _Busy:
    """Context manager that counts running user code. A generator would cost more memory for each running endpoint."""

    __slots__ = ("_endpoint",)

    def __init__(self, endpoint: EndpointTask) -> None:
        self._endpoint = endpoint

    def __enter__(self) -> None:
        self._endpoint._running += 1

    def __exit__(self, *_: object) -> None:
        self._endpoint._on_work_done()


class EndpointTask:
    """Task that serves one connection, with the user code that runs for it in other tasks.

    Args:
        cancellable: Whether the current task is the endpoint's, and `mark_returned` is called when it returns.

    Attributes:
        tracked: Whether `mark_returned` is called when the endpoint returns. Without that, nothing waits for it, and
            `mark_over` is called when its task has ended.
    """

    __slots__ = ("_cancelled", "_idle", "_is_over", "_on_over", "_returned", "_running", "_task", "tracked")

    def __init__(self, *, cancellable: bool) -> None:
        task = asyncio.current_task() if cancellable else None
        # A weak reference, because the connections of a task are stored under the task and must not keep it alive.
        self._task = None if task is None else weakref.ref(task)
        self._cancelled = False
        self.tracked = cancellable
        self._running = 0
        self._idle: asyncio.Future[None] | None = None
        self._returned = LazyEvent()
        self._is_over = False
        self._on_over: Callable[[], None] | None = None
        if not cancellable:
            self._returned.set()  # nothing else would set it

    def mark_returned(self) -> None:
        """Record that the endpoint has returned."""
        self._returned.set()
        self.mark_over()

    def mark_over(self) -> None:
        """Record that no code of the endpoint runs any more."""
        self._is_over = True
        on_over, self._on_over = self._on_over, None
        if on_over is not None:
            on_over()

    def call_when_over(self, on_over: Callable[[], None]) -> None:
        """Call a function once, as soon as no code of the endpoint runs any more."""
        if self._is_over:
            on_over()
        else:
            self._on_over = on_over

    @property
    def has_ended(self) -> bool:
        """Whether the endpoint has returned.

        FastAPI then closes its dependencies in the same task, which must not be cancelled.
        """
        return self._returned.is_set

    @property
    def is_running(self) -> bool:
        """Whether the endpoint has not returned, or user code is handling a received message."""
        return not self._returned.is_set or self._running > 0

    @property
    def returned(self) -> asyncio.Future[None]:
        """Future that completes when the endpoint has returned."""
        return self._returned.future

    def running(self) -> AbstractContextManager[None]:
        """Return a context manager for user code that handles received messages."""
        return _Busy(self)

    def wait_idle(self) -> asyncio.Future[None]:
        """Return a future that completes when no handler is running. The disconnect hooks wait for it."""
        self._idle = asyncio.get_running_loop().create_future()
        if not self._running:
            self._idle.set_result(None)
        return self._idle

    def _on_work_done(self) -> None:
        self._running -= 1
        if not self._running and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def watch(self, scope: Mapping[str, Any]) -> None:
        """Register with FastAPI's exit stack, to notice the endpoint's return before its dependencies are closed.

        The callback pushed last runs first. This is called when the connection opens and again when it closes, so that
        the callback is above the dependencies that were entered in between.
        """
        stack = find_exit_stack(scope)
        if stack is not None:
            stack.push(self._on_exit)  # `push` needs less memory than `callback`, which creates a closure

    def _on_exit(self, *_: object) -> None:
        self.mark_returned()

    def cancel(self) -> bool:
        """Cancel the task, once, unless the endpoint has returned. Return whether this call cancelled it."""
        task = None if self._task is None else self._task()
        if task is None or self._cancelled or self.has_ended:
            return False
        self._cancelled = True
        task.cancel(_CANCEL_MESSAGE)
        return True

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """Task that serves the connection; `None` if it is unknown or was collected."""
        return None if self._task is None else self._task()

    @property
    def has_swallowed_cancellation(self) -> bool:
        """Whether the current task is the endpoint's and continues after it was cancelled."""
        return self._cancelled and not self.has_ended and self.task is asyncio.current_task()

    def is_cancelled_by_others(self, error: BaseException) -> bool:
        """Return whether `error` is a cancellation of this task by other code than `cancel`.

        A `CancelledError` from another task that user code awaited does not count, and is a bug like any exception.
        Python 3.10 cannot distinguish the two.
        """
        task = None if self._task is None else self._task()
        if not isinstance(error, asyncio.CancelledError) or task is None:
            return isinstance(error, asyncio.CancelledError)
        return sys.version_info < (3, 11) or task.cancelling() > 0

    def is_own_cancellation(self, error: BaseException) -> bool:
        """Return whether `error` is the cancellation from `cancel` and no other is pending.

        If so, this decrements the task's count of cancellations, so that the caller may swallow the error.
        """
        task = None if self._task is None else self._task()
        if not self._cancelled or task is None or not isinstance(error, asyncio.CancelledError):
            return False
        if sys.version_info >= (3, 11):
            return task.uncancel() == 0
        return not error.args or error.args[0] == _CANCEL_MESSAGE


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
