"""Memory that a closing connection still holds until the end of its teardown."""

from __future__ import annotations

from typing import Protocol


class ClosedConnection(Protocol):
    """Connection in teardown."""

    connection_id: str

    @property
    def residual_memory(self) -> int:
        """Bytes held by this connection alone."""

    def discard_residual(self) -> None:
        """Discard unread and unsent messages."""


class ResidualMemory:
    """Memory account of a closing connection: unread messages, and messages being flushed.

    The memory budget treats it like a client.

    Args:
        connection: The connection.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: ClosedConnection) -> None:
        self._connection = connection

    @property
    def connection_id(self) -> str:
        """Id of the connection."""
        return self._connection.connection_id

    @property
    def memory_usage(self) -> int:
        """Bytes that the connection holds."""
        return self._connection.residual_memory

    def evict(self) -> None:
        """Discard the messages, because the memory limit of the server is reached."""
        self._connection.discard_residual()

    def on_limit_exceeded(self, _: int) -> None:
        """Do nothing, because the memory of a closing connection does not grow."""
