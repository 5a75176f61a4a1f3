"""`StableSocket`: what an endpoint, a hook or a handler holds of its connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from fastapi import WebSocket
from pydantic_core import from_json
from starlette.datastructures import URL, Address, Headers, QueryParams, State

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason, Ending
from fastapi_ws_stabilizer.connection.inbox import InboxClosed
from fastapi_ws_stabilizer.connection.lifecycle import Connection
from fastapi_ws_stabilizer.errors import MessageFormatError, SocketClosed
from fastapi_ws_stabilizer.hub.presence import Roster
from fastapi_ws_stabilizer.wire.payload import encode, encode_json

T = TypeVar("T")


class Services(Protocol):
    """What a manager does for its sockets."""

    async def run(self, socket: StableSocket, concurrency: int) -> None:
        """Hand every message to the handlers."""

    def join(self, connection: Connection, room: str, metadata: Mapping[str, Any] | None) -> Roster:
        """Let a connection into a room."""

    def leave_room(self, connection: Connection, room: str) -> bool:
        """Take a connection out of a room."""

    def rooms_of(self, connection: Connection) -> tuple[str, ...]:
        """The rooms that a connection is in."""


class StableSocket:
    """An accepted, registered WebSocket that looks after itself.

    It is read by one task at a time and written by any. Sending only queues: it waits while the client's outbox is
    full, and a client that stays stuck is disconnected after `send_timeout`. When the connection is over, senders get
    `SocketClosed` at once, and readers after they have read what had come in.

    ```python
    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocket = Depends(stable_socket)) -> None:
        async for message in ws:
            await ws.send({"echo": message})
    ```

    Attributes:
        identity: What the dependency of `manager.socket_for(...)` returned.
    """

    __slots__ = ("_connection", "_metadata", "_services", "_user_data", "identity")

    def __init__(
        self,
        connection: Connection,
        services: Services,
        *,
        metadata: Mapping[str, Any] | None = None,
        identity: Any = None,
    ) -> None:
        self._connection = connection
        self._services = services
        self._metadata: dict[str, Any] | None = dict(metadata) if metadata else None
        self._user_data: dict[str, Any] | None = None
        self.identity = identity

    def __repr__(self) -> str:
        how = "open" if self.ending is None else self.ending.reason.value
        return f"<StableSocket client_id={self.client_id!r} connection_id={self.connection_id} {how}>"

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
    def metadata(self) -> dict[str, Any]:
        """What `manager.connect(..., metadata=...)` was given."""
        if self._metadata is None:
            self._metadata = {}
        return self._metadata

    @property
    def user_data(self) -> dict[str, Any]:
        """Yours: anything that belongs to this connection."""
        if self._user_data is None:
            self._user_data = {}
        return self._user_data

    @user_data.setter
    def user_data(self, data: dict[str, Any]) -> None:
        """Put another dict in its place."""
        self._user_data = data

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
    def state(self) -> State:
        """State that middleware and dependencies have attached to this connection."""
        return self.websocket.state

    # ── how it is doing ──

    @property
    def ending(self) -> Ending | None:
        """How the connection ended; `None` while it is open."""
        return self._connection.ending

    @property
    def closed(self) -> bool:
        """Whether the connection is over or ending."""
        return self._connection.ending is not None

    @property
    def reason(self) -> DisconnectReason | None:
        """Why the connection ended; `None` while it is open."""
        return None if self.ending is None else self.ending.reason

    @property
    def rtt(self) -> float | None:
        """Seconds of the last measured round trip; `None` before the first answered ping."""
        return self._connection.pulse.rtt

    @property
    def connected_seconds(self) -> float:
        """Seconds since the connection was opened."""
        return monotonic() - self._connection.opened_at

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last frame came from the client."""
        return monotonic() - self._connection.pulse.last_seen

    @property
    def queued_messages(self) -> int:
        """Messages that wait to be sent."""
        return len(self._connection.outbox)

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return self._connection.outbox.held_bytes

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

    async def wait_closed(self) -> Ending:
        """Wait until the connection is over or ending, and return how. Cancelling is safe."""
        return await self._connection.wait_over()

    # ── receiving ──

    async def receive(self) -> str | bytes:
        """Wait for the next message, text or bytes. Cancelling is safe: no message is lost.

        Raises:
            SocketClosed: The connection is over, and everything that came in before has been read.
            ConcurrentReceiveError: Another task is receiving from this connection.
        """
        return await self._connection.receive()

    async def receive_text(self) -> str:
        """Wait for the next message, which must be text. Cancelling is safe.

        Raises:
            MessageFormatError: It is binary. The connection stays usable.
            SocketClosed: The connection is over.
            ConcurrentReceiveError: Another task is receiving.
        """
        message = await self._connection.receive()
        if not isinstance(message, str):
            raise MessageFormatError("a text message was expected and a binary one came: use receive() to take both")
        return message

    async def receive_bytes(self) -> bytes:
        """Wait for the next message, which must be binary. Cancelling is safe.

        Raises:
            MessageFormatError: It is text. The connection stays usable.
            SocketClosed: The connection is over.
            ConcurrentReceiveError: Another task is receiving.
        """
        message = await self._connection.receive()
        if not isinstance(message, bytes):
            raise MessageFormatError("a binary message was expected and a text one came: use receive() to take both")
        return message

    async def receive_json(self) -> Any:
        """Wait for the next message, text or binary, and return the JSON value in it. Cancelling is safe.

        Raises:
            MessageFormatError: It is not JSON. The connection stays usable.
            SocketClosed: The connection is over.
            ConcurrentReceiveError: Another task is receiving.
        """
        message = await self._connection.receive()
        try:
            return from_json(message, allow_inf_nan=False)
        except (ValueError, TypeError) as error:  # TypeError: half of a surrogate pair
            raise MessageFormatError(f"the message is not JSON: {error}") from None

    def __aiter__(self) -> AsyncIterator[str | bytes]:
        """Iterate over the messages until the connection is over."""
        return self

    async def __anext__(self) -> str | bytes:
        """The next message, for `async for`. Cancelling is safe."""
        if not self._connection.opened:
            self._connection.check_opened()
        try:
            return (
                await self._connection.inbox.get()
            )  # not by receive(), which an idle connection would hold a frame of
        except InboxClosed:
            raise StopAsyncIteration from None

    async def iter_text(self) -> AsyncIterator[str]:
        """Iterate over the messages, which must all be text, until the connection is over."""
        try:
            while True:
                yield await self.receive_text()
        except SocketClosed:
            return

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        """Iterate over the messages, which must all be binary, until the connection is over."""
        try:
            while True:
                yield await self.receive_bytes()
        except SocketClosed:
            return

    async def iter_json(self) -> AsyncIterator[Any]:
        """Iterate over the JSON values in the messages until the connection is over."""
        try:
            while True:
                yield await self.receive_json()
        except SocketClosed:
            return

    async def run(self, *, concurrency: int = 1) -> None:
        """Hand every message to the handlers of `@manager.on_message` until the connection is over.

        Args:
            concurrency: How many messages may be handled at the same time. With 1, the default, they are handled one
                after the other, in order; with more, their order is not kept.

        Raises:
            ValueError: `concurrency` is below 1.
            ConcurrentReceiveError: Another task is receiving.
            Exception: Whatever a handler raises ends the run and with it the connection.
        """
        await self._services.run(self, concurrency)

    # ── rooms ──

    async def join(self, room: str, metadata: Mapping[str, Any] | None = None) -> Roster:
        """Join a room, and return who is there by now, oneself included. Joining again renews the metadata.

        The `Presence`s are collected when they are first looked at: `list(await ws.join("lobby"))`.

        The connection leaves its rooms when it ends. Needs no waiting: it is awaitable so that it can become so where
        rooms span several processes.

        Args:
            room: Its name. It is made by the first who joins.
            metadata: What the others see of this client in the room: a name, a colour, a status.

        Raises:
            TypeError: The metadata is no mapping.
            ValueError: The name is empty.
            RoomLimitError: The connection is in `max_rooms_per_connection` rooms.
            SocketClosed: The connection is over.
            NotOpenError: The connection is not accepted yet.
        """
        self._connection.check_open()
        return self._services.join(self._connection, room, metadata)

    async def leave(self, room: str) -> bool:
        """Leave a room; `False` if it is not in. Presence ends at once, without a grace."""
        return self._services.leave_room(self._connection, room)

    @property
    def rooms(self) -> tuple[str, ...]:
        """The rooms that this connection is in, in the order in which it joined them."""
        return self._services.rooms_of(self._connection)

    # ── sending ──

    async def send(self, message: Any, *, coalesce_key: Any = None) -> None:
        """Send anything: `str` as text, bytes as binary, all else as JSON. Waits while the outbox is full.

        Messages of one task arrive in the order of their calls. Cancelling while it waits leaves the message out.

        Args:
            message: What to send.
            coalesce_key: If a message with an equal key still waits to be sent, this one takes its place: for what is
                worth nothing when there is a newer one, such as a price or the place of a cursor.

        Raises:
            MessageEncodeError: The message cannot be encoded; the connection stays usable.
            SocketClosed: The connection is over.
        """
        frame = encode(message, coalesce_key)
        if not self._connection.outbox.put_if_calm(frame):
            await self._connection.send(frame)

    async def send_text(self, data: str) -> None:
        """Send a text message. As `send`."""
        await self._connection.send(encode(data))

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary message. As `send`."""
        await self._connection.send(encode(data))

    async def send_json(self, data: Any, mode: str = "text") -> None:
        """Send a value as JSON, a `str` too, in a text frame or with `mode="binary"` in a binary one. As `send`."""
        if mode not in ("text", "binary"):
            raise ValueError(f"mode must be 'text' or 'binary', not {mode!r}")
        frame = encode_json(data)
        await self._connection.send(frame if mode == "text" else encode((frame.text or "").encode("utf-8")))

    # ── ending ──

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Send what is queued, then the close frame. Nothing happens if the connection is over already.

        Returns when that is done, at the latest after `send_timeout`. Cancelling does not stop it.

        Args:
            code: 1000 to 1003, 1007 to 1014 or 3000 to 4999.
            reason: Cut to 123 bytes on a character border.

        Raises:
            ValueError: `code` cannot be sent.
        """
        self._connection.end(DisconnectReason.APPLICATION, code=code, text=reason or "")
        await asyncio.wait({self._connection.outbox.done})

    def create_task(self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Start a task that is cancelled when the connection ends.

        An exception in it ends the connection as one in the endpoint would: a bug is reported and closes 1011, an
        `HTTPException` closes 4000 + its status. `SocketClosed` is no news.

        Raises:
            SocketClosed: The connection is over.
            NotOpenError: The connection is not accepted yet.
        """
        return self._connection.tie(coroutine, name)
