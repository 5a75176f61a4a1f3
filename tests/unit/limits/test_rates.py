"""Tests of rates, token buckets and retry queues."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.limits.rates import MIN_WAIT, KeyedTokenBuckets, Rate, RetryQueue, TokenBucket

RATE = Rate(per_second=2.0, burst=10.0)


class ExactBucket:
    """Model of a bucket, with exact fractions and the plain rules."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.level = Fraction(rate.burst)
        self.at = Fraction(0)

    def flow(self, now: float) -> None:
        """Add the tokens of the time since the last call."""
        if now > self.at:
            self.level = min(
                Fraction(self.rate.burst), self.level + (Fraction(now) - self.at) * Fraction(self.rate.per_second)
            )
            self.at = Fraction(now)

    def take(self, cost: float, now: float) -> float:
        """Take the tokens, or return the seconds until they are available."""
        self.flow(now)
        if cost > self.rate.burst:
            return math.inf
        if self.level < cost:
            return float((Fraction(cost) - self.level) / Fraction(self.rate.per_second))
        self.level -= Fraction(cost)
        return 0.0


def quarters(least: int, most: int) -> st.SearchStrategy[float]:
    """Generate quarters, which floats add without rounding, so that comparisons are exact."""
    return st.integers(least, most).map(lambda number: number / 4)


RATES = st.builds(Rate, quarters(1, 40), quarters(1, 80))
STEPS = st.lists(st.tuples(quarters(-4, 12), quarters(0, 60)), min_size=20, max_size=60)  # seconds since the last, cost


# ── bucket ──


def test_new_bucket_is_full() -> None:
    """A new bucket is full at any time: one burst passes, and no more."""
    for now in (-5.0, 0.0, 1e9):
        bucket = TokenBucket()
        assert bucket.is_full(RATE, now)
        assert bucket.take(RATE, 10, now) == 0.0
        assert not bucket.is_full(RATE, now)
        assert bucket.take(RATE, 1, now) == 0.5
        assert bucket.take(RATE, 10, now + 5.0) == 0.0


def test_shortfall_below_min_wait_is_taken() -> None:
    """A take that lacks tokens for less than MIN_WAIT passes, and the bucket owes the missing tokens."""
    bucket = TokenBucket()
    bucket.take(RATE, 10, 0.0)
    assert bucket.take(RATE, 2, 1.0 - 2 * MIN_WAIT) == pytest.approx(2 * MIN_WAIT)
    assert bucket.take(RATE, 2, 1.0 - MIN_WAIT / 2) == 0.0
    assert bucket.take(RATE, 2, 1.0) == pytest.approx(1.0)


def test_rejected_take_costs_nothing() -> None:
    """A rejected take costs nothing, so a smaller one may still pass."""
    bucket = TokenBucket()
    bucket.take(RATE, 8, 0.0)
    assert [bucket.take(RATE, 4, 0.0) for _ in range(3)] == [1.0, 1.0, 1.0]
    assert bucket.take(RATE, 2, 0.0) == 0.0
    assert bucket.take(RATE, 4, 0.5) == 1.5
    assert bucket.take(RATE, 4, 2.0) == 0.0


def test_bucket_holds_at_most_one_burst() -> None:
    """A bucket holds at most one burst after any idle time."""
    bucket = TokenBucket()
    bucket.take(RATE, 10, 0.0)
    assert not bucket.is_full(RATE, 4.75)
    assert bucket.is_full(RATE, 5.0)
    assert bucket.take(RATE, 10, 1e9) == 0.0
    assert bucket.take(RATE, 1, 1e9) == 0.5


def test_take_over_burst_is_never_possible() -> None:
    """A take above the burst never passes, and it takes nothing."""
    bucket = TokenBucket()
    assert bucket.take(RATE, 10.000001, 0.0) == math.inf
    assert bucket.take(RATE, 10, 0.0) == 0.0
    assert bucket.take(RATE, 11, 1e9) == math.inf


def test_clock_going_backwards_changes_nothing() -> None:
    """A clock that goes back and forward again adds and removes no tokens."""
    bucket = TokenBucket()
    bucket.take(RATE, 10, 100.0)
    assert bucket.take(RATE, 2, 50.0) == 1.0
    assert bucket.take(RATE, 2, 99.0) == 1.0
    assert bucket.take(RATE, 2, 100.0) == 1.0
    assert bucket.take(RATE, 2, 101.0) == 0.0
    assert bucket.take(RATE, 2, 51.0) == 1.0


