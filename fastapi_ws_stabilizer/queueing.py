"""The send queues of clients as senders see them: the enqueue result, and waiting while a queue is full."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, Protocol

from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

MAX_TURNS: Final = 8
"""Maximum times that a sender yields to writers. Some servers need several loop iterations for one send."""


class EnqueueResult(Enum):
    """Result of offering a frame to an outbox."""

    QUEUED = "queued"
    """The frame is queued."""
    BACKPRESSURE = "backpressure"
    """The frame is queued. More than half of the outbox is used, and the client seems to read."""
    SLOW = "slow"
    """The frame is queued. More than half of the outbox is used or older messages were dropped, and the client lags."""
    DROPPED = "dropped"
    """The frame was dropped because of `outbox_overflow="drop_newest"`."""
    SKIPPED = "skipped"
    """The frame was skipped, because it is volatile and its client is detached."""
    CLOSED = "closed"
    """The frame was not queued. The connection is closed, or its full outbox has just closed it."""


class SendQueueLike(Protocol):
    """Interface of a queue of messages waiting to be sent to one client. No method waits.

    Attributes:
        shard_index: Position of the queue in its shard, for the registry.
    """

    shard_index: int

    @property
    def owner(self) -> Any:
        """The `Recipient` that the queue belongs to."""

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame, within the limits and the policy for slow clients."""

    def offer_now(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame like `offer`, and write it now instead of at the end of the loop iteration, if possible."""

    def flush(self) -> None:
        """Write queued frames now instead of at the end of the loop iteration, as far as the network accepts them."""

    def has_sendable_frames(self) -> bool:
        """Return whether a frame waits that the network may accept in the next loop iteration."""

    def is_backpressured(self) -> bool:
        """Return whether more than half of the outbox is used and the client seems to read."""


async def yield_to_writers(backpressured: Sequence[SendQueueLike]) -> None:
    """Yield to the event loop, at most `MAX_TURNS` times, while one of these outboxes is backpressured."""
    if not backpressured:
        return
    for number in range(MAX_TURNS):
        await asyncio.sleep(0 if number < MAX_TURNS // 2 else 0.001)
        if not any(outbox.is_backpressured() for outbox in backpressured):
            break
