"""Tests of the only module that reads the time."""

from __future__ import annotations

import time

from fastapi_ws_stabilizer import clock


def test_durations_use_monotonic_clock() -> None:
    """Durations use a monotonic clock, the event loop's own."""
    before = time.monotonic()
    assert before <= clock.monotonic() <= time.monotonic()
