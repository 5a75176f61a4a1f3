"""Named timers, at most one for each name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class NamedTimers:
    """Timers of one connection."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._running: dict[str, asyncio.TimerHandle] = {}

    def __contains__(self, name: object) -> bool:
        """Return whether a timer is running."""
        return name in self._running

    def start(self, name: str, seconds: float, act: Callable[[], object]) -> None:
        """Call a function after some seconds, instead of an earlier one with the same name."""
        self.stop(name)

        def due() -> None:
            self._running.pop(name, None)
            act()

        self._running[name] = self._loop.call_later(seconds, due)

    def stop(self, name: str) -> None:
        """Stop a timer. A timer that is not running is ignored."""
        timer = self._running.pop(name, None)
        if timer is not None:
            timer.cancel()

    def stop_all(self) -> None:
        """Stop all timers."""
        for timer in self._running.values():
            timer.cancel()
        self._running.clear()
