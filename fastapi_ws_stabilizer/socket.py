"""`StableSocket`: the interface of endpoints, hooks and handlers to their connection."""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop as running_loop
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import WebSocket
from pydantic import GetCoreSchemaHandler
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_core import CoreSchema
from starlette.datastructures import URL, Address, Headers, MutableHeaders, QueryParams, State
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.connection.client_address import ClientAddressResolver
from fastapi_ws_stabilizer.connection.connection import AnyConnection, Connection
from fastapi_ws_stabilizer.connection.ended_connection import EndedConnection
from fastapi_ws_stabilizer.connection.inbox import InboxClosed, Item
from fastapi_ws_stabilizer.connection.memory_account import MemoryAccount
from fastapi_ws_stabilizer.connection.pending import PendingConnection
from fastapi_ws_stabilizer.connection.pump import drop_without_reader, on_inbox_full
from fastapi_ws_stabilizer.errors import (
    ConcurrentReceiveError,
    MemoryLimitExceededError,
    MessageFormatError,
    SocketClosed,
)
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.hub.presence import PresenceList
from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.v1_protocol import session_of
from fastapi_ws_stabilizer.wire.encoded import encode, encode_json
from fastapi_ws_stabilizer.wire.handshake import ANSWERED_KEY, HEADERS_KEY
from fastapi_ws_stabilizer.wire.strict_json import InvalidJsonError, read_json
from fastapi_ws_stabilizer.wire.v1.frames import Message
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome
from fastapi_ws_stabilizer.wrong_names import OF_SOCKET, missing

T = TypeVar("T")

READER_START_GRACE = 0.1
"""Seconds that a reader task of the endpoint has to start reading after `wait_closed()` was called."""


@dataclass(frozen=True)
class SocketServices:
    """Services of a node for all its sockets.

    Attributes:
        hub: The rooms.
        addresses: Resolver of client addresses.
        run_handlers: Dispatches every message of a connection to the handlers, at most so many at once.
        issue_token: Issues a reconnect token for a connection.
    """

    hub: Hub
    addresses: ClientAddressResolver
    run_handlers: Callable[[AnyConnection, int], Coroutine[Any, Any, None]]
    issue_token: Callable[[Connection], str]


