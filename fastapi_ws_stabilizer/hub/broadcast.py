"""Messages to many recipients or to one client: each is encoded once and queued in the outbox of each recipient."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.errors import BroadcastFailedError
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.hub.history import RoomHistory
from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from fastapi_ws_stabilizer.hub.rooms import RoomMembership
from fastapi_ws_stabilizer.queueing import EnqueueResult, Recipient, SendQueueLike, yield_to_writers
from fastapi_ws_stabilizer.scheduling import FlushScheduler, LoopBudget
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.envelope import ALWAYS_FITS, to_v1

SMALL_ROOM: Final = 64
"""Maximum number of recipients for which a room is not divided into groups."""

_NOT_QUEUED: Final = (EnqueueResult.DROPPED, EnqueueResult.SKIPPED, EnqueueResult.CLOSED)


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
    """Sender of messages to all recipients, to rooms, and to single clients of one hub.

    All clients get broadcasts in the same order. A broadcast that yields to the event loop before its end delays the
    broadcasts after it, but nothing else.

    Args:
        num_shards: Maximum number of groups of a large room.
        scheduler: Flush scheduler, which limits how long the event loop is held.
        counters: Counters of broadcasts and dropped messages.
        registry: Recipients of broadcasts to all.
        rooms: Members of the rooms.
        history: Last messages of the rooms.
        detached_of: Returns the detached sessions of a client and the detached states of its plain connections.
    """

    def __init__(
        self,
        num_shards: int,
        scheduler: FlushScheduler,
        counters: Counters,
        registry: ConnectionRegistry,
        rooms: RoomMembership[Recipient],
        history: RoomHistory,
        detached_of: Callable[[str], Sequence[Any]],
    ) -> None:
        self._num_shards = num_shards
        self._scheduler = scheduler
        self._counters = counters
        self._registry = registry
        self._rooms = rooms
        self._history = history
        self._detached_of = detached_of
        self._order_lock = asyncio.Lock()

    async def broadcast(
        self,
        frame: EncodedMessage,
        rooms: str | Iterable[str] | None = None,
        exclude: Any = None,
        *,
        exclude_client: str | None = None,
        history: bool = True,
    ) -> BroadcastResult:
        """Queue a frame for all recipients or for the members of some rooms, once for each.

        It waits for no client. It yields to the event loop between two groups if it has held the loop for long, and at
        the end if outboxes of reading clients fill up. So the writers can work even if the caller sends in a loop
        without a pause.

        Cancelling a broadcast that has begun loses nothing, because the remaining groups are queued at once. A
        broadcast that is still waiting for an earlier one is not sent.

        Args:
            frame: The frame to send.
            rooms: Name or names of rooms; all recipients if omitted.
            exclude: A client id, a socket, or several of them, that do not get the frame.
            exclude_client: A further client id.
            history: Whether the rooms store the frame in their history.

        Raises:
            TypeError: `exclude` is none of these.
            MessageEncodeError: The frame is larger than some clients accept.
            WrongLoopError: This is not the event loop of the hub.
        """
        self._scheduler.check_loop()
        if exclude is not None and not isinstance(exclude, str) and isinstance(exclude, Iterable):
            exclude = tuple(exclude)  # it is read when earlier broadcasts are done, and twice
        if exclude_client is not None:
            exclude = exclude_client if exclude is None else (exclude_client, exclude)
        if rooms is not None:
            if not isinstance(rooms, str):
                rooms = tuple(rooms)
            frame.room = rooms if isinstance(rooms, str) else rooms[0] if len(rooms) == 1 else None
        _check_size(frame)
        result = BroadcastResult()
        backpressured: list[SendQueueLike] = []
        async with self._order_lock:
            self._counters.broadcasts += 1
            excluded = frozenset() if exclude is None else self._recipient_ids(exclude)
            if rooms is not None and history and self._history.enabled:
                hidden = excluded | _client_ids_in(exclude)
                for room in (rooms,) if isinstance(rooms, str) else rooms:
                    self._history.add(room, frame, hidden)
            loop_budget = LoopBudget()
            groups = self._registry.outboxes_by_shard() if rooms is None else self._groups_of(rooms)
            for group in groups:
                self._queue(frame, group, excluded, result, backpressured)
                if loop_budget.exceeded():
                    try:
                        await loop_budget.yield_to_loop()
                    except asyncio.CancelledError:
                        for remaining in groups:
                            self._queue(frame, remaining, excluded, result, backpressured)
                        raise
        if backpressured:
            await yield_to_writers(backpressured)
        elif self._scheduler.exceeded():  # the budget can also be exceeded if no client was reached
            await asyncio.sleep(0)
        return result

    async def send_to_client(self, client_id: str, frame: EncodedMessage) -> bool:
        """Queue a frame for all connections and sessions of a client; return whether at least one accepted it.

        Raises:
            MessageEncodeError: The frame is larger than some clients accept.
            WrongLoopError: This is not the event loop of the hub.
        """
        self._scheduler.check_loop()
        _check_size(frame)
        outboxes: list[SendQueueLike] = [one.recipient.outbox for one in self._registry.of_client(client_id)]
        outboxes += [session.outbox for session in self._detached_of(client_id)]
        enqueued = [outbox.offer_now(frame) for outbox in outboxes]
        if EnqueueResult.BACKPRESSURE in enqueued:
            await yield_to_writers([outbox for outbox in outboxes if outbox.is_backpressured()])
        elif self._scheduler.exceeded() or any(outbox.has_sendable_frames() for outbox in outboxes):
            await asyncio.sleep(0)
        return any(result not in _NOT_QUEUED for result in enqueued)

    # ── recipients ──

    def _groups_of(self, rooms: str | Iterable[str]) -> Iterator[Sequence[SendQueueLike]]:
        """Yield the outboxes of the members of some rooms, in at most as many groups as there are shards."""
        members = tuple(self._rooms.recipients(rooms))
        size = max(SMALL_ROOM, -(-len(members) // self._num_shards))
        for start in range(0, len(members), size):
            yield [recipient.outbox for recipient in members[start : start + size]]

    def _recipient_ids(self, targets: Any) -> frozenset[str]:
        """Return the recipient ids of a client id, a socket, or several of them."""
        if isinstance(targets, str):
            here = (connection.recipient.connection_id for connection in self._registry.of_client(targets))
            return frozenset((*here, *(session.connection_id for session in self._detached_of(targets))))
        connection_id = getattr(targets, "recipient_id", None)
        if isinstance(connection_id, str):
            return frozenset((connection_id,))
        if isinstance(targets, (bytes, bytearray)) or not isinstance(targets, Iterable):
            raise TypeError(f"exclude takes client ids and sockets, not a {type(targets).__name__}")
        return frozenset().union(*map(self._recipient_ids, targets))

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
        slow_path = [outbox for outbox in group if not outbox.try_enqueue(frame)]
        result.total += len(group)
        result.succeeded += len(group)
        if not slow_path:
            return
        dropped_before = self._counters.messages_dropped
        for outbox in slow_path:
            enqueued = outbox.offer(frame)
            if enqueued is EnqueueResult.QUEUED:
                continue
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


def _check_size(frame: EncodedMessage) -> None:
    """Raise if a message is too large for some clients, before any client gets it.

    Raises:
        MessageEncodeError: The message is too large.
    """
    if frame.size > ALWAYS_FITS:
        to_v1(frame)


def _client_ids_in(targets: Any) -> frozenset[str]:
    """Return the client ids in an `exclude` argument."""
    if isinstance(targets, str):
        return frozenset((targets,))
    return frozenset().union(*map(_client_ids_in, targets)) if isinstance(targets, Iterable) else frozenset()
