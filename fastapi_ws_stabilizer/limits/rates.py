"""How often, and how much: token buckets. Time is told by the caller, in seconds of the monotonic clock."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

MIN_WAIT: Final = 1e-6
"""Seconds. What lacks for less than that may be taken and is owed: it can be as little as rounding makes of nothing,
and somebody who waited as long as was said would be told to wait again, for no time at all."""

PURGED_PER_CALL: Final = 2
"""Buckets that each use of a table looks at, to forget them. It adds one at most, so the table gets smaller."""


@dataclass(frozen=True, slots=True)
class Rate:
    """How much may pass.

    Attributes:
        per_second: In the long run.
        burst: At once, by somebody who was quiet for long enough.

    Raises:
        ValueError: One of them is not above zero, or is infinite.
    """

    per_second: float
    burst: float

    def __post_init__(self) -> None:
        for name, value in (("per_second", self.per_second), ("burst", self.burst)):
            if not 0 < value < math.inf:
                raise ValueError(f"the {name} of a rate is a number above zero, not {value!r}")


class TokenBucket:
    """What one sender may still send. A new bucket is full.

    The rate is told at each use, so that a bucket is small. Time that goes backwards changes nothing.
    """

    __slots__ = ("_at", "_missing")

    def __init__(self) -> None:
        self._missing = 0.0  # to a full one; above `burst` it is a debt
        self._at = -math.inf

    def take(self, rate: Rate, cost: float, now: float) -> float:
        """Take something if there is enough.

        Args:
            rate: What flows in, and what there is room for.
            cost: How much to take.
            now: The time.

        Returns:
            0.0 if it was taken. Otherwise nothing is, and it is the seconds until there will be enough; `math.inf` if
            it is more than there is ever room for.
        """
        self._flow(rate, now)
        if cost > rate.burst:
            return math.inf
        lacking = self._missing + cost - rate.burst
        if lacking > rate.per_second * MIN_WAIT:
            return lacking / rate.per_second
        self._missing += cost
        return 0.0

    def spend(self, rate: Rate, cost: float, now: float) -> bool:
        """Take something of any size, as long as anything is left; what was not there is owed.

        For the bytes of a message, whose size nobody could choose to fit.

        Args:
            rate: What flows in, and what there is room for.
            cost: How much to take.
            now: The time.

        Returns:
            Whether it was taken. Otherwise nothing is.
        """
        self._flow(rate, now)
        if self._missing >= rate.burst:
            return False
        self._missing += cost
        return True

    def is_full(self, rate: Rate, now: float) -> bool:
        """Whether it is as good as a new one."""
        self._flow(rate, now)
        return self._missing <= 0

    def _flow(self, rate: Rate, now: float) -> None:
        if now > self._at:
            self._missing = max(0.0, self._missing - (now - self._at) * rate.per_second)
            self._at = now


class KeyedTokenBuckets:
    """A bucket for each of many senders, of which the full ones are forgotten again.

    There is no timer: each use looks at the buckets that were used longest ago. A full one behind one that is not waits
    for it, at most for the seconds in which an empty bucket fills. So nobody's bucket is forgotten too early as long as
    no more than `max_keys` senders come within these seconds.

    Args:
        rate: What each of them may send.
        max_keys: How many buckets there are at most. The one used longest ago makes room.

    Raises:
        ValueError: There is room for none.
    """

    def __init__(self, rate: Rate, max_keys: int) -> None:
        if max_keys < 1:
            raise ValueError(f"a table has room for one key at least, not for {max_keys}")
        self._rate = rate
        self._max_keys = max_keys
        # The one used longest ago comes first. A plain dict would search for it behind all that were removed before it.
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        """How many senders are remembered."""
        return len(self._buckets)

    def take(self, key: str, cost: float, now: float) -> float:
        """Take something from the bucket of a sender if there is enough; as `TokenBucket.take`."""
        bucket = self._buckets.pop(key, None)
        if bucket is None:
            bucket = TokenBucket()
        self._forget(now)
        self._buckets[key] = bucket
        return bucket.take(self._rate, cost, now)

    def _forget(self, now: float) -> None:
        """Forget full buckets, and whatever is in the way of one more."""
        for _ in range(PURGED_PER_CALL):
            first = next(iter(self._buckets), None)
            if first is None or not self._buckets[first].is_full(self._rate, now):
                break
            del self._buckets[first]
        if len(self._buckets) >= self._max_keys:
            self._buckets.popitem(last=False)


MAX_QUEUE: Final = 60.0
"""Seconds over which those who are refused are spread at most."""


class RetryQueue:
    """When refused clients may try again: one after the other, as fast as they can be let in.

    Without that all of them would come back in the same moment, and be refused again.

    Args:
        per_second: How many come back in a second.
        max_keys: How many queues there are at most. The one used longest ago makes room.
    """

    def __init__(self, per_second: float, max_keys: int = 1) -> None:
        self._step = 1 / per_second
        self._max_keys = max_keys
        self._free: OrderedDict[str, float] = OrderedDict()  # the time from which on nobody is expected back

    def __len__(self) -> int:
        """How many queues there are."""
        return len(self._free)

    def wait(self, key: str, least: float, now: float) -> float:
        """Seconds after which one more may try again.

        Args:
            key: In which queue it stands.
            least: Seconds that the first one in it waits.
            now: The time.
        """
        free = max(now + least, self._free.pop(key, now))
        wait = free - now
        if wait < least + MAX_QUEUE:
            free += self._step
        else:  # it is full, so the newest are spread over all of it
            wait = random.uniform(least, least + MAX_QUEUE)  # noqa: S311 (spreads load)
        for _ in range(PURGED_PER_CALL):
            first = next(iter(self._free), None)
            if first is None or (self._free[first] > now and len(self._free) < self._max_keys):
                break
            del self._free[first]
        self._free[key] = free
        return wait
