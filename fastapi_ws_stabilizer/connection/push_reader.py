"""Reader of a connection whose server passes on each message as it arrives. It needs no task."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.connection.pump import (
    begin_pause,
    close_on_disconnect_event,
    drop_unread,
    end_pause,
    on_inbox_full,
    resume,
)
from fastapi_ws_stabilizer.wire.v1.frames import Message

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection


class PushReader(abc.ABC):
    """Reader that the server's protocol object calls from the event loop.

    When the inbox is full, the transport stops reading and TCP slows the client down.
    """

    __slots__ = ("_connection", "_reads", "_since", "_timer")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._reads = 0
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @abc.abstractmethod
    def _pause_reading(self) -> None:
        """Stop reading from the network."""

    @abc.abstractmethod
    def _resume_reading(self) -> None:
        """Continue to read."""

    def message_received(self, message: str | bytes) -> None:
        """Handle a received message. Hot path."""
        connection = self._connection
        try:  # inline, because a wrapper call would cost more for each message
            if connection.close_info is not None:
                if not connection.protocol.acknowledges:  # else the client still has it, since it is not acknowledged
                    connection.events.counters.messages_discarded += 1
                return
            connection.liveness.on_frame(monotonic())
            item = connection.protocol.decode(connection, message)
            if item is None:
                return
            inbox = connection.inbox
            full = bool(inbox.held_bytes) and inbox.full and not drop_unread(connection)
            if full and on_inbox_full(connection) and item is message:
                connection.events.counters.messages_discarded += 1
                return
            inbox.put(item, item.size if isinstance(item, Message) else None)
            if full and connection.pause is None and connection.close_info is None:
                self._pause()
                if connection.resources.watches_input:
                    connection.on_message()  # reading has stopped, so no later message would find the limit exceeded
        except Exception as error:
            self._report_bug(error)

    def connection_lost(self, event: Mapping[str, Any]) -> None:
        """Start teardown after the server has lost the connection."""
        self._stop_timer()
        try:
            self._connection.stop_sending()  # also if it was already closing and still flushing
            close_on_disconnect_event(self._connection, event)
        except Exception as error:
            self._report_bug(error)

    def stop(self) -> None:
        """Stop reading at the end of the teardown."""
        self._stop_timer()

    def _report_bug(self, error: Exception) -> None:
        """Report a bug in this package. Otherwise the server would close the connection without a report."""
        self._connection.events.emit_exception("internal_task_failed", error, task="ws-reader")
        self._connection.on_connection_lost(error)

    # ── a full inbox ──

    def _pause(self) -> None:
        connection = self._connection
        begin_pause(connection)
        self._pause_reading()
        self._reads, self._since = connection.inbox.reads, monotonic()
        connection.inbox.notify_when_room(self._resume)
        self._watch(connection.config.inbox_pause_timeout)

    def _resume(self) -> None:
        self._stop_timer()
        resume(self._connection)
        self._resume_reading()

    def _watch(self, delay: float) -> None:
        # Reading can resume and pause again in endpoint code. A cancelled timer would hold that code's context.
        context = self._connection.outbox.limits.context
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
