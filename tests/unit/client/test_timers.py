"""Tests of timers by name."""

from __future__ import annotations

import asyncio

from fastapi_ws_stabilizer.client.timers import NamedTimers
from tests.support.fake_link import virtually


@virtually
async def test_timer_fires_once_when_due() -> None:
    """A timer runs until it has fired, and can be restarted in its own callback."""
    timers, called = NamedTimers(), []

    def act() -> None:
        called.append("once")
        assert "x" not in timers
        if len(called) == 1:
            timers.start("x", 1, act)

    timers.start("x", 1, act)
    assert "x" in timers
    await asyncio.sleep(0.9)
    assert called == []
    await asyncio.sleep(0.2)
    assert (called, "x" in timers) == (["once"], True)
    await asyncio.sleep(5)
    assert (called, "x" in timers) == (["once", "once"], False)


@virtually
async def test_timer_with_same_name_replaces_earlier() -> None:
    """Restarting a timer replaces it, and does not affect timers with other names."""
    timers, called = NamedTimers(), []
    timers.start("x", 1, lambda: called.append("first"))
    timers.start("y", 1, lambda: called.append("other"))
    timers.start("x", 2, lambda: called.append("second"))
    await asyncio.sleep(5)
    assert called == ["other", "second"]


@virtually
async def test_stopped_timer_does_not_fire() -> None:
    """Stopping one timer or all of them prevents the call, also when repeated or before a start."""
    timers, called = NamedTimers(), []
    timers.stop("x")
    for name in "xyz":
        timers.start(name, 1, lambda: called.append("late"))
    timers.stop("x")
    timers.stop("x")
    assert ("x" in timers, "y" in timers) == (False, True)
    timers.stop_all()
    await asyncio.sleep(5)
    assert called == []
    assert "y" not in timers
