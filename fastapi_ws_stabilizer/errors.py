"""The errors of this library, all below `WebSocketStabilizerError`.

Each error has the close code that the client gets if an endpoint raises it. `docs/reference/errors.md` lists them all.
`close_info_for` returns the `CloseInfo` for any exception of an endpoint.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import ClassVar, Final, Literal

from fastapi import WebSocketDisconnect, WebSocketException
from fastapi.exceptions import WebSocketRequestValidationError
from pydantic_core import to_json
from starlette import exceptions as starlette_exceptions  # FastAPI's own are subclasses of these

from fastapi_ws_stabilizer.close_codes import (
    MAX_REASON_BYTES,
    CloseInfo,
    DisconnectReason,
    check_close_code,
    local_close,
    truncate_reason,
)


class WebSocketStabilizerError(Exception):
    """Base of all errors of this library.

    Attributes:
        close_code: Close code that the client gets if an endpoint lets this error escape. 1011 stands for a bug.
        close_text: Close reason that the client gets with it.
    """

    close_code: ClassVar[int] = 1011
    close_text: ClassVar[str] = ""


class SocketClosed(WebSocketStabilizerError, WebSocketDisconnect):
    """The connection is closed, and all received messages have been read.

    Attributes:
        close_info: How the connection ended.
        code: Close code, as in Starlette's `WebSocketDisconnect`.
        reason: Close reason, as in Starlette's `WebSocketDisconnect`.
    """

    def __init__(self, close_info: CloseInfo) -> None:
        WebSocketDisconnect.__init__(self, close_info.code, close_info.reason)
        self.close_info = close_info

    def __str__(self) -> str:
        text = f" ({self.close_info.reason})" if self.close_info.reason else ""
        return f"the connection is closed: {self.close_info.cause.value}, code {self.close_info.code}{text}"

    def __reduce__(self) -> tuple[type[SocketClosed], tuple[CloseInfo]]:
        return type(self), (self.close_info,)


class ConnectionTimeoutError(SocketClosed):
    """The connection is closed because the client did not answer a heartbeat in time.

    It is not a `TimeoutError`, because a loop that continues after a timeout would never end.
    """


class SessionEndedError(SocketClosed):
    """The session has ended: the client closed it, or did not reconnect within `session_ttl`."""

    def __str__(self) -> str:
        return f"the session has ended ({self.close_info.cause.value}), so the operation cannot complete"


def no_websocket_error() -> RuntimeError:
    """Return the error for code that uses the WebSocket of a connection after its end."""
    return RuntimeError(
        "the WebSocket and its handshake (headers, url, path_params, state, ...) are not available after the "
        "connection has ended: store what this hook needs in ws.user_data"
    )


def closed_error_for(close_info: CloseInfo) -> SocketClosed:
    """Return the error for a read or a send on a closed connection."""
    if close_info.cause is DisconnectReason.HEARTBEAT_TIMEOUT:
        return ConnectionTimeoutError(close_info)
    return SocketClosed(close_info)


class NotOpenError(WebSocketStabilizerError, RuntimeError):
    """Your code used the socket before the handshake was accepted."""

    def __str__(self) -> str:
        return (
            "this socket is not accepted yet: on_handshake hooks can only read its attributes, or reject it by raising "
            "an HTTPException; send and receive from on_connect on"
        )


class ConnectionNotFoundError(WebSocketStabilizerError, LookupError):
    """The client is not connected.

    Attributes:
        client_id: The client id of the call.
    """

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.client_id = client_id

    def __str__(self) -> str:
        return f"client {self.client_id!r} is not connected to this manager"


class DuplicateClientError(WebSocketStabilizerError, WebSocketException):
    """The client is already connected, and `on_duplicate="reject"` rejects a second connection.

    Attributes:
        client_id: The client id that is already connected.
    """

    close_code = 4409
    close_text = "already connected"

    def __init__(self, client_id: str) -> None:
        WebSocketException.__init__(self, self.close_code, self.close_text)
        self.client_id = client_id

    def __str__(self) -> str:
        return (
            f"client {self.client_id!r} is already connected; on_duplicate='replace' or 'allow' accepts this connection"
        )


class ConnectionLimitExceededError(WebSocketStabilizerError, WebSocketException):
    """The server accepts no further connection: it is full, or handshakes arrive too fast.

    Attributes:
        option: The option that was reached, such as `max_connections`.
        limit: The value of that option.
        retry_after: Seconds after which the client may try again.
    """

    close_code = 4503
    close_text = "the server is full"

    def __init__(self, option: str, limit: float, retry_after: float) -> None:
        text = f"{self.close_text}; retry={math.ceil(retry_after * 1000)}"
        WebSocketException.__init__(self, self.close_code, text)
        self.option = option
        self.limit = limit
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"the server accepts no more connections: {self.option} is {self.limit}"


class TooManyConnectionsError(ConnectionLimitExceededError):
    """The client or its IP address has too many connections, or connects too often."""

    close_code = 4429
    close_text = "too many connections"


class OriginNotAllowedError(WebSocketStabilizerError, WebSocketException):
    """The `Origin` of the handshake is not allowed.

    Attributes:
        problem: What is wrong with the `Origin`: `foreign`, `null`, `missing`, `malformed` or `several`.
        host: The server's own hosts that the `Origin` was compared with.
    """

    close_code = 4403
    close_text = "origin not allowed"

    def __init__(self, problem: str, host: str = "") -> None:
        WebSocketException.__init__(self, self.close_code, self.close_text)
        self.problem = problem
        self.host = host

    def __str__(self) -> str:
        return f"the Origin of the handshake is not allowed ({self.problem}): add allowed ones to allowed_origins"


class ConcurrentReceiveError(WebSocketStabilizerError, RuntimeError):
    """Two tasks receive from one connection, so that each would get only some of the messages."""

    def __str__(self) -> str:
        return (
            "another task is already receiving from this connection: let one task (or ws.run()) read, and pass the "
            "messages on from there"
        )


class MessageEncodeError(WebSocketStabilizerError, ValueError):
    """The message cannot be encoded. It was sent to no client."""


class MessageFormatError(WebSocketStabilizerError, ValueError):
    """A received message is not of the requested kind, such as text or JSON. The connection stays open."""

    close_code = 1003
    close_text = "unexpected kind of message"


class RequestError(WebSocketStabilizerError):
    """Error reply to a request: a handler raises it, and the caller of `request()` gets it.

    Attributes:
        code: Machine-readable code of the error.
        message: Text for people.
    """

    close_code = 1008

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.message else self.code


class RequestTimeoutError(WebSocketStabilizerError, TimeoutError):
    """A request got no reply within its timeout. The peer may still have handled it.

    Attributes:
        timeout: Timeout of the request in seconds.
    """

    close_code = 4408

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self.timeout = timeout

    def __str__(self) -> str:
        return f"the request was not answered within {self.timeout} seconds"


class UnsupportedByClientError(WebSocketStabilizerError, RuntimeError):
    """Your code requested an acknowledgement or a reply from a plain client, which cannot send one."""

    def __str__(self) -> str:
        return (
            "this client is a plain WebSocket: acknowledgements and requests need a client that speaks "
            "stabilizer.v1.json, such as fastapi_ws_stabilizer.client; check ws.session_id first"
        )


TokenKind = Literal["reconnect token", "ticket"]
"""Kind of a token: a reconnect token restores state, a ticket admits a handshake."""

_TOKEN_PROBLEMS: Final = {
    "malformed": "it is not a token of this library, or is truncated",
    "signature": "it was altered, or signed with a secret that is not in reconnect_secret",
    "other_client": "it was issued for another client",
    "used": "it was already used, and is valid only once",
    "revoked": "it was revoked after it was issued; the client may request a new one",
    "disabled": "enable_reconnect is False",
}


class InvalidTokenError(WebSocketStabilizerError, WebSocketException, ValueError):
    """A reconnect token or a ticket is invalid. The error does not contain the token.

    Attributes:
        problem: `malformed`, `signature`, `other_client`, `used`, `revoked` or `disabled`.
        kind: `reconnect token` or `ticket`.
    """

    close_code = 4401
    close_text = "invalid reconnect token"

    def __init__(self, problem: str = "malformed", *, kind: TokenKind = "reconnect token") -> None:
        WebSocketException.__init__(self, self.close_code, f"invalid {kind}")
        self.problem = problem
        self.kind = kind

    def __str__(self) -> str:
        return f"the {self.kind} is invalid: {_TOKEN_PROBLEMS.get(self.problem, self.problem)}"


_TTL_OPTIONS: Final[Mapping[str, str]] = {"reconnect token": "reconnect_token_ttl", "ticket": "ticket_ttl"}


class TokenExpiredError(WebSocketStabilizerError, WebSocketException, ValueError):
    """A reconnect token or a ticket has expired. The client should request a new one.

    Attributes:
        kind: `reconnect token` or `ticket`.
    """

    close_code = 4401
    close_text = "reconnect token expired"

    def __init__(self, *, kind: TokenKind = "reconnect token") -> None:
        WebSocketException.__init__(self, self.close_code, f"{kind} expired")
        self.kind = kind

    def __str__(self) -> str:
        return f"the {self.kind} has expired: {_TTL_OPTIONS[self.kind]} has passed since it was issued"


class MemoryLimitExceededError(WebSocketStabilizerError):
    """A value would exceed a memory limit. The stored values are unchanged.

    Attributes:
        option: The option that was exceeded: `max_memory_per_connection` or `max_total_memory`.
        limit: The value of that option, in bytes.
        requested: The bytes that would have been held with the value: of one client, or of all for `max_total_memory`.
    """

    close_code = 4503
    close_text = "memory limit exceeded"

    def __init__(self, option: str, limit: int, requested: int) -> None:
        super().__init__(option, limit, requested)
        self.option = option
        self.limit = limit
        self.requested = requested

    def __str__(self) -> str:
        return f"{self.requested} bytes would be held with the value, but {self.option} is {self.limit}"


class RoomLimitError(WebSocketStabilizerError, RuntimeError):
    """A connection is already in `max_rooms_per_connection` rooms.

    Attributes:
        room: The room that it could not join.
        limit: The value of `max_rooms_per_connection`.
    """

    close_code = 1008
    close_text = "too many rooms"

    def __init__(self, room: str, limit: int) -> None:
        super().__init__(room, limit)
        self.room = room
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"the connection cannot join {self.room!r:.80}: it is already in {self.limit} rooms, "
            "the maximum of max_rooms_per_connection"
        )


class RoomNameError(WebSocketStabilizerError, ValueError):
    """The name of a room is empty, longer than 256 characters, or has a control character.

    Attributes:
        name: The rejected name.
        rule: The rule for names.
    """

    close_code = 1008
    close_text = "invalid room name"

    def __init__(self, name: object, rule: str) -> None:
        super().__init__(name, rule)
        self.name = name
        self.rule = rule

    def __str__(self) -> str:
        return f"a room name must be a string of {self.rule}, not {self.name!r:.80}"


class BroadcastFailedError(WebSocketStabilizerError):
    """A broadcast had recipients, but could be queued for none of them.

    Only `BroadcastResult.raise_for_failure()` raises it.

    Attributes:
        total: Number of recipients.
    """

    close_code = 1013
    close_text = "try again later"

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.total = total

    def __str__(self) -> str:
        return f"the broadcast could be queued for none of its {self.total} recipients"


class ShutdownError(WebSocketStabilizerError, WebSocketException, RuntimeError):
    """The manager is draining or shut down, and accepts no connections until `start()` is called again.

    Attributes:
        retry_after: Seconds after which the client may try again.
    """

    close_code = 1012
    close_text = "server shutdown"

    def __init__(self, retry_after: float = 1.0) -> None:
        WebSocketException.__init__(self, self.close_code, f"{self.close_text}; retry={math.ceil(retry_after * 1000)}")
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[ShutdownError], tuple[float]]:
        return type(self), (self.retry_after,)

    def __str__(self) -> str:
        return "the manager is draining or shut down, and accepts no connections until start() is called again"


class UnknownPlatformError(WebSocketStabilizerError, ValueError):
    """The platform is unknown.

    Attributes:
        name: The unknown name.
        known: The known names.
        similar: The known name that is closest, or `None`.
    """

    def __init__(self, name: str, known: tuple[str, ...], similar: str | None = None) -> None:
        super().__init__(name, known, similar)
        self.name = name
        self.known = known
        self.similar = similar

    def __str__(self) -> str:
        hint = f"; did you mean {self.similar!r}?" if self.similar else "."
        return f"unknown platform {self.name!r}{hint} Known platforms: {', '.join(self.known)}"


class UnsupportedPlatformError(WebSocketStabilizerError, ValueError):
    """The platform cannot hold WebSockets with any options.

    Attributes:
        name: The platform's name.
        unsupported_reason: The reason.
    """

    def __init__(self, name: str, unsupported_reason: str) -> None:
        super().__init__(name, unsupported_reason)
        self.name = name
        self.unsupported_reason = unsupported_reason

    def __str__(self) -> str:
        return (
            f"{self.name} cannot hold WebSockets: {self.unsupported_reason}. "
            "Run the app where a process holds its sockets"
        )


class ManagerNotFoundError(WebSocketStabilizerError, RuntimeError):
    """`stable_socket` or `stats_router` is used in an app without a manager."""

    def __str__(self) -> str:
        return (
            "this app has no WebSocketConnectionManager. Write FastAPI(lifespan=manager.lifespan), "
            "or call manager.install(app), or name the manager: Depends(manager.socket)"
        )


class ManagerNotRunningError(WebSocketStabilizerError, RuntimeError):
    """`manager.from_thread` was called while the manager's event loop is not running."""

    def __str__(self) -> str:
        return (
            "this manager is not running: manager.from_thread works from the start of the app (its lifespan, or its "
            "first socket) until its event loop ends. Stop the threads that call it when the app shuts down"
        )


