"""Reader of a connection whose server passes on each message as it arrives, which needs no task."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.compat.uvicorn import PushedEvents, push_events
from fastapi_ws_stabilizer.connection.pump import (
    Pumped,
    begin_pause,
    close_on_disconnect_event,
    decode,
    drop_unread,
    end_pause,
    on_inbox_full,
)
from fastapi_ws_stabilizer.wire.v1.frames import Message


class PushReader:
    """The `EventReceiver` of one connection. The server's protocol object calls it from the event loop.

    When the inbox is full, the transport stops reading and TCP slows the client down. Messages that were parsed along
    with the one that filled the inbox are still accepted. Their size is at most one read of the server.

    Args:
        connection: The connection.
        protocol: The server's protocol object.
    """

    __slots__ = ("_connection", "_events", "_reads", "_since", "_timer", "_transport")

    def __init__(self, connection: Pumped, protocol: Any) -> None:
        self._connection = connection
        self._transport: asyncio.Transport = protocol.transport
        self._reads = 0
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._events: PushedEvents = push_events(protocol, self)

    def message_received(self, message: str | bytes) -> None:
        """Handle a received message. Hot path."""
        connection = self._connection
        try:  # inline, because a wrapper call would cost more for each message
            if connection.close_info is not None:
                connection.events.counters.messages_discarded += 1
                return
            connection.liveness.on_frame(monotonic())
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
            connection.events.emit_exception("internal_task_failed", error, task="ws-reader")
            connection.on_connection_lost(error)

    def connection_lost(self, event: Mapping[str, Any]) -> None:
        """Start teardown after the server has lost the connection. A closing connection finds out when it sends."""
        self._stop_timer()
        connection = self._connection
        try:
            if connection.close_info is None:
                close_on_disconnect_event(connection, event)
        except Exception as error:
            connection.events.emit_exception("internal_task_failed", error, task="ws-reader")
            connection.on_connection_lost(error)

    def stop(self) -> None:
        """Ignore all further events, because the teardown has ended."""
        self._stop_timer()
        self._events.stop()

    # ── a full inbox ──

    def _pause(self) -> None:
        connection = self._connection
        begin_pause(connection)
        self._transport.pause_reading()
        self._reads, self._since = connection.inbox.reads, monotonic()
        connection.inbox.notify_when_room(self._resume)
        self._watch(connection.config.inbox_pause_timeout)

    def _resume(self) -> None:
        self._stop_timer()
        self._connection.pause = None
        self._connection.liveness.on_frame(monotonic())  # the pause must not count as silence
        self._transport.resume_reading()

    def _watch(self, delay: float) -> None:
        # Reading can resume and pause again in endpoint code. A cancelled timer would hold that code's context.
        context = self._connection.outbox._limits.context
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
