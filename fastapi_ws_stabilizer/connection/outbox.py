"""Bounded, ordered queue of messages to one client. Broadcasts never wait for it.

Subclasses send the messages: `asgi_outbox` awaits the server's `send`, `direct_outbox` writes to its transport.
"""

from __future__ import annotations

import abc
import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.config import OutboxOverflow
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits, SendQueue
from fastapi_ws_stabilizer.connection.stall_watch import StallWatch
from fastapi_ws_stabilizer.memory.budget import FRAME_OVERHEAD_BYTES
from fastapi_ws_stabilizer.queueing import EndedOwner, EnqueueResult, QueueOwner
from fastapi_ws_stabilizer.scheduling import FlushScheduler
from fastapi_ws_stabilizer.tasks import LazyEvent
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection

MAX_CONTROL_FRAMES: Final = 16
"""Maximum number of waiting control frames. A pong has no use once the next one is queued."""


class SlowConsumer(str, Enum):
    """State of a slow consumer. Each is reported once until the client has caught up."""

    LAGGING = "lagging"
    """More than half of its outbox is used, and the network accepts nothing."""
    DROPPING = "dropping"
    """Messages to it are dropped, as `outbox_overflow` says."""
    DISCONNECTED = "disconnected"
    """Its outbox was full, and the server closes the connection with 4507."""


class PendingSend:
    """Message that waits for room in the outbox, with the senders that wait for it.

    Args:
        frame: The frame to send.
        number: Numbers the frame at the moment it is queued; `None` for a frame without a number.

    Attributes:
        frame: As above, or the newer frame with its key that has replaced it.
        number: As above.
        offered: Whether a frame whose sender does not wait has replaced it, so that no cancellation discards it.
    """

    __slots__ = ("_senders", "frame", "number", "offered")

    def __init__(self, frame: EncodedMessage, number: Callable[[EncodedMessage], int] | None) -> None:
        self.frame = frame
        self.number = number
        self.offered = False
        self._senders: dict[asyncio.Future[int | None], None] = {}  # a dict, because thousands may share one key

    def add_sender(self) -> asyncio.Future[int | None]:
        """Return a future for one more sender. It gets what `settle` is called with."""
        sender = asyncio.get_running_loop().create_future()
        self._senders[sender] = None
        return sender

    def remove_sender(self, sender: asyncio.Future[int | None]) -> None:
        """Remove the future of a cancelled sender."""
        self._senders.pop(sender, None)

    @property
    def is_abandoned(self) -> bool:
        """Whether no sender waits any more. One may be cancelled and not removed yet."""
        return all(sender.done() for sender in self._senders)

    def settle(self, seq: int | None) -> None:
        """Complete the senders' wait.

        Args:
            seq: Number of the frame, or of the newer one that has replaced it; 0 without numbers; `None` if no frame is
                queued.
        """
        for sender in self._senders:
            if not sender.done():
                sender.set_result(seq)


