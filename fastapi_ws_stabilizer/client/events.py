"""Events of a client, and their listeners."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from fastapi_ws_stabilizer.tasks import TaskSet

logger = logging.getLogger("fastapi_ws_stabilizer.client")

F = TypeVar("F", bound=Callable[..., Any])

EVENTS: Final = ("open", "gap", "close", "state", "drain", "error")


@dataclass(frozen=True)
class Gap:
    """Messages of the server that this client will not get.

    Attributes:
        session_lost: Whether the server started a new session without any state of the old one.
        why: Cause from the server: `overflow`, `epoch`, `unknown`, `expired`, `denied`, ...; or `unfinished` from the
            client, for a message during which the connection was lost twice.
        first: Number of the first missed message.
        last: Number of the last missed message; `None` if the session is a new one.
    """

    session_lost: bool
    why: str | None
    first: int
    last: int | None


class ClientEvents:
    """Listeners of one client, by event.

    An async listener runs in its own task. An exception in a listener is logged and affects no other listener.

    Args:
        tasks: Task set for async listeners.
    """

    def __init__(self, tasks: TaskSet) -> None:
        self._tasks = tasks
        self._listeners: dict[str, list[Callable[..., Any]]] = {event: [] for event in EVENTS}

    def add(self, event: str, listener: F) -> F:
        """Call a listener on every further event of this name, and return the listener."""
        self._listeners[event].append(listener)
        return listener

    def remove(self, event: str, listener: Callable[..., Any]) -> None:
        """Remove a listener."""
        self._listeners[event].remove(listener)

    def emit(self, event: str, *args: Any) -> None:
        """Call the listeners of an event."""
        for listener in tuple(self._listeners[event]):
            try:
                result = listener(*args)
                if inspect.isawaitable(result):
                    self._tasks.spawn(_as_coroutine(result), name=f"ws-client-on-{event}")
            except Exception:
                logger.exception("a listener for %r failed", event)


async def _as_coroutine(awaitable: Awaitable[Any]) -> Any:
    """Await any awaitable, as a coroutine."""
    return await awaitable
