"""Signal handling: SIGTERM and SIGINT start a drain, and then go to the previous handler, such as the server's."""

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

STILL_RUNNING_DELAY: Final = 5.0
"""Seconds after a signal was passed on. If the lifespan has not ended by then, a warning is logged."""

DUPLICATE_SIGNAL_WINDOW: Final = 0.5
"""Seconds in which a second signal counts as the first one. Ctrl+C signals the whole process group, and the master
process may forward the signal again."""

Handler = Any
"""Return value of `signal.getsignal`: a function, a constant, or `None` for a handler outside Python."""


class SignalHandler:
    """Handler of SIGTERM and SIGINT that replaces the handlers of the process and restores them at the end.

    A first signal starts the drain, and goes to the previous handler after the drain. A second signal goes there
    immediately, and the first one is then not passed on, so that the process can stop without cleaning up.

    The previous handler can belong to another manager of the process. The managers drain at the same time.

    Args:
        events: Event bus for signals that cannot be handled, and for a process that does not stop.
        drain: Function that drains the manager.
    """

    def __init__(self, events: EventBus, drain: Callable[[], Awaitable[Any]]) -> None:
        self._events = events
        self._drain = drain
        self._previous: dict[int, Handler] = {}
        self._context = contextvars.copy_context()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks = TaskSet(lambda _, error: events.emit_exception("internal_task_failed", error, task="ws-drain"))
        self._first_at: float | None = None
        self._second_signal = self._forwarded = False
        self._reported_unhandled = False
        self._timer: asyncio.TimerHandle | None = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def install(self) -> None:
        """Replace the signal handlers.

        This has no effect outside the main thread, or for a signal with a previous handler that is not callable.
        """
        self._loop = asyncio.get_running_loop()
        self._stop_timer()
        self._context = contextvars.copy_context()  # not the context of the code that a signal interrupts
        self._first_at, self._second_signal, self._forwarded = None, False, False
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED_SIGNALS:
                previous = signal.getsignal(number)
                # If the number is already stored, another library has wrapped our handler since an earlier start.
                if number not in self._previous and callable(previous):
                    self._previous[number] = previous
                    signal.signal(number, self._on_signal)
        if signal.SIGTERM not in self._previous and not self._reported_unhandled:
            self._reported_unhandled = True
            self._events.emit("signals_not_heard", logging.INFO)

    def restore(self) -> None:
        """Restore the previous handlers, if ours are still installed.

        If another library has wrapped ours, it stays installed and passes signals on.
        """
        self._loop = None
        self._stop_timer()
        if threading.current_thread() is not threading.main_thread():
            return
        if self._first_at is None or self._forwarded:
            self._restore()

    def _restore(self) -> None:
        for number, previous in list(self._previous.items()):
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, previous)
                del self._previous[number]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = monotonic()
        if self._loop is None and self._first_at is None:  # stopped, but a manager behind this one may still run
            previous = self._previous.get(number)
            if callable(previous):
                previous(number, frame)
            return
        if self._first_at is not None:
            if now - self._first_at < DUPLICATE_SIGNAL_WINDOW:
                return
            self._second_signal = True
        elif (loop := self._loop) is not None and loop.is_running():
            self._first_at = now
            loop.call_soon_threadsafe(self._start, loop, number, context=self._context)
            return
        self._forward(number)

    def _start(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        self._tasks.spawn(self._drain_and_forward(loop, number), name="ws-drain-first")

    async def _drain_and_forward(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        handlers = [handler for handler in self._handlers_in_chain(number) if handler._loop is loop]
        drains = [self._tasks.spawn(handler._run_drain(), name="ws-drain-on-signal") for handler in handlers]
        await wait_for_all(drains, None)
        if not self._second_signal:
            # Outside this task, because a handler that raises KeyboardInterrupt has to stop the event loop.
            loop.call_soon(self._forward, number)

    async def _run_drain(self) -> None:
        await self._drain()

    def _handlers_in_chain(self, number: int) -> list[SignalHandler]:
        """Return this handler, and those of other managers that it has replaced."""
        chain = [self]
        while isinstance(previous := getattr(chain[-1]._previous.get(number), "__self__", None), SignalHandler):
            chain.append(previous)
        return chain

    def _forward(self, number: int) -> None:
        previous = self._handlers_in_chain(number)[-1]._previous.get(number)
        self._forwarded = True
        if self._loop is None:
            self._restore()
        if callable(previous):
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._watch_end, number, previous, context=self._context)
            previous(number, None)

    def _watch_end(self, number: int, handler: Handler) -> None:
        """Start the timer for `still_running`.

        If the previous handler does nothing, the process continues and rejects every connection.
        """
        self._stop_timer()
        if (loop := self._loop) is not None and self._forwarded:
            after, context = STILL_RUNNING_DELAY, self._context
            self._timer = loop.call_later(after, self._report_still_running, number, handler, context=context)

    def _report_still_running(self, number: int, handler: Handler) -> None:
        self._timer = None
        name = f"{getattr(handler, '__module__', '')}.{getattr(handler, '__qualname__', repr(handler))}"
        self._events.emit(
            "still_running",
            logging.WARNING,
            signal=signal.Signals(number).name,
            handler=name,
            seconds=STILL_RUNNING_DELAY,
            problem="the connections are drained and the signal was passed on, but the lifespan has not ended; the "
            "manager rejects every new connection",
            advice="your signal handler must call the handler that it replaced, which stops the server; long requests "
            "also delay the end",
        )
