"""Bounded FIFO of frames that wait for a client, in which a frame can replace an older one of the same key."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import Any, Final

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

_MAX_REMOVED: Final = 64
"""Number of removed entries at the front, beyond which a list that is more than half removed is trimmed."""


class OutboxLimits:
    """Bounds, overflow policy and counters shared by outboxes of a manager."""

    __slots__ = (
        "budget",
        "context",
        "counters",
        "max_bytes",
        "max_messages",
        "overflow",
        "reports_delivery",
        "send_timeout",
        "soft_bytes",
        "soft_messages",
    )

    def __init__(self, config: WebSocketConfig, counters: Counters, budget: MemoryBudget | None = None) -> None:
        self.bound(config.outbox_max_messages, config.outbox_max_bytes)
        if config.max_memory_per_connection is not None:
            self.bound(config.outbox_max_messages, config.max_memory_per_connection // 2)  # leaves room for other data
        self.overflow = config.outbox_overflow
        self.send_timeout = config.send_timeout
        self.counters = counters
        self.budget = MemoryBudget() if budget is None else budget
        self.context = (
            contextvars.copy_context()
        )  # context of timers, which the loop holds until they are due even if cancelled
        self.reports_delivery = self.budget.output_counts

    def bound(self, max_messages: int, max_bytes: int) -> None:
        """Lower the bounds to these values, where they are higher."""
        self.max_messages = min(max_messages, getattr(self, "max_messages", max_messages))
        self.max_bytes = min(max_bytes, getattr(self, "max_bytes", max_bytes))
        self.soft_messages = self.max_messages // 2
        self.soft_bytes = self.max_bytes // 2


class SendQueue:
    """Bounded FIFO of frames that wait for one client.

    An outbox creates it for its second waiting frame, and drops it when the client has caught up. It is a list with
    removed entries at its front, because a keyed frame is replaced by its index.

    Frames are not counted in the memory budget as long as no send blocks, because they wait for one or two iterations
    of the event loop. After `start_accounting`, each frame is counted. With a memory limit, frames that a writer task
    sends are counted at once.

    Args:
        limits: Bounds, shared with other queues.
        first: The frame that waits already.

    Attributes:
        entries: The frames, with removed entries at the front. An outbox appends to it on its fast path.
        held_bytes: Bytes of the waiting frames.
        counted: Whether the memory budget counts the frames.
    """

    __slots__ = ("_extra", "_head", "_keyed", "_limits", "_trimmed", "counted", "entries", "held_bytes")

    def __init__(self, limits: OutboxLimits, first: EncodedMessage | None = None) -> None:
        self._limits = limits
        self.entries: list[EncodedMessage] = []
        self._head = 0  # index of the first waiting frame
        self._trimmed = 0  # entries trimmed since the queue was empty
        self._keyed: dict[Any, int] | None = None  # coalesce_key → index, plus `_trimmed` at that time
        self._extra = (0, 0)  # preloaded messages and bytes, allowed beyond the bounds
        self.counted = False
        self.held_bytes = 0
        if first is not None:
            self.append(first)

    def __len__(self) -> int:
        return len(self.entries) - self._head

    @property
    def at_bounds(self) -> bool:
        """Whether a bound is reached."""
        messages, size = self._extra
        limits = self._limits
        return len(self) >= limits.max_messages + messages or self.held_bytes >= limits.max_bytes + size

    def fits(self, size: int) -> bool:
        """Return whether a message of `size` bytes fits. Any message fits into an empty queue."""
        messages, extra = self._extra
        limits, waiting = self._limits, len(self)
        return not waiting or (
            waiting < limits.max_messages + messages and self.held_bytes + size <= limits.max_bytes + extra
        )

    def stays_below_soft_limit(self, size: int) -> bool:
        """Return whether at most half of the bounds is used with a message of `size` bytes added."""
        limits = self._limits
        return len(self) < limits.soft_messages and self.held_bytes + size <= limits.soft_bytes

    def allow_extra(self) -> None:
        """Let the waiting frames use no room of later ones, until the queue is empty."""
        self._extra = (len(self), self.held_bytes)

    def start_accounting(self) -> None:
        """Count waiting and new frames in the memory budget. Called when frames wait for longer than an iteration."""
        if self.counted:
            return
        self.counted = True
        for frame in self.entries[self._head :]:
            self._limits.budget.retain(frame)

    def append(self, frame: EncodedMessage) -> None:
        """Add a frame, regardless of the bounds."""
        if self.counted:
            self._limits.budget.retain(frame)
        if frame.key is not None:
            keyed = self._keyed = {} if self._keyed is None else self._keyed
            if len(keyed) > 2 * self._limits.max_messages:  # most keys belong to frames already sent
                first = self._trimmed + self._head
                keyed = self._keyed = {key: index for key, index in keyed.items() if index >= first}
            keyed[frame.key] = self._trimmed + len(self.entries)
        self.entries.append(frame)
        self.held_bytes += frame.size

    def coalesce(self, frame: EncodedMessage) -> bool:
        """Replace the waiting frame of the same key. Return `False` if there is none or the growth does not fit."""
        if self._keyed is None:
            return False
        index = self._keyed.get(frame.key, -1) - self._trimmed
        if index < self._head or not self.entries:
            return False
        growth = frame.size - self.entries[index].size
        if growth > 0 and len(self) > 1 and self.held_bytes + growth > self._limits.max_bytes + self._extra[1]:
            return False
        if self.counted:
            self._limits.budget.release(self.entries[index])
            self._limits.budget.retain(frame)
        self.entries[index] = frame
        self.held_bytes += growth
        return True

    def pop(self) -> EncodedMessage:
        """Remove and return the first frame."""
        entries, head = self.entries, self._head
        frame = entries[head]
        if head + 1 == len(entries):
            self.clear()
            return frame
        entries[head] = _REMOVED
        if self.counted:
            self._limits.budget.release(frame)
        self._head = head + 1
        self.held_bytes -= frame.size
        if head > _MAX_REMOVED and 2 * head > len(entries):
            del entries[: self._head]
            self._trimmed += self._head
            self._head = 0
        return frame

    def pop_up_to(self, max_bytes: int) -> Sequence[EncodedMessage]:
        """Remove and return frames until `max_bytes` are reached, at least one."""
        if self.held_bytes <= max_bytes:
            frames = self.entries[self._head :] if self._head else self.entries
            self.clear()
            return frames
        taken, size = [], 0
        while self.entries and size < max_bytes:
            taken.append(frame := self.pop())
            size += frame.size
        return taken

    @property
    def has_keys(self) -> bool:
        """Whether a frame with a key is waiting, or has been since the queue was empty."""
        return self._keyed is not None

    def pop_within(self, max_bytes: int, max_keyed_bytes: int) -> Sequence[EncodedMessage]:
        """Remove and return frames until `max_bytes` are reached.

        A frame with a key, and all frames behind it, stay if `max_keyed_bytes` of frames with keys are reached before.
        """
        taken, size = [], 0
        while self.entries and size < max_bytes:
            frame = self.entries[self._head]
            if frame.key is not None:
                if max_keyed_bytes <= 0:
                    break
                max_keyed_bytes -= frame.size
            taken.append(self.pop())
            size += frame.size
        return taken

    def clear(self) -> None:
        """Remove all frames."""
        if self.counted:
            for frame in self.entries[self._head :]:
                self._limits.budget.release(frame)
        self.entries = []
        self._head = self._trimmed = self.held_bytes = 0
        self._keyed, self._extra = None, (0, 0)


_REMOVED: Final = EncodedMessage("")
"""Placeholder for a removed frame, so that the list does not hold the frame itself."""
