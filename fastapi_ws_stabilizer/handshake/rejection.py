"""How a client is told that it may not come in.

A browser can read neither the status nor the body of a failed handshake: its page sees 1006 and dials again, for ever,
with the same bad token. So it is let in and closed with a code that says why, unless that is what would cost too much,
or there are too many of them. Everybody else gets the HTTP answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Coroutine
from http import HTTPStatus
from typing import Any, Final

import starlette
from fastapi import HTTPException, WebSocket, WebSocketException
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import WebSocketRequestValidationError
from starlette.responses import Response
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.auth.credentials import SUBPROTOCOL_KEY
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, truncate_reason
from fastapi_ws_stabilizer.compat.starlette import asgi_callables, mark_handled
from fastapi_ws_stabilizer.config import RejectPolicy
from fastapi_ws_stabilizer.connection.endpoint import close_info_for
from fastapi_ws_stabilizer.connection.server_transport import ServerTransport
from fastapi_ws_stabilizer.errors import (
    ConnectionLimitExceededError,
    OriginNotAllowedError,
    ShutdownError,
    TooManyConnectionsError,
    WebSocketStabilizerError,
)
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.exception_handlers import handler_of
from fastapi_ws_stabilizer.limits.connections import MAX_ADDRESSES
from fastapi_ws_stabilizer.limits.rates import KeyedTokenBuckets, Rate, TokenBucket
from fastapi_ws_stabilizer.net.proxies import rate_limit_key
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.handshake import SERVED_KEY, first_offered
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from fastapi_ws_stabilizer.wire.v1.hello import offers_v1

DENIAL: Final = "websocket.http.response"
"""The ASGI extension of a server that can answer a handshake with any HTTP response."""

REFUSALS: Final = (HTTPException, WebSocketRequestValidationError, WebSocketException, WebSocketStabilizerError)
"""What keeps a client out."""

_STATUS_OF: Final = {
    **{4000 + status: status.value for status in HTTPStatus if status >= 400},
    1011: 500,
    1012: 503,
    1013: 503,
}
"""The HTTP status that says the same as a close code."""

ACCEPT_TO_CLOSE_RATE: Final = Rate(per_second=100.0, burst=500.0)
"""How many clients that say they are browsers are accepted to be told why they may not come in. Some servers hold a
WebSocket for ten seconds whose client does not answer the close frame: it would be the cheapest way to fill them."""

_STARLETTE: Final = tuple(map(int, starlette.__version__.split(".")[:2]))

CLOSE_CODE_INTERVAL: Final = 5.0
"""Seconds in which a browser is let in once to be told that there are too many from its address. Who chooses to have an
`Origin`, and dials all the time, costs no more than without."""

REJECTION_TIMEOUT: Final = 5.0
"""Seconds that a client which is turned away may take to be told so."""


def answered_subprotocol(websocket: WebSocket) -> str | None:
    """The subprotocol that a handshake is answered with: a browser that offers some takes no answer without one.

    Ours, else the first that the endpoint speaks, else the marker beside a credential; `None` where none is offered.
    """
    offered: Collection[str] = websocket.scope.get("subprotocols") or ()
    if offers_v1(offered):
        return SUBPROTOCOL
    chosen = first_offered(websocket.scope.get(SERVED_KEY, ()), offered)
    if chosen is None:
        chosen = websocket.scope.get(SUBPROTOCOL_KEY)
    return chosen if chosen in offered else None


def to_http_exception(error: WebSocketStabilizerError | WebSocketException) -> HTTPException:
    """A refusal as the HTTP answer that says the same."""
    if isinstance(error, ConnectionLimitExceededError):
        status = 429 if isinstance(error, TooManyConnectionsError) else 503
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return HTTPException(status, type(error).close_text, headers=wait)
    if isinstance(error, ShutdownError):
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return HTTPException(503, type(error).close_text, headers=wait)
    how = close_info_for(error)
    return HTTPException(_STATUS_OF.get(how.code, 403), how.reason or None)


class Rejector:
    """Turns clients away.

    Args:
        policy: How.
        events: Where it is told.
    """

    def __init__(self, policy: RejectPolicy, events: EventBus) -> None:
        self._policy = policy
        self._events = events
        self._accept_to_close = TokenBucket()
        self._close_code_buckets = KeyedTokenBuckets(Rate(1 / CLOSE_CODE_INTERVAL, 1.0), MAX_ADDRESSES)
        self._tasks = TaskSet(lambda _, __: None)  # whoever dials and vanishes is no failure of ours

    async def reject(self, websocket: WebSocket, error: Exception, address: str) -> Exception:
        """Turn a client away, whose WebSocket may be accepted or not.

        Args:
            websocket: Its WebSocket.
            error: Why: one of `REFUSALS`, or an error of this library.
            address: Where it comes from.

        Returns:
            What is to be raised instead, so that the framework does nothing more; where the application has a handler
            of its own for what it is told over HTTP, so that this does the rest.
        """
        how = self.record(websocket, error, address)
        accepted = websocket.application_state is WebSocketState.CONNECTED
        closes = self._closes(websocket) and not _is_http_only(error) and not self._is_throttled(error, address)
        if accepted or closes:
            return await self.close(websocket, how.code, how.reason)
        if isinstance(error, (WebSocketStabilizerError, WebSocketException)):
            error = to_http_exception(error)
        if DENIAL in (websocket.scope.get("extensions") or {}) and isinstance(error, HTTPException):
            if _is_answered_by_app(error, websocket):
                return error
            answer = await _answer(error)
            await self._last_words(websocket, websocket.send_denial_response(answer))
            return WebSocketException(how.code, how.reason)
        return await self.close(websocket, how.code, how.reason, accept=False)

    def record(self, websocket: WebSocket, error: Exception, address: str, client_id: str | None = None) -> CloseInfo:
        """Count and report that a client is turned away; returns how its connection ends, if it is told by closing.

        One by an option is a warning: it may be a setting that is wrong.
        """
        how = close_info_for(error)
        fields: dict[str, Any] = {"address": address, "code": how.code, "text": how.reason}
        if client_id is not None:
            fields["client_id"] = client_id
        kind = f"{how.code}"
        if isinstance(error, ConnectionLimitExceededError):
            kind = fields["option"] = error.limit
        elif isinstance(error, OriginNotAllowedError):
            fields |= {"option": "allowed_origins", "why": error.problem, "origin": websocket.headers.get("origin", "")}
            fields["host"] = error.host
        self._events.counters.refusals[kind] += 1
        level = logging.WARNING if "option" in fields else logging.INFO
        self._events.emit_throttled("connection_refused", level, kind, **fields)
        return how

    def _is_throttled(self, error: Exception, address: str) -> bool:
        """Whether somebody who is to be few was let in just to be told so a moment ago, and dials again."""
        if not isinstance(error, TooManyConnectionsError):
            return False
        return self._close_code_buckets.take(rate_limit_key(address), 1.0, monotonic()) > 0

    def _closes(self, websocket: WebSocket) -> bool:
        if websocket.scope.get("subprotocols") and answered_subprotocol(websocket) is None:
            return False  # any of them may be a credential, and Chrome takes no answer without one
        if self._policy is RejectPolicy.AUTO:
            return "origin" in websocket.headers and not self._accept_to_close.take(
                ACCEPT_TO_CLOSE_RATE, 1.0, monotonic()
            )
        return self._policy is RejectPolicy.CLOSE

    async def close(self, websocket: WebSocket, code: int, reason: str, *, accept: bool = True) -> WebSocketException:
        """Close a WebSocket for which there is no connection yet.

        Args:
            websocket: The WebSocket.
            code: The close code.
            reason: The close reason.
            accept: Whether it is accepted before, if it is not. Without that its client sees HTTP 403.

        Returns:
            An exception that ends its endpoint, and does nothing else.
        """

        async def close() -> None:
            if accept and websocket.application_state is not WebSocketState.CONNECTED:
                await websocket.accept(answered_subprotocol(websocket))
            await websocket.close(code, truncate_reason(reason))

        if accept:  # before it is sent: one implementation of uvicorn's waits for the answer itself
            server_transport = ServerTransport(*asgi_callables(websocket))
            server_transport.abort_unless_answered(taken=False)  # there is nothing but the close frame
        await self._last_words(websocket, close())
        return WebSocketException(code, truncate_reason(reason))

    async def _last_words(self, websocket: WebSocket, words: Coroutine[Any, Any, None]) -> None:
        telling = self._tasks.spawn(words, name="ws-refusal")
        await wait_for_all([telling], REJECTION_TIMEOUT)
        telling.cancel()
        mark_handled(websocket)


async def _answer(error: HTTPException) -> Response:
    """What FastAPI answers; without its detail where that, which may repeat what a client calls itself, is no JSON."""
    try:
        return await http_exception_handler(None, error)  # type: ignore[arg-type]  # it does not look at it
    except (TypeError, ValueError):
        bare = HTTPException(error.status_code, headers=error.headers)
        return await http_exception_handler(None, bare)  # type: ignore[arg-type]


def _is_answered_by_app(error: HTTPException, websocket: WebSocket) -> bool:
    """Whether the application has a handler of its own for an error, and Starlette sends what that returns.

    Before 0.41 it does not: the handshake gets no answer at all.
    """
    return _STARLETTE >= (0, 41) and handler_of(websocket, error) is not None


def _is_http_only(error: Exception) -> bool:
    """Whether to accept its client would cost what is to be saved, or would do a foreign page a favour."""
    if isinstance(error, TooManyConnectionsError):
        return False
    return isinstance(error, (ConnectionLimitExceededError, OriginNotAllowedError, ShutdownError))
