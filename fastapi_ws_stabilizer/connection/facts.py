"""What a socket knows of itself: whose it is, where it comes from, how it is doing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import WebSocket
from starlette.datastructures import URL, Address, Headers, MutableHeaders, QueryParams, State
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.errors import MemoryLimitExceededError
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome
from fastapi_ws_stabilizer.wire.handshake import ANSWERED_KEY, HEADERS_KEY


class SocketFacts:
    """The part of a `StableSocket` that only looks."""

    __slots__ = ("_connection", "_metadata", "_user_data")

    def __init__(self, connection: Connection, metadata: Mapping[str, Any] | None) -> None:
        self._connection = connection
        self._metadata: MeteredDict | None = None
        self._user_data: MeteredDict | None = None
        if metadata:
            self._metadata = MeteredDict(connection.budget, None, metadata)
            self._metadata.owner = connection

    # ── who and where ──

    @property
    def client_id(self) -> str:
        """Who is connected. Several connections can share one."""
        return self._connection.client_id

    @property
    def connection_id(self) -> str:
        """This connection, and no other ever."""
        return self._connection.connection_id

    @property
    def recipient_id(self) -> str:
        """By what rooms know it: its connection, or its session if it has one."""
        recipient_id: str = self._connection.recipient.connection_id
        return recipient_id

    @property
    def metadata(self) -> dict[str, Any]:
        """What `manager.connect(..., metadata=...)` was given."""
        if self._metadata is None:
            self._metadata = MeteredDict(self._open_budget, self._connection.recipient)
        return self._metadata

    @property
    def user_data(self) -> dict[str, Any]:
        """Yours: anything that belongs to this client's session; to this connection, if it has none.

        It is measured as it is filled: a write that would be more than `max_memory_per_connection` raises
        `MemoryLimitExceededError`, and changes nothing.
        """
        session = self._connection.session
        if session is not None:
            if session.user_data is None:
                session.user_data = MeteredDict(self._connection.budget if session.ended is None else None, session)
            return session.user_data
        if self._user_data is None:
            self._user_data = MeteredDict(self._open_budget, self._connection)
        return self._user_data

    @user_data.setter
    def user_data(self, data: Mapping[str, Any]) -> None:
        """Put another dict in its place: what is in it is copied.

        Raises:
            MemoryLimitExceededError: It is more than may be held. What was there stays.
        """
        current: Any = self.user_data
        if data is not current:  # `ws.user_data |= ...` has written it already
            current.replace(data)

    @property
    def _open_budget(self) -> MemoryBudget | None:
        """Where what is kept for it is counted: nowhere any more when it is over, for nobody would take it out."""
        return self._connection.budget if self._connection.close_info is None else None

    @property
    def _user_data_bytes(self) -> int:
        """Bytes that its user data and its metadata hold, but not those of its session."""
        return self._metadata_bytes + (0 if self._user_data is None else self._user_data.held_bytes)

    @property
    def _metadata_bytes(self) -> int:
        """Bytes that its metadata hold."""
        return 0 if self._metadata is None else self._metadata.held_bytes

    def _transfer_user_data(self, user_data: MeteredDict) -> None:
        """Have the user data of a connection before, the same dict: a hook of that one may still fill it.

        Raises:
            MemoryLimitExceededError: There is no room for it beside what there is already, which stays.
        """
        own, self._user_data = self._user_data, user_data
        previous_owner, user_data.owner = user_data.owner, self._connection  # room is made for this one, not from it
        if own is None:
            return
        try:
            user_data.update(own)
        except MemoryLimitExceededError:
            self._user_data, user_data.owner = own, previous_owner
            raise
        own.detach()

    def _copy_user_data(self, user_data: Mapping[str, Any]) -> None:
        """Have a copy of the user data of another connection.

        Raises:
            MemoryLimitExceededError: There is no room for it.
        """
        self.user_data.update({**user_data, **self.user_data})

    def _detach_user_data(self) -> None:
        """Its connection is over: count no longer what is kept for it, and for nobody else."""
        if self._metadata is not None:
            self._metadata.detach()
        if self._user_data is not None and self._user_data.owner is self._connection:
            self._user_data.detach()
        if not self._connection.opened:  # it has been turned away, and has no ending by which that can be seen
            self._metadata = self._metadata or MeteredDict(None, None)
            self._user_data = self._user_data or MeteredDict(None, None)

    @property
    def session_id(self) -> str | None:
        """The session of a `stabilizer.v1.json` client, the same over all its connections; `None` of a plain client."""
        session = self._connection.session
        return None if session is None else session.connection_id

    @property
    def resumed(self) -> ResumeOutcome:
        """What the client has got back that asked for its session: `none` if it asked for nothing."""
        return self._connection.outcome

    @property
    def websocket(self) -> WebSocket:
        """Starlette's `WebSocket` of this connection. Reading and writing it goes through this socket's queues."""
        return self._connection.websocket

    @property
    def scope(self) -> Any:
        """The ASGI scope."""
        return self.websocket.scope

    @property
    def app(self) -> Any:
        """The application that serves this connection."""
        return self.websocket.app

    @property
    def url(self) -> URL:
        """The URL of the handshake."""
        return self.websocket.url

    @property
    def headers(self) -> Headers:
        """The headers of the handshake."""
        return self.websocket.headers

    @property
    def query_params(self) -> QueryParams:
        """The query parameters of the handshake."""
        return self.websocket.query_params

    @property
    def path_params(self) -> dict[str, Any]:
        """The path parameters of the handshake."""
        return self.websocket.path_params

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies of the handshake."""
        return self.websocket.cookies

    @property
    def client(self) -> Address | None:
        """The address of the other end, which may be a proxy."""
        return self.websocket.client

    @property
    def subprotocol(self) -> str | None:
        """The subprotocol that the handshake was answered with.

        `None` before that, where there is none, and where your code has accepted the WebSocket itself.
        """
        subprotocol: str | None = self.scope.get(ANSWERED_KEY)
        return subprotocol

    @property
    def accept_headers(self) -> MutableHeaders:
        """Headers that go with the answer to the handshake, such as `Set-Cookie`. For `on_handshake` functions.

        Raises:
            RuntimeError: It is answered. So it is before those functions where an identity reads the first message.
        """
        if self.websocket.application_state is not WebSocketState.CONNECTING:
            raise RuntimeError("the handshake is answered: set ws.accept_headers in an on_handshake function")
        headers: MutableHeaders = self.scope.setdefault(HEADERS_KEY, MutableHeaders())
        return headers

    @property
    def state(self) -> State:
        """State that middleware and dependencies have attached to this connection."""
        return self.websocket.state

    # ── how it is doing ──

    @property
    def close_info(self) -> CloseInfo | None:
        """How the connection ended; `None` while it is open."""
        return self._connection.close_info

    @property
    def closed(self) -> bool:
        """Whether the connection is over or ending."""
        return self._connection.close_info is not None

    @property
    def reason(self) -> DisconnectReason | None:
        """Why the connection ended; `None` while it is open."""
        return None if self.close_info is None else self.close_info.cause

    @property
    def rtt(self) -> float | None:
        """Seconds of the last measured round trip; `None` before the first answered ping."""
        return self._connection.liveness.rtt

    @property
    def connected_seconds(self) -> float:
        """Seconds since the connection was opened."""
        return monotonic() - self._connection.opened_at

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last frame came from the client."""
        return monotonic() - self._connection.liveness.last_seen

    @property
    def queued_messages(self) -> int:
        """Messages that wait to be sent."""
        return len(self._connection.outbox)

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return self._connection.outbox.held_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that are held for it, or for its session: what waits, what is unacknowledged, user data."""
        return self._connection.memory_usage

    @property
    def dropped_messages(self) -> int:
        """Messages that were thrown away because the client is slow."""
        return self._connection.dropped_messages

    @property
    def unread_messages(self) -> int:
        """Messages that have been received and wait to be read."""
        return len(self._connection.inbox)

    @property
    def unread_bytes(self) -> int:
        """Bytes of memory that the unread messages hold."""
        return self._connection.inbox.held_bytes
