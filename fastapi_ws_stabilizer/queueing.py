"""What senders see of the queues in front of clients: what became of a message, and how to wait while they are full."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, Protocol

from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

MAX_TURNS: Final = 8
"""Turns of the event loop that a sender gives to writers. Some servers need several for one send."""


class EnqueueResult(Enum):
    """What became of a frame that was offered to an outbox."""

    QUEUED = "queued"
    """It will be sent."""
    BACKPRESSURE = "pressed"
    """It will be sent; more than half of the outbox is used, and its client seems to read."""
    SLOW = "slow"
    """It will be sent; more than half of the outbox is used, or older messages had to go, and its client lags."""
    DROPPED = "dropped"
    """It was left out, as `outbox_overflow="drop_newest"` says."""
    SKIPPED = "missed"
    """It was left out: its client is away, and it is worth nothing later."""
    CLOSED = "refused"
    """The connection is over, or has just ended because its outbox was full."""


class SendQueueLike(Protocol):
    """Where what is meant for a connection waits to be sent. Nothing here waits.

    Attributes:
        place: Where it stands in its shard, for the registry.
    """

    shard_index: int

    @property
    def owner(self) -> Any:
        """The `Recipient` that it belongs to."""

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame, as far as the bounds and the policy for slow clients allow."""

    def offer_now(self, frame: EncodedMessage) -> EnqueueResult:
        """As `offer`; and it is sent now, and not at the end of the turn, as far as the network takes it."""

    def flush(self) -> None:
        """Send what is queued now, and not at the end of the turn, as far as the network takes it."""

    def lingers(self) -> bool:
        """Whether something waits that the network may take as soon as the event loop turns."""

    def is_backpressured(self) -> bool:
        """Whether more than half of it is used, and its client seems to read."""


async def yield_to_writers(pressed: Sequence[SendQueueLike]) -> None:
    """Give the event loop some turns, `MAX_TURNS` at most, while one of these outboxes is under pressure."""
    if not pressed:
        return
    for turn in range(MAX_TURNS):
        await asyncio.sleep(0 if turn < MAX_TURNS // 2 else 0.001)
        if not any(outbox.is_backpressured() for outbox in pressed):
            break
