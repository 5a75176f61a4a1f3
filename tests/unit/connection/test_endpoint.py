"""Tests of the endpoint of a connection: how it is cancelled, and how its result is interpreted."""

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
from fastapi_ws_stabilizer.compat.fastapi import find_exit_stack
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask, close_info_for, is_bug
from fastapi_ws_stabilizer.errors import (
    ConcurrentReceiveError,
    DuplicateClientError,
    MessageEncodeError,
    MessageFormatError,
    ShutdownError,
    closed_error_for,
)
from tests.support.fake_websocket import settle, with_deadline

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
def test_rejection_disconnect_and_cancellation_are_no_bugs(error: BaseException) -> None:
    """A rejection, a disconnect and a cancellation are not bugs."""
    assert not is_bug(error)


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), MessageEncodeError("x"), ConcurrentReceiveError(), TimeoutError()]
)
def test_other_exceptions_are_bugs(error: BaseException) -> None:
    """Any other exception of an endpoint is reported as a bug."""
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
        (DuplicateClientError("ann"), DisconnectReason.POLICY, 4409, "already connected"),
        (MessageFormatError("text expected"), DisconnectReason.POLICY, 1003, "unexpected kind of message"),
        (asyncio.CancelledError(), DisconnectReason.SERVER_SHUTDOWN, 1012, "server shutdown"),
        (ValueError("secret"), DisconnectReason.ERROR, 1011, "internal error"),
        (MessageEncodeError("secret"), DisconnectReason.ERROR, 1011, "internal error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_endpoint_outcome_decides_close_code(error: Any, reason: DisconnectReason, code: int, text: str) -> None:
    """A return gives 1000, an HTTPException 4000 + its status, and a bug 1011 without details."""
    assert close_info_for(error) == CloseInfo(reason, code, text[:123])


def test_http_exception_with_odd_status_has_close_code() -> None:
    """A status for which 4000 + status is not a close code still closes the connection."""
    assert close_info_for(HTTPException(1500, "odd")).cause in (DisconnectReason.POLICY, DisconnectReason.ERROR)


def test_non_json_detail_becomes_text_in_reason() -> None:
    """Any detail can be the close reason."""
    assert "object" in close_info_for(HTTPException(400, {"x": object()})).reason


def test_validation_error_reason_names_parameters() -> None:
    """Invalid parameters close with 1008 and a reason that lists them as JSON."""
    error = WebSocketRequestValidationError([{"loc": ("query", "page"), "msg": "not an int", "type": "int"}])
    how = close_info_for(error)
    assert (how.cause, how.code) == (DisconnectReason.POLICY, 1008)
    assert json.loads(how.reason) == [{"loc": "query.page", "msg": "not an int"}]


def test_validation_reason_contains_only_whole_problems() -> None:
    """The reason contains as many problems as fit completely, so that it stays valid JSON."""
    problems = [{"loc": ("query", f"parameter{number}"), "msg": "not an int"} for number in range(10)]
    text = close_info_for(WebSocketRequestValidationError(problems)).reason
    assert 0 < len(json.loads(text)) < 10
    assert len(text.encode()) <= MAX_REASON_BYTES


def test_long_validation_problem_is_cut_to_parameter_name() -> None:
    """A single problem that does not fit is cut to the parameter's name."""
    problem = {"loc": ("query", "page"), "msg": "x" * 500}
    assert close_info_for(WebSocketRequestValidationError([problem])).reason == "invalid: query.page"


def test_validation_error_without_problems_has_reason() -> None:
    """An empty list of problems is not an error itself."""
    assert close_info_for(WebSocketRequestValidationError([])).code == 1008


# ── cancellation ──


async def test_own_cancellation_can_be_suppressed() -> None:
    """A task that the library has cancelled may continue, and its count of cancellations is correct again."""

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


async def test_foreign_cancellation_propagates() -> None:
    """A task that other code cancelled continues with its cancellation."""

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
async def test_foreign_cancellation_beside_own_propagates() -> None:
    """When both have cancelled the task, the cancellation propagates."""

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


def test_application_error_with_unsendable_code_closes_with_1008() -> None:
    """A subclass of the library's error with an invalid close code still closes its connection."""

    class Odd(ShutdownError):
        close_code = 1005

    assert close_info_for(Odd()).code == 1008
