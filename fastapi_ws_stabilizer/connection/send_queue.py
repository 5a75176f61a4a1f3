"""Bounded FIFO of frames waiting to be sent, in which a frame can replace an older one of the same key."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import Any, Final, cast

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.memory.budget import FRAME_OVERHEAD_BYTES, MemoryBudget
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

EMPTY: Final = cast("list[EncodedMessage]", ())
"""List shared by all empty queues. It is a tuple, so that a frame cannot be appended to it by mistake."""

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
    """Bounded FIFO of frames waiting to be sent to one client.

    It mostly holds one frame and is emptied at once, so a single frame needs no list. Further frames use a list with
    removed entries at its front instead of a deque, because an idle connection should hold no memory.

    Frames that wait for at most one event loop iteration are not counted in the memory budget. `_start_accounting` is
    called when frames wait for the client. From then on, each frame is counted until the client has caught up.

    Attributes:
        held_bytes: Bytes of the waiting frames.
    """

    __slots__ = ("_counted", "_extra", "_head", "_keyed", "_limits", "_queue", "_single", "_trimmed", "held_bytes")

    def __init__(self, limits: OutboxLimits) -> None:
        self._limits = limits
        self._single: EncodedMessage | None = None  # the only waiting frame; the list is then empty
        self._queue = EMPTY
        self._head = 0  # index of the first waiting frame
        self._trimmed = 0  # entries trimmed since the queue was empty
        self._keyed: dict[Any, int] | None = None  # coalesce_key → index, plus `_trimmed` at that time
        self._extra: tuple[int, int] | None = None  # preloaded messages and bytes, allowed beyond the bounds
        self._counted = False  # whether the budget counts the frames; then `_single` is not used
        self.held_bytes = 0

    def __len__(self) -> int:
        return 1 if self._single is not None else len(self._queue) - self._head

    @property
    def counted_bytes(self) -> int:
        """Bytes of the waiting frames including their overhead: what the memory budget counts, if it does."""
        return self.held_bytes + FRAME_OVERHEAD_BYTES * SendQueue.__len__(self)

    @property
    def half_full(self) -> bool:
        """Whether more than half of a bound is used."""
        return 2 * len(self) > self._limits.max_messages or 2 * self.held_bytes > self._limits.max_bytes

    @property
    def _at_bounds(self) -> bool:
        """Whether a bound is reached."""
        messages, size = self._bounds
        return len(self) >= messages or self.held_bytes >= size

    @property
    def _bounds(self) -> tuple[int, int]:
        limits, extra = self._limits, self._extra
        if extra is None:
            return limits.max_messages, limits.max_bytes
        return limits.max_messages + extra[0], limits.max_bytes + extra[1]

    def _fits(self, size: int) -> bool:
        """Return whether a message of `size` bytes fits. Any message fits into an empty outbox."""
        waiting = len(self)
        if not waiting:
            return True
        messages, held = self._bounds
        return waiting < messages and self.held_bytes + size <= held

    def _below_soft_limit(self, size: int) -> bool:
        """Return whether at most half of the bounds is used with a message of `size` bytes added."""
        limits, waiting = self._limits, len(self)
        return not waiting or (waiting < limits.soft_messages and self.held_bytes + size <= limits.soft_bytes)

    def _promote_to_list(self) -> None:
        """Move a single waiting frame into a list."""
        if self._single is not None:
            self._queue = [self._single]
            self._single = None

    def _start_accounting(self) -> None:
        """Count waiting and new frames in the memory budget, until `_counted` is reset.

        Called when frames wait for longer than a loop iteration.
        """
        if self._counted:
            return
        self._promote_to_list()
        self._counted = True
        for frame in self._queue[self._head :]:
            self._limits.budget.retain(frame)
        self._on_nonzero()

    def _on_nonzero(self) -> None:
        """Handle counted bytes, where possibly no memory was held before."""

    def _append(self, frame: EncodedMessage) -> None:
        self._promote_to_list()
        if self._counted:
            self._limits.budget.retain(frame)
            self._on_nonzero()
        if frame.key is not None:
            keyed = self._keyed = {} if self._keyed is None else self._keyed
            if len(keyed) > 2 * self._limits.max_messages:  # most keys belong to frames already sent
                first = self._trimmed + self._head
                keyed = self._keyed = {key: index for key, index in keyed.items() if index >= first}
            keyed[frame.key] = self._trimmed + len(self._queue)
        if self._queue:
            self._queue.append(frame)
        else:
            self._queue = [frame]
        self.held_bytes += frame.size

    def _coalesce(self, frame: EncodedMessage) -> bool:
        """Replace the waiting frame of the same key. Return `False` if there is none or the growth does not fit."""
        if self._keyed is None:
            return False
        self._promote_to_list()
        index = self._keyed.get(frame.key, -1) - self._trimmed
        if index < self._head or not self._queue:
            return False
        growth = frame.size - self._queue[index].size
        if growth > 0 and len(self) > 1 and self.held_bytes + growth > self._limits.max_bytes:
            return False
        if self._counted:
            self._limits.budget.release(self._queue[index])
            self._limits.budget.retain(frame)
        self._queue[index] = frame
        self.held_bytes += growth
        return True

    def _pop(self) -> EncodedMessage:
        """Remove and return the first frame."""
        if self._single is not None:
            frame = self._single
            self._empty()
            return frame
        queue, head = self._queue, self._head
        frame = queue[head]
        if head + 1 == len(queue):
            self._empty()
            return frame
        queue[head] = _REMOVED
        if self._counted:
            self._limits.budget.release(frame)
        self._head = head + 1
        self.held_bytes -= frame.size
        if head > _MAX_REMOVED and 2 * head > len(queue):
            del queue[: self._head]
            self._trimmed += self._head
            self._head = 0
        return frame

    def _pop_up_to(self, max_bytes: int) -> Sequence[EncodedMessage]:
        """Remove and return frames until `max_bytes` are reached, at least one."""
        self._promote_to_list()
        if self.held_bytes <= max_bytes:
            frames = self._queue[self._head :] if self._head else self._queue
            self._empty()
            return frames
        taken, size = [], 0
        while self._queue and size < max_bytes:
            taken.append(frame := self._pop())
            size += frame.size
        return taken

    def _empty(self) -> None:
        if self._counted:
            for frame in self._queue[self._head :]:
                self._limits.budget.release(frame)
        self._single = None
        self._queue = EMPTY
        self._head = self._trimmed = self.held_bytes = 0
        self._keyed = self._extra = None


_REMOVED: Final = EncodedMessage("")
"""Placeholder for a removed frame, so that the list does not hold the frame itself."""
