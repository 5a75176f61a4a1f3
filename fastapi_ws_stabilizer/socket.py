"""`StableSocket`: what an endpoint, a hook or a handler holds of its connection."""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop as running_loop
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_core import CoreSchema

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.facts import SocketFacts
from fastapi_ws_stabilizer.connection.inbox import InboxClosed
from fastapi_ws_stabilizer.connection.pump import drop_without_reader, on_inbox_full
from fastapi_ws_stabilizer.errors import ConcurrentReceiveError, MessageFormatError, SocketClosed
from fastapi_ws_stabilizer.hub.presence import PresenceList
from fastapi_ws_stabilizer.wire.encoded import encode, encode_json
from fastapi_ws_stabilizer.wire.strict_json import InvalidJsonError, read_json
from fastapi_ws_stabilizer.wire.v1.frames import Message
from fastapi_ws_stabilizer.wrong_names import OF_SOCKET, missing

T = TypeVar("T")

READER_START_GRACE = 0.1
"""Seconds in which a task that an endpoint has started to read waits for its first message, though others run first."""


class Services(Protocol):
    """What a manager does for its sockets."""

    async def run(self, socket: StableSocket, concurrency: int) -> None:
        """Hand every message to the handlers."""

    def join(self, connection: Connection, room: str, metadata: Mapping[str, Any] | None) -> PresenceList:
        """Let a connection into a room."""

    def leave_room(self, connection: Connection, room: str) -> bool:
        """Take a connection out of a room."""

    def rooms_of(self, connection: Connection) -> tuple[str, ...]:
        """The rooms that a connection is in, or was in when it ended."""

    def history(self, connection: Connection, room: str, count: int, *, newcomer: bool) -> None:
        """Send the last messages of a room to a connection that has joined it, as far as it has not had them."""

    def address_of(self, connection: Connection) -> str:
        """Where the client of a connection comes from."""

    def reconnect_token(self, connection: Connection) -> str:
        """Make a reconnect token for a connection."""


