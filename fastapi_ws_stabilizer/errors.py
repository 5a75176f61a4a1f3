"""The errors of this library.

```
WebSocketStabilizerError
├── SocketClosed                (also a WebSocketDisconnect)  the connection is over
│   └── ConnectionTimeoutError                                ... because the client did not answer
├── NotOpenError                (also a RuntimeError)         used before it was accepted
├── ConnectionNotFoundError     (also a LookupError)          no such client
├── DuplicateClientError                                      on_duplicate="reject" refused this connection
├── ConcurrentReceiveError      (also a RuntimeError)         two readers on one socket
├── MessageEncodeError          (also a ValueError)           a payload that cannot be sent
├── MessageFormatError          (also a ValueError)           a received message of the wrong kind
├── RoomLimitError              (also a RuntimeError)         in as many rooms as one connection may be
├── BroadcastFailedError                                      a broadcast reached nobody
├── ShutdownError               (also a RuntimeError)         the manager is shutting down
├── ManagerNotFoundError        (also a RuntimeError)         no manager belongs to this app
└── WrongLoopError              (also a RuntimeError)         the manager runs on another event loop
```

Each knows the close code that an endpoint which lets it escape is closed with.
"""

from __future__ import annotations

from typing import ClassVar

from fastapi import WebSocketDisconnect

from fastapi_ws_stabilizer.close_codes import DisconnectReason, Ending


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
        ending: How it ended.
        code: Close code, as in Starlette's `WebSocketDisconnect`.
        reason: Close reason, as in Starlette's `WebSocketDisconnect`.
    """

    def __init__(self, ending: Ending) -> None:
        WebSocketDisconnect.__init__(self, ending.code, ending.text)
        self.ending = ending

    def __str__(self) -> str:
        text = f" ({self.ending.text})" if self.ending.text else ""
        return f"the connection is over: {self.ending.reason.value}, code {self.ending.code}{text}"

    def __reduce__(self) -> tuple[type[SocketClosed], tuple[Ending]]:
        return type(self), (self.ending,)


class ConnectionTimeoutError(SocketClosed):
    """The connection is over because the client did not answer a heartbeat in time.

    It is no `TimeoutError`: a loop that waits with a timeout and goes on after one would never end.
    """


def socket_closed(ending: Ending) -> SocketClosed:
    """The error that tells a reader or sender of an ended connection how it ended."""
    if ending.reason is DisconnectReason.HEARTBEAT_TIMEOUT:
        return ConnectionTimeoutError(ending)
    return SocketClosed(ending)


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


class DuplicateClientError(WebSocketStabilizerError):
    """The client is connected already and `on_duplicate="reject"` refuses a second connection.

    Attributes:
        client_id: The client id that is taken.
    """

    close_code = 4409
    close_text = "connected already"

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.client_id = client_id

    def __str__(self) -> str:
        return (
            f"client {self.client_id!r} is connected already; on_duplicate='replace' or 'allow' would let this one in"
        )


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
            f"the connection cannot join {self.room!r}: it is in {self.limit} rooms, "
            "as many as max_rooms_per_connection allows"
        )


class BroadcastFailedError(WebSocketStabilizerError):
    """A broadcast had recipients and could be queued for none of them: all were too slow.

    An endpoint that lets it escape is no bug: its client is closed with 1013 and may come back.

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


class ShutdownError(WebSocketStabilizerError, RuntimeError):
    """The manager has been shut down and takes no new connections until `start()` is called again."""

    close_code = 1012
    close_text = "server shutdown"

    def __str__(self) -> str:
        return "the manager is shut down: call start() before it can take connections again"


class ManagerNotFoundError(WebSocketStabilizerError, RuntimeError):
    """`stable_socket` or `stats_router` is used in an app that no manager belongs to."""

    def __str__(self) -> str:
        return (
            "no WebSocketConnectionManager belongs to this app. Write FastAPI(lifespan=manager.lifespan), "
            "or call manager.install(app), or name the manager: Depends(manager.socket)"
        )


class WrongLoopError(WebSocketStabilizerError, RuntimeError):
    """One manager is used from two event loops at the same time."""

    def __str__(self) -> str:
        return (
            "this manager has open connections on another event loop. In tests, let all sockets share one loop: "
            "with TestClient(app) as client: ..."
        )
