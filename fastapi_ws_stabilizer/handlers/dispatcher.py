"""Dispatch of received messages to handlers, for `StableSocket.run`."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.inbox import Item
from fastapi_ws_stabilizer.ended_socket import EndedConnection
from fastapi_ws_stabilizer.errors import BroadcastFailedError, MessageEncodeError, RequestError, SocketClosed
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.registry import HandlerRegistry, InvalidMessageError, ReceivedMessage, error_reply
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.tasks import TaskSet
from fastapi_ws_stabilizer.wire.encoded import encode
from fastapi_ws_stabilizer.wire.identifiers import MAX_CODE_CHARS, MAX_TEXT_CHARS, sendable
from fastapi_ws_stabilizer.wire.v1.frames import Message


class Dispatcher:
    """Dispatcher of messages to handlers. It answers invalid messages with an error."""

    def __init__(self, handlers: HandlerRegistry, config: WebSocketConfig, events: EventBus) -> None:
        self._handlers = handlers
        self._max_bad = config.max_bad_messages
        self._events = events

    async def run(self, connection: Connection | EndedConnection, concurrency: int) -> None:
        """Handle every message of a connection until it closes.

        Messages received before the close are handled too. If a handler raises, the other running handlers are
        cancelled.

        Raises:
            ValueError: `concurrency` is below 1.
            SocketClosed: The connection ended long ago, and only the data for session end hooks is left.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        if isinstance(connection, EndedConnection):
            raise await connection._closed()
        if not self._handlers:
            connection.emit("no_message_handlers", logging.WARNING)
        with connection.endpoint.running():
            if concurrency == 1:
                while True:
                    try:
                        item = await connection.receive_item()
                    except SocketClosed:
                        return
                    await self._handle(connection, item)
            else:
                await self._run_concurrently(connection, concurrency)

    async def _run_concurrently(self, connection: Connection, concurrency: int) -> None:
        tasks = TaskSet(lambda _, __: None)  # failures are raised to the endpoint
        running: set[asyncio.Task[None]] = set()
        receiving: asyncio.Task[Item] | None = None
        closed = False
        try:
            while running or not closed:
                if receiving is None and not closed and len(running) < concurrency:
                    receiving = tasks.spawn(connection.receive_item(), name=f"ws-read-{connection.connection_id}")
                waiting: set[asyncio.Task[Any]] = {*running} if receiving is None else {*running, receiving}
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                handled = {task for task in running if task in done}
                running -= handled
                self._raise_first(connection, handled)
                if receiving is not None and receiving.done():
                    try:
                        message = self._handle(connection, receiving.result())
                        running.add(tasks.spawn(message, name=f"ws-message-{connection.connection_id}"))
                    except SocketClosed:
                        closed = True
                    receiving = None
        finally:
            if cancelled := tasks.cancel():
                await asyncio.wait(cancelled)

    def _raise_first(self, connection: Connection, done: set[asyncio.Task[None]]) -> None:
        """Raise the exception of one of these tasks, and report those of the others."""
        errors: list[BaseException] = []
        for task in done:
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if error is not None:
                errors.append(error)
        for error in errors[1:]:
            self._events.emit_exception(
                "handler_failed", error, client_id=connection.client_id, connection_id=connection.connection_id
            )
        if errors:
            raise errors[0]

    async def _handle(self, connection: Connection, item: Item) -> None:
        received = ReceivedMessage(item)
        socket: StableSocket = connection.socket
        message = item if isinstance(item, Message) else None
        try:
            handlers = self._handlers.match(received)
            for handler in handlers:
                excess = handler.limit and handler.limit.take(
                    connection.client_id, connection.connection_id, 1.0, monotonic()
                )
                if excess:
                    self._release_key(connection, message)
                    connection.on_rate_exceeded(excess, message)
                    return
            prepared = [(handler, handler.validate(received)) for handler in handlers]
        except InvalidMessageError as problem:
            self._reject(connection, problem, message)
            return
        answer: Any = None
        interrupted = False
        timings = self._events.timings
        for handler, content in prepared:
            try:
                call = handler(socket, content)
                answered = await (call if timings is None else timings.handlers.measure(call))
                answer = answered if answer is None else answer
            except SocketClosed:
                # The handler tried to answer a client that has left. Its other messages are still handled.
                if connection.close_info is None:
                    raise
                interrupted = True
            except BroadcastFailedError as error:
                # The handler called raise_for_failure(): other clients were too slow, so this one stays connected.
                connection.emit("broadcast_failed", logging.WARNING, recipients=error.total)
            except RequestError as problem:
                self._answer_error(connection, message, problem.code, problem.message)
                return
            except asyncio.CancelledError:
                self._answer_failure(connection, message, "interrupted", "the handler was cancelled")
                raise
            except BaseException:
                self._answer_failure(connection, message, "handler_failed", "the server failed to handle the message")
                raise
        if message is not None and connection.protocol is not None:
            if interrupted and answer is None:
                connection.protocol.on_interrupted(message)
            else:
                try:
                    connection.protocol.on_handled(message, answer)
                except MessageEncodeError:
                    self._answer_failure(connection, message, "handler_failed", "the server's answer cannot be sent")
                    raise

    @staticmethod
    def _release_key(connection: Connection, message: Message | None) -> None:
        """Release the idempotency key of a message, so that the next message with that key is handled."""
        if message is not None and connection.protocol is not None:
            connection.protocol.on_failed(message)

    @staticmethod
    def _answer_failure(connection: Connection, message: Message | None, code: str, text: str) -> None:
        """Answer a request with an error because its handler ended without an answer."""
        if message is not None and connection.protocol is not None:
            connection.protocol.on_no_answer(message, code, text)

    def _answer_error(self, connection: Connection, message: Message | None, code: str, text: str) -> None:
        self._release_key(connection, message)
        code, text = sendable(code, MAX_CODE_CHARS), sendable(text, MAX_TEXT_CHARS)
        if connection.protocol is not None:
            connection.protocol.reject(message, code, text)
        else:
            connection.enqueue(encode(error_reply(InvalidMessageError(code, text))))
            connection.outbox.flush()

    def _reject(self, connection: Connection, problem: InvalidMessageError, message: Message | None) -> None:
        self._events.counters.bad_messages += 1
        connection.bad_messages += 1
        connection.emit_throttled("bad_message", logging.INFO, problem.code, code=problem.code)
        exceeded = self._max_bad is not None and connection.bad_messages > self._max_bad
        if not exceeded or message is not None:  # an accepted message always gets an answer
            self._answer_error(connection, message, problem.code, problem.message)
        if exceeded:
            connection.close(DisconnectReason.POLICY, reason="too many bad messages")