class StableSocket(SocketFacts):
    """An accepted, registered WebSocket that looks after itself.

    One task at a time reads it, and any task of its event loop may send. A message leaves at once, or is queued while
    the network takes nothing. `send` waits while the client's outbox is full, and a client that stays stuck is
    disconnected after `send_timeout`. When the connection is over, senders get `SocketClosed` at once, and readers get
    it after they have read what had come in. Another thread calls `manager.from_thread.run(ws.send, message)`; without
    that, the call raises `WrongLoopError`.

    ```python
    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocket = Depends(stable_socket)) -> None:
        async for message in ws:
            await ws.send({"echo": message})
    ```

    Attributes:
        identity: What the dependency of `manager.socket_for(...)` returned.
    """

    __slots__ = ("_services", "identity")

    def __init__(
        self,
        connection: Connection,
        services: Services,
        *,
        metadata: Mapping[str, Any] | None = None,
        identity: Any = None,
    ) -> None:
        super().__init__(connection, metadata)
        self._services = services
        self.identity: Any = identity

    if not TYPE_CHECKING:  # a type checker would take every name for one that is there

        def __getattr__(self, name: str) -> Any:
            """Say what to write instead of a name that it does not have."""
            return missing(self, name, OF_SOCKET)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Say what an endpoint has to write that asks for a socket as if it were a query parameter.

        Raises:
            TypeError: A socket is no data. Models that allow arbitrary types may have one.
        """
        try:
            return handler(source)
        except PydanticSchemaGenerationError:
            raise TypeError(
                "an endpoint gets a StableSocket from a dependency: write `ws: StableSocketDep`, "
                "or `ws: StableSocket = Depends(manager.socket)`"
            ) from None

    def __repr__(self) -> str:
        how = "open" if self.close_info is None else self.close_info.cause.value
        return f"<StableSocket client_id={self.client_id!r} connection_id={self.connection_id} {how}>"

    @property
    def address(self) -> str:
        """Where the client comes from: what `trusted_proxies` say, else the address of the other end."""
        return self._services.address_of(self._connection)

    async def wait_closed(self) -> CloseInfo:
        """Wait until the connection is over or ending, and return how. Cancelling is safe.

        An endpoint that has waited here for 0.1 s and has not read a message is one that does not read, as by
        `ignore_messages()`, unless a task of it waits for a message. One that has read is waited for, for
        `inbox_pause_timeout`.
        """
        connection = self._connection
        connection.check_loop()
        if connection.close_info is not None:
            return await connection.wait_closing()
        inbox = connection.inbox
        inbox.begin_to_decide()
        # A cancelled timer keeps its context until it is due, and that of this endpoint should go with the connection.
        context, loop = connection._parts.outbox_limits.context, asyncio.get_running_loop()
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
        """Say that this endpoint reads no more: what the client sends then holds up nothing, and is counted.

        Without it the messages wait in the inbox until that is full, and reading pauses. Pings, pongs and
        acknowledgements are dealt with in any case. The newest messages stay in the inbox, and what goes counts in
        `messages_discarded`. Requests of `stabilizer.v1.json` clients are answered with the error `not_read` at once.
        It holds until the endpoint reads a message again.

        Raises:
            NotOpenError: The connection is not accepted yet.
        """
        connection = self._connection
        connection.check_opened()
        connection.check_loop()
        connection.inbox.reads = 0
        drop_without_reader(connection)

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
        message = await self._connection.receive_item()
        if isinstance(message, Message):
            self._connection.read(message)
            if not isinstance(message.data, bytes):
                return message.data
            message = message.data
        try:
            return read_json(message)
        except InvalidJsonError as problem:
            raise MessageFormatError(f"the message cannot be read: {problem}") from None

    def __aiter__(self) -> AsyncIterator[str | bytes]:
        """Iterate over the messages until the connection is over."""
        return self

    async def __anext__(self) -> str | bytes:
        """The next message, for `async for`. Cancelling is safe."""
        if not self._connection.opened:
            self._connection.check_opened()
        if running_loop() is not self._connection._parts.loop:
            self._connection.check_loop()
        try:  # not by receive(), which an idle connection would hold a frame of
            item = await self._connection.inbox.get()
        except InboxClosed:
            await self._connection.yield_after_end()
            raise StopAsyncIteration from None
        except ConcurrentReceiveError:
            await self._connection.yield_after_end()
            raise
        return self._connection.read(item)

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

    async def join(self, room: str, metadata: Mapping[str, Any] | None = None, *, history: int = 0) -> PresenceList:
        """Join a room, and return who is there by now, oneself included. Joining again renews the metadata.

        The `Presence`s are collected when they are first looked at: `list(await ws.join("lobby"))`.

        The connection leaves its rooms when it ends. Needs no waiting: it is awaitable so that it can become so where
        rooms span several processes.

        Args:
            room: Its name. It is made by the first who joins.
            metadata: What the others see of this client in the room: a name, a colour, a status.
            history: How many of the room's last messages are sent to this connection first, as far as the room
                remembers them (`room_history`). Only a newcomer gets them: a member that joins again gets none. A plain
                client that is back in its rooms with a reconnect token gets what was said since it left.

        Raises:
            TypeError: The metadata is no mapping.
            RoomNameError: It is empty, too long, or has a control character.
            RoomLimitError: The connection is in `max_rooms_per_connection` rooms.
            MemoryLimitExceededError: The metadata is more than may be held for the connection. It is not in the room.
            SocketClosed: The connection is over.
            NotOpenError: The connection is not accepted yet.
        """
        await self._connection.still_open()
        newcomer = history > 0 and room not in self._services.rooms_of(self._connection)
        roster = self._services.join(self._connection, room, metadata)
        if history > 0:
            self._services.history(self._connection, room, history, newcomer=newcomer)
        return roster

    async def leave(self, room: str) -> bool:
        """Leave a room; `False` if it is not in. Presence ends at once, without a grace."""
        self._connection.check_loop()
        return self._services.leave_room(self._connection, room)

    @property
    def rooms(self) -> tuple[str, ...]:
        """The rooms that this connection is in, in the order in which it joined them.

        After its end they are those that it was in then. Those of a session are live until that ends.
        """
        return self._services.rooms_of(self._connection)

    # ── sending ──

    async def send(self, message: Any, *, coalesce_key: Any = None, volatile: bool = False, ack: bool = False) -> None:
        """Send anything: `str` as text, bytes as binary, all else as JSON. Waits while the outbox is full.

        It leaves when it is sent, also if the code that sends it then computes for long without an `await`. Messages of
        one task arrive in the order of their calls. Cancelling while it waits for room leaves the message out.

        Args:
            message: What to send.
            coalesce_key: If a message with an equal key still waits to be sent, this one takes its place: for what is
                worth nothing when there is a newer one, such as a price or the place of a cursor. Only plain clients
                and volatile messages are coalesced.
            volatile: Whether it is worth nothing later: it is not kept for a client that is away.
            ack: Whether to wait until the client has acknowledged it, also if it reconnects in between.

        Raises:
            MessageEncodeError: The message cannot be encoded; the connection stays usable.
            SocketClosed: The connection is over.
            SessionEndedError: With `ack`: the session ended before the client had acknowledged it.
            RequestError: With `ack`: the client came back too late, and will not get it.
            UnsupportedByClientError: With `ack`: the client does not speak `stabilizer.v1.json`.
        """
        frame = encode(message, coalesce_key, volatile=volatile)
        if ack:
            await self._connection.send_with_ack(frame)
        elif not self._connection.put_now(frame):
            await self._connection.send(frame)
        elif self._connection.should_yield():
            await self._connection.yield_for_send()

    async def request(self, event: str, data: Any = None, *, timeout: float = 10.0) -> Any:
        """Ask the client something, and return its answer. Survives a reconnect in between. Cancelling is safe.

        Args:
            event: What it is asked.
            data: What comes with it.
            timeout: Seconds to wait for the answer.

        Raises:
            RequestError: The client answered with an error, or too many requests to it are open.
            RequestTimeoutError: It did not answer in time.
            SessionEndedError: The session ended before it answered.
            SocketClosed: The connection is over.
            UnsupportedByClientError: The client does not speak `stabilizer.v1.json`.
            MessageEncodeError: The data cannot be JSON that the client reads, or the event is no name.
        """
        return await self._connection.request(event, data, timeout)

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

    def reconnect_token(self) -> str:
        """Make a token by which a plain client gets this connection's rooms and user data back after a disconnect.

        Send it, and let the client present it as `?reconnect_token=` of its next connection. It is good once. As
        `manager.generate_reconnect_token(ws)`.

        Raises:
            InvalidTokenError: `enable_reconnect` is False.
            SocketClosed: The connection is over.
            NotOpenError: The connection is not accepted yet.
        """
        self._connection.check_open()
        return self._services.reconnect_token(self._connection)

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
        self._connection.check_loop()
        self._connection.close(DisconnectReason.APPLICATION, code=code, text=reason or "")
        await asyncio.wait({self._connection.outbox.done})

    def create_task(self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Start a task that is cancelled when the connection ends.

        An exception in it ends the connection as one in the endpoint would: a bug is reported and closes 1011, an
        `HTTPException` closes 4000 + its status. `SocketClosed` is no news.

        It does not wait, so a loop that only calls this and catches `SocketClosed` holds the event loop for ever.

        Raises:
            SocketClosed: The connection is over.
            NotOpenError: The connection is not accepted yet.
        """
        return self._connection.spawn(coroutine, name)
