"""Clients of a memory budget that record what happens to them."""

from __future__ import annotations

from fastapi_ws_stabilizer.memory.budget import MemoryBudget, SharedMessage


class Note:
    """A message that several clients may hold."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.refcount = 0


class FakeEvictable:
    """A client that holds its own bytes, and shared messages.

    Attributes:
        evicted: Whether it was evicted to free memory for others.
        ended_at: Bytes that it held when they exceeded the limit for one client.
    """

    def __init__(self, budget: MemoryBudget, name: str, held: int = 0) -> None:
        self.connection_id = name
        self.memory_usage = 0
        self.evicted = False
        self.ended_at: int | None = None
        self._budget = budget
        self._notes: list[SharedMessage] = []
        budget.attach(self)
        self.takes(held)

    def takes(self, size: int) -> None:
        """Hold that many more bytes."""
        self.memory_usage += size
        self._budget.add(size)
        self._budget.on_nonzero(self)

    def holds(self, note: SharedMessage) -> None:
        """Hold a message."""
        self.memory_usage += note.size
        self._notes.append(note)
        self._budget.retain(note)
        self._budget.on_nonzero(self)

    def evict(self) -> None:
        """Implement `Evictable`."""
        self.evicted = True
        own = self.memory_usage - sum(note.size for note in self._notes)
        self._budget.add(-own)
        for note in self._notes:
            self._budget.release(note)
        self.memory_usage = 0
        self._notes.clear()

    def on_limit_exceeded(self, held: int) -> None:
        """Implement `Evictable`."""
        self.ended_at = held
