"""Hooks: functions that your code registers for events of a manager."""

from __future__ import annotations

import contextvars
import inspect
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import WebSocketDisconnect
from starlette.concurrency import run_in_threadpool

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.errors import BroadcastFailedError, is_bug, root_cause
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.signatures import Signature, is_async
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.tasks import TaskSet
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome

HOOK_SIGNATURES: Final = {
    "handshake": ("the socket",),
    "connect": ("the socket",),
    "disconnect": ("the socket", "the reason"),
    "resume": ("the socket", "a ResumeOutcome"),
    "session_end": ("the socket", "the reason"),
    "auth": ("the socket", "the credential"),
    "error": ("the socket", "the error"),
    "slow": ("the socket", "a SlowConsumer"),
    "join": ("the room", "a Presence"),
    "leave": ("the room", "a Presence"),
}
"""Arguments of a hook for each event. A function with fewer parameters gets the first ones."""

_FAILED: Final = {
    "disconnect": "disconnect_hook_failed",
    "session_end": "session_end_hook_failed",
    "slow": "slow_hook_failed",
    "join": "join_hook_failed",
    "leave": "leave_hook_failed",
}


_NOTHING: Final = object()


class Hook:
    """One registered function, called with as many arguments as it takes, in the thread pool if it is not async."""

    __slots__ = ("_arguments", "_async", "function")

    def __init__(self, function: Callable[..., Any], arguments: int) -> None:
        self.function = function
        self._arguments = arguments
        self._async = is_async(function)

    async def __call__(self, *args: Any) -> Any:
        """Call the function, wait until it returns, and return its result."""
        if self._async:
            return await self.function(*args[: self._arguments])
        result = await run_in_threadpool(self.function, *args[: self._arguments])
        if inspect.isawaitable(result):  # `lambda ws: ws.send("hi")` returns a coroutine
            return await result
        return result


