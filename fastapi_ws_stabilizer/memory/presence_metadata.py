"""What clients are described with in rooms, as presence metadata: how much of it each member has to answer for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi_ws_stabilizer.memory.budget import Evictable, MemoryBudget
from fastapi_ws_stabilizer.memory.sizing import deep_size


class PresenceMetadataSizes:
    """The sizes of presence metadata, by member and room. They are in the sum of the ledger.

    Args:
        budget: Where they are counted.
    """

    __slots__ = ("_budget", "_rooms")

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._rooms: dict[str, dict[str, int]] = {}  # member → room → bytes

    def __iter__(self) -> Iterator[str]:
        """The members that answer for something."""
        return iter(self._rooms)

    def put(self, member: Evictable, room: str, metadata: Mapping[str, Any]) -> None:
        """A member describes its client in a room, in place of what it said there before.

        Raises:
            MemoryLimitExceededError: It is more than may be held. What was there stays.
        """
        size = deep_size(metadata) if metadata else 0
        more = size - self._rooms.get(member.connection_id, {}).get(room, 0)
        self._budget.reserve(member, more)
        self._add(member.connection_id, room, more)
        if more > 0:
            self._budget.on_nonzero(member)

    def check(self, metadata: Mapping[str, Any]) -> None:
        """Look whether a client of which nothing is kept may be described so, for the rest of its grace.

        Raises:
            MemoryLimitExceededError: It is more than may be held.
        """
        self._budget.reserve(None, deep_size(metadata) if metadata else 0)

    def release(self, member_id: str, room: str, successor: str | None = None) -> None:
        """A member has left a room.

        Args:
            member_id: The member.
            room: The room.
            heir: Another member of the same client in it, to which the description belongs from now on.
        """
        size = self._rooms.get(member_id, {}).get(room, 0)
        if not size:
            return
        self._add(member_id, room, -size)
        if successor is not None:
            self._add(successor, room, size)

    def release_all(self, member_id: str) -> None:
        """A member is over."""
        for room in list(self._rooms.get(member_id, ())):
            self.release(member_id, room)

    def _add(self, member_id: str, room: str, size: int) -> None:
        if not size:
            return
        sizes = self._rooms.setdefault(member_id, {})
        sizes[room] = sizes.get(room, 0) + size
        if not sizes[room]:
            del sizes[room]
        if not sizes:
            del self._rooms[member_id]
        self._budget.describe(member_id, size)
