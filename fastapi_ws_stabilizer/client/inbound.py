"""Received messages of a client: dispatch to handlers, or a queue for `async for`."""

from __future__ import annotations

import asyncio
import copy
import inspect
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from fastapi_ws_stabilizer.client.errors import ClientClosedError, ClientError, MessageTooLargeError
from fastapi_ws_stabilizer.client.events import ClientEvents, logger
from fastapi_ws_stabilizer.client.requests import PendingRequests
from fastapi_ws_stabilizer.client.send_buffer import PendingMessage, SendBuffer
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.errors import RequestError
from fastapi_ws_stabilizer.tasks import TaskSet
from fastapi_ws_stabilizer.wire.v1.frames import Message

ANY: Final = "*"
"""Name for all events without their own handler."""

MAX_UNREAD: Final = 1024
"""Maximum number of messages that wait to be iterated, and of those that wait for busy handlers."""

ABANDONED_AFTER: Final = 10.0
"""Seconds without a reader after which unread messages no longer block reading."""

ABANDONED_CHECK_INTERVAL: Final = 1.0
"""Interval in seconds at which the client checks for an abandoned reader."""

Handler = Callable[..., Any]


def event_of(message: Message) -> str | None:
    """Return the event of a message, or the `type` of the object that it carries."""
    if message.event is not None:
        return message.event
    kind = message.data.get("type") if isinstance(message.data, dict) else None
    return kind if isinstance(kind, str) else None


class MessageIterator:
    """One `async for` over the messages without a handler. It is collected when the loop is left.

    It is not an async generator, because a generator ends at the first cancelled read, for example at a timeout.
    """

    def __init__(self, incoming: InboundMessages) -> None:
        self._incoming = incoming

    def __aiter__(self) -> MessageIterator:
        return self

    async def __anext__(self) -> Message:
        message = await self._incoming.get()
        if message is None:
            raise StopAsyncIteration
        return message


