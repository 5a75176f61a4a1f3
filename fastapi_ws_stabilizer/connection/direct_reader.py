"""Reader of a connection with a direct transport, which replaces the read pump and needs no task."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.pump import (
    Pumped,
    begin_pause,
    close_on_disconnect_event,
    decode,
    drop_unread,
    end_pause,
    on_inbox_full,
)
from fastapi_ws_stabilizer.servers.direct import DirectTransport
from fastapi_ws_stabilizer.wire.v1.frames import Message


class DirectReader:
    """The `DirectReceiver` of one connection. The server's protocol calls it from the event loop.

    When the inbox is full, the transport stops reading and TCP slows the client down. Messages that were parsed along
    with the one that filled the inbox are still accepted. Their size is at most one read of the server, or a few
    kilobytes of a compressed read.
    """

    __slots__ = ("_connection", "_direct", "_outbox", "_reads", "_since", "_timer")

    def __init__(self, connection: Pumped, direct: DirectTransport, outbox: DirectOutbox) -> None:
        self._connection = connection
        self._direct = direct
        self._outbox = outbox
        self._reads = 0
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def data_received(self) -> bool:
        """Note received bytes, possibly only a part of a message. Return whether the connection is still open."""
        self._connection.liveness.last_seen = monotonic()  # only a whole frame clears `awaiting_since`
        return self._connection.close_info is None

    def message_received(self, message: str | bytes) -> None:
        """Handle a received message. Hot path."""
        connection = self._connection
        try:  # inline, because a wrapper call would cost more for each message
            if connection.close_info is not None:
                connection.events.counters.messages_discarded += 1
                return
            connection.liveness.awaiting_since = None
            item = decode(connection, message)
            if item is None:
                return
            inbox = connection.inbox
            full = bool(inbox.held_bytes) and inbox.full and not drop_unread(connection)
            if full and on_inbox_full(connection) and item is message:
                connection.events.counters.messages_discarded += 1
                return
            inbox.put(item, item.size if isinstance(item, Message) else None)
            if full and connection.pause is None:
                self._pause()
        except Exception as error:  # a bug in this package; the server would close the connection without a report
            connection.events.emit_exception("internal_task_failed", error, task="ws-link")
            connection.on_connection_lost(error)

    def ping_received(self) -> None:
        """Handle a received ping frame."""
        self._connection.liveness.awaiting_since = None
        self._connection.on_control_frame()

    def pong_received(self, payload: bytes) -> None:
        """Handle a received pong frame."""
        self._connection.liveness.awaiting_since = None
        if not self._connection.liveness.on_pong_frame(payload, monotonic()):
            self._connection.on_control_frame()

    def connection_lost(self, event: Mapping[str, Any]) -> None:
        """Start teardown after the server has lost the connection."""
        self._stop_timer()
        connection = self._connection
        try:
            connection.stop_sending()  # also if the connection was already closing and still flushing
            close_on_disconnect_event(connection, event)
        except Exception as error:  # otherwise the server would not remove the connection from its own list
            connection.events.emit_exception("internal_task_failed", error, task="ws-link")
            connection.on_connection_lost(error)

    def pause_writing(self) -> None:
        """Pause writing because the transport's buffer is above its high-water mark."""
        self._outbox.pause_writing()

    def resume_writing(self) -> None:
        """Resume writing."""
        self._outbox.resume_writing()

    def before_shutdown(self) -> None:
        """Flush the outbox before the server closes the connection."""
        self._outbox.on_flush_due()

    # ── a full inbox ──

    def _pause(self) -> None:
        connection = self._connection
        begin_pause(connection)
        self._direct.pause_reading()
        self._reads, self._since = connection.inbox.reads, monotonic()
        connection.inbox.notify_when_room(self._resume)
        self._watch(connection.config.inbox_pause_timeout)

    def _resume(self) -> None:
        self._stop_timer()
        self._connection.pause = None
        self._connection.liveness.on_frame(monotonic())  # the pause must not count as silence
        self._direct.resume_reading()

    def _watch(self, delay: float) -> None:
        # Reading can resume and pause again in endpoint code. A cancelled timer would hold that code's context.
        context = self._outbox._limits.context
        self._timer = asyncio.get_running_loop().call_later(delay, self._check_reads, context=context)

    def _check_reads(self) -> None:
        """Check whether the endpoint has read since the last check."""
        self._timer = None
        connection = self._connection
        if connection.close_info is not None:
            return
        now, timeout = monotonic(), connection.config.inbox_pause_timeout
        if connection.inbox.reads != self._reads:
            self._reads, self._since = connection.inbox.reads, now
            begin_pause(connection)
        if drop_unread(connection):  # there is room, so reading continues
            return
        if now - self._since >= timeout:
            end_pause(connection)
        else:
            self._watch(timeout - (now - self._since))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