class ThreadCallTimeoutError(WebSocketStabilizerError, TimeoutError):
    """A call through `manager.from_thread` exceeded its timeout and was cancelled.

    Attributes:
        timeout: Timeout of the call in seconds.
    """

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self.timeout = timeout

    def __str__(self) -> str:
        return (
            f"the event loop did not finish this call within {self.timeout} seconds, so it was cancelled: "
            "the event loop is blocked, or the call needs a longer timeout="
        )


_LOOP_PROBLEMS: Final = {
    "two_loops": (
        "this manager belongs to another event loop. In tests, let all sockets share one loop: "
        "with TestClient(app) as client: ..."
    ),
    "other_loop": (
        "this call was made outside the manager's event loop. A manager, its rooms and its sockets work on that loop "
        "only. From another thread write manager.from_thread.broadcast(...), "
        "manager.from_thread.send_to_client(...), manager.from_thread.disconnect(...), or "
        "manager.from_thread.run(ws.send, message), without asyncio.run(). "
        "In tests, let everything share one loop: with TestClient(app) as client: ..."
    ),
    "no_asyncio": (
        "no asyncio event loop runs here, and this library needs one. hypercorn with --worker-class trio runs "
        "another one: leave that option out, or write --worker-class uvloop"
    ),
    "own_loop": (
        "manager.from_thread was used on the manager's own event loop, which would block itself. "
        "Write await manager.broadcast(...) here; manager.from_thread is for other threads"
    ),
}