class InboundMessages:
    """Messages of a client, in the order of their arrival.

    One task calls the handlers one after the other. Messages without a handler wait to be iterated. A request without a
    handler is answered with the error `no_handler`.

    Args:
        tasks: The task set for that task.
        events: Listeners of the client.
        buffer: Messages to send: the answers to the server's requests, and those whose acknowledgement the client
            awaits.
        requests: Requests whose answers the client awaits.
    """

    def __init__(self, tasks: TaskSet, events: ClientEvents, buffer: SendBuffer, requests: PendingRequests) -> None:
        self._tasks = tasks
        self._events = events
        self._buffer = buffer
        self._requests = requests
        self._handlers: dict[str, list[Handler]] = {}
        self._to_handle: deque[tuple[Message, int]] = deque()  # each with the number of its session
        self._to_read: deque[Message] = deque()
        self._session = 0
        self._working = False
        self._has_reader = False
        self._read_at = 0.0
        self._iterators: weakref.WeakSet[MessageIterator] = weakref.WeakSet()
        self._changed = asyncio.Event()
        self._closed = False
        self._error: ClientClosedError | None = None
        self._unhandled_logged = False

    def on(self, event: str, handler: Handler) -> None:
        """Register a handler for the data of an event's messages; `"*"` means all other events."""
        self._handlers.setdefault(event, []).append(handler)

    def put(self, message: Message) -> None:
        """Dispatch or queue a message."""
        if message.event is None:
            message.event = event_of(message)
        if self._handlers_for(message):
            self._to_handle.append((message, self._session))
            if not self._working:
                self._working = True
                self._tasks.spawn(self._work(), name="ws-client-handlers")
            return
        if message.id is not None:
            text = f"the client has no handler for requests of type {event_of(message)!r}"
            self._reply(message.id, None, {"code": "no_handler", "message": text})
        if len(self._to_read) >= MAX_UNREAD and not self._has_reader:
            self._to_read.popleft()
            if not self._unhandled_logged:
                self._unhandled_logged = True
                logger.warning("messages are discarded: they have no handler, and no loop iterates over the client")
        self._to_read.append(message)
        self._changed.set()

    async def room(self) -> None:
        """Wait until there is space for more messages.

        Until then the client reads nothing, and TCP applies backpressure. Your code may have stopped iterating while
        the client needs what comes after the unread messages. In that case reading continues after `ABANDONED_AFTER`
        seconds. A slow loop still blocks, because its iterator exists. For code that calls `anext` directly, the client
        can only assume that it has stopped.
        """
        read_at = monotonic()
        while len(self._to_handle) >= MAX_UNREAD or (self._has_reader and len(self._to_read) >= MAX_UNREAD):
            self._changed.clear()
            look_again = asyncio.get_running_loop().call_later(ABANDONED_CHECK_INTERVAL, self._changed.set)
            try:
                await self._changed.wait()
            finally:
                look_again.cancel()
            if self._iterators or len(self._to_read) < MAX_UNREAD:  # a loop exists, or the handlers are slow
                read_at = monotonic()
            read_at = max(read_at, self._read_at)
            awaits_more = self._handlers or len(self._requests) or len(self._buffer)
            if monotonic() - read_at >= ABANDONED_AFTER and awaits_more:
                self._has_reader = False

    def loop(self) -> AsyncIterator[Message]:
        """Return an iterator over the messages without a handler."""
        loop = MessageIterator(self)
        self._iterators.add(loop)
        return loop

    async def get(self) -> Message | None:
        """Return the next message without a handler; `None` after the end. Cancelling is safe.

        Raises:
            ClientClosedError: The client is closed, and not by your code.
        """
        self._has_reader = True
        while not self._to_read:
            if self._closed:
                if self._error is not None:
                    raise copy.copy(self._error)  # otherwise each raise would make its traceback longer
                return None
            self._changed.clear()
            await self._changed.wait()
        message = self._to_read.popleft()
        self._read_at = monotonic()
        self._changed.set()
        return message

    def stop_blocking(self) -> None:
        """Stop waiting for a reader: unread messages no longer block reading."""
        self._has_reader = False
        self._changed.set()

    def restart_session(self) -> None:
        """Start a new session. Requests of the old session are handled but not answered."""
        self._session += 1

    def close(self, error: ClientClosedError | None = None) -> None:
        """End the stream of messages.

        Args:
            error: Error that iterators raise; without it their loops just end.
        """
        self._closed, self._error = True, error
        self._changed.set()

    def _handlers_for(self, message: Message) -> list[Handler]:
        event = event_of(message)
        return self._handlers.get(event, []) if event in self._handlers else self._handlers.get(ANY, [])

    async def _work(self) -> None:
        try:
            while self._to_handle:
                message, session = self._to_handle.popleft()
                self._changed.set()
                await self._handle(message, session)
        finally:
            self._working = False

    async def _handle(self, message: Message, session: int) -> None:
        answer: Any = None
        error: dict[str, str] | None = None
        for handler in self._handlers_for(message):
            try:
                result = handler(message.data)
                if inspect.isawaitable(result):
                    result = await result
                answer = result if answer is None else answer
            except RequestError as refusal:
                error = {"code": refusal.code, "message": refusal.message}
            except (Exception, asyncio.CancelledError) as failure:
                if isinstance(failure, asyncio.CancelledError) and self._cancelled():
                    raise  # otherwise the handler has awaited something that was cancelled, which is a plain failure
                logger.exception("a handler for %r failed", event_of(message))
                error = {"code": "handler_failed", "message": "a handler of the client failed"}
        if message.id is not None and session == self._session:
            self._reply(message.id, answer, error)

    def _reply(self, request_id: str, data: Any, error: dict[str, str] | None) -> None:
        """Queue the answer to a request. If it cannot be sent, the server gets an error instead."""
        try:
            message = PendingMessage("reply", data if error is None else None, {"re": request_id, "error": error})
            self._buffer.add(message)
        except Exception as problem:  # the data comes from your code, and encoding it may raise anything
            self._reply_unsendable(request_id, problem)
            return

        def on_done(done: asyncio.Future[None]) -> None:
            # The server of a later connection may have a lower limit than the one for which the answer was queued.
            problem = None if done.cancelled() else done.exception()
            if isinstance(problem, MessageTooLargeError):
                self._reply_unsendable(request_id, problem)

        message.done.add_done_callback(on_done)

    def _reply_unsendable(self, request_id: str, problem: BaseException) -> None:
        """Answer with an error instead of data that cannot be sent, so that the server does not wait."""
        if self._closed:
            return
        self._events.emit("error", problem)
        cause = str(problem) if isinstance(problem, ClientError) else "it cannot be encoded"
        error = {"code": "unsendable", "message": f"the client's answer cannot be sent: {cause}"}
        try:
            self._buffer.add(PendingMessage("reply", None, {"re": request_id, "error": error}))
        except Exception as also:
            logger.warning("the client cannot answer request %r of the server: %s", request_id, also)

    def _cancelled(self) -> bool:
        """Return whether the task that calls the handlers is being cancelled."""
        cancelling = getattr(asyncio.current_task(), "cancelling", None)
        return self._closed if cancelling is None else cancelling() > 0  # Python 3.10 has no `cancelling`
