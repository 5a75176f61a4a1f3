"""Tests of the histograms of durations."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.metrics import timings as histogram
from fastapi_ws_stabilizer.metrics.timings import HANDLER_SECONDS, ROUND_TRIP_SECONDS, Histogram

BOUNDS = (0.1, 0.5, 2.0)


@given(st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 10))))
def test_bucket_counts_durations_up_to_its_bound(durations: list[float]) -> None:
    """Buckets are cumulative, a duration on a bound is inside, and the last bucket has all."""
    one = Histogram(BOUNDS)
    for seconds in durations:
        one.observe(seconds)
    bounds = (*BOUNDS, math.inf)
    assert list(one.buckets()) == [(bound, sum(seconds <= bound for seconds in durations)) for bound in bounds]
    assert one.count == len(durations)
    assert one.total == pytest.approx(sum(durations))


@pytest.mark.parametrize("bounds", [HANDLER_SECONDS, ROUND_TRIP_SECONDS])
def test_bucket_bounds_increase(bounds: tuple[float, ...]) -> None:
    """A bound that is not above the previous one would have a bucket that is always empty."""
    assert list(bounds) == sorted(set(bounds))


@pytest.mark.parametrize("error", [None, KeyError("x"), asyncio.CancelledError()])
async def test_failed_or_cancelled_call_is_timed(error: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is counted once, and its result or its error goes to the caller."""
    now = iter((10.0, 10.3))
    monkeypatch.setattr(histogram, "monotonic", lambda: next(now))

    async def work() -> str:
        if error is not None:
            raise error
        return "done"

    one = Histogram(BOUNDS)
    if error is None:
        assert await one.measure(work()) == "done"
    else:
        with pytest.raises(type(error)):
            await one.measure(work())
    assert list(one.buckets()) == [(0.1, 0), (0.5, 1), (2.0, 1), (math.inf, 1)]
    assert one.total == pytest.approx(0.3)
