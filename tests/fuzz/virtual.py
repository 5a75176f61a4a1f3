"""One event loop in virtual time for all inputs, so that an input needs no new loop and never waits."""

from __future__ import annotations

import asyncio
import atexit
import functools
import sys
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from tests.support.virtual_time import VirtualLoop

T = TypeVar("T")

OLD: Final = 1e6
"""Virtual seconds after which the loop is replaced: large times lose the resolution of asyncio's clock."""

DEADLINE: Final = 3600.0
"""Virtual seconds after which a run counts as hanging."""


@functools.cache
def _loop() -> VirtualLoop:
    loop = VirtualLoop()
    atexit.register(loop.close)
    return loop


@functools.cache
def _users_of_the_clock() -> tuple[Any, ...]:
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("fastapi_ws_stabilizer")]
    return tuple(module for module in modules if hasattr(module, "monotonic"))


def _give_up(loop: VirtualLoop) -> None:
    """Abandon a loop in which something may still hang."""
    _loop.cache_clear()
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    atexit.unregister(loop.close)
    loop.close()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, with the library's clock set to that of the loop.

    Raises:
        AssertionError: It hangs, left a task or a timer behind, or something failed in the background.
    """
    loop = _loop()
    failures: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: failures.append(context))
    clocks = [(module, module.monotonic) for module in _users_of_the_clock()]
    for module, _ in clocks:
        module.monotonic = loop.time
    try:
        result = loop.run_until_complete(asyncio.wait_for(coroutine, DEADLINE))
        left = asyncio.all_tasks(loop)
        assert not left, f"tasks are left: {left!r}"
    except BaseException:
        _give_up(loop)
        raise
    finally:
        for module, clock in clocks:
            module.monotonic = clock
    if loop.now > OLD:
        _give_up(loop)
    if failures:
        raise AssertionError(f"unhandled failures: {failures!r}") from failures[0].get("exception")
    return result
