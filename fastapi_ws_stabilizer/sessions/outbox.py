"""Outbox of a session: numbers each message, and stores it until the client acknowledges it.

It also queues the message in the outbox of the current connection, if there is one. So replay and live messages take
one path. A new connection begins with the unacknowledged part of the buffer, and later messages are queued behind it in
order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.outbox import Outbox
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.queueing import EndedOwner, EnqueueResult, QueueOwner
from fastapi_ws_stabilizer.sessions.replay_buffer import ReplayBuffer, ReplayLimits
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.envelope import to_v1

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.sessions.session import Session


class SessionOutbox:
    """Send queue of a session, with or without a connection.

    Args:
        session: The session.
        limits: Limits of the replay buffer.
        counters: Counters of the manager.

    Attributes:
        owner: The session, or facts about it after its end.
        shard_index: Position in the session's shard, for the registry.
        buffer: Messages that the client has not acknowledged.
        target: Outbox of the current connection; `None` while the session is detached.
        is_closed: Whether the session has ended, so that no message is accepted.
    """

    __slots__ = ("_counters", "buffer", "is_closed", "owner", "shard_index", "target")

    def __init__(self, session: Session, limits: ReplayLimits, counters: Counters) -> None:
        self.owner: QueueOwner = session
        self.shard_index = 0
        self.buffer = ReplayBuffer(limits, session)
        self.target: Outbox | None = None
        self.is_closed = False
        self._counters = counters

    def try_enqueue(self, frame: EncodedMessage) -> bool:
        """Number, store and queue a message on the fast path.

        `False` means that nothing was queued, and `offer` has to decide. Hot path, like `try_enqueue` of an outbox.
        """
        frame = frame.enveloped or to_v1(frame)
        target = self.target
        if target is None or frame.volatile or not target.try_enqueue(frame):
            return False
        self.buffer.append(frame)
        return True

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Number and store a message, and queue it if there is a connection.

        The outbox comes before the buffer, because making room may let waiting senders in, and both must have the same
        order.
        """
        if self.try_enqueue(frame):
            return EnqueueResult.QUEUED
        return self._offer_slow_path(frame.enveloped or to_v1(frame))

    def offer_now(self, frame: EncodedMessage) -> EnqueueResult:
        """Offer a frame and send it at once, as far as the network accepts it.

        The caller may compute for long afterwards without yielding to the event loop.
        """
        target = self.target
        enveloped = frame.enveloped or to_v1(frame)
        if target is not None and not enveloped.volatile and target.try_send(enveloped):
            self.buffer.append(enveloped)
            return EnqueueResult.QUEUED
        enqueued = self.offer(frame)
        self.flush()
        return enqueued

    def _offer_slow_path(self, frame: EncodedMessage) -> EnqueueResult:
        if self.is_closed:
            return EnqueueResult.CLOSED
        if frame.volatile:
            return self._offer_volatile(frame)
        target = self.target
        enqueued = EnqueueResult.QUEUED if target is None else target.offer(frame)
        if self.is_closed:  # the full outbox ended the session, and its buffer is closed
            self._counters.messages_discarded += 1
            return EnqueueResult.CLOSED
        self.buffer.append(frame)
        if enqueued is not EnqueueResult.CLOSED or target is None:
            return enqueued
        # It is in the buffer, and the client gets it when it resumes.
        close_info = target.owner.close_info
        slow = close_info is not None and close_info.cause is DisconnectReason.SLOW_CONSUMER
        return EnqueueResult.SLOW if slow else EnqueueResult.QUEUED

    def _offer_volatile(self, frame: EncodedMessage) -> EnqueueResult:
        if self.target is None:
            return EnqueueResult.SKIPPED
        self.target.connection.used = True
        if self.target.put(frame):
            return EnqueueResult.QUEUED
        self._counters.messages_dropped += 1
        return EnqueueResult.DROPPED

    def try_send(self, target: Outbox, frame: EncodedMessage) -> bool:
        """Number, store and send a message through one connection, on the fast path.

        `False` means that nothing was queued, and the slow path has to decide. Hot path.
        """
        frame = frame.enveloped or to_v1(frame)
        if frame.volatile or target is not self.target or not target.try_send(frame):
            return False
        self.buffer.append(frame)
        return True

    async def put_wait(
        self, target: Outbox, frame: EncodedMessage, numbered: Callable[[int], object] | None = None
    ) -> bool:
        """Number, store and queue a message in one outbox as soon as there is room.

        Cancelling while it waits discards the message.

        Args:
            target: The outbox of a connection of the session.
            frame: The message.
            numbered: Called with the message's number at the moment it is queued.

        Returns:
            `False` if the outbox was closed before.
        """
        frame = frame.enveloped or to_v1(frame)
        if frame.volatile:
            target.connection.used = True
            return await target.put_wait(frame)

        def record(queued: EncodedMessage) -> None:
            if self.is_closed:
                return
            seq = self.buffer.append(queued)
            if numbered is not None:
                numbered(seq)

        return await target.put_wait(frame, record)

    def flush(self) -> None:
        """Send what is queued now, if there is a connection."""
        if self.target is not None:
            self.target.flush()

    def has_sendable_frames(self) -> bool:
        """Whether messages wait that the network may accept in the next event loop iteration."""
        return self.target is not None and self.target.has_sendable_frames()

    def is_backpressured(self) -> bool:
        """Whether more than half of the connection's outbox is used while the client seems to read."""
        return self.target is not None and self.target.is_backpressured()

    @property
    def counted_bytes(self) -> int:
        """Bytes of the stored messages with their overhead. A queued message is in the buffer too, but counts once."""
        queued = 0 if self.target is None else self.target.counted_bytes
        return max(self.buffer.counted_bytes, queued)

    def close(self) -> int:
        """Accept no more messages, and drop the stored ones. Return their number.

        Reference counting can free the session afterwards, because nothing here refers to it any more.
        """
        self.is_closed = True
        self.target = None
        owner = self.owner
        self.owner = EndedOwner(owner.connection_id, owner.client_id, owner.close_info)
        return self.buffer.close()
