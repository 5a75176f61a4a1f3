"""Reader of a connection with a direct transport, which replaces the read pump and needs no task."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.push_reader import PushReader
from fastapi_ws_stabilizer.servers.direct import DirectTransport

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection

VIOLATION_GRACE: Final = 1.0
"""Maximum seconds in which the endpoint can read and answer the messages that came before a protocol violation."""


class _PendingFailure:
    """Failure of a connection that waits until the endpoint has read all messages, for `VIOLATION_GRACE` at most.

    The inbox calls it after each read, and when it closes.
    """

    __slots__ = ("_connection", "_fail", "_timer")

    def __init__(self, connection: Connection, fail: Callable[[], None], context: contextvars.Context) -> None:
        self._connection = connection
        self._fail: Callable[[], None] | None = fail
        self._timer = asyncio.get_running_loop().call_later(VIOLATION_GRACE, self._fail_now, context=context)
        connection.inbox.notify_when_room(self)

    def __call__(self) -> None:
        if self._fail is None:
            return
        connection = self._connection
        if len(connection.inbox) and connection.close_info is None:
            connection.inbox.notify_when_room(self)
        else:  # not at once, because the reader has not answered the last message yet
            self._timer.cancel()
            asyncio.get_running_loop().call_soon(self._fail_now)

    def _fail_now(self) -> None:
        fail, self._fail = self._fail, None
        if fail is not None:
            fail()


class DirectReader(PushReader):
    """The `DirectReceiver` of one connection."""

    __slots__ = ("_direct", "_outbox")

    def __init__(self, connection: Connection, direct: DirectTransport, outbox: DirectOutbox) -> None:
        super().__init__(connection)
        self._direct = direct
        self._outbox = outbox

    def data_received(self) -> bool:
        """Note received bytes, possibly only a part of a message. Return whether the connection is still open."""
        self._connection.liveness.last_seen = monotonic()  # only a whole frame clears `awaiting_since`
        return self._connection.close_info is None

    def ping_received(self) -> None:
        """Handle a received ping frame."""
        self._connection.liveness.awaiting_since = None
        self._connection.on_control_frame()

    def pong_received(self, payload: bytes) -> None:
        """Handle a received pong frame."""
        liveness = self._connection.liveness
        liveness.awaiting_since = None
        if self._outbox.pong_received(payload):
            return
        asked_at = liveness.answered_ping(payload)
        if asked_at is not None:  # a client may answer only the last of several pings (RFC 6455 section 5.5.3)
            self._outbox.heartbeat_answered(asked_at)
        if unsolicited := liveness.on_pong_frame(payload, monotonic()):
            self._connection.on_control_frame(unsolicited)

    def violation_received(self, fail: Callable[[], None]) -> None:
        """Call `fail` once the endpoint has read all messages, at the latest after `VIOLATION_GRACE` seconds."""
        connection = self._connection
        if len(connection.inbox) and connection.inbox.has_reader and connection.close_info is None:
            _PendingFailure(connection, fail, self._outbox.limits.context)
        else:
            fail()

    def pause_writing(self) -> None:
        """Pause writing because the transport's buffer is above its high-water mark."""
        self._outbox.pause_writing()

    def resume_writing(self) -> None:
        """Resume writing."""
        self._outbox.resume_writing()

    def before_shutdown(self) -> None:
        """Flush the outbox before the server closes the connection."""
        self._outbox.on_flush_due()

    def _pause_reading(self) -> None:
        self._direct.pause_reading()
        self._outbox.on_reading_paused()

    def _resume_reading(self) -> None:
        self._direct.resume_reading()
