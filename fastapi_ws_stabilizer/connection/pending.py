"""What a handshake has of its connection before it is accepted, and the empty inbox of stand-ins for connections."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fastapi import WebSocket

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.connection.inbox import Inbox, InboxLimits
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.connection.protocol import PLAIN
from fastapi_ws_stabilizer.errors import NotOpenError, no_websocket_error
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.tasks import LazyEvent, wait_for_all
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import AnyConnection, Connection
    from fastapi_ws_stabilizer.connection.ended_connection import EndedConnection


NO_INBOX: Final = Inbox(InboxLimits(0, 0))
"""Inbox of every stand-in for a connection. It is closed."""
NO_INBOX.close(discard=True)


class PendingConnection:
    """Stand-in for the connection of a handshake that is not accepted yet.

    The socket of handshake hooks and of the first auth hooks uses it. The connection takes over its ids and its socket.
    A rejected handshake therefore builds no connection, inbox and outbox. Every attribute that is not defined here
    raises `NotOpenError`.

    Args:
        websocket: The WebSocket, accepted or not.
        client_id: The client id, as far as it is known.
        budget: Memory budget that counts what hooks store in `user_data`.

    Attributes:
        connection_id: Id of the connection.
        opened_at: Time of its creation, on the monotonic clock.
        socket: The socket of user code.
        decided: Event that is set when the handshake is accepted or rejected.
    """

    __slots__ = ("_websocket", "budget", "client_id", "connection_id", "decided", "opened_at", "socket")

    close_info = None
    dropped_messages = 0
    inbox = NO_INBOX
    opened = False
    outcome = ResumeOutcome.NONE
    protocol = PLAIN
    queued_bytes = 0
    queued_messages = 0
    recipient = None

    def __init__(self, websocket: WebSocket, client_id: str, budget: MemoryBudget) -> None:
        self._websocket: WebSocket | None = websocket
        self.client_id = client_id
        self.connection_id = os.urandom(8).hex()
        self.budget = budget
        self.opened_at = monotonic()
        self.decided = LazyEvent()
        self.socket: Any = None

    def __getattr__(self, name: str) -> NoReturn:
        """Raise, because only an accepted connection has the other attributes.

        Raises:
            NotOpenError: Always.
        """
        raise NotOpenError

    @property
    def recipient_id(self) -> str:
        """Id that a plain client uses in rooms."""
        return self.connection_id

    @property
    def liveness(self) -> Liveness:
        """A new liveness, without a round trip."""
        return Liveness(self.opened_at, None)

    @property
    def websocket(self) -> WebSocket:
        """The WebSocket.

        Raises:
            RuntimeError: The handshake was rejected.
        """
        if self._websocket is None:
            raise no_websocket_error()
        return self._websocket

    def check_loop(self) -> None:
        """Do nothing: there is no transport to protect from other threads."""

    def accept(self, connection: Connection) -> None:
        """Hand the socket and the data of hooks over to the connection of the accepted handshake.

        Raises:
            MemoryLimitExceededError: The session has user data, and that of the hooks does not fit in addition. Only
                the data of the hooks is lost.
        """
        try:
            self.socket._attach(connection)
        finally:
            self.decided.set()

    def reject(self) -> None:
        """Stop counting the data of hooks, and drop the objects of the server, because the handshake was rejected."""
        if self.socket is not None:
            self.socket._detach_user_data()
            self.socket = None  # it refers to this object
        self._websocket = None
        self.decided.set()

    async def wait_accepted(self) -> Connection | EndedConnection:
        """Wait until the handshake is accepted, and return its connection, which may have ended. Cancelling is safe.

        Raises:
            NotOpenError: The handshake was rejected.
        """
        await wait_for_all([self.decided.future], None)
        connection: AnyConnection | None = None if self.socket is None else self.socket._connection
        if connection is None or isinstance(connection, PendingConnection):
            raise NotOpenError
        return connection

    def try_send(self, _: EncodedMessage) -> bool:
        """Return `False`: nothing can be sent yet."""
        return False

    async def send(self, *_: object) -> NoReturn:
        """Yield to the event loop, so that a loop that catches all errors lets others run, and raise.

        Raises:
            NotOpenError: Always.
        """
        await asyncio.sleep(0)
        raise NotOpenError

    request = send_with_ack = still_open = send

    async def closed_error(self) -> Exception:
        """Yield to the event loop as `send` does, and return the error for code that uses the connection."""
        await asyncio.sleep(0)
        return NotOpenError()

    def spawn(self, coroutine: Coroutine[Any, Any, object], _: str | None) -> NoReturn:
        """Start no task, and raise.

        Raises:
            NotOpenError: Always.
        """
        coroutine.close()  # otherwise Python warns that it was never awaited
        raise NotOpenError

    # ── memory ──

    @property
    def account(self) -> PendingConnection:
        """This object: it is its own account in the memory budget."""
        return self

    @property
    def memory_usage(self) -> int:
        """Bytes of the data that hooks have stored."""
        return 0 if self.socket is None else int(self.socket._user_data_bytes)

    def evict(self) -> None:
        """Do nothing: the handshake ends within seconds."""

    def on_limit_exceeded(self, _: int) -> None:
        """Do nothing: the write that exceeds the limit raises, and the handshake ends within seconds."""
