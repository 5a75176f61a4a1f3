"""What a connection takes: the memory that is held for it, and what its client may send."""

from __future__ import annotations

import abc
import logging
import math
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.messages import Messages
from fastapi_ws_stabilizer.connection.remains import ResidualMemory
from fastapi_ws_stabilizer.limits.connections import retry_delay
from fastapi_ws_stabilizer.limits.inbound import RateExceeded
from fastapi_ws_stabilizer.limits.rates import Rate, TokenBucket
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.wire.encoded import encode
from fastapi_ws_stabilizer.wire.v1.frames import Message

CONTROL_FRAMES: Final = Rate(per_second=50.0, burst=200.0)
"""Pings, pongs and other frames of the protocol that one client may send, beside the pongs that answer our own pings.
What they carry is nothing, so that more is never of use."""

RATE_LIMITED: Final = "rate_limited"


class Metered(Messages):
    """What is held for a connection, and what comes over it, with the limits of both."""

    __slots__ = ("_controls", "limit_reported", "residual")

    _controls: TokenBucket | None
    residual: ResidualMemory | None
    limit_reported: bool

    @abc.abstractmethod
    def close_unread(self) -> None:
        """Throw away what nobody will read any more."""

    # ── memory ──

    @property
    def budget(self) -> MemoryBudget:
        """Counts what is held."""
        return self._parts.budget

    @property
    def memory_usage(self) -> int:
        """Bytes that are held for it, or for its session."""
        if self.protocol is not None:
            return self.protocol.session.memory_usage
        described = self._parts.budget.described.get(self.connection_id, 0)
        return self.outbox.counted_bytes + self.inbox.counted_bytes + int(self.socket._user_data_bytes) + described

    def evict(self) -> None:
        """End it, because room is needed for others."""
        self._parts.on_evicted(self)
        retry = math.ceil(retry_delay() * 1000)
        self.close(DisconnectReason.MEMORY, text=f"out of memory; retry={retry}")

    def on_limit_exceeded(self, held: int) -> None:
        """End it, because more is held for it than may be."""
        limit = self.config.max_memory_per_connection
        if self.opened and self.close(DisconnectReason.MEMORY, text=f"over {limit} bytes are held"):
            self.emit("memory_limit_exceeded", logging.WARNING, held_bytes=held, max_memory_per_connection=limit)

    def on_message(self) -> None:
        """A message of its client has come. Called only where input is watched."""
        self._parts.budget.on_inbound(self.recipient)

    def on_nonzero(self) -> None:
        """Something is held for it, where nothing may have been before."""
        self._parts.budget.on_nonzero(self.residual or self.recipient)

    @property
    def residual_memory(self) -> int:
        """Bytes that it alone holds. Its client's session, while that lives, holds what is unread."""
        shared = self.protocol is not None and self.protocol.session.ended is None
        return self.outbox.counted_bytes + (0 if shared else self.inbox.counted_bytes)

    def discard_residual(self) -> None:
        """It has ended: throw away what nobody has read and what is not sent yet, but for the close frame."""
        self.close_unread()
        self._discarded(self.outbox.forget())

    # ── what its client may send ──

    def admit_message(self, raw: str | bytes, message: Message | None = None) -> bool:
        """Whether its client may send a message now. If not, it is told so, or its connection ends."""
        if not self._parts.traffic.limited:
            return True
        excess = self._parts.traffic.take(self.client_id, self.connection_id, wire_size(raw), monotonic())
        if excess is not None:
            self.on_rate_exceeded(excess, message)
        return excess is None

    def on_rate_exceeded(self, excess: RateExceeded, message: Message | None) -> None:
        """Its client has sent more than it may: tell it, and end its connection if it was told often enough."""
        self.events.counters.messages_refused += 1
        self._emit_limit(excess.option, excess.message_type)
        text = f"too many messages; retry={math.ceil(excess.retry_after * 1000)}"
        if self.protocol is not None:
            self.protocol.on_rate_exceeded(message, RATE_LIMITED, text, excess.retry_after)
        else:
            self.answer(encode({"type": "error", "code": RATE_LIMITED, "message": text}))
        if excess.disconnect:
            self.close(DisconnectReason.POLICY, code=4429, text=text)

    def on_early_message(self, raw: str | bytes) -> None:
        """A message has come behind one that was refused, and is not looked at. Too many end the connection."""
        excess = self._parts.traffic.refuse(self.connection_id, wire_size(raw), monotonic())
        if excess is not None:
            text = f"too many messages; retry={math.ceil(excess.retry_after * 1000)}"
            self.close(DisconnectReason.POLICY, code=4429, text=text)

    def on_control_frame(self) -> None:
        """A control frame of its client has come that we have not asked for. Too many end the connection."""
        if self._controls is None:
            self._controls = TokenBucket()
        if wait := self._controls.take(CONTROL_FRAMES, 1.0, monotonic()):
            text = f"too many control frames; retry={math.ceil(wait * 1000)}"
            self._emit_limit("control_frames")
            self.close(DisconnectReason.POLICY, code=4429, text=text)

    def _emit_limit(self, option: str, message_type: str | None = None) -> None:
        """Say which limit its client has run into, until that was told at its level once."""
        if not self.limit_reported:
            about = {"option": option} if message_type is None else {"option": option, "message_type": message_type}
            kind = " ".join(about.values())
            self.limit_reported = self.emit_throttled("rate_limited", logging.WARNING, kind, **about)

    def on_delivered(self) -> None:
        """A message has gone out. Told only where somebody wants to know."""
        self._parts.budget.on_delivered(self.recipient)


def wire_size(raw: str | bytes) -> int:
    """Bytes of a message on the wire, uncompressed."""
    return len(raw if isinstance(raw, bytes) or raw.isascii() else raw.encode("utf-8", "surrogatepass"))
