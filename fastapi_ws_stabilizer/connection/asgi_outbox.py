"""The outbox of a connection whose server has nothing but ASGI's `send`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.connection.backlog import OutboxLimits
from fastapi_ws_stabilizer.connection.outbox import Outbox
from fastapi_ws_stabilizer.connection.outbox_owner import OutboxOwner
from fastapi_ws_stabilizer.connection.send_watch import STALL_THRESHOLD
from fastapi_ws_stabilizer.hub.slots import CallbackSemaphore
from fastapi_ws_stabilizer.hub.turns import FlushScheduler
from fastapi_ws_stabilizer.tasks import StartedCoroutine, TaskSet, copied, start_inline
from fastapi_ws_stabilizer.wire.envelope import to_deflated
from fastapi_ws_stabilizer.wire.payload import asgi_close

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

    uvicorn's `send` waits only while its transport is full. So it is begun where we are, and only if it waits does a
    task take over: first that send, then what has been queued behind it. Other sends begin in a task of their own.

    Args:
        send: The server's `send`.
        by_hand: Whether `send` may be begun outside of a task of its own: it is the server's, with no middleware round
            it that might look at the current task. Not with a close frame: uvicorn's older implementation has a timeout
            for it, which belongs to a task.
        writers: The tasks of sends that wait.
    """

    __slots__ = (
        "_by_hand",
        "_delivers",
        "_in_flight",
        "_in_line",
        "_parked",
        "_send",
        "_slot",
        "_slot_timer",
        "_task",
        "_writers",
    )

    def __init__(
        self,
        owner: OutboxOwner,
        limits: OutboxLimits,
        turns: FlushScheduler,
        shard: int,
        *,
        send: Send,
        by_hand: bool,
        writers: WriterPool,
    ) -> None:
        super().__init__(owner, limits, turns, shard)
        self._send = send
        self._by_hand = by_hand
        self._writers = writers
        self._task: asyncio.Task[None] | None = None
        self._in_flight = 0  # messages that were given to the server and are neither taken nor refused yet
        self._delivers = False  # whether that is a message, and no control frame
        self._in_line = False  # whether we wait for a slot
        self._parked: StartedCoroutine | None = None  # a send that waits for a slot to wait for the server in
        self._slot: CallbackSemaphore | None = None
        self._slot_timer: asyncio.TimerHandle | None = None

    def take_turn(self) -> None:
        """As every outbox. Hot path: nearly always one frame waits, and nothing is unusual."""
        frame = self._alone
        if (
            frame is None
            or not self._by_hand
            or self._shut
            or self._task is not None
            or self._in_line
            or self._urgent
            or self._waiters
            or self._slow
            or self._broken
        ):
            super().take_turn()
            return
        self._due = False
        self._alone = self._keyed = None
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
            self._park(StartedCoroutine(coroutine, waits_for))
            return
        self._in_flight = 0
        limits = self._limits
        limits.totals.messages_sent += 1
        if limits.tells_delivery:
            self.owner.delivered()

    def _carry(self) -> None:
        """Send one message after the other, as long as the server takes them."""
        if self._task is not None or self._in_line:
            return
        while self._waiting():
            slots = self._slots()
            if self._by_hand and slots is self._writers.sends:
                try:
                    sending = start_inline(self._begin_next())
                except Exception as error:
                    self._send_failed(error)
                    break
                if sending is None:
                    self._has_sent()
                    continue
                self._park(sending)
                return
            if not slots.free:
                self._stand_in_line_for(slots)
                return
            self._hand_over(None, slots)
            if self._task is not None:
                return
        self._rest()

    def _park(self, sending: StartedCoroutine) -> None:
        """A send that was begun waits for the server: let a task wait for it, now or when there is a slot."""
        if self._writers.sends.free:
            self._hand_over(sending, self._writers.sends)
            return
        self._parked = sending
        self._block()
        self._stand_in_line_for(self._writers.sends)

    def _stand_in_line_for(self, slots: CallbackSemaphore) -> None:
        self._count()
        self._due = self._in_line = True
        slots.wait(self._look_again)

    def _waiting(self) -> bool:
        return not self._broken and (self._any or self._close is not None)

    def _slots(self) -> CallbackSemaphore:
        return self._writers.sends if self._any else self._writers.closes

    def _begin_next(self) -> Any:
        """Take out what is next, and call `send` with it."""
        self._delivers = not self._urgent
        if self._urgent:
            self._in_flight = 1
            message = self._urgent.pop(0).message()
        elif self._any:
            self._in_flight = 1
            frame = self._pop()
            if self._waiters:
                self._serve_waiters()
            message = (to_deflated(frame) if self._deflates else frame).message()
        else:
            assert self._close is not None  # noqa: S101 (for the type checker; `_waiting` has looked)
            message = asgi_close(*self._close)
            self._close = None
        return self._send(message)

    def _has_sent(self) -> None:
        if self._in_flight:
            self._in_flight = 0
            self._limits.totals.messages_sent += 1
            if self._delivers and self._limits.tells_delivery:
                self.owner.delivered()

    def _hand_over(self, begun: Awaitable[None] | None, slots: CallbackSemaphore) -> None:
        """Let a task wait for a send that was begun, and send what is behind it."""
        context = copied(self.owner.context)  # not that of whoever has sent to this client first
        task = self._writers.tasks.spawn(
            self._go_on(begun), name=f"ws-writer-{self.owner.connection_id}", context=context, eager=begun is None
        )
        if task.done():  # it began at once, and did not wait
            return
        self._task = task
        self._block()
        slots.take()
        self._slot = slots
        self._watch_slot()
        task.add_done_callback(self._task_over, context=context)

    async def _go_on(self, sending: Awaitable[None] | None) -> None:
        """Send until nothing is left, or others wait for the slot."""
        try:
            if sending is None and self._waiting():
                sending = self._begin_next()
            while sending is not None:
                await sending
                self._has_sent()
                if not self._waiting() or self._slot is not self._slots() or len(self._slot):
                    return
                self._blocked_since = monotonic()
                sending = self._begin_next()
        except Exception as error:
            self._send_failed(error)

    def _send_failed(self, error: BaseException) -> None:
        unsent, self._in_flight = self._in_flight, 0
        self._failed(error, unsent)

    def _task_over(self, _: asyncio.Task[None]) -> None:
        self._task = None
        self._unblock()
        self._give_slot_back()
        if self._in_flight:  # cancelled
            unsent, self._in_flight = self._in_flight, 0
            self.owner.unsent(unsent)
        if self._waiting():
            self._book_turn()
        else:
            self._rest()

    def _rest(self) -> None:
        """Everything is sent, or nothing can be."""
        self._calm_down()
        self._writers.sends.pass_on()
        self._writers.closes.pass_on()
        if self._shut:
            self._set_done()

    # ── slots ──

    def _look_again(self) -> bool:
        """There may be a slot. Tell whether we still want one."""
        self._in_line = False
        parked, self._parked = self._parked, None
        if parked is not None:
            self._hand_over(parked, self._writers.sends)
            return True
        if not self._waiting():
            return False
        self._due = False
        self._book_turn()
        return True

    @property
    def stuck(self) -> bool:
        """As every outbox; or it has to wait for others."""
        return self._in_line or super().stuck

    def lingers(self) -> bool:
        """As every outbox; what the server has been given and has not taken waits too."""
        return (self._any or self._in_flight > 0) and not self.send_waits

    def _watch_slot(self) -> None:
        self._slot_timer = asyncio.get_running_loop().call_later(
            STALL_THRESHOLD, self._look_at_slot, context=self._limits.context
        )

    def _look_at_slot(self) -> None:
        if self.send_waits:
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
        if self._parked is not None:
            self._parked.close()
            self._parked = None
            discarded_on_the_way, self._in_flight = self._in_flight, 0
        else:
            discarded_on_the_way = 0
        discarded = super().discard() + discarded_on_the_way
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        return discarded

    def _set_done(self) -> None:
        if self._task is None or self._task.done():  # else when it is over
            super()._set_done()
