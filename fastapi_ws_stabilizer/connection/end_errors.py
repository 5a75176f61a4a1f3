"""Errors from closed connections by task, which distinguish a clean-up from a loop that ignores the end."""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import TYPE_CHECKING, Any, Final

from starlette.websockets import WebSocketDisconnect

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection
    from fastapi_ws_stabilizer.connection.ended_connection import EndedConnection
    from fastapi_ws_stabilizer.connection.endpoint import EndpointTask

IGNORED: Final = 10
"""Errors in a row after which a task counts as ignoring the end of its connection. A clean-up tries a few sends."""

SPINS: Final = 1000
"""Errors in a row after which a task counts as an endless loop, and is slowed down so that others can run."""

PAUSE: Final = 0.05
"""Seconds that each further call waits in such a task, and in an endpoint that has swallowed its cancellation."""

_errors_of: weakref.WeakKeyDictionary[asyncio.Task[Any], EndErrors] = weakref.WeakKeyDictionary()
"""The tasks that have got an error from a closed connection."""


class EndErrors:
    """Errors in a row that one task has got from closed connections, by connection.

    A row ends when the task waits for something else or sends a message. A task that sends to many connections
    repeatedly gets errors from closed ones, but it waits between its rounds or sends to the others. A loop that ignores
    the end does neither, no matter how many connections it has.

    Attributes:
        is_new: Whether the task has got no error yet.
    """

    __slots__ = ("__weakref__", "_sends", "_times", "_waited", "is_new")

    def __init__(self) -> None:
        self.is_new = True
        self._times: dict[str, int] = {}
        self._waited = False
        self._sends = 0

    def count(self, connection_id: str, *, sends: int, own: bool) -> int:
        """Count one more error.

        Args:
            connection_id: The closed connection.
            sends: Messages that user code has sent so far, on all connections.
            own: Whether the task is the endpoint of this connection, which should have ended, regardless of its other
                calls.

        Returns:
            How many errors in a row the task has got from this connection.
        """
        if not own and (self._waited or sends != self._sends):
            self._times.clear()
        times = self._times[connection_id] = self._times.get(connection_id, 0) + 1
        return times

    def mark_resumed(self, *, sends: int) -> None:
        """Record that the task gets its error now.

        Its actions until the next error decide whether the row continues.
        """
        self.is_new = self._waited = False
        self._sends = sends
        asyncio.get_running_loop().call_soon(self._has_waited)  # runs only if the task yields to the event loop

    def _has_waited(self) -> None:
        self._waited = True


async def yield_after_error(
    connection: Connection | EndedConnection, endpoint: EndpointTask | None = None, endpoint_name: str = "?"
) -> None:
    """Count an error for a closed connection, and yield to the event loop from the second one on.

    The log names code that ignores the errors. If that code continues, or was cancelled, it is slowed down. Cancelling
    is safe.

    Args:
        connection: The connection.
        endpoint: Its endpoint; `None` if that has ended.
        endpoint_name: Name of the endpoint, for the log.
    """
    task = asyncio.current_task()
    if task is None:
        return
    own = endpoint is not None and task is endpoint.task
    errors, scheduler = end_errors_of(task), connection.resources.scheduler
    times = errors.count(connection.connection_id, sends=scheduler.sends, own=own)
    if not errors.is_new:
        await asyncio.sleep(0)
    if times == IGNORED and connection.close_info is not None:
        name = endpoint_name if own else getattr(task.get_coro(), "__qualname__", "?")
        fields = {"endpoint" if own else "coroutine": name, "task": task.get_name()}
        connection.emit_throttled("end_ignored", logging.WARNING, name, **fields)
    swallowed = endpoint is not None and endpoint.has_swallowed_cancellation
    if times > SPINS or (times > IGNORED and swallowed):
        await asyncio.sleep(PAUSE)
    errors.mark_resumed(sends=scheduler.sends)


def end_errors_of(task: asyncio.Task[Any]) -> EndErrors:
    """Return the errors that a task has got from closed connections."""
    errors = _errors_of.get(task)
    if errors is None:
        errors = _errors_of[task] = EndErrors()
        task.add_done_callback(_mark_exception_retrieved)
    return errors


def _mark_exception_retrieved(task: asyncio.Task[Any]) -> None:
    """Prevent asyncio's warning about an unretrieved exception of a task that a closed connection has ended.

    The exception is read from asyncio's private attribute, because retrieving another exception would hide a bug.
    """
    if isinstance(getattr(task, "_exception", None), WebSocketDisconnect):
        task.exception()
