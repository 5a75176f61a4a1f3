"""The messages of a connection, as user code reads and sends them, by its socket or by Starlette's `WebSocket`."""

from __future__ import annotations

import abc
import asyncio
from asyncio import _get_running_loop as running_loop
from typing import Any

from fastapi_ws_stabilizer.close_codes import DisconnectReason, local_close
from fastapi_ws_stabilizer.connection.inbox import Inbox, InboxClosed, Item
from fastapi_ws_stabilizer.connection.sending import SendingHalf
from fastapi_ws_stabilizer.errors import (
    ConcurrentReceiveError,
    NotOpenError,
    RequestTimeoutError,
    UnsupportedByClientError,
    closed_error_for,
)
from fastapi_ws_stabilizer.queueing import MAX_TURNS
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.tasks import wait_for_all
from fastapi_ws_stabilizer.wire.encoded import CLOSE, EncodedMessage, encode
from fastapi_ws_stabilizer.wire.envelope import sequenced_frame
from fastapi_ws_stabilizer.wire.v1.frames import Message


class Messages(SendingHalf):
    """What goes in and out of a connection, with a session and without."""

    __slots__ = ("inbox", "opened")

    inbox: Inbox
    opened: bool

    async def receive(self) -> str | bytes:
        """Wait for the next message.

        Raises:
            SocketClosed: The connection is over and everything has been read.
            ConcurrentReceiveError: Another task is receiving.
        """
        return self.read(await self.receive_item())

    def read(self, item: Item) -> str | bytes:
        """A message as code gets it that knows nothing of `stabilizer.v1.json`."""
        if not isinstance(item, Message):
            return item
        if self.protocol is not None:
            self.protocol.unanswerable(item)
        return item.raw

    async def receive_item(self) -> Item:
        """Wait for the next message, with what a client of `stabilizer.v1.json` says of it.

        Raises:
            SocketClosed: The connection is over and everything has been read.
            ConcurrentReceiveError: Another task is receiving.
        """
        self.check_opened()
        self.check_loop()
        try:
            return await self.inbox.get()
        except InboxClosed:
            raise await self._closed() from None
        except ConcurrentReceiveError:
            await self.yield_after_end()
            raise

    async def send(self, frame: EncodedMessage) -> None:
        """Send a frame at once, behind what is queued; wait while the outbox is full.

        The event loop gets a turn where that helps: when it was held for long, and when the network has not taken all.

        Raises:
            SocketClosed: The connection is over.
            WrongLoopError: This is not the event loop of the connection.
        """
        if not self.put_now(frame):
            if self.protocol is None:
                queued = await self.outbox.put_wait(frame)
            else:
                queued = self.close_info is None and await self.protocol.session.put_wait(self, frame)
            if not queued:
                raise await self._closed()
            if self.pause is not None:
                self.pause.sent = True
            self.outbox.flush()
        if self.should_yield():
            await self.yield_for_send()

    def put_now(self, frame: EncodedMessage) -> bool:
        """Send a frame at once if there is nothing to think about; `False` says nothing but that there is. Hot path."""
        if running_loop() is not self._parts.loop:
            self.check_loop()
        if self.pause is not None:
            self.pause.sent = True
        if self.protocol is None:
            return self.outbox.put_now(frame)
        return self.close_info is None and self.protocol.session.put_now(self, frame)

    def should_yield(self) -> bool:
        """Whether the event loop should turn now, for what user code has just sent, or for everybody else. Hot path."""
        outbox = self.outbox
        return (outbox._due and outbox.lingers()) or self._parts.scheduler.exceeded()

    async def yield_for_send(self) -> None:
        """Let the event loop turn, more than once if what was sent has not left yet, and not for a slow client."""
        for _ in range(MAX_TURNS):
            await asyncio.sleep(0)
            if not self.outbox.lingers():
                break

    async def send_with_ack(self, frame: EncodedMessage) -> None:
        """Queue a frame, and wait until the client has acknowledged it, in this connection or a later one.

        Raises:
            SocketClosed: The connection is over, and the frame was not queued.
            SessionEndedError: The session is over.
            UnsupportedByClientError: The client acknowledges nothing.
            ValueError: The frame is volatile.
        """
        self.check_loop()
        if frame.volatile:
            raise ValueError("a volatile message is not acknowledged: send it with volatile=True or with ack=True")
        if self.protocol is None:
            await self.still_open()
            raise UnsupportedByClientError
        seq = await self._enqueue_sequenced(self.protocol.session, frame)
        self.protocol.request_ack()
        await self.protocol.session.requests.until_acknowledged(seq)

    async def request(self, event: str, data: Any, timeout: float) -> Any:
        """Send a request to the client and wait for its answer, in this connection or a later one.

        Raises:
            RequestTimeoutError: There is none in time.
            RequestError: It is an error.
            SocketClosed: The connection is over, and the request was not queued.
            SessionEndedError: The session is over.
            UnsupportedByClientError: The client answers no requests.
            MessageEncodeError: The data cannot be JSON that the client reads, or the event is no name.
        """
        await self.still_open()
        if self.protocol is None:
            raise UnsupportedByClientError
        session = self.protocol.session
        request_id, answer = session.requests.open()
        try:
            await self._enqueue_sequenced(session, sequenced_frame("msg", data, event=event, id=request_id))
            if not await wait_for_all([answer], timeout):
                raise RequestTimeoutError(timeout)
            return answer.result()
        finally:
            session.requests.forget(request_id)

    async def _enqueue_sequenced(self, session: Session, frame: EncodedMessage) -> int:
        """Queue a frame and return its number."""
        numbers: list[int] = []
        queued = self.close_info is None and await session.put_wait(self, frame, numbers.append)
        if not queued:
            raise await self._closed()
        return numbers[0] if numbers else session.head

    def check_loop(self) -> None:
        """Raise unless this is the event loop of the connection.

        Raises:
            WrongLoopError: It is another one.
        """
        self._parts.scheduler.check_loop()

    def check_opened(self) -> None:
        """Raise unless the connection is open or has been.

        Raises:
            NotOpenError: It is not accepted yet.
        """
        if not self.opened:
            raise NotOpenError

    def check_open(self) -> None:
        """Raise unless the connection is open, and this is its event loop.

        Raises:
            SocketClosed: It is over.
            NotOpenError: It is not accepted yet.
            WrongLoopError: This is another event loop.
        """
        self.check_loop()
        if not self.opened or self.close_info is not None:
            raise self._closed_error()

    async def still_open(self) -> None:
        """As `check_open`, for code that can wait: a loop that catches every error gives the event loop its turns.

        Raises:
            SocketClosed: It is over.
            NotOpenError: It is not accepted yet.
            WrongLoopError: This is not the event loop of the connection.
        """
        self.check_loop()
        if not self.opened or self.close_info is not None:
            raise await self._closed()

    @abc.abstractmethod
    async def yield_after_end(self) -> None:
        """Your code is told that the connection has ended. From the second time on the event loop has a turn first."""

    async def _closed(self) -> Exception:
        """The error for code that goes on after the end."""
        await self.yield_after_end()
        return self._closed_error()

    def _closed_error(self) -> Exception:
        return NotOpenError() if self.close_info is None else closed_error_for(self.close_info)

    async def _asgi_receive(self) -> dict[str, Any]:
        """Stand in for the server's `receive`, for code that reads from the `WebSocket` itself."""
        self.check_loop()
        try:
            item = await self.inbox.get()
        except InboxClosed:
            await self.yield_after_end()
            how = self.close_info or local_close(DisconnectReason.NETWORK_LOST)
            return {"type": "websocket.disconnect", "code": how.code, "reason": how.reason}
        message = self.read(item)
        return {"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message}

    async def _asgi_send(self, message: Any) -> None:
        """Stand in for the server's `send`, for code that writes to the `WebSocket` itself."""
        if message["type"] == CLOSE:
            self.close(DisconnectReason.APPLICATION, code=message.get("code", 1000), text=message.get("reason") or "")
            return
        if message["type"] != "websocket.send":
            raise RuntimeError(f"an accepted WebSocket cannot send {message['type']!r}")
        data = message.get("bytes")
        await self.send(encode(message.get("text") or "" if data is None else data))
