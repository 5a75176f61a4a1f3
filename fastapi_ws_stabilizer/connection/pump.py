"""The pump: one task per connection that always reads, whatever the user's code is doing.

Pongs, pings and the disconnect are handled here, so a busy or idle endpoint neither looks dead nor fails to learn that
its client has left. Everything else goes to the inbox.
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
"""Seconds between two looks at a transport that is not read from."""

ADVICE: Final = (
    "read them (async for message in ws, or ws.run()); an endpoint that only sends calls ws.ignore_messages()"
)
"""What to do where messages are not read."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Pumped(Protocol):
    """What the pump needs of its connection."""

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
        """Send a control frame, before what is queued."""

    def close(self, reason: DisconnectReason, *, code: int | None = None, text: str | None = None) -> bool:
        """End the connection from our side."""

    def on_peer_close(self, close_info: CloseInfo) -> None:
        """The connection is gone."""

    def on_connection_lost(self, error: BaseException) -> None:
        """The connection broke."""

    credential: CredentialExpiry | None

    def on_message(self) -> None:
        """A message of its client has come."""

    def on_nonzero(self) -> None:
        """Something is held for it, where nothing may have been before."""

    def on_control_frame(self) -> None:
        """A control frame of its client has come that we have not asked for. Too many end the connection."""

    def admit_message(self, raw: str | bytes, message: Message | None = None) -> bool:
        """Whether its client may send a message now. If not, it is told so, or its connection ends."""

    def stop_sending(self) -> None:
        """Send nothing more, not even a close frame."""

    def emit(self, event: str, level: int, **fields: Any) -> None:
        """Report something about this connection."""


async def read_pump(connection: Pumped, receive: Receive) -> None:
    """Read until the connection is over.

    Every idle connection holds its frame, so everything else is elsewhere.
    """
    while connection.close_info is None:
        try:
            event = await receive()
        except Exception as error:  # a server or a test client that tears its stream down instead of saying so
            connection.on_connection_lost(error)
            return
        try:
            if not _handle_event(connection, event):
                await _enqueue_when_room(connection, event)
        except Exception as error:  # a bug of ours; nobody waits for this task, so it tells itself
            connection.events.emit_exception("internal_task_failed", error, task="ws-pump")
            connection.on_connection_lost(error)
        del event  # or the last message would be held until the next one comes


def _handle_event(connection: Pumped, event: Mapping[str, Any]) -> bool:
    """Deal with what was received; `False` if the inbox has no room for it, or for more."""
    if event["type"] != "websocket.receive":
        close_on_disconnect_event(connection, event)
        return True
    connection.liveness.on_frame(monotonic())
    text: str | None = event.get("text")
    message: str | bytes = (event.get("bytes") or b"") if text is None else text
    item = decode(connection, message)
    if item is None:
        return True
    inbox = connection.inbox
    full = bool(inbox.held_bytes) and inbox.full and not connection.server_transport.closing
    if isinstance(item, Message):  # it is numbered and accepted, so it cannot wait outside
        inbox.put(item, item.size)
    elif not full:
        inbox.put(message)
    return not full


