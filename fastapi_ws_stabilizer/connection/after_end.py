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

_last: weakref.WeakKeyDictionary[asyncio.Task[Any], tuple[str, int]] = weakref.WeakKeyDictionary()
"""The tasks that were told of an end: of which connection last, and how many times in a row."""


async def repeated(connection_id: str) -> int:
    """Count what the current task is told of an ended connection; from its second time on the event loop has a turn.

    A loop that catches every error would else never wait, and could not even be cancelled.

    Returns:
        How many times in a row the task was told of this connection.
    """
    task = asyncio.current_task()
    if task is None:
        return 0
    last = _last.get(task)
    count = last[1] + 1 if last is not None and last[0] == connection_id else 1
    _last[task] = (connection_id, count)
    if last is None:
        task.add_done_callback(_is_no_news)
    else:
        await asyncio.sleep(0)
    return count


def _is_no_news(task: asyncio.Task[Any]) -> None:
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
            await self._receive.__self__.told_again()  # type: ignore[attr-defined]


@functools.cache
def _ended_kind_of(kind: type[WebSocket]) -> type[WebSocket]:
    return type(f"Ended{kind.__name__}", (_Ended, kind), {})


def becomes_ended(websocket: WebSocket) -> None:
    """Let a `WebSocket` behave as one whose connection has ended."""
    websocket.__class__ = _ended_kind_of(type(websocket))
