"""Sizes of presence metadata, and the recipients that they are counted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi_ws_stabilizer.memory.budget import Evictable, MemoryBudget
from fastapi_ws_stabilizer.memory.sizing import deep_size


class PresenceMetadataSizes:
    """Sizes of presence metadata by recipient and room, counted in the memory budget.

    Args:
        budget: Memory budget that counts them.
    """

    __slots__ = ("_budget", "_rooms")

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._rooms: dict[str, dict[str, int]] = {}  # recipient → room → bytes

    def __iter__(self) -> Iterator[str]:
        """Iterate over the recipients with metadata."""
        return iter(self._rooms)

    def put(self, recipient: Evictable, room: str, metadata: Mapping[str, Any]) -> None:
        """Count a recipient's new metadata in a room instead of its old metadata there.

        Raises:
            MemoryLimitExceededError: The metadata exceeds a memory limit. The old size stays.
        """
        size = deep_size(metadata) if metadata else 0
        added = size - self._rooms.get(recipient.connection_id, {}).get(room, 0)
        self._budget.ensure_room(recipient, added)
        self._add(recipient.connection_id, room, added)
        if added > 0:
            self._budget.on_nonzero(recipient)

    def check(self, metadata: Mapping[str, Any]) -> None:
        """Check metadata for a client without a recipient, which is stored for the rest of its grace.

        Raises:
            MemoryLimitExceededError: The metadata exceeds a memory limit.
        """
        self._budget.ensure_room(None, deep_size(metadata) if metadata else 0)

    def release(self, recipient_id: str, room: str, successor: str | None = None) -> None:
        """Stop counting the metadata of a recipient that has left a room.

        Args:
            recipient_id: The recipient.
            room: The room.
            successor: Recipient of the same client in the room, which the metadata counts for from now on.
        """
        size = self._rooms.get(recipient_id, {}).get(room, 0)
        if not size:
            return
        self._add(recipient_id, room, -size)
        if successor is not None:
            self._add(successor, room, size)

    def release_all(self, recipient_id: str) -> None:
        """Stop counting all metadata of an ended recipient."""
        for room in list(self._rooms.get(recipient_id, ())):
            self.release(recipient_id, room)

    def _add(self, recipient_id: str, room: str, size: int) -> None:
        if not size:
            return
        sizes = self._rooms.setdefault(recipient_id, {})
        sizes[room] = sizes.get(room, 0) + size
        if not sizes[room]:
            del sizes[room]
        if not sizes:
            del self._rooms[recipient_id]
        self._budget.describe(recipient_id, size)
