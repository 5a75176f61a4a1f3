"""Tests of the endpoint of a connection: how it is cancelled, and how its return is noticed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeVar

import pytest

from fastapi_ws_stabilizer.compat.fastapi import find_exit_stack
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from tests.support.fake_websocket import settle, with_deadline

T = TypeVar("T")


async def start_endpoint(
    on_cancel: Callable[[EndpointTask, asyncio.CancelledError], Awaitable[T]],
) -> tuple[EndpointTask, asyncio.Task[T]]:
    """Start an endpoint that waits until it is cancelled, and returns what `on_cancel` returns."""

    async def endpoint() -> T:
        mine = EndpointTask(cancellable=True)
        ready.set_result(mine)
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError as error:
            return await on_cancel(mine, error)
        raise AssertionError("the wait ended without a cancellation")

    ready: asyncio.Future[EndpointTask] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(endpoint())
    return await ready, task


async def is_own(mine: EndpointTask, error: asyncio.CancelledError) -> bool:
    """Return whether the library has cancelled the endpoint."""
    return mine.is_own_cancellation(error)


# ── cancellation ──


async def test_own_cancellation_can_be_suppressed() -> None:
    """A task that the library has cancelled may continue, and its count of cancellations is correct again."""

    async def go_on(mine: EndpointTask, error: asyncio.CancelledError) -> tuple[bool, int]:
        ours = mine.is_own_cancellation(error)
        await asyncio.sleep(0)
        return ours, getattr(asyncio.current_task(), "cancelling", lambda: 0)()

    endpoint, task = await start_endpoint(go_on)
    endpoint.cancel()
    assert await with_deadline(task) == (True, 0)


async def test_foreign_cancellation_propagates() -> None:
    """A task that other code cancelled continues with its cancellation."""
    _, task = await start_endpoint(is_own)
    task.cancel("server stops")
    assert await with_deadline(task) is False


@pytest.mark.xfail(sys.version_info < (3, 11), reason="Python 3.10 does not count cancellations")
async def test_foreign_cancellation_beside_own_propagates() -> None:
    """When both have cancelled the task, the cancellation propagates."""
    endpoint, task = await start_endpoint(is_own)
    endpoint.cancel()
    task.cancel("server stops")
    assert await with_deadline(task) is False


async def test_error_raised_on_cancellation_is_not_suppressed() -> None:
    """An exception that an endpoint raises on its cancellation propagates."""
    endpoint = EndpointTask(cancellable=True)
    assert not endpoint.is_own_cancellation(ValueError("no"))
    assert not endpoint.is_own_cancellation(asyncio.CancelledError())


async def test_returned_endpoint_is_not_cancelled() -> None:
    """The cleanup of dependencies, which runs in the same task, is not cancelled."""

    async def endpoint() -> str:
        mine = EndpointTask(cancellable=True)
        mine.mark_returned()
        mine.mark_returned()
        mine.cancel()
        await asyncio.sleep(0)
        return "cleaned up"

    assert await with_deadline(asyncio.ensure_future(endpoint())) == "cleaned up"


async def test_endpoint_is_cancelled_once() -> None:
    """A second cancel does not reach the code that handles the first."""

    async def cancel_again(mine: EndpointTask, _: asyncio.CancelledError) -> str:
        mine.cancel()
        await asyncio.sleep(0)
        return "handled"

    endpoint, task = await start_endpoint(cancel_again)
    endpoint.cancel()
    assert await with_deadline(task) == "handled"


async def test_endpoint_of_adopted_socket_is_not_cancelled() -> None:
    """The endpoint of an adopted socket is never awaited or cancelled."""
    endpoint = EndpointTask(cancellable=False)
    assert endpoint.returned.done()
    endpoint.cancel()
    await settle()
    assert not endpoint.is_own_cancellation(asyncio.CancelledError())


# ── FastAPI's exit stacks ──


@pytest.mark.parametrize("name", ["fastapi_function_astack", "fastapi_inner_astack", "fastapi_astack"])
async def test_end_of_user_code_is_seen_through_fastapi_stack(name: str) -> None:
    """The callback is above the dependencies on the stack, so it runs before they are closed."""
    order: list[str] = []
    endpoint = EndpointTask(cancellable=True)
    async with AsyncExitStack() as stack:
        stack.callback(lambda: order.append(f"dependency closed, returned={endpoint.returned.done()}"))
        endpoint.watch({name: stack})
    assert order == ["dependency closed, returned=True"]


async def test_innermost_fastapi_stack_is_watched() -> None:
    """The innermost of FastAPI's stacks is the one that closes when the user's code ends."""
    inner, outer = AsyncExitStack(), AsyncExitStack()
    scope = {"fastapi_inner_astack": outer, "fastapi_function_astack": inner, "fastapi_astack": "not a stack"}
    assert find_exit_stack(scope) is inner
    assert find_exit_stack({"fastapi_function_astack": None, "fastapi_astack": outer}) is outer


async def test_missing_fastapi_stack_is_ignored() -> None:
    """Outside FastAPI there is no stack, and watching does nothing."""
    endpoint = EndpointTask(cancellable=True)
    endpoint.watch({})
    assert find_exit_stack({}) is None
    assert not endpoint.returned.done()
