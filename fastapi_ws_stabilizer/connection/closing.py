"""Connections in teardown: their hooks still run, or their endpoints are within `disconnect_grace`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from fastapi_ws_stabilizer.connection.connection import Connection

MAX_CLOSING: Final = 10_000
"""Number of connections in teardown at which the server rejects handshakes, because clients connect and leave faster
than hooks finish."""

CLOSING_PER_SLOT: Final = 2
"""Multiple of `max_connections`: this many connections in teardown may use their whole `disconnect_grace`."""


class ClosingConnections:
    """Registry of the connections in teardown, ordered by the start of their teardown."""

    def __init__(self) -> None:
        self._connections: OrderedDict[str, Connection] = OrderedDict()
        self._by_client: dict[str, dict[str, Connection]] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[Connection]:
        """Iterate over a copy of all connections, oldest first."""
        return iter(tuple(self._connections.values()))

    def add(self, connection: Connection) -> None:
        """Add a connection that has started to close."""
        self._connections[connection.connection_id] = connection
        self._by_client.setdefault(connection.client_id, {})[connection.connection_id] = connection

    def remove(self, connection: Connection) -> None:
        """Remove a connection at the end of its teardown."""
        if self._connections.pop(connection.connection_id, None) is None:
            return
        of_client = self._by_client[connection.client_id]
        del of_client[connection.connection_id]
        if not of_client:
            del self._by_client[connection.client_id]

    def of_client(self, client_id: str) -> list[Connection]:
        """Return a client's connections in teardown, oldest first."""
        return list(self._by_client.get(client_id, {}).values())

    def expedite_oldest(self, max_connections: int | None) -> None:
        """Cancel the endpoint that has been in teardown longest, if too many connections are in teardown.

        Otherwise endpoints that use their whole `disconnect_grace` could cause rejected handshakes.
        """
        if max_connections is None or len(self._connections) < CLOSING_PER_SLOT * max_connections:
            return
        connection = next(iter(self._connections.values()))
        self._connections.move_to_end(connection.connection_id)
        connection.expedite()
