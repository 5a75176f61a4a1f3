"""Read-only half of `StableSocket`: identity, handshake, user data and state."""

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
    """Base class of `StableSocket` with its read-only properties and its user data."""

    __slots__ = ("_connection", "_metadata", "_user_data")

    def __init__(self, connection: Connection, metadata: Mapping[str, Any] | None) -> None:
        self._connection = connection
        self._metadata: MeteredDict | None = None
        self._user_data: MeteredDict | None = None
        if metadata:
            self._metadata = MeteredDict(connection.budget, None, metadata)
            self._metadata.owner = connection

    # ── identity and handshake ──

    @property
    def client_id(self) -> str:
        """Id of the client. Several connections can share it."""
        return self._connection.client_id

    @property
    def connection_id(self) -> str:
        """Unique id of this connection."""
        return self._connection.connection_id

    @property
    def recipient_id(self) -> str:
        """Id used in rooms: that of the session, or of the connection if there is no session."""
        recipient_id: str = self._connection.recipient.connection_id
        return recipient_id

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata passed to `manager.connect(..., metadata=...)`."""
        if self._metadata is None:
            self._metadata = MeteredDict(self._open_budget, self._connection.recipient)
        return self._metadata

    @property
    def user_data(self) -> dict[str, Any]:
        """Data of your application for this session, or for this connection if there is no session.

        Each write is counted. A write that would exceed `max_memory_per_connection` raises `MemoryLimitExceededError`
        and changes nothing.
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
        """Replace the contents with a copy of another dict.

        Raises:
            MemoryLimitExceededError: The new contents exceed the memory limit. The old contents stay.
        """
        current: Any = self.user_data
        if data is not current:  # `ws.user_data |= ...` has already written to it
            current.replace(data)

    @property
    def _open_budget(self) -> MemoryBudget | None:
        """Memory budget for new data; `None` once the connection is closed, because nothing would release it."""
        return self._connection.budget if self._connection.close_info is None else None

    @property
    def _user_data_bytes(self) -> int:
        """Bytes held by the metadata and the connection's user data, without the session's user data."""
        return self._metadata_bytes + (0 if self._user_data is None else self._user_data.held_bytes)

    @property
    def _metadata_bytes(self) -> int:
        """Bytes held by the metadata."""
        return 0 if self._metadata is None else self._metadata.held_bytes

    def _transfer_user_data(self, user_data: MeteredDict) -> None:
        """Take over the user data of an earlier connection as the same dict, since its hooks may still write to it.

        Raises:
            MemoryLimitExceededError: The data does not fit together with this connection's own data, which stays.
        """
        own, self._user_data = self._user_data, user_data
        previous_owner, user_data.owner = (
            user_data.owner,
            self._connection,
        )  # eviction frees memory for this connection and spares it
        if own is None:
            return
        try:
            user_data.update(own)
        except MemoryLimitExceededError:
            self._user_data, user_data.owner = own, previous_owner
            raise
        own.detach()

    def _copy_user_data(self, user_data: Mapping[str, Any]) -> None:
        """Copy the user data of another connection. This connection's own values take precedence.

        Raises:
            MemoryLimitExceededError: The copy does not fit.
        """
        self.user_data.update({**user_data, **self.user_data})

    def _detach_user_data(self) -> None:
        """Stop counting the data that belongs to this closed connection alone."""
        if self._metadata is not None:
            self._metadata.detach()
        if self._user_data is not None and self._user_data.owner is self._connection:
            self._user_data.detach()
        if not self._connection.opened:  # it was rejected, so `_open_budget` cannot see a `close_info`
            self._metadata = self._metadata or MeteredDict(None, None)
            self._user_data = self._user_data or MeteredDict(None, None)

    @property
    def session_id(self) -> str | None:
        """Session id of a `stabilizer.v1.json` client, the same in all its connections; `None` for a plain client."""
        session = self._connection.session
        return None if session is None else session.connection_id

    @property
    def resumed(self) -> ResumeOutcome:
        """Outcome of the client's resume request; `none` if it did not ask to resume."""
        return self._connection.outcome

    @property
    def websocket(self) -> WebSocket:
        """Starlette's `WebSocket` of this connection. Its reads and writes go through this socket's queues."""
        return self._connection.websocket

    @property
    def scope(self) -> Any:
        """ASGI scope of the handshake."""
        return self.websocket.scope

    @property
    def app(self) -> Any:
        """Application that serves this connection."""
        return self.websocket.app

    @property
    def url(self) -> URL:
        """URL of the handshake."""
        return self.websocket.url

    @property
    def headers(self) -> Headers:
        """Headers of the handshake."""
        return self.websocket.headers

    @property
    def query_params(self) -> QueryParams:
        """Query parameters of the handshake."""
        return self.websocket.query_params

    @property
    def path_params(self) -> dict[str, Any]:
        """Path parameters of the handshake."""
        return self.websocket.path_params

    @property
    def cookies(self) -> dict[str, str]:
        """Cookies of the handshake."""
        return self.websocket.cookies

    @property
    def client(self) -> Address | None:
        """Address of the peer, which may be a proxy."""
        return self.websocket.client

    @property
    def subprotocol(self) -> str | None:
        """Subprotocol in the handshake response.

        `None` before the handshake is accepted, without a subprotocol, and if your code accepted the WebSocket itself.
        """
        subprotocol: str | None = self.scope.get(ANSWERED_KEY)
        return subprotocol

    @property
    def accept_headers(self) -> MutableHeaders:
        """Headers of the handshake response, such as `Set-Cookie`. For use in `on_handshake` functions.

        Raises:
            RuntimeError: The handshake is already answered. If an identity reads the first message, it is answered
                before the `on_handshake` functions run.
        """
        if self.websocket.application_state is not WebSocketState.CONNECTING:
            raise RuntimeError("the handshake is already answered: set ws.accept_headers in an on_handshake function")
        headers: MutableHeaders = self.scope.setdefault(HEADERS_KEY, MutableHeaders())
        return headers

    @property
    def state(self) -> State:
        """State that middleware and dependencies attached to this connection."""
        return self.websocket.state

    # ── state ──

    @property
    def close_info(self) -> CloseInfo | None:
        """Close info of the connection; `None` while it is open."""
        return self._connection.close_info

    @property
    def closed(self) -> bool:
        """Whether the connection is closing or closed."""
        return self._connection.close_info is not None

    @property
    def reason(self) -> DisconnectReason | None:
        """Cause of the close; `None` while the connection is open."""
        return None if self.close_info is None else self.close_info.cause

    @property
    def rtt(self) -> float | None:
        """Last measured round trip in seconds; `None` before the first answered ping."""
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
        """Number of messages waiting to be sent."""
        return len(self._connection.outbox)

    @property
    def queued_bytes(self) -> int:
        """Bytes waiting to be sent."""
        return self._connection.outbox.held_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of memory held for the connection or its session: queued and unacknowledged messages, user data."""
        return self._connection.memory_usage

    @property
    def dropped_messages(self) -> int:
        """Number of messages dropped because the client is a slow consumer."""
        return self._connection.dropped_messages

    @property
    def unread_messages(self) -> int:
        """Number of received messages waiting to be read."""
        return len(self._connection.inbox)

    @property
    def unread_bytes(self) -> int:
        """Bytes of memory held by unread messages."""
        return self._connection.inbox.held_bytes
