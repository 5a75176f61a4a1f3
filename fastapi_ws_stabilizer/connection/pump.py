"""The pump: one task per connection that always reads, whatever the user's code is doing.

Pongs, pings and the disconnect are handled here, so a busy or idle endpoint neither looks dead nor fails to learn that
its client has left. Everything else goes to the inbox.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason, Ending, ending_by_peer
from fastapi_ws_stabilizer.config import InboxOverflow, WebSocketConfig
from fastapi_ws_stabilizer.connection.inbox import Inbox
from fastapi_ws_stabilizer.connection.server_side import ServerSide
from fastapi_ws_stabilizer.hub.pulse import Pulse
from fastapi_ws_stabilizer.reports import Reports
from fastapi_ws_stabilizer.wire.control import MAX_CONTROL_CHARS, Ping, parse_control
from fastapi_ws_stabilizer.wire.payload import Frame

_LOOK_INTERVAL: Final = 0.5
"""Seconds between two looks at a transport that is not read from."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Pumped(Protocol):
    """What the pump needs of its connection."""

    config: WebSocketConfig
    reports: Reports
    pulse: Pulse
    inbox: Inbox
    server_side: ServerSide
    control_frames: bool
    reading_paused: bool
    told_of_pause: bool
    ending: Ending | None

    def enqueue_if_room(self, frame: Frame) -> bool:
        """Queue a frame that may be left out."""

    def end(self, reason: DisconnectReason, *, code: int | None = None, text: str | None = None) -> bool:
        """End the connection from our side."""

    def ended_by_peer(self, how: Ending) -> None:
        """The connection is gone."""

    def lost(self, error: Exception) -> None:
        """The connection broke."""

    def tell(self, event: str, level: int, **facts: Any) -> None:
        """Report something about this connection."""


async def pump(connection: Pumped, receive: Receive) -> None:
    """Read until the connection is over.

    Hot path: this runs for every message. It looks at a text's length and first character before it parses anything.
    """
    config = connection.config
    max_size = config.max_message_size
    pulse = connection.pulse
    inbox = connection.inbox
    totals = connection.reports.totals
    while connection.ending is None:
        try:
            event = await receive()
        except Exception as error:  # a server or a test client that tears its stream down instead of saying so
            connection.lost(error)
            return
        now = monotonic()
        if event["type"] != "websocket.receive":
            close_frame = connection.server_side.saw_close_frame(event)
            connection.ended_by_peer(
                ending_by_peer(event.get("code") or 1005, event.get("reason"), close_frame=close_frame)
            )
            return
        pulse.seen(now)
        text: str | None = event.get("text")
        message: str | bytes = (event.get("bytes") or b"") if text is None else text
        if (
            text is not None
            and len(text) <= MAX_CONTROL_CHARS
            and connection.control_frames
            and (control := parse_control(text))
        ):
            if isinstance(control, Ping):
                connection.enqueue_if_room(control.answer)
            else:
                pulse.ponged(now)
            continue
        if len(message) > max_size or (
            isinstance(message, str)
            and not message.isascii()
            and 4 * len(message) > max_size
            and len(message.encode("utf-8", "surrogatepass")) > max_size
        ):
            connection.end(DisconnectReason.MESSAGE_TOO_BIG, text=f"message over {max_size} bytes")
            return
        totals.messages_received += 1
        if inbox.full and not connection.server_side.closing:
            await _overflow(connection)
            if connection.ending is not None:
                totals.messages_discarded += 1
                return
        inbox.put(message)


async def _overflow(connection: Pumped) -> None:
    """Wait for room before one more message is taken.

    While we do not read, ASGI cannot tell us that the client has left. So the wait looks at the transport now and then,
    and goes on reading, room or not, when the server is closing it: what is left to read is little, and the news of the
    end is behind it. A pause that nobody relieves ends the connection.
    """
    config = connection.config
    if config.inbox_overflow is InboxOverflow.CLOSE:
        connection.end(DisconnectReason.POLICY, code=1013, text="messages come faster than they are read")
        return
    if not connection.told_of_pause:
        connection.told_of_pause = True
        connection.tell("reading_paused", logging.WARNING, waiting_messages=len(connection.inbox))
    connection.reading_paused = True
    taken, since = connection.inbox.taken, monotonic()
    while not await connection.inbox.room(_LOOK_INTERVAL) and not connection.server_side.closing:
        if connection.inbox.taken != taken:
            taken, since = connection.inbox.taken, monotonic()
        elif monotonic() - since >= config.inbox_pause_timeout:
            connection.end(DisconnectReason.POLICY, code=1013, text="nobody reads the messages")
            break
    connection.reading_paused = False
    connection.pulse.seen(monotonic())
