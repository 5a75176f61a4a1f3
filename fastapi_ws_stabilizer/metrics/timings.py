"""Histograms of durations since the start of the manager."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Iterator
from itertools import accumulate
from typing import Final, TypeVar

from fastapi_ws_stabilizer.clock import monotonic

T = TypeVar("T")

HANDLER_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds for message handlers in seconds. Most handlers take less than 1 ms."""

ROUND_TRIP_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 15.0, 30.0)
"""Upper bounds for round trips in seconds, from a local network to a bad mobile connection."""


class Histogram:
    """Histogram of durations with fixed bounds.

    Args:
        bounds: Upper bounds in seconds, ascending.

    Attributes:
        bounds: Upper bounds in seconds, ascending.
        total: Sum of all durations in seconds.
    """

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, seconds: float) -> None:
        """Count one duration. Only the event loop's thread may call this."""
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    async def measure(self, awaitable: Awaitable[T]) -> T:
        """Await an awaitable, count its duration, and return its result. A failure counts too.

        Cancelling cancels the awaitable.
        """
        started = monotonic()
        try:
            return await awaitable
        finally:
            self.observe(monotonic() - started)

    @property
    def count(self) -> int:
        """Number of durations."""
        return sum(self._counts)

    def buckets(self) -> Iterator[tuple[float, int]]:
        """Return each bound with the number of durations up to it. The last bound is infinity."""
        return zip((*self.bounds, float("inf")), accumulate(self._counts), strict=True)


class Timings:
    """Histograms that are filled with `enable_metrics=True`.

    Attributes:
        handlers: Durations of message handlers.
        round_trips: Measured round trips.
    """

    __slots__ = ("handlers", "round_trips")

    def __init__(self) -> None:
        self.handlers = Histogram(HANDLER_SECONDS)
        self.round_trips = Histogram(ROUND_TRIP_SECONDS)
