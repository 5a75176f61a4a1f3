"""How a connection ends, and what its end takes with it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import anyio
from fastapi import WebSocketException
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.close_codes import DisconnectReason, ending
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.endpoint import Endpoint, ending_for, is_bug, meaning
from fastapi_ws_stabilizer.connection.lifecycle import Connection
from fastapi_ws_stabilizer.connection.parts import Parts
from fastapi_ws_stabilizer.connection.remains import Remains
from fastapi_ws_stabilizer.errors import (
    SocketClosed,
    socket_closed,
)
from fastapi_ws_stabilizer.hub.delivery import Delivery
from fastapi_ws_stabilizer.hub.heartbeat import Heartbeat
from fastapi_ws_stabilizer.hub.lifetimes import Lifetimes
from fastapi_ws_stabilizer.limits.ledger import Ledger
from fastapi_ws_stabilizer.reports import Reports
from fastapi_ws_stabilizer.routing.door import Door
from fastapi_ws_stabilizer.routing.endings import Endings
from fastapi_ws_stabilizer.routing.hooks import Hooks
from fastapi_ws_stabilizer.routing.resumption import Resumption
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all


class Leaving:
    """Ends connections, each with the code that fits how its endpoint ended."""

    _config: WebSocketConfig
    _reports: Reports
    _hooks: Hooks
    _tasks: TaskSet
    _parts: Parts
    _ending: Endings
    delivery: Delivery[Connection]
    door: Door
    heartbeat: Heartbeat
    ledger: Ledger
    lifetimes: Lifetimes
    resumption: Resumption
    unfinished: set[Connection]

    async def leave(self, connection: Connection, error: BaseException | None) -> BaseException | None:
        """End a connection whose endpoint has returned (`None`) or let `error` escape, and wait until that is done.

        Dependencies that were entered before ours must learn that something failed, or they would commit what should
        be rolled back. So an error is not swallowed but exchanged for a `WebSocketException`, which Starlette handles
        in silence because the connection is closed by then. A bug was logged here before, once.

        Returns:
            What has to be raised instead of `error`; `error` itself if it is not ours to touch; `None` if nothing is.
        """
        endpoint = connection.endpoint
        cancelled_by_us = error is not None and endpoint.is_own_cancellation(error)
        endpoint.has_returned()
        if error is not None and not cancelled_by_us and self._is_foreign(endpoint, error):
            connection.end(DisconnectReason.SERVER_SHUTDOWN)
            if isinstance(error, asyncio.CancelledError):
                # Whoever cancels us means the endpoint; the close frame and the hooks still have their time. The scope
                # is for callers like Starlette's TestClient, whose cancellation strikes at every await.
                with anyio.CancelScope(shield=True):
                    await wait_for_all([connection.finished], None)
            return error
        bug = error is not None and not cancelled_by_us and (is_bug(error) or not isinstance(error, Exception))
        how = ending(DisconnectReason.ERROR) if bug else ending_for(error)
        connection.end(how.reason, code=how.code, text=how.text)
        if bug and error is not None:
            await connection.bug("endpoint_failed", error)
        await wait_for_all([connection.finished], None)
        if error is None or isinstance(meaning(error), SocketClosed):
            return None
        # Starlette's handler closes the WebSocket, which does nothing any more, but stumbles if the user did before.
        connection.websocket.application_state = WebSocketState.CONNECTED
        return WebSocketException(connection.ending.code if connection.ending else 1000)

    @staticmethod
    def _is_foreign(endpoint: Endpoint, error: BaseException) -> bool:
        """Whether an exception is nobody's bug and has to go on: an exit, or a cancellation of this very task."""
        if isinstance(error, (Exception, asyncio.CancelledError)) or getattr(error, "exceptions", None):
            return endpoint.is_cancelled_by_others(error)
        return True

    def _left(self, connection: Connection) -> None:
        """A connection has begun to end: it is found nowhere any more. Each step is taken whatever the others raise."""
        attempt = connection.attempt
        attempt(self._ending.begun, connection)
        attempt(self._keep_rooms, connection)
        if connection.place is not None:
            attempt(connection.place.leave)
        attempt(self.heartbeat.remove, connection)
        attempt(self.lifetimes.remove, connection)
        attempt(self.ledger.leave, connection)
        attempt(self.resumption.left, connection)
        if self.ledger.orders:
            connection.remains = Remains(connection)
            attempt(self.ledger.has_ended, connection.remains)
        attempt(connection.face._let_go)

    def _keep_rooms(self, connection: Connection) -> None:
        """Keep the names of its rooms, since it is in none of them when its hooks ask."""
        if connection.ending is not None and (rooms := self.delivery.rooms.of(connection.member)):
            connection.ending = replace(connection.ending, rooms=rooms)

    def _finished(self, connection: Connection) -> None:
        self.unfinished.discard(connection)
        if connection.remains is not None:
            connection.attempt(self.ledger.leave, connection.remains)
            connection.remains = None
        connection.attempt(self._ending.over, connection)

    def _evicted(self, connection: Connection) -> None:
        self._reports.totals.evictions += 1
        connection.tell("connection_evicted", logging.WARNING, held_bytes=connection.held_memory)

    def _closed(self, connection: Connection) -> SocketClosed:
        return socket_closed(connection.ending or ending(DisconnectReason.COMPLETED))
