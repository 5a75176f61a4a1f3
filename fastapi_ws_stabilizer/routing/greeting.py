"""The first exchange with a `stabilizer.v1.json` client: its hello, its credential, its session."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import WebSocket, WebSocketException
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.close_codes import SUPERSEDED, DisconnectReason, Ending, cut_reason, ending
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.reports import Reports
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import Greeting, Sessions, StaleDialError
from fastapi_ws_stabilizer.tasks import Latch, TaskSet, wait_for_all, wait_for_first
from fastapi_ws_stabilizer.wire.v1 import BadFrameError, Hello, hello_of, offered_credential


class Reception:
    """Takes hellos. Until one was good, nothing is kept of a client but the WebSocket itself.

    Args:
        config: How long a client has.
        reports: Where refusals are told.
        sessions: Where its session is found or made.
    """

    def __init__(self, config: WebSocketConfig, reports: Reports, sessions: Sessions) -> None:
        self._timeout = config.hello_timeout
        self._reports = reports
        self._sessions = sessions
        self._tasks = TaskSet(lambda _, __: None)  # whoever dials and vanishes is no failure of ours
        self._closed = Latch()
        self._guests: set[asyncio.Future[None]] = set()

    @property
    def guests(self) -> list[asyncio.Future[None]]:
        """A future for each client that has no session yet: it is done when the client has one, or is refused."""
        return list(self._guests)

    def reopen(self) -> None:
        """Take clients again."""
        if self._closed.is_set:
            self._closed = Latch()

    def close(self) -> None:
        """Refuse everybody from now on, those included who are being greeted."""
        self._closed.set()

    async def greet(
        self,
        websocket: WebSocket,
        whose: Callable[[Session | None], str],
        authenticate: Callable[[str | None], Awaitable[Ending | None]],
        lets_in: Callable[[str, Session | None], bool],
    ) -> Greeting:
        """Wait for the hello of an accepted client and give it its session.

        Args:
            websocket: Its WebSocket, accepted.
            whose: Says who it is, given the session that it proves to have.
            authenticate: Looks at its credential, and says how the connection ends if it is not good.
            lets_in: Whether that client may come now, with that session.

        Returns:
            What it gets.

        Raises:
            WebSocketException: It was refused, or is gone. It is closed already.
        """
        guest = Latch()
        self._guests.add(guest.future)
        try:
            return await self._greet(websocket, whose, authenticate, lets_in)
        finally:
            self._guests.discard(guest.future)
            guest.set()

    async def _greet(
        self,
        websocket: WebSocket,
        whose: Callable[[Session | None], str],
        authenticate: Callable[[str | None], Awaitable[Ending | None]],
        lets_in: Callable[[str, Session | None], bool],
    ) -> Greeting:
        hello = await self._hello(websocket)
        who = whose(self._sessions.proven(hello))  # before it is authenticated: the hooks ask who it is
        credential = hello.auth
        if credential is None:
            credential = offered_credential(websocket.scope.get("subprotocols") or ())
        refused = await authenticate(credential)
        if refused is not None:
            raise await self._refuse(websocket, refused.code, refused.text)
        if self._closed.is_set:
            raise await self._refuse_at_shutdown(websocket)
        its_own = self._sessions.proven(hello) or self._sessions.begun_anew(hello, who)
        if not lets_in(who, its_own):  # before anything of its session is touched
            raise await self._refuse(websocket, SUPERSEDED, f"client {who!r} is connected already")
        try:
            return self._sessions.greet(hello, who)
        except StaleDialError as stale:
            raise await self._refuse(websocket, SUPERSEDED, "a newer connection has the session") from stale

    async def _hello(self, websocket: WebSocket) -> Hello:
        waiting = self._tasks.spawn(websocket.receive(), name="ws-hello")
        try:
            await wait_for_first([waiting, self._closed.future], self._timeout)
        finally:
            if not waiting.done():
                waiting.cancel()
        if self._closed.is_set:
            raise await self._refuse_at_shutdown(websocket)
        if not waiting.done():
            raise await self._refuse(websocket, 4408, "no hello came")
        gone = waiting.cancelled() or waiting.exception() is not None
        message: Any = None if gone else waiting.result()
        if message is None or message["type"] != "websocket.receive":
            _leave_alone(websocket)
            raise WebSocketException(1000)
        text = message.get("text")
        try:
            return hello_of((message.get("bytes") or b"") if text is None else text)
        except BadFrameError as problem:
            raise await self._refuse(websocket, problem.code, str(problem)) from problem

    async def _refuse_at_shutdown(self, websocket: WebSocket) -> WebSocketException:
        how = ending(DisconnectReason.SERVER_SHUTDOWN)
        return await self._refuse(websocket, how.code, how.text)

    async def _refuse(self, websocket: WebSocket, code: int, reason: str) -> WebSocketException:
        """Close a client that has no session yet; the exception ends its endpoint, and nothing else."""
        self._reports.tell("hello_refused", logging.INFO, code=code, text=reason)
        closing = self._tasks.spawn(websocket.close(code, cut_reason(reason)), name="ws-refusal")
        await wait_for_all([closing], self._timeout)
        _leave_alone(websocket)
        return WebSocketException(code, reason)


def _leave_alone(websocket: WebSocket) -> None:
    """It is closed: Starlette, which closes what a `WebSocketException` ends, has nothing left to do."""

    async def nothing(_: Any) -> None:
        pass

    websocket._send = nothing
    websocket.application_state = WebSocketState.CONNECTED
