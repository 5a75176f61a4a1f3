"""Event emitter of a client."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from fastapi_ws_stabilizer.tasks import TaskSet

logger = logging.getLogger("fastapi_ws_stabilizer.client")

F = TypeVar("F", bound=Callable[..., Any])

EVENTS: Final = ("open", "gap", "close", "state", "drain", "error")


class ClientEvents:
    """Listeners of one client, with a method (usable as a decorator) for each event.

    An async listener runs in its own task. An exception in a listener is logged and affects no other listener.
    """

    def __init__(self, tasks: TaskSet) -> None:
        self._listener_tasks = tasks
        self._listeners: dict[str, list[Callable[..., Any]]] = {event: [] for event in EVENTS}

    def on_open(self, listener: F) -> F:
        """Call `listener(outcome)` when a connection opens: `none`, `full`, `gap` or `lost`."""
        return self._listen("open", listener)

    def on_gap(self, listener: F) -> F:
        """Call `listener(gap)` when messages of the server were missed, with a `Gap`."""
        return self._listen("gap", listener)

    def on_close(self, listener: F) -> F:
        """Call `listener(code, reason)` when a connection ends or an attempt fails."""
        return self._listen("close", listener)

    def on_state(self, listener: F) -> F:
        """Call `listener(state)` when the state changes."""
        return self._listen("state", listener)

    def on_drain(self, listener: F) -> F:
        """Call `listener(after, within)`, in seconds, when the server drains.

        The client reconnects automatically.
        """
        return self._listen("drain", listener)

    def on_error(self, listener: F) -> F:
        """Call `listener(error)` on an error that does not end the connection."""
        return self._listen("error", listener)

    def _listen(self, event: str, listener: F) -> F:
        self._listeners[event].append(listener)
        return listener

    def _stop_listening(self, event: str, listener: Callable[..., Any]) -> None:
        self._listeners[event].remove(listener)

    def emit(self, event: str, *args: Any) -> None:
        """Call the listeners of an event."""
        for listener in tuple(self._listeners[event]):
            try:
                result = listener(*args)
                if inspect.isawaitable(result):
                    self._listener_tasks.spawn(_as_coroutine(result), name=f"ws-client-on-{event}")
            except Exception:
                logger.exception("a listener for %r failed", event)


async def _as_coroutine(awaitable: Awaitable[Any]) -> Any:
    """Await any awaitable, as a coroutine."""
    return await awaitable
