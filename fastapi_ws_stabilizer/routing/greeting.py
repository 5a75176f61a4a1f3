"""The first exchange with a `stabilizer.v1.json` client: its hello, its credential, its session."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from fastapi import WebSocket, WebSocketException

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SUPERSEDED
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import ShutdownError
from fastapi_ws_stabilizer.limits.admission import shutdown_error
from fastapi_ws_stabilizer.routing.refusing import Rejector, mark_handled
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import ResumeResult, SessionStore, StaleAttemptError
from fastapi_ws_stabilizer.tasks import LazyEvent, TaskSet, wait_for_first
from fastapi_ws_stabilizer.wire.v1 import Hello, ProtocolError, offered_credential, parse_hello

MIN_HELLO_WAIT: Final = 1.0
"""Seconds in which an honest client has said hello, be it far away."""


class HelloReader:
    """Takes hellos. Until one was good, nothing is kept of a client but the WebSocket itself.

    Args:
        config: How long a client has.
        sessions: Where its session is found or made.
        refusing: Turns clients away.
        address_of: Says where a client comes from.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        sessions: SessionStore,
        refusing: Rejector,
        address_of: Callable[[WebSocket], str],
    ) -> None:
        self._timeout = config.hello_timeout
        self._drain_window = config.drain_window
        self._address_of = address_of
        self._sessions = sessions
        self._refusing = refusing
        self._tasks = TaskSet(lambda _, __: None)  # whoever dials and vanishes is no failure of ours
        self._closed = LazyEvent()
        self._mute: dict[LazyEvent, tuple[float, Callable[[], None]]] = {}  # since when; the longest comes first
        self._guests: set[asyncio.Future[None]] = set()

    @property
    def guests(self) -> list[asyncio.Future[None]]:
        """A future for each client that has no session yet: it is done when the client has one, or is refused."""
        return list(self._guests)

    def reopen(self) -> None:
        """Take clients again."""
        if self._closed.is_set:
            self._closed = LazyEvent()

    def close(self) -> None:
        """Refuse everybody from now on, those included who are being greeted."""
        self._closed.set()

    async def greet(
        self,
        websocket: WebSocket,
        hello: Hello,
        whose: Callable[[Session | None], str],
        authenticate: Callable[[str | None], Awaitable[Exception | None]],
        lets_in: Callable[[str, Session | None], Exception | None],
    ) -> ResumeResult:
        """Give a client that has said hello its session.

        Args:
            websocket: Its WebSocket, accepted.
            hello: What it has said.
            whose: Says who it is, given the session that it proves to have.
            authenticate: Looks at its credential, and returns what is wrong if it is not good.
            lets_in: Why that client may not come now, with that session.

        Returns:
            What it gets.

        Raises:
            WebSocketException: It was refused, or is gone. It is closed already.
        """
        proven = self._sessions.proven(hello)
        who = whose(proven)  # before it is authenticated: the hooks ask who it is
        with self._guest(), self._sessions.sparing(proven):
            refused = await authenticate(credential_in(hello, websocket))
        if refused is not None:
            raise await self._refuse(websocket, refused, who)
        if self._closed.is_set:
            raise await self._refuse(websocket, self._stopping(), who)
        its_own = self._sessions.proven(hello) or self._sessions.begun_anew(hello, who)
        refused = lets_in(who, its_own)  # before anything of its session is touched
        if refused is not None:
            raise await self._refuse(websocket, refused, who)
        try:
            return self._sessions.greet(hello, who)
        except StaleAttemptError as stale:
            error = WebSocketException(SUPERSEDED, "a newer connection has the session")
            raise await self._refuse(websocket, error, who) from stale

    def make_room(self) -> None:
        """Wait no longer for whoever has been waited for longest, if an honest client would have said hello by now."""
        mute = next(iter(self._mute), None)
        if mute is not None and monotonic() - self._mute[mute][0] >= MIN_HELLO_WAIT:
            _, thrown_out = self._mute.pop(mute)
            thrown_out()
            mute.set()

    async def hello(self, websocket: WebSocket, thrown_out: Callable[[], None] = lambda: None) -> Hello:
        """Wait for the hello of an accepted client.

        Args:
            websocket: Its WebSocket.
            thrown_out: Called, without waiting, when it is waited for no longer because room is needed.

        Raises:
            WebSocketException: None came in time, or none that is good. It is closed already.
        """
        with self._guest():
            return await self._hello(websocket, thrown_out)

    @contextmanager
    def _guest(self) -> Iterator[None]:
        guest = LazyEvent()
        self._guests.add(guest.future)
        try:
            yield
        finally:
            self._guests.discard(guest.future)
            guest.set()

    async def _hello(self, websocket: WebSocket, thrown_out: Callable[[], None]) -> Hello:
        waiting = self._tasks.spawn(websocket.receive(), name="ws-hello")
        mute = LazyEvent()
        self._mute[mute] = monotonic(), thrown_out
        try:
            await wait_for_first([waiting, self._closed.future, mute.future], self._timeout)
        finally:
            self._mute.pop(mute, None)
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
        how = self._refusing.tell(websocket, error, self._address_of(websocket), client_id)
        return await self._refusing.close(websocket, how.code, how.text)


def credential_in(hello: Hello, websocket: WebSocket) -> str | None:
    """The credential of a client: in its hello, else among its subprotocols."""
    if hello.auth is not None:
        return hello.auth
    return offered_credential(websocket.scope.get("subprotocols") or ())
