"""Whether user code is at work on what a connection has received."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Activity:
    """Counts who is at work, and tells when nobody is. The disconnect hooks wait for that."""

    __slots__ = ("_count", "_idle")

    def __init__(self) -> None:
        self._count = 0
        self._idle: asyncio.Future[None] | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Be at work for the length of a block."""
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            if not self._count and self._idle is not None and not self._idle.done():
                self._idle.set_result(None)

    def idle(self) -> asyncio.Future[None]:
        """A future that is done as soon as nobody is at work."""
        self._idle = asyncio.get_running_loop().create_future()
        if not self._count:
            self._idle.set_result(None)
        return self._idle
