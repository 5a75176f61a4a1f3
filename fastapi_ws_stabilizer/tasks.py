"""Creation of tasks: each has a name and a strong reference, and a failure is reported.

No other module creates tasks.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import sys
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def copied(context: contextvars.Context | None) -> contextvars.Context | None:
    """Return a copy of a context, for a task that may start while the context is in use; `None` for `None`."""
    return None if context is None else context.copy()


def start(
    coroutine: Coroutine[Any, Any, T], *, name: str, context: contextvars.Context | None = None
) -> asyncio.Task[T]:
    """Start a task. The caller holds the reference and reports a failure. All other tasks belong in a `TaskSet`.

    Args:
        coroutine: The coroutine to run.
        name: Name of the task, for `asyncio.all_tasks()`.
        context: Context variables of the task. `None` copies those of the caller.
    """
    create = asyncio.get_running_loop().create_task
    if context is None:
        return create(coroutine, name=name)
    if sys.version_info >= (3, 11):
        return create(coroutine, name=name, context=context)
    return context.run(create, coroutine, name=name)  # on Python 3.10 the task copies this context


def start_from_thread(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]
) -> concurrent.futures.Future[T]:
    """Start a task on an event loop that runs in another thread, and return a future for the calling thread.

    Cancelling the future cancels the task.

    Raises:
        RuntimeError: The loop is closed.
    """
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:
        coroutine.close()
        raise


class TaskSet:
    """Set of running tasks that belong to one owner.

    asyncio holds only a weak reference to a task, so a task without another reference can be collected while it runs.
    This set holds each task until it ends.

    Args:
        on_failure: Function that gets a task and its exception when a task fails. Cancellation is not a failure.
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
            coroutine: The coroutine to run.
            name: Name of the task, for `asyncio.all_tasks()`.
            context: Context variables of the task. `None` copies those of the caller.
            eager: Whether the task runs immediately until it first waits, so that it may be done when this returns.
                Before Python 3.12 the task starts in the next iteration of the event loop.
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
        task.add_done_callback(self._ended, context=context)  # without a context, it would hold the caller's
        return task

    async def run_with_timeout(
        self, coroutine: Coroutine[Any, Any, T], limit: float, *, name: str, title: str, option: str
    ) -> T:
        """Run user code in a task for at most `limit` seconds, then cancel it without waiting for its cleanup.

        Args:
            coroutine: The coroutine to run.
            limit: Seconds that it may take.
            name: Name of the task.
            title: What the coroutine is, for the text of an error.
            option: The option that sets `limit`, for the text of an error.

        Raises:
            TimeoutError: It took longer.
            RuntimeError: It was cancelled by an operation that it awaited.
        """
        task = self.spawn(coroutine, name=name)
        try:
            in_time = await wait_for_all([task], limit)
            if not in_time:
                task.cancel()
                raise TimeoutError(f"{title} took longer than {option}, {limit} seconds")
            if task.cancelled():
                raise RuntimeError(f"{title} was cancelled by an operation that it awaited")
            return task.result()
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            del task  # its exception refers to this frame

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(task, error)

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """The running tasks."""
        return list(self._tasks)

    def cancel(self) -> list[asyncio.Task[Any]]:
        """Cancel all tasks except the current one, and return them so that the caller can wait for them."""
        current = asyncio.current_task()
        cancelled = [task for task in self._tasks if task is not current]
        for task in cancelled:
            task.cancel()
        return cancelled


async def wait_for_all(futures: Iterable[asyncio.Future[Any]], timeout: float | None) -> bool:
    """Wait at most `timeout` seconds until all futures are done, and return whether they are.

    Neither the timeout nor a cancellation of the caller affects the futures. The timer has an empty context, unlike
    that of `asyncio.wait`, because a cancelled timer and its context stay in the event loop until the timer is due.
    """
    pending = {future for future in futures if not future.done()}
    if pending:
        await _wait_for(pending, len(pending), timeout)
    return all(future.done() for future in pending)


async def wait_for_first(futures: Iterable[asyncio.Future[Any]], timeout: float | None = None) -> bool:
    """Wait at most `timeout` seconds until one of the futures is done, and return whether one is.

    As with `wait_for_all`, neither the timeout nor a cancellation of the caller affects the futures.
    """
    pending = set(futures)
    if not any(future.done() for future in pending):
        await _wait_for(pending, 1, timeout)
    return any(future.done() for future in pending)


async def _wait_for(pending: set[asyncio.Future[Any]], count: int, timeout: float | None) -> None:
    """Wait until `count` of these futures are done. None of them is done yet."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def on_done(_: asyncio.Future[Any]) -> None:
        nonlocal count
        count -= 1
        if count <= 0:
            _set(done)

    for future in pending:
        future.add_done_callback(on_done)
    timer = None if timeout is None else loop.call_later(max(0.0, timeout), _set, done, context=contextvars.Context())
    try:
        await done
    finally:
        if timer is not None:
            timer.cancel()
        for future in pending:
            future.remove_done_callback(on_done)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class LazyEvent:
    """Event that is set at most once. It creates a future only when code waits for it."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state: asyncio.Future[None] | bool = False

    @property
    def is_set(self) -> bool:
        """Whether the event is set."""
        return self._state if isinstance(self._state, bool) else self._state.done()

    def set(self) -> None:
        """Set the event. Further calls change nothing."""
        if isinstance(self._state, bool):
            self._state = True
        elif not self._state.done():
            self._state.set_result(None)

    @property
    def future(self) -> asyncio.Future[None]:
        """A shared future that is done when the event is set. Wait for it with `asyncio.wait`, or shield it."""
        if isinstance(self._state, bool):
            is_set, self._state = self._state, asyncio.get_running_loop().create_future()
            if is_set:
                self._state.set_result(None)
        return self._state


class StartedCoroutine:
    """Coroutine that was started outside a task and now waits. Await it once to run the rest."""

    __slots__ = ("_coroutine", "_waits_for")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def close(self) -> None:
        """Close the coroutine without running the rest."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine, waits_for = self._coroutine, self._waits_for
        while True:
            try:
                try:
                    value = yield waits_for
                except BaseException as error:  # belongs to the coroutine, such as a cancellation
                    waits_for = coroutine.throw(error)
                else:
                    waits_for = coroutine.send(value)
            except StopIteration as stop:
                return stop.value


def start_inline(coroutine: Coroutine[Any, Any, Any]) -> StartedCoroutine | None:
    """Run a coroutine without a task until it first waits.

    The task that awaits the returned rest also waits for what the coroutine waits for, as in an eager task. The
    coroutine must not depend on the current task.

    Returns:
        The rest of the coroutine; `None` if it ended without waiting.

    Raises:
        Exception: Any exception of the coroutine before it first waits.
    """
    try:
        return StartedCoroutine(coroutine, coroutine.send(None))
    except StopIteration:
        return None
