"""Memory usage and inbound rate limits of a connection."""

from __future__ import annotations

import abc
import logging
import math
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.messages import Messages
from fastapi_ws_stabilizer.limits.connections import retry_delay
from fastapi_ws_stabilizer.limits.inbound import RateExceeded
from fastapi_ws_stabilizer.limits.rates import Rate, TokenBucket
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.wire.encoded import encode
from fastapi_ws_stabilizer.wire.v1.frames import Message

CONTROL_FRAMES: Final = Rate(per_second=50.0, burst=200.0)
"""Control frames that one client may send, without the pongs that answer the server's own pings. They carry no data,
so no client needs more."""

RATE_LIMITED: Final = "rate_limited"


class Metered(Messages):
    """Part of a connection that enforces its memory and rate limits."""

    __slots__ = ("_controls", "limit_reported", "residual")

    _controls: TokenBucket | None
    residual: ResidualMemory | None
    limit_reported: bool

    @abc.abstractmethod
    def close_unread(self) -> None:
        """Close the inbox and discard unread messages."""

    # ── memory ──

    @property
    def budget(self) -> MemoryBudget:
        """Memory budget that counts this connection."""
        return self._parts.budget

    @property
    def memory_usage(self) -> int:
        """Bytes of memory held for the connection or its session."""
        if self.protocol is not None:
            return self.protocol.session.memory_usage
        described = self._parts.budget.described.get(self.connection_id, 0)
        return self.outbox.counted_bytes + self.inbox.counted_bytes + int(self.socket._user_data_bytes) + described

    def evict(self) -> None:
        """Close the connection because the memory limit of the server is reached."""
        self._parts.listener.on_evicted(self)  # type: ignore[arg-type]  # every instance is a `Connection`
        retry = math.ceil(retry_delay() * 1000)
        self.close(DisconnectReason.MEMORY, reason=f"out of memory; retry={retry}")

    def on_limit_exceeded(self, held: int) -> None:
        """Close the connection because it exceeds `max_memory_per_connection`."""
        limit = self.config.max_memory_per_connection
        if self.opened and self.close(DisconnectReason.MEMORY, reason=f"memory limit of {limit} bytes exceeded"):
            self.emit("memory_limit_exceeded", logging.WARNING, held_bytes=held, max_memory_per_connection=limit)

    def on_message(self) -> None:
        """Report a received message to the memory budget. Called only if `watches_input` is set."""
        self._parts.budget.on_inbound(self.recipient)

    def on_nonzero(self) -> None:
        """Report that memory is held now, where possibly none was before."""
        self._parts.budget.on_nonzero(self.residual or self.recipient)

    @property
    def residual_memory(self) -> int:
        """Bytes held by this connection alone. Unread messages belong to the session until it has ended."""
        shared = self.protocol is not None and self.protocol.session.ended is None
        return self.outbox.counted_bytes + (0 if shared else self.inbox.counted_bytes)

    def discard_residual(self) -> None:
        """Discard unread and unsent messages of a closed connection, but not its close frame."""
        self.close_unread()
        self.on_discarded(self.outbox.discard_queued())

    # ── rate limits ──

    def admit_message(self, raw: str | bytes, message: Message | None = None) -> bool:
        """Return whether the client may send a message now. If not, send an error frame or close the connection."""
        if not self._parts.traffic.limited:
            return True
        excess = self._parts.traffic.take(self.client_id, self.connection_id, wire_size(raw), monotonic())
        if excess is not None:
            self.on_rate_exceeded(excess, message)
        return excess is None

    def on_rate_exceeded(self, excess: RateExceeded, message: Message | None) -> None:
        """Send the client an error frame for an exceeded rate, and close the connection if this repeats too often."""
        self.events.counters.messages_refused += 1
        self._emit_limit(excess.option, excess.message_type)
        text = f"too many messages; retry={math.ceil(excess.retry_after * 1000)}"
        if self.protocol is not None:
            self.protocol.on_rate_exceeded(message, RATE_LIMITED, text, excess.retry_after)
        else:
            self.answer(encode({"type": "error", "code": RATE_LIMITED, "message": text}))
        if excess.disconnect:
            self.close(DisconnectReason.POLICY, code=4429, reason=text)

    def on_early_message(self, raw: str | bytes) -> None:
        """Ignore a message that follows a rejected one. Too many of them close the connection."""
        excess = self._parts.traffic.count_ignored(self.connection_id, wire_size(raw), monotonic())
        if excess is not None:
            text = f"too many messages; retry={math.ceil(excess.retry_after * 1000)}"
            self.close(DisconnectReason.POLICY, code=4429, reason=text)

    def on_control_frame(self) -> None:
        """Count an unsolicited control frame of the client. Too many close the connection."""
        if self._controls is None:
            self._controls = TokenBucket()
        if wait := self._controls.take(CONTROL_FRAMES, 1.0, monotonic()):
            text = f"too many control frames; retry={math.ceil(wait * 1000)}"
            self._emit_limit("control_frames")
            self.close(DisconnectReason.POLICY, code=4429, reason=text)

    def _emit_limit(self, option: str, message_type: str | None = None) -> None:
        """Log the limit that the client exceeded, unless it was already logged at its full level."""
        if not self.limit_reported:
            about = {"option": option} if message_type is None else {"option": option, "message_type": message_type}
            kind = " ".join(about.values())
            self.limit_reported = self.emit_throttled("rate_limited", logging.WARNING, kind, **about)

    def on_delivered(self) -> None:
        """Report a delivered message to the memory budget. Called only if it counts output."""
        self._parts.budget.on_delivered(self.recipient)


def wire_size(raw: str | bytes) -> int:
    """Return the bytes of a message on the wire, uncompressed."""
    return len(raw if isinstance(raw, bytes) or raw.isascii() else raw.encode("utf-8", "surrogatepass"))


class ResidualMemory:
    """Memory account of a closing connection: unread messages, and messages being flushed.

    The memory budget treats it like a client.

    Args:
        connection: The connection.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: Metered) -> None:
        self._connection = connection

    @property
    def connection_id(self) -> str:
        """Id of the connection."""
        return self._connection.connection_id

    @property
    def memory_usage(self) -> int:
        """Bytes that the connection holds."""
        return self._connection.residual_memory

    def evict(self) -> None:
        """Discard the messages, because the memory limit of the server is reached."""
        self._connection.discard_residual()

    def on_limit_exceeded(self, _: int) -> None:
        """Do nothing, because the memory of a closing connection does not grow."""
