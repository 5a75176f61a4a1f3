"""Sending one message to many: encode once, queue for each, wait for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.errors import BroadcastFailedError
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.hub.recipient import Recipient
from fastapi_ws_stabilizer.queueing import EnqueueResult, SendQueueLike, yield_to_writers
from fastapi_ws_stabilizer.scheduling import FlushScheduler, LoopBudget
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage


@dataclass
class BroadcastResult:
    """What became of a broadcast: `total` is `succeeded`, `failed`, `missed`, and what `drop_newest` left out.

    Attributes:
        total: Connections that it was meant for; excluded ones are not counted.
        succeeded: Connections that it was queued for, and sessions of clients that are away and get it when they come
            back. Whether they receive it, only they can tell.
        failed: Connections that it could not be queued for: they were over, or ended because they were too slow.
        errors: Client id and reason of each failure.
        dropped: Messages that the policy for slow clients threw away to make room, or this one where it found none.
        missed: Clients that are away and do not get it later: plain ones, and all where the message is volatile.
        slow: Connections that lag: more than half of their outbox is used and they take nothing, or it overflowed.
    """

    total: int = 0
    succeeded: int = 0
    failed: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    dropped: int = 0
    slow: int = 0
    skipped: int = 0

    def raise_for_failure(self) -> BroadcastResult:
        """Raise if there were recipients and the message could be queued for none of them; else return this result.

        Raises:
            BroadcastFailedError: All recipients were too slow, or had ended.
        """
        if self.total and self.failed == self.total:
            raise BroadcastFailedError(self.total)
        return self


class Broadcaster:
    """Hands frames to the outboxes of many connections.

    All clients get broadcasts in the same order: one that has to give way to the event loop half-way holds up those
    that come after it, and only those.
    """

    def __init__(self, scheduler: FlushScheduler, counters: Counters) -> None:
        self._scheduler = scheduler
        self._counters = counters
        self._one_after_the_other = asyncio.Lock()

    async def send(
        self, frame: EncodedMessage, audience: Callable[[], tuple[Iterable[Sequence[SendQueueLike]], Collection[str]]]
    ) -> BroadcastResult:
        """Queue one frame in all outboxes of all groups.

        No client is waited for. The event loop gets a turn between two groups when it has been held for long, and
        when outboxes of clients that read fill up, so that their writers can work even if the caller sends in a loop
        without any pause. Cancelling one that has begun loses nothing: what is not queued yet is queued at once. One
        that still waits for a broadcast before it is left out.

        Args:
            frame: What to send.
            audience: Says, when its turn has come, whom to send it to, in parts of a size that may be handled at one
                go, and the connection ids that do not get it.
        """
        result = BroadcastResult()
        pressed: list[SendQueueLike] = []
        async with self._one_after_the_other:
            self._counters.broadcasts += 1
            groups, excluded = audience()
            hold = LoopBudget()
            rest = iter(groups)
            for group in rest:
                self._queue(frame, group, excluded, result, pressed)
                if hold.exceeded():
                    try:
                        await hold.yield_to_loop()
                    except asyncio.CancelledError:
                        for late in rest:
                            self._queue(frame, late, excluded, result, pressed)
                        raise
        if pressed:
            await yield_to_writers(pressed)
        elif self._scheduler.exceeded():  # also where it has reached no client
            await asyncio.sleep(0)
        return result

    def _queue(
        self,
        frame: EncodedMessage,
        group: Sequence[SendQueueLike],
        excluded: Collection[str],
        result: BroadcastResult,
        pressed: list[SendQueueLike],
    ) -> None:
        """Queue a frame for one group. Hot path: one call for each recipient, and nothing else for most of them."""
        if excluded:
            group = [outbox for outbox in group if outbox.owner.connection_id not in excluded]
        dropped_before = self._counters.messages_dropped
        queued = EnqueueResult.QUEUED
        unusual = [(outbox, offered) for outbox in group if (offered := outbox.offer(frame)) is not queued]
        result.total += len(group)
        result.succeeded += len(group)
        if not unusual:
            return
        for outbox, offered in unusual:
            if offered is EnqueueResult.BACKPRESSURE:
                pressed.append(outbox)
                continue
            member: Recipient = outbox.owner
            how = member.close_info
            if offered is EnqueueResult.CLOSED:
                result.succeeded -= 1
                result.failed += 1
                if how is not None and how.cause is DisconnectReason.SLOW_CONSUMER:
                    result.slow += 1
                result.errors.append((member.client_id, how.cause.value if how else "not open"))
            elif offered is EnqueueResult.SKIPPED:
                result.succeeded -= 1
                result.skipped += 1
            else:
                if offered is EnqueueResult.DROPPED:
                    result.succeeded -= 1
                result.slow += 1
        result.dropped += self._counters.messages_dropped - dropped_before
