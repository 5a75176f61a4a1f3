"""Decorators that register functions for the events and messages of a manager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from pydantic import BaseModel

from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.handlers.registry import HandlerRegistry
from fastapi_ws_stabilizer.limits.inbound import rate_limiter

F = TypeVar("F", bound=Callable[..., Any])


class HookRegistrar:
    """Decorator that registers functions for one event of a manager: `@manager.on_connect`.

    It works with and without parentheses. An event can have several functions, which are called in the order of
    registration. Functions that are not async run in the thread pool.

    It is an attribute of the class of managers. Read from a manager, it is bound to the hooks of that manager.

    Args:
        event: The event.
        hooks: The hooks of the manager; `None` for the attribute of the class.
    """

    __slots__ = ("_event", "_hooks")

    def __init__(self, event: str, hooks: HookRegistry | None = None) -> None:
        self._event = event
        self._hooks = hooks

    def __get__(self, manager: Any, owner: type) -> HookRegistrar:
        """Return the decorator of one manager."""
        return self if manager is None else HookRegistrar(self._event, manager._hooks)

    @overload
    def __call__(self, hook: F, /) -> F: ...
    @overload
    def __call__(self, /) -> Callable[[F], F]: ...
    def __call__(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Register a function, and return it unchanged.

        Raises:
            TypeError: The function cannot take the arguments of the event. The error names its file and line and says
                what to write. Or the decorator is that of the class, and not of a manager.
        """
        hooks = self._hooks
        if hooks is None:
            raise TypeError(f"on_{self._event} is a decorator of a manager: write @manager.on_{self._event}")

        def register(function: F) -> F:
            hooks.add(self._event, function)
            return function

        return register if hook is None else register(hook)


class MessageRegistrar:
    """Decorator that registers functions for messages of a manager: `@manager.on_message("chat")`.

    It works with and without parentheses. A message type has one function. Functions that are not async run in the
    thread pool.

    It is an attribute of the class of managers. Read from a manager, it is bound to the handlers of that manager.

    Args:
        handlers: The message handlers of the manager; `None` for the attribute of the class.
    """

    __slots__ = ("_handlers",)

    def __init__(self, handlers: HandlerRegistry | None = None) -> None:
        self._handlers = handlers

    def __get__(self, manager: Any, owner: type) -> MessageRegistrar:
        """Return the decorator of one manager."""
        return self if manager is None else MessageRegistrar(manager._handlers)

    @overload
    def __call__(self, handler: F, /) -> F: ...
    @overload
    def __call__(
        self, handler: str | None = None, /, *, max_rate: float | None = None, max_burst: float | None = None
    ) -> Callable[[F], F]: ...
    def __call__(
        self,
        handler: Callable[..., Any] | str | None = None,
        /,
        *,
        max_rate: float | None = None,
        max_burst: float | None = None,
    ) -> Any:
        """Register a function for messages, and return it unchanged.

        Args:
            handler: The message type, or the function.
            max_rate: Maximum messages per second of one client for this function, over all its connections. Messages
                above it get the error reply `rate_limited`, and many of them close the connection with 4429.
                `max_message_rate` applies in addition.
            max_burst: Maximum messages at once, by default as many as in one second.

        Raises:
            TypeError: The function cannot be called with a socket and a message. The error names its file and line and
                says what to write.
            ValueError: The rate is not above zero, the burst is below one, or a burst has no rate. Or the type has a
                handler.
        """
        handlers = self._handlers
        if handlers is None:
            raise TypeError("on_message is a decorator of a manager: write @manager.on_message")
        _check_decorated(handler)
        message_type = handler if isinstance(handler, str) else None
        limit = rate_limiter(max_rate, max_burst, message_type=message_type)

        def register(function: F) -> F:
            handlers.add(message_type, function, limit)
            return function

        return register(handler) if callable(handler) else register


def _check_decorated(handler: Any) -> None:
    """Check that the argument of `on_message` is a message type or a function.

    Raises:
        TypeError: The argument is neither.
    """
    if isinstance(handler, type) and issubclass(handler, BaseModel):
        example = handler.__name__.lower()
        raise TypeError(
            f"{handler.__name__} is a model, but on_message takes a message type: "
            f'write @manager.on_message("{example}") above a function with message: {handler.__name__}'
        )
    if handler is not None and not isinstance(handler, str) and not callable(handler):
        raise TypeError(
            f'on_message takes a message type as a string, not {handler!r}: write @manager.on_message("chat")'
        )