class WrongLoopError(WebSocketStabilizerError, RuntimeError):
    """A manager, a room or a socket was used outside its event loop.

    Attributes:
        problem: `two_loops`, `other_loop`, `no_asyncio`, or `own_loop` (`manager.from_thread` on the manager's own
            loop).
    """

    def __init__(self, problem: str = "other_loop") -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return _LOOP_PROBLEMS.get(self.problem, self.problem)


# ── from errors to close infos ──

_EXPECTED_ERRORS: Final = (
    starlette_exceptions.HTTPException,
    starlette_exceptions.WebSocketException,
    WebSocketDisconnect,  # SocketClosed is one
    WebSocketRequestValidationError,
    asyncio.CancelledError,
)


def root_cause(error: BaseException) -> BaseException:
    """Return the exception that determines the `CloseInfo`.

    In an exception group, a bug takes precedence over a rejection, and a rejection over a disconnect.
    """
    inside = getattr(error, "exceptions", None)
    if not isinstance(inside, (tuple, list)) or not inside:
        return error
    causes = [root_cause(one) for one in inside]
    return min(
        causes, key=lambda one: (not is_bug(one), isinstance(one, (WebSocketDisconnect, asyncio.CancelledError)))
    )


def is_bug(error: BaseException) -> bool:
    """Return whether an exception that escaped from an endpoint is a bug in user code."""
    error = root_cause(error)
    if isinstance(error, _EXPECTED_ERRORS):
        return False
    return not isinstance(error, WebSocketStabilizerError) or error.close_code == WebSocketStabilizerError.close_code


