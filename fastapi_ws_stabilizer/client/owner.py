"""Gaps, lost connections, and the interface of a client for its connections."""

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
        session_lost: Whether the server started a new session without any state of the old one.
        why: Cause from the server: `overflow`, `epoch`, `unknown`, `expired`, `denied`, ...; or `unfinished` from the
            client, for a message during which the connection was lost twice.
        first: Number of the first missed message.
        last: Number of the last missed message; `None` if the session is a new one.
    """

    session_lost: bool
    why: str | None
    first: int
    last: int | None


@dataclass(frozen=True)
class ConnectionLost:
    """How a connection, or an attempt to open one, has ended.

    Attributes:
        code: Close code; 1006 without one.
        reason: Close reason.
        was_open: Whether the server had sent its welcome.
        at_once: Whether the client left the connection to reconnect immediately.
    """

    code: int
    reason: str
    was_open: bool = False
    at_once: bool = False


class Owner(Protocol):
    """Client that a connection belongs to."""

    buffer: SendBuffer
    incoming: InboundMessages
    deflate: bool
    instance_id: str
    session: str | None
    token: str | None
    last_seq: int
    attempts: int
    probe_timeout: float

    @property
    def is_credential_rejected(self) -> bool:
        """Whether the server has rejected the last credential."""

    async def credential(self, *, force: bool) -> str | None:
        """Return the credential for the first frame."""

    async def address(self) -> str:
        """Return the URL."""

    def opened(self, outcome: str) -> None:
        """Record that the connection is open."""

    def stable(self) -> None:
        """Record that the connection is stable."""

    def emit(self, name: str, *args: Any) -> None:
        """Call the listeners of an event."""

    def report_unreadable(self, error: UnreadableFrameError) -> None:
        """Record a frame of the server that cannot be read."""

    def refused(self, error: RefusedError) -> None:
        """Record a message that the server has rejected."""

    def answered(self, request_id: str, data: Any, error: Any) -> None:
        """Resolve a request."""

    def mark_truncated(self) -> None:
        """Record a connection that was lost during a large message of the server."""

    def clear_truncated(self) -> None:
        """Forget the truncated message, because the server does not send it again."""

    def restart_session(self, accepted: int) -> None:
        """Start over, because the server has replaced the requested session by a new one."""
