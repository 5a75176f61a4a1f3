"""The errors of this library.

```
WebSocketStabilizerError
├── SocketClosed                (also a WebSocketDisconnect)  the connection is over
│   ├── ConnectionTimeoutError                                ... because the client did not answer
│   └── SessionEndedError                                     the session is over, and with it what was waited for
├── NotOpenError                (also a RuntimeError)         used before it was accepted
├── ConnectionNotFoundError     (also a LookupError)          no such client
├── DuplicateClientError        (also a WebSocketException)   on_duplicate="reject" refused this connection
├── ConnectionLimitExceededError (also a WebSocketException)  there is no room for another connection
│   └── TooManyConnectionsError                               ... of this client, or from its address
├── OriginNotAllowedError       (also a WebSocketException)   a page of somebody else's site has opened this connection
├── ConcurrentReceiveError      (also a RuntimeError)         two readers on one socket
├── MessageEncodeError          (also a ValueError)           a payload that cannot be sent
├── MessageFormatError          (also a ValueError)           a received message of the wrong kind
├── RequestError                                              a request was answered with an error
├── RequestTimeoutError         (also a TimeoutError)         a request was not answered in time
├── UnsupportedByClientError    (also a RuntimeError)         something was asked of a client that cannot do it
├── InvalidTokenError           (also a ValueError and a WebSocketException)  a token or ticket is not good
├── TokenExpiredError           (also a ValueError and a WebSocketException)  a token or ticket was good once
├── MemoryLimitExceededError                                  more is to be kept for a connection than may be
├── RoomLimitError              (also a RuntimeError)         in as many rooms as one connection may be
├── RoomNameError               (also a ValueError)           no room can be called so
├── BroadcastFailedError                                      raise_for_failure(): a broadcast reached no client
├── ShutdownError               (also a RuntimeError and a WebSocketException)  the manager is shutting down
├── UnknownPlatformError        (also a ValueError)           nothing is known of a platform of that name
├── UnsupportedPlatformError    (also a ValueError)           a platform that cannot hold sockets
├── ManagerNotFoundError        (also a RuntimeError)         no manager belongs to this app
├── ManagerNotRunningError      (also a RuntimeError)         a call from another thread, and no event loop that runs it
├── ThreadCallTimeoutError      (also a TimeoutError)         a call from another thread did not finish in time
└── WrongLoopError              (also a RuntimeError)         the manager runs on another event loop
```

Each knows the close code that an endpoint which lets it escape is closed with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Final, Literal

from fastapi import WebSocketDisconnect, WebSocketException

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason


class WebSocketStabilizerError(Exception):
    """Base of all errors of this library.

    Attributes:
        close_code: The close code that the client gets if an endpoint lets this error escape. 1011 stands for a bug.
        close_text: The close reason that goes with it: for the client, so without advice for developers.
    """

    close_code: ClassVar[int] = 1011
    close_text: ClassVar[str] = ""


class SocketClosed(WebSocketStabilizerError, WebSocketDisconnect):
    """The connection is over: nothing can be sent, and everything that was received has been read.

    Attributes:
        close_info: How it ended.
        code: Close code, as in Starlette's `WebSocketDisconnect`.
        reason: Close reason, as in Starlette's `WebSocketDisconnect`.
    """

    def __init__(self, close_info: CloseInfo) -> None:
        WebSocketDisconnect.__init__(self, close_info.code, close_info.reason)
        self.close_info = close_info

    def __str__(self) -> str:
        text = f" ({self.close_info.reason})" if self.close_info.reason else ""
        return f"the connection is over: {self.close_info.cause.value}, code {self.close_info.code}{text}"

    def __reduce__(self) -> tuple[type[SocketClosed], tuple[CloseInfo]]:
        return type(self), (self.close_info,)


class ConnectionTimeoutError(SocketClosed):
    """The connection is over because the client did not answer a heartbeat in time.

    It is no `TimeoutError`: a loop that waits with a timeout and goes on after one would never end.
    """


class SessionEndedError(SocketClosed):
    """The session of a client is over: it has said goodbye, or has not come back in time."""

    def __str__(self) -> str:
        return f"the session is over ({self.close_info.cause.value}), and with it what was waited for"


def closed_error_for(close_info: CloseInfo) -> SocketClosed:
    """The error that tells a reader or sender of an ended connection how it ended."""
    if close_info.cause is DisconnectReason.HEARTBEAT_TIMEOUT:
        return ConnectionTimeoutError(close_info)
    return SocketClosed(close_info)


class NotOpenError(WebSocketStabilizerError, RuntimeError):
    """The socket is used before it was accepted."""

    def __str__(self) -> str:
        return (
            "this socket is not accepted yet: in on_handshake it can only be looked at, or refused by raising an "
            "HTTPException; send and receive from on_connect on"
        )


class ConnectionNotFoundError(WebSocketStabilizerError, LookupError):
    """No connection of that client exists.

    Attributes:
        client_id: The client id that was looked for.
    """

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.client_id = client_id

    def __str__(self) -> str:
        return f"client {self.client_id!r} is not connected to this manager"


class DuplicateClientError(WebSocketStabilizerError, WebSocketException):
    """The client is connected already and `on_duplicate="reject"` refuses a second connection.

    An endpoint that lets it escape closes with 4409.

    Attributes:
        client_id: The client id that is taken.
    """

    close_code = 4409
    close_text = "connected already"

    def __init__(self, client_id: str) -> None:
        WebSocketException.__init__(self, self.close_code, self.close_text)
        self.client_id = client_id

    def __str__(self) -> str:
        return (
            f"client {self.client_id!r} is connected already; on_duplicate='replace' or 'allow' would let this one in"
        )


class ConnectionLimitExceededError(WebSocketStabilizerError, WebSocketException):
    """There is no room for another connection.

    An endpoint that lets it escape closes with its code, also one that has not connected its socket yet.

    Attributes:
        limit: The option that says so, such as `max_connections`.
        most: Its value.
        retry_after: Seconds after which the client may try again.
    """

    close_code = 4503
    close_text = "the server is full"

    def __init__(self, limit: str, most: float, retry_after: float) -> None:
        text = f"{self.close_text}; retry={math.ceil(retry_after * 1000)}"
        WebSocketException.__init__(self, self.close_code, text)
        self.limit = limit
        self.most = most
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"no more connections are taken: {self.limit} is {self.most}"


class TooManyConnectionsError(ConnectionLimitExceededError):
    """There are too many connections of this client, or from its address, or it comes too often."""

    close_code = 4429
    close_text = "too many connections"


class OriginNotAllowedError(WebSocketStabilizerError, WebSocketException):
    """The page that has opened this connection belongs to somebody else's site.

    An endpoint that lets it escape closes with 4403, also one that has not connected its socket yet.

    Attributes:
        problem: What is wrong with its `Origin`, as a fixed word: `foreign`, `null`, `missing`, `malformed`, `several`.
        host: The hosts that are ours, with which it was compared.
    """

    close_code = 4403
    close_text = "origin not allowed"

    def __init__(self, problem: str, host: str = "") -> None:
        WebSocketException.__init__(self, self.close_code, self.close_text)
        self.problem = problem
        self.host = host

    def __str__(self) -> str:
        return f"the Origin of the handshake is not allowed ({self.problem}); allowed_origins says which are"


class ConcurrentReceiveError(WebSocketStabilizerError, RuntimeError):
    """Two tasks wait for the next message of one connection, so each would get only a part of the stream."""

    def __str__(self) -> str:
        return (
            "another task is already receiving from this connection: let one task read "
            "(or ws.run() dispatch) and hand the messages on"
        )


class MessageEncodeError(WebSocketStabilizerError, ValueError):
    """A payload cannot be encoded; no socket was touched."""


class MessageFormatError(WebSocketStabilizerError, ValueError):
    """A received message is not of the kind that the reader asked for. The connection stays usable."""

    close_code = 1003
    close_text = "unexpected kind of message"


class RequestError(WebSocketStabilizerError):
    """A request is answered with an error: raise it in a handler to answer so, catch it where `request()` is awaited.

    Attributes:
        code: What is wrong, as a fixed word.
        message: What is wrong, for people.
    """

    close_code = 1008

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.message else self.code


class RequestTimeoutError(WebSocketStabilizerError, TimeoutError):
    """A request was not answered in time. The other side may have handled it all the same.

    Attributes:
        timeout: The seconds that it was waited for.
    """

    close_code = 4408

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self.timeout = timeout

    def __str__(self) -> str:
        return f"the request was not answered within {self.timeout} seconds"


class UnsupportedByClientError(WebSocketStabilizerError, RuntimeError):
    """Something was asked of a plain client that only a client of `stabilizer.v1.json` can do."""

    def __str__(self) -> str:
        return (
            "this client is a plain WebSocket: acknowledgements and requests need one that speaks stabilizer.v1.json, "
            "such as fastapi_ws_stabilizer.client; look at ws.session first"
        )


TokenKind = Literal["reconnect token", "ticket"]
"""What a client proves with a token who it is for: to get back what it has left, or to come in."""

_TOKEN_PROBLEMS: Final = {
    "malformed": "it is no token of this library, or was cut",
    "signature": "it was altered, or signed with a secret that is not in reconnect_secret",
    "other_client": "it was issued for another client",
    "used": "it was used before, and is good once",
    "revoked": "what this client had was revoked after it was issued; it may ask for a new one",
    "disabled": "enable_reconnect is False",
}


class InvalidTokenError(WebSocketStabilizerError, WebSocketException, ValueError):
    """A reconnect token or a ticket is not good. The token itself is nowhere in this error.

    An endpoint that lets it escape closes with 4401, also one that has not connected its socket yet.

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
        return f"the {self.kind} is not good: {_TOKEN_PROBLEMS.get(self.problem, self.problem)}"


