"""Timers by name: of each there is one at most."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class NamedTimers:
    """The timers of one connection."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._running: dict[str, asyncio.TimerHandle] = {}

    def __contains__(self, name: object) -> bool:
        """Whether a timer runs."""
        return name in self._running

    def start(self, name: str, seconds: float, act: Callable[[], object]) -> None:
        """Call a function after some seconds, in the place of what was to be called under that name."""
        self.stop(name)

        def due() -> None:
            self._running.pop(name, None)
            act()

        self._running[name] = self._loop.call_later(seconds, due)

    def stop(self, name: str) -> None:
        """Call it no more. Nothing happens if it does not run."""
        timer = self._running.pop(name, None)
        if timer is not None:
            timer.cancel()

    def stop_all(self) -> None:
        """Call nothing any more."""
        for timer in self._running.values():
            timer.cancel()
        self._running.clear()