def test_bucket_follows_changed_rate() -> None:
    """Tokens that are missing in a bucket stay missing when its rate changes."""
    bucket = TokenBucket()
    bucket.take(RATE, 10, 0.0)
    assert bucket.take(Rate(1.0, 12.0), 3, 0.0) == 1.0
    assert bucket.take(Rate(1.0, 4.0), 1, 0.0) == 7.0


@given(RATES, STEPS)
def test_bucket_agrees_with_exact_model(rate: Rate, steps: list[tuple[float, float]]) -> None:
    """At any time, each take gives the answer of the exact model."""
    bucket, exact, now = TokenBucket(), ExactBucket(rate), 0.0
    for passed, cost in steps:
        now = max(0.0, now + passed)
        assert bucket.take(rate, cost, now) == exact.take(cost, now)
        assert bucket.is_full(rate, now) == (exact.level == rate.burst)


@given(RATES, STEPS)
def test_bucket_passes_exactly_rate_and_burst(rate: Rate, steps: list[tuple[float, float]]) -> None:
    """In any interval one burst plus the refill passes, and each rejected take would exceed that."""
    bucket, now = TokenBucket(), 0.0
    passed: list[tuple[float, float]] = []
    for seconds, cost in steps:
        now += abs(seconds)
        excesses = [
            sum(c for _, c in passed[first:]) + cost - rate.burst - rate.per_second * (now - passed[first][0])
            for first in range(len(passed))
        ]
        allowed = max([*excesses, cost - rate.burst]) <= 0
        assert (bucket.take(rate, cost, now) == 0.0) == allowed
        if allowed:
            passed.append((now, cost))


MANY = st.floats(1e-3, 1e9)


@given(
    st.builds(Rate, MANY, MANY),
    st.floats(0, 1e8),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), min_size=20, max_size=60),
)
def test_rounding_lets_nothing_extra_pass(rate: Rate, now: float, steps: list[tuple[float, float]]) -> None:
    """With any floats, no more passes than a burst, the refill, and the refill of MIN_WAIT."""
    bucket, first, total = TokenBucket(), now, 0.0
    for seconds, part in steps:
        now += seconds
        cost = part * rate.burst
        if bucket.take(rate, cost, now) == 0.0:
            total += cost
        most = rate.burst + rate.per_second * (now - first + MIN_WAIT)
        assert total <= most * (1 + 1e-9)


