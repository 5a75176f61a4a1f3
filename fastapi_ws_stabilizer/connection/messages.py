"""Sending and receiving of a connection, for its socket and for Starlette's `WebSocket`."""

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
    """Part of a connection that sends and receives messages, with or without a session."""

    __slots__ = ("inbox", "opened")

    inbox: Inbox
    opened: bool

    async def receive(self) -> str | bytes:
        """Wait for the next message. Cancelling is safe.

        Raises:
            SocketClosed: The connection is closed and all messages have been read.
            ConcurrentReceiveError: Another task is receiving.
        """
        return self.read(await self.receive_item())

    def read(self, item: Item) -> str | bytes:
        """Return the raw message, for code that does not use `stabilizer.v1.json`."""
        if not isinstance(item, Message):
            return item
        if self.protocol is not None:
            self.protocol.on_raw_read(item)
        return item.raw

    async def receive_item(self) -> Item:
        """Wait for the next message, parsed if the client uses `stabilizer.v1.json`. Cancelling is safe.

        Raises:
            SocketClosed: The connection is closed and all messages have been read.
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
        """Send a frame after the queued ones, and wait while the outbox is full.

        This yields to the event loop if user code has held it for long, or if the network has not accepted all frames.

        Raises:
            SocketClosed: The connection is closed.
            WrongLoopError: This is not the event loop of the connection.
        """
        if not self.try_send(frame):
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

    def try_send(self, frame: EncodedMessage) -> bool:
        """Send a frame on the fast path. `False`, with nothing queued, if the slow path must decide. Hot path."""
        if running_loop() is not self._parts.loop:
            self.check_loop()
        if self.pause is not None:
            self.pause.sent = True
        if self.protocol is None:
            return self.outbox.try_send(frame)
        return self.close_info is None and self.protocol.session.try_send(self, frame)

    def should_yield(self) -> bool:
        """Return whether to yield to the event loop, to flush what was just sent or to let others run. Hot path."""
        outbox = self.outbox
        return (outbox._due and outbox.has_sendable_frames()) or self._parts.scheduler.exceeded()

    async def yield_for_send(self) -> None:
        """Yield to the event loop, repeatedly while sent messages still wait, but once only for a slow consumer."""
        for number in range(MAX_TURNS):
            # Some servers finish a send in another thread, which needs time and not only turns of the event loop.
            await asyncio.sleep(0 if number < MAX_TURNS // 2 else 0.001)
            if not self.outbox.has_sendable_frames():
                break

    async def send_with_ack(self, frame: EncodedMessage) -> None:
        """Queue a frame and wait until the client acknowledges it, in this connection or a later one.

        Raises:
            SocketClosed: The connection is closed, and the frame was not queued.
            SessionEndedError: The session has ended.
            UnsupportedByClientError: The client does not support acknowledgements.
            ValueError: The frame is volatile.
        """
        self.check_loop()
        if frame.volatile:
            raise ValueError("volatile messages are not acknowledged: pass volatile=True or ack=True, but not both")
        if self.protocol is None:
            await self.still_open()
            raise UnsupportedByClientError
        seq = await self._enqueue_sequenced(self.protocol.session, frame)
        self.protocol.request_ack()
        await self.protocol.session.requests.until_acknowledged(seq)

    async def request(self, event: str, data: Any, timeout: float) -> Any:
        """Send a request to the client and wait for its reply, in this connection or a later one.

        Raises:
            RequestTimeoutError: No reply arrived in time.
            RequestError: The client replied with an error.
            SocketClosed: The connection is closed, and the request was not queued.
            SessionEndedError: The session has ended.
            UnsupportedByClientError: The client does not support requests.
            MessageEncodeError: The data cannot be encoded as JSON that the client reads, or the event name is invalid.
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
        """Queue a frame and return its sequence number."""
        numbers: list[int] = []
        queued = self.close_info is None and await session.put_wait(self, frame, numbers.append)
        if not queued:
            raise await self._closed()
        return numbers[0] if numbers else session.head

    def check_loop(self) -> None:
        """Check that this is the event loop of the connection.

        Raises:
            WrongLoopError: This is another event loop.
        """
        self._parts.scheduler.check_loop()

    def check_opened(self) -> None:
        """Check that the connection was opened. It may be closed by now.

        Raises:
            NotOpenError: The handshake has not been accepted yet.
        """
        if not self.opened:
            raise NotOpenError

    def check_open(self) -> None:
        """Check that the connection is open and that this is its event loop.

        Raises:
            SocketClosed: The connection is closed.
            NotOpenError: The handshake has not been accepted yet.
            WrongLoopError: This is another event loop.
        """
        self.check_loop()
        if not self.opened or self.close_info is not None:
            raise self._closed_error()

    async def still_open(self) -> None:
        """Check like `check_open`, but yield before raising, so that a loop that catches all errors lets others run.

        Raises:
            SocketClosed: The connection is closed.
            NotOpenError: The handshake has not been accepted yet.
            WrongLoopError: This is not the event loop of the connection.
        """
        self.check_loop()
        if not self.opened or self.close_info is not None:
            raise await self._closed()

    @abc.abstractmethod
    async def yield_after_end(self) -> None:
        """Count an error for a closed connection, and yield to the event loop from the second one on."""

    async def _closed(self) -> Exception:
        """Return the error for code that uses a closed connection."""
        await self.yield_after_end()
        return self._closed_error()

    def _closed_error(self) -> Exception:
        return NotOpenError() if self.close_info is None else closed_error_for(self.close_info)

    async def _asgi_receive(self) -> dict[str, Any]:
        """Replace the server's `receive` for code that reads from the `WebSocket` directly."""
        self.check_loop()
        try:
            item = await self.inbox.get()
        except InboxClosed:
            await self.yield_after_end()
            close_info = self.close_info or local_close(DisconnectReason.NETWORK_LOST)
            return {"type": "websocket.disconnect", "code": close_info.code, "reason": close_info.reason}
        message = self.read(item)
        return {"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message}

    async def _asgi_send(self, message: Any) -> None:
        """Replace the server's `send` for code that writes to the `WebSocket` directly."""
        if message["type"] == CLOSE:
            self.close(DisconnectReason.APPLICATION, code=message.get("code", 1000), reason=message.get("reason") or "")
            return
        if message["type"] != "websocket.send":
            raise RuntimeError(f"an accepted WebSocket cannot send {message['type']!r}")
        data = message.get("bytes")
        await self.send(encode(message.get("text") or "" if data is None else data))
