"""Who wants to know what happens to a client."""

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
    """The listeners of one client, as methods that can be decorators.

    A listener that is async runs in a task of its own. One that fails is logged and hurts nobody else.
    """

    def __init__(self, tasks: TaskSet) -> None:
        self._listener_tasks = tasks
        self._listeners: dict[str, list[Callable[..., Any]]] = {event: [] for event in EVENTS}

    def on_open(self, listener: F) -> F:
        """Call `listener(outcome)` when a connection is open: `none`, `full`, `gap` or `lost`."""
        return self._listen("open", listener)

    def on_gap(self, listener: F) -> F:
        """Call `listener(gap)` when messages of the server were missed: `gap` is a `Gap`."""
        return self._listen("gap", listener)

    def on_close(self, listener: F) -> F:
        """Call `listener(code, reason)` when a connection is over, or a dial has failed."""
        return self._listen("close", listener)

    def on_state(self, listener: F) -> F:
        """Call `listener(state)` when the state changes."""
        return self._listen("state", listener)

    def on_drain(self, listener: F) -> F:
        """Call `listener(after, within)`, in seconds, when the server asks to leave it soon. That is done by itself."""
        return self._listen("drain", listener)

    def on_error(self, listener: F) -> F:
        """Call `listener(error)` with what went wrong and ended nothing."""
        return self._listen("error", listener)

    def _listen(self, event: str, listener: F) -> F:
        self._listeners[event].append(listener)
        return listener

    def _stop_listening(self, event: str, listener: Callable[..., Any]) -> None:
        self._listeners[event].remove(listener)

    def emit(self, event: str, *args: Any) -> None:
        """Something has happened."""
        for listener in tuple(self._listeners[event]):
            try:
                result = listener(*args)
                if inspect.isawaitable(result):
                    self._listener_tasks.spawn(_as_coroutine(result), name=f"ws-client-on-{event}")
            except Exception:
                logger.exception("a listener for %r failed", event)


async def _as_coroutine(awaitable: Awaitable[Any]) -> Any:
    """Await anything, as a coroutine."""
    return await awaitable
