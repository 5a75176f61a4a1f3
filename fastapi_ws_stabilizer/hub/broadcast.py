"""Broadcasts: encode a message once and queue it for many recipients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.errors import BroadcastFailedError
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.queueing import EnqueueResult, SendQueueLike, yield_to_writers
from fastapi_ws_stabilizer.scheduling import FlushScheduler, LoopBudget
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage


@dataclass
class BroadcastResult:
    """Counts of one broadcast.

    `total` is the sum of `succeeded`, `failed`, `skipped` and the recipients for which `drop_newest` dropped the
    message.

    Attributes:
        total: Recipients of the broadcast, without the excluded ones.
        succeeded: Recipients for which the message was queued, including detached sessions, which get it when they
            resume. It does not say whether the client received the message.
        failed: Recipients for which the message could not be queued, because they were closed or too slow.
        errors: Client id and cause of each failure.
        dropped: Messages that the slow consumer policy dropped: older ones to make room, or this one if there was no
            room.
        skipped: Detached recipients that never get the message: plain clients, and all of them for a volatile message.
        slow: Slow recipients: more than half of the outbox is used and the client does not read, or the outbox
            overflowed.
    """

    total: int = 0
    succeeded: int = 0
    failed: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    dropped: int = 0
    slow: int = 0
    skipped: int = 0

    def raise_for_failure(self) -> BroadcastResult:
        """Raise if there were recipients but no message was queued; else return this result.

        Raises:
            BroadcastFailedError: All recipients were too slow or closed.
        """
        if self.total and self.failed == self.total:
            raise BroadcastFailedError(self.total)
        return self


class Broadcaster:
    """Queue of broadcasts that offers each frame to the outboxes of its recipients.

    All clients get broadcasts in the same order. A broadcast that yields to the event loop before its end delays the
    broadcasts after it, but nothing else.
    """

    def __init__(self, scheduler: FlushScheduler, counters: Counters) -> None:
        self._scheduler = scheduler
        self._counters = counters
        self._order_lock = asyncio.Lock()

    async def send(
        self, frame: EncodedMessage, select: Callable[[], tuple[Iterable[Sequence[SendQueueLike]], Collection[str]]]
    ) -> BroadcastResult:
        """Queue one frame in all outboxes of all groups.

        It waits for no client. It yields to the event loop between two groups if it has held the loop for long, and at
        the end if outboxes of reading clients fill up. So the writers can work even if the caller sends in a loop
        without a pause.

        Cancelling a broadcast that has begun loses nothing, because the remaining groups are queued at once. A
        broadcast that is still waiting for an earlier one is not sent.

        Args:
            frame: The frame to send.
            select: Function that is called when earlier broadcasts are done. It returns the outboxes, in groups that
                are small enough to handle without a pause, and the connection ids to exclude.
        """
        result = BroadcastResult()
        backpressured: list[SendQueueLike] = []
        async with self._order_lock:
            self._counters.broadcasts += 1
            groups, excluded = select()
            loop_budget = LoopBudget()
            rest = iter(groups)
            for group in rest:
                self._queue(frame, group, excluded, result, backpressured)
                if loop_budget.exceeded():
                    try:
                        await loop_budget.yield_to_loop()
                    except asyncio.CancelledError:
                        for remaining in rest:
                            self._queue(frame, remaining, excluded, result, backpressured)
                        raise
        if backpressured:
            await yield_to_writers(backpressured)
        elif self._scheduler.exceeded():  # the budget can also be exceeded if no client was reached
            await asyncio.sleep(0)
        return result

    def _queue(
        self,
        frame: EncodedMessage,
        group: Sequence[SendQueueLike],
        excluded: Collection[str],
        result: BroadcastResult,
        backpressured: list[SendQueueLike],
    ) -> None:
        """Queue a frame for one group.

        Hot path: one call for each recipient, and nothing else for most of them.
        """
        if excluded:
            group = [outbox for outbox in group if outbox.owner.connection_id not in excluded]
        dropped_before = self._counters.messages_dropped
        queued = EnqueueResult.QUEUED
        unusual = [(outbox, enqueued) for outbox in group if (enqueued := outbox.offer(frame)) is not queued]
        result.total += len(group)
        result.succeeded += len(group)
        if not unusual:
            return
        for outbox, enqueued in unusual:
            if enqueued is EnqueueResult.BACKPRESSURE:
                backpressured.append(outbox)
                continue
            owner = outbox.owner
            close_info = owner.close_info
            if enqueued is EnqueueResult.CLOSED:
                result.succeeded -= 1
                result.failed += 1
                if close_info is not None and close_info.cause is DisconnectReason.SLOW_CONSUMER:
                    result.slow += 1
                result.errors.append((owner.client_id, close_info.cause.value if close_info else "not open"))
            elif enqueued is EnqueueResult.SKIPPED:
                result.succeeded -= 1
                result.skipped += 1
            else:
                if enqueued is EnqueueResult.DROPPED:
                    result.succeeded -= 1
                result.slow += 1
        result.dropped += self._counters.messages_dropped - dropped_before
