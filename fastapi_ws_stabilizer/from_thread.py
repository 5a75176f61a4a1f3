"""The calls of a manager for other threads: each runs on the manager's event loop while its thread waits."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import sys
from asyncio import _get_running_loop as running_loop
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Protocol, TypeVar, overload

from fastapi_ws_stabilizer.errors import ManagerNotRunningError, ThreadCallTimeoutError, WrongLoopError
from fastapi_ws_stabilizer.hub.broadcast import BroadcastResult
from fastapi_ws_stabilizer.tasks import start_from_thread

T = TypeVar("T")

DEFAULT_TIMEOUT: Final = 30.0
"""Seconds that a thread waits for the event loop. A loop that is blocked for as long is broken anyway."""


class _CallCancelledError(Exception):
    """The call has let a cancellation out that was none of the task that runs it."""


class Callee(Protocol):
    """What it needs of a manager."""

    _loop: asyncio.AbstractEventLoop | None

    async def broadcast(
        self,
        message: Any,
        exclude_client: str | None = None,
        *,
        room: str | Iterable[str] | None = None,
        exclude: Any = None,
        coalesce_key: Any = None,
        volatile: bool = False,
        history: bool = True,
    ) -> BroadcastResult:
        """Queue a message for all connections, or for those in a room."""

    async def send_to_client(
        self, client_id: str, message: Any, *, coalesce_key: Any = None, volatile: bool = False
    ) -> bool:
        """Queue a message for a client."""

    async def disconnect(self, client_id: str, code: int = 1000, reason: str = "") -> None:
        """Close a client's connections."""


class FromThread:
    """What other threads call, as `manager.from_thread`: a `def` route, a callback of an MQTT client, a sensor thread.

    Each call runs on the event loop of the manager, blocks its thread until the result is there, returns that, and
    raises what the call raised.

    All of them raise:
        WrongLoopError: This is the manager's own event loop: write `await manager.broadcast(...)` there.
        ManagerNotRunningError: The app has not started yet, or has ended.
        ThreadCallTimeoutError: The call did not finish within `timeout` seconds. It was cancelled; a message that was
            already queued is sent all the same.
    """

    __slots__ = ("_manager",)

    def __init__(self, manager: Callee) -> None:
        self._manager = manager

    def broadcast(
        self,
        message: Any,
        exclude_client: str | None = None,
        *,
        room: str | Iterable[str] | None = None,
        exclude: Any = None,
        coalesce_key: Any = None,
        volatile: bool = False,
        history: bool = True,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> BroadcastResult:
        """As `manager.broadcast`, from another thread.

        Args:
            message: `str`, bytes, or anything that can be JSON.
            exclude_client: A client id that does not get it.
            room: The name of a room, or of several.
            exclude: Who else does not get it: a client id, a socket, or several of them.
            coalesce_key: If a message with an equal key still waits to be sent to a client, this one takes its place.
            volatile: Whether it is worth nothing later: it is not kept for clients that are away.
            history: Whether the rooms remember it for newcomers, as far as `room_history` says.
            timeout: Seconds to wait for the event loop.

        Raises:
            MessageEncodeError: The message cannot be encoded; no client got anything.
        """

        async def broadcast() -> BroadcastResult:
            return await self._manager.broadcast(
                message,
                exclude_client,
                room=room,
                exclude=exclude,
                coalesce_key=coalesce_key,
                volatile=volatile,
                history=history,
            )

        return self.run(broadcast, timeout=timeout)

    def send_to_client(
        self,
        client_id: str,
        message: Any,
        *,
        coalesce_key: Any = None,
        volatile: bool = False,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> bool:
        """As `manager.send_to_client`, from another thread.

        Args:
            client_id: Who gets it.
            message: `str`, bytes, or anything that can be JSON.
            coalesce_key: If a message with an equal key still waits to be sent, this one takes its place.
            volatile: Whether it is worth nothing later: it is not kept if the client is away.
            timeout: Seconds to wait for the event loop.

        Raises:
            MessageEncodeError: The message cannot be encoded.
        """

        async def send() -> bool:
            return await self._manager.send_to_client(client_id, message, coalesce_key=coalesce_key, volatile=volatile)

        return self.run(send, timeout=timeout)

    def disconnect(
        self, client_id: str, code: int = 1000, reason: str = "", *, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """As `manager.disconnect`, from another thread.

        Args:
            client_id: Whose connections are closed.
            code: Close code.
            reason: Close reason.
            timeout: Seconds to wait for the event loop.

        Raises:
            ConnectionNotFoundError: No such client is connected.
            ValueError: `code` cannot be sent.
        """
        self.run(self._manager.disconnect, client_id, code, reason, timeout=timeout)

    @overload
    def run(self, call: Callable[..., Awaitable[T]], /, *args: Any, timeout: float = DEFAULT_TIMEOUT) -> T: ...
    @overload
    def run(self, call: Callable[..., T], /, *args: Any, timeout: float = DEFAULT_TIMEOUT) -> T: ...
    def run(self, call: Callable[..., Any], /, *args: Any, timeout: float = DEFAULT_TIMEOUT) -> Any:
        """Run any function on the manager's event loop, and return its result, awaited if it can be.

        `manager.from_thread.run(ws.send, "hello")`, `manager.from_thread.run(manager.revoke, "ann")`. For keyword
        arguments, pass a `functools.partial`. It must not block.

        Args:
            call: The function, `async` or not.
            args: Its arguments.
            timeout: Seconds to wait for the event loop.

        Raises:
            Exception: Whatever the function raised.
            concurrent.futures.CancelledError: The function has awaited something that was cancelled. On Python 3.10
                that cannot be told from the end of the event loop, and is a ManagerNotRunningError.
        """

        async def run() -> Any:
            try:
                result = call(*args)
                return await result if inspect.isawaitable(result) else result
            except asyncio.CancelledError:
                if _is_cancelled_from_outside():
                    raise
                raise _CallCancelledError from None

        loop = self._running_loop()
        try:
            future = start_from_thread(loop, run())
        except RuntimeError as error:  # it was closed in this moment
            raise ManagerNotRunningError from error
        try:
            return future.result(timeout)
        except _CallCancelledError:
            raise concurrent.futures.CancelledError from None
        except concurrent.futures.CancelledError:  # by the end of the loop
            raise ManagerNotRunningError from None
        except concurrent.futures.TimeoutError:
            if future.done():  # the call itself has raised it
                raise
            future.cancel()
            raise ThreadCallTimeoutError(timeout) from None
        except BaseException:  # a KeyboardInterrupt in this thread
            future.cancel()
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        loop = self._manager._loop
        if loop is None or not loop.is_running():
            raise ManagerNotRunningError
        if running_loop() is loop:
            raise WrongLoopError("own_loop")
        return loop


def _is_cancelled_from_outside() -> bool:
    """Whether the current task was asked to stop, as the end of an event loop asks all tasks."""
    task = asyncio.current_task()
    return sys.version_info < (3, 11) or (task is not None and task.cancelling() > 0)
