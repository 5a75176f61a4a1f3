"""A connection as the hub sees it, without a socket."""

from __future__ import annotations

import contextvars
import itertools
from typing import Any

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

_numbers = itertools.count(1)


class FakeRecipient:
    """A connection that writes down what the hub does to it.

    Attributes:
        frames: What was queued for it.
        room: Whether a frame that may be left out finds room.
        takes: Whether it can be queued for at all.
    """

    def __init__(
        self, client_id: str = "ann", *, takes: bool = True, room: bool = True, pressed: bool = False, shard: int = 0
    ) -> None:
        self.connection_id = f"connection-{next(_numbers)}"
        self.client_id = client_id
        self.shard = shard
        self.shard_index = 0
        self.liveness = Liveness(0.0)
        self.close_info: CloseInfo | None = None
        self.reading_paused = False
        self.context: contextvars.Context | None = None
        self.pings_by_protocol = False
        self.socket: Any = f"face of {self.connection_id}"
        self.frames: list[EncodedMessage] = []
        self.protocol_pings: list[bytes] = []
        self.takes = takes
        self.room = room
        self.pressed = pressed
        self.backlog = False
        self.unsent: int | None = None
        self.taken: int | None = None
        self.silent: float | None = None
        self.verdict = EnqueueResult.QUEUED
        self.memory_usage = 0

    def evict(self) -> None:
        """End, because room is needed."""
        self.close(DisconnectReason.MEMORY)

    def on_limit_exceeded(self, _: int) -> None:
        """End, because more is held than may be."""
        self.close(DisconnectReason.MEMORY)

    @property
    def owner(self) -> FakeRecipient:
        """It is its own owner."""
        return self

    @property
    def outbox(self) -> FakeRecipient:
        """It is its own outbox."""
        return self

    @property
    def recipient(self) -> FakeRecipient:
        """It has no session."""
        return self

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame, or end as a connection whose outbox is full."""
        if not self.takes:
            self.close(DisconnectReason.SLOW_CONSUMER)
            return EnqueueResult.CLOSED
        if self.verdict is EnqueueResult.DROPPED:
            return self.verdict
        self.frames.append(frame)
        return EnqueueResult.BACKPRESSURE if self.pressed else self.verdict

    def ping(self, frame: EncodedMessage | None, now: float) -> bool:
        """Send a heartbeat, if there is room."""
        if not self.room:
            return False
        if frame is None:
            self.protocol_pings.append(self.liveness.pinged_by_protocol(now))
        else:
            self.frames.append(frame)
            self.liveness.on_ping_sent(now)
        return True

    def has_backlog(self) -> bool:
        """Whether something waits to be sent."""
        return self.backlog

    def unsent_bytes(self) -> int | None:
        """What its machine has not acknowledged."""
        return self.unsent

    def send_progress(self) -> int | None:
        """What its machine has taken."""
        return self.taken

    def seconds_since_received(self) -> float | None:
        """For how long no bytes have come from it."""
        return self.silent

    def offer_now(self, frame: EncodedMessage) -> EnqueueResult:
        """As `offer`."""
        return self.offer(frame)

    def flush(self) -> None:
        """Send what is queued: nothing waits here."""

    def lingers(self) -> bool:
        """Whether something waits: nothing does."""
        return False

    def is_backpressured(self) -> bool:
        """Whether more than half of the outbox is used."""
        return self.pressed

    def close(
        self,
        reason: DisconnectReason,
        *,
        code: int | None = None,
        text: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Begin the end."""
        if self.close_info is not None:
            return False
        self.close_info = local_close(reason, code=code, text=text, from_outside=from_outside)
        return True
