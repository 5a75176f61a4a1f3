"""The requests of a client that are not answered yet."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi_ws_stabilizer.client.errors import ClientError, SessionLostError
from fastapi_ws_stabilizer.client.send_buffer import PendingMessage
from fastapi_ws_stabilizer.errors import RequestError


class PendingRequests:
    """Each waits for an answer, which comes in this connection or in a later one of the same session."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[asyncio.Future[Any], PendingMessage]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request_id: str, message: PendingMessage) -> asyncio.Future[Any]:
        """A request was queued: the future of its answer. It fails if its message does."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[request_id] = future, message

        def look(done: asyncio.Future[None]) -> None:
            error = None if done.cancelled() else done.exception()
            if error is not None:  # that it was accepted is no answer yet
                _fail(future, error)

        message.done.add_done_callback(look)
        return future

    def forget(self, request_id: str) -> None:
        """Nobody waits any more."""
        self._open.pop(request_id, None)

    def answered(self, request_id: str, data: Any, error: Any) -> None:
        """An answer has come. One that nobody waits for is ignored."""
        future, message = self._open.pop(request_id, (None, None))
        if message is not None:
            message.accept()  # the acknowledgement may never come
        if future is None or future.done():
            return
        if error is None:
            future.set_result(data)
        else:
            told = error if isinstance(error, dict) else {}
            _fail(future, RequestError(str(told.get("code", "error"))[:64], str(told.get("message", ""))[:1024]))

    def session_lost(self) -> None:
        """What was accepted in the session that is gone will never be answered."""
        for future, message in self._open.values():
            if message.done.done():
                _fail(future, SessionLostError())

    def give_up(self, error: ClientError) -> None:
        """No answer will come."""
        for future, _ in self._open.values():
            _fail(future, error)
        self._open.clear()


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever waits gets it; nobody has to
