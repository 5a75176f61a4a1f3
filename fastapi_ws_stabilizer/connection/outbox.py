"""Bounded, ordered queue of messages to one client. Broadcasts never wait for it.

Subclasses send the messages: `asgi_outbox` awaits the server's `send`, `direct_outbox` writes to its transport.
"""

from __future__ import annotations

import abc
import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from fastapi_ws_stabilizer.config import OutboxOverflow
from fastapi_ws_stabilizer.connection.outbox_owner import OutboxOwner, SlowConsumer
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits, SendQueue
from fastapi_ws_stabilizer.connection.stall_watch import StallWatch
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.scheduling import FlushScheduler
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

MAX_CONTROL_FRAMES: Final = 16
"""Maximum number of waiting control frames. A pong has no use once the next one is queued."""


class PendingSend:
    """Sender that waits for room in the outbox.

    Attributes:
        frame: The frame to send.
        queued: Called with the frame at the moment it is queued; `None` for no callback.
        done: `True` when the frame is queued or replaced by a newer one; `False` if it never will be.
    """

    __slots__ = ("done", "frame", "queued")

    def __init__(self, frame: EncodedMessage, queued: Callable[[EncodedMessage], object] | None) -> None:
        self.frame = frame
        self.queued = queued
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def settle(self, queued: bool) -> None:
        """Complete the sender's wait."""
        if not self.done.done():
            self.done.set_result(queued)


