"""The one place where tasks are made: named, strongly held, their failure reported, closed together."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import sys
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def copied(context: contextvars.Context | None) -> contextvars.Context | None:
    """A copy of a context, for a task that may be started while the context itself is in use; `None` of `None`."""
    return None if context is None else context.copy()


def start(
    coroutine: Coroutine[Any, Any, T], *, name: str, context: contextvars.Context | None = None
) -> asyncio.Task[T]:
    """Start a task that its caller holds, whose failure it reports itself. All others belong into a `TaskSet`.

    Args:
        coroutine: What to run.
        name: The task's name, as it shows in `asyncio.all_tasks()`.
        context: The contextvars that it starts with; the caller's when left out.
    """
    create = asyncio.get_running_loop().create_task
    if context is None:
        return create(coroutine, name=name)
    if sys.version_info >= (3, 11):
        return create(coroutine, name=name, context=context)
    return context.run(create, coroutine, name=name)  # which copies it, as all tasks do there


def start_from_thread(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]
) -> concurrent.futures.Future[T]:
    """Start a task on an event loop that runs in another thread, which waits for its result.

    Cancelling what is returned cancels the task.

    Raises:
        RuntimeError: The loop is closed.
    """
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:
        coroutine.close()
        raise


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
        self,
        coroutine: Coroutine[Any, Any, T],
        *,
        name: str,
        context: contextvars.Context | None = None,
        eager: bool = False,
    ) -> asyncio.Task[T]:
        """Start a task and hold it until it ends.

        Args:
            coroutine: What to run.
            name: The task's name, as it shows in `asyncio.all_tasks()`.
            context: The contextvars that it starts with; the caller's when left out.
            eager: Whether it runs at once until it waits, so that it may be done when this returns. From Python 3.12
                on; on older ones it starts in the next turn of the event loop as any other.
        """
        if eager and sys.version_info >= (3, 12):
            loop = asyncio.get_running_loop()
            task = asyncio.Task(coroutine, loop=loop, name=name, context=context, eager_start=True)
            if task.done():
                self._ended(task)
                return task
        else:
            task = start(coroutine, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._ended, context=context)  # else it holds the context of whoever has started it
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(task, error)

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """Those that run."""
        return list(self._tasks)

    def cancel(self) -> list[asyncio.Task[Any]]:
        """Cancel all tasks but the current one and return them, so that the caller can wait for their end."""
        current = asyncio.current_task()
        cancelled = [task for task in self._tasks if task is not current]
        for task in cancelled:
            task.cancel()
        return cancelled


async def wait_for_all(futures: Iterable[asyncio.Future[Any]], timeout: float | None) -> bool:
    """Wait until all futures are done, at most `timeout` seconds; tell whether they are.

    Neither the timeout nor a cancellation of the caller touches the futures. Unlike that of `asyncio.wait`, the timer
    holds nothing of the caller: one that was cancelled stays in the event loop until its time, with its context.
    """
    pending = {future for future in futures if not future.done()}
    if pending:
        await _wait_for(pending, len(pending), timeout)
    return all(future.done() for future in pending)


async def wait_for_first(futures: Iterable[asyncio.Future[Any]], timeout: float | None = None) -> bool:
    """Wait until one of the futures is done, at most `timeout` seconds; tell whether one is. As `wait_for_all`."""
    everyone = set(futures)
    if not any(future.done() for future in everyone):
        await _wait_for(everyone, 1, timeout)
    return any(future.done() for future in everyone)


async def _wait_for(pending: set[asyncio.Future[Any]], left: int, timeout: float | None) -> None:
    """Wait until as many of these futures are done, none of which is yet."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def one_is_done(_: asyncio.Future[Any]) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            _set(over)

    for future in pending:
        future.add_done_callback(one_is_done)
    timer = None if timeout is None else loop.call_later(max(0.0, timeout), _set, over, context=contextvars.Context())
    try:
        await over
    finally:
        if timer is not None:
            timer.cancel()
        for future in pending:
            future.remove_done_callback(one_is_done)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class LazyEvent:
    """Something that happens once. A future of it is made only if somebody waits."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state: asyncio.Future[None] | bool = False

    @property
    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._state if isinstance(self._state, bool) else self._state.done()

    def set(self) -> None:
        """It has happened. Setting it again changes nothing."""
        if isinstance(self._state, bool):
            self._state = True
        elif not self._state.done():
            self._state.set_result(None)

    @property
    def future(self) -> asyncio.Future[None]:
        """A future that is done when it has happened. Shared: wait for it with `asyncio.wait` or shield it."""
        if isinstance(self._state, bool):
            happened, self._state = self._state, asyncio.get_running_loop().create_future()
            if happened:
                self._state.set_result(None)
        return self._state


class StartedCoroutine:
    """A coroutine that was begun outside of a task, and waits for something. Await it, once, to run the rest."""

    __slots__ = ("_coroutine", "_waits_for")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def close(self) -> None:
        """Give the rest up."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine, waits_for = self._coroutine, self._waits_for
        while True:
            try:
                try:
                    value = yield waits_for
                except BaseException as error:  # the coroutine's, which knows what to do with it
                    waits_for = coroutine.throw(error)
                else:
                    waits_for = coroutine.send(value)
            except StopIteration as over:
                return over.value


def start_inline(coroutine: Coroutine[Any, Any, Any]) -> StartedCoroutine | None:
    """Run a coroutine, here and without a task, until it waits; `None` if it has ended without.

    What is awaited is handed on to the task that goes on with it, as an eager task would. Meant for coroutines that do
    not ask which task they run in.

    Raises:
        Exception: Whatever the coroutine raised before it waited.
    """
    try:
        return StartedCoroutine(coroutine, coroutine.send(None))
    except StopIteration:
        return None
