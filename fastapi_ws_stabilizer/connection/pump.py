"""Read pump: one task per connection that always reads, regardless of what user code is doing.

It handles pongs, pings and the disconnect, so a connection with a busy or idle endpoint does not appear dead, and its
close is always detected. Everything else goes to the inbox.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final, Protocol

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, remote_close
from fastapi_ws_stabilizer.config import InboxOverflow, WebSocketConfig
from fastapi_ws_stabilizer.connection.asgi_outbox import AsgiOutbox
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry, parse_renewal
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.inbox import Inbox, Item, Pause
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.connection.server_transport import ServerTransport
from fastapi_ws_stabilizer.connection.v1_protocol import V1Protocol
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.text_ping import MAX_CONTROL_CHARS, TextPing, parse_text_ping
from fastapi_ws_stabilizer.wire.v1.frames import Message

_POLL_INTERVAL: Final = 0.5
"""Seconds between two checks of a transport while reading is paused."""

ADVICE: Final = (
    "read them (async for message in ws, or ws.run()), or call ws.ignore_messages() if the endpoint only sends"
)
"""Advice in log events about unread messages."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Pumped(Protocol):
    """Connection as the read pump uses it."""

    config: WebSocketConfig
    events: EventBus
    liveness: Liveness
    inbox: Inbox
    server_transport: ServerTransport
    control_frames: bool
    protocol: V1Protocol | None
    pause: Pause | None
    opened_at: float
    outbox: AsgiOutbox | DirectOutbox
    pause_reported: bool
    used: bool
    watches_input: bool
    close_info: CloseInfo | None

    def answer(self, frame: EncodedMessage) -> None:
        """Send a control frame ahead of queued messages."""

    def close(self, cause: DisconnectReason, *, code: int | None = None, reason: str | None = None) -> bool:
        """Close the connection from the server's side."""

    def on_peer_close(self, close_info: CloseInfo) -> None:
        """Start teardown after the client, the network or the ASGI server has closed the connection."""

    def on_connection_lost(self, error: BaseException) -> None:
        """Start teardown after the network was lost."""

    credential: CredentialExpiry | None

    def on_message(self) -> None:
        """Report a received message to the memory budget."""

    def on_nonzero(self) -> None:
        """Report that memory is held now, where possibly none was before."""

    def on_control_frame(self) -> None:
        """Count an unsolicited control frame of the client. Too many close the connection."""

    def admit_message(self, raw: str | bytes, message: Message | None = None) -> bool:
        """Return whether the client may send a message now. If not, send an error frame or close the connection."""

    def stop_sending(self) -> None:
        """Stop sending, without a close frame."""

    def emit(self, event: str, level: int, **fields: Any) -> None:
        """Emit an event about this connection."""


async def read_pump(connection: Pumped, receive: Receive) -> None:
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


def _handle_message(connection: Pumped, event: Mapping[str, Any]) -> bool:
    """Handle a received message. Return `False` if the inbox was already full."""
    connection.liveness.on_frame(monotonic())
    text: str | None = event.get("text")
    message: str | bytes = (event.get("bytes") or b"") if text is None else text
    item = decode(connection, message)
    if item is None:
        return True
    inbox = connection.inbox
    full = bool(inbox.held_bytes) and inbox.full and not connection.server_transport.closing
    if isinstance(item, Message):  # it is numbered and accepted, so it must be in the inbox
        inbox.put(item, item.size)
    elif not full:
        inbox.put(message)
    return not full


def decode(connection: Pumped, message: str | bytes) -> Item | None:
    """Return the message for user code; `None` if it was handled here and is not for user code.

    Hot path: this runs for every message. It checks a text's length and first character before it parses anything.
    """
    if connection.protocol is not None:
        return None if _is_too_big(connection, message) else connection.protocol.receive(message)
    if (
        isinstance(message, str)
        and len(message) <= MAX_CONTROL_CHARS
        and connection.control_frames
        and (control := parse_text_ping(message)) is not None
    ):
        if isinstance(control, TextPing):
            connection.on_control_frame()
            connection.answer(control.answer)
        elif not connection.liveness.on_pong(monotonic()):
            connection.on_control_frame()
        return None
    # Nearly all messages are far below the limit, and a call for each would cost more than this check.
    if 4 * len(message) > connection.config.max_message_size and _is_too_big(connection, message):
        return None
    credential = connection.credential
    if credential is not None and (token := parse_renewal(message)) is not None:
        connection.on_control_frame()
        credential.renewal_requested(token)
        return None
    watches = connection.watches_input
    if watches and not connection.admit_message(message):
        return None
    connection.events.counters.messages_received += 1
    connection.used = True
    if watches:
        connection.on_message()
    return message


