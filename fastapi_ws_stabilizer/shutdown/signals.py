"""Hearing of the end before the server does: signals are taken, the drain runs, and then the server gets them."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import signal
import threading
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all

HANDLED_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

STILL_RUNNING_AFTER: Final = 5.0
"""Seconds after a signal was handed on: if the lifespan has not ended by then, that is told."""

SAME_STOP: Final = 0.5
"""Seconds in which a second signal is the first one again: a process group gets it, and then the master of a server
passes it on to its workers."""

Handler = Any
"""What `signal.getsignal` gives: a function, a constant, or `None` for a handler that Python does not know."""


class SignalHandler:
    """Stands before the handlers that a process has when it starts, and gives them back at the end.

    A first signal starts the drain, and is handed on when that is over. A second one is handed on at once, and then the
    first is not: whoever is told twice to stop may do so without cleaning up.

    Other managers of the process may stand behind this one. They drain at the same time.

    Args:
        events: Where it is told that signals cannot be heard.
        drain: What a first signal starts.
    """

    def __init__(self, events: EventBus, drain: Callable[[], Awaitable[Any]]) -> None:
        self._events = events
        self._drain = drain
        self._before: dict[int, Handler] = {}
        self._context = contextvars.copy_context()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks = TaskSet(lambda _, error: events.emit_exception("internal_task_failed", error, task="ws-drain"))
        self._first_at: float | None = None
        self._second_signal = self._handed_on = False
        self._reported_unhandled = False
        self._timer: asyncio.TimerHandle | None = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def listen(self) -> None:
        """Take the signals. Only where that can be done: in the main thread, and over handlers that can be called."""
        self._loop = asyncio.get_running_loop()
        self._stop_timer()
        self._context = contextvars.copy_context()  # not that of the code that a signal interrupts
        self._first_at, self._second_signal, self._handed_on = None, False, False
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED_SIGNALS:
                before = signal.getsignal(number)
                if number not in self._before and callable(before):  # else a library stands before us since last time
                    self._before[number] = before
                    signal.signal(number, self._on_signal)
        if signal.SIGTERM not in self._before and not self._reported_unhandled:
            self._reported_unhandled = True
            self._events.emit("signals_not_heard", logging.INFO)

    def stop(self) -> None:
        """Give the handlers back, where they are still ours. Where a library has put its own before them, hand on."""
        self._loop = None
        self._stop_timer()
        if threading.current_thread() is not threading.main_thread():
            return
        if self._first_at is None or self._handed_on:
            self._give_back()

    def _give_back(self) -> None:
        for number, before in list(self._before.items()):
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, before)
                del self._before[number]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = monotonic()
        if self._loop is None and self._first_at is None:  # stopped: whoever is behind us may not be
            before = self._before.get(number)
            if callable(before):
                before(number, frame)
            return
        if self._first_at is not None:
            if now - self._first_at < SAME_STOP:
                return
            self._second_signal = True
        elif (loop := self._loop) is not None and loop.is_running():
            self._first_at = now
            loop.call_soon_threadsafe(self._start, loop, number, context=self._context)
            return
        self._forward(number)

    def _start(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        self._tasks.spawn(self._drain_first(loop, number), name="ws-drain-first")

    async def _drain_first(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        managers = [one for one in self._managers_in_chain(number) if one._loop is loop]
        drains = [self._tasks.spawn(one._drain_it(), name="ws-drain-on-signal") for one in managers]
        await wait_for_all(drains, None)
        if not self._second_signal:
            # Not from here: a handler that raises KeyboardInterrupt means the loop, and not this task.
            loop.call_soon(self._forward, number)

    async def _drain_it(self) -> None:
        await self._drain()

    def _managers_in_chain(self, number: int) -> list[SignalHandler]:
        """This one, and those of other managers that stand behind it."""
        chain = [self]
        while isinstance(behind := getattr(chain[-1]._before.get(number), "__self__", None), SignalHandler):
            chain.append(behind)
        return chain

    def _forward(self, number: int) -> None:
        before = self._managers_in_chain(number)[-1]._before.get(number)
        self._handed_on = True
        if self._loop is None:
            self._give_back()
        if callable(before):
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._watch_end, number, before, context=self._context)
            before(number, None)

    def _watch_end(self, number: int, handler: Handler) -> None:
        """A handler of yours may do nothing: then the process lives on, and refuses every socket."""
        self._stop_timer()
        if (loop := self._loop) is not None and self._handed_on:
            after, context = STILL_RUNNING_AFTER, self._context
            self._timer = loop.call_later(after, self._report_still_running, number, handler, context=context)

    def _report_still_running(self, number: int, handler: Handler) -> None:
        self._timer = None
        name = f"{getattr(handler, '__module__', '')}.{getattr(handler, '__qualname__', repr(handler))}"
        self._events.emit(
            "still_running",
            logging.WARNING,
            signal=signal.Signals(number).name,
            handler=name,
            seconds=STILL_RUNNING_AFTER,
            problem="the connections are drained and the signal was handed on, but the lifespan has not ended; every "
            "new socket is refused",
            advice="a signal handler of your own has to call the one that it replaced, which stops the server; "
            "requests that take long delay the end too",
        )
