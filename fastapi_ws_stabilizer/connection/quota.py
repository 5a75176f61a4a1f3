"""Limits on what one client sends: rates of messages, and control frames."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.limits.inbound import RateExceeded
from fastapi_ws_stabilizer.limits.rates import Rate, TokenBucket
from fastapi_ws_stabilizer.wire.v1.frames import Message

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection

CONTROL_FRAMES: Final = Rate(per_second=50.0, burst=200.0)
"""Control frames that one client may send, without the pongs that answer the server's own pings. They carry no data,
so no client needs more."""

RATE_LIMITED: Final = "rate_limited"


class InboundQuota:
    """Limits of one client, and what it has used of them.

    A connection creates it for its first unsolicited control frame, or for its first message if rates are limited.
    """

    __slots__ = ("_controls", "_is_reported")

    def __init__(self) -> None:
        self._controls = TokenBucket()
        self._is_reported = False

    def admit(self, connection: Connection, raw: str | bytes, message: Message | None = None) -> bool:
        """Return whether the client may send a message now. If not, send an error frame or close the connection."""
        traffic = connection.resources.traffic
        excess = traffic.take(connection.client_id, connection.connection_id, wire_size(raw), monotonic())
        if excess is not None:
            self.on_exceeded(connection, excess, message)
        return excess is None

    def on_exceeded(self, connection: Connection, excess: RateExceeded, message: Message | None) -> None:
        """Send the client an error frame for an exceeded rate, and close the connection if this repeats too often."""
        connection.events.counters.messages_refused += 1
        self._report(connection, excess.option, excess.message_type)
        text = f"too many messages; retry={math.ceil(excess.retry_after * 1000)}"
        connection.protocol.on_excess(connection, message, RATE_LIMITED, text, excess.retry_after)
        if excess.disconnect:
            connection.close(DisconnectReason.POLICY, code=4429, reason=text)

    def on_early_message(self, connection: Connection, raw: str | bytes) -> None:
        """Ignore a message that follows a rejected one. Too many of them close the connection."""
        traffic = connection.resources.traffic
        excess = traffic.count_ignored(connection.connection_id, wire_size(raw), monotonic())
        if excess is not None:
            text = f"too many messages; retry={math.ceil(excess.retry_after * 1000)}"
            connection.close(DisconnectReason.POLICY, code=4429, reason=text)

    def on_control_frames(self, connection: Connection, count: int) -> None:
        """Count unsolicited control frames of the client. Too many close the connection."""
        if wait := self._controls.take(CONTROL_FRAMES, count, monotonic()):
            text = f"too many control frames; retry={math.ceil(wait * 1000)}"
            self._report(connection, "control_frames")
            connection.close(DisconnectReason.POLICY, code=4429, reason=text)

    def _report(self, connection: Connection, option: str, message_type: str | None = None) -> None:
        """Log the limit that the client exceeded, unless it was already logged at its full level."""
        if not self._is_reported:
            about = {"option": option} if message_type is None else {"option": option, "message_type": message_type}
            kind = " ".join(about.values())
            self._is_reported = connection.emit_throttled("rate_limited", logging.WARNING, kind, **about)


def wire_size(raw: str | bytes) -> int:
    """Return the bytes of a message on the wire, uncompressed."""
    return len(raw if isinstance(raw, bytes) or raw.isascii() else raw.encode("utf-8", "surrogatepass"))
