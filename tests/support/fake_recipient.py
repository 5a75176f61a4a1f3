"""A connection as the hub sees it, without a socket."""

from __future__ import annotations

import contextvars
import itertools
from typing import Any

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from tests.support.fake_outbox import FakeOutbox

_numbers = itertools.count(1)


class FakeRecipient(FakeOutbox):
    """A connection that records what the hub does to it.

    Attributes:
        room: Whether a heartbeat, which may be left out, finds room.
        takes: Whether its outbox takes frames at all.
    """

    def __init__(
        self, client_id: str = "ann", *, takes: bool = True, room: bool = True, pressed: bool = False, shard: int = 0
    ) -> None:
        super().__init__(pressed=pressed)
        self.connection_id = f"connection-{next(_numbers)}"
        self.client_id = client_id
        self.shard = shard
        self.shard_index = 0
        self.liveness = Liveness(0.0)
        self.pause: Any = None
        self.context: contextvars.Context | None = None
        self.pings_by_protocol = False
        self.socket: Any = f"socket of {self.connection_id}"
        self.protocol_pings: list[bytes] = []
        self.takes = takes
        self.room = room
        self.backlog = False
        self.unsent: int | None = None
        self.taken: int | None = None
        self.silent: float | None = None
        self.verdict = EnqueueResult.QUEUED
        self.memory_usage = 0

    def evict(self) -> None:
        """Close, to free memory."""
        self.close(DisconnectReason.MEMORY)

    def on_limit_exceeded(self, _: int) -> None:
        """Close, because it holds more than it may."""
        self.close(DisconnectReason.MEMORY)

    @property
    def owner(self) -> FakeRecipient:
        """Itself: it is its own owner."""
        return self

    @property
    def outbox(self) -> FakeRecipient:
        """Itself: it is its own outbox."""
        return self

    @property
    def recipient(self) -> FakeRecipient:
        """Itself: it has no session."""
        return self

    @property
    def account(self) -> FakeRecipient:
        """Itself: it is its own account in the memory budget."""
        return self

    @property
    def protocol(self) -> FakeRecipient:
        """Itself: it pings by itself."""
        return self

    @property
    def server_transport(self) -> FakeRecipient:
        """Itself: it is its own transport."""
        return self

    def try_enqueue(self, _: EncodedMessage) -> bool:
        """Return `False`: `offer` decides."""
        return False

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame, or close like a connection with a full outbox."""
        if not self.takes:
            self.close(DisconnectReason.SLOW_CONSUMER)
            return EnqueueResult.CLOSED
        if self.verdict is EnqueueResult.DROPPED:
            return self.verdict
        self.frames.append(frame)
        return EnqueueResult.BACKPRESSURE if self.pressed else self.verdict

    def pings_are_answered(self, _: object) -> bool:
        """Return whether clients answer its pings automatically."""
        return self.pings_by_protocol

    def ping(self, _: object, frame: EncodedMessage | None, now: float) -> bool:
        """Send a heartbeat if there is room."""
        if not self.room:
            return False
        if frame is None:
            self.protocol_pings.append(self.liveness.start_ping(now))
        else:
            self.frames.append(frame)
            self.liveness.on_ping_queued(now)
        return True

    @property
    def is_stalled(self) -> bool:
        """Whether frames wait to be sent."""
        return self.backlog

    def unsent_bytes(self) -> int | None:
        """Return the bytes that the client's machine has not acknowledged."""
        return self.unsent

    def progress(self) -> int | None:
        """Return the bytes that the client's machine has acknowledged."""
        return self.taken

    def seconds_since_received(self) -> float | None:
        """Return the seconds since the last bytes came from it."""
        return self.silent

    def offer_now(self, frame: EncodedMessage) -> EnqueueResult:
        """Do the same as `offer`."""
        return self.offer(frame)
