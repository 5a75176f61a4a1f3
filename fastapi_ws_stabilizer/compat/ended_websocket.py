"""What your code gets that goes on with a connection after its end: the same error, and never the whole event loop."""

from __future__ import annotations

import asyncio
import functools
import weakref
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

IGNORED: Final = 10
"""Errors in a row after which a task is said to ignore the end of its connection. Clean-ups try a few sends."""

SPINS: Final = 1000
"""Errors in a row after which a task is a loop that ends by nothing, and is slowed down so that others can work."""

PAUSE: Final = 0.05
"""Seconds that each further call waits in such a task, and in an endpoint that has swallowed its cancellation."""

_errors_of: weakref.WeakKeyDictionary[asyncio.Task[Any], EndErrors] = weakref.WeakKeyDictionary()
"""The tasks that were told of an end."""


class EndErrors:
    """What one task was told of ended connections in a row: while it did not wait for anything else, and sent nothing.

    A task that sends to many connections meets ended ones again and again, and is well: it waits between its rounds, or
    sends to the others. A loop that ignores the end does neither, whatever the number of its connections is.
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
            connection_id: The connection that has ended.
            sends: How many messages user code has sent so far, on all connections.
            own: Whether the task is the endpoint of this connection. Whatever it does in between, it should have ended.

        Returns:
            How many times in a row the task was told of this connection.
        """
        if not own and (self._waited or sends != self._sends):
            self._times.clear()
        times = self._times[connection_id] = self._times.get(connection_id, 0) + 1
        return times

    def mark_resumed(self, *, sends: int) -> None:
        """The task gets its error now. What it does until the next one decides whether that is in a row."""
        self.is_new = self._waited = False
        self._sends = sends
        asyncio.get_running_loop().call_soon(self._has_waited)  # runs only if the task lets the event loop turn

    def _has_waited(self) -> None:
        self._waited = True


def end_errors_of(task: asyncio.Task[Any]) -> EndErrors:
    """What a task was told of ended connections."""
    errors = _errors_of.get(task)
    if errors is None:
        errors = _errors_of[task] = EndErrors()
        task.add_done_callback(_mark_exception_retrieved)
    return errors


def _mark_exception_retrieved(task: asyncio.Task[Any]) -> None:
    """A task that was told of an end has ended by it: asyncio need not log that no code has looked at its exception.

    The exception is looked at where asyncio keeps it, because asking for another one would hide a bug.
    """
    if isinstance(getattr(task, "_exception", None), WebSocketDisconnect):
        task.exception()


class _Ended(WebSocket):
    """Starlette's `WebSocket` of a connection that has ended.

    Starlette itself refuses to read after a disconnect without waiting for anything, and does so also where messages
    are unread. Here they are read first, and then each read says again that the client has left.
    """

    async def receive(self) -> Any:
        """Return the next ASGI event: what is unread, then the disconnect, each time."""
        return await self._receive()

    async def send(self, message: Any) -> None:
        """As Starlette's."""
        await self._repeated()
        await super().send(message)

    async def receive_text(self) -> str:
        """As Starlette's."""
        await self._repeated()
        return await super().receive_text()

    async def receive_bytes(self) -> bytes:
        """As Starlette's."""
        await self._repeated()
        return await super().receive_bytes()

    async def receive_json(self, mode: str = "text") -> Any:
        """As Starlette's."""
        await self._repeated()
        return await super().receive_json(mode)

    async def _repeated(self) -> None:
        """Count a call that Starlette is going to refuse by itself."""
        if self.application_state is not WebSocketState.CONNECTED:
            await self._receive.__self__.yield_after_end()  # type: ignore[attr-defined]


@functools.cache
def _ended_kind_of(kind: type[WebSocket]) -> type[WebSocket]:
    return type(f"Ended{kind.__name__}", (_Ended, kind), {})


def becomes_ended(websocket: WebSocket) -> None:
    """Let a `WebSocket` behave as one whose connection has ended."""
    websocket.__class__ = _ended_kind_of(type(websocket))
