"""Who is connected: by connection id, and by client id.

Everything that ends, replaces or removes a connection looks it up by its own connection id, so that the end of an old
connection can never touch a newer one of the same client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from fastapi_ws_stabilizer.hub.member import Member

M = TypeVar("M", bound=Member)


class Registry(Generic[M]):
    """The open connections of one manager."""

    __slots__ = ("_by_client", "_by_id")

    def __init__(self) -> None:
        self._by_id: dict[str, M] = {}
        self._by_client: dict[str, dict[str, M]] = {}

    def add(self, member: M) -> None:
        """Add a connection."""
        self._by_id[member.connection_id] = member
        self._by_client.setdefault(member.client_id, {})[member.connection_id] = member

    def remove(self, member: M) -> None:
        """Remove a connection; nothing happens if it is not there."""
        if self._by_id.pop(member.connection_id, None) is None:
            return
        siblings = self._by_client[member.client_id]
        del siblings[member.connection_id]
        if not siblings:
            del self._by_client[member.client_id]

    def get(self, connection_id: str) -> M | None:
        """The connection with that id."""
        return self._by_id.get(connection_id)

    def of_client(self, client_id: str) -> list[M]:
        """All connections of a client, oldest first."""
        return list(self._by_client.get(client_id, {}).values())

    def client_ids(self) -> list[str]:
        """The connected clients, each once, in the order in which they came."""
        return list(self._by_client)

    def __iter__(self) -> Iterator[M]:
        """All connections, oldest first; connections may come and go while this is read."""
        return iter(tuple(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)
