"""Hearing of the end before the server does: signals are taken, the drain runs, and then the server gets them."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any, Final

from fastapi_ws_stabilizer.reports import Reports
from fastapi_ws_stabilizer.tasks import TaskSet

HEARD: Final = (signal.SIGTERM, signal.SIGINT)

Handler = Any
"""What `signal.getsignal` gives: a function, a constant, or `None` for a handler that Python does not know."""


class Signals:
    """Stands before the handlers that a process has when it starts, and gives them back at the end.

    A first signal starts the drain, and is handed on when that is over. A second one is handed on at once, and so is
    the first if it is still waiting.

    Args:
        reports: Where it is told that signals cannot be heard.
        drain: What a first signal starts.
    """

    def __init__(self, reports: Reports, drain: Callable[[], Awaitable[Any]]) -> None:
        self._reports = reports
        self._drain = drain
        self._before: dict[int, Handler] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks = TaskSet(lambda _, error: reports.bug("internal_task_failed", error, task="ws-drain"))
        self._waiting: int | None = None

    def listen(self) -> None:
        """Take the signals. Only where that can be done: in the main thread, and over handlers that can be called."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._loop = asyncio.get_running_loop()
        for number in HEARD:
            before = signal.getsignal(number)
            if callable(before):
                self._before[number] = before
                signal.signal(number, self._heard)
        if signal.SIGTERM not in self._before:
            self._reports.tell("signals_not_heard", logging.INFO)

    def stop(self) -> None:
        """Give the handlers back, where they are still ours."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, before in self._before.items():
            if signal.getsignal(number) == self._heard:
                signal.signal(number, before)
        self._before.clear()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        loop = self._loop
        if self._waiting is None and loop is not None and loop.is_running():
            self._waiting = number
            loop.call_soon_threadsafe(self._start)
            return
        self._hand_on(number, frame)  # a second one means it

    def _start(self) -> None:
        self._tasks.spawn(self._drain_first(), name="ws-drain")

    async def _drain_first(self) -> None:
        try:
            await self._drain()
        finally:
            if self._waiting is not None:
                self._hand_on(self._waiting, None)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
