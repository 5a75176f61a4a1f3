"""Where the pump stands on other servers: takes what a server's link has read, without a task."""

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
    """The `DirectReceiver` of one connection. Called by the server's protocol, from the event loop.

    When the inbox is full the link stops reading, so TCP pushes back. What had been parsed with the message that filled
    it is taken too: that is what one read of the server holds, or a few kilobytes of it if it is compressed.
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
        """Bytes have come in, be it only a part of a message."""
        self._connection.liveness.last_seen = monotonic()  # what is owed is paid by a whole message
        return self._connection.close_info is None

    def message_received(self, message: str | bytes) -> None:
        """A message has come in. Hot path."""
        connection = self._connection
        try:  # in here, and not round a call: that would cost each message more than this does
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
        except Exception as error:  # a bug of ours, which the server would hold against the client in silence
            connection.events.emit_exception("internal_task_failed", error, task="ws-link")
            connection.on_connection_lost(error)

    def ping_received(self) -> None:
        """A ping frame has come in."""
        self._connection.liveness.awaiting_since = None
        self._connection.on_control_frame()

    def pong_received(self, payload: bytes) -> None:
        """A pong frame has come in."""
        self._connection.liveness.awaiting_since = None
        if not self._connection.liveness.ponged_by_protocol(payload, monotonic()):
            self._connection.on_control_frame()

    def connection_lost(self, event: Mapping[str, Any]) -> None:
        """The connection is over."""
        self._stop_timer()
        connection = self._connection
        try:
            close_on_disconnect_event(connection, event)
            connection.stop_sending()  # also if we were about to end it, and were still flushing
        except Exception as error:  # the server would forget to take its own end of it out of its list
            connection.events.emit_exception("internal_task_failed", error, task="ws-link")
            connection.on_connection_lost(error)

    def pause_writing(self) -> None:
        """The transport holds more than it should."""
        self._outbox.pause_writing()

    def resume_writing(self) -> None:
        """The transport takes more again."""
        self._outbox.resume_writing()

    def before_shutdown(self) -> None:
        """The server is about to close."""
        self._outbox.flush_now()

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
        self._connection.liveness.on_frame(monotonic())  # the pause was ours
        self._direct.resume_reading()

    def _watch(self, delay: float) -> None:
        # Reading may go on, and pause again, in code of the endpoint, whose context a cancelled timer would hold.
        context = self._outbox._limits.context
        self._timer = asyncio.get_running_loop().call_later(delay, self._check_reads, context=context)

    def _check_reads(self) -> None:
        """See whether anybody has read since the last look."""
        self._timer = None
        connection = self._connection
        if connection.close_info is not None:
            return
        now, timeout = monotonic(), connection.config.inbox_pause_timeout
        if connection.inbox.reads != self._reads:
            self._reads, self._since = connection.inbox.reads, now
            begin_pause(connection)
        if drop_unread(connection):  # there is room, so reading goes on
            return
        if now - self._since >= timeout:
            end_pause(connection)
        else:
            self._watch(timeout - (now - self._since))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