@given(st.builds(Rate, MANY, st.floats(1, 1000)), st.floats(0, 1e8), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_take_after_returned_wait_succeeds(rate: Rate, now: float, parts: list[float]) -> None:
    """A take after the returned wait succeeds despite rounding, and no returned wait is below MIN_WAIT."""
    rate = Rate(rate.per_second, rate.burst * rate.per_second)  # the burst covers some seconds
    bucket = TokenBucket()
    bucket.take(rate, rate.burst, now)
    for part in parts:
        wait = bucket.take(rate, part * rate.burst, now)
        assert wait == 0.0 or wait > MIN_WAIT
        now += wait
        assert wait == 0.0 or bucket.take(rate, part * rate.burst, now) == 0.0


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_non_positive_rate_raises(value: float) -> None:
    """A rate or burst that is zero, negative or not finite raises."""
    with pytest.raises(ValueError, match="per_second of a rate must be a number above zero"):
        Rate(value, 1.0)
    with pytest.raises(ValueError, match="burst of a rate must be a number above zero"):
        Rate(1.0, value)


# ── table of buckets ──


def test_each_key_has_its_own_bucket() -> None:
    """Each key has its own bucket."""
    table = KeyedTokenBuckets(RATE, max_keys=100)
    assert [table.take("ann", 10, 0.0), table.take("ann", 1, 0.0), table.take("bob", 10, 0.0)] == [0.0, 0.5, 0.0]
    assert len(table) == 2


def test_full_buckets_are_removed() -> None:
    """Each use removes up to two full buckets, so that the table follows the active keys."""
    table = KeyedTokenBuckets(RATE, max_keys=1000)
    for number in range(1000):
        table.take(f"sender {number}", 1, 0.0)
    assert len(table) == 1000
    table.take("ann", 1, 0.25)
    assert len(table) == 1000  # no bucket is full, so one is evicted
    for use in range(1, 999):
        table.take("ann", 1, 1.0 * use)
        assert len(table) == max(1, 1000 - 2 * use)


def test_partial_bucket_is_retained() -> None:
    """A partial bucket is retained until it is full, although other keys are used."""
    table = KeyedTokenBuckets(RATE, max_keys=1000)
    table.take("ann", 10, 0.0)
    for number in range(900):
        assert table.take(f"sender {number}", 1, 4.0) == 0.0
    assert table.take("ann", 10, 4.0) == 1.0


def test_full_table_evicts_least_recently_used_bucket() -> None:
    """A table has at most `max_keys` buckets, and evicts the least recently used one."""
    table = KeyedTokenBuckets(RATE, max_keys=3)
    for sender in ("ann", "bob", "cid", "ann", "dan"):
        table.take(sender, 5, 0.0)
    assert len(table) == 3
    assert [table.take(sender, 6, 0.0) for sender in ("ann", "cid", "dan")] == [3.0, 0.5, 0.5]
    assert table.take("bob", 10, 0.0) == 0.0
    assert table.take("ann", 10, 0.0) == 0.0  # evicted for bob


def test_known_key_evicts_no_bucket_from_full_table() -> None:
    """A full table evicts no bucket for a known key."""
    table = KeyedTokenBuckets(RATE, max_keys=2)
    for sender in ("ann", "bob", "bob", "ann", "bob"):
        table.take(sender, 3, 0.0)
    assert [table.take(sender, 10, 0.0) for sender in ("ann", "bob")] == [3.0, 4.5]


def test_rejected_take_counts_as_use() -> None:
    """A rejected take counts as use, because an evicted bucket would be full again."""
    table = KeyedTokenBuckets(RATE, max_keys=2)
    table.take("ann", 10, 0.0)
    for number in range(100):
        table.take(f"sender {number}", 10, 0.0)
        assert table.take("ann", 1, 0.0) == 0.5


@pytest.mark.parametrize("max_keys", [0, -1])
def test_table_without_capacity_raises(max_keys: int) -> None:
    """A table without capacity raises."""
    with pytest.raises(ValueError, match="max_keys must be at least 1"):
        KeyedTokenBuckets(RATE, max_keys)


@given(
    RATES,
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("abcdef"), quarters(-2, 12), quarters(0, 60)), min_size=20, max_size=60),
)
def test_bucket_removal_does_not_change_answers(
    rate: Rate, max_keys: int, steps: list[tuple[str, float, float]]
) -> None:
    """With at most `max_keys` active keys in one refill time, each answer is that of a permanent bucket.

    The table never has more than `max_keys` buckets.
    """
    table, now, fills = KeyedTokenBuckets(rate, max_keys), 0.0, rate.burst / rate.per_second
    exact: dict[str, ExactBucket] = {}
    used: dict[str, float] = {}
    for sender, passed, cost in steps:
        now = max(now, now + passed)
        if sum(at > now - fills for other, at in used.items() if other != sender) >= max_keys:
            continue
        used[sender] = now
        wait = table.take(sender, cost, now)
        assert wait == exact.setdefault(sender, ExactBucket(rate)).take(cost, now)
        assert len(table) <= max_keys


@given(st.lists(st.tuples(st.integers(0, 20), quarters(-2, 4), quarters(0, 60)), min_size=20), st.integers(1, 8))
def test_table_never_exceeds_max_keys(steps: list[tuple[int, float, float]], max_keys: int) -> None:
    """The table never has more than `max_keys` buckets, and no key gets more than a burst."""
    table, now = KeyedTokenBuckets(RATE, max_keys), 0.0
    for sender, passed, cost in steps:
        now += passed
        assert (table.take(str(sender), cost, now) == math.inf) == (cost > RATE.burst)
        assert 1 <= len(table) <= max_keys


def test_retry_queue_is_bounded() -> None:
    """A retry delay grows by at most 60 s, and further delays are spread over that time."""
    queue = RetryQueue(1.0)
    waits = [queue.next_delay("", 0.5, 0.0) for _ in range(2000)]
    assert waits[:60] == [0.5 + number for number in range(60)]
    assert max(waits) <= 60.5
    assert len({round(wait) for wait in waits[60:]}) > 50
    assert queue.next_delay("", 0.5, 1000.0) == 0.5, "the queue is empty after that time"


def test_retry_queues_are_bounded_by_max_keys() -> None:
    """Empty queues are removed, and the least recently used one is evicted above `max_keys`."""
    queue = RetryQueue(1.0, max_keys=10)
    for number in range(100):
        queue.next_delay(f"{number}", 1.0, 0.0)
    assert len(queue) == 10
    for number in range(100, 110):
        queue.next_delay(f"{number}", 1.0, 100.0)
    assert len(queue) <= 10