_TTL_OPTIONS: Final[Mapping[str, str]] = {"reconnect token": "reconnect_token_ttl", "ticket": "ticket_ttl"}


class TokenExpiredError(WebSocketStabilizerError, WebSocketException, ValueError):
    """A reconnect token or a ticket was good once. A client that gets it back should ask for a new one.

    An endpoint that lets it escape closes with 4401, also one that has not connected its socket yet.

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
    """More is to be kept for a connection than may be; what was there is unchanged.

    An endpoint that lets it escape is closed with 4503.

    Attributes:
        limit: The option that says so: `max_memory_per_connection` or `max_total_memory`.
        most: Its value, in bytes.
        wanted: How many bytes it would have been.
    """

    close_code = 4503
    close_text = "too much is kept"

    def __init__(self, limit: str, most: int, wanted: int) -> None:
        super().__init__(limit, most, wanted)
        self.limit = limit
        self.most = most
        self.wanted = wanted

    def __str__(self) -> str:
        return f"{self.wanted} bytes would be kept, and {self.limit} is {self.most}"


class RoomLimitError(WebSocketStabilizerError, RuntimeError):
    """A connection is in as many rooms as it may be. An endpoint that lets it escape is closed with 1008.

    Attributes:
        room: The room that it was to join.
        limit: `max_rooms_per_connection`.
    """

    close_code = 1008
    close_text = "too many rooms"

    def __init__(self, room: str, limit: int) -> None:
        super().__init__(room, limit)
        self.room = room
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"the connection cannot join {self.room!r:.80}: it is in {self.limit} rooms, "
            "as many as max_rooms_per_connection allows"
        )


class RoomNameError(WebSocketStabilizerError, ValueError):
    """No room can be called so. An endpoint that lets it escape is closed with 1008: clients often choose names.

    Attributes:
        name: The name.
        rule: What a name is.
    """

    close_code = 1008
    close_text = "no name for a room"

    def __init__(self, name: object, rule: str) -> None:
        super().__init__(name, rule)
        self.name = name
        self.rule = rule

    def __str__(self) -> str:
        return f"a room's name is a string of {self.rule}, not {self.name!r:.80}"


class BroadcastFailedError(WebSocketStabilizerError):
    """A broadcast had recipients and could be queued for none of them: all were too slow.

    Only `BroadcastResult.raise_for_failure()` raises it. An endpoint that lets it escape is no bug: its client is
    closed with 1013 and may come back.

    Attributes:
        total: How many connections it was meant for.
    """

    close_code = 1013
    close_text = "try again later"

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.total = total

    def __str__(self) -> str:
        return f"the broadcast could be queued for none of its {self.total} recipients"


class ShutdownError(WebSocketStabilizerError, WebSocketException, RuntimeError):
    """The manager drains or was shut down, and takes no new connections until `start()` is called again.

    An endpoint that lets it escape closes with 1012 and `retry=`, also one that has not connected its socket yet.

    Attributes:
        retry_after: Seconds after which the client may try again: another server may be there by then.
    """

    close_code = 1012
    close_text = "server shutdown"

    def __init__(self, retry_after: float = 1.0) -> None:
        WebSocketException.__init__(self, self.close_code, f"{self.close_text}; retry={math.ceil(retry_after * 1000)}")
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[ShutdownError], tuple[float]]:
        return type(self), (self.retry_after,)

    def __str__(self) -> str:
        return "the manager is draining or shut down, and takes no connections until start() is called again"


class UnknownPlatformError(WebSocketStabilizerError, ValueError):
    """Nothing is known of a platform of that name.

    Attributes:
        name: The name that was given.
        known: The names that there are.
        similar: The one that may have been meant.
    """

    def __init__(self, name: str, known: tuple[str, ...], similar: str | None = None) -> None:
        super().__init__(name, known, similar)
        self.name = name
        self.known = known
        self.similar = similar

    def __str__(self) -> str:
        hint = f"; did you mean {self.similar!r}?" if self.similar else "."
        return f"nothing is known of a platform {self.name!r}{hint} Known are {', '.join(self.known)}"


class UnsupportedPlatformError(WebSocketStabilizerError, ValueError):
    """A platform cannot hold sockets, so no option helps.

    Attributes:
        name: The platform's name.
        refusal: Why.
    """

    def __init__(self, name: str, refusal: str) -> None:
        super().__init__(name, refusal)
        self.name = name
        self.refusal = refusal

    def __str__(self) -> str:
        return f"no WebSocket can be held on {self.name}: {self.refusal}. Run the app where a process holds its sockets"


class ManagerNotFoundError(WebSocketStabilizerError, RuntimeError):
    """`stable_socket` or `stats_router` is used in an app that no manager belongs to."""

    def __str__(self) -> str:
        return (
            "no WebSocketConnectionManager belongs to this app. Write FastAPI(lifespan=manager.lifespan), "
            "or call manager.install(app), or name the manager: Depends(manager.socket)"
        )


class ManagerNotRunningError(WebSocketStabilizerError, RuntimeError):
    """A call came from another thread, and the manager's event loop does not run."""

    def __str__(self) -> str:
        return (
            "this manager does not run: manager.from_thread works from the start of the app (its lifespan, or its "
            "first socket) until its event loop ends. Stop the threads that call it when the app shuts down"
        )


