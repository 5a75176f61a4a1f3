"""Token buckets. The caller passes the time, in seconds of the monotonic clock."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

MIN_WAIT: Final = 1e-6
"""Shortage, in seconds of refill, below which tokens are granted as debt, because it may be a rounding error. A client
that waited exactly as long as it was asked to would otherwise be rejected again."""

PURGED_PER_CALL: Final = 2
"""Number of buckets that each call checks, and removes if they are full. A call adds at most one, so the table
shrinks."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Rate and burst of a token bucket.

    Attributes:
        per_second: Rate in the long run.
        burst: Maximum amount at once, when the bucket is full.

    Raises:
        ValueError: One of them is not above zero, or is infinite.
    """

    per_second: float
    burst: float

    def __post_init__(self) -> None:
        for name, value in (("per_second", self.per_second), ("burst", self.burst)):
            if not 0 < value < math.inf:
                raise ValueError(f"the {name} of a rate must be a number above zero, not {value!r}")


class TokenBucket:
    """Token bucket of one sender. A new bucket is full.

    The caller passes the rate to each call, which keeps a bucket small. Time that goes backwards changes nothing.
    """

    __slots__ = ("_at", "_deficit")

    def __init__(self) -> None:
        self._deficit = 0.0  # tokens missing from a full bucket; more than `burst` is a debt
        self._at = -math.inf

    def take(self, rate: Rate, cost: float, now: float) -> float:
        """Take tokens if there are enough.

        Args:
            rate: Rate and burst of the bucket.
            cost: Number of tokens.
            now: Time on the monotonic clock.

        Returns:
            0.0 if they were taken. Otherwise nothing is taken, and the result is the seconds until there are enough;
                `math.inf` if the cost is above the burst.
        """
        self._refill(rate, now)
        if cost > rate.burst:
            return math.inf
        deficit = self._deficit + cost - rate.burst
        if deficit > rate.per_second * MIN_WAIT:
            return deficit / rate.per_second
        self._deficit += cost
        return 0.0

    def is_full(self, rate: Rate, now: float) -> bool:
        """Whether it equals a new bucket."""
        self._refill(rate, now)
        return self._deficit <= 0

    def _refill(self, rate: Rate, now: float) -> None:
        if now > self._at:
            self._deficit = max(0.0, self._deficit - (now - self._at) * rate.per_second)
            self._at = now


class KeyedTokenBuckets:
    """Token buckets of many senders. Full ones are removed.

    There is no timer: each use checks the least recently used buckets. A full bucket stays until the bucket before it
    has refilled, at most `burst / per_second` seconds. So no bucket is removed too early as long as at most `max_keys`
    senders arrive within that time.

    Args:
        rate: Rate of each sender.
        max_keys: Maximum number of buckets. The least recently used one is removed first.

    Raises:
        ValueError: `max_keys` is below 1.
    """

    def __init__(self, rate: Rate, max_keys: int) -> None:
        if max_keys < 1:
            raise ValueError(f"max_keys must be at least 1, not {max_keys}")
        self._rate = rate
        self._max_keys = max_keys
        # The least recently used one comes first. In a plain dict, finding the first key after many deletions takes
        # linear time.
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        """Number of stored buckets."""
        return len(self._buckets)

    def take(self, key: str, cost: float, now: float) -> float:
        """Take tokens from the bucket of a sender if there are enough; as `TokenBucket.take`."""
        bucket = self._buckets.pop(key, None)
        if bucket is None:
            bucket = TokenBucket()
        self._forget(now)
        self._buckets[key] = bucket
        return bucket.take(self._rate, cost, now)

    def _forget(self, now: float) -> None:
        """Remove full buckets, and the least recently used one if the table is full."""
        for _ in range(PURGED_PER_CALL):
            first = next(iter(self._buckets), None)
            if first is None or not self._buckets[first].is_full(self._rate, now):
                break
            del self._buckets[first]
        if len(self._buckets) >= self._max_keys:
            self._buckets.popitem(last=False)


MAX_QUEUE: Final = 60.0
"""Maximum seconds over which rejected clients are spread."""


class RetryQueue:
    """Retry times of rejected clients: one after the other, at the rate at which they can be accepted.

    Without it all of them would retry at the same moment and be rejected again.

    Args:
        per_second: Clients per second that retry.
        max_keys: Maximum number of queues. The least recently used one is removed first.
    """

    def __init__(self, per_second: float, max_keys: int = 1) -> None:
        self._step = 1 / per_second
        self._max_keys = max_keys
        self._free: OrderedDict[str, float] = OrderedDict()  # time after the last scheduled retry

    def __len__(self) -> int:
        """Number of queues."""
        return len(self._free)

    def next_delay(self, key: str, least: float, now: float) -> float:
        """Return the seconds after which one more client may retry.

        Args:
            key: Key of the queue.
            least: Minimum seconds to wait.
            now: Time on the monotonic clock.
        """
        free = max(now + least, self._free.pop(key, now))
        wait = free - now
        if wait < least + MAX_QUEUE:
            free += self._step
        else:  # the queue is full, so the newest are spread over all of it
            wait = random.uniform(least, least + MAX_QUEUE)  # noqa: S311 (spreads load)
        for _ in range(PURGED_PER_CALL):
            first = next(iter(self._free), None)
            if first is None or (self._free[first] > now and len(self._free) < self._max_keys):
                break
            del self._free[first]
        self._free[key] = free
        return wait
