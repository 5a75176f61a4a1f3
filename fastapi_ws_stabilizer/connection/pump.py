"""Read pump: one task per connection that always reads, regardless of what user code is doing.

It handles pongs, pings and the disconnect, so a connection with a busy or idle endpoint does not appear dead, and its
close is always detected. Everything else goes to the inbox.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason, remote_close
from fastapi_ws_stabilizer.config import InboxOverflow
from fastapi_ws_stabilizer.connection.inbox import Pause
from fastapi_ws_stabilizer.wire.v1.frames import Message

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection

_POLL_INTERVAL: Final = 0.5
"""Seconds between two checks of a transport while reading is paused."""

ADVICE: Final = (
    "read them (async for message in ws, or ws.run()), or call ws.ignore_messages() if the endpoint only sends"
)
"""Advice in log events about unread messages."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def read_pump(connection: Connection, receive: Receive) -> None:
    """Read until the connection is closing.

    Every idle connection holds this coroutine's frame, so all other code is in other functions.
    """
    while connection.close_info is None:
        try:
            event = await receive()
        except Exception as error:  # a server or test client that closes its stream without a disconnect event
            connection.on_connection_lost(error)
            return
        try:
            if event["type"] != "websocket.receive":
                connection.stop_sending()
                close_on_disconnect_event(connection, event)
                return
            if not _handle_message(connection, event):
                await _enqueue_when_room(connection, event)
        except Exception as error:  # a bug in this package; nothing awaits this task, so it reports the bug itself
            connection.events.emit_exception("internal_task_failed", error, task="ws-pump")
            connection.on_connection_lost(error)
        del event  # otherwise the last message stays in memory until the next one arrives


def _handle_message(connection: Connection, event: Mapping[str, Any]) -> bool:
    """Handle a received message. Return `False` if the inbox was already full."""
    liveness = connection.liveness
    liveness.last_seen = monotonic()
    liveness.awaiting_since = None
    text: str | None = event.get("text")
    message: str | bytes = (event.get("bytes") or b"") if text is None else text
    item = connection.protocol.decode(connection, message)
    if item is None:
        return True
    inbox = connection.inbox
    full = bool(inbox.held_bytes) and inbox.full and not connection.server_transport.closing
    if isinstance(item, Message):  # it is numbered and accepted, so it must be in the inbox
        inbox.put(item, item.size)
    elif not full:
        inbox.put(message)
    return not full


def close_on_disconnect_event(connection: Connection, event: Mapping[str, Any]) -> None:
    """Start teardown for an ASGI `websocket.disconnect` event.

    If very many connections are lost at once, the event is handled in a later iteration of the event loop.
    """
    if connection.close_info is None:
        connection.resources.closings.run(_close_as_reported, connection, event)


def _close_as_reported(connection: Connection, event: Mapping[str, Any]) -> None:
    try:
        close_frame = connection.server_transport.saw_close_frame(event)
        close_info = remote_close(event.get("code") or 1005, event.get("reason"), close_frame=close_frame)
    except Exception as error:  # an event that has waited has no caller that would end the connection
        connection.events.emit_exception("internal_task_failed", error, task="ws-pump")
        connection.on_connection_lost(error)
    else:
        connection.on_peer_close(close_info)


def on_inbox_full(connection: Connection) -> bool:
    """Apply `inbox_overflow`: close the connection, or log once that reading is paused.

    While it is not known whether the endpoint reads, this does nothing, and `drop_without_reader` calls it again.

    Returns:
        Whether the connection was closed.
    """
    if connection.inbox.undecided:
        return False
    if connection.config.inbox_overflow is InboxOverflow.CLOSE:
        connection.close(DisconnectReason.POLICY, code=1013, reason="inbox full")
        return True
    if not connection.pause_reported:
        connection.pause_reported = True
        connection.emit("reading_paused", logging.WARNING, waiting_messages=len(connection.inbox), advice=ADVICE)
    return False


def drop_unread(connection: Connection) -> bool:
    """Drop the oldest messages of a full inbox if the endpoint does not read. Return whether this was done.

    An endpoint does not read if it declared so, or if it has read nothing for `inbox_pause_timeout` since the
    connection was opened. Such an endpoint only sends, and its client has done nothing wrong. If the endpoint has read
    a message since messages were last dropped, or is about to, this does nothing. The client then waits until the
    endpoint reads again.
    """
    inbox = connection.inbox
    waits = not inbox.drops and monotonic() - connection.opened_at < connection.config.inbox_pause_timeout
    if inbox.has_reader or waits:
        return False
    _drop(connection)
    return True


