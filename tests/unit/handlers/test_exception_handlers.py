"""Tests of the application's exception handlers: their lookup, timeouts and failures."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, WebSocketException
from fastapi.exception_handlers import http_exception_handler
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import PlainTextResponse

from fastapi_ws_stabilizer.handlers.exception_handlers import handler_for_endpoint, handler_of
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Line, Stage

KNOWN = "starlette.exception_handlers"


class AppError(Exception):
    """Error of the application."""


class Special(AppError):
    """Subclass of that error."""


async def handler(connection: Any, error: Any) -> None:
    """Handle an error, as an application."""


def websocket_with(handlers: dict[Any, Any], by_status: dict[int, Any] | None = None) -> Any:
    """Return a WebSocket of an application with these handlers."""
    return FakeServer(**{KNOWN: (handlers, by_status or {})}).websocket


def test_app_handler_is_found_by_class_of_error() -> None:
    """A handler for a base class handles its subclasses, but a handler for the class itself takes precedence."""

    async def special(connection: Any, error: Any) -> None:
        """Handle the subclass."""

    assert handler_for_endpoint(websocket_with({AppError: handler}), Special()) is handler
    assert handler_for_endpoint(websocket_with({AppError: handler, Special: special}), Special()) is special
    assert handler_for_endpoint(websocket_with({Special: special}), AppError()) is None
    assert handler_for_endpoint(FakeServer().websocket, AppError()) is None


@pytest.mark.parametrize("kind", [HTTPException, StarletteHTTPException])
def test_http_error_handler_is_not_used_for_open_connection(kind: Any) -> None:
    """A handler for `HTTPException` or a status answers handshakes, but not open connections."""
    websocket = websocket_with({kind: handler}, {404: handler})
    assert handler_for_endpoint(websocket, HTTPException(404)) is None
    assert handler_of(websocket, HTTPException(404)) is handler


def test_framework_handlers_are_not_app_handlers() -> None:
    """Handlers that FastAPI and Starlette register themselves do not count."""
    app = FastAPI()
    app.build_middleware_stack()
    websocket = websocket_with({StarletteHTTPException: http_exception_handler, **app.exception_handlers})
    for error in (HTTPException(404), WebSocketException(4321)):
        assert handler_of(websocket, error) is None
        assert handler_for_endpoint(websocket, error) is None


async def fail(ws: StableSocket) -> None:
    """Fail, as an endpoint."""
    raise Special


async def outcome(answer: Any, *, disconnect_grace: float = 2) -> tuple[Line, list[str]]:
    """Run a connection with this exception handler, and return its line and the reported bugs."""
    async with Stage(disconnect_grace=disconnect_grace) as stage:
        stage.endpoint = fail
        line = Line(stage, **{KNOWN: ({AppError: answer}, {})})
        await asyncio.wait({line.task}, timeout=60)
        await soon()
        return line, stage.bugs


@virtually
async def test_hanging_app_handler_closes_with_1011_after_grace() -> None:
    """A handler that does not return is cancelled after `disconnect_grace` and reported; the client gets 1011."""

    async def hang(connection: Any, error: Any) -> None:
        await asyncio.Event().wait()

    line, bugs = await outcome(hang)
    assert (line.close_code, bugs) == (1011, ["endpoint_failed"])


@virtually
async def test_app_handler_cancelled_from_inside_closes_with_1011() -> None:
    """A handler that raises a cancellation of its own is reported as a bug."""

    async def cancelled(connection: Any, error: Any) -> None:
        raise asyncio.CancelledError

    line, bugs = await outcome(cancelled)
    assert (line.close_code, bugs) == (1011, ["endpoint_failed"])


@pytest.mark.parametrize("error", [WebSocketException(4001, "quota"), HTTPException(401)])
@virtually
async def test_rejection_raised_by_app_handler_sets_close_code(error: Any) -> None:
    """An exception that rejects the client sets the close code, as in the endpoint, and is not a bug."""

    async def reject(connection: Any, _: Any) -> None:
        raise error

    line, bugs = await outcome(reject)
    assert (line.close_code, bugs) == (4001 if isinstance(error, WebSocketException) else 4401, [])


@virtually
async def test_app_handler_after_disconnect_reports_endpoint_error() -> None:
    """If the client has disconnected before the handler runs, the error of the endpoint is the reported bug."""

    async def answer(connection: Any, error: Any) -> None:
        await connection.send_json({"error": "quota"})

    async def fail_late(ws: StableSocket) -> None:
        await ws.wait_closed()
        raise Special

    async with Stage() as stage:
        stage.endpoint = fail_late
        line = Line(stage, **{KNOWN: ({AppError: answer}, {})})
        await soon()
        await line.leaves()
        await soon()
        (event,) = [one for one in stage.heard.all if one.error is not None]
        assert isinstance(event.error, Special)


@pytest.mark.parametrize(("status", "code"), [(409, 4409), (503, 4503), (200, 1011), (302, 1011)])
@virtually
async def test_response_of_app_handler_sets_close_code(status: int, code: int) -> None:
    """An error response closes with 4000 + its status, and any other response closes with 1011."""

    async def respond(connection: Any, error: Any) -> PlainTextResponse:
        return PlainTextResponse("no", status)

    line, bugs = await outcome(respond)
    assert (line.close_code, bugs) == (code, [])


@virtually
async def test_cancellation_during_app_handler_closes_with_1012() -> None:
    """An endpoint that is cancelled while its handler runs closes with 1012 and stays cancelled."""

    async def hang(connection: Any, error: Any) -> None:
        await asyncio.Event().wait()

    async with Stage(disconnect_grace=10) as stage:
        stage.endpoint = fail
        line = Line(stage, **{KNOWN: ({AppError: hang}, {})})
        await soon()
        line.task.cancel()
        await asyncio.wait({line.task}, timeout=60)
        await soon()
        assert line.task.cancelled()
        assert line.close_code == 1012
        stage.lines.remove(line)
