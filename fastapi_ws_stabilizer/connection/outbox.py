"""What waits to be sent to a client: bounded, in order, and never waited for by those who speak to many.

How it is sent depends on the server: `asgi_outbox` awaits its `send`, `link_outbox` writes to its transport.
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
"""Control frames that wait at most. A pong is worth nothing when the next one is there."""


class PendingSend:
    """A sender that waits for room.

    Attributes:
        frame: What it wants to send.
        queued: Called with it in the moment in which it is queued; `None` if nobody wants to know.
        done: `True` when that is queued, or a newer message has taken its place; `False` if it never will be.
    """

    __slots__ = ("done", "frame", "queued")

    def __init__(self, frame: EncodedMessage, queued: Callable[[EncodedMessage], object] | None) -> None:
        self.frame = frame
        self.queued = queued
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def settle(self, queued: bool) -> None:
        """Let the sender go on."""
        if not self.done.done():
            self.done.set_result(queued)


class Outbox(StallWatch, abc.ABC):
    """A bounded queue with many writers, emptied at the end of each turn of the event loop.

    An idle outbox owns no task and no timer. Subclasses send: `_send_queued` takes out what can be sent now,
    and the close frame after it.
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
        self.used = False  # whether a message was put in since that was asked
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
        """Take messages from now on."""
        self._shut = False

    def deflate_frames(self) -> None:
        """Send compressed frames of the v1 protocol from now on, where that is worth it."""
        self._deflates = True

    # ── putting in ──

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame without waiting. A full outbox does what `outbox_overflow` says.

        Hot path: called for each recipient of each broadcast. All that is unusual is elsewhere.
        """
        return EnqueueResult.QUEUED if self.try_enqueue(frame) else self._offer_slow_path(frame)

    def try_enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame if there is nothing to think about; `False` says nothing but that there is.

        Hot path: this alone runs for nearly all messages.
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

    def put_now(self, frame: EncodedMessage) -> bool:
        """Queue a frame and send it at once; `False` if something waits already, or there is anything to think about.

        What the user's code sends must not wait for the end of the turn: the code may go on computing for long. Hot
        path. Where no turn is booked, nothing waits.
        """
        if self._due or self._shut or self._counted or frame.key is not None or self._waiters:
            return False
        self._single = frame
        self.held_bytes = frame.size
        self.used = True
        self.flush_now()
        return True

    def offer_now(self, frame: EncodedMessage) -> EnqueueResult:
        """As `offer`, and send it now, as far as the network takes it: the caller may go on computing."""
        if self.put_now(frame):
            return EnqueueResult.QUEUED
        result = self.offer(frame)
        self.flush()
        return result

    def flush(self) -> None:
        """Send what is queued now, and not at the end of the turn, as far as the network takes it."""
        if self._any and not self.blocked:
            self._send_queued()

    def lingers(self) -> bool:
        """Whether something waits that the network may take as soon as the event loop turns."""
        return self._any and not self.is_delayed

    def _offer_slow_path(self, frame: EncodedMessage) -> EnqueueResult:
        if self._shut:
            return EnqueueResult.CLOSED
        if frame.key is not None and self._replace_same_key(frame):
            return EnqueueResult.SLOW if self.half_full and self.is_delayed else EnqueueResult.QUEUED
        below_soft_limit = self._below_soft_limit(frame.size)
        if not below_soft_limit and not self.blocked:
            self._send_queued()  # the network may take all of it at once
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
        """Queue a frame without waiting; `False` if there is no room or the outbox is shut."""
        if self._shut:
            return False
        if frame.key is not None and self._replace_same_key(frame):
            return True
        if not self.make_room(frame.size):
            return False
        self._enqueue(frame)
        return True

    def make_room(self, size: int) -> bool:
        """Whether a frame of `size` bytes can be queued, after what can be sent was sent. Others may get in by that."""
        if not self._shut and not self._fits(size) and not self.blocked:
            self._send_queued()
        return not self._shut and self._fits(size)

    def put_control(self, frame: EncodedMessage) -> bool:
        """Queue a control frame before all messages; `False` if too many wait already or the outbox is shut."""
        control = self._control or []
        if self._shut or len(control) >= MAX_CONTROL_FRAMES:
            return False
        control.append(frame)
        self._control = control
        self._schedule_flush()
        return True

    def preload(self, frames: Iterable[EncodedMessage]) -> None:
        """Queue what a connection begins with, whatever room there is. It takes none from what comes after it."""
        for frame in frames:
            self._enqueue(frame)
        self._extra = (SendQueue.__len__(self), self.held_bytes)

    async def put_wait(self, frame: EncodedMessage, queued: Callable[[EncodedMessage], object] | None = None) -> bool:
        """Queue a frame as soon as there is room, after those who waited before; `False` if the outbox was shut.

        Room that becomes free goes to who waits first, even if it is a little too small, so that messages for which
        nobody waits cannot take it away again and again. The wait is bounded by the sends before it: one that makes no
        progress ends the connection. Cancelling leaves the frame out, unless it has just been queued.

        Args:
            frame: What to send.
            queued: Called with it in the moment in which it is queued.
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
        """Wait behind the others, or in the place of one whose message this one makes worthless."""
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
        """Whether a frame has taken the place of one with its key, in the queue or of one that is waited with."""
        self.used = True
        for waiter in self._waiters or ():
            if waiter.frame.key == frame.key:  # it is newer than all that are queued
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

    # ── slowness ──

    def _set_slow(self, state: SlowConsumer) -> None:
        """Tell, once in an episode, that the client has become that slow."""
        if self._slow is not state and self._slow is not SlowConsumer.DROPPING:
            self._slow = state
            self.owner.on_slow(state)

    def _drop(self, count: int) -> None:
        self.owner.on_dropped(count)
        self._set_slow(SlowConsumer.DROPPING)

    # ── taking out ──

    def flush_now(self) -> None:
        """Send what can be sent now. Called at the end of a turn of the event loop in which something was queued."""
        self._due = False
        if not self._broken:
            self._send_queued()

    @abc.abstractmethod
    def _send_queued(self) -> None:
        """Take out and send what can be sent now, then the close frame if there is one."""

    def _take(self, max_bytes: int) -> Sequence[EncodedMessage]:
        """Take out what is next, control frames first, until `max_bytes` are reached."""
        if self._control:
            control, self._control = self._control, None
            return control
        frames = self._pop_up_to(max_bytes)
        if self._waiters:
            self._serve_waiters()
        return frames

    def _serve_waiters(self) -> None:
        """Queue what others wait to send, in their order, as long as the bounds are not reached."""
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
        """The server has refused a message: nothing can be sent any more, and the end is on its way to us."""
        self._broken = self._due = True
        if unsent:
            self.owner.on_unsent(unsent)
        self.owner.on_send_failed(error)

    def _on_nonzero(self) -> None:
        if self._limits.budget.evicts:
            self.owner.on_nonzero()

    @property
    def _any(self) -> bool:
        """Whether anything waits."""
        return bool(self._single is not None or self._queue or self._control)

    def _on_drained(self) -> None:
        """The queue is empty: tell if the client was slow and has caught up."""
        if self._broken:  # what is queued stays, and is counted, until it is thrown away
            return
        self._counted = False
        if self._slow is not None and not self._shut:
            self._slow = None
            self.owner.on_caught_up()

    # ── the end ──

    def finish(self, code: int, reason: str, *, flush: bool) -> int:
        """Take nothing more, send what is queued and then the close frame; `wait_done` returns when that is over.

        Args:
            code: Close code.
            reason: Close reason.
            flush: Whether what is queued is still sent; else it is thrown away.

        Returns:
            How many messages were thrown away.
        """
        if self._shut:
            return 0
        self._shut = True
        discarded = 0 if flush else self._clear()
        self._close = (code, reason)
        self._fail_waiters()
        self._schedule_flush()
        return discarded

    def forget(self) -> int:
        """Send only the close frame of what is still to be sent, and tell how many messages were thrown away."""
        return self._clear()

    def discard(self) -> int:
        """Take nothing more, send nothing more, and tell how many messages were thrown away."""
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
