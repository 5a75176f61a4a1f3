"""The one place where tasks are made: named, strongly held, their failure reported, closed together."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class TaskSet:
    """Tasks that belong to one owner.

    asyncio holds a running task only weakly; a task that nobody holds can vanish in the middle. This set holds each
    until it ends.

    Args:
        on_failure: Called with a task and its exception when a task fails. Cancellation is not a failure.
    """

    __slots__ = ("_on_failure", "_tasks")

    def __init__(self, on_failure: Callable[[asyncio.Task[Any], BaseException], None]) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_failure = on_failure

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(
        self, coroutine: Coroutine[Any, Any, T], *, name: str, context: contextvars.Context | None = None
    ) -> asyncio.Task[T]:
        """Start a task and hold it until it ends.

        Args:
            coroutine: What to run.
            name: The task's name, as it shows in `asyncio.all_tasks()`.
            context: The contextvars that it starts with; the caller's when left out.
        """
        create = asyncio.get_running_loop().create_task
        # create_task(context=...) needs Python 3.11; a task copies the context that it is created in on all versions.
        task = create(coroutine, name=name) if context is None else context.run(create, coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(task, error)

    def cancel(self) -> list[asyncio.Task[Any]]:
        """Cancel all tasks but the current one and return them, so that the caller can wait for their end."""
        current = asyncio.current_task()
        cancelled = [task for task in self._tasks if task is not current]
        for task in cancelled:
            task.cancel()
        return cancelled


async def wait_for_all(futures: Iterable[asyncio.Future[Any]], timeout: float | None) -> bool:
    """Wait until all futures are done, at most `timeout` seconds; tell whether they are.

    Neither the timeout nor a cancellation of the caller touches the futures.
    """
    pending = {future for future in futures if not future.done()}
    if pending:
        _, pending = await asyncio.wait(pending, timeout=timeout)
    return not pending
