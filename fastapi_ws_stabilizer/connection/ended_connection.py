"""What is left of a connection after its end, for code that keeps its socket."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.connection.end_errors import yield_after_error
from fastapi_ws_stabilizer.connection.inbox import Item
from fastapi_ws_stabilizer.connection.pending import NO_INBOX
from fastapi_ws_stabilizer.errors import closed_error_for, no_websocket_error
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.queueing import Recipient
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.v1.frames import Message

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection


class EndedConnection:
    """Facts about an ended connection, without its `WebSocket` and the objects of the server.

    The socket gets it in place of the connection when everything is done: the teardown, the endpoint and the hooks.
    Hooks for the end of a session may use the socket minutes later.

    Args:
        connection: The connection.
    """

    __slots__ = (
        "client_id",
        "close_info",
        "connection_id",
        "dropped_messages",
        "inbox",
        "liveness",
        "opened_at",
        "outcome",
        "protocol",
        "resources",
    )

    opened: Final = True
    pause: Final = None
    queued_messages: Final = 0
    queued_bytes: Final = 0

    def __init__(self, connection: Connection) -> None:
        self.client_id = connection.client_id
        self.connection_id = connection.connection_id
        self.close_info: CloseInfo = connection.close_info or local_close(DisconnectReason.SERVER_SHUTDOWN)
        self.opened_at = connection.opened_at
        self.dropped_messages = connection.outbox.dropped_messages
        self.liveness = connection.liveness
        self.outcome = connection.outcome
        self.protocol = connection.protocol
        self.resources = connection.resources
        self.inbox = connection.inbox if len(connection.inbox) and not self.protocol.acknowledges else NO_INBOX

    @property
    def recipient(self) -> Recipient | None:
        """The session, which may still get messages; `None` for a plain client."""
        return self.protocol.session

    @property
    def recipient_id(self) -> str:
        """Id that was used in rooms."""
        recipient = self.recipient
        return self.connection_id if recipient is None else recipient.connection_id

    @property
    def budget(self) -> MemoryBudget:
        """Memory budget that counted the connection."""
        return self.resources.budget

    @property
    def memory_usage(self) -> int:
        """Bytes held for the session; 0 without one."""
        recipient = self.recipient
        return 0 if recipient is None else recipient.account.memory_usage

    @property
    def websocket(self) -> NoReturn:
        """The WebSocket, which is not available any more.

        Raises:
            RuntimeError: Always.
        """
        raise no_websocket_error()

    def emit(self, event: str, level: int, **fields: Any) -> None:
        """Emit an event about this connection."""
        self.resources.events.emit(event, level, client_id=self.client_id, connection_id=self.connection_id, **fields)

    def emit_throttled(self, event: str, level: int, kind: str, **fields: Any) -> bool:
        """Emit an event that the client can cause without limit, throttled like `EventBus.emit_throttled`."""
        fields |= {"client_id": self.client_id, "connection_id": self.connection_id}
        return self.resources.events.emit_throttled(event, level, kind, **fields)

    # ── checks ──

    def check_loop(self) -> None:
        """Check that this is the event loop of the connection.

        Raises:
            WrongLoopError: This is another event loop.
        """
        self.resources.scheduler.check_loop()

    def check_opened(self) -> None:
        """Do nothing: the connection was open."""

    def check_open(self) -> NoReturn:
        """Raise, because the connection is closed.

        Raises:
            SocketClosed: Always.
        """
        self.check_loop()
        raise closed_error_for(self.close_info)

    async def still_open(self) -> NoReturn:
        """Raise, because the connection is closed.

        Raises:
            SocketClosed: Always.
        """
        self.check_loop()
        raise await self.closed_error()

    async def closed_error(self) -> Exception:
        """Return the error for code that uses a closed connection."""
        await self.yield_after_end()
        return closed_error_for(self.close_info)

    async def yield_after_end(self) -> None:
        """Count an error for a closed connection, and yield to the event loop from the second one on."""
        await yield_after_error(self)

    async def wait_closing(self) -> CloseInfo:
        """Return the close info of the connection."""
        await self.yield_after_end()
        return self.close_info

    async def wait_sent(self) -> None:
        """Do nothing: nothing is sent any more."""

    # ── messages ──

    def read_raw(self, item: Item) -> str | bytes:
        """Return the raw message, for code that does not use `stabilizer.v1.json`."""
        return item.raw if isinstance(item, Message) else item

    def try_send(self, _: EncodedMessage) -> bool:
        """Return `False`: nothing can be sent."""
        return False

    def should_yield(self) -> bool:
        """Return `False`: nothing was sent."""
        return False

    async def yield_for_send(self) -> None:
        """Do nothing: nothing was sent."""

    async def send(self, _: EncodedMessage) -> NoReturn:
        """Raise, because the connection is closed.

        Raises:
            SocketClosed: Always.
        """
        await self.still_open()

    async def send_with_ack(self, _: EncodedMessage) -> NoReturn:
        """Raise, because the connection is closed.

        Raises:
            SocketClosed: Always.
        """
        await self.still_open()

    async def request(self, _: str, __: Any, ___: float) -> NoReturn:
        """Raise, because the connection is closed.

        Raises:
            SocketClosed: Always.
        """
        await self.still_open()

    def close(self, *_: Any, **__: Any) -> bool:
        """Return `False`: the connection is already closed."""
        return False

    def spawn(self, coroutine: Coroutine[Any, Any, Any], _: str | None) -> NoReturn:
        """Start no task, and raise.

        Raises:
            SocketClosed: Always.
        """
        coroutine.close()
        self.check_open()
