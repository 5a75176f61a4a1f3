"""Memory of one connection, as the memory budget sees it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.limits.connections import retry_delay

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection


class MemoryAccount:
    """Account of one connection in the memory budget.

    It counts the queued and unread messages, the user data and the presence metadata of a plain connection. For a
    client with a session, the session is the account. When the connection closes, the account counts what the
    connection alone still holds: unread messages, and messages being flushed.

    A connection creates it when the budget has a limit or user code stores data.

    Args:
        connection: The connection.
    """

    __slots__ = ("_connection", "connection_id")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.connection_id = connection.connection_id

    @property
    def memory_usage(self) -> int:
        """Bytes that are held."""
        connection = self._connection
        if connection.close_info is None:
            return connection.own_memory
        unread = 0 if connection.protocol.keeps_unread else connection.inbox.counted_bytes
        return connection.outbox.counted_bytes + unread

    def evict(self) -> None:
        """Close the connection because the memory limit of the server is reached.

        If it is closing already, discard its unread and unsent messages, but not its close frame.
        """
        connection = self._connection
        if connection.close_info is not None:
            connection.close_unread()
            connection.on_discarded(connection.outbox.discard_queued())
            return
        connection.resources.listener.on_evicted(connection)
        retry = math.ceil(retry_delay() * 1000)
        connection.close(DisconnectReason.MEMORY, reason=f"out of memory; retry={retry}")

    def on_limit_exceeded(self, held: int) -> None:
        """Close the connection because it exceeds `max_memory_per_connection`. The memory of a closing one shrinks."""
        self._connection.on_limit_exceeded(held)
