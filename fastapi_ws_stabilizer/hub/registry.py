"""Registries of the open connections, and of those in teardown.

Code that closes, replaces or removes a connection finds it by connection id. So the close of an old connection never
affects a newer one of the same client.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.queueing import SendQueueLike

MAX_CLOSING: Final = 10_000
"""Number of connections in teardown at which the server rejects handshakes, because clients connect and leave faster
than hooks finish."""

CLOSING_PER_SLOT: Final = 2
"""Multiple of `max_connections`: this many connections in teardown may use their whole `disconnect_grace`."""


class ConnectionRegistry:
    """Open connections of one manager, by connection id, client id and shard.

    Args:
        num_shards: Number of shards, for work that is done shard by shard.
    """

    __slots__ = ("_by_client", "_by_id", "_numbers", "_shards")

    def __init__(self, num_shards: int = 1) -> None:
        self._by_id: dict[str, Connection] = {}
        self._by_client: dict[
            str, Connection | dict[str, Connection]
        ] = {}  # a dict only for a client with several connections
        self._shards: tuple[list[SendQueueLike], ...] = tuple([] for _ in range(num_shards))
        self._numbers = itertools.count()

    def next_shard(self) -> int:
        """Return the shard of a new connection: round robin, so that all have the same size."""
        return next(self._numbers) % len(self._shards)

    def add_queue(self, queue: SendQueueLike, shard: int) -> None:
        """Add a connection's or session's send queue to those that get broadcasts to all."""
        queue.shard_index = len(self._shards[shard])
        self._shards[shard].append(queue)

    def remove_queue(self, queue: SendQueueLike, number: int) -> None:
        """Remove a send queue that was added."""
        shard = self._shards[number]
        last = shard.pop()
        if last is not queue:
            shard[queue.shard_index] = last
            last.shard_index = queue.shard_index

    def add(self, connection: Connection, *, with_queue: bool = True) -> None:
        """Add a connection.

        Args:
            connection: The connection.
            with_queue: Whether its outbox gets broadcasts to all; `False` if its session gets them instead.
        """
        self._by_id[connection.connection_id] = connection
        if with_queue:
            self.add_queue(connection.outbox, connection.shard)
        existing = self._by_client.get(connection.client_id)
        if existing is None:
            self._by_client[connection.client_id] = connection
        elif isinstance(existing, dict):
            existing[connection.connection_id] = connection
        else:
            self._by_client[connection.client_id] = {
                existing.connection_id: existing,
                connection.connection_id: connection,
            }

    def remove(self, connection: Connection, *, with_queue: bool = True) -> None:
        """Remove a connection with the `with_queue` of its `add`. Does nothing if it is not there."""
        if self._by_id.pop(connection.connection_id, None) is None:
            return
        if with_queue:
            self.remove_queue(connection.outbox, connection.shard)
        existing = self._by_client[connection.client_id]
        if isinstance(existing, dict) and len(existing) > 1:
            del existing[connection.connection_id]
        else:
            del self._by_client[connection.client_id]

    def get(self, connection_id: str) -> Connection | None:
        """Return the connection with that id."""
        return self._by_id.get(connection_id)

    def of_client(self, client_id: str) -> list[Connection]:
        """Return all connections of a client, oldest first."""
        existing = self._by_client.get(client_id)
        if existing is None:
            return []
        return list(existing.values()) if isinstance(existing, dict) else [existing]

    def client_ids(self) -> list[str]:
        """Return the connected clients, each once, in order of arrival."""
        return list(self._by_client)

    def outboxes_by_shard(self) -> Iterator[Sequence[SendQueueLike]]:
        """Yield the outboxes of each shard. Connections may open and close during the iteration."""
        for shard in self._shards:
            if shard:
                yield tuple(shard)

    def __iter__(self) -> Iterator[Connection]:
        """Iterate over a copy of all connections, oldest first."""
        return iter(tuple(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)


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

    def expedite_oldest(self, max_connections: int) -> None:
        """Cancel the endpoint that has been in teardown longest, if too many connections are in teardown.

        Otherwise endpoints that use their whole `disconnect_grace` could cause rejected handshakes.
        """
        if len(self._connections) < CLOSING_PER_SLOT * max_connections:
            return
        connection = next(iter(self._connections.values()))
        self._connections.move_to_end(connection.connection_id)
        connection.expedite()
