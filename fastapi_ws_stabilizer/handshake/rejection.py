"""Answers to rejected handshakes.

`RejectPolicy` describes the choice between an HTTP status and a close code. A rejection can get an HTTP
status where the policy says a close code: see `ACCEPT_TO_CLOSE_RATE`, `CLOSE_CODE_INTERVAL`, `_closes` and
`_is_http_only`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any, Final

import starlette
from fastapi import HTTPException, WebSocket, WebSocketException
from fastapi.exceptions import WebSocketRequestValidationError
from starlette.responses import Response
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, truncate_reason
from fastapi_ws_stabilizer.compat.fastapi import http_answer
from fastapi_ws_stabilizer.compat.starlette import asgi_callables, mark_handled
from fastapi_ws_stabilizer.config import RejectPolicy
from fastapi_ws_stabilizer.connection.client_address import ClientAddressResolver
from fastapi_ws_stabilizer.connection.server_transport import ServerTransport
from fastapi_ws_stabilizer.errors import (
    ConnectionLimitExceededError,
    OriginNotAllowedError,
    ShutdownError,
    TooManyConnectionsError,
    WebSocketStabilizerError,
    close_info_for,
)
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.exception_handlers import handler_of
from fastapi_ws_stabilizer.limits.connections import MAX_ADDRESSES
from fastapi_ws_stabilizer.limits.rates import KeyedTokenBuckets, Rate, TokenBucket
from fastapi_ws_stabilizer.net.proxies import rate_limit_key
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.handshake import select_subprotocol

DENIAL: Final = "websocket.http.response"
"""ASGI extension of servers that can answer a handshake with any HTTP response."""

REFUSALS: Final = (HTTPException, WebSocketRequestValidationError, WebSocketException, WebSocketStabilizerError)
"""Exceptions that reject a handshake."""

_STATUS_OF: Final = {
    **{4000 + status: status.value for status in HTTPStatus if status >= 400},
    1011: 500,
    1012: 503,
    1013: 503,
}
"""HTTP status for each close code."""

ACCEPT_TO_CLOSE_RATE: Final = Rate(per_second=100.0, burst=500.0)
"""Rate at which rejected clients with an `Origin` are accepted and closed.

Some servers hold a WebSocket for 10 s if the client does not answer the close frame. Without a limit this would be the
cheapest attack on them.
"""

_STARLETTE: Final = tuple(map(int, starlette.__version__.split(".")[:2]))

CLOSE_CODE_INTERVAL: Final = 5.0
"""Seconds between two closes with a code for one address that has too many connections.

