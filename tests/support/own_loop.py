"""An event loop for tests that are not async themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a new loop, and leave the thread's current loop alone, unlike `asyncio.run`."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        cancel_all_tasks(loop)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def cancel_all_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the tasks of a loop that is not running, and let them end.

    A task that is destroyed with its loop fails the test that collects it.
    """
    if left := asyncio.all_tasks(loop):
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
