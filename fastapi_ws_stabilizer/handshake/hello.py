"""The first exchange with a `stabilizer.v1.json` client: its hello, its credential, its session."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from fastapi import WebSocket, WebSocketException

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SUPERSEDED
from fastapi_ws_stabilizer.compat.starlette import mark_handled
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import ShutdownError
from fastapi_ws_stabilizer.handshake.rejection import Rejector
from fastapi_ws_stabilizer.limits.connections import shutdown_error
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import ResumeResult, SessionStore, StaleAttemptError
from fastapi_ws_stabilizer.tasks import LazyEvent, TaskSet, wait_for_first
from fastapi_ws_stabilizer.wire.v1.frames import ProtocolError
from fastapi_ws_stabilizer.wire.v1.hello import Hello, offered_credential, parse_hello

MIN_HELLO_WAIT: Final = 1.0
"""Seconds in which an honest client has said hello, be it far away."""


class HelloReader:
    """Takes hellos. Until one was good, nothing is kept of a client but the WebSocket itself.

    Args:
        config: How long a client has.
        sessions: Where its session is found or made.
        rejector: Turns clients away.
        address_of: Says where a client comes from.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        sessions: SessionStore,
        rejector: Rejector,
        address_of: Callable[[WebSocket], str],
    ) -> None:
        self._timeout = config.hello_timeout
        self._drain_window = config.drain_window
        self._address_of = address_of
        self._sessions = sessions
        self._rejector = rejector
        self._tasks = TaskSet(lambda _, __: None)  # whoever dials and vanishes is no failure of ours
        self._closed = LazyEvent()
        self._awaiting_hello: dict[
            LazyEvent, tuple[float, Callable[[], None]]
        ] = {}  # since when; the longest comes first
        self._pending: set[asyncio.Future[None]] = set()

    @property
    def pending(self) -> list[asyncio.Future[None]]:
        """A future for each client that has no session yet: it is done when the client has one, or is refused."""
        return list(self._pending)

    def reopen(self) -> None:
        """Take clients again."""
        if self._closed.is_set:
            self._closed = LazyEvent()

    def close(self) -> None:
        """Refuse everybody from now on, those included who are being greeted."""
        self._closed.set()

    async def negotiate(
        self,
        websocket: WebSocket,
        hello: Hello,
        client_id_of: Callable[[Session | None], str],
        authenticate: Callable[[str | None], Awaitable[Exception | None]],
        check_admission: Callable[[str, Session | None], Exception | None],
    ) -> ResumeResult:
        """Give a client that has said hello its session.

        Args:
            websocket: Its WebSocket, accepted.
            hello: What it has said.
            client_id_of: Says who it is, given the session that it proves to have.
            authenticate: Looks at its credential, and returns what is wrong if it is not good.
            check_admission: Why that client may not come now, with that session.

        Returns:
            What it gets.

        Raises:
            WebSocketException: It was refused, or is gone. It is closed already.
        """
        proven = self._sessions.authenticate(hello)
        client_id = client_id_of(proven)  # before it is authenticated: the hooks ask who it is
        with self._pending_handshake(), self._sessions.pinned(proven):
            refused = await authenticate(credential_in(hello, websocket))
        if refused is not None:
            raise await self._refuse(websocket, refused, client_id)
        if self._closed.is_set:
            raise await self._refuse(websocket, self._stopping(), client_id)
        its_own = self._sessions.authenticate(hello) or self._sessions.superseded_by(hello, client_id)
        refused = check_admission(client_id, its_own)  # before anything of its session is touched
        if refused is not None:
            raise await self._refuse(websocket, refused, client_id)
        try:
            return self._sessions.resume(hello, client_id)
        except StaleAttemptError as stale:
            error = WebSocketException(SUPERSEDED, "a newer connection has the session")
            raise await self._refuse(websocket, error, client_id) from stale

    def evict_oldest_pending(self) -> None:
        """Wait no longer for whoever has been waited for longest, if an honest client would have said hello by now."""
        evicted = next(iter(self._awaiting_hello), None)
        if evicted is not None and monotonic() - self._awaiting_hello[evicted][0] >= MIN_HELLO_WAIT:
            _, on_evicted = self._awaiting_hello.pop(evicted)
            on_evicted()
            evicted.set()

    async def hello(self, websocket: WebSocket, on_evicted: Callable[[], None] = lambda: None) -> Hello:
        """Wait for the hello of an accepted client.

        Args:
            websocket: Its WebSocket.
            on_evicted: Called, without waiting, when it is waited for no longer because room is needed.

        Raises:
            WebSocketException: None came in time, or none that is good. It is closed already.
        """
        with self._pending_handshake():
            return await self._hello(websocket, on_evicted)

    @contextmanager
    def _pending_handshake(self) -> Iterator[None]:
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
            raise await self._refuse(websocket, self._stopping())
        if not waiting.done():
            raise await self._refuse(websocket, WebSocketException(4408, "no hello came"))
        gone = waiting.cancelled() or waiting.exception() is not None
        message: Any = None if gone else waiting.result()
        if message is None or message["type"] != "websocket.receive":
            mark_handled(websocket)
            raise WebSocketException(1000)
        text = message.get("text")
        try:
            return parse_hello((message.get("bytes") or b"") if text is None else text)
        except ProtocolError as problem:
            raise await self._refuse(websocket, WebSocketException(problem.code, str(problem))) from problem

    def _stopping(self) -> ShutdownError:
        return shutdown_error(self._drain_window)

    async def _refuse(self, websocket: WebSocket, error: Exception, client_id: str | None = None) -> WebSocketException:
        """Close a client that has no session yet; the exception ends its endpoint, and nothing else."""
        how = self._rejector.record(websocket, error, self._address_of(websocket), client_id)
        return await self._rejector.close(websocket, how.code, how.reason)


def credential_in(hello: Hello, websocket: WebSocket) -> str | None:
    """The credential of a client: in its hello, else among its subprotocols."""
    if hello.auth is not None:
        return hello.auth
    return offered_credential(websocket.scope.get("subprotocols") or ())