class Outbox(StallWatch, abc.ABC):
    """Bounded queue with many writers, flushed at the end of each event loop iteration.

    An idle outbox owns no task and no timer. Subclasses implement `_send_queued`, which sends what can be sent now and
    then the close frame.
    """

    __slots__ = (
        "_close",
        "_control",
        "_deflates",
        "_pending",
        "_scheduler",
        "_shut",
        "_slow",
        "_waiters",
        "shard_index",
        "used",
    )

    def __init__(self, owner: OutboxOwner, limits: OutboxLimits, scheduler: FlushScheduler, shard: int) -> None:
        super().__init__(owner, limits)
        self.shard_index = 0
        self.used = False  # whether a message was queued since `used` was reset
        self._scheduler = scheduler
        self._pending = scheduler.pending(shard)
        self._control: list[EncodedMessage] | None = None
        self._shut = True
        self._deflates = False
        self._slow: SlowConsumer | None = None
        self._waiters: deque[PendingSend] | None = None
        self._close: tuple[int, str] | None = None

    def __len__(self) -> int:
        return super().__len__() + len(self._control or ())

    def open(self) -> None:
        """Accept messages from now on."""
        self._shut = False

    def deflate_frames(self) -> None:
        """Send compressed v1 frames from now on, where compression saves enough."""
        self._deflates = True

    # ── enqueueing ──

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame without waiting. A full outbox applies `outbox_overflow`.

        Hot path: called for each recipient of each broadcast. Rare cases are in `_offer_slow_path`.
        """
        return EnqueueResult.QUEUED if self.try_enqueue(frame) else self._offer_slow_path(frame)

    def try_enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame on the fast path. Return `False`, with nothing queued, if the slow path must decide.

        Hot path: nearly all messages need only this method.
        """
        if self._shut or self._counted or frame.key is not None or self._waiters:
            return False
        queue = self._queue
        held = self.held_bytes + frame.size
        if queue:
            limits = self._limits
            if len(queue) >= limits.soft_messages or held > limits.soft_bytes:
                return False
            queue.append(frame)
        elif self._single is None:
            self._single = frame
        else:  # the second of a burst
            return False
        self.held_bytes = held
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
        if self._due or self._shut or self._counted or frame.key is not None or self._waiters:
            return False
        self._single = frame
        self.held_bytes = frame.size
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
        below_soft_limit = self._below_soft_limit(frame.size)
        if not below_soft_limit and not self.blocked:
            self._send_queued()  # the network may accept all frames at once
            below_soft_limit = self._below_soft_limit(frame.size)
            if self._shut:
                return EnqueueResult.CLOSED
        if self._fits(frame.size):
            self._enqueue(frame)
            if below_soft_limit:
                return EnqueueResult.QUEUED
            if not self.is_delayed:
                return EnqueueResult.BACKPRESSURE
            self._set_slow(SlowConsumer.LAGGING)
            return EnqueueResult.SLOW
        if self._limits.overflow is OutboxOverflow.DISCONNECT:
            self._set_slow(SlowConsumer.DISCONNECTED)
            return EnqueueResult.CLOSED
        if self._limits.overflow is OutboxOverflow.DROP_NEWEST:
            self._drop(1)
            return EnqueueResult.DROPPED
        count = 0
        while SendQueue.__len__(self) and not self._fits(frame.size):
            self._pop()
            count += 1
        self._enqueue(frame)
        self._drop(count)
        return EnqueueResult.SLOW

    def put(self, frame: EncodedMessage) -> bool:
        """Queue a frame without waiting. Return `False` if there is no room or the outbox is closed."""
        if self._shut:
            return False
        if frame.key is not None and self._replace_same_key(frame):
            return True
        if not self.make_room(frame.size):
            return False
        self._enqueue(frame)
        return True

    def make_room(self, size: int) -> bool:
        """Flush if needed and return whether `size` bytes fit. The flush may also admit waiting senders."""
        if not self._shut and not self._fits(size) and not self.blocked:
            self._send_queued()
        return not self._shut and self._fits(size)

    def put_control(self, frame: EncodedMessage) -> bool:
        """Queue a control frame ahead of all messages. Return `False` if too many wait or the outbox is closed."""
        control = self._control or []
        if self._shut or len(control) >= MAX_CONTROL_FRAMES:
            return False
        control.append(frame)
        self._control = control
        self._schedule_flush()
        return True

    def preload(self, frames: Iterable[EncodedMessage]) -> None:
        """Queue the first frames of a connection, regardless of the bounds. They use no room of later frames."""
        for frame in frames:
            self._enqueue(frame)
        self._extra = (SendQueue.__len__(self), self.held_bytes)

    async def put_wait(self, frame: EncodedMessage, queued: Callable[[EncodedMessage], object] | None = None) -> bool:
        """Queue a frame as soon as there is room, after earlier waiters. Return `False` if the outbox was closed.

        Free room goes to the first waiter, even if its frame is slightly too large. Otherwise sends that do not wait
        could take the room repeatedly. The wait is bounded by earlier sends, because a stalled send closes the
        connection. Cancelling removes the frame, unless it has just been queued.

        Args:
            frame: The frame to send.
            queued: Called with the frame at the moment it is queued.
        """
        if not self._waiters and self.put(frame):
            if queued is not None:
                queued(frame)
            return True
        if self._shut:
            return False
        waiter = PendingSend(frame, queued)
        self._add_waiter(waiter)
        try:
            return await waiter.done
        except asyncio.CancelledError:
            if self._waiters and waiter in self._waiters:
                self._waiters.remove(waiter)
                self._serve_waiters()
            raise

    def _add_waiter(self, waiter: PendingSend) -> None:
        """Append a waiter, or replace one with an older frame of the same key."""
        if self._waiters is None:
            self._waiters = deque()
        for index, other in enumerate(self._waiters if waiter.frame.key is not None else ()):
            if other.frame.key == waiter.frame.key:
                self._waiters[index] = waiter
                self.owner.on_coalesced()
                other.settle(True)
                return
        self._waiters.append(waiter)

    def _replace_same_key(self, frame: EncodedMessage) -> bool:
        """Replace a queued or waiting frame of the same key. Return whether there was one."""
        self.used = True
        for waiter in self._waiters or ():
            if waiter.frame.key == frame.key:  # it is newer than all queued frames
                waiter.frame = frame
                self.owner.on_coalesced()
                return True
        if self._coalesce(frame):
            self.owner.on_coalesced()
            return True
        return False

    def _enqueue(self, frame: EncodedMessage) -> None:
        self._append(frame)
        self.used = True
        self._schedule_flush()

    # ── slow consumers ──

    def _set_slow(self, state: SlowConsumer) -> None:
        """Report a slow consumer state, once until the client has caught up."""
        if self._slow is not state and self._slow is not SlowConsumer.DROPPING:
            self._slow = state
            self.owner.on_slow(state)

    def _drop(self, count: int) -> None:
        self.owner.on_dropped(count)
        self._set_slow(SlowConsumer.DROPPING)

    # ── sending ──

    def on_flush_due(self) -> None:
        """Send what can be sent now. The scheduler calls this at the end of a loop iteration with queued frames."""
        self._due = False
        if not self._broken:
            self._send_queued()

    @abc.abstractmethod
    def _send_queued(self) -> None:
        """Dequeue and send what can be sent now, then the close frame if there is one."""

    def _take(self, max_bytes: int) -> Sequence[EncodedMessage]:
        """Dequeue frames until `max_bytes` are reached. Control frames come first, in a batch of their own."""
        if self._control:
            control, self._control = self._control, None
            return control
        frames = self._pop_up_to(max_bytes)
        if self._waiters:
            self._serve_waiters()
        return frames

    def _serve_waiters(self) -> None:
        """Queue the frames of waiting senders in order, until a bound is reached."""
        while self._waiters and not self._at_bounds:
            waiter = self._waiters.popleft()
            if waiter.done.done():
                continue
            if waiter.frame.key is None or not self._replace_same_key(waiter.frame):
                self._enqueue(waiter.frame)
            if waiter.queued is not None:
                waiter.queued(waiter.frame)
            waiter.settle(True)

    def _schedule_flush(self) -> None:
        if not self._due:
            self._due = True
            self._scheduler.schedule(self._pending, self)

    def _failed(self, error: BaseException, unsent: int) -> None:
        """Stop sending after the server has rejected a message. Its disconnect event may follow."""
        self._broken = self._due = True
        if unsent:
            self.owner.on_unsent(unsent)
        self.owner.on_send_failed(error)

    def _on_nonzero(self) -> None:
        if self._limits.budget.evicts:
            self.owner.on_nonzero()

    @property
    def _any(self) -> bool:
        """Whether any frame is queued."""
        return bool(self._single is not None or self._queue or self._control)

    def _on_drained(self) -> None:
        """Stop accounting for an empty queue, and report a slow client that has caught up."""
        if self._broken:  # queued frames stay and are counted until they are discarded
            return
        self._counted = False
        if self._slow is not None and not self._shut:
            self._slow = None
            self.owner.on_caught_up()

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
        self._fail_waiters()
        self._schedule_flush()
        return discarded

    def discard_queued(self) -> int:
        """Discard queued messages but not the close frame. Return the number of discarded messages."""
        return self._clear()

    def discard(self) -> int:
        """Stop accepting and sending messages. Return the number of discarded messages."""
        self._shut = True
        self._close = None
        discarded = self._clear()
        self._fail_waiters()
        self._set_done()
        return discarded

    def _clear(self) -> int:
        discarded = SendQueue.__len__(self)
        self._control = None
        self._empty()
        return discarded

    def _fail_waiters(self) -> None:
        for waiter in self._waiters or ():
            waiter.settle(False)
        self._waiters = None
