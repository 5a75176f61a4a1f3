"""What a connection that has ended still holds, until everything is done for it."""

from __future__ import annotations

from typing import Protocol


class ClosedConnection(Protocol):
    """The connection."""

    connection_id: str

    @property
    def residual_memory(self) -> int:
        """Bytes that it alone holds."""

    def discard_residual(self) -> None:
        """Throw them away."""


class ResidualMemory:
    """What is unread while its endpoint has its grace, and what is being flushed. To the ledger it is a client.

    Args:
        connection: The connection.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: ClosedConnection) -> None:
        self._connection = connection

    @property
    def connection_id(self) -> str:
        """The id of the connection."""
        return self._connection.connection_id

    @property
    def memory_usage(self) -> int:
        """Bytes that it holds."""
        return self._connection.residual_memory

    def evict(self) -> None:
        """Throw it away, because room is needed."""
        self._connection.discard_residual()

    def on_limit_exceeded(self, _: int) -> None:
        """It grows no more."""
