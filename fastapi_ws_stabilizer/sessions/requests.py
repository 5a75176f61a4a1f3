"""Requests and acknowledgements that the application awaits from one client."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from typing import Any, Final

from fastapi_ws_stabilizer.close_codes import CloseInfo
from fastapi_ws_stabilizer.errors import RequestError, SessionEndedError
from fastapi_ws_stabilizer.wire.v1.frames import request_error

MAX_OPEN: Final = 1024
"""Maximum number of pending requests to one client, and of pending acknowledgements."""


class PendingRequests:
    """Pending requests and acknowledgements of one session. They survive a reconnect, as the session does."""

    __slots__ = ("_acknowledged", "_acks", "_closed", "_ids", "_open", "_prefix")

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Future[Any]] | None = None
        self._acks: dict[asyncio.Future[None], int] | None = None  # several may wait for one number
        self._acknowledged = 0
        self._closed: CloseInfo | None = None
        self._prefix = ""
        self._ids: itertools.count[int] | None = None

    def open(self) -> tuple[str, asyncio.Future[Any]]:
        """Open a request; return the id to send with it and the future of its answer.

        Raises:
            RequestError: Too many requests are pending.
            SessionEndedError: The session has ended.
        """
        if self._closed is not None:
            raise SessionEndedError(self._closed)
        if self._open is None or self._ids is None:
            # Random, so that a late answer from another session is not taken for the answer to this request.
            self._open, self._ids, self._prefix = {}, itertools.count(1), f"{secrets.token_hex(6)}-"
        if len(self._open) >= MAX_OPEN:
            raise RequestError("too_many", f"{MAX_OPEN} requests to this client are already pending")
        request_id = f"{self._prefix}{next(self._ids)}"
        future = self._open[request_id] = asyncio.get_running_loop().create_future()
        return request_id, future

    def forget(self, request_id: str) -> None:
        """Drop a request: its answer is not awaited any more."""
        if self._open is not None:
            self._open.pop(request_id, None)

    def resolve(self, request_id: str, data: Any, error: Any) -> bool:
        """Deliver an answer; `False` if no request awaits it, for example because it came twice."""
        future = None if self._open is None else self._open.pop(request_id, None)
        if future is None or future.done():
            return False
        if error is None:
            future.set_result(data)
            return True
        future.set_exception(request_error(error))
        return True

    async def until_acknowledged(self, seq: int) -> None:
        """Wait until the client has acknowledged all messages up to a number. Cancelling is safe.

        Raises:
            RequestError: Too many callers wait (`too_many`), or the client resumed too late and will not get the
                message (`missed`).
            SessionEndedError: The session ended before.
        """
        if seq <= self._acknowledged:
            return
        if self._closed is not None:
            raise SessionEndedError(self._closed)
        if self._acks is None:
            self._acks = {}
        if len(self._acks) >= MAX_OPEN:
            raise RequestError("too_many", f"{MAX_OPEN} senders already wait for this client's acknowledgement")
        future = asyncio.get_running_loop().create_future()
        self._acks[future] = seq
        try:
            await future
        finally:
            if self._acks is not None:
                self._acks.pop(future, None)

    def acknowledge(self, seq: int) -> None:
        """Resolve the waits for all messages up to a number."""
        self._acknowledged = max(self._acknowledged, seq)
        if not self._acks:
            return
        for future, number in self._acks.items():
            if number <= seq and not future.done():
                future.set_result(None)

    def fail_after_gap(self, seq: int) -> None:
        """Fail the waits for messages after a number, because the client will not get them."""
        self.acknowledge(seq)
        self._acknowledged = seq  # it may decrease: a store that lost messages reuses numbers
        for future in self._acks or ():
            if not future.done():
                future.set_exception(RequestError("missed", "the client resumed too late to get this message"))
                future.exception()  # mark as retrieved: a caller may have stopped waiting

    def fail_all(self, close_info: CloseInfo) -> None:
        """Fail all requests and waits, because the session has ended."""
        self._closed = close_info
        waiting = [*(self._open or {}).values(), *(self._acks or ())]
        self._open = self._acks = None
        for future in waiting:
            if not future.done():
                future.set_exception(SessionEndedError(close_info))
                future.exception()  # mark as retrieved: a caller may have stopped waiting
