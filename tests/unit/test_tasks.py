"""Tests of the only module that creates tasks."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from typing import Any

import pytest

from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all, wait_for_first
from tests.support.fake_websocket import settle, with_deadline

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


def make() -> tuple[TaskSet, list[tuple[str, BaseException]]]:
    """Return a task set, and the failures that it reports."""
    failures: list[tuple[str, BaseException]] = []
    return TaskSet(lambda task, error: failures.append((task.get_name(), error))), failures


async def test_task_has_name_and_returns_result() -> None:
    """A spawned task is named, and can be awaited like any other."""
    tasks, failures = make()

    async def work() -> int:
        return 7

    task = tasks.spawn(work(), name="ws-seven")
    assert task.get_name() == "ws-seven"
    assert await task == 7
    assert failures == []


async def test_running_task_is_referenced_until_it_ends() -> None:
    """A running task survives the garbage collector, and an ended one is released."""
    tasks, _ = make()
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        waiting = asyncio.get_running_loop().create_future()
        inner.append(weakref.ref(waiting))
        asyncio.get_running_loop().call_later(0.01, lambda ref=inner[0]: ref() is not None and ref().set_result(None))
        await waiting
        finished.set_result(None)

    inner: list[weakref.ref[asyncio.Future[None]]] = []
    tasks.spawn(work(), name="held")
    assert len(tasks) == 1
    await settle()
    gc.collect()
    await with_deadline(finished)
    await settle()
    assert len(tasks) == 0


async def test_task_failure_is_reported_once() -> None:
    """The exception of a task is reported to the owner of the set, once."""
    tasks, failures = make()
    error = ValueError("no")

    async def fail() -> None:
        raise error

    tasks.spawn(fail(), name="failing")
    await settle()
    assert failures == [("failing", error)]
    assert len(tasks) == 0


async def test_cancelled_task_is_not_reported() -> None:
    """A cancelled task is not reported."""
    tasks, failures = make()
    task = tasks.spawn(asyncio.Event().wait(), name="waiting")
    assert tasks.cancel() == [task]
    await settle()
    assert task.cancelled()
    assert failures == []


async def test_task_cancelling_its_set_is_not_cancelled() -> None:
    """The task that cancels its set continues, and gets only the other tasks."""
    tasks, _ = make()

    async def closer() -> list[str]:
        return [task.get_name() for task in tasks.cancel()]

    other = tasks.spawn(asyncio.Event().wait(), name="other")
    closing = tasks.spawn(closer(), name="closer")
    assert await with_deadline(closing) == ["other"]
    await settle()
    assert other.cancelled()


async def test_task_runs_in_given_context() -> None:
    """Context variables come from the given context, or otherwise from the caller's."""
    tasks, _ = make()

    async def look() -> str:
        return VARIABLE.get()

    context = contextvars.copy_context()
    context.run(VARIABLE.set, "given")
    token = VARIABLE.set("callers")
    try:
        assert await tasks.spawn(look(), name="given", context=context) == "given"
        assert await tasks.spawn(look(), name="callers") == "callers"
    finally:
        VARIABLE.reset(token)


async def test_wait_for_done_futures_does_not_yield() -> None:
    """Done futures are not awaited, and an empty list is allowed."""
    done = asyncio.get_running_loop().create_future()
    done.set_result(None)
    assert await wait_for_all([done], 0.0)
    assert await wait_for_all([], None)


async def test_timed_out_wait_leaves_futures_pending() -> None:
    """After the timeout the futures are still pending, and the result is `False`."""
    future = asyncio.get_running_loop().create_future()
    assert not await wait_for_all([future], 0.01)
    assert not future.done()


async def test_cancelled_wait_leaves_futures_pending() -> None:
    """A cancellation of the waiting task does not reach the futures."""
    future = asyncio.get_running_loop().create_future()
    waiter = asyncio.ensure_future(wait_for_all([future], None))
    await settle()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert not future.done()


async def test_failed_future_counts_as_done() -> None:
    """The result says whether all are done; their exceptions are not raised."""
    future = asyncio.get_running_loop().create_future()
    future.set_exception(ValueError("no"))
    assert await wait_for_all([future], 0.0)
    with pytest.raises(ValueError, match="no"):
        future.result()


async def test_wait_first_returns_with_first_future() -> None:
    """The first completed future ends the wait, and the others are unaffected."""
    first, second = (asyncio.get_running_loop().create_future() for _ in range(2))
    waiter = asyncio.ensure_future(wait_for_first([first, second], 5.0))
    await settle()
    assert not waiter.done()
    first.set_result(None)
    assert await with_deadline(waiter)
    assert await wait_for_first([first, second])
    assert not await wait_for_first([second], 0.01)
    assert not second.done()


@pytest.mark.parametrize("wait", [wait_for_all, wait_for_first])
async def test_cancelled_wait_timer_holds_no_caller_context(wait: Any) -> None:
    """A cancelled timer stays in the event loop until its time, but does not hold the caller's context."""

    class Value:
        """Value in a context variable."""

    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable")
    future = asyncio.get_running_loop().create_future()

    async def caller() -> weakref.ref[Value]:
        reference = Value()
        variable.set(reference)
        asyncio.get_running_loop().call_soon(future.set_result, None, context=contextvars.Context())
        await wait([future], 3600.0)
        return weakref.ref(reference)

    reference = await asyncio.ensure_future(caller())
    await settle()
    gc.collect()
    assert reference() is None
