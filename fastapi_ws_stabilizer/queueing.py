"""Recipients of messages and their queues as senders see them, and waiting while a queue is full."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.memory.budget import Evictable
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


class QueueOwner(Protocol):
    """Owner of a queue, as a broadcast reports it."""

    @property
    def connection_id(self) -> str:
        """Its id, by which a broadcast excludes it."""

    @property
    def client_id(self) -> str:
        """Id of its client."""

    @property
    def close_info(self) -> CloseInfo | None:
        """Close info; `None` while it is open."""


class EndedOwner(NamedTuple):
    """Owner of a queue after its end. A broadcast that began before may still ask for it."""

    connection_id: str
    client_id: str
    close_info: CloseInfo | None


class SendQueueLike(Protocol):
    """Interface of a queue of messages waiting to be sent to one client. No method waits.

    Attributes:
        shard_index: Position of the queue in its shard, for the registry.
    """

    shard_index: int

    @property
    def owner(self) -> QueueOwner:
        """The `Recipient` that the queue belongs to."""

    def try_enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame on the fast path. Return `False`, with nothing queued, if `offer` must decide."""

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


class Recipient(QueueOwner, Protocol):
    """Recipient of messages and member of rooms: a connection, a session or a detached state. No method waits."""

    @property
    def outbox(self) -> SendQueueLike:
        """Queue with the messages that wait to be sent."""

    @property
    def socket(self) -> Any:
        """Object that represents it in user code."""

    @property
    def account(self) -> Evictable:
        """Holder of its memory, for the memory budget."""

    def close(
        self,
        cause: DisconnectReason,
        *,
        code: int | None = None,
        reason: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Begin to close; `False` if it has begun already."""


async def yield_to_writers(backpressured: Sequence[SendQueueLike]) -> None:
    """Yield to the event loop, at most `MAX_TURNS` times, while one of these outboxes is backpressured."""
    if not backpressured:
        return
    for number in range(MAX_TURNS):
        await asyncio.sleep(0 if number < MAX_TURNS // 2 else 0.001)
        if not any(outbox.is_backpressured() for outbox in backpressured):
            break
