"""A deadline for code that blocks, as Starlette's TestClient does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a thread; return its result or raise its error; fail if it takes longer.

    The thread is a daemon: a hanging call delays neither the other tests nor the end of the process.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True, name=f"within {seconds} s")
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"not done within {seconds} s: {function}"
    if errors:
        raise errors[0]
    return results[0]
