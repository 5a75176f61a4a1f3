"""The outbox of a connection whose server has nothing but ASGI's `send`."""

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
    """The tasks that wait for the server, those of all outboxes of a manager.

    Args:
        tasks: Holds them.
        sends: How many sends may wait at the same time. One that does not wait needs no slot. One that waits for longer
            than a healthy client makes it gives its slot up, so that slow clients cannot hold up the others.
        closes: The same for close frames.
    """

    __slots__ = ("closes", "sends", "tasks")

    def __init__(self, tasks: TaskSet, sends: CallbackSemaphore, closes: CallbackSemaphore) -> None:
        self.tasks = tasks
        self.sends = sends
        self.closes = closes


class AsgiOutbox(Outbox):
    """Awaits the server's `send`, without a task where that does not wait.

    uvicorn's `send` waits only while its transport is full. So it is started where we are, and only if it waits does a
    task take over: first that send, then what has been queued behind it. Other sends begin in a task of their own.

    Args:
        send: The server's `send`.
        inline: Whether `send` may be started outside of a task of its own: it is the server's, with no middleware round
            it that might look at the current task. Not with a close frame: uvicorn's older implementation has a timeout
            for it, which belongs to a task.
        writers: The tasks of sends that wait.
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
        self._in_flight = 0  # messages that were given to the server and are neither taken nor refused yet
        self._delivers = False  # whether that is a message, and no control frame
        self._queued_for_slot = False  # whether we wait for a slot
        self._suspended: StartedCoroutine | None = None  # a send that waits for a slot to wait for the server in
        self._slot: CallbackSemaphore | None = None
        self._slot_timer: asyncio.TimerHandle | None = None

    def flush_now(self) -> None:
        """As every outbox. Hot path: nearly always one frame waits, and nothing is unusual."""
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
            super().flush_now()
            return
        self._due = False
        self._single = self._keyed = None
        self.held_bytes = 0
        self._in_flight = 1
        self._delivers = True
        try:
            coroutine = self._send((to_deflated(frame) if self._deflates else frame).message())
            waits_for = coroutine.send(None)  # as `begin` does
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
        """Send one message after the other, as long as the server takes them."""
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
        """A send that was started waits for the server: let a task wait for it, now or when there is a slot."""
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
        """Take out what is next, and call `send` with it."""
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
            assert self._close is not None  # noqa: S101 (for the type checker; `_has_next` has looked)
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
        """Let a task wait for a send that was started, and send what is behind it."""
        context = copied(self.owner.context)  # not that of whoever has sent to this client first
        task = self._writers.tasks.spawn(
            self._write_loop(started),
            name=f"ws-writer-{self.owner.connection_id}",
            context=context,
            eager=started is None,
        )
        if task.done():  # it began at once, and did not wait
            return
        self._task = task
        self._block()
        slots.take()
        self._slot = slots
        self._watch_slot()
        task.add_done_callback(self._writer_done, context=context)

    async def _write_loop(self, sending: Awaitable[None] | None) -> None:
        """Send until nothing is left, or others wait for the slot."""
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
        """Everything is sent, or nothing can be."""
        self._on_drained()
        self._writers.sends.wake_next()
        self._writers.closes.wake_next()
        if self._shut:
            self._set_done()

    # ── slots ──

    def _on_slot_free(self) -> bool:
        """There may be a slot. Tell whether we still want one."""
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
        """As every outbox; or it has to wait for others."""
        return self._queued_for_slot or super().is_stalled

    def lingers(self) -> bool:
        """As every outbox; what the server has been given and has not taken waits too."""
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

    # ── the end ──

    def discard(self) -> int:
        """Take nothing more, send nothing more, and tell how many messages were thrown away."""
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
        if self._task is None or self._task.done():  # else when it is over
            super()._set_done()
