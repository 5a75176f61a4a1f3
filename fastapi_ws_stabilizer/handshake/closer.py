"""How a connection ends, and what its end takes with it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import anyio
from fastapi import HTTPException, WebSocketDisconnect, WebSocketException

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.compat.starlette import mark_open
from fastapi_ws_stabilizer.compat.under_test import test_client_wants_errors
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection import current as own
from fastapi_ws_stabilizer.connection.closing import ClosingConnections
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask, close_info_for, is_bug, root_cause
from fastapi_ws_stabilizer.connection.metered import ResidualMemory
from fastapi_ws_stabilizer.connection.resources import SharedResources
from fastapi_ws_stabilizer.errors import (
    SocketClosed,
    closed_error_for,
)
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.exception_handlers import (
    Handler,
    call,
    handler_for_endpoint,
    handler_of,
    known_handlers,
)
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.handshake.admission import AdmissionController
from fastapi_ws_stabilizer.handshake.session_lifecycle import SessionLifecycle
from fastapi_ws_stabilizer.hub.heartbeat import HeartbeatScheduler
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.hub.reaper import ConnectionReaper
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all


class _Handled(WebSocketException):
    """A `WebSocketException` that nothing is left to do for, where the application has a handler for those."""


async def _nothing(_: object, __: object) -> None:
    pass


async def _quietly(handler: Handler, connection: Connection, error: BaseException) -> tuple[Any, Exception | None]:
    try:
        return await call(handler, connection.websocket, error), None
    except Exception as failure:
        return None, failure


def _as_answered(answer: Any) -> CloseInfo:
    """How a connection ends whose handler has not closed it: a response stands for its status."""
    status = getattr(answer, "status_code", None)
    if not isinstance(status, int) or not 400 <= status < 600:
        return local_close(DisconnectReason.ERROR)
    return close_info_for(HTTPException(status))


class Closer:
    """Ends connections, each with the code that fits how its endpoint ended."""

    _config: WebSocketConfig
    _events: EventBus
    _hooks: HookRegistry
    _tasks: TaskSet
    _parts: SharedResources
    _closing_connections: ClosingConnections
    hub: Hub[Connection]
    admission: AdmissionController
    heartbeat: HeartbeatScheduler
    budget: MemoryBudget
    reaper: ConnectionReaper
    resumption: SessionLifecycle
    connections: set[Connection]

    async def close_after_endpoint(self, connection: Connection, error: BaseException | None) -> BaseException | None:
        """End a connection whose endpoint has returned (`None`) or let `error` escape, and wait until that is done.

        Dependencies that were entered before ours must learn that the endpoint has stopped half-way, or they would
        commit what should be rolled back. So an error is not swallowed but exchanged for a `WebSocketException`, which
        Starlette handles in silence because the connection is closed by then. A bug was logged here before, once.
        Under Starlette's TestClient it goes on as it is, so that the test sees it.

        Returns:
            What has to be raised instead of `error`; `error` itself if it is not ours to touch; `None` if nothing is.
        """
        endpoint = connection.endpoint
        cancelled_by_us = error is not None and endpoint.is_own_cancellation(error)
        endpoint.mark_returned()
        if error is not None and not cancelled_by_us and self._is_foreign(endpoint, error):
            connection.close(DisconnectReason.SERVER_SHUTDOWN)
            if isinstance(error, asyncio.CancelledError):
                # Whoever cancels us means the endpoint; the close frame and the hooks still have their time. The scope
                # is for callers like Starlette's TestClient, whose cancellation strikes at every await.
                with anyio.CancelScope(shield=True):
                    await wait_for_all([connection.finished], None)
            return error
        how, bug = close_info_for(error), None
        if error is not None and not cancelled_by_us:
            try:
                how, bug = await self.close_info_by_handler(connection, error)
            except BaseException:  # cancelled while the application's handler was at work
                connection.close(DisconnectReason.SERVER_SHUTDOWN)
                raise
        connection.close(how.cause, code=how.code, text=how.reason)
        raises = bug is not None and test_client_wants_errors()
        with anyio.CancelScope(shield=raises):  # the TestClient cancels as soon as its test has left
            if bug is not None:
                await connection.report_bug("endpoint_failed", bug)
            await wait_for_all([connection.finished], None)
        if error is None:
            return None
        if raises:
            return bug
        return self._error_for_dependencies(connection, error)

    async def close_info_by_handler(
        self, connection: Connection, error: BaseException
    ) -> tuple[CloseInfo, BaseException | None]:
        """Find out how a connection ends whose endpoint let `error` escape: the application's handler is asked first.

        The handler can close the connection. Where it does not, what it returns stands for its HTTP status, and what it
        raises means what it would mean in the endpoint. A handler that finds its client gone has handled nothing.

        Returns:
            The ending, and the bug in it: `error`, or what the handler has raised; `None` if there is none.
        """
        is_mistake = is_bug(error) or not isinstance(error, Exception)
        handler = handler_for_endpoint(connection.websocket, error)
        if handler is None:
            return (local_close(DisconnectReason.ERROR), error) if is_mistake else (close_info_for(error), None)
        try:
            answer = await self._ask(handler, connection, error)
        except Exception as second:
            if isinstance(root_cause(second), WebSocketDisconnect):  # it could tell the client nothing any more
                return (local_close(DisconnectReason.ERROR), error) if is_mistake else (close_info_for(error), None)
            return close_info_for(second), second if is_bug(second) else None
        return (_as_answered(answer) if is_mistake else close_info_for(error)), None

    async def _ask(self, handler: Handler, connection: Connection, error: BaseException) -> Any:
        """Call a handler of the application, in a task so that its time is bounded."""
        limit = self._config.disconnect_grace
        task = self._tasks.spawn(_quietly(handler, connection, error), name="ws-exception-handler")
        try:
            in_time = await wait_for_all([task], limit)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not in_time:
            task.cancel()
            raise TimeoutError(f"an exception handler took longer than disconnect_grace, {limit} seconds")
        if task.cancelled():
            raise RuntimeError("an exception handler was cancelled by something that it waited for")
        answer, failure = task.result()
        if failure is not None:
            raise failure
        return answer

    @staticmethod
    def _error_for_dependencies(connection: Connection, error: BaseException) -> WebSocketException | None:
        """What the dependencies before the socket see in place of what has ended the endpoint."""
        websocket = connection.websocket
        known = known_handlers(websocket)
        if known is None and isinstance(root_cause(error), SocketClosed):
            return None  # outside of Starlette nothing would handle it, and there are no dependencies
        # Starlette's handler closes the WebSocket, which does nothing any more, but stumbles if the user did before.
        mark_open(websocket)
        seen = WebSocketException(connection.close_info.code if connection.close_info else 1000)
        if known is None or handler_of(websocket, seen) is None:
            return seen
        known[0].setdefault(_Handled, _nothing)  # the application's handler was asked
        return _Handled(seen.code)

    @staticmethod
    def _is_foreign(endpoint: EndpointTask, error: BaseException) -> bool:
        """Whether an exception is nobody's bug and has to go on: an exit, or a cancellation of this very task."""
        if isinstance(error, (Exception, asyncio.CancelledError)) or getattr(error, "exceptions", None):
            return endpoint.is_cancelled_by_others(error)
        return True

    def _on_closing(self, connection: Connection) -> None:
        """A connection has begun to end: it is found nowhere any more. Each step is taken whatever the others raise."""
        attempt = connection.attempt
        attempt(self._closing_connections.add, connection)
        attempt(self._keep_rooms, connection)
        if connection.reservation is not None:
            attempt(connection.reservation.release)
        attempt(self.heartbeat.remove, connection)
        attempt(self.reaper.remove, connection)
        attempt(self.budget.remove, connection)
        attempt(self.resumption.detach, connection)
        if self.budget.evicts:
            connection.residual = ResidualMemory(connection)
            attempt(self.budget.mark_closed, connection.residual)
        attempt(connection.socket._detach_user_data)

    def _keep_rooms(self, connection: Connection) -> None:
        """Keep the names of its rooms, since it is in none of them when its hooks ask."""
        if connection.close_info is not None and (rooms := self.hub.rooms.rooms_of(connection.recipient)):
            connection.close_info = replace(connection.close_info, rooms=rooms)

    def _on_closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        connection.attempt(own.finished, connection)
        if connection.residual is not None:
            connection.attempt(self.budget.remove, connection.residual)
            connection.residual = None
        connection.attempt(self._closing_connections.remove, connection)
        connection.attempt(self.resumption.on_closed, connection)

    def _on_evicted(self, connection: Connection) -> None:
        self._events.counters.evictions += 1
        connection.emit("connection_evicted", logging.WARNING, held_bytes=connection.memory_usage)

    def _closed(self, connection: Connection) -> SocketClosed:
        return closed_error_for(connection.close_info or local_close(DisconnectReason.COMPLETED))
