"""What an attempt to connect tells the client that it is made for: gaps, how it was lost, and all that has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from fastapi_ws_stabilizer.client.errors import RefusedError, UnreadableFrameError
from fastapi_ws_stabilizer.client.inbound import InboundMessages
from fastapi_ws_stabilizer.client.send_buffer import SendBuffer


@dataclass(frozen=True)
class Gap:
    """Messages of the server that this client will not get.

    Attributes:
        session_lost: Whether the session is a new one, in which nothing of the old one is known.
        why: The server's word for it: `overflow`, `epoch`, `unknown`, `expired`, `denied`, ...; or the client's:
            `unfinished` for a message in whose middle the connection was lost twice.
        first: Number of the first message that was missed.
        last: Number of the last one; `None` if the session is a new one.
    """

    session_lost: bool
    why: str | None
    first: int
    last: int | None


@dataclass(frozen=True)
class ConnectionLost:
    """How a connection, or the attempt to make one, has ended.

    Attributes:
        code: Its close code; 1006 if there was none.
        reason: Its close reason.
        was_open: Whether the server had welcomed us.
        at_once: Whether it was left in order to dial again at once.
    """

    code: int
    reason: str
    was_open: bool = False
    at_once: bool = False


class Owner(Protocol):
    """The client that an attempt is made for."""

    buffer: SendBuffer
    incoming: InboundMessages
    deflate: bool
    instance: str
    session: str | None
    token: str | None
    last: int
    dials: int
    probe_timeout: float

    @property
    def refused_credential(self) -> bool:
        """Whether the server has refused the last credential."""

    async def credential(self, *, force: bool) -> str | None:
        """The credential for the first frame."""

    async def address(self) -> str:
        """Where to connect."""

    def opened(self, outcome: str) -> None:
        """The connection is open."""

    def stable(self) -> None:
        """It has been so for long enough."""

    def emit(self, name: str, *args: Any) -> None:
        """Something that listeners want to know."""

    def left_out(self, error: UnreadableFrameError) -> None:
        """A frame of the server could not be read."""

    def refused(self, error: RefusedError) -> None:
        """The server has refused a message."""

    def answered(self, request_id: str, data: Any, error: Any) -> None:
        """An answer has come."""

    def broke_off(self) -> None:
        """The connection is lost in the middle of a large message of the server."""

    def not_unfinished(self) -> None:
        """Something else has come than the message that had broken off, or nothing: it is not begun anew."""

    def lost_session(self, accepted: int) -> None:
        """It is a new session."""