def _drop(connection: Connection) -> None:
    """Drop the oldest messages, now and whenever the inbox is full, until one is read. Each of them is counted."""
    inbox = connection.inbox
    if not inbox.drops:
        connection.emit("messages_not_read", logging.WARNING, advice=ADVICE)
        inbox.drop_when_full()
        reject_requests(connection)
    inbox.reads = 0
    for item in inbox.drop_oldest():
        connection.events.counters.messages_discarded += 1
        connection.protocol.on_not_read(connection, item)


def drop_without_reader(connection: Connection) -> None:
    """Drop messages instead of pausing from now on, unless the endpoint reads. No effect on a closing connection."""
    if connection.close_info is not None:
        return
    connection.inbox.drop_when_full()
    reject_requests(connection)
    if connection.inbox.full and not drop_unread(connection) and connection.pause is not None:
        on_inbox_full(connection)


def reject_requests(connection: Connection) -> None:
    """Answer the requests in the inbox with an error, if the endpoint declared not to read and does not read."""
    if connection.close_info is not None or not connection.inbox.ignored:
        return
    for request in connection.inbox.take_requests():
        connection.events.counters.messages_discarded += 1
        connection.protocol.on_not_read(connection, request)


def begin_pause(connection: Connection) -> None:
    """Record that reading is paused, and from now on whether the endpoint sends anything."""
    connection.pause = Pause()
    connection.server_transport.stop_keepalive()


def resume(connection: Connection) -> None:
    """Record that reading continues. The pause does not count as silence of the client."""
    connection.pause = None
    connection.liveness.on_frame(monotonic())
    if connection.close_info is None and not connection.server_transport.closing:
        connection.server_transport.start_keepalive()


def end_pause(connection: Connection) -> None:
    """Handle a full inbox from which nothing was read for `inbox_pause_timeout`.

    If the endpoint of a plain client has sent something during the pause, it is running, so only messages are dropped.
    The same holds if the endpoint declared not to read. Otherwise the endpoint hangs, and the connection is closed.

    A `stabilizer.v1.json` connection is also closed if its endpoint sends. Its messages are numbered and accepted, and
    the client does not send them again. Therefore they stay in the inbox for the session's next connection.
    """
    sends = not connection.protocol.acknowledges and connection.pause is not None and connection.pause.sent
    if connection.inbox.drops or sends:
        _drop(connection)
    else:
        connection.close(DisconnectReason.POLICY, code=1013, reason="messages are not read")


class _PendingMessage:
    """Message that was received while the inbox was full. It waits until there is room or the connection closes.

    The inbox calls this object, so that the message is delivered or counted before a close cancels the pump.

    Attributes:
        delivered: Whether the message was delivered or counted as discarded.
    """

    def __init__(self, connection: Connection, event: Mapping[str, Any]) -> None:
        text: str | None = event.get("text")
        self._message: str | bytes = (event.get("bytes") or b"") if text is None else text
        self._connection = connection
        self.delivered = False

    def __call__(self) -> None:
        connection = self._connection
        if self.delivered:
            return
        self.delivered = True
        if connection.protocol.acknowledges:  # it is already in the inbox
            return
        close_info = connection.close_info
        if close_info is not None and not close_info.policy.deliver:
            connection.events.counters.messages_discarded += 1
        else:
            connection.inbox.put(self._message)
            connection.on_nonzero()


async def _enqueue_when_room(connection: Connection, event: Mapping[str, Any]) -> None:
    """Wait for room and deliver a message, or close the connection.

    While reading is paused, ASGI cannot report that the client has left. Therefore the wait checks the transport every
    0.5 s. If the server is closing it, reading continues even without room, because little is left to read and the
    disconnect event follows. If nothing is read for `inbox_pause_timeout`, `end_pause` decides.
    """
    pending = _PendingMessage(connection, event)
    if not drop_unread(connection) and not on_inbox_full(connection):
        begin_pause(connection)
        inbox = connection.inbox
        reads, since = inbox.reads, monotonic()
        while not (
            await inbox.wait_for_room(_POLL_INTERVAL, pending)
            or pending.delivered
            or connection.server_transport.closing
        ):
            if inbox.reads != reads:
                reads, since = inbox.reads, monotonic()
                begin_pause(connection)
            elif drop_unread(connection):
                break
            elif monotonic() - since >= connection.config.inbox_pause_timeout:
                end_pause(connection)
                break
        resume(connection)
    pending()
