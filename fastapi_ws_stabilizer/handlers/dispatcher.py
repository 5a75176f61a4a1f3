"""Dispatch of received messages to handlers, for `StableSocket.run`."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.connection import AnyConnection, Connection
from fastapi_ws_stabilizer.connection.inbox import InboxClosed, Item
from fastapi_ws_stabilizer.errors import BroadcastFailedError, MessageEncodeError, RequestError, SocketClosed
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.registry import HandlerRegistry, InvalidMessageError, ReceivedMessage
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.tasks import TaskSet
from fastapi_ws_stabilizer.wire.identifiers import MAX_CODE_CHARS, MAX_TEXT_CHARS, sendable
from fastapi_ws_stabilizer.wire.v1.frames import Message


class Dispatcher:
    """Dispatcher of messages to handlers. It answers invalid messages with an error."""

    def __init__(self, handlers: HandlerRegistry, config: WebSocketConfig, events: EventBus) -> None:
        self._handlers = handlers
        self._max_bad = config.max_bad_messages
        self._events = events

    async def run(self, connection: AnyConnection, concurrency: int) -> None:
        """Handle every message of a connection until it closes.

        Messages received before the close are handled too. If a handler raises, the other running handlers are
        cancelled.

        Raises:
            ValueError: `concurrency` is below 1.
            SocketClosed: The connection has ended.
            NotOpenError: The connection is not accepted yet.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        if not isinstance(connection, Connection):
            raise await connection.closed_error()
        connection.check_loop()
        if not self._handlers:
            connection.emit("no_message_handlers", logging.WARNING)
        with connection.endpoint.running():
            try:
                if concurrency > 1:
                    await self._run_concurrently(connection, concurrency)
                while True:
                    await self._handle(connection, await connection.inbox.get())
            except InboxClosed as closed:
                if not closed.waited:  # a loop around `run` would not yield to the event loop
                    await connection.yield_after_end()

    async def _run_concurrently(self, connection: Connection, concurrency: int) -> None:
        tasks = TaskSet(lambda _, __: None)  # failures are raised to the endpoint
        running: set[asyncio.Task[None]] = set()
        receiving: asyncio.Task[Item] | None = None
        closed = False
        try:
            while running or not closed:
                if receiving is None and not closed and len(running) < concurrency:
                    receiving = tasks.spawn(connection.inbox.get(), name=f"ws-read-{connection.connection_id}")
                waiting: set[asyncio.Task[Any]] = {*running} if receiving is None else {*running, receiving}
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                handled = {task for task in running if task in done}
                running -= handled
                failure = self._first_failure(connection, handled)
                del waiting, done, handled  # the exception of a task refers to this frame
                if failure is not None:
                    try:
                        raise failure
                    finally:
                        del failure
                if receiving is not None and receiving.done():
                    try:
                        message = self._handle(connection, receiving.result())
                        running.add(tasks.spawn(message, name=f"ws-message-{connection.connection_id}"))
                    except InboxClosed:
                        closed = True
                    receiving = None
        finally:
            if cancelled := tasks.cancel():
                await asyncio.wait(cancelled)

    def _first_failure(self, connection: Connection, done: set[asyncio.Task[None]]) -> BaseException | None:
        """Return the exception of one of these tasks, and report those of the others. `None` if all succeeded."""
        errors: list[BaseException] = []
        for task in done:
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if error is not None:
                errors.append(error)
        for error in errors[1:]:
            self._events.emit_exception(
                "handler_failed", error, client_id=connection.client_id, connection_id=connection.connection_id
            )
        return errors[0] if errors else None

    async def _handle(self, connection: Connection, item: Item) -> None:
        received = ReceivedMessage(item)
        socket: StableSocket = connection.socket
        protocol = connection.protocol
        message = item if isinstance(item, Message) else None
        try:
            handlers = self._handlers.match(received)
            for handler in handlers:
                excess = handler.limit and handler.limit.take(
                    connection.client_id, connection.connection_id, 1.0, monotonic()
                )
                if excess:
                    protocol.on_failed(item)
                    connection.on_rate_exceeded(excess, message)
                    return
            prepared = [(handler, handler.validate(received)) for handler in handlers]
        except InvalidMessageError as problem:
            self._reject(connection, problem, item)
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
                self._answer_error(connection, item, problem.code, problem.message)
                return
            except asyncio.CancelledError:
                protocol.on_no_answer(item, "interrupted", "the handler was cancelled")
                raise
            except BaseException:
                protocol.on_no_answer(item, "handler_failed", "the server failed to handle the message")
                raise
        if interrupted and answer is None:
            protocol.on_interrupted(item)
            return
        try:
            protocol.on_handled(item, answer)
        except MessageEncodeError:
            protocol.on_no_answer(item, "handler_failed", "the server's answer cannot be sent")
            raise

    def _answer_error(self, connection: Connection, item: Item, code: str, text: str) -> None:
        code, text = sendable(code, MAX_CODE_CHARS), sendable(text, MAX_TEXT_CHARS)
        connection.protocol.on_failed(item)
        connection.protocol.reject(connection, item if isinstance(item, Message) else None, code, text)

    def _reject(self, connection: Connection, problem: InvalidMessageError, item: Item) -> None:
        self._events.counters.bad_messages += 1
        connection.bad_messages += 1
        connection.emit_throttled("bad_message", logging.INFO, problem.code, code=problem.code)
        exceeded = self._max_bad is not None and connection.bad_messages > self._max_bad
        if not exceeded or isinstance(item, Message):  # an accepted message always gets an answer
            self._answer_error(connection, item, problem.code, problem.message)
        if exceeded:
            connection.close(DisconnectReason.POLICY, reason="too many bad messages")
