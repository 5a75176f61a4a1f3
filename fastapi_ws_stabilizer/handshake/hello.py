"""The first frame of a `stabilizer.v1.json` client: the hello, with its credential."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from fastapi import WebSocket, WebSocketException

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.compat.starlette import mark_handled
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import ShutdownError
from fastapi_ws_stabilizer.handshake.rejection import Rejector
from fastapi_ws_stabilizer.limits.connections import shutdown_error
from fastapi_ws_stabilizer.tasks import LazyEvent, TaskSet, wait_for_first
from fastapi_ws_stabilizer.wire.v1.frames import ProtocolError
from fastapi_ws_stabilizer.wire.v1.hello import Hello, offered_credential, parse_hello

MIN_HELLO_WAIT: Final = 1.0
"""Seconds in which a well-behaved client sends its hello, even over a slow network."""


class HelloReader:
    """Reader of hellos. Before a valid hello, a client holds no memory except for the WebSocket.

    Args:
        config: The options, such as `hello_timeout`.
        rejector: The rejector of this manager.
    """

    def __init__(self, config: WebSocketConfig, rejector: Rejector) -> None:
        self._timeout = config.hello_timeout
        self._drain_window = config.drain_window
        self._rejector = rejector
        self._tasks = TaskSet(lambda _, __: None)  # a client that disconnects during its handshake is not an error
        self._closed = LazyEvent()
        self._awaiting_hello: dict[
            LazyEvent, tuple[float, Callable[[], None]]
        ] = {}  # monotonic time of the start and `on_evicted`, the longest wait first
        self._pending: set[asyncio.Future[None]] = set()

    @property
    def pending(self) -> list[asyncio.Future[None]]:
        """A future for each client without a session. It is done when its hello or its authentication ends."""
        return list(self._pending)

    @property
    def is_closed(self) -> bool:
        """Whether all clients are rejected, including those in a handshake."""
        return self._closed.is_set

    def reopen(self) -> None:
        """Accept hellos again after `close`."""
        if self._closed.is_set:
            self._closed = LazyEvent()

    def close(self) -> None:
        """Reject all clients from now on, including those in a handshake."""
        self._closed.set()

    def evict_oldest_pending(self) -> None:
        """Stop waiting for the oldest missing hello, if it is missing for at least `MIN_HELLO_WAIT` seconds."""
        evicted = next(iter(self._awaiting_hello), None)
        if evicted is not None and monotonic() - self._awaiting_hello[evicted][0] >= MIN_HELLO_WAIT:
            _, on_evicted = self._awaiting_hello.pop(evicted)
            on_evicted()
            evicted.set()

    async def hello(self, websocket: WebSocket, on_evicted: Callable[[], None] = lambda: None) -> Hello:
        """Wait for the hello of an accepted client.

        Args:
            websocket: The WebSocket.
            on_evicted: Called at once when the wait ends early because the server is full.

        Raises:
            WebSocketException: No valid hello arrived in time. The WebSocket is closed.
        """
        with self.pending_handshake():
            return await self._hello(websocket, on_evicted)

    @contextmanager
    def pending_handshake(self) -> Iterator[None]:
        """Count a client without a session as pending, until its hello or its authentication ends."""
        pending = LazyEvent()
        self._pending.add(pending.future)
        try:
            yield
        finally:
            self._pending.discard(pending.future)
            pending.set()

    async def _hello(self, websocket: WebSocket, on_evicted: Callable[[], None]) -> Hello:
        waiting = self._tasks.spawn(websocket.receive(), name="ws-hello")
        evicted = LazyEvent()
        self._awaiting_hello[evicted] = monotonic(), on_evicted
        try:
            await wait_for_first([waiting, self._closed.future, evicted.future], self._timeout)
        finally:
            self._awaiting_hello.pop(evicted, None)
            if not waiting.done():
                waiting.cancel()
        if self._closed.is_set:
            raise await self.reject(websocket, self._stopping())
        if not waiting.done():
            raise await self.reject(websocket, WebSocketException(4408, "no hello received"))
        failed = waiting.cancelled() or waiting.exception() is not None
        message: Any = None if failed else waiting.result()
        if message is None or message["type"] != "websocket.receive":
            mark_handled(websocket)
            raise WebSocketException(1000)
        text = message.get("text")
        try:
            return parse_hello((message.get("bytes") or b"") if text is None else text)
        except ProtocolError as problem:
            raise await self.reject(websocket, WebSocketException(problem.code, str(problem))) from problem

    def _stopping(self) -> ShutdownError:
        return shutdown_error(self._drain_window)

    async def reject(self, websocket: WebSocket, error: Exception, client_id: str | None = None) -> WebSocketException:
        """Close the WebSocket of a client without a session, and return the exception that ends its endpoint."""
        close_info = self._rejector.record_rejection(websocket, error, client_id)
        return await self._rejector.accept_and_close(websocket, close_info.code, close_info.reason)


def credential_in(hello: Hello, websocket: WebSocket) -> str | None:
    """Return the credential of a client from its hello, else from its subprotocols, else `None`."""
    if hello.auth is not None:
        return hello.auth
    return offered_credential(websocket.scope.get("subprotocols") or ())