def _is_too_big(connection: Pumped, message: str | bytes) -> bool:
    """Return whether a message exceeds `max_message_size`. If so, close the connection."""
    max_size = connection.config.max_message_size
    if len(message) > max_size or (
        4 * len(message) > max_size
        and isinstance(message, str)
        and not message.isascii()
        and len(message.encode("utf-8", "surrogatepass")) > max_size
    ):
        connection.close(DisconnectReason.MESSAGE_TOO_BIG, reason=f"message over {max_size} bytes")
        return True
    return False


def close_on_disconnect_event(connection: Pumped, event: Mapping[str, Any]) -> None:
    """Start teardown for an ASGI `websocket.disconnect` event."""
    close_frame = connection.server_transport.saw_close_frame(event)
    connection.on_peer_close(remote_close(event.get("code") or 1005, event.get("reason"), close_frame=close_frame))


def on_inbox_full(connection: Pumped) -> bool:
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


def drop_unread(connection: Pumped) -> bool:
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


def _drop(connection: Pumped) -> None:
    """Drop the oldest messages, now and whenever the inbox is full, until one is read. Each of them is counted."""
    inbox = connection.inbox
    if not inbox.drops:
        connection.emit("messages_not_read", logging.WARNING, advice=ADVICE)
        inbox.drop_when_full()
        reject_requests(connection)
    inbox.reads = 0
    for item in inbox.drop_oldest():
        connection.events.counters.messages_discarded += 1
        if connection.protocol is not None and isinstance(item, Message):
            connection.protocol.on_dropped(item)


def drop_without_reader(connection: Pumped) -> None:
    """Drop messages instead of pausing from now on, unless the endpoint reads. No effect on a closing connection."""
    if connection.close_info is not None:
        return
    connection.inbox.drop_when_full()
    reject_requests(connection)
    if connection.inbox.full and not drop_unread(connection) and connection.pause is not None:
        on_inbox_full(connection)


def reject_requests(connection: Pumped) -> None:
    """Answer the requests in the inbox with an error, if the endpoint declared not to read and does not read."""
    protocol = connection.protocol
    if protocol is None or connection.close_info is not None or not connection.inbox.ignored:
        return
    for request in connection.inbox.take_requests():
        connection.events.counters.messages_discarded += 1
        protocol.on_dropped(request)


def begin_pause(connection: Pumped) -> None:
    """Record that reading is paused, and from now on whether the endpoint sends anything."""
    connection.pause = Pause()


def end_pause(connection: Pumped) -> None:
    """Handle a full inbox from which nothing was read for `inbox_pause_timeout`.

    If the endpoint of a plain client has sent something during the pause, it is running, so only messages are dropped.
    The same holds if the endpoint declared not to read. Otherwise the endpoint hangs, and the connection is closed.

    A `stabilizer.v1.json` connection is also closed if its endpoint sends. Its messages are numbered and accepted, and
    the client does not send them again. Therefore they stay in the inbox for the session's next connection.
    """
    sends = connection.protocol is None and connection.pause is not None and connection.pause.sent
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

    def __init__(self, connection: Pumped, event: Mapping[str, Any]) -> None:
        text: str | None = event.get("text")
        self._message: str | bytes = (event.get("bytes") or b"") if text is None else text
        self._connection = connection
        self.delivered = False

    def __call__(self) -> None:
        connection = self._connection
        if self.delivered:
            return
        self.delivered = True
        if connection.protocol is not None:  # it is already in the inbox
            return
        close_info = connection.close_info
        if close_info is not None and not close_info.policy.deliver:
            connection.events.counters.messages_discarded += 1
        else:
            connection.inbox.put(self._message)
            connection.on_nonzero()


async def _enqueue_when_room(connection: Pumped, event: Mapping[str, Any]) -> None:
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
        connection.pause = None
        connection.liveness.on_frame(monotonic())
    pending()
