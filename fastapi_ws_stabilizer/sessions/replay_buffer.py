"""Replay buffer: messages of a session that its client has not acknowledged yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.memory.budget import FRAME_OVERHEAD_BYTES, Evictable, MemoryBudget
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

NOTHING: Final = cast("list[EncodedMessage]", ())
"""Entries of every empty buffer. It is a tuple so that no code can add to it; the first message creates a list."""

_MAX_FORGOTTEN: Final = 64
"""Keys of messages that are not stored any more, beyond which they are forgotten if they are more than half of all."""


class ReplayLimits:
    """Limits of replay buffers, shared by all sessions.

    Args:
        max_messages: Maximum number of messages.
        max_bytes: Maximum bytes of messages. Sessions share the messages, but each session counts them.
        max_age: Seconds that a message is stored.
        budget: Memory budget that counts the messages.
    """

    __slots__ = ("budget", "evicts", "max_age", "max_bytes", "max_messages")

    def __init__(self, max_messages: int, max_bytes: int, max_age: float, budget: MemoryBudget | None = None) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.budget = MemoryBudget() if budget is None else budget
        self.evicts = self.budget.evicts


class ReplayBuffer:
    """Numbered messages of one session. Above a limit the oldest are dropped.

    The numbers are implicit: the last message has number `head`, the one before it `head - 1`, and so on.

    Args:
        limits: Limits, shared by all sessions.
        session: Holder of the messages, for the memory budget.

    Attributes:
        head: Number of the last message that was ever added; 0 before the first.
        held_bytes: Bytes of the stored messages.
        unsent: Number of the last message of each key, if it may be unsent; `None` if there is none.
    """

    __slots__ = ("_entries", "_limits", "_session", "head", "held_bytes", "unsent")

    def __init__(self, limits: ReplayLimits, session: Evictable | None = None) -> None:
        self._limits = limits
        self._session = session
        self._entries = NOTHING
        self.unsent: dict[Any, int] | None = None
        self.head = 0
        self.held_bytes = 0

    @property
    def entries(self) -> Sequence[EncodedMessage]:
        """The stored messages, oldest first."""
        return self._entries

    @property
    def counted_bytes(self) -> int:
        """Bytes of the stored messages with their overhead, as in the budget if no other session shares them."""
        return self.held_bytes + FRAME_OVERHEAD_BYTES * len(self._entries)

    @property
    def first_seq(self) -> int:
        """Number of the oldest stored message; `head + 1` if there is none."""
        return self.head - len(self._entries) + 1

    def append(self, frame: EncodedMessage) -> int:
        """Store a message and return its number.

        Hot path: called for each session of each broadcast.
        """
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
            if limits.evicts:
                limits.budget.on_nonzero(self._session)
        return self.head

    # ── messages with a key ──

    def append_keyed(self, frame: EncodedMessage) -> int:
        """Store a message that a newer one with its key may replace, and return its number."""
        seq = self.append(frame)
        keyed = {} if self.unsent is None else self.unsent
        if len(keyed) > 2 * len(self._entries) + _MAX_FORGOTTEN:  # most keys belong to messages not stored any more
            first = self.first_seq
            keyed = {key: number for key, number in keyed.items() if number >= first}
        keyed[frame.key] = seq
        self.unsent = keyed
        return seq

    def seq_of(self, key: object) -> int | None:
        """Return the number of the last message with that key, if it may be unsent."""
        return None if self.unsent is None else self.unsent.get(key)

    def replace(self, seq: int, frame: EncodedMessage) -> None:
        """Store a message under the number of an older one, which was not sent.

        If the older one was dropped because of a limit, the client misses both when it resumes.
        """
        entries, budget = self._entries, self._limits.budget
        index = seq - self.first_seq
        if index < 0:
            return
        replaced = entries[index]
        entries[index] = frame
        self.held_bytes += frame.size - replaced.size
        budget.retain(frame)
        budget.release(replaced)
        if self.held_bytes > self._limits.max_bytes:
            self._trim()

    # ── dropping messages ──

    def forget_up_to(self, seq: int) -> None:
        """Drop all messages up to a number."""
        self._drop(seq - self.first_seq + 1)

    def forget_old(self) -> None:
        """Drop messages older than `max_age`."""
        oldest = monotonic() - self._limits.max_age
        old = len(self._entries)
        for frame in reversed(self._entries):  # a replaced message is newer than some that follow it
            if frame.created_at < oldest:
                break
            old -= 1
        self._drop(old)

    def since(self, seq: int) -> Sequence[EncodedMessage]:
        """Return the messages after a number, oldest first.

        All of them must be stored: `seq + 1` must not be below `first_seq`.
        """
        return self._entries[seq + 1 - self.first_seq :]

    def forget_all(self) -> None:
        """Drop all messages; the numbers continue."""
        self._drop(len(self._entries))

    def close(self) -> int:
        """Drop all messages and the session at its end. Return the number of dropped messages."""
        self._session = None
        dropped = len(self._entries)
        self.forget_all()
        return dropped

    def rewind(self, lost: int) -> None:
        """Undo the last `lost` messages, as a store does that lost its newest entries."""
        for _ in range(min(lost, len(self._entries))):
            frame = self._entries.pop()
            self.held_bytes -= frame.size
            self._limits.budget.release(frame)
        self.head = max(0, self.head - lost)
        self.unsent = None
        self._drop(0)

    def _trim(self) -> None:
        """Drop the oldest messages above the limits, but never the newest, whatever its size."""
        entries, limits = self._entries, self._limits
        surplus = max(0, len(entries) - limits.max_messages)
        held = self.held_bytes - sum(frame.size for frame in entries[:surplus])
        while held > limits.max_bytes and surplus < len(entries) - 1:
            held -= entries[surplus].size
            surplus += 1
        self._drop(surplus)

    def _drop(self, count: int) -> None:
        """Drop the first `count` messages. Hot path: called for each acknowledgement."""
        entries = self._entries
        if count >= len(entries) or not entries:
            self._entries = NOTHING
            self.unsent = None
            size, self.held_bytes = self.held_bytes, 0
        elif count > 0:
            dropped = entries[:count]
            del entries[:count]
            entries = dropped
            size = sum([frame.size for frame in dropped])
            self.held_bytes -= size
        else:
            return
        size += FRAME_OVERHEAD_BYTES * len(entries)
        for frame in entries:  # as `MemoryBudget.release`
            frame.refcount = refcount = frame.refcount - 1
            if refcount:
                size -= frame.size + FRAME_OVERHEAD_BYTES  # others still hold it
        if size:
            self._limits.budget.total -= size
