"""What the hub sees of a connection."""

from __future__ import annotations

from typing import Any, Protocol

from fastapi_ws_stabilizer.close_codes import DisconnectReason, Ending
from fastapi_ws_stabilizer.hub.pulse import Pulse
from fastapi_ws_stabilizer.wire.payload import Frame


class Member(Protocol):
    """One connection, as the hub handles it. Nothing here waits."""

    connection_id: str
    client_id: str
    pulse: Pulse

    @property
    def ending(self) -> Ending | None:
        """How it ended; `None` while it is open."""

    @property
    def reading_paused(self) -> bool:
        """Whether we, not the client, are the reason that nothing is received."""

    @property
    def face(self) -> Any:
        """What user code knows the connection by."""

    def enqueue(self, frame: Frame) -> bool:
        """Queue a frame; `False` if the connection is over or has just ended because its outbox was full."""

    def enqueue_if_room(self, frame: Frame) -> bool:
        """Queue a frame that may be left out; `False` if there is no room."""

    def under_pressure(self) -> bool:
        """Whether more than half of the outbox is used, and its client seems to read."""

    def has_backlog(self) -> bool:
        """Whether something waits to be sent."""

    def end(self, reason: DisconnectReason, *, code: int | None = None, text: str | None = None) -> bool:
        """Begin its end; `False` if it has begun already."""
