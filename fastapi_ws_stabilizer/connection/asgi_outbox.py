"""Outbox of a connection on a server that offers only ASGI's `send`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.connection.outbox import Outbox
from fastapi_ws_stabilizer.connection.outbox_owner import OutboxOwner
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits
from fastapi_ws_stabilizer.connection.stall_watch import STALL_THRESHOLD
from fastapi_ws_stabilizer.scheduling import CallbackSemaphore, FlushScheduler
from fastapi_ws_stabilizer.tasks import StartedCoroutine, TaskSet, copied, start_inline
from fastapi_ws_stabilizer.wire.encoded import asgi_close
from fastapi_ws_stabilizer.wire.envelope import to_deflated

Send = Callable[[MutableMapping[str, Any]], Any]


class WriterPool:
    """Writer tasks of all outboxes of a manager: each waits for the server.

    Args:
        tasks: The set that holds the tasks.
        sends: Slots for sends that wait at the same time. A send that does not wait needs no slot. A send that waits
            for longer than `STALL_THRESHOLD` gives up its slot, so that slow clients do not delay others.
        closes: Slots for close frames that wait.
    """

    __slots__ = ("closes", "sends", "tasks")

    def __init__(self, tasks: TaskSet, sends: CallbackSemaphore, closes: CallbackSemaphore) -> None:
        self.tasks = tasks
        self.sends = sends
        self.closes = closes


class AsgiOutbox(Outbox):
    """Outbox that awaits the server's `send`, and needs no task while `send` does not block.

    uvicorn's `send` blocks only while its transport is full. Therefore the outbox starts it inline. If it blocks, a
    writer task finishes that send and then sends the queued frames. Other servers' sends start in a writer task.

    Args:
        send: The server's `send`.
        inline: Whether `send` may start outside a writer task. This requires the server's own `send` without a
            middleware around it that might use the current task. Close frames never start inline, because uvicorn's
            older implementation sends them with a timeout that is bound to a task.
        writers: The writer tasks and their slots.
    """

    __slots__ = (
        "_delivers",
        "_in_flight",
        "_inline",
        "_queued_for_slot",
        "_send",
        "_slot",
        "_slot_timer",
        "_suspended",
        "_task",
        "_writers",
    )

    def __init__(
        self,
        owner: OutboxOwner,
        limits: OutboxLimits,
        scheduler: FlushScheduler,
        shard: int,
        *,
        send: Send,
        inline: bool,
        writers: WriterPool,
    ) -> None:
        super().__init__(owner, limits, scheduler, shard)
        self._send = send
        self._inline = inline
        self._writers = writers
        self._task: asyncio.Task[None] | None = None
        self._in_flight = 0  # messages passed to the server that it has neither accepted nor rejected
        self._delivers = False  # whether the frame in flight is a message and not a control frame
        self._queued_for_slot = False
        self._suspended: StartedCoroutine | None = None  # a started send that waits for a slot
        self._slot: CallbackSemaphore | None = None
        self._slot_timer: asyncio.TimerHandle | None = None

    def on_flush_due(self) -> None:
        """Send what can be sent now. Hot path: nearly always exactly one frame is queued."""
        frame = self._single
        if (
            frame is None
            or not self._inline
            or self._shut
            or self._task is not None
            or self._queued_for_slot
            or self._control
            or self._waiters
            or self._slow
            or self._broken
        ):
            super().on_flush_due()
            return
        self._due = False
        self._single = self._keyed = None
        self.held_bytes = 0
        self._in_flight = 1
        self._delivers = True
        try:
            coroutine = self._send((to_deflated(frame) if self._deflates else frame).message())
            waits_for = coroutine.send(None)  # as `start_inline` does
        except StopIteration:
            pass
        except Exception as error:
            self._send_failed(error)
            return
        else:
            self._suspend(StartedCoroutine(coroutine, waits_for))
            return
        self._in_flight = 0
        limits = self._limits
        limits.counters.messages_sent += 1
        if limits.reports_delivery:
            self.owner.on_delivered()

    def _send_queued(self) -> None:
        """Send queued messages one by one until `send` blocks."""
        if self._task is not None or self._queued_for_slot:
            return
        while self._has_next():
            slots = self._slots()
            if self._inline and slots is self._writers.sends:
                try:
                    sending = start_inline(self._start_next())
                except Exception as error:
                    self._send_failed(error)
                    break
                if sending is None:
                    self._on_sent()
                    continue
                self._suspend(sending)
                return
            if not slots.free:
                self._wait_for_slot(slots)
                return
            self._start_writer(None, slots)
            if self._task is not None:
                return
        self._on_idle()

    def _suspend(self, sending: StartedCoroutine) -> None:
        """Pass a started send that blocks to a writer task, now or when a slot is free."""
        if self._writers.sends.free:
            self._start_writer(sending, self._writers.sends)
            return
        self._suspended = sending
        self._block()
        self._wait_for_slot(self._writers.sends)

    def _wait_for_slot(self, slots: CallbackSemaphore) -> None:
        self._start_accounting()
        self._due = self._queued_for_slot = True
        slots.wait(self._on_slot_free)

    def _has_next(self) -> bool:
        return not self._broken and (self._any or self._close is not None)

    def _slots(self) -> CallbackSemaphore:
        return self._writers.sends if self._any else self._writers.closes

    def _start_next(self) -> Any:
        """Dequeue the next frame and return the coroutine that sends it."""
        self._delivers = not self._control
        if self._control:
            self._in_flight = 1
            message = self._control.pop(0).message()
        elif self._any:
            self._in_flight = 1
            frame = self._pop()
            if self._waiters:
                self._serve_waiters()
            message = (to_deflated(frame) if self._deflates else frame).message()
        else:
            assert self._close is not None  # noqa: S101 (for the type checker; `_has_next` has checked it)
            message = asgi_close(*self._close)
            self._close = None
        return self._send(message)

    def _on_sent(self) -> None:
        if self._in_flight:
            self._in_flight = 0
            self._limits.counters.messages_sent += 1
            if self._delivers and self._limits.reports_delivery:
                self.owner.on_delivered()

    def _start_writer(self, started: Awaitable[None] | None, slots: CallbackSemaphore) -> None:
        """Start a writer task that finishes a started send and then sends the queued frames."""
        context = copied(self.owner.context)  # not the context of the code that sent to this client first
        task = self._writers.tasks.spawn(
            self._write_loop(started),
            name=f"ws-writer-{self.owner.connection_id}",
            context=context,
            eager=started is None,
        )
        if task.done():  # it ran eagerly and did not block
            return
        self._task = task
        self._block()
        slots.take()
        self._slot = slots
        self._watch_slot()
        task.add_done_callback(self._writer_done, context=context)

    async def _write_loop(self, sending: Awaitable[None] | None) -> None:
        """Send until the queue is empty or another outbox waits for the slot."""
        try:
            if sending is None and self._has_next():
                sending = self._start_next()
            while sending is not None:
                await sending
                self._on_sent()
                if not self._has_next() or self._slot is not self._slots() or len(self._slot):
                    return
                self._blocked_since = monotonic()
                sending = self._start_next()
        except Exception as error:
            self._send_failed(error)

    def _send_failed(self, error: BaseException) -> None:
        unsent, self._in_flight = self._in_flight, 0
        self._failed(error, unsent)

    def _writer_done(self, _: asyncio.Task[None]) -> None:
        self._task = None
        self._unblock()
        self._give_slot_back()
        if self._in_flight:  # cancelled
            unsent, self._in_flight = self._in_flight, 0
            self.owner.on_unsent(unsent)
        if self._has_next():
            self._schedule_flush()
        else:
            self._on_idle()

    def _on_idle(self) -> None:
        """Handle an outbox that has sent everything or can send nothing more."""
        self._on_drained()
        self._writers.sends.wake_next()
        self._writers.closes.wake_next()
        if self._shut:
            self._set_done()

    # ── slots ──

    def _on_slot_free(self) -> bool:
        """Use a slot that may be free. Return whether this outbox still needed it."""
        self._queued_for_slot = False
        suspended, self._suspended = self._suspended, None
        if suspended is not None:
            self._start_writer(suspended, self._writers.sends)
            return True
        if not self._has_next():
            return False
        self._due = False
        self._schedule_flush()
        return True

    @property
    def is_stalled(self) -> bool:
        """Whether queued messages are delayed, or the outbox waits for a slot."""
        return self._queued_for_slot or super().is_stalled

    def has_sendable_frames(self) -> bool:
        """Whether messages wait that the next loop iteration may send, including those in flight."""
        return (self._any or self._in_flight > 0) and not self.is_delayed

    def _watch_slot(self) -> None:
        self._slot_timer = asyncio.get_running_loop().call_later(
            STALL_THRESHOLD, self._check_slot, context=self._limits.context
        )

    def _check_slot(self) -> None:
        if self.is_delayed:
            self._slot_timer = None
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

    # ── closing ──

    def discard(self) -> int:
        """Stop accepting and sending messages. Return the number of discarded messages."""
        if self._suspended is not None:
            self._suspended.close()
            self._suspended = None
            discarded_in_flight, self._in_flight = self._in_flight, 0
        else:
            discarded_in_flight = 0
        discarded = super().discard() + discarded_in_flight
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        return discarded

    def _set_done(self) -> None:
        if self._task is None or self._task.done():  # else the task sets it when it ends
            super()._set_done()