class Outbox(abc.ABC):
    """Bounded queue with many writers, flushed at the end of each event loop iteration.

    An idle outbox owns no task, no timer and no queue. It mostly holds one frame, which is sent in the next flush.
    `SendQueue` is created for the second frame, and `StallWatch` for the first send that blocks.

    Subclasses implement `_send_queued`, which sends what can be sent now and then the close frame.

    Attributes:
        connection: The connection, until its end.
        owner: The connection, or facts about it after its end.
        limits: Bounds, overflow policy and counters.
        shard_index: Position in the connection's shard, for the registry.
        used: Whether a message was queued since `used` was reset.
        fast: Whether nothing unusual is going on: the outbox is open, no frame waits for the client, no sender waits
            for room, and no control frame is queued. The hot paths test only this flag. Each change of one of its
            conditions calls `_update_fast_path`.
        dropped_messages: Number of messages that were dropped because the client is a slow consumer.
    """

    __slots__ = (
        "_broken",
        "_close",
        "_control",
        "_deflates",
        "_done",
        "_due",
        "_pending",
        "_queue",
        "_scheduler",
        "_shut",
        "_single",
        "_slow",
        "_stall",
        "_waiters",
        "connection",
        "dropped_messages",
        "fast",
        "limits",
        "owner",
        "shard_index",
        "used",
    )

    def __init__(self, connection: Connection, limits: OutboxLimits, scheduler: FlushScheduler, shard: int) -> None:
        self.connection = connection
        self.owner: QueueOwner = connection
        self.limits = limits
        self.shard_index = 0
        self.used = False
        self.fast = False
        self.dropped_messages = 0
        self._scheduler = scheduler
        self._pending = scheduler.pending(shard)
        self._single: EncodedMessage | None = None  # the only waiting frame; there is no queue then
        self._queue: SendQueue | None = None
        self._control: list[EncodedMessage] | None = None
        self._waiters: deque[PendingSend] | None = None
        self._stall: StallWatch | None = None
        self._slow: SlowConsumer | None = None
        self._shut = True
        self._broken = False  # whether the server has rejected a frame
        self._due = False  # whether a flush is scheduled or a send is blocked
        self._deflates = False
        self._close: tuple[int, str] | None = None
        self._done: LazyEvent | None = None  # created when code waits for it, or when it is set

    def open(self) -> None:
        """Accept messages from now on."""
        self._shut = False
        self._update_fast_path()

    def deflate_frames(self) -> None:
        """Send compressed v1 frames from now on, where compression saves enough."""
        self._deflates = True

    def _update_fast_path(self) -> None:
        """Set `fast`. Called after each change of one of these conditions."""
        self.fast = not (
            self._shut
            or self._broken
            or self._control
            or self._waiters
            or self._slow
            or (self._queue is not None and self._queue.counted)
        )

    # ── size ──

    def __len__(self) -> int:
        return self._message_count + len(self._control or ())

    @property
    def _message_count(self) -> int:
        """Number of waiting messages, without control frames."""
        return int(self._single is not None) if self._queue is None else len(self._queue)

    @property
    def held_bytes(self) -> int:
        """Bytes of the waiting messages."""
        if self._queue is not None:
            return self._queue.held_bytes
        return 0 if self._single is None else self._single.size

    @property
    def counted_bytes(self) -> int:
        """Bytes of the waiting messages that the memory budget counts, including their overhead.

        Messages that the server is about to take are not counted. See `_start_accounting`.
        """
        queue = self._queue
        return 0 if queue is None or not queue.counted else queue.held_bytes + FRAME_OVERHEAD_BYTES * len(queue)

    @property
    def half_full(self) -> bool:
        """Whether more than half of a bound is used."""
        return 2 * len(self) > self.limits.max_messages or 2 * self.held_bytes > self.limits.max_bytes

    @property
    def _any(self) -> bool:
        """Whether any frame is queued."""
        queue = self._queue
        return self._single is not None or (queue is not None and bool(queue.entries)) or bool(self._control)

    # ── enqueueing ──

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame without waiting. A full outbox applies `outbox_overflow`."""
        return EnqueueResult.QUEUED if self.try_enqueue(frame) else self._offer_slow_path(frame)

    def try_enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame on the fast path. Return `False`, with nothing queued, if the slow path must decide.

        Hot path: called for each recipient of each broadcast, and nearly all need only this method.
        """
        if not self.fast:
            return False
        queue = self._queue
        if queue is None and self._single is None:
            self._single = frame
        else:  # a burst
            if queue is None:
                queue = self._open_queue()
            entries, held, limits = queue.entries, queue.held_bytes + frame.size, self.limits
            if frame.key is not None or len(entries) >= limits.soft_messages or held > limits.soft_bytes:
                return False
            entries.append(frame)
            queue.held_bytes = held
        self.used = True
        if not self._due:
            self._due = True
            pending = self._pending
            if not pending:
                self._scheduler.mark_ready(pending)
            pending.append(self)
        return True

    def try_send(self, frame: EncodedMessage) -> bool:
        """Send a frame at once. Return `False`, with nothing queued, if frames wait or the slow path must decide.

        Messages from user code must not wait for the end of the loop iteration, because that code may compute for long.
        Hot path. If no flush is scheduled (`_due`), no frame waits.
        """
        if self._due or not self.fast:
            return False
        self._single = frame
        self.used = True
        self.on_flush_due()
        return True

    def offer_now(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame like `offer` and flush, because the caller may compute for long afterwards."""
        if self.try_send(frame):
            return EnqueueResult.QUEUED
        result = self.offer(frame)
        self.flush()
        return result

    def flush(self) -> None:
        """Send queued frames now instead of at the end of the loop iteration, unless sends are blocked."""
        if self._any and not self.blocked:
            self._send_queued()

    def has_sendable_frames(self) -> bool:
        """Return whether frames wait that the next loop iteration may send."""
        return self._any and not self.is_delayed

    def _offer_slow_path(self, frame: EncodedMessage) -> EnqueueResult:
        if self._shut:
            return EnqueueResult.CLOSED
        if frame.key is not None and self._replace_same_key(frame):
            return EnqueueResult.SLOW if self.half_full and self.is_delayed else EnqueueResult.QUEUED
        return self.offer_new(frame)

    def offer_new(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame like `offer`, but replace none of its key."""
        if self._shut:
            return EnqueueResult.CLOSED
        if not self._stays_below_soft_limit(frame.size) and not self.blocked:
            self._send_queued()  # the network may accept all frames at once
            if self._shut:
                return EnqueueResult.CLOSED
        if self._fits(frame.size):
            below_soft_limit = self._stays_below_soft_limit(frame.size)
            self._enqueue(frame)
            if below_soft_limit:
                return EnqueueResult.QUEUED
            if not self.is_delayed:
                return EnqueueResult.BACKPRESSURE
            self._set_slow(SlowConsumer.LAGGING)
            return EnqueueResult.SLOW
        if self.limits.overflow is OutboxOverflow.DISCONNECT:
            self._set_slow(SlowConsumer.DISCONNECTED)
            return EnqueueResult.CLOSED
        if self.limits.overflow is OutboxOverflow.DROP_NEWEST:
            self._drop(1)
            return EnqueueResult.DROPPED
        count = 0
        while not self._fits(frame.size):
            self._pop()
            count += 1
        self._enqueue(frame)
        self._drop(count)
        return EnqueueResult.SLOW

    def put(self, frame: EncodedMessage) -> bool:
        """Queue a frame without waiting. Return `False` if there is no room or the outbox is closed."""
        if self._shut:
            return False
        return (frame.key is not None and self._replace_same_key(frame)) or self._put_new(frame)

    def _put_new(self, frame: EncodedMessage) -> bool:
        if not self.make_room(frame.size):
            return False
        self._enqueue(frame)
        return True

    def make_room(self, size: int) -> bool:
        """Flush if needed and return whether `size` bytes fit. The flush may also admit waiting senders."""
        if not self._shut and not self._fits(size) and not self.blocked:
            self._send_queued()
        return not self._shut and self._fits(size)

    def _fits(self, size: int) -> bool:
        """Return whether a message of `size` bytes fits. Any message fits into an empty outbox."""
        return not self._message_count or self._open_queue().fits(size)

    def _stays_below_soft_limit(self, size: int) -> bool:
        """Return whether at most half of the bounds is used with a message of `size` bytes added."""
        return not self._message_count or self._open_queue().stays_below_soft_limit(size)

    def put_control(self, frame: EncodedMessage) -> bool:
        """Queue a control frame ahead of all messages. Return `False` if too many wait or the outbox is closed."""
        control = self._control or []
        if self._shut or len(control) >= MAX_CONTROL_FRAMES:
            return False
        control.append(frame)
        self._control = control
        self._update_fast_path()
        self._schedule_flush()
        return True

    def preload(self, frames: Iterable[EncodedMessage]) -> None:
        """Queue the first frames of a connection, regardless of the bounds. They use no room of later frames."""
        queue = self._open_queue()
        for frame in frames:
            self._enqueue(frame)
        queue.allow_extra()

    async def put_wait(
        self, frame: EncodedMessage, number: Callable[[EncodedMessage], int] | None = None
    ) -> int | None:
        """Queue a frame as soon as there is room, after earlier waiters.

        Free room goes to the first waiter, even if its frame is slightly too large. Otherwise sends that do not wait
        could take the room repeatedly. The wait is bounded by earlier sends, because a stalled send closes the
        connection. Cancelling removes the frame, unless it has just been queued. A frame that has replaced that of
        another sender stays until both are cancelled.

        Args:
            frame: The frame to send.
            number: Numbers the frame at the moment it is queued. A frame with a number replaces only one that waits
                with its sender. `replace_queued` replaces a queued one.

        Returns:
            The number of the frame, or of the newer one that has replaced it; 0 without numbers. `None` if the outbox
            was closed before.
        """
        if not self._waiters and (self.put(frame) if number is None else self._put_new(frame)):
            return 0 if number is None else number(frame)
        if self._shut:
            return None
        waiter = self._waiter_for(frame, number)
        sender = waiter.add_sender()
        try:
            return await sender
        except asyncio.CancelledError:
            waiter.remove_sender(sender)
            if self._waiters and waiter in self._waiters and waiter.is_abandoned:
                self._waiters.remove(waiter)
                self._serve_waiters()
                if waiter.offered:
                    self._offer_again(waiter.frame)
            raise

    def _offer_again(self, frame: EncodedMessage) -> None:
        """Offer a frame whose senders were all cancelled, because it has replaced one that was offered."""
        if not frame.is_envelope:
            self._offer_slow_path(frame)
        elif not self.put(frame):  # a volatile one, which must not end a session
            self.limits.counters.messages_dropped += 1

    def _waiter_for(self, frame: EncodedMessage, number: Callable[[EncodedMessage], int] | None) -> PendingSend:
        """Add a frame to those that wait for room, or let it replace a waiting one of the same key."""
        waiter = None if frame.key is None else self._waiter_of(frame.key)
        if waiter is not None:
            waiter.frame = frame
            self.limits.counters.messages_coalesced += 1
            return waiter
        if self._waiters is None:
            self._waiters = deque()
        waiter = PendingSend(frame, number)
        self._waiters.append(waiter)
        self._update_fast_path()
        return waiter

    def _waiter_of(self, key: object) -> PendingSend | None:
        """Return the waiting frame with that key."""
        return next((waiter for waiter in self._waiters or () if waiter.frame.key == key), None)

    def has_waiter(self, key: object) -> bool:
        """Return whether a sender waits with a frame of that key, which is newer than the queued ones."""
        return self._waiter_of(key) is not None

    def take_waiter(self, key: object) -> PendingSend | None:
        """Remove and return the waiting frame with that key, because a newer one replaces it."""
        waiter = self._waiter_of(key)
        if waiter is not None and self._waiters:
            self._waiters.remove(waiter)
            self._update_fast_path()
        return waiter

    def _replace_same_key(self, frame: EncodedMessage) -> bool:
        """Replace a queued or waiting frame of the same key. Return whether there was one."""
        self.used = True
        waiter = self._waiter_of(frame.key)
        if waiter is None:
            return self.replace_queued(frame)
        waiter.frame = frame  # it is newer than all queued frames
        waiter.offered = True
        self.limits.counters.messages_coalesced += 1
        return True

    def replace_queued(self, frame: EncodedMessage) -> bool:
        """Replace the queued frame of the same key. Return `False` if there is none, or the growth does not fit."""
        if self._shut:
            return False
        if self._queue is not None:
            replaced = self._queue.coalesce(frame)
        else:
            replaced = self._single is not None and self._single.key == frame.key
            if replaced:
                self._single = frame
        self.limits.counters.messages_coalesced += replaced
        return replaced

    def _enqueue(self, frame: EncodedMessage) -> None:
        """Queue a frame, regardless of the bounds."""
        if self._queue is None and self._single is None:
            self._single = frame
        else:
            queue = self._open_queue()
            queue.append(frame)
            if queue.counted:
                self._on_nonzero()
        self.used = True
        self._schedule_flush()

    def _open_queue(self) -> SendQueue:
        """Return the queue, which takes over a single waiting frame when it is created."""
        queue = self._queue
        if queue is None:
            queue = self._queue = SendQueue(self.limits, self._single)
            self._single = None
        return queue

    # ── slow consumers ──

    def _set_slow(self, state: SlowConsumer) -> None:
        """Report a slow consumer state, once until the client has caught up."""
        if self._slow is not state and self._slow is not SlowConsumer.DROPPING:
            self._slow = state
            self._update_fast_path()
            self.connection.on_slow(state)

    def _drop(self, count: int) -> None:
        self.dropped_messages += count
        self.limits.counters.messages_dropped += count
        self._set_slow(SlowConsumer.DROPPING)

    # ── blocked sends ──

    @property
    def blocked(self) -> bool:
        """Whether queued messages cannot be sent now."""
        return self._broken or (self._stall is not None and self._stall.since is not None)

    @property
    def is_delayed(self) -> bool:
        """Whether a send has been blocked for longer than `STALL_THRESHOLD`."""
        return self._stall is not None and self._stall.is_delayed

    @property
    def is_stalled(self) -> bool:
        """Whether queued messages wait for longer than they do with a client that reads, and pings behind them.

        A wait for a pong is none: nothing delays its ping, so a client that does not answer it is silent.
        """
        return self.is_delayed and not self.waits_for_pong

    @property
    def blocked_seconds(self) -> float:
        """Seconds for which sends have been blocked."""
        since = None if self._stall is None else self._stall.since
        return 0.0 if since is None else monotonic() - since

    @property
    def waits_for_pong(self) -> bool:
        """Whether sends are blocked only because the client has not confirmed that it reads."""
        return False

    def is_backpressured(self) -> bool:
        """Return whether more than half of the outbox is used while the client appears to read."""
        return self.half_full and not self.is_delayed

    def block(self) -> None:
        """Record that sends are blocked, and watch for progress."""
        self._start_accounting()
        self._due = True
        if self._stall is None:
            self._stall = StallWatch(self)
        self._stall.begin()

    def unblock(self) -> None:
        """Record that sends are not blocked any more."""
        if self._stall is not None:
            self._stall.end()
        self._due = self._broken

    def restart_stall_watch(self) -> None:
        """Measure from now on, because the next send has started and may block too."""
        if self._stall is not None:
            self._stall.restart()

    def drop_stall_watch(self) -> None:
        """Drop the stall watch, because its timer has found no blocked send."""
        self._stall = None

    def _start_accounting(self) -> None:
        """Count waiting and new frames in the memory budget until the client has caught up."""
        queue = self._open_queue()
        if not queue.counted:
            queue.start_accounting()
            self._update_fast_path()
            self._on_nonzero()

    def _on_nonzero(self) -> None:
        """Report counted bytes, where possibly no memory was held before."""
        if self.limits.budget.evicts:
            self.connection.on_nonzero()

    # ── sending ──

    def on_flush_due(self) -> None:
        """Send what can be sent now. The scheduler calls this at the end of a loop iteration with queued frames."""
        self._due = False
        if not self._broken:
            self._send_queued()

    @abc.abstractmethod
    def _send_queued(self) -> None:
        """Dequeue and send what can be sent now, then the close frame if there is one."""

    def _take_control(self) -> Sequence[EncodedMessage]:
        """Dequeue all control frames."""
        control, self._control = self._control or (), None
        self._update_fast_path()
        return control

    def _pop(self) -> EncodedMessage:
        """Dequeue the first message."""
        frame = self._single
        if frame is None:
            return self._open_queue().pop()
        self._single = None
        return frame

    def _take(self, max_bytes: int) -> Sequence[EncodedMessage]:
        """Dequeue messages until `max_bytes` are reached, at least one, and admit waiting senders."""
        frames = (self._pop(),) if self._queue is None else self._queue.pop_up_to(max_bytes)
        if self._waiters:
            self._serve_waiters()
        return frames

    def _serve_waiters(self) -> None:
        """Queue the frames of waiting senders in order, until a bound is reached."""
        while self._waiters and not (self._message_count and self._open_queue().at_bounds):
            waiter = self._waiters.popleft()
            if waiter.is_abandoned and not waiter.offered:
                continue
            frame, number = waiter.frame, waiter.number
            if frame.key is None or number is not None or not self._replace_same_key(frame):
                self._enqueue(frame)
            waiter.settle(0 if number is None else number(frame))
        self._update_fast_path()

    def _schedule_flush(self) -> None:
        if not self._due:
            self._due = True
            self._scheduler.schedule(self._pending, self)

    def _failed(self, error: BaseException, unsent: int) -> None:
        """Stop sending after the server has rejected a message. Its disconnect event may follow."""
        self._broken = self._due = True
        self._update_fast_path()
        if unsent:
            self.connection.on_discarded(unsent)
        self.connection.on_send_failed(error)

    def _on_drained(self) -> None:
        """Drop the empty queue, and report a slow client that has caught up."""
        if self._broken:  # queued frames stay and are counted until they are discarded
            return
        self._queue = None
        caught_up = self._slow is not None and not self._shut
        if caught_up:
            self._slow = None
        self._update_fast_path()
        if caught_up:
            self.connection.on_caught_up()

    # ── closing ──

    def finish(self, code: int, reason: str, *, flush: bool) -> int:
        """Accept no more messages, and send the queued ones and the close frame. `done` completes afterwards.

        Args:
            code: Close code.
            reason: Close reason.
            flush: Whether queued messages are still sent. Otherwise they are discarded.

        Returns:
            Number of discarded messages.
        """
        if self._shut:
            return 0
        self._shut = True
        discarded = 0 if flush else self._clear()
        self._close = (code, reason)
        discarded += self._fail_waiters()
        self._schedule_flush()
        return discarded

    def discard_queued(self) -> int:
        """Discard queued messages but not the close frame. Return the number of discarded messages."""
        return self._clear()

    def discard(self) -> int:
        """Stop accepting and sending messages. Return the number of discarded messages."""
        self._shut = True
        self._close = None
        discarded = self._clear() + self._fail_waiters()
        self._set_done()
        return discarded

    def _clear(self) -> int:
        discarded = self._message_count
        if self._queue is not None:
            self._queue.clear()
        self._single = self._control = None
        self._update_fast_path()
        return discarded

    def _fail_waiters(self) -> int:
        """Fail the waiting senders, and return the number of offered frames among theirs."""
        waiters, self._waiters = self._waiters or (), None
        for waiter in waiters:
            waiter.settle(None)
        self._update_fast_path()
        return sum(waiter.offered for waiter in waiters)

    @property
    def is_done(self) -> bool:
        """Whether nothing more will be sent."""
        return self._done is not None and self._done.is_set

    @property
    def done(self) -> asyncio.Future[None]:
        """Future that completes when nothing more will be sent."""
        return self._done_event().future

    def give_up(self) -> None:
        """Complete `done` regardless of the state."""
        Outbox._set_done(self)

    def release(self) -> None:
        """Drop the connection after its end, as soon as nothing more will be sent."""
        connection = self.connection
        self.owner = EndedOwner(connection.connection_id, connection.client_id, connection.close_info)
        if self.is_done:
            del self.connection

    def _set_done(self) -> None:
        if self._stall is not None:
            self._stall.stop()
            self._stall = None
        if not self.is_done:
            self._done_event().set()
            if self.owner is not self.connection:
                del self.connection

    def _done_event(self) -> LazyEvent:
        if self._done is None:
            self._done = LazyEvent()
        return self._done
