"""Decorators that register functions for the events and messages of a manager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from pydantic import BaseModel

from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.handlers.registry import HandlerRegistry
from fastapi_ws_stabilizer.limits.inbound import rate_limiter

F = TypeVar("F", bound=Callable[..., Any])


class EventDecorators:
    """Decorators of a manager, `@manager.on_...`.

    Each works with and without parentheses. An event can have several functions, which are called in the order of
    registration. A message type has one function. Functions that are not async run in the thread pool. Registering a
    function with unsuitable parameters raises a `TypeError` that names its file and line and says what to write.
    """

    def __init__(self, hooks: HookRegistry, handlers: HandlerRegistry) -> None:
        self._hooks = hooks
        self._handlers = handlers

    @overload
    def on_handshake(self, hook: F, /) -> F: ...
    @overload
    def on_handshake(self, /) -> Callable[[F], F]: ...
    def on_handshake(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function before a connection is accepted: `hook(ws)`.

        It can read the socket, set its `user_data`, and reject the client by raising an `HTTPException`. It is not
        called for `manager.connect()`, because your code has accepted that WebSocket before.
        """
        return self._decorate("handshake", hook)

    @overload
    def on_connect(self, hook: F, /) -> F: ...
    @overload
    def on_connect(self, /) -> Callable[[F], F]: ...
    def on_connect(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a connection is accepted and registered: `hook(ws)`.

        It can send, and reject the client by closing the socket or by raising. `HTTPException(403)` closes with 4403.
        """
        return self._decorate("connect", hook)

    @overload
    def on_disconnect(self, hook: F, /) -> F: ...
    @overload
    def on_disconnect(self, /) -> Callable[[F], F]: ...
    def on_disconnect(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a connection has closed: `hook(ws, reason)`, with a `DisconnectReason`.

        It is called exactly once for each connection for which connect hooks started, after the remaining messages have
        been handled. It may take `disconnect_grace` seconds.
        """
        return self._decorate("disconnect", hook)

    @overload
    def on_resume(self, hook: F, /) -> F: ...
    @overload
    def on_resume(self, /) -> Callable[[F], F]: ...
    def on_resume(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a client has resumed its session: `hook(ws, outcome)`, with a `ResumeOutcome`.

        It is called instead of the connect hooks, after the disconnect hooks of the previous connection.
        `ws.user_data` and `ws.rooms` are those of the session. Raising rejects the client, as in a connect hook.
        """
        return self._decorate("resume", hook)

    @overload
    def on_session_end(self, hook: F, /) -> F: ...
    @overload
    def on_session_end(self, /) -> Callable[[F], F]: ...
    def on_session_end(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a session has ended: `hook(ws, reason)`, with the reason of its last disconnect.

        A session ends with a close code such as 1000, or when the client does not resume within `session_ttl`. For a
        plain client without a reconnect token the session ends with its connection.
        """
        return self._decorate("session_end", hook)

    @overload
    def on_auth(self, hook: F, /) -> F: ...
    @overload
    def on_auth(self, /) -> Callable[[F], F]: ...
    def on_auth(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function with the credential of a `stabilizer.v1.json` client: `hook(ws, credential)`.

        It is called for the hello, before the client has a session, with `None` if the hello has no credential. It is
        called again for each new credential. To reject, raise an `HTTPException(401)`: the server closes with 4401, and
        the client gets a new credential. If the function returns the seconds until the credential expires, the server
        asks the client for a new one in time.
        """
        return self._decorate("auth", hook)

    @overload
    def on_error(self, hook: F, /) -> F: ...
    @overload
    def on_error(self, /) -> Callable[[F], F]: ...
    def on_error(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function with each bug in an endpoint, a hook, a handler or a task of a socket: `hook(ws, error)`.

        The server logs the bug and closes the connection with 1011, whatever the function does.
        """
        return self._decorate("error", hook)

    @overload
    def on_slow(self, hook: F, /) -> F: ...
    @overload
    def on_slow(self, /) -> Callable[[F], F]: ...
    def on_slow(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a client does not read its messages: `hook(ws, how)`, with a `SlowConsumer`.

        It is called once when the client lags, once when the server drops messages to it, and once when the server
        disconnects it as a slow consumer. After the client has caught up, each can happen again. `ws.queued_messages`
        and `ws.dropped_messages` show the extent. The server does not wait for the function.
        """
        return self._decorate("slow", hook)

    @overload
    def on_join(self, hook: F, /) -> F: ...
    @overload
    def on_join(self, /) -> Callable[[F], F]: ...
    def on_join(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a client has joined a room: `hook(room, presence)`, with a `Room` and a `Presence`.

        It is called once for each client, regardless of its number of connections. In one room, hooks are called one
        after the other, in the order in which clients joined and left.
        """
        return self._decorate("join", hook)

    @overload
    def on_leave(self, hook: F, /) -> F: ...
    @overload
    def on_leave(self, /) -> Callable[[F], F]: ...
    def on_leave(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a client has left a room: `hook(room, presence)`, with a `Room` and a `Presence`.

        It is called when the last connection of the client leaves with `ws.leave`, is closed by the client with 1000,
        or is closed by the application. After a lost connection it is called when `presence_grace` has passed, unless
        the client has returned.
        """
        return self._decorate("leave", hook)

    def _decorate(self, event: str, hook: Callable[..., Any] | None) -> Any:
        def register(function: F) -> F:
            self._hooks.add(event, function)
            return function

        return register if hook is None else register(hook)

    @overload
    def on_message(self, handler: F, /) -> F: ...

    @overload
    def on_message(
        self, handler: str | None = None, /, *, max_rate: float | None = None, max_burst: float | None = None
    ) -> Callable[[F], F]: ...
    def on_message(
        self,
        handler: Callable[..., Any] | str | None = None,
        /,
        *,
        max_rate: float | None = None,
        max_burst: float | None = None,
    ) -> Any:
        """Call a function with messages, from `ws.run()`: `handler(ws, message)` or `handler(ws)`.

        `@manager.on_message("chat")` takes JSON objects with the `type` `chat`. `@manager.on_message` takes every
        message without a typed handler. The annotation of `message` sets its type: a pydantic model, `dict`, `str`,
        `bytes`, or another type that pydantic validates. An invalid message gets an error reply, and the connection
        stays open. Functions that are not async run in the thread pool.

        Args:
            handler: The message type, or the function.
            max_rate: Maximum messages per second of one client for this function, over all its connections. Messages
                above it get the error reply `rate_limited`, and many of them close the connection with 4429.
                `max_message_rate` applies in addition.
            max_burst: Maximum messages at once, by default as many as in one second.

        Raises:
            TypeError: The function cannot be called with a socket and a message.
            ValueError: The rate is not above zero, the burst is below one, or a burst has no rate. Or the type has a
                handler.
        """
        _check_decorated(handler)
        message_type = handler if isinstance(handler, str) else None
        limit = rate_limiter(max_rate, max_burst, message_type=message_type)

        def register(function: F) -> F:
            self._handlers.add(message_type, function, limit)
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
