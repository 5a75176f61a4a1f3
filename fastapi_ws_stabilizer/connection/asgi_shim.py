"""Replacement for the ASGI callables of a `WebSocket`, for code that uses it directly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi_ws_stabilizer.close_codes import DisconnectReason, local_close
from fastapi_ws_stabilizer.connection.inbox import InboxClosed
from fastapi_ws_stabilizer.wire.encoded import CLOSE, encode

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection
    from fastapi_ws_stabilizer.connection.ended_connection import EndedConnection


class AsgiShim:
    """The `receive` and `send` that a connection installs in its `WebSocket`.

    Code that uses the `WebSocket` directly therefore goes through the inbox and the outbox too.

    Args:
        connection: The connection.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | EndedConnection = connection

    @property
    def client_id(self) -> str:
        """Client id of the connection."""
        return self._connection.client_id

    def release(self, ended: EndedConnection) -> None:
        """Drop the connection after its end, so that a `WebSocket` in user code does not hold it."""
        self._connection = ended

    async def receive(self) -> dict[str, Any]:
        """Replace the server's `receive`. Cancelling is safe.

        Raises:
            ConcurrentReceiveError: Another task is receiving.
            WrongLoopError: This is not the event loop of the connection.
        """
        connection = self._connection
        connection.check_loop()
        try:
            item = await connection.inbox.get()
        except InboxClosed:
            await connection.yield_after_end()
            close_info = connection.close_info or local_close(DisconnectReason.NETWORK_LOST)
            return {"type": "websocket.disconnect", "code": close_info.code, "reason": close_info.reason}
        message = connection.read_raw(item)
        return {"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message}

    async def send(self, message: Any) -> None:
        """Replace the server's `send`. If it is cancelled while it waits for room, nothing is sent.

        Raises:
            SocketClosed: The connection is closed.
            WrongLoopError: This is not the event loop of the connection.
        """
        connection = self._connection
        if message["type"] == CLOSE:
            reason = message.get("reason") or ""
            connection.close(DisconnectReason.APPLICATION, code=message.get("code", 1000), reason=reason)
            return
        if message["type"] != "websocket.send":
            raise RuntimeError(f"an accepted WebSocket cannot send {message['type']!r}")
        data = message.get("bytes")
        await connection.send(encode(message.get("text") or "" if data is None else data))

    async def yield_after_end(self) -> None:
        """Count an error for a closed connection, and yield to the event loop from the second one on."""
        await self._connection.yield_after_end()