class HookRegistry:
    """The hooks of one manager, called in the order in which they were registered.

    Args:
        events: The bus for reports of failures.
        limit: Maximum duration of a hook in seconds. It does not apply to handshake, auth, connect and resume hooks.
        auth_limit: Maximum duration in seconds of a handshake or auth hook.
    """

    def __init__(self, events: EventBus, limit: float = 10.0, auth_limit: float = 10.0) -> None:
        self._events = events
        self._limit = limit
        self._auth_limit = auth_limit
        self._tasks = TaskSet(lambda _, __: None)  # `_run_with_timeout` reads the failure
        self._hooks: dict[str, list[Hook]] = {event: [] for event in HOOK_SIGNATURES}

    def add(self, event: str, function: Callable[..., Any]) -> None:
        """Register a function for an event.

        Raises:
            TypeError: The function cannot take the arguments of the event.
        """
        signature = Signature(function, f"on_{event}", HOOK_SIGNATURES[event])
        self._hooks[event].append(Hook(function, signature.arguments))

    def has(self, *events: str) -> bool:
        """Return whether a function is registered for one of these events."""
        return any(map(self._hooks.__getitem__, events))

    async def handshake(self, socket: StableSocket) -> None:
        """Run the handshake hooks. An exception or a timeout rejects the handshake."""
        for hook in self._hooks["handshake"]:
            await self._run_in_context(hook, socket)

    async def connect(self, socket: StableSocket) -> None:
        """Run the connect hooks. An exception closes the connection."""
        for hook in self._hooks["connect"]:
            await hook(socket)

    async def resume(self, socket: StableSocket, outcome: ResumeOutcome) -> None:
        """Run the resume hooks. An exception closes the connection."""
        for hook in self._hooks["resume"]:
            await hook(socket, outcome)

    async def auth(self, socket: StableSocket, credential: str | None) -> float | None:
        """Run the auth hooks. An exception rejects the credential, and a bug is reported.

        Returns:
            Seconds until the credential expires, the shortest that a hook returned, or `None` if no hook returned one.

        Raises:
            Exception: A hook raised it.
            TypeError: A hook returned something other than seconds, True or None.
        """
        try:
            return await self._authenticate(socket, credential)
        except Exception as error:
            if is_bug(error):
                await self.report_bug("auth_hook_failed", socket, error)
            raise

    async def _authenticate(self, socket: StableSocket, credential: str | None) -> float | None:
        limits = []
        for hook in self._hooks["auth"]:
            expires_in = await self._run_in_context(hook, socket, credential)
            if expires_in is None or expires_in is True or expires_in == math.inf:
                continue
            if isinstance(expires_in, bool) or not isinstance(expires_in, (int, float)) or not expires_in >= 0:
                name = getattr(hook.function, "__qualname__", repr(hook.function))
                raise TypeError(
                    f"{name} returned {expires_in!r}: an on_auth function returns the seconds until the credential "
                    "expires, or None; to reject the credential, raise HTTPException(401)"
                )
            limits.append(float(expires_in))
        return min(limits, default=None)

    async def _run_in_context(self, hook: Hook, *args: Any) -> Any:
        """Run a hook in a task for at most `auth_limit` seconds, and copy the context variables that it set."""

        async def run(*args: Any) -> tuple[Any, contextvars.Context]:
            return await hook(*args), contextvars.copy_context()

        result, context = await self._run_with_timeout(run, self._auth_limit, "hello_timeout", *args)
        for variable, value in context.items():
            if variable.get(_NOTHING) is not value:
                variable.set(value)
        return result

    async def session_end(self, socket: StableSocket, reason: DisconnectReason) -> None:
        """Run all session end hooks, even if one fails or hangs."""
        await self._run_all("session_end", socket, reason)

    async def _within_limit(self, hook: Hook, *args: Any) -> None:
        await self._run_with_timeout(hook, self._limit, "disconnect_grace", *args)

    async def _run_with_timeout(
        self, hook: Callable[..., Coroutine[Any, Any, Any]], limit: float, option: str, *args: Any
    ) -> Any:
        """Run a hook for at most `limit` seconds, then cancel it without waiting for its cleanup."""
        return await self._tasks.run_with_timeout(hook(*args), limit, name="ws-hook", title="a hook", option=option)

    async def disconnect(self, socket: StableSocket, reason: DisconnectReason) -> None:
        """Run all disconnect hooks, even if one fails or hangs."""
        await self._run_all("disconnect", socket, reason)

    async def slow(self, socket: StableSocket, stage: SlowConsumer) -> None:
        """Run all hooks for a slow consumer, even if one fails or hangs."""
        await self._run_all("slow", socket, stage)

    async def presence(self, event: str, room: Room, presence: Presence) -> None:
        """Run all hooks for a client that joined or left a room, even if one fails or hangs."""
        await self._run_all(event, room, presence)

    async def _run_all(self, event: str, subject: StableSocket | Room, detail: Any) -> None:
        for hook in self._hooks[event]:
            try:
                await self._within_limit(hook, subject, detail)
            except BroadcastFailedError as error:
                self._events.emit("broadcast_failed", logging.WARNING, recipients=error.total, **_fields_of(subject))
            except Exception as error:
                fields = _fields_of(subject)
                if isinstance(root_cause(error), WebSocketDisconnect):  # the connection had closed, which is not a bug
                    self._events.emit("hook_stopped", logging.DEBUG, hook=event, cause=repr(error), **fields)
                    continue
                self._events.emit_exception(_FAILED[event], error, **fields)
                if not isinstance(subject, Room):
                    await self.error(subject, error)

    async def report_bug(self, event: str, socket: StableSocket, error: BaseException) -> None:
        """Report a bug in user code once, and run the error hooks."""
        self._events.emit_exception(event, error, **_fields_of(socket))
        await self.error(socket, error)

    async def error(self, socket: StableSocket, error: BaseException) -> None:
        """Run all error hooks, even if one fails or hangs."""
        for hook in self._hooks["error"]:
            try:
                await self._within_limit(hook, socket, error)
            except Exception as second:
                if isinstance(root_cause(second), WebSocketDisconnect):
                    self._events.emit(
                        "hook_stopped", logging.DEBUG, hook="error", cause=repr(second), **_fields_of(socket)
                    )
                    continue
                self._events.emit_exception("error_hook_failed", second, **_fields_of(socket))


def _fields_of(subject: StableSocket | Room) -> dict[str, Any]:
    """Return the fields that identify a connection or a room in a report."""
    if isinstance(subject, Room):
        return {"room": subject.name}
    return {"client_id": subject.client_id, "connection_id": subject.connection_id}
