"""Outbox of a session: numbers each message, and stores it until the client acknowledges it.

It also queues the message in the outbox of the current connection, if there is one. So replay and live messages take
one path. A new connection begins with the unacknowledged part of the buffer, and later messages are queued behind it in
order.

A message with a `coalesce_key` replaces an older one with its key that was not sent, and takes its number. So the
client sees consecutive numbers.
"""

from __future__ import annotations

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
        if target is None or frame.takes_slow_path or not target.try_enqueue(frame):
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
        if target is not None and not enveloped.takes_slow_path and target.try_send(enveloped):
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
        if frame.key is not None:
            return self._offer_keyed(frame)
        return self._offer_numbered(frame)

    def _offer_numbered(self, frame: EncodedMessage) -> EnqueueResult:
        """Number and store a message under a new number, and queue it if there is a connection."""
        target = self.target
        enqueued = EnqueueResult.QUEUED if target is None else target.offer_new(frame)
        if self.is_closed:  # the full outbox ended the session, and its buffer is closed
            self._counters.messages_discarded += 1
            return EnqueueResult.CLOSED
        self._append(frame)
        if enqueued is not EnqueueResult.CLOSED or target is None:
            return enqueued
        # It is in the buffer, and the client gets it when it resumes.
        close_info = target.owner.close_info
        slow = close_info is not None and close_info.cause is DisconnectReason.SLOW_CONSUMER
        return EnqueueResult.SLOW if slow else EnqueueResult.QUEUED

    def _offer_keyed(self, frame: EncodedMessage) -> EnqueueResult:
        """Offer a message that may replace an older one with its key, and one whose sender waits for room."""
        target = self.target
        waiter = None if target is None else target.take_waiter(frame.key)
        if self._replace(frame) is None:
            enqueued = self._offer_numbered(frame)
        elif target is not None and target.half_full and target.is_delayed:
            enqueued = EnqueueResult.SLOW
        else:
            enqueued = EnqueueResult.QUEUED
        if waiter is not None:
            self._counters.messages_coalesced += 1
            waiter.settle(self.buffer.seq_of(frame.key))
        return enqueued

    def _replace(self, frame: EncodedMessage) -> int | None:
        """Let a message replace an older one with its key, and return its number; `None` if there is none.

        The older one was not sent: it is still queued, or was stored since the last connection was lost.
        """
        seq, target = self.buffer.seq_of(frame.key), self.target
        if seq is None:
            return None
        if target is None:
            self._counters.messages_coalesced += 1
        elif target.replace_queued(frame):
            target.connection.used = True
        else:
            return None
        self.buffer.replace(seq, frame)
        return seq

    def _append(self, frame: EncodedMessage) -> int:
        """Number and store a message, and return its number."""
        return self.buffer.append(frame) if frame.key is None else self.buffer.append_keyed(frame)

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
        if frame.takes_slow_path or target is not self.target or not target.try_send(frame):
            return False
        self.buffer.append(frame)
        return True

    async def put_wait(self, target: Outbox, frame: EncodedMessage) -> int | None:
        """Number, store and queue a message in one outbox as soon as there is room.

        Cancelling while it waits discards the message, unless it has replaced that of another sender.

        Args:
            target: The outbox of a connection of the session.
            frame: The message.

        Returns:
            The number of the message, or of the newer one that has replaced it; 0 for a volatile one. `None` if the
            outbox was closed before.
        """
        frame = frame.enveloped or to_v1(frame)
        if frame.volatile:
            target.connection.used = True
            return await target.put_wait(frame)
        if frame.key is not None and target is self.target and not target.has_waiter(frame.key):
            seq = self._replace(frame)
            if seq is not None:
                return seq
        return await target.put_wait(frame, self._number)

    def _number(self, queued: EncodedMessage) -> int:
        """Number and store a message that was just queued, and return its number."""
        return self.buffer.head if self.is_closed else self._append(queued)

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