A client that sends an `Origin` and reconnects constantly then costs no more than a client without an `Origin`.
"""

REJECTION_TIMEOUT: Final = 5.0
"""Seconds that the answer to a rejected client may take."""


def to_http_exception(error: WebSocketStabilizerError | WebSocketException) -> HTTPException:
    """Return the HTTP answer for a rejection."""
    if isinstance(error, ConnectionLimitExceededError):
        status = 429 if isinstance(error, TooManyConnectionsError) else 503
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return HTTPException(status, type(error).close_text, headers=wait)
    if isinstance(error, ShutdownError):
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return HTTPException(503, type(error).close_text, headers=wait)
    close_info = close_info_for(error)
    return HTTPException(_STATUS_OF.get(close_info.code, 403), close_info.reason or None)


class Rejector:
    """Sender of HTTP answers and close codes to rejected clients.

    Args:
        policy: The value of the `reject` option.
        events: The bus for reports.
        addresses: The resolver of client addresses.
    """

    def __init__(self, policy: RejectPolicy, events: EventBus, addresses: ClientAddressResolver) -> None:
        self._policy = policy
        self._events = events
        self._addresses = addresses
        self._accept_to_close = TokenBucket()
        self._close_code_buckets = KeyedTokenBuckets(Rate(1 / CLOSE_CODE_INTERVAL, 1.0), MAX_ADDRESSES)
        self._tasks = TaskSet(lambda _, __: None)  # a client that disconnects during its rejection is not an error

    async def reject(self, websocket: WebSocket, error: Exception) -> Exception:
        """Reject a client. Its WebSocket may be accepted or not.

        Args:
            websocket: The WebSocket.
            error: The reason: one of `REFUSALS`, or an error of this library.

        Returns:
            The exception to raise. The framework does nothing more for it, unless the application has its own handler
            for the HTTP answer. Then it is the `HTTPException` for that handler, which sends the answer.
        """
        close_info = self.record_rejection(websocket, error)
        accepted = websocket.application_state is WebSocketState.CONNECTED
        closes = self._closes(websocket) and not _is_http_only(error) and not self._is_throttled(error, websocket)
        if accepted or closes:
            return await self.accept_and_close(websocket, close_info.code, close_info.reason)
        if isinstance(error, (WebSocketStabilizerError, WebSocketException)):
            error = to_http_exception(error)
        if DENIAL in (websocket.scope.get("extensions") or {}) and isinstance(error, HTTPException):
            if _is_answered_by_app(error, websocket):
                return error
            answer = await _answer(error)
            await self._send_answer(websocket, websocket.send_denial_response(answer))
            return WebSocketException(close_info.code, close_info.reason)
        return await self.accept_and_close(websocket, close_info.code, close_info.reason, accept=False)

    def record_rejection(self, websocket: WebSocket, error: Exception, client_id: str | None = None) -> CloseInfo:
        """Count and report a rejection, and return the close info for a rejection by close code.

        A rejection by an option is a warning, because the option may be wrong.
        """
        close_info = close_info_for(error)
        address = self._addresses.address_of(websocket)
        fields: dict[str, Any] = {"address": address, "code": close_info.code, "text": close_info.reason}
        if client_id is not None:
            fields["client_id"] = client_id
        kind = f"{close_info.code}"
        if isinstance(error, ConnectionLimitExceededError):
            kind = fields["option"] = error.option
        elif isinstance(error, OriginNotAllowedError):
            fields |= {"option": "allowed_origins", "why": error.problem, "origin": websocket.headers.get("origin", "")}
            fields["host"] = error.host
        self._events.counters.refusals[kind] += 1
        level = logging.WARNING if "option" in fields else logging.INFO
        self._events.emit_throttled("connection_refused", level, kind, **fields)
        return close_info

    def _is_throttled(self, error: Exception, websocket: WebSocket) -> bool:
        """Return whether the address exceeds its limit and got a close code less than `CLOSE_CODE_INTERVAL` ago."""
        if not isinstance(error, TooManyConnectionsError):
            return False
        key = rate_limit_key(self._addresses.address_of(websocket))
        return self._close_code_buckets.take(key, 1.0, monotonic()) > 0

    def _closes(self, websocket: WebSocket) -> bool:
        if websocket.scope.get("subprotocols") and select_subprotocol(websocket.scope) is None:
            return False  # any of them may be a credential, and Chrome rejects an answer without one
        if self._policy is RejectPolicy.AUTO:
            return "origin" in websocket.headers and not self._accept_to_close.take(
                ACCEPT_TO_CLOSE_RATE, 1.0, monotonic()
            )
        return self._policy is RejectPolicy.CLOSE

    async def accept_and_close(
        self, websocket: WebSocket, code: int, reason: str, *, accept: bool = True
    ) -> WebSocketException:
        """Close a WebSocket that has no connection.

        Args:
            websocket: The WebSocket.
            code: The close code.
            reason: The close reason.
            accept: Whether to accept the WebSocket before, if needed. Otherwise the client sees HTTP 403.

        Returns:
            An exception that ends the endpoint and has no other effect.
        """

        async def close() -> None:
            if accept and websocket.application_state is not WebSocketState.CONNECTED:
                await websocket.accept(select_subprotocol(websocket.scope))
            await websocket.close(code, truncate_reason(reason))

        if accept:  # before the close, because one of uvicorn's implementations waits for the answer in it
            server_transport = ServerTransport(*asgi_callables(websocket))
            server_transport.abort_unless_answered(taken=False)  # nothing but the close frame is queued
        await self._send_answer(websocket, close())
        return WebSocketException(code, truncate_reason(reason))

    async def _send_answer(self, websocket: WebSocket, sending: Coroutine[Any, Any, None]) -> None:
        task = self._tasks.spawn(sending, name="ws-refusal")
        await wait_for_all([task], REJECTION_TIMEOUT)
        task.cancel()
        mark_handled(websocket)


async def _answer(error: HTTPException) -> Response:
    """Return the answer of FastAPI, without the detail if it cannot be encoded as JSON.

    The detail may contain text from the client.
    """
    try:
        return await http_answer(error)
    except (TypeError, ValueError):
        bare = HTTPException(error.status_code, headers=error.headers)
        return await http_answer(bare)


def _is_answered_by_app(error: HTTPException, websocket: WebSocket) -> bool:
    """Return whether the application has its own handler for an error and Starlette sends what it returns.

    Before 0.41 Starlette does not, and the handshake would get no answer at all.
    """
    return _STARLETTE >= (0, 41) and handler_of(websocket, error) is not None


def _is_http_only(error: Exception) -> bool:
    """Return whether a rejection is always an HTTP answer.

    Accepting the client would cost what the limit saves, or would help a page of another origin.
    """
    if isinstance(error, TooManyConnectionsError):
        return False
    return isinstance(error, (ConnectionLimitExceededError, OriginNotAllowedError, ShutdownError))
