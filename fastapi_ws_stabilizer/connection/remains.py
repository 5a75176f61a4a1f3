"""What a connection that has ended still holds, until everything is done for it."""

from __future__ import annotations

from typing import Protocol


class Ended(Protocol):
    """The connection."""

    connection_id: str

    @property
    def left_over(self) -> int:
        """Bytes that it alone holds."""

    def clear_out(self) -> None:
        """Throw them away."""


class Remains:
    """What is unread while its endpoint has its grace, and what is being flushed. To the ledger it is a client.

    Args:
        connection: The connection.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: Ended) -> None:
        self._connection = connection

    @property
    def connection_id(self) -> str:
        """The id of the connection."""
        return self._connection.connection_id

    @property
    def held_memory(self) -> int:
        """Bytes that it holds."""
        return self._connection.left_over

    def evict(self) -> None:
        """Throw it away, because room is needed."""
        self._connection.clear_out()

    def holds_too_much(self, _: int) -> None:
        """It grows no more."""
