"""The decorators that route a manager's events and messages to functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from pydantic import BaseModel

from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.handlers.registry import HandlerRegistry
from fastapi_ws_stabilizer.limits.inbound import rate_limiter

F = TypeVar("F", bound=Callable[..., Any])


class EventDecorators:
    """What a manager offers as `@manager.on_...`.

    Each works with and without parentheses, several functions can be registered for one event and are called in that
    order (a type of message has one), and functions that are not async run in the thread pool. A function that could
    not be called rightly is a `TypeError` when it is registered, which names its place and says what to write.
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

        It can look at the socket, set its `user_data`, and refuse by raising an `HTTPException`. Sockets that are
        connected by hand have been accepted already and do not come here.
        """
        return self._decorate("handshake", hook)

    @overload
    def on_connect(self, hook: F, /) -> F: ...
    @overload
    def on_connect(self, /) -> Callable[[F], F]: ...
    def on_connect(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a connection is accepted and registered: `hook(ws)`.

        It can send, and refuse by closing the socket or by raising: an `HTTPException(403)` closes with 4403.
        """
        return self._decorate("connect", hook)

    @overload
    def on_disconnect(self, hook: F, /) -> F: ...
    @overload
    def on_disconnect(self, /) -> Callable[[F], F]: ...
    def on_disconnect(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a connection is over: `hook(ws, reason)`, with a `DisconnectReason`.

        Called exactly once for each connection whose connect hooks began, after the messages that it left behind have
        been handled, and given `disconnect_grace` to finish.
        """
        return self._decorate("disconnect", hook)

    @overload
    def on_resume(self, hook: F, /) -> F: ...
    @overload
    def on_resume(self, /) -> Callable[[F], F]: ...
    def on_resume(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a client is back in its session: `hook(ws, outcome)`, with a `ResumeOutcome`.

        Called in the place of the connect hooks, after the disconnect hooks of the connection before. `ws.user_data`
        and `ws.rooms` are those of the session. Raising refuses, as in a connect hook.
        """
        return self._decorate("resume", hook)

    @overload
    def on_session_end(self, hook: F, /) -> F: ...
    @overload
    def on_session_end(self, /) -> Callable[[F], F]: ...
    def on_session_end(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a session is over: `hook(ws, reason)`, with the reason of its last disconnect.

        That is when one side has said goodbye, or when the client has not come back within `session_ttl`. A plain
        client without a reconnect token has a session as long as its connection.
        """
        return self._decorate("session_end", hook)

    @overload
    def on_auth(self, hook: F, /) -> F: ...
    @overload
    def on_auth(self, /) -> Callable[[F], F]: ...
    def on_auth(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function with the credential of a `stabilizer.v1.json` client: `hook(ws, credential)`.

        Called for its first frame, before it has a session, with `None` if it sent none, and whenever it sends a new
        one. Raise an `HTTPException(401)` to refuse: the client is closed with 4401, and gets new credentials. Return
        for how many seconds the credential is good, and the client is asked for a new one in time.
        """
        return self._decorate("auth", hook)

    @overload
    def on_error(self, hook: F, /) -> F: ...
    @overload
    def on_error(self, /) -> Callable[[F], F]: ...
    def on_error(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function with each bug in an endpoint, a hook, a handler or a tied task: `hook(ws, error)`.

        The bug is logged and the connection ends with 1011 whatever the function does.
        """
        return self._decorate("error", hook)

    @overload
    def on_slow(self, hook: F, /) -> F: ...
    @overload
    def on_slow(self, /) -> Callable[[F], F]: ...
    def on_slow(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a client does not keep up: `hook(ws, how)`, with a `SlowConsumer`.

        Told once when it begins to lag, once when messages to it are dropped, and once when it is disconnected for it,
        until it has caught up. `ws.queued_messages` and `ws.dropped_messages` say how bad it is. Nobody waits for it.
        """
        return self._decorate("slow", hook)

    @overload
    def on_join(self, hook: F, /) -> F: ...
    @overload
    def on_join(self, /) -> Callable[[F], F]: ...
    def on_join(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a client has come to a room: `hook(room, who)`, with a `Room` and a `Presence`.

        Told once for a client, however many connections it has. In one room, hooks are called one after the other, in
        the order in which clients came and went.
        """
        return self._decorate("join", hook)

    @overload
    def on_leave(self, hook: F, /) -> F: ...
    @overload
    def on_leave(self, /) -> Callable[[F], F]: ...
    def on_leave(self, hook: Callable[..., Any] | None = None, /) -> Any:
        """Call a function when a client has gone from a room: `hook(room, who)`, with a `Room` and a `Presence`.

        Told when its last connection has left by `ws.leave`, has said goodbye, or was closed by the application; where
        a connection broke, after `presence_grace`, unless the client is back by then.
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

        `@manager.on_message("chat")` takes JSON objects whose `type` is `chat`; `@manager.on_message` takes every
        message that no typed handler takes. The annotation of `message` says what it becomes: a pydantic model,
        `dict`, `str`, `bytes`, anything that pydantic validates. A message that does not fit gets an error reply and
        the connection stays. Functions that are not async run in the thread pool.

        Args:
            handler: The type of message, or the function.
            max_rate: Messages in a second that one client may have handled by this function, over all its connections.
                More get an error reply, `rate_limited`, and many more close 4429. `max_message_rate` is beside it.
            max_burst: How many may come at once; as many as in a second when left out.

        Raises:
            TypeError: The function cannot be called with a socket and a message.
            ValueError: A rate is not above zero, a burst is below one, or there is a burst without a rate; or the type
                has a handler already.
        """
        _check_decorated(handler)
        message_type = handler if isinstance(handler, str) else None
        limit = rate_limiter(max_rate, max_burst, message_type=message_type)

        def register(function: F) -> F:
            self._handlers.add(message_type, function, limit)
            return function

        return register(handler) if callable(handler) else register


def _check_decorated(handler: Any) -> None:
    """Refuse what is neither a type of message nor a function for messages.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(handler, type) and issubclass(handler, BaseModel):
        example = handler.__name__.lower()
        raise TypeError(
            f"{handler.__name__} is a model, and on_message takes the type of a message: "
            f'write @manager.on_message("{example}") above a function with message: {handler.__name__}'
        )
    if handler is not None and not isinstance(handler, str) and not callable(handler):
        raise TypeError(
            f'on_message takes the type of a message, a text, not {handler!r}: write @manager.on_message("chat")'
        )
