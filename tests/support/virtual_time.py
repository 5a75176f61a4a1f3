"""An event loop that moves its clock to the next timer as soon as nothing is left to do."""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

from tests.support.own_loop import cancel_all_tasks

T = TypeVar("T")


MAX_TURNS = 10_000
"""Iterations of the loop for which the clock does not move."""


class _NoWaiting(selectors.SelectSelector):
    """Selector that never waits: a wait moves the clock instead."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError("deadlock: no timer is set and no callback is ready")
        self._loop.now += timeout
        self._turns = 0 if timeout else self._turns + 1
        if self._turns and self._turns % 1000 == 0:
            self._loop.now += 1e-9  # sums of floats miss a deadline by a rounding error: on a real clock it passes
        if self._turns > MAX_TURNS:
            raise AssertionError("the loop keeps running without time passing")
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Loop in which time passes only while everything waits.

    Attributes:
        now: Seconds since it was created.
    """

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_NoWaiting(self))

    def time(self) -> float:
        return self.now


def run_virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a new loop, with the library's clock set to that of the loop."""
    loop = VirtualLoop()
    clocks = [
        mock.patch.object(module, "monotonic", loop.time)
        for name, module in list(sys.modules.items())
        if name.startswith("fastapi_ws_stabilizer") and hasattr(module, "monotonic")
    ]
    for clock in clocks:
        clock.start()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        cancel_all_tasks(loop)
        for clock in clocks:
            clock.stop()
        loop.close()
