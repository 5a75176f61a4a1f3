"""Tests of the user's code behind one connection: how it is stopped, and how its end is read."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from typing import Any

import pytest
from fastapi import HTTPException, WebSocketDisconnect, WebSocketException
from fastapi.exceptions import WebSocketRequestValidationError
from starlette import exceptions as starlette_exceptions

from fastapi_ws_stabilizer.close_codes import MAX_REASON_BYTES, CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask, close_info_for, find_exit_stack, is_bug
from fastapi_ws_stabilizer.errors import (
    ConcurrentReceiveError,
    DuplicateClientError,
    MessageEncodeError,
    MessageFormatError,
    ShutdownError,
    closed_error_for,
)
from tests.unit.fake_websocket import settle, with_deadline

CLOSED = closed_error_for(local_close(DisconnectReason.REPLACED))
TIMED_OUT = closed_error_for(local_close(DisconnectReason.HEARTBEAT_TIMEOUT))


@pytest.mark.parametrize(
    "error",
    [
        CLOSED,
        TIMED_OUT,
        WebSocketDisconnect(1001),
        HTTPException(401),
        WebSocketException(1008),
        starlette_exceptions.HTTPException(401),
        starlette_exceptions.WebSocketException(1008),
        WebSocketRequestValidationError([]),
        asyncio.CancelledError(),
        DuplicateClientError("ann"),
        MessageFormatError("no"),
        ShutdownError(),
    ],
    ids=lambda error: f"{type(error).__module__}.{type(error).__name__}",
)
def test_what_tells_the_client_something_is_no_bug(error: BaseException) -> None:
    """A refusal, a disconnect and a cancellation are not errors that somebody has to mend."""
    assert not is_bug(error)


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), MessageEncodeError("x"), ConcurrentReceiveError(), TimeoutError()]
)
def test_everything_else_is_a_bug(error: BaseException) -> None:
    """Whatever else an endpoint lets escape is reported."""
    assert is_bug(error)


@pytest.mark.parametrize(
    ("error", "reason", "code", "text"),
    [
        (None, DisconnectReason.COMPLETED, 1000, ""),
        (CLOSED, DisconnectReason.COMPLETED, 1000, ""),
        (WebSocketDisconnect(1001), DisconnectReason.COMPLETED, 1000, ""),
        (HTTPException(401, "who?"), DisconnectReason.POLICY, 4401, "who?"),
        (HTTPException(403), DisconnectReason.POLICY, 4403, "Forbidden"),
        (HTTPException(400, {"a": 1}), DisconnectReason.POLICY, 4400, '{"a":1}'),
        (starlette_exceptions.HTTPException(404), DisconnectReason.POLICY, 4404, "Not Found"),
        (WebSocketException(4001, "bye"), DisconnectReason.POLICY, 4001, "bye"),
        (WebSocketException(1006), DisconnectReason.POLICY, 1008, ""),
        (starlette_exceptions.WebSocketException(4002), DisconnectReason.POLICY, 4002, ""),
        (DuplicateClientError("ann"), DisconnectReason.POLICY, 4409, "connected already"),
        (MessageFormatError("text expected"), DisconnectReason.POLICY, 1003, "unexpected kind of message"),
        (asyncio.CancelledError(), DisconnectReason.SERVER_SHUTDOWN, 1012, "server shutdown"),
        (ValueError("secret"), DisconnectReason.ERROR, 1011, "internal error"),
        (MessageEncodeError("secret"), DisconnectReason.ERROR, 1011, "internal error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_each_way_to_end_has_its_code(error: Any, reason: DisconnectReason, code: int, text: str) -> None:
    """A return is 1000, an HTTPException 4000 + its status, a bug 1011 without a word about the inside."""
    assert close_info_for(error) == CloseInfo(reason, code, text[:123])


def test_an_http_error_with_an_odd_status_still_has_a_code() -> None:
    """A status that makes no close code of 4000 + status ends the connection all the same."""
    assert close_info_for(HTTPException(1500, "odd")).cause in (DisconnectReason.POLICY, DisconnectReason.ERROR)


def test_a_detail_that_json_does_not_know_is_written_as_text() -> None:
    """Any detail can stand in the close reason."""
    assert "object" in close_info_for(HTTPException(400, {"x": object()})).reason


def test_a_validation_error_names_the_parameters() -> None:
    """Invalid parameters close with 1008 and a reason that names them as JSON."""
    error = WebSocketRequestValidationError([{"loc": ("query", "page"), "msg": "not an int", "type": "int"}])
    how = close_info_for(error)
    assert (how.cause, how.code) == (DisconnectReason.POLICY, 1008)
    assert json.loads(how.reason) == [{"loc": "query.page", "msg": "not an int"}]


def test_only_whole_problems_stand_in_a_reason() -> None:
    """Of many problems as many are told as fit whole, so that the reason stays JSON."""
    problems = [{"loc": ("query", f"parameter{number}"), "msg": "not an int"} for number in range(10)]
    text = close_info_for(WebSocketRequestValidationError(problems)).reason
    assert 0 < len(json.loads(text)) < 10
    assert len(text.encode()) <= MAX_REASON_BYTES


def test_a_problem_that_is_too_long_is_told_by_its_place() -> None:
    """A single problem that does not fit is cut to the parameter's name."""
    problem = {"loc": ("query", "page"), "msg": "x" * 500}
    assert close_info_for(WebSocketRequestValidationError([problem])).reason == "invalid: query.page"


