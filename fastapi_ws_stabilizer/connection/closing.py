"""Connections that are over, and whose end is still worked on: hooks that run, endpoints that have their grace."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from fastapi_ws_stabilizer.connection.connection import Connection

MAX_CLOSING: Final = 10_000
"""How many there may be before nobody is let in: then hooks are slower than clients come and go."""

CLOSING_PER_SLOT: Final = 2
"""How many for each of `max_connections` have all of their grace."""


class ClosingConnections:
    """All of them, the one that has ended first comes first."""

    def __init__(self) -> None:
        self._connections: OrderedDict[str, Connection] = OrderedDict()
        self._by_client: dict[str, dict[str, Connection]] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: Connection) -> None:
        """A connection has begun to end."""
        self._connections[connection.connection_id] = connection
        self._by_client.setdefault(connection.client_id, {})[connection.connection_id] = connection

    def remove(self, connection: Connection) -> None:
        """Everything is done for a connection."""
        if self._connections.pop(connection.connection_id, None) is None:
            return
        of_client = self._by_client[connection.client_id]
        del of_client[connection.connection_id]
        if not of_client:
            del self._by_client[connection.client_id]

    def of_client(self, client_id: str) -> list[Connection]:
        """Return the connections of a client whose end is not done, the one that ended first comes first."""
        return list(self._by_client.get(client_id, {}).values())

    def expedite_oldest(self, max_connections: int | None) -> None:
        """Let nobody's grace be a reason to keep others out: cut the longest one short, if there are many."""
        if max_connections is None or len(self._connections) < CLOSING_PER_SLOT * max_connections:
            return
        connection = next(iter(self._connections.values()))
        self._connections.move_to_end(connection.connection_id)
        connection.expedite()
