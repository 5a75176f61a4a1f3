"""What a session has been sent and its client has not acknowledged yet, so that it can be sent again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.memory.budget import FRAME_OVERHEAD_BYTES, MemoryBudget
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

NOTHING: Final = cast("list[EncodedMessage]", ())
"""What every empty log holds. A tuple, so that nobody can put anything into it: who adds the first makes a list."""


class ReplayLimits:
    """How much a log keeps. Shared by all sessions.

    Args:
        max_messages: Most messages.
        max_bytes: Most bytes of messages. They are shared by all sessions that hold them, and counted in each.
        max_age: Seconds that a message is kept.
        budget: Where they are counted.
    """

    __slots__ = ("budget", "max_age", "max_bytes", "max_messages", "orders")

    def __init__(self, max_messages: int, max_bytes: int, max_age: float, budget: MemoryBudget | None = None) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.budget = MemoryBudget() if budget is None else budget
        self.orders = self.budget.evicts


class ReplayBuffer:
    """The numbered messages of one session, the oldest of which go when there are too many.

    Numbers are counted, not stored: the last message is number `head`, the one before it `head - 1`, and so on.

    Attributes:
        head: Number of the last message that was ever recorded; 0 before the first.
        held_bytes: Bytes of the messages that it holds.
    """

    __slots__ = ("_entries", "_limits", "head", "held_bytes")

    def __init__(self, limits: ReplayLimits) -> None:
        self._limits = limits
        self._entries = NOTHING
        self.head = 0
        self.held_bytes = 0

    @property
    def kept(self) -> Sequence[EncodedMessage]:
        """The messages that are still here, oldest first."""
        return self._entries

    @property
    def counted_bytes(self) -> int:
        """What it holds, with what each message takes beside its payload: what the ledger has, if nobody shares it."""
        return self.held_bytes + FRAME_OVERHEAD_BYTES * len(self._entries)

    @property
    def first_seq(self) -> int:
        """Number of the oldest message that is still here; `head + 1` if there is none."""
        return self.head - len(self._entries) + 1

    def append(self, frame: EncodedMessage) -> int:
        """Keep a message, and return its number. Hot path: called for each session of each broadcast."""
        self.head += 1
        size, refcount = frame.size, frame.refcount
        self.held_bytes += size
        entries, limits = self._entries, self._limits
        frame.refcount = refcount + 1
        if not refcount:  # as `MemoryBudget.retain`
            budget = limits.budget
            budget.total += size + FRAME_OVERHEAD_BYTES
            if budget.total > budget.limit:
                budget.schedule_eviction()
        if entries:
            entries.append(frame)
            if len(entries) > limits.max_messages or self.held_bytes > limits.max_bytes:
                self._trim()
        else:
            self._entries = [frame]
            if limits.orders:
                limits.budget.on_nonzero(self)
        return self.head

    def forget_up_to(self, seq: int) -> None:
        """Forget all messages up to a number."""
        self._drop(seq - self.first_seq + 1)

    def forget_old(self) -> None:
        """Forget messages that are older than they may be."""
        oldest = monotonic() - self._limits.max_age
        old = 0
        for frame in self._entries:
            if frame.created_at >= oldest:
                break
            old += 1
        self._drop(old)

    def since(self, seq: int) -> Sequence[EncodedMessage]:
        """The messages after a number, oldest first. They must all be here: `seq + 1` is not below `low`."""
        return self._entries[seq + 1 - self.first_seq :]

    def forget_all(self) -> None:
        """Forget all messages; numbers go on."""
        self._drop(len(self._entries))

    def rewind(self, lost: int) -> None:
        """Go back in time by some messages, as a store does that lost its newest entries."""
        for _ in range(min(lost, len(self._entries))):
            frame = self._entries.pop()
            self.held_bytes -= frame.size
            self._limits.budget.release(frame)
        self.head = max(0, self.head - lost)
        self._drop(0)

    def _trim(self) -> None:
        """Forget as many of the oldest as are too much. The newest is kept, whatever its size."""
        entries, limits = self._entries, self._limits
        surplus = max(0, len(entries) - limits.max_messages)
        held = self.held_bytes - sum(frame.size for frame in entries[:surplus])
        while held > limits.max_bytes and surplus < len(entries) - 1:
            held -= entries[surplus].size
            surplus += 1
        self._drop(surplus)

    def _drop(self, count: int) -> None:
        """Forget the first ones. Hot path: called for each acknowledgement."""
        entries = self._entries
        if count >= len(entries) or not entries:
            self._entries = NOTHING
            size, self.held_bytes = self.held_bytes, 0
        elif count > 0:
            gone = entries[:count]
            del entries[:count]
            entries = gone
            size = sum([frame.size for frame in gone])
            self.held_bytes -= size
        else:
            return
        size += FRAME_OVERHEAD_BYTES * len(entries)
        for frame in entries:  # as `MemoryBudget.release`
            frame.refcount = refcount = frame.refcount - 1
            if refcount:
                size -= frame.size + FRAME_OVERHEAD_BYTES  # others hold it
        if size:
            self._limits.budget.total -= size