def close_info_for(error: BaseException | None) -> CloseInfo:
    """Return the `CloseInfo` of a connection after its endpoint has returned (`None`) or raised `error`."""
    error = None if error is None else root_cause(error)
    if error is None or isinstance(error, WebSocketDisconnect):
        return local_close(DisconnectReason.COMPLETED)
    if isinstance(error, starlette_exceptions.HTTPException):
        return local_close(
            DisconnectReason.POLICY, code=_sendable(4000 + error.status_code), reason=_text(error) + _hint(error)
        )
    if isinstance(error, starlette_exceptions.WebSocketException):
        return local_close(DisconnectReason.POLICY, code=_sendable(error.code), reason=error.reason)
    if isinstance(error, WebSocketRequestValidationError):
        return local_close(DisconnectReason.POLICY, reason=_validation_text(error))
    if isinstance(error, WebSocketStabilizerError) and not is_bug(error):
        return local_close(DisconnectReason.POLICY, code=_sendable(error.close_code), reason=error.close_text)
    if isinstance(error, asyncio.CancelledError):
        return local_close(DisconnectReason.SERVER_SHUTDOWN)
    return local_close(DisconnectReason.ERROR)


def _sendable(code: int) -> int:
    try:
        return check_close_code(code)
    except ValueError:
        return 1008


def _text(error: starlette_exceptions.HTTPException) -> str:
    detail: object = error.detail
    return detail if isinstance(detail, str) else to_json(detail, fallback=str).decode("utf-8")


def _hint(error: starlette_exceptions.HTTPException) -> str:
    """Return the retry hint that clients of this library parse, from a `Retry-After` under 10,000 seconds."""
    wait = str((error.headers or {}).get("Retry-After", ""))
    return f"; retry={int(wait) * 1000}" if wait.isascii() and wait.isdigit() and len(wait) < 5 else ""


def _validation_text(error: WebSocketRequestValidationError) -> str:
    """Return the invalid parameters as JSON, as many as fit completely into a close reason."""
    problems: list[dict[str, str]] = []
    text = ""
    for problem in error.errors():
        problems.append({"loc": ".".join(map(str, problem.get("loc", ()))), "msg": str(problem.get("msg", ""))})
        longer = to_json(problems).decode("utf-8")
        if len(longer.encode()) > MAX_REASON_BYTES:
            return text or truncate_reason(f"invalid: {problems[0]['loc']}")
        text = longer
    return text