class StableSocket:
    """Accepted and registered WebSocket of one client.

    One task at a time may read, and any task of the event loop may send. A message is sent immediately, or queued while
    the network accepts no data. `send` waits while the outbox of the client is full. After `send_timeout` without
    progress, the server disconnects the client. Once the connection is closed, a send raises `SocketClosed`
    immediately, and a read raises it after the received messages. Another thread calls
    `manager.from_thread.run(ws.send, message)`, because a direct call raises `WrongLoopError` there.

    ```python
    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocket = Depends(stable_socket)) -> None:
        async for message in ws:
            await ws.send({"echo": message})
    ```

    Attributes:
        identity: Return value of the dependency of `manager.socket_for(...)`.
    """

    __slots__ = ("_connection", "_metadata", "_services", "_user_data", "identity")

    def __init__(
        self,
        connection: Connection | PendingConnection,
        services: SocketServices,
        *,
        metadata: Mapping[str, Any] | None = None,
        identity: Any = None,
    ) -> None:
        self._connection: AnyConnection = connection
        self._services = services
        self._metadata: MeteredDict | None = None
        self._user_data: MeteredDict | None = None
        if metadata:
            self._metadata = MeteredDict(connection.budget, None, metadata)
            self._metadata.owner = connection.account
        self.identity: Any = identity

    if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept every name

        def __getattr__(self, name: str) -> Any:
            """Raise for an unknown name, with a hint for names that other libraries use."""
            return missing(self, name, OF_SOCKET)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Raise with a hint if an endpoint declares the socket like a query parameter.

        Raises:
            TypeError: A socket cannot be validated as data. Models that allow arbitrary types may contain one.
        """
        try:
            return handler(source)
        except PydanticSchemaGenerationError:
            raise TypeError(
                "an endpoint gets a StableSocket from a dependency: write `ws: StableSocketDep`, "
                "or `ws: StableSocket = Depends(manager.socket)`"
            ) from None

    def __repr__(self) -> str:
        state = "open" if self.close_info is None else self.close_info.cause.value
        return f"<StableSocket client_id={self.client_id!r} connection_id={self.connection_id} {state}>"

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
        return self._connection.recipient_id

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata passed to `manager.connect(..., metadata=...)`."""
        if self._metadata is None:
            self._metadata = self._create_data(session_of(self._connection))
        return self._metadata

    @property
    def user_data(self) -> dict[str, Any]:
        """Data of your application for this session, or for this connection if there is no session.

        Each write is counted. A write that would exceed `max_memory_per_connection` raises `MemoryLimitExceededError`
        and changes nothing.
        """
        session = session_of(self._connection)
        if session is not None:
            if session.user_data is None:
                session.user_data = MeteredDict(self._connection.budget if session.ended is None else None, session)
            return session.user_data
        if self._user_data is None:
            self._user_data = self._create_data(None)
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

    def _create_data(self, session: Session | None) -> MeteredDict:
        """Return a new dict. Once the connection is closed, it is not counted, because nothing would release it."""
        connection = self._connection
        if isinstance(connection, EndedConnection) or connection.close_info is not None:
            return MeteredDict(None, None)
        return MeteredDict(connection.budget, connection.account if session is None else session)

    @property
    def _user_data_bytes(self) -> int:
        """Bytes held by the metadata and the connection's user data, without the session's user data."""
        return self._metadata_bytes + (0 if self._user_data is None else self._user_data.held_bytes)

    @property
    def _metadata_bytes(self) -> int:
        """Bytes held by the metadata."""
        return 0 if self._metadata is None else self._metadata.held_bytes

    @property
    def _account(self) -> MemoryAccount | PendingConnection | None:
        """Account of the connection in the memory budget; `None` after its end."""
        return None if isinstance(self._connection, EndedConnection) else self._connection.account

    def _end(self, ended: EndedConnection) -> None:
        """Keep facts about the connection instead of the connection, because everything for it is done."""
        self._connection = ended

    def _transfer_user_data(self, user_data: MeteredDict) -> None:
        """Take over the user data of an earlier connection as the same dict, since its hooks may still write to it.

        Raises:
            MemoryLimitExceededError: The data does not fit together with this connection's own data, which stays.
        """
        own, self._user_data = self._user_data, user_data
        previous_owner, user_data.owner = (
            user_data.owner,
            self._account,
        )  # eviction frees memory for this connection and spares it
        if own is None:
            return
        try:
            user_data.update(own)
        except MemoryLimitExceededError:
            self._user_data, user_data.owner = own, previous_owner
            raise
        own.stop_accounting()

    def _copy_user_data(self, user_data: Mapping[str, Any]) -> None:
        """Copy the user data of another connection. This connection's own values take precedence.

        Raises:
            MemoryLimitExceededError: The copy does not fit.
        """
        self.user_data.update({**user_data, **self.user_data})

    def _attach(self, connection: Connection) -> None:
        """Take the connection of the accepted handshake, and hand the data of the handshake hooks over to it.

        Raises:
            MemoryLimitExceededError: The session has user data, and that of the hooks does not fit in addition. Only
                the data of the hooks is lost.
        """
        self._connection = connection
        if self._metadata is not None:
            self._metadata.owner = connection.recipient.account
        if self._user_data is None:
            return
        session = session_of(connection)
        if session is None:
            self._user_data.owner = connection.account
        else:
            user_data, self._user_data = self._user_data, None
            session.adopt_user_data(user_data)

    def _detach_user_data(self) -> None:
        """Stop counting the data that belongs to this closed connection alone."""
        if self._metadata is not None:
            self._metadata.stop_accounting()
        if self._user_data is not None and self._user_data.owner is self._account:
            self._user_data.stop_accounting()
        if not self._connection.opened:  # it was rejected, so there is no `close_info`
            self._metadata = self._metadata or MeteredDict(None, None)
            self._user_data = self._user_data or MeteredDict(None, None)

    @property
    def session_id(self) -> str | None:
        """Session id of a `stabilizer.v1.json` client, the same in all its connections; `None` for a plain client."""
        session = session_of(self._connection)
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
        """Cause of the close; `None` while the connection is open. The text of the close is `close_info.reason`."""
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
        return self._connection.queued_messages

    @property
    def queued_bytes(self) -> int:
        """Bytes waiting to be sent."""
        return self._connection.queued_bytes

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

    @property
    def address(self) -> str:
        """Address of the client, as `trusted_proxies` report it, else the address of the peer."""
        return self._services.addresses.address_of(self.websocket)

    async def wait_closed(self) -> CloseInfo:
        """Wait until the connection is closed or closing, and return its close info. Cancelling is safe.

        If your code has read no message after 0.1 s of waiting, and no task waits for a message, the endpoint counts as
        one that does not read, as after `ignore_messages()`. For an endpoint that has read before, a full inbox stays
        for `inbox_pause_timeout`.

        Raises:
            NotOpenError: The handshake was rejected.
        """
        connection = self._connection
        if isinstance(connection, PendingConnection):
            connection = await connection.wait_accepted()
        connection.check_loop()
        if isinstance(connection, EndedConnection) or connection.close_info is not None:
            return await connection.wait_closing()
        inbox = connection.inbox
        inbox.begin_to_decide()
        # A cancelled timer holds its context until it is due. The endpoint's context must not outlive the connection.
        context, loop = connection.resources.outbox_limits.context, asyncio.get_running_loop()
        timer = loop.call_later(READER_START_GRACE, drop_without_reader, connection, context=context)
        try:
            return await connection.wait_closing()
        finally:
            timer.cancel()
            if inbox.undecided:
                inbox.end_to_decide()
                if connection.pause is not None and connection.close_info is None:
                    on_inbox_full(connection)

    # ── receiving ──

    def ignore_messages(self) -> None:
        """Declare that this endpoint does not read, so that a full inbox drops its oldest messages.

        Otherwise reading pauses when the inbox is full. The library still handles pings, pongs and acknowledgements.
        `messages_discarded` counts the dropped messages. Requests of `stabilizer.v1.json` clients get the error
        `not_read` immediately. The declaration ends when the endpoint reads a message.

        Raises:
            NotOpenError: The connection is not accepted yet.
        """
        connection = self._connection
        connection.check_opened()
        connection.check_loop()
        if isinstance(connection, Connection):
            connection.inbox.reads = 0
            drop_without_reader(connection)

    async def receive(self) -> str | bytes:
        """Wait for the next message, text or bytes. Cancelling is safe: no message is lost.

        Raises:
            SocketClosed: The connection is closed, and all received messages have been read.
            ConcurrentReceiveError: Another task is receiving from this connection.
        """
        return self._connection.read_raw(await self._receive_item())

    async def _receive_item(self) -> Item:
        """Wait for the next message, parsed if the client uses `stabilizer.v1.json`. Cancelling is safe."""
        connection = self._connection
        if not connection.opened:
            raise await connection.closed_error()
        connection.check_loop()
        try:
            return await connection.inbox.get()
        except InboxClosed:
            raise await connection.closed_error() from None
        except ConcurrentReceiveError:
            await connection.yield_after_end()
            raise

    async def receive_text(self) -> str:
        """Wait for the next message, which must be text. Cancelling is safe.

        Raises:
            MessageFormatError: The message is binary. The connection stays open.
            SocketClosed: The connection is closed, and all received messages have been read.
            ConcurrentReceiveError: Another task is receiving.
        """
        message = await self.receive()
        if not isinstance(message, str):
            raise MessageFormatError("expected a text message, got a binary one: use receive() to accept both")
        return message

    async def receive_bytes(self) -> bytes:
        """Wait for the next message, which must be binary. Cancelling is safe.

        Raises:
            MessageFormatError: The message is text. The connection stays open.
            SocketClosed: The connection is closed, and all received messages have been read.
            ConcurrentReceiveError: Another task is receiving.
        """
        message = await self.receive()
        if not isinstance(message, bytes):
            raise MessageFormatError("expected a binary message, got a text one: use receive() to accept both")
        return message

    async def receive_json(self) -> Any:
        """Wait for the next message, text or binary, and return the JSON value in it. Cancelling is safe.

        Raises:
            MessageFormatError: The message is not JSON. The connection stays open.
            SocketClosed: The connection is closed, and all received messages have been read.
            ConcurrentReceiveError: Another task is receiving.
        """
        message = await self._receive_item()
        if isinstance(message, Message):
            self._connection.read_raw(message)
            if not isinstance(message.data, bytes):
                return message.data
            message = message.data
        try:
            return read_json(message)
        except InvalidJsonError as problem:
            raise MessageFormatError(f"the message cannot be read: {problem}") from None

    def __aiter__(self) -> AsyncIterator[str | bytes]:
        """Iterate over the messages until the connection closes."""
        return self

    async def __anext__(self) -> str | bytes:
        """Return the next message, for `async for`. Cancelling is safe."""
        if not self._connection.opened:
            raise await self._connection.closed_error()
        if running_loop() is not self._connection.resources.loop:
            self._connection.check_loop()
        try:  # without receive(), because an idle connection would hold its coroutine frame
            item = await self._connection.inbox.get()
        except InboxClosed:
            await self._connection.yield_after_end()
            raise StopAsyncIteration from None
        except ConcurrentReceiveError:
            await self._connection.yield_after_end()
            raise
        return self._connection.read_raw(item)

    async def iter_text(self) -> AsyncIterator[str]:
        """Iterate over the messages, which must all be text, until the connection closes."""
        try:
            while True:
                yield await self.receive_text()
        except SocketClosed:
            return

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        """Iterate over the messages, which must all be binary, until the connection closes."""
        try:
            while True:
                yield await self.receive_bytes()
        except SocketClosed:
            return

    async def iter_json(self) -> AsyncIterator[Any]:
        """Iterate over the JSON values in the messages until the connection closes."""
        try:
            while True:
                yield await self.receive_json()
        except SocketClosed:
            return

    def run(self, *, concurrency: int = 1) -> Coroutine[Any, Any, None]:
        """Dispatch every message to the handlers of `@manager.on_message` until the connection closes.

        Args:
            concurrency: Maximum messages that are handled at the same time. With 1, the default, messages are handled
                in order. With more, the order is undefined.

        Raises:
            ValueError: `concurrency` is below 1.
            ConcurrentReceiveError: Another task is receiving.
            Exception: An exception of a handler ends the run and closes the connection.
        """
        # Not awaited here, which saves a frame for each idle connection.
        return self._services.run_handlers(self._connection, concurrency)

    # ── rooms ──

    async def join(self, room: str, metadata: Mapping[str, Any] | None = None, *, history: int = 0) -> PresenceList:
        """Join a room and return its presence list, with this client in it. Joining again replaces the metadata.

        The list collects its `Presence` items on first use: `list(await ws.join("lobby"))`.

        The connection leaves its rooms when it ends. The call does not wait. It is a coroutine because rooms that span
        several processes will have to wait.

        Args:
            room: Name of the room. The first client that joins creates the room.
            metadata: Values that the room shows for this client, such as a name, a colour or a status.
            history: Number of the room's last messages that this connection gets first, if the room stores them
                (`room_history`). A client that is already in the room gets none. A plain client that reconnected with a
                reconnect token gets the messages since it was lost.

        Raises:
            TypeError: The metadata is not a mapping.
            RoomNameError: The name is empty, too long, or has a control character.
            RoomLimitError: The connection is already in `max_rooms_per_connection` rooms.
            MemoryLimitExceededError: The metadata exceeds a memory limit. The connection has not joined the room.
            SocketClosed: The connection is closed.
            NotOpenError: The connection is not accepted yet.
        """
        recipient, hub = (await self._connection.still_open()).recipient, self._services.hub
        newcomer = history > 0 and room not in self.rooms
        presence = hub.join(recipient, room, metadata)
        if history > 0:
            hub.replay_history(recipient, room, history, newcomer=newcomer)
        return presence

    async def leave(self, room: str) -> bool:
        """Leave a room; `False` if the connection is not in it. Its presence ends immediately, without a grace."""
        self._connection.check_loop()
        hub = self._services.hub
        member = hub.rooms.get(room, self._connection.recipient_id)  # after the end, its session or detached state
        return member is not None and hub.leave(member, room)

    @property
    def rooms(self) -> tuple[str, ...]:
        """The rooms of this connection, in the order in which it joined them.

        After the end of the connection, these are the rooms that it was in at that time. The rooms of a session are
        live until the session ends.
        """
        recipient = self._connection.recipient
        if recipient is not None and recipient.close_info is None:
            return self._services.hub.rooms.rooms_of(recipient)
        close_info = self.close_info if recipient is None else recipient.close_info
        return () if close_info is None else close_info.rooms

    # ── sending ──

    async def send(self, message: Any, *, coalesce_key: Any = None, volatile: bool = False, ack: bool = False) -> None:
        """Send a message: `str` as text, bytes as binary, any other value as JSON. Wait while the outbox is full.

        The message is written immediately, even if your code then computes for long without an `await`. Messages of one
        task arrive in the order of the calls. If the call is cancelled while it waits for room, the message is not
        sent.

        Args:
            message: The message.
            coalesce_key: A queued message with an equal key is replaced by this one. Use it for values that a newer
                message supersedes, such as a price or a cursor position. If the message replaces one that
                waits for room, cancelling both calls discards it.
            volatile: Whether the message is only useful now. The server does not store it for a detached client.
            ack: Whether to wait until the client has acknowledged the message, or a newer one that has replaced it,
                also across a reconnect.

        Raises:
            MessageEncodeError: The message cannot be encoded. The connection stays open.
            SocketClosed: The connection is closed.
            SessionEndedError: With `ack`: the session ended before the client acknowledged the message.
            RequestError: With `ack`: the client reconnected too late and will not get the message.
            UnsupportedByClientError: With `ack`: the client does not speak `stabilizer.v1.json`.
            ValueError: `ack` and `volatile` are both set.
        """
        frame = encode(message, coalesce_key, volatile=volatile)
        if ack:
            await self._connection.send_with_ack(frame)
        elif not self._connection.try_send(frame):
            await self._connection.send(frame)
        elif self._connection.should_yield():
            await self._connection.yield_for_send()

    async def request(self, event: str, data: Any = None, *, timeout: float = 10.0) -> Any:
        """Send a request to the client and return its reply, also across a reconnect. Cancelling is safe.

        Args:
            event: Name of the request.
            data: Data of the request.
            timeout: Seconds to wait for the reply.

        Raises:
            RequestError: The client replied with an error, or has too many open requests.
            RequestTimeoutError: The client did not reply in time.
            SessionEndedError: The session ended before the reply.
            SocketClosed: The connection is closed.
            UnsupportedByClientError: The client does not speak `stabilizer.v1.json`.
            MessageEncodeError: The data cannot be encoded as JSON that the client can read, or `event` is not a name.
        """
        return await self._connection.request(event, data, timeout)

    async def send_text(self, data: str) -> None:
        """Send a text message like `send`."""
        await self._connection.send(encode(data))

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary message like `send`."""
        await self._connection.send(encode(data))

    async def send_json(self, data: Any, mode: str = "text") -> None:
        """Send a value as JSON like `send`, also a `str`. `mode="binary"` uses a binary frame instead of a text frame.

        Raises:
            ValueError: `mode` is neither `text` nor `binary`.
        """
        if mode not in ("text", "binary"):
            raise ValueError(f"mode must be 'text' or 'binary', not {mode!r}")
        frame = encode_json(data)
        await self._connection.send(frame if mode == "text" else encode((frame.text or "").encode("utf-8")))

    def reconnect_token(self) -> str:
        """Create a token that restores this connection's rooms and user data for a plain client after a disconnect.

        Send the token to the client. The client sends it as `?reconnect_token=` of its next connection. It is valid
        once. `manager.generate_reconnect_token(ws)` does the same.

        Raises:
            InvalidTokenError: `enable_reconnect` is False.
            SocketClosed: The connection is closed.
            NotOpenError: The connection is not accepted yet.
        """
        return self._services.issue_token(self._connection.check_open())

    # ── closing ──

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Send the queued messages and then the close frame. Do nothing if the connection is already closed.

        The call returns when the close frame is sent, or after `send_timeout`. Cancelling ends the wait, but not the
        close.

        Args:
            code: Close code: 1000 to 1003, 1007 to 1014 or 3000 to 4999.
            reason: Close reason, truncated to 123 bytes at a character boundary.

        Raises:
            ValueError: `code` cannot be sent.
        """
        self._connection.check_loop()
        self._connection.close(DisconnectReason.APPLICATION, code=code, reason=reason or "")
        await self._connection.wait_sent()

    def create_task(self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Start a task that is cancelled when the connection ends.

        An exception in the task closes the connection like one in the endpoint: with 1011 and a log record for a bug,
        with 4000 + the status for an `HTTPException`. `SocketClosed` is ignored.

        The call does not wait, so a loop that only calls it and catches `SocketClosed` blocks the event loop.

        Raises:
            SocketClosed: The connection is closed.
            NotOpenError: The connection is not accepted yet.
        """
        return self._connection.spawn(coroutine, name)
