"""Unanswered requests of a client."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi_ws_stabilizer.client.errors import ClientError, SessionLostError
from fastapi_ws_stabilizer.client.send_buffer import PendingMessage
from fastapi_ws_stabilizer.wire.v1.frames import request_error


class PendingRequests:
    """Requests that wait for an answer, on this or a later connection of the same session."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[asyncio.Future[Any], PendingMessage]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request_id: str, message: PendingMessage) -> asyncio.Future[Any]:
        """Add a request, and return the future of its answer. It fails if the message fails."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[request_id] = future, message
        _fail_with(message, future)
        return future

    def forget(self, request_id: str) -> None:
        """Remove a request that is no longer awaited."""
        self._open.pop(request_id, None)

    def answered(self, request_id: str, data: Any, error: Any) -> None:
        """Resolve a request. An answer to an unknown request is ignored."""
        future, message = self._open.pop(request_id, (None, None))
        if message is not None:
            message.accept()  # the acknowledgement may never arrive
        if future is None or future.done():
            return
        if error is None:
            future.set_result(data)
        else:
            _fail(future, request_error(error))

    def session_lost(self, *, replay: bool) -> list[PendingMessage]:
        """Fail the requests that the lost session had accepted, because it will never answer them.

        Args:
            replay: Whether the client asks again in the new session instead.

        Returns:
            The messages to send again, in their order.
        """
        waiting = [(future, message) for future, message in self._open.values() if not future.done()]
        accepted = [(future, message) for future, message in waiting if message.is_accepted]
        if not replay:
            for future, _ in accepted:
                _fail(future, SessionLostError())
            return []
        for future, message in accepted:
            message.renew()
            _fail_with(message, future)
        return [message for _, message in accepted]

    def close(self, error: ClientError) -> None:
        """Fail all requests, because the client is closed."""
        for future, _ in self._open.values():
            _fail(future, error)
        self._open.clear()


def _fail_with(message: PendingMessage, future: asyncio.Future[Any]) -> None:
    """Fail a request if its message fails. An acknowledgement is no answer."""

    def on_done(done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            _fail(future, error)

    message.done.add_done_callback(on_done)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # avoid asyncio's warning if the future is never awaited
