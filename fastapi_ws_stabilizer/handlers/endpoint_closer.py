"""Closing of connections after their endpoint."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any

import anyio
from fastapi import HTTPException, WebSocketDisconnect, WebSocketException

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.compat.starlette import known_handlers, mark_open
from fastapi_ws_stabilizer.compat.testclient import raises_server_exceptions
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from fastapi_ws_stabilizer.errors import (
    SocketClosed,
    close_info_for,
    is_bug,
    root_cause,
)
from fastapi_ws_stabilizer.handlers.exception_handlers import (
    Handler,
    call,
    handler_for_endpoint,
)
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all


class _Handled(WebSocketException):
    """`WebSocketException` that needs no more handling: the connection is closed, and the bug is reported."""


_Handled.__name__ = _Handled.__qualname__ = WebSocketException.__name__  # dependencies may log it


async def _forget(_: object, handled: Exception) -> None:
    """Clear the frames that a handled exception has passed through.

    Frames of exit stacks refer to the exception, which refers to the frames. Only the garbage collector would free
    them, and with them the connection.
    """
    traceback.clear_frames(handled.__traceback__)


async def _quietly(handler: Handler, connection: Connection, error: BaseException) -> tuple[Any, Exception | None]:
    try:
        return await call(handler, connection.websocket, error), None
    except Exception as failure:
        return None, failure


def _close_info_for_answer(answer: Any) -> CloseInfo:
    """Return the close info for the result of an exception handler that did not close the connection.

    A response with a status from 400 to 599 closes like an `HTTPException` of that status, anything else with 1011.
    """
    status = getattr(answer, "status_code", None)
    if not isinstance(status, int) or not 400 <= status < 600:
        return local_close(DisconnectReason.ERROR)
    return close_info_for(HTTPException(status))


class EndpointCloser:
    """Closer of connections whose endpoint has ended, with the close code for how it ended.

    Args:
        tasks: Set that holds the tasks of the application's exception handlers.
        timeout: Maximum seconds of an exception handler: `disconnect_grace`.
    """

    def __init__(self, tasks: TaskSet, timeout: float) -> None:
        self._tasks = tasks
        self._timeout = timeout

    async def exit_endpoint(self, connection: Connection, error: BaseException | None) -> bool:
        """Do the same as `close_after_endpoint`, as an `__aexit__`: return whether `error` is suppressed.

        Raises:
            BaseException: The exception that replaces `error`.
        """
        failure = await self.close_after_endpoint(connection, error)
        if failure is None or failure is error:
            return failure is None
        raise failure from error

    async def close_after_endpoint(self, connection: Connection, error: BaseException | None) -> BaseException | None:
        """Close a connection after its endpoint has returned (`None`) or raised `error`, and wait for its teardown.

        Dependencies entered before the socket must see that the endpoint failed, or they would commit instead of
        rolling back. So this method replaces an error with a `WebSocketException`, which Starlette handles silently
        because the connection is closed by then. It logs a bug once before that. Under Starlette's TestClient it
        returns the bug unchanged, so that the test sees it.

        Returns:
            The exception to raise instead of `error`. It is `error` itself for a foreign exception, such as a
            cancellation from outside, and `None` if there is nothing to raise.
        """
        endpoint = connection.endpoint
        cancelled_by_us = error is not None and endpoint.is_own_cancellation(error)
        endpoint.mark_returned()
        if error is not None and not cancelled_by_us and self._is_foreign(endpoint, error):
            connection.close(DisconnectReason.SERVER_SHUTDOWN)
            if isinstance(error, asyncio.CancelledError):
                # The cancellation is for the endpoint, so the close frame and the hooks still get their time. The
                # scope is for callers such as Starlette's TestClient, which cancels again at every await.
                with anyio.CancelScope(shield=True):
                    await wait_for_all([connection.closed], None)
            return error
        close_info, bug = close_info_for(error), None
        if error is not None and not cancelled_by_us:
            try:
                close_info, bug = await self.close_info_by_handler(connection, error)
            except BaseException:  # cancelled while the application's handler ran
                connection.close(DisconnectReason.SERVER_SHUTDOWN)
                raise
        connection.close(close_info.cause, code=close_info.code, reason=close_info.reason)
        raises = bug is not None and raises_server_exceptions()
        with anyio.CancelScope(shield=raises):  # the TestClient cancels as soon as the test has ended
            if bug is not None:
                await connection.report_bug("endpoint_failed", bug)
            await wait_for_all([connection.closed], None)
        if error is None:
            return None
        if raises:
            return bug
        return self.error_for_dependencies(connection, error)

    async def close_info_by_handler(
        self, connection: Connection, error: BaseException
    ) -> tuple[CloseInfo, BaseException | None]:
        """Call the application's handler for an error of the endpoint, and return the close info.

        The handler can close the connection. If it does not, the HTTP status of its result decides the close code, and
        an exception from it counts like one from the endpoint. If the handler raises because the client has left, the
        result is the same as without a handler.

        Returns:
            The close info, and the bug: `error`, the exception of the handler, or `None` if there is no bug.
        """
        is_mistake = is_bug(error) or not isinstance(error, Exception)
        handler = handler_for_endpoint(connection.websocket, error)
        if handler is None:
            return (local_close(DisconnectReason.ERROR), error) if is_mistake else (close_info_for(error), None)
        try:
            answer = await self._call_with_timeout(handler, connection, error)
        except Exception as second:
            if isinstance(root_cause(second), WebSocketDisconnect):  # the client left before the handler could answer
                return (local_close(DisconnectReason.ERROR), error) if is_mistake else (close_info_for(error), None)
            return close_info_for(second), second if is_bug(second) else None
        return (_close_info_for_answer(answer) if is_mistake else close_info_for(error)), None

    async def _call_with_timeout(self, handler: Handler, connection: Connection, error: BaseException) -> Any:
        """Call a handler of the application in a task, for at most `disconnect_grace` seconds."""
        answer, failure = await self._tasks.run_with_timeout(
            _quietly(handler, connection, error),
            self._timeout,
            name="ws-exception-handler",
            title="an exception handler",
            option="disconnect_grace",
        )
        if failure is not None:
            raise failure
        return answer

    @staticmethod
    def error_for_dependencies(connection: Connection, error: BaseException) -> WebSocketException | None:
        """Return the exception that the dependencies before the socket get instead of `error`."""
        websocket = connection.websocket
        known = known_handlers(websocket)
        if known is None and isinstance(root_cause(error), SocketClosed):
            return None  # without Starlette there are no dependencies, and nothing would handle the exception
        # Starlette's handler closes the WebSocket again. That has no effect, but it raises if your code closed it.
        mark_open(websocket)
        handled = _Handled(connection.close_info.code if connection.close_info else 1000)
        if known is not None:
            known[0].setdefault(_Handled, _forget)  # also if the application has a handler for `WebSocketException`
        return handled

    @staticmethod
    def _is_foreign(endpoint: EndpointTask, error: BaseException) -> bool:
        """Return whether an exception must propagate unchanged: an exit, or a cancellation of this task by others."""
        if isinstance(error, (Exception, asyncio.CancelledError)) or getattr(error, "exceptions", None):
            return endpoint.is_cancelled_by_others(error)
        return True