def test_a_validation_error_without_problems_is_told_too() -> None:
    """An empty list of problems is no failure of its own."""
    assert close_info_for(WebSocketRequestValidationError([])).code == 1008


# ── cancelling ──


async def test_our_own_cancellation_can_be_swallowed() -> None:
    """The task that we cancelled may go on, and its count of cancellations is right again."""

    async def endpoint() -> int:
        mine = EndpointTask(cancellable=True)
        ready.set_result(mine)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            ours.append(mine.is_own_cancellation(error))
        await asyncio.sleep(0)
        return getattr(asyncio.current_task(), "cancelling", lambda: 0)()

    ours: list[bool] = []

    ready: asyncio.Future[EndpointTask] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(endpoint())
    (await ready).cancel()
    assert await with_deadline(task) == 0
    assert ours == [True]


async def test_a_foreign_cancellation_is_not_ours() -> None:
    """A task that somebody else cancelled has to go on with its cancellation."""

    async def endpoint() -> bool:
        mine = EndpointTask(cancellable=True)
        ready.set_result(mine)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            return mine.is_own_cancellation(error)
        return True

    ready: asyncio.Future[EndpointTask] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(endpoint())
    await ready
    task.cancel("server stops")
    assert await with_deadline(task) is False


@pytest.mark.xfail(sys.version_info < (3, 11), reason="Python 3.10 does not count cancellations")
async def test_a_foreign_cancellation_beside_ours_wins() -> None:
    """Where both have cancelled, the cancellation goes on."""

    async def endpoint() -> bool:
        mine = EndpointTask(cancellable=True)
        ready.set_result(mine)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            return mine.is_own_cancellation(error)
        return True

    ready: asyncio.Future[EndpointTask] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(endpoint())
    (await ready).cancel()
    task.cancel("server stops")
    assert await with_deadline(task) is False


async def test_an_error_that_is_no_cancellation_is_not_ours() -> None:
    """What an endpoint raises when it is cancelled is its own error."""
    endpoint = EndpointTask(cancellable=True)
    assert not endpoint.is_own_cancellation(ValueError("no"))
    assert not endpoint.is_own_cancellation(asyncio.CancelledError())


async def test_user_code_that_has_returned_is_not_cancelled() -> None:
    """The clean-up of dependencies, which runs in the same task, is left alone."""

    async def endpoint() -> str:
        mine = EndpointTask(cancellable=True)
        mine.mark_returned()
        mine.mark_returned()
        mine.cancel()
        await asyncio.sleep(0)
        return "cleaned up"

    assert await with_deadline(asyncio.ensure_future(endpoint())) == "cleaned up"


async def test_an_endpoint_is_cancelled_once() -> None:
    """A second cancel does not hit the code that handles the first."""

    async def endpoint() -> str:
        mine = EndpointTask(cancellable=True)
        ready.set_result(mine)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            mine.cancel()
            await asyncio.sleep(0)
        return "handled"

    ready: asyncio.Future[EndpointTask] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(endpoint())
    (await ready).cancel()
    assert await with_deadline(task) == "handled"


async def test_an_endpoint_that_is_not_ours_to_cancel_is_left_alone() -> None:
    """For a socket that was connected by hand nobody waits, and nothing is cancelled."""
    endpoint = EndpointTask(cancellable=False)
    assert endpoint.returned.done()
    endpoint.cancel()
    await settle()
    assert not endpoint.is_own_cancellation(asyncio.CancelledError())


# ── FastAPI's exit stacks ──


@pytest.mark.parametrize("name", ["fastapi_function_astack", "fastapi_inner_astack", "fastapi_astack"])
async def test_the_end_of_user_code_is_learnt_from_fastapis_stack(name: str) -> None:
    """The callback stands above the dependencies, so it is called before they are closed."""
    order: list[str] = []
    endpoint = EndpointTask(cancellable=True)
    async with AsyncExitStack() as stack:
        stack.callback(lambda: order.append(f"dependency closed, returned={endpoint.returned.done()}"))
        endpoint.watch({name: stack})
    assert order == ["dependency closed, returned=True"]


async def test_the_stack_that_closes_first_is_taken() -> None:
    """Of FastAPI's several stacks the innermost is the one whose end is that of the user's code."""
    inner, outer = AsyncExitStack(), AsyncExitStack()
    scope = {"fastapi_inner_astack": outer, "fastapi_function_astack": inner, "fastapi_astack": "not a stack"}
    assert find_exit_stack(scope) is inner
    assert find_exit_stack({"fastapi_function_astack": None, "fastapi_astack": outer}) is outer


async def test_without_a_stack_only_the_refinement_is_missing() -> None:
    """Outside FastAPI there is no stack, and watching does nothing."""
    endpoint = EndpointTask(cancellable=True)
    endpoint.watch({})
    assert find_exit_stack({}) is None
    assert not endpoint.returned.done()


def test_error_of_application_with_unsendable_code_ends_with_1008() -> None:
    """A subclass of the library's error whose close code cannot be sent ends its connection all the same."""

    class Odd(ShutdownError):
        close_code = 1005

    assert close_info_for(Odd()).code == 1008
