"""Manager calls for other threads: each runs on the manager's event loop while its thread waits."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import sys
from asyncio import _get_running_loop as running_loop
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar, overload

from fastapi_ws_stabilizer.errors import ManagerNotRunningError, ThreadCallTimeoutError, WrongLoopError
from fastapi_ws_stabilizer.hub.broadcast import BroadcastResult
from fastapi_ws_stabilizer.node import Node
from fastapi_ws_stabilizer.tasks import start_from_thread
from fastapi_ws_stabilizer.wire.encoded import encode

T = TypeVar("T")

DEFAULT_TIMEOUT: Final = 30.0
"""Default seconds that a thread waits for a call. An event loop that is blocked for longer has failed."""


class _CallCancelledError(Exception):
    """The call raised `CancelledError`, but the task that runs it was not cancelled."""


class FromThread:
    """Interface for other threads, as `manager.from_thread`: a `def` route, an MQTT callback or a sensor thread.

    Each call runs on the manager's event loop and blocks its thread until the result is available. It returns the
    result, or raises the exception of the call.

    All calls raise:
        WrongLoopError: The call came from the manager's own event loop. Use `await manager.broadcast(...)` instead.
        ManagerNotRunningError: The app has not started yet, or has ended.
        ThreadCallTimeoutError: The call did not finish within `timeout` seconds and was cancelled. A message that was
            already queued is still sent.
    """

    __slots__ = ("_get_node",)

    def __init__(self, node: Callable[[], Node]) -> None:
        self._get_node = node  # a function, because a restarted manager has a new node

    @property
    def _node(self) -> Node:
        return self._get_node()

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
        """Call `manager.broadcast` from another thread.

        Args:
            message: `str`, bytes, or any value that can be encoded as JSON.
            exclude_client: A client id that does not get the message.
            room: The name of a room, or several names.
            exclude: Further clients that do not get the message: a client id, a socket, or several of them.
            coalesce_key: A queued message with an equal key is replaced by this one.
            volatile: Whether the message is only useful now. The server does not store it for detached clients.
            history: Whether the rooms store the message for new members, within `room_history`.
            timeout: Seconds to wait for the call.

        Raises:
            MessageEncodeError: The message cannot be encoded. It was sent to no client.
            TypeError: `exclude` is neither a client id, nor a socket, nor several of them.
        """
        frame = encode(message, coalesce_key, volatile=volatile)
        broadcast = functools.partial(
            self._node.broadcaster.broadcast, frame, room, exclude, exclude_client=exclude_client, history=history
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
        """Call `manager.send_to_client` from another thread.

        Args:
            client_id: The recipient.
            message: `str`, bytes, or any value that can be encoded as JSON.
            coalesce_key: A queued message with an equal key is replaced by this one.
            volatile: Whether the message is only useful now. The server does not store it for a detached client.
            timeout: Seconds to wait for the call.

        Returns:
            Whether the message was queued at least once.

        Raises:
            MessageEncodeError: The message cannot be encoded.
        """
        frame = encode(message, coalesce_key, volatile=volatile)
        return self.run(self._node.broadcaster.send_to_client, client_id, frame, timeout=timeout)

    def disconnect(
        self, client_id: str, code: int = 1000, reason: str = "", *, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Call `manager.disconnect` from another thread.

        Args:
            client_id: The client.
            code: Close code.
            reason: Close reason.
            timeout: Seconds to wait for the call.

        Raises:
            ConnectionNotFoundError: The client is neither connected nor detached.
            ValueError: `code` cannot be sent.
        """
        self.run(self._node.disconnect, client_id, code, reason, timeout=timeout)

    @overload
    def run(self, call: Callable[..., Awaitable[T]], /, *args: Any, timeout: float = DEFAULT_TIMEOUT) -> T: ...
    @overload
    def run(self, call: Callable[..., T], /, *args: Any, timeout: float = DEFAULT_TIMEOUT) -> T: ...
    def run(self, call: Callable[..., Any], /, *args: Any, timeout: float = DEFAULT_TIMEOUT) -> Any:
        """Run a function on the manager's event loop and return its result, awaited if it is awaitable.

        For example, `manager.from_thread.run(ws.send, "hello")` or `manager.from_thread.run(manager.revoke, "ann")`.
        For keyword arguments, pass a `functools.partial`. The function must not block.

        Args:
            call: The function, `async` or not.
            args: Its arguments.
            timeout: Seconds to wait for the call.

        Raises:
            Exception: Any exception of the function.
            concurrent.futures.CancelledError: The function awaited something that was cancelled. Python 3.10 cannot
                distinguish this from the end of the event loop, and raises ManagerNotRunningError.
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
        except RuntimeError as error:  # the loop was closed after the check
            raise ManagerNotRunningError from error
        try:
            return future.result(timeout)
        except _CallCancelledError:
            raise concurrent.futures.CancelledError from None
        except concurrent.futures.CancelledError:  # the end of the event loop cancelled the task
            raise ManagerNotRunningError from None
        except concurrent.futures.TimeoutError:
            if future.done():  # the function itself raised it
                raise
            future.cancel()
            raise ThreadCallTimeoutError(timeout) from None
        except BaseException:  # such as KeyboardInterrupt in this thread
            future.cancel()
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        loop = self._node.loop
        if loop is None or not loop.is_running():
            raise ManagerNotRunningError
        if running_loop() is loop:
            raise WrongLoopError("own_loop")
        return loop


def _is_cancelled_from_outside() -> bool:
    """Return whether the current task itself was cancelled, as at the end of an event loop.

    Python 3.10 cannot detect this, so the result is always `True` there.
    """
    task = asyncio.current_task()
    return sys.version_info < (3, 11) or (task is not None and task.cancelling() > 0)
