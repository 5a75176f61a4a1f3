"""What the hub sees of a connection."""

from __future__ import annotations

import contextvars
from typing import Any, Protocol

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.memory.budget import Evictable
from fastapi_ws_stabilizer.queueing import SendQueueLike
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage


class Recipient(Evictable, Protocol):
    """One connection, as the hub handles it. Nothing here waits."""

    client_id: str
    shard: int
    liveness: Liveness

    @property
    def recipient(self) -> Any:
        """As what it is in rooms and gets messages: itself, or the session that it belongs to."""

    @property
    def is_attached(self) -> bool:
        """Whether there is a connection: a session may be without."""

    @property
    def outbox(self) -> SendQueueLike:
        """What waits to be sent to it."""

    @property
    def close_info(self) -> CloseInfo | None:
        """How it ended; `None` while it is open."""

    @property
    def reading_paused(self) -> bool:
        """Whether we, not the client, are the reason that nothing is received."""

    @property
    def context(self) -> contextvars.Context | None:
        """The context variables of its handshake, while it is open."""

    @property
    def pings_by_protocol(self) -> bool:
        """Whether it can be sent ping frames, which every client answers by itself."""

    @property
    def socket(self) -> Any:
        """What user code knows the connection by."""

    def ping(self, frame: EncodedMessage | None, now: float) -> bool:
        """Send a heartbeat: this frame, or a ping frame of the protocol; `False` if there is no room for it."""

    def has_backlog(self) -> bool:
        """Whether something waits to be sent, so that a ping behind it cannot have been answered."""

    def unsent_bytes(self) -> int | None:
        """Bytes that were written and that its machine has not acknowledged; `None` where they cannot be seen."""

    def send_progress(self) -> int | None:
        """A number that has grown if its machine has taken bytes since; `None` where that cannot be seen."""

    def seconds_since_received(self) -> float | None:
        """Seconds since bytes last came from it, whole message or not; `None` where that cannot be seen."""

    def consume_activity(self) -> bool:
        """Whether it has carried a message, either way, since this was asked last."""

    def request_drain(self, after: float, within: float, why: DisconnectReason) -> bool:
        """Ask its client to leave by itself after some seconds, and come back; `False` if it cannot be asked."""

    def close(
        self,
        reason: DisconnectReason,
        *,
        code: int | None = None,
        text: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Begin its end; `False` if it has begun already."""
