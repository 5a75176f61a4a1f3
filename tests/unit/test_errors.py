"""Tests of the error classes."""

from __future__ import annotations

import asyncio
import json
import pickle
from typing import Any

import pytest
from fastapi import HTTPException, WebSocketDisconnect, WebSocketException
from fastapi.exceptions import WebSocketRequestValidationError
from starlette import exceptions as starlette_exceptions

from fastapi_ws_stabilizer import errors
from fastapi_ws_stabilizer.close_codes import (
    MAX_REASON_BYTES,
    CloseInfo,
    DisconnectReason,
    check_close_code,
    local_close,
)

ERRORS = [
    errors.SocketClosed(local_close(DisconnectReason.REPLACED)),
    errors.ConnectionTimeoutError(local_close(DisconnectReason.HEARTBEAT_TIMEOUT)),
    errors.NotOpenError(),
    errors.ConnectionNotFoundError("ann"),
    errors.DuplicateClientError("ann"),
    errors.ConnectionLimitExceededError("max_connections", 100, 4.2),
    errors.TooManyConnectionsError("max_connections_per_address", 10, 4.2),
    errors.OriginNotAllowedError("foreign"),
    errors.MemoryLimitExceededError("max_total_memory", 1000, 1001),
    errors.ConcurrentReceiveError(),
    errors.MessageEncodeError("a set cannot be sent"),
    errors.MessageFormatError("not JSON"),
    errors.RoomLimitError("lobby", 100),
    errors.RoomNameError("", "at least one character"),
    errors.SessionEndedError(local_close(DisconnectReason.APPLICATION)),
    errors.RequestError("not_found", "no such room"),
    errors.RequestTimeoutError(2.5),
    errors.UnsupportedByClientError(),
    errors.InvalidTokenError("used"),
    errors.InvalidTokenError("revoked", kind="ticket"),
    errors.TokenExpiredError(),
    errors.TokenExpiredError(kind="ticket"),
    errors.BroadcastFailedError(3),
    errors.ShutdownError(),
    errors.UnknownPlatformError("ngnix", ("nginx", "railway"), "nginx"),
    errors.UnsupportedPlatformError("aws-api-gateway", "it holds the socket itself"),
    errors.ManagerNotFoundError(),
    errors.ManagerNotRunningError(),
    errors.ThreadCallTimeoutError(30.0),
    errors.WrongLoopError(),
    errors.WrongLoopError("own_loop"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_each_error_has_base_sentence_and_close_code(error: errors.WebSocketStabilizerError) -> None:
    """Each error has the common base, a sentence, and a valid close code."""
    assert isinstance(error, errors.WebSocketStabilizerError)
    assert str(error)
    assert check_close_code(error.close_code)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_each_error_survives_pickling(error: errors.WebSocketStabilizerError) -> None:
    """A pickled error keeps its attributes and its sentence."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_all_errors_are_tested() -> None:
    """These tests cover every class of the module."""
    classes = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.WebSocketStabilizerError)
    }
    assert classes == {type(error) for error in ERRORS} | {errors.WebSocketStabilizerError}


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.SocketClosed, WebSocketDisconnect),
        (errors.ConnectionTimeoutError, errors.SocketClosed),
        (errors.NotOpenError, RuntimeError),
        (errors.ConnectionNotFoundError, LookupError),
        (errors.ConcurrentReceiveError, RuntimeError),
        (errors.MessageEncodeError, ValueError),
        (errors.MessageFormatError, ValueError),
        (errors.ShutdownError, RuntimeError),
        (errors.ShutdownError, WebSocketException),
        (errors.DuplicateClientError, WebSocketException),
        (errors.UnknownPlatformError, ValueError),
        (errors.UnsupportedPlatformError, ValueError),
        (errors.ManagerNotFoundError, RuntimeError),
        (errors.ManagerNotRunningError, RuntimeError),
        (errors.ThreadCallTimeoutError, TimeoutError),
        (errors.WrongLoopError, RuntimeError),
    ],
)
def test_error_inherits_from_expected_builtin(kind: type, builtin: type) -> None:
    """Code that catches only Python's or Starlette's error catches the library's error too."""
    assert issubclass(kind, builtin)


def test_socket_closed_error_has_close_info() -> None:
    """The error has the close info, and code and reason as in Starlette's `WebSocketDisconnect`."""
    how = local_close(DisconnectReason.REPLACED)
    error = errors.closed_error_for(how)
    assert type(error) is errors.SocketClosed
    assert error.close_info is how
    assert (error.code, error.reason) == (4409, "replaced by a newer connection")
    assert str(error) == "the connection is closed: replaced, code 4409 (replaced by a newer connection)"


def test_socket_closed_error_without_reason_shows_cause_and_code() -> None:
    """An empty close reason leaves no empty brackets in the text."""
    assert (
        str(errors.closed_error_for(local_close(DisconnectReason.COMPLETED)))
        == "the connection is closed: completed, code 1000"
    )


def test_heartbeat_timeout_raises_connection_timeout_error() -> None:
    """After a heartbeat timeout readers and senders get a `ConnectionTimeoutError`, which is not a `TimeoutError`."""
    error = errors.closed_error_for(local_close(DisconnectReason.HEARTBEAT_TIMEOUT))
    assert isinstance(error, errors.ConnectionTimeoutError)
    assert not isinstance(error, TimeoutError)
    assert error.code == 4408


def test_error_details_are_attributes() -> None:
    """The details of an error are attributes, so that its sentence need not be parsed."""
    assert errors.ConnectionNotFoundError("ann").client_id == "ann"
    assert errors.DuplicateClientError("ann").client_id == "ann"
    assert errors.BroadcastFailedError(3).total == 3


def test_invalid_token_error_names_token_purpose() -> None:
    """The text for a ticket does not mention a reconnect token, neither for the developer nor for the client."""
    bad, old = errors.InvalidTokenError("revoked", kind="ticket"), errors.TokenExpiredError(kind="ticket")
    assert "the ticket is invalid: it was revoked" in str(bad)
    assert "ticket_ttl has passed" in str(old)
    assert (bad.reason, old.reason) == ("invalid ticket", "ticket expired")
    assert "reconnect_token_ttl has passed" in str(errors.TokenExpiredError())
    for error in (errors.InvalidTokenError(), errors.TokenExpiredError()):
        assert error.reason == error.close_text


def test_client_id_with_line_break_is_quoted() -> None:
    """A client id with a line break does not start a new line in an error's text."""
    assert "\n" not in str(errors.ConnectionNotFoundError("a\nb"))
    assert "\n" not in str(errors.DuplicateClientError("a\nb"))


def test_error_close_codes_distinguish_failure_kinds() -> None:
    """1011 stands for a bug; every other failure has its own code."""
    assert errors.DuplicateClientError.close_code == 4409
    assert errors.MessageFormatError.close_code == 1003
    assert errors.ShutdownError.close_code == 1012
    assert errors.MessageEncodeError.close_code == 1011


def test_shutdown_error_names_drain_and_shutdown() -> None:
    """The text names both states, and when they end."""
    text = str(errors.ShutdownError())
    assert "draining or shut down" in text
    assert "start()" in text


# ── from errors to close infos ──

CLOSED = errors.closed_error_for(local_close(DisconnectReason.REPLACED))
TIMED_OUT = errors.closed_error_for(local_close(DisconnectReason.HEARTBEAT_TIMEOUT))


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
        errors.DuplicateClientError("ann"),
        errors.MessageFormatError("no"),
        errors.ShutdownError(),
    ],
    ids=lambda error: f"{type(error).__module__}.{type(error).__name__}",
)
def test_rejection_disconnect_and_cancellation_are_no_bugs(error: BaseException) -> None:
    """A rejection, a disconnect and a cancellation are not bugs."""
    assert not errors.is_bug(error)


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyError("x"), errors.MessageEncodeError("x"), errors.ConcurrentReceiveError(), TimeoutError()],
)
def test_other_exceptions_are_bugs(error: BaseException) -> None:
    """Any other exception of an endpoint is reported as a bug."""
    assert errors.is_bug(error)


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
        (errors.DuplicateClientError("ann"), DisconnectReason.POLICY, 4409, "already connected"),
        (errors.MessageFormatError("text expected"), DisconnectReason.POLICY, 1003, "unexpected kind of message"),
        (asyncio.CancelledError(), DisconnectReason.SERVER_SHUTDOWN, 1012, "server shutdown"),
        (ValueError("secret"), DisconnectReason.ERROR, 1011, "internal error"),
        (errors.MessageEncodeError("secret"), DisconnectReason.ERROR, 1011, "internal error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_endpoint_outcome_decides_close_code(error: Any, reason: DisconnectReason, code: int, text: str) -> None:
    """A return gives 1000, an HTTPException 4000 + its status, and a bug 1011 without details."""
    assert errors.close_info_for(error) == CloseInfo(reason, code, text[:123])


def test_http_exception_with_odd_status_has_close_code() -> None:
    """A status for which 4000 + status is not a close code still closes the connection."""
    assert errors.close_info_for(HTTPException(1500, "odd")).cause in (DisconnectReason.POLICY, DisconnectReason.ERROR)


def test_non_json_detail_becomes_text_in_reason() -> None:
    """Any detail can be the close reason."""
    assert "object" in errors.close_info_for(HTTPException(400, {"x": object()})).reason


def test_validation_error_reason_names_parameters() -> None:
    """Invalid parameters close with 1008 and a reason that lists them as JSON."""
    error = WebSocketRequestValidationError([{"loc": ("query", "page"), "msg": "not an int", "type": "int"}])
    how = errors.close_info_for(error)
    assert (how.cause, how.code) == (DisconnectReason.POLICY, 1008)
    assert json.loads(how.reason) == [{"loc": "query.page", "msg": "not an int"}]


def test_validation_reason_contains_only_whole_problems() -> None:
    """The reason contains as many problems as fit completely, so that it stays valid JSON."""
    problems = [{"loc": ("query", f"parameter{number}"), "msg": "not an int"} for number in range(10)]
    text = errors.close_info_for(WebSocketRequestValidationError(problems)).reason
    assert 0 < len(json.loads(text)) < 10
    assert len(text.encode()) <= MAX_REASON_BYTES


def test_long_validation_problem_is_cut_to_parameter_name() -> None:
    """A single problem that does not fit is cut to the parameter's name."""
    problem = {"loc": ("query", "page"), "msg": "x" * 500}
    assert errors.close_info_for(WebSocketRequestValidationError([problem])).reason == "invalid: query.page"


def test_validation_error_without_problems_has_reason() -> None:
    """An empty list of problems is not an error itself."""
    assert errors.close_info_for(WebSocketRequestValidationError([])).code == 1008


def test_application_error_with_unsendable_code_closes_with_1008() -> None:
    """A subclass of the library's error with an invalid close code still closes its connection."""

    class Odd(errors.ShutdownError):
        close_code = 1005

    assert errors.close_info_for(Odd()).code == 1008
