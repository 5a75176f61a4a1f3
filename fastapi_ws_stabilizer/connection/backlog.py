"""Frames that wait to be sent: in order, bounded by number and bytes, a newer one in the place of an older."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import Any, Final, cast

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.limits.ledger import FRAME_OVERHEAD_BYTES, MemoryBudget
from fastapi_ws_stabilizer.reports import Counters
from fastapi_ws_stabilizer.wire.payload import EncodedMessage

NOTHING: Final = cast("list[EncodedMessage]", ())
"""The queue of every outbox in which nothing waits. A tuple, so that nobody can put anything into it by mistake: who
adds the first frame makes a list."""

_MAX_DEAD: Final = 64
"""Places at the front of a queue that may be dead, if they are more than half of it, before it is cut."""


class OutboxLimits:
    """The bounds and the policy that all outboxes of a manager share, and where they count."""

    __slots__ = (
        "calm_bytes",
        "calm_messages",
        "context",
        "ledger",
        "max_bytes",
        "max_messages",
        "overflow",
        "send_timeout",
        "tells_delivery",
        "totals",
    )

    def __init__(self, config: WebSocketConfig, totals: Counters, ledger: MemoryBudget | None = None) -> None:
        self.bound(config.outbox_max_messages, config.outbox_max_bytes)
        if config.max_memory_per_connection is not None:
            self.bound(config.outbox_max_messages, config.max_memory_per_connection // 2)  # the rest has room too
        self.overflow = config.outbox_overflow
        self.send_timeout = config.send_timeout
        self.totals = totals
        self.ledger = MemoryBudget() if ledger is None else ledger
        self.context = contextvars.copy_context()  # what timers run in: one that is cancelled is held until its time
        self.tells_delivery = self.ledger.output_counts

    def bound(self, max_messages: int, max_bytes: int) -> None:
        """Lower the bounds to these, where they are higher."""
        self.max_messages = min(max_messages, getattr(self, "max_messages", max_messages))
        self.max_bytes = min(max_bytes, getattr(self, "max_bytes", max_bytes))
        self.calm_messages = self.max_messages // 2
        self.calm_bytes = self.max_bytes // 2


class SendQueue:
    """The queue of one outbox.

    Most of the time it holds one frame, and is emptied whole, so one frame that waits alone is no list yet. Further
    ones make a list with a dead part at its front, and no deque: an idle connection should hold nothing.

    What waits for no longer than a turn of the event loop is counted nowhere. When it is clear that frames wait for
    the client, `_count` begins to count them, and until it has caught up each that comes and goes is counted.

    Attributes:
        held_bytes: Bytes of the frames that wait.
    """

    __slots__ = ("_alone", "_counted", "_cut", "_extra", "_head", "_keyed", "_limits", "_queue", "held_bytes")

    def __init__(self, limits: OutboxLimits) -> None:
        self._limits = limits
        self._alone: EncodedMessage | None = None  # the only frame that waits; then the queue is empty
        self._queue = NOTHING
        self._head = 0  # where the first frame that waits stands
        self._cut = 0  # how many places have been cut off since the queue was empty
        self._keyed: dict[Any, int] | None = None  # coalesce_key → place, counted from before the cut
        self._extra: tuple[int, int] | None = None  # messages and bytes beyond the bounds, until the queue is empty
        self._counted = False  # whether what waits is in the ledger; then nothing stands alone
        self.held_bytes = 0

    def __len__(self) -> int:
        return 1 if self._alone is not None else len(self._queue) - self._head

    @property
    def counted_bytes(self) -> int:
        """What it holds, with what each frame takes beside its payload: what is in the ledger, if it is counted."""
        return self.held_bytes + FRAME_OVERHEAD_BYTES * SendQueue.__len__(self)

    @property
    def half_full(self) -> bool:
        """Whether more than half of one of the bounds is used."""
        return 2 * len(self) > self._limits.max_messages or 2 * self.held_bytes > self._limits.max_bytes

    @property
    def _at_bounds(self) -> bool:
        """Whether one of the bounds is reached."""
        messages, size = self._bounds
        return len(self) >= messages or self.held_bytes >= size

    @property
    def _bounds(self) -> tuple[int, int]:
        limits, extra = self._limits, self._extra
        if extra is None:
            return limits.max_messages, limits.max_bytes
        return limits.max_messages + extra[0], limits.max_bytes + extra[1]

    def _fits(self, size: int) -> bool:
        """Whether a message of `size` bytes fits. Any message fits into an empty outbox."""
        waiting = len(self)
        if not waiting:
            return True
        messages, held = self._bounds
        return waiting < messages and self.held_bytes + size <= held

    def _is_calm(self, size: int) -> bool:
        """Whether no more than half is used with a message of `size` bytes."""
        limits, waiting = self._limits, len(self)
        return not waiting or (waiting < limits.calm_messages and self.held_bytes + size <= limits.calm_bytes)

    def _line_up(self) -> None:
        """Make a list of the frame that waits alone."""
        if self._alone is not None:
            self._queue = [self._alone]
            self._alone = None

    def _count(self) -> None:
        """What waits, and what comes, does so for longer than a turn: count it, until `_counted` is taken back."""
        if self._counted:
            return
        self._line_up()
        self._counted = True
        for frame in self._queue[self._head :]:
            self._limits.ledger.hold(frame)
        self._is_held()

    def _is_held(self) -> None:
        """What waits is counted: nothing else may be held for the client."""

    def _append(self, frame: EncodedMessage) -> None:
        self._line_up()
        if self._counted:
            self._limits.ledger.hold(frame)
            self._is_held()
        if frame.key is not None:
            keyed = self._keyed = {} if self._keyed is None else self._keyed
            if len(keyed) > 2 * self._limits.max_messages:  # most of them are keys of frames that are long sent
                first = self._cut + self._head
                keyed = self._keyed = {key: place for key, place in keyed.items() if place >= first}
            keyed[frame.key] = self._cut + len(self._queue)
        if self._queue:
            self._queue.append(frame)
        else:
            self._queue = [frame]
        self.held_bytes += frame.size

    def _coalesce(self, frame: EncodedMessage) -> bool:
        """Put a frame in the place of one with its key; `False` if none waits, or there is no room for what is more."""
        if self._keyed is None:
            return False
        self._line_up()
        place = self._keyed.get(frame.key, -1) - self._cut
        if place < self._head or not self._queue:
            return False
        more = frame.size - self._queue[place].size
        if more > 0 and len(self) > 1 and self.held_bytes + more > self._limits.max_bytes:
            return False
        if self._counted:
            self._limits.ledger.release(self._queue[place])
            self._limits.ledger.hold(frame)
        self._queue[place] = frame
        self.held_bytes += more
        return True

    def _pop(self) -> EncodedMessage:
        """Take out the first frame."""
        if self._alone is not None:
            frame = self._alone
            self._empty()
            return frame
        queue, head = self._queue, self._head
        frame = queue[head]
        if head + 1 == len(queue):
            self._empty()
            return frame
        queue[head] = _REMOVED
        if self._counted:
            self._limits.ledger.release(frame)
        self._head = head + 1
        self.held_bytes -= frame.size
        if head > _MAX_DEAD and 2 * head > len(queue):
            del queue[: self._head]
            self._cut += self._head
            self._head = 0
        return frame

    def _pop_up_to(self, max_bytes: int) -> Sequence[EncodedMessage]:
        """Take out frames until `max_bytes` are reached; at least one."""
        self._line_up()
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
                self._limits.ledger.release(frame)
        self._alone = None
        self._queue = NOTHING
        self._head = self._cut = self.held_bytes = 0
        self._keyed = self._extra = None


_REMOVED: Final = EncodedMessage("")
"""Stands where a frame was taken out, so that the frame itself is let go."""
