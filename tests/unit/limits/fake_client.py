"""Clients of a ledger that note what becomes of them."""

from __future__ import annotations

from fastapi_ws_stabilizer.limits.ledger import MemoryBudget, SharedMessage


class Note:
    """A message that several may hold."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.holders = 0


class FakeClient:
    """Somebody who holds bytes of their own, and messages.

    Attributes:
        evicted: Whether it had to go for others.
        ended_at: How much it held when that was too much for one.
    """

    def __init__(self, ledger: MemoryBudget, name: str, held: int = 0) -> None:
        self.connection_id = name
        self.held_memory = 0
        self.evicted = False
        self.ended_at: int | None = None
        self._ledger = ledger
        self._notes: list[SharedMessage] = []
        ledger.enter(self)
        self.takes(held)

    def takes(self, size: int) -> None:
        """Hold that much more."""
        self.held_memory += size
        self._ledger.add(size)
        self._ledger.holds(self)

    def holds(self, note: SharedMessage) -> None:
        """Hold a message."""
        self.held_memory += note.size
        self._notes.append(note)
        self._ledger.hold(note)
        self._ledger.holds(self)

    def evict(self) -> None:
        """As `Evictable`."""
        self.evicted = True
        own = self.held_memory - sum(note.size for note in self._notes)
        self._ledger.add(-own)
        for note in self._notes:
            self._ledger.release(note)
        self.held_memory = 0
        self._notes.clear()

    def holds_too_much(self, held: int) -> None:
        """As `Evictable`."""
        self.ended_at = held