def decode(connection: Pumped, message: str | bytes) -> Item | None:
    """What user code gets of a message; `None` if it is none for it, and has been dealt with.

    Hot path: this runs for every message. It looks at a text's length and first character before it parses anything.
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
    # Nearly all are far below the limit, and a call for each would cost more than this.
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
    """Whether a message is larger than it may be: then the connection ends."""
    max_size = connection.config.max_message_size
    if len(message) > max_size or (
        4 * len(message) > max_size
        and isinstance(message, str)
        and not message.isascii()
        and len(message.encode("utf-8", "surrogatepass")) > max_size
    ):
        connection.close(DisconnectReason.MESSAGE_TOO_BIG, text=f"message over {max_size} bytes")
        return True
    return False


def close_on_disconnect_event(connection: Pumped, event: Mapping[str, Any]) -> None:
    """End a connection as an ASGI `websocket.disconnect` says."""
    close_frame = connection.server_transport.saw_close_frame(event)
    connection.on_peer_close(remote_close(event.get("code") or 1005, event.get("reason"), close_frame=close_frame))


def on_inbox_full(connection: Pumped) -> bool:
    """End a connection whose inbox is full, if that is its policy; else say, once, that reading is paused.

    While it is not known whether the endpoint reads, neither is done: `drop_without_reader` comes back to it.
    """
    if connection.inbox.undecided:
        return False
    if connection.config.inbox_overflow is InboxOverflow.CLOSE:
        connection.close(DisconnectReason.POLICY, code=1013, text="inbox full")
        return True
    if not connection.pause_reported:
        connection.pause_reported = True
        connection.emit("reading_paused", logging.WARNING, waiting_messages=len(connection.inbox), advice=ADVICE)
    return False


def drop_unread(connection: Pumped) -> bool:
    """Make room in a full inbox whose endpoint does not read; tell whether that was done.

    An endpoint does not read if it has said so, or if it has read nothing for `inbox_pause_timeout` since the
    connection was opened: such an endpoint only sends, and its client has done nothing wrong. If the endpoint has read
    a message since messages were last dropped, or is about to, this does nothing, and the client has to wait until it
    reads on.
    """
    inbox = connection.inbox
    waits = not inbox.drops and monotonic() - connection.opened_at < connection.config.inbox_pause_timeout
    if inbox.has_reader or waits:
        return False
    _drop(connection)
    return True


def _drop(connection: Pumped) -> None:
    """Let the oldest messages go, now and whenever the inbox is full, until one is read. Each of them is counted."""
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
    """What the client sends holds up nothing from now on, unless the endpoint reads. Nothing happens after the end."""
    if connection.close_info is not None:
        return
    connection.inbox.drop_when_full()
    reject_requests(connection)
    if connection.inbox.full and not drop_unread(connection) and connection.pause is not None:
        on_inbox_full(connection)


def reject_requests(connection: Pumped) -> None:
    """Answer the requests in the inbox of an endpoint that has said that it does not read, unless it reads."""
    protocol = connection.protocol
    if protocol is None or connection.close_info is not None or not connection.inbox.ignored:
        return
    for request in connection.inbox.take_requests():
        connection.events.counters.messages_discarded += 1
        protocol.on_dropped(request)


def begin_pause(connection: Pumped) -> None:
    """The inbox is full, and reading pauses. From here on it is noted whether the endpoint sends anything."""
    connection.pause = Pause()


def end_pause(connection: Pumped) -> None:
    """Nothing of a full inbox has been read for `inbox_pause_timeout`.

    Where the endpoint has sent something meanwhile, or waits for the end, it is well, and only what its client sends
    goes unread. Else the endpoint hangs, and the connection ends. It ends in any case where messages are numbered and
    the endpoint has not said that it does not read: their client knows that they were accepted and sends them no more,
    so they are kept for its next connection.
    """
    sends = connection.protocol is None and connection.pause is not None and connection.pause.sent
    if connection.inbox.drops or sends:
        _drop(connection)
    else:
        connection.close(DisconnectReason.POLICY, code=1013, text="messages are not read")


class _PendingMessage:
    """A message that was read while the inbox was full. It waits outside until there is room, or until the end.

    The inbox calls it, so that it is delivered or counted before an ending cancels the pump.

    Attributes:
        taken: Whether it is in hand no more.
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
        if connection.protocol is not None:  # it is in the inbox already
            return
        close_info = connection.close_info
        if close_info is not None and not close_info.rule.deliver:
            connection.events.counters.messages_discarded += 1
        else:
            connection.inbox.put(self._message)
            connection.on_nonzero()


async def _enqueue_when_room(connection: Pumped, event: Mapping[str, Any]) -> None:
    """Wait for room, and take a message; or end the connection.

    While we do not read, ASGI cannot tell us that the client has left. So the wait looks at the transport now and then,
    and goes on reading, room or not, when the server is closing it: what is left to read is little, and the news of the
    end is behind it. A pause that nobody relieves ends the connection.
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
