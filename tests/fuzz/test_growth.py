"""Tests of what the fuzzers report as growth."""

from __future__ import annotations

import pytest

from tests.fuzz.growth import MAX_BLOCKS, MAX_RESIDENT, SAMPLES, GrowingError, GrowthWatch

pytestmark = pytest.mark.generated


def watch() -> GrowthWatch:
    """Return a watch over a run of arbitrary duration."""
    return GrowthWatch(1.0, lambda: 0.0)


def test_steady_leak_is_growth() -> None:
    """Growth through all of the second half is reported, for small objects and for large ones."""
    for blocks, resident in ((MAX_BLOCKS // 4, 0), (0, MAX_RESIDENT // 4)):
        one = watch()
        with pytest.raises(GrowingError, match="memory grows"):
            for position in range(SAMPLES):
                one.note(position * blocks, position * resident)


def test_warm_up_is_not_growth() -> None:
    """Caches that fill in the first half, and a single step, are not reported."""
    one = watch()
    for position in range(SAMPLES):
        one.note(10**6 * min(position, SAMPLES // 2) + (MAX_BLOCKS // 2 if position > 20 else 0), 0)
    assert str(one) == f"blocks 0 {10**6 * (SAMPLES // 2)} {10**6 * (SAMPLES // 2) + MAX_BLOCKS // 2}, MiB 0 0 0"


def test_memory_is_measured_at_fixed_number_of_times() -> None:
    """Memory is measured a fixed number of times in a run, and not for each input."""
    now = 0.0
    one = GrowthWatch(SAMPLES, lambda: now)
    for second in range(10):
        now = float(second)
        one.look()
        one.look()
    assert len(one.blocks) == 9
    assert all(one.blocks)
