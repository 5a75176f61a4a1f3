"""Sockets of ended connections, for the end of a session that can come minutes later."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.messages import Messages
from fastapi_ws_stabilizer.connection.pending import NO_INBOX, NO_OUTBOX
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome


class EndedConnection(Messages):
    """Stand-in for an ended connection that holds its data, but not its WebSocket or other objects of the server.

    The socket of `on_session_end` hooks uses it, because these hooks may run minutes after the connection ended.
    """

    __slots__ = ("_dropped_messages", "_outcome", "_session", "opened_at")

    predecessors: Final = ()
    hooks_done: Final = True
    is_closed: Final = True
    pause = None

    def __init__(self, connection: Connection) -> None:
        self.client_id = connection.client_id
        self.connection_id = connection.connection_id
        self.opened_at = connection.opened_at
        self.close_info = connection.close_info
        self.liveness = connection.liveness
        self.opened = True
        self.protocol = None
        self.outbox = NO_OUTBOX
        self._dropped_messages = connection.dropped_messages
        self.inbox = NO_INBOX
        self._parts = connection._parts
        self._session = connection.session
        self._outcome = connection.outcome

    @property
    def session(self) -> Session | None:
        """The session of the connection."""
        return self._session

    @property
    def outcome(self) -> ResumeOutcome:
        """The resume outcome of the connection."""
        return self._outcome

    @property
    def recipient(self) -> Any:
        """The recipient in rooms: the session, if the connection had one."""
        return self._session or self

    @property
    def dropped_messages(self) -> int:
        """Number of messages that were dropped because the client was a slow consumer."""
        return self._dropped_messages

    @property
    def budget(self) -> MemoryBudget:
        """The memory budget of the connection."""
        return self._parts.budget

    @property
    def memory_usage(self) -> int:
        """Bytes held for the session; 0 without one."""
        return 0 if self._session is None else self._session.memory_usage

    @property
    def websocket(self) -> Any:
        """The WebSocket, which is not available any more.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "the WebSocket and its handshake (headers, url, path_params, state, ...) are not available after the "
            "connection has ended: store what this hook needs in ws.user_data"
        )

    async def wait_for_hooks(self) -> None:
        """Do nothing: the disconnect hooks have run."""

    async def wait_closing(self) -> CloseInfo:
        """Return the close info of the connection."""
        return self.close_info or local_close(DisconnectReason.SERVER_SHUTDOWN)

    async def yield_after_end(self) -> None:
        """Yield to the event loop, so that code that ignores the end cannot block it."""
        await asyncio.sleep(0)

    def spawn(self, coroutine: Any, _: str | None) -> Any:
        """Start no task, and raise.

        Raises:
            SocketClosed: Always.
        """
        coroutine.close()
        self.check_open()

    # ── methods that do nothing after the end ──

    def close(self, *_: Any, **__: Any) -> bool:
        """Return `False`: the connection is already closed."""
        return False

    def on_delivered(self) -> None:
        """Do nothing: no message is delivered after the end."""

    def on_nonzero(self) -> None:
        """Do nothing: the ended connection holds no memory."""

    def evict(self) -> None:
        """Do nothing: the ended connection holds no memory."""

    def on_limit_exceeded(self, held: int) -> None:
        """Do nothing: the ended connection holds no memory."""

    def on_connection_lost(self, error: BaseException) -> None:
        """Do nothing: the connection has already ended."""


def socket_after_end(socket: StableSocket) -> StableSocket:
    """Return a socket with the data of an ended one, without a reference to its connection."""
    ended: Any = EndedConnection(socket._connection)
    copy = StableSocket(ended, socket._services, identity=socket.identity)
    copy._metadata, copy._user_data = socket._metadata, socket._user_data
    return copy