class ThreadCallTimeoutError(WebSocketStabilizerError, TimeoutError):
    """A call by `manager.from_thread` did not finish in time, and was cancelled.

    Attributes:
        timeout: The seconds that the thread waited.
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
        "this manager serves on another event loop. In tests, let all sockets share one loop: "
        "with TestClient(app) as client: ..."
    ),
    "other_loop": (
        "this call was made outside of the event loop that the manager runs on. A manager, its rooms and its sockets "
        "work on that loop only. From another thread write manager.from_thread.broadcast(...), "
        "manager.from_thread.send_to_client(...), manager.from_thread.disconnect(...), or "
        "manager.from_thread.run(ws.send, message), without asyncio.run(). "
        "In tests, let everything share one loop: with TestClient(app) as client: ..."
    ),
    "no_asyncio": (
        "no asyncio event loop runs here, and this library needs one. hypercorn runs another one with "
        "--worker-class trio: leave that option out, or write --worker-class uvloop"
    ),
    "own_loop": (
        "manager.from_thread was used on the manager's own event loop, which would wait for itself for ever. "
        "Here, write await manager.broadcast(...); manager.from_thread is for other threads"
    ),
}


class WrongLoopError(WebSocketStabilizerError, RuntimeError):
    """A manager, a room or a socket is used on an event loop, or in a thread, that it does not belong to.

    Attributes:
        problem: `two_loops`, `other_loop`, `no_asyncio`, or `own_loop` (`manager.from_thread` on the manager's own
            loop).
    """

    def __init__(self, problem: str = "other_loop") -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return _LOOP_PROBLEMS.get(self.problem, self.problem)
