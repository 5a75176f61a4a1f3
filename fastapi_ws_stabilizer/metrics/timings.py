"""How long things take: counted by buckets, for as long as the process lives."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Iterator
from itertools import accumulate
from typing import Final, TypeVar

from fastapi_ws_stabilizer.clock import monotonic

T = TypeVar("T")

HANDLER_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds for message handlers: most take less than a millisecond."""

ROUND_TRIP_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 15.0, 30.0)
"""Upper bounds for round trips: from the same house to a phone in a tunnel."""


class Histogram:
    """How many durations were not longer than each of some bounds.

    Args:
        bounds: Upper bounds in seconds, in rising order.

    Attributes:
        bounds: They.
        total: The sum of all durations, in seconds.
    """

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, seconds: float) -> None:
        """Count one duration. Called on the event loop alone."""
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    async def around(self, awaitable: Awaitable[T]) -> T:
        """Wait for something and count how long that took, however it ended. Cancelling reaches what is waited for."""
        begun = monotonic()
        try:
            return await awaitable
        finally:
            self.observe(monotonic() - begun)

    @property
    def count(self) -> int:
        """How many durations there were."""
        return sum(self._counts)

    def buckets(self) -> Iterator[tuple[float, int]]:
        """Each bound with how many durations were not longer, infinity at the end."""
        return zip((*self.bounds, float("inf")), accumulate(self._counts), strict=True)


class Timings:
    """What is timed while `enable_metrics` is on.

    Attributes:
        handlers: Seconds that message handlers took.
        round_trips: Seconds of measured round trips.
    """

    __slots__ = ("handlers", "round_trips")

    def __init__(self) -> None:
        self.handlers = Histogram(HANDLER_SECONDS)
        self.round_trips = Histogram(ROUND_TRIP_SECONDS)
