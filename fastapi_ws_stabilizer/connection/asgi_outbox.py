"""Outbox of a connection on a server that offers only ASGI's `send`."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from fastapi_ws_stabilizer.connection.outbox import Outbox
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits
from fastapi_ws_stabilizer.connection.stall_watch import STALL_THRESHOLD
from fastapi_ws_stabilizer.scheduling import CallbackSemaphore, FlushScheduler
from fastapi_ws_stabilizer.tasks import StartedCoroutine, TaskSet, copied, start_inline
from fastapi_ws_stabilizer.wire.encoded import asgi_close
from fastapi_ws_stabilizer.wire.envelope import to_deflated

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection

Send = Callable[[MutableMapping[str, Any]], Any]


class WriterPool:
    """Writer tasks of all outboxes of a manager: each waits for the server.

    Args:
        tasks: The set that holds the tasks.
        sends: Slots for sends that wait at the same time. A send that does not wait needs no slot. A send that waits
            for longer than `STALL_THRESHOLD` gives up its slot, so that slow clients do not delay others.
        closes: Slots for close frames that wait.
    """

    __slots__ = ("_context", "_started", "closes", "sends", "tasks")

    def __init__(self, tasks: TaskSet, sends: CallbackSemaphore, closes: CallbackSemaphore) -> None:
        self.tasks = tasks
        self.sends = sends
        self.closes = closes
        self._context = contextvars.copy_context()  # not the context of the connection whose send starts first
        self._started: list[BlockedSend] = []  # sends whose task has started in this iteration of the event loop

    def watch_if_blocked(self, send: BlockedSend) -> None:
        """Watch a send, unless it ends within the next iteration of the event loop, as nearly all do."""
        if not self._started:
            self._call_soon(self._after_flush)
        self._started.append(send)

    def _after_flush(self) -> None:
        """Call `_after_first_step` behind the first steps of the tasks, which run in this iteration."""
        started, self._started = self._started, []
        self._call_soon(self._after_first_step, started)

    @staticmethod
    def _after_first_step(started: list[BlockedSend]) -> None:
        for send in started:
            send.watch()

    def _call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        asyncio.get_running_loop().call_soon(callback, *args, context=self._context)


class AsgiOutbox(Outbox):
    """Outbox that awaits the server's `send`, and needs no task while `send` does not block.

    uvicorn's `send` blocks only while its transport is full. Therefore the outbox starts it inline. If it blocks,
    `BlockedSend` finishes it in a writer task. Other servers' sends start in a writer task.

    Args:
        send: The server's `send`.
        inline: Whether `send` may start outside a writer task. This requires the server's own `send` without a
            middleware around it that might use the current task. Close frames never start inline, because uvicorn's
            older implementation sends them with a timeout that is bound to a task.
        writers: The writer tasks and their slots.

    Attributes:
        writers: As above.
        blocked_send: The send that waits for a slot or for the server; `None` while none does.
    """

    __slots__ = ("_delivers", "_in_flight", "_inline", "_send", "blocked_send", "writers")

    def __init__(
        self,
        connection: Connection,
        limits: OutboxLimits,
        scheduler: FlushScheduler,
        shard: int,
        *,
        send: Send,
        inline: bool,
        writers: WriterPool,
    ) -> None:
        super().__init__(connection, limits, scheduler, shard)
        self.writers = writers
        self._send = send
        self._inline = inline
        self._in_flight = 0  # frames passed to the server that it has neither accepted nor rejected, without the close
        self._delivers = False  # whether the frame in flight is a message and not a control frame
        self.blocked_send: BlockedSend | None = None

    def _update_fast_path(self) -> None:
        super()._update_fast_path()
        self.fast = self.fast and self._inline and self.blocked_send is None

    def on_flush_due(self) -> None:
        """Send what can be sent now. Hot path: nearly always exactly one frame is queued."""
        frame = self._single
        if frame is None or not self.fast:
            super().on_flush_due()
            return
        self._due = False
        self._single = None
        try:
            coroutine = self._send((to_deflated(frame) if self._deflates else frame).message())
            waits_for = coroutine.send(None)  # as `start_inline` does
        except StopIteration:
            pass
        except Exception as error:
            self._failed(error, 1)
            return
        else:
            self._in_flight = 1
            self._delivers = True
            self._suspend(StartedCoroutine(coroutine, waits_for))
            return
        limits = self.limits
        limits.counters.messages_sent += 1
        if limits.reports_delivery:
            self.connection.on_delivered()

    def _send_queued(self) -> None:
        """Send queued messages one by one until `send` blocks."""
        if self.blocked_send is not None:
            return
        while not self._broken:
            if self._any:
                slots = self.writers.sends
                if self._inline:
                    try:
                        sending = start_inline(self._start_frame())
                    except Exception as error:
                        self.on_send_failed(error)
                        break
                    if sending is None:
                        self.on_sent()
                        continue
                    self._suspend(sending)
                    return
            elif self._close is not None:
                slots = self.writers.closes
            else:
                break
            blocked = self.blocked_send = BlockedSend(self, None)
            if not slots.free:
                self._start_accounting()
                self._due = True
                slots.wait(blocked.on_slot_free)
                return
            if not blocked.start_writer(slots):
                self._due = True
                return
            self.blocked_send = None
        self._on_idle()

    def _suspend(self, sending: StartedCoroutine) -> None:
        """Pass a started send that blocks to a writer task, now or when a slot is free."""
        blocked = self.blocked_send = BlockedSend(self, sending)
        slots = self.writers.sends
        if slots.free:
            blocked.start_writer(slots)
        else:
            self.block()
            slots.wait(blocked.on_slot_free)

    # ── one frame after the other ──

    @property
    def has_next(self) -> bool:
        """Whether a frame waits that can be sent."""
        return not self._broken and (self._any or self._close is not None)

    @property
    def next_slots(self) -> CallbackSemaphore:
        """Slots for the next frame."""
        return self.writers.sends if self._any else self.writers.closes

    def start_next(self) -> Any:
        """Dequeue the next frame and return the coroutine that sends it."""
        if self._any:
            return self._start_frame()
        assert self._close is not None  # noqa: S101 (for the type checker; `has_next` has checked it)
        close, self._close = self._close, None
        return self._send(asgi_close(*close))

    def _start_frame(self) -> Any:
        """Dequeue a control frame or message and return the coroutine that sends it."""
        self._in_flight = 1
        if self._control:
            self._delivers = False
            message = self._control.pop(0).message()
            self._update_fast_path()
        else:
            self._delivers = True
            frame = self._pop()
            if self._waiters:
                self._serve_waiters()
            message = (to_deflated(frame) if self._deflates else frame).message()
        return self._send(message)

    def on_sent(self) -> None:
        """Count the frame that the server has accepted."""
        if self._in_flight:
            self._in_flight = 0
            self.limits.counters.messages_sent += 1
            if self._delivers and self.limits.reports_delivery:
                self.connection.on_delivered()

    def on_send_failed(self, error: BaseException) -> None:
        """Stop sending, because the server has rejected a frame."""
        self._failed(error, self._take_unsent())

    def _take_unsent(self) -> int:
        """Return the number of frames that the server will not accept, and forget them."""
        unsent, self._in_flight = self._in_flight, 0
        return unsent

    def _on_idle(self) -> None:
        """Handle an outbox that has sent everything or can send nothing more."""
        self._on_drained()
        self.writers.sends.wake_next()
        self.writers.closes.wake_next()
        if self._shut:
            self._set_done()

    # ── a blocked send ──

    def on_slot_free(self) -> bool:
        """Send the queued frames, for which a slot is free now. Return whether there are any."""
        self.blocked_send = None
        if not self.has_next:
            return False
        self._due = False
        self._schedule_flush()
        return True

    def on_writer_done(self) -> None:
        """Go on after the writer task has ended."""
        self.blocked_send = None
        self.unblock()
        if unsent := self._take_unsent():  # the task was cancelled
            self.connection.on_discarded(unsent)
        if self.has_next:
            self._schedule_flush()
        else:
            self._on_idle()

    @property
    def is_stalled(self) -> bool:
        """Whether queued messages are delayed, or the outbox waits for a slot."""
        return (self.blocked_send is not None and self.blocked_send.task is None) or super().is_stalled

    def has_sendable_frames(self) -> bool:
        """Whether messages wait that the next loop iteration may send, including those in flight."""
        return (self._any or self._in_flight > 0) and not self.is_delayed

    # ── closing ──

    def discard(self) -> int:
        """Stop accepting and sending messages. Return the number of discarded messages."""
        blocked = self.blocked_send
        discarded = 0
        if blocked is not None and blocked.task is None:
            blocked.close()
            self.blocked_send = None
            discarded = self._take_unsent()
        discarded += super().discard()
        if blocked is not None:
            blocked.cancel()
        return discarded

    def _set_done(self) -> None:
        if self.blocked_send is None:  # else it sets it when it ends
            super()._set_done()


class BlockedSend:
    """Send of one outbox that waits for a slot of the writer pool, and then in a writer task for the server.

    An outbox creates it when a send blocks, and drops it when the writer task has ended. The task also sends what is
    queued in between, unless another outbox waits for the slot.

    Args:
        outbox: The outbox.
        started: The started send; `None` if the task starts it.

    Attributes:
        task: The writer task; `None` while the send waits for a slot.
    """

    __slots__ = ("_outbox", "_slot", "_slot_timer", "_started", "task")

    def __init__(self, outbox: AsgiOutbox, started: StartedCoroutine | None) -> None:
        self._outbox = outbox
        self._started = started
        self._slot: CallbackSemaphore | None = None
        self._slot_timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    def start_writer(self, slots: CallbackSemaphore) -> bool:
        """Start the writer task, and take a slot if it blocks. Return whether it has ended already."""
        outbox, connection = self._outbox, self._outbox.connection
        started = self._started is not None
        context = copied(connection.context)  # not the context of the code that sent to this client first
        task = outbox.writers.tasks.spawn(
            self._write(),
            name=f"ws-writer-{connection.connection_id}",
            context=context,
            eager=not started,
        )
        if task.done():  # it ran eagerly and did not block
            return True
        self.task = task
        slots.take()
        self._slot = slots
        task.add_done_callback(self._on_task_done, context=context)
        if started:  # it has blocked already
            self.watch()
        else:
            outbox.writers.watch_if_blocked(self)
        return False

    def watch(self) -> None:
        """Watch the send and its slot, if its task still runs."""
        outbox = self._outbox
        if outbox.blocked_send is self and self.task is not None and not self.task.done():
            outbox.block()
            self._watch_slot()

    async def _write(self) -> None:
        """Send until the queue is empty or another outbox waits for the slot."""
        outbox = self._outbox
        sending: Any
        sending, self._started = self._started, None
        try:
            if sending is None and outbox.has_next:
                sending = outbox.start_next()
            while sending is not None:
                await sending
                outbox.on_sent()
                if not outbox.has_next or self._slot is not outbox.next_slots or len(self._slot):
                    return
                outbox.restart_stall_watch()
                sending = outbox.start_next()
        except Exception as error:
            outbox.on_send_failed(error)

    def on_slot_free(self) -> bool:
        """Use a slot that may be free. Return whether this send still needed it."""
        outbox = self._outbox
        if outbox.blocked_send is not self:  # the outbox was discarded
            return False
        if self._started is None:
            return outbox.on_slot_free()
        self.start_writer(outbox.writers.sends)
        return True

    def _on_task_done(self, _: asyncio.Task[None]) -> None:
        self._give_slot_back()
        self._outbox.on_writer_done()

    def _watch_slot(self) -> None:
        self._slot_timer = asyncio.get_running_loop().call_later(
            STALL_THRESHOLD, self._check_slot, context=self._outbox.limits.context
        )

    def _check_slot(self) -> None:
        self._slot_timer = None
        if self._outbox.is_delayed:
            self._give_slot_back()
        else:
            self._watch_slot()

    def _give_slot_back(self) -> None:
        if self._slot_timer is not None:
            self._slot_timer.cancel()
            self._slot_timer = None
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()

    def close(self) -> None:
        """Close the started send, which waits for a slot."""
        if self._started is not None:
            self._started.close()
            self._started = None

    def cancel(self) -> None:
        """Cancel the writer task, unless it runs this code."""
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
