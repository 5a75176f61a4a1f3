"""What a connection takes: the memory that is held for it, and what its client may send."""

from __future__ import annotations

import abc
import logging
import math
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.messages import Messages
from fastapi_ws_stabilizer.connection.remains import Remains
from fastapi_ws_stabilizer.limits.admission import retry_delay
from fastapi_ws_stabilizer.limits.ledger import MemoryBudget
from fastapi_ws_stabilizer.limits.rate import Rate, TokenBucket
from fastapi_ws_stabilizer.limits.traffic import RateExceeded
from fastapi_ws_stabilizer.wire.payload import encode
from fastapi_ws_stabilizer.wire.v1 import Message

CONTROL_FRAMES: Final = Rate(per_second=50.0, burst=200.0)
"""Pings, pongs and other frames of the protocol that one client may send, beside the pongs that answer our own pings.
What they carry is nothing, so that more is never of use."""

RATE_LIMITED: Final = "rate_limited"


class Metered(Messages):
    """What is held for a connection, and what comes over it, with the limits of both."""

    __slots__ = ("_controls", "remains", "told_of_limit")

    _controls: TokenBucket | None
    remains: Remains | None
    told_of_limit: bool

    @abc.abstractmethod
    def close_unread(self) -> None:
        """Throw away what nobody will read any more."""

    # ── memory ──

    @property
    def ledger(self) -> MemoryBudget:
        """Counts what is held."""
        return self._parts.ledger

    @property
    def held_memory(self) -> int:
        """Bytes that are held for it, or for its session."""
        if self.conversation is not None:
            return self.conversation.session.held_memory
        described = self._parts.ledger.described.get(self.connection_id, 0)
        return self.outbox.counted_bytes + self.inbox.counted_bytes + int(self.face._kept_bytes) + described

    def evict(self) -> None:
        """End it, because room is needed for others."""
        self._parts.evicted(self)
        retry = math.ceil(retry_delay() * 1000)
        self.end(DisconnectReason.MEMORY, text=f"out of memory; retry={retry}")

    def holds_too_much(self, held: int) -> None:
        """End it, because more is held for it than may be."""
        limit = self.config.max_memory_per_connection
        if self.opened and self.end(DisconnectReason.MEMORY, text=f"over {limit} bytes are held"):
            self.tell("memory_limit_exceeded", logging.WARNING, held_bytes=held, max_memory_per_connection=limit)

    def heard(self) -> None:
        """A message of its client has come. Called only where input is watched."""
        self._parts.ledger.heard(self.member)

    def holds(self) -> None:
        """Something is held for it, where nothing may have been before."""
        self._parts.ledger.holds(self.remains or self.member)

    @property
    def left_over(self) -> int:
        """Bytes that it alone holds. Its client's session, while that lives, holds what is unread."""
        shared = self.conversation is not None and self.conversation.session.over is None
        return self.outbox.counted_bytes + (0 if shared else self.inbox.counted_bytes)

    def clear_out(self) -> None:
        """It has ended: throw away what nobody has read and what is not sent yet, but for the close frame."""
        self.close_unread()
        self._discarded(self.outbox.forget())

    # ── what its client may send ──

    def may_send(self, raw: str | bytes, message: Message | None = None) -> bool:
        """Whether its client may send a message now. If not, it is told so, or its connection ends."""
        if not self._parts.traffic.limited:
            return True
        excess = self._parts.traffic.take(self.client_id, self.connection_id, wire_size(raw), monotonic())
        if excess is not None:
            self.exceeded(excess, message)
        return excess is None

    def exceeded(self, excess: RateExceeded, message: Message | None) -> None:
        """Its client has sent more than it may: tell it, and end its connection if it was told often enough."""
        self.reports.totals.messages_refused += 1
        self._tell_limit(excess.option, excess.message_type)
        text = f"too many messages; retry={math.ceil(excess.wait * 1000)}"
        if self.conversation is not None:
            self.conversation.too_much(message, RATE_LIMITED, text, excess.wait)
        else:
            self.answer(encode({"type": "error", "code": RATE_LIMITED, "message": text}))
        if excess.over:
            self.end(DisconnectReason.POLICY, code=4429, text=text)

    def came_too_soon(self, raw: str | bytes) -> None:
        """A message has come behind one that was refused, and is not looked at. Too many end the connection."""
        excess = self._parts.traffic.refuse(self.connection_id, wire_size(raw), monotonic())
        if excess is not None:
            text = f"too many messages; retry={math.ceil(excess.wait * 1000)}"
            self.end(DisconnectReason.POLICY, code=4429, text=text)

    def control_came(self) -> None:
        """A control frame of its client has come that we have not asked for. Too many end the connection."""
        if self._controls is None:
            self._controls = TokenBucket()
        if wait := self._controls.take(CONTROL_FRAMES, 1.0, monotonic()):
            text = f"too many control frames; retry={math.ceil(wait * 1000)}"
            self._tell_limit("control_frames")
            self.end(DisconnectReason.POLICY, code=4429, text=text)

    def _tell_limit(self, option: str, message_type: str | None = None) -> None:
        """Say which limit its client has run into, until that was told at its level once."""
        if not self.told_of_limit:
            about = {"option": option} if message_type is None else {"option": option, "message_type": message_type}
            kind = " ".join(about.values())
            self.told_of_limit = self.tell_now_and_then("rate_limited", logging.WARNING, kind, **about)

    def delivered(self) -> None:
        """A message has gone out. Told only where somebody wants to know."""
        self._parts.ledger.delivered(self.member)


def wire_size(raw: str | bytes) -> int:
    """Bytes of a message on the wire, uncompressed."""
    return len(raw if isinstance(raw, bytes) or raw.isascii() else raw.encode("utf-8", "surrogatepass"))
