"""Who is connected: by connection id, by client id, and by shard.

Everything that ends, replaces or removes a connection looks it up by its own connection id, so that the end of an old
connection can never touch a newer one of the same client.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from fastapi_ws_stabilizer.hub.recipient import Recipient
from fastapi_ws_stabilizer.queueing import SendQueueLike

M = TypeVar("M", bound=Recipient)


class ConnectionRegistry(Generic[M]):
    """The open connections of one manager.

    Args:
        num_shards: Into how many parts they are divided, for work that is done part by part.
    """

    __slots__ = ("_by_client", "_by_id", "_numbers", "_shards")

    def __init__(self, num_shards: int = 1) -> None:
        self._by_id: dict[str, M] = {}
        self._by_client: dict[str, M | dict[str, M]] = {}  # a dict only where a client has several connections
        self._shards: tuple[list[SendQueueLike], ...] = tuple([] for _ in range(num_shards))
        self._numbers = itertools.count()

    def next_shard(self) -> int:
        """The shard for a new connection: in turn, so that all have the same size."""
        return next(self._numbers) % len(self._shards)

    def add_queue(self, mailbox: SendQueueLike, shard: int) -> None:
        """Add a mailbox to those that everybody means: a connection's, or that of a session."""
        mailbox.shard_index = len(self._shards[shard])
        self._shards[shard].append(mailbox)

    def remove_queue(self, mailbox: SendQueueLike, number: int) -> None:
        """Remove a mailbox that is there."""
        shard = self._shards[number]
        last = shard.pop()
        if last is not mailbox:
            shard[mailbox.shard_index] = last
            last.shard_index = mailbox.shard_index

    def add(self, member: M, *, mailbox: bool = True) -> None:
        """Add a connection.

        Args:
            member: The connection.
            mailbox: Whether its outbox is one of those that everybody means; not where it has a session for that.
        """
        self._by_id[member.connection_id] = member
        if mailbox:
            self.add_queue(member.outbox, member.shard)
        known = self._by_client.get(member.client_id)
        if known is None:
            self._by_client[member.client_id] = member
        elif isinstance(known, dict):
            known[member.connection_id] = member
        else:
            self._by_client[member.client_id] = {known.connection_id: known, member.connection_id: member}

    def remove(self, member: M, *, mailbox: bool = True) -> None:
        """Remove a connection, as it was added; nothing happens if it is not there."""
        if self._by_id.pop(member.connection_id, None) is None:
            return
        if mailbox:
            self.remove_queue(member.outbox, member.shard)
        known = self._by_client[member.client_id]
        if isinstance(known, dict) and len(known) > 1:
            del known[member.connection_id]
        else:
            del self._by_client[member.client_id]

    def get(self, connection_id: str) -> M | None:
        """The connection with that id."""
        return self._by_id.get(connection_id)

    def of_client(self, client_id: str) -> list[M]:
        """All connections of a client, oldest first."""
        known = self._by_client.get(client_id)
        if known is None:
            return []
        return list(known.values()) if isinstance(known, dict) else [known]

    def client_ids(self) -> list[str]:
        """The connected clients, each once, in the order in which they came."""
        return list(self._by_client)

    def outboxes(self) -> Iterator[Sequence[SendQueueLike]]:
        """The outboxes of all connections, shard by shard; connections may come and go while this is read."""
        for shard in self._shards:
            if shard:
                yield tuple(shard)

    def __iter__(self) -> Iterator[M]:
        """All connections, oldest first; connections may come and go while this is read."""
        return iter(tuple(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)
