"""Tests of the one place where time is read."""

from __future__ import annotations

import time

from fastapi_ws_stabilizer import clock


def test_durations_use_monotonic_clock() -> None:
    """The clock of durations never goes back, and is the event loop's own."""
    before = time.monotonic()
    assert before <= clock.monotonic() <= time.monotonic()
