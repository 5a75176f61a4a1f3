"""What an application waits for from one client: answers to its requests, and acknowledgements."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from typing import Any, Final

from fastapi_ws_stabilizer.close_codes import CloseInfo
from fastapi_ws_stabilizer.errors import RequestError, SessionEndedError

MAX_OPEN: Final = 1024
"""Most requests to one client that wait for their answers at the same time."""


class PendingRequests:
    """The open requests and awaited acknowledgements of one session. They survive a reconnect, as the session does."""

    __slots__ = ("_acknowledged", "_acks", "_closed", "_ids", "_open", "_prefix")

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Future[Any]] | None = None
        self._acks: dict[int, asyncio.Future[None]] | None = None
        self._acknowledged = 0
        self._closed: CloseInfo | None = None
        self._prefix = ""
        self._ids: itertools.count[int] | None = None

    def open(self) -> tuple[str, asyncio.Future[Any]]:
        """Open a request: the id to send with it, and the future of its answer.

        Raises:
            RequestError: Too many are open.
            SessionEndedError: The session is over.
        """
        if self._closed is not None:
            raise SessionEndedError(self._closed)
        if self._open is None or self._ids is None:
            # Random: an answer that comes late, from another session, must not be taken for that of another question.
            self._open, self._ids, self._prefix = {}, itertools.count(1), f"{secrets.token_hex(6)}-"
        if len(self._open) >= MAX_OPEN:
            raise RequestError("too_many", f"{MAX_OPEN} requests to this client wait for an answer already")
        request_id = f"{self._prefix}{next(self._ids)}"
        future = self._open[request_id] = asyncio.get_running_loop().create_future()
        return request_id, future

    def forget(self, request_id: str) -> None:
        """Nobody waits for an answer any more."""
        if self._open is not None:
            self._open.pop(request_id, None)

    def resolve(self, request_id: str, data: Any, error: Any) -> bool:
        """An answer has come. One that nobody waits for, or that came twice, is ignored: `False`."""
        future = None if self._open is None else self._open.pop(request_id, None)
        if future is None or future.done():
            return False
        if error is None:
            future.set_result(data)
            return True
        settled = error if isinstance(error, dict) else {}
        future.set_exception(
            RequestError(str(settled.get("code", "error"))[:64], str(settled.get("message", ""))[:1024])
        )
        return True

    async def until_acknowledged(self, seq: int) -> None:
        """Wait until the client has acknowledged everything up to a number. Cancelling is safe.

        Raises:
            RequestError: Too many wait already; or the client came back too late, and will not get it (`missed`).
            SessionEndedError: The session ended before.
        """
        if seq <= self._acknowledged:
            return
        if self._closed is not None:
            raise SessionEndedError(self._closed)
        if self._acks is None:
            self._acks = {}
        if len(self._acks) >= MAX_OPEN:
            raise RequestError("too_many", f"{MAX_OPEN} senders wait for this client's acknowledgement already")
        future = self._acks[seq] = asyncio.get_running_loop().create_future()
        try:
            await future
        finally:
            if self._acks is not None:
                self._acks.pop(seq, None)

    def acknowledged(self, seq: int) -> None:
        """The client has acknowledged everything up to a number."""
        self._acknowledged = max(self._acknowledged, seq)
        if not self._acks:
            return
        for waiting in [number for number in self._acks or () if number <= seq]:
            future = self._acks[waiting] if self._acks else None
            if future is not None and not future.done():
                future.set_result(None)

    def fail_after_gap(self, seq: int) -> None:
        """The client has got everything up to a number, and will not get what was sent after it until now."""
        self.acknowledged(seq)
        self._acknowledged = seq  # also where that is less than before: a store that went back in time counts anew
        for future in (self._acks or {}).values():
            if not future.done():
                future.set_exception(RequestError("missed", "the client came back too late for this message"))
                future.exception()  # whoever waits gets it; nobody has to

    def fail_all(self, how: CloseInfo) -> None:
        """The session is over: nothing will come."""
        self._closed = how
        waiting = [*(self._open or {}).values(), *(self._acks or {}).values()]
        self._open = self._acks = None
        for future in waiting:
            if not future.done():
                future.set_exception(SessionEndedError(how))
                future.exception()  # whoever waits gets it; nobody has to
