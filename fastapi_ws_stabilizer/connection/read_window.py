"""Bound of what is on its path to a client and would be out of date on arrival."""

from __future__ import annotations

import struct
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.servers.direct import DirectTransport

MAX_UNREAD_BYTES: Final = 32 * 1024
"""Bytes of messages with a `coalesce_key` that a client may have unread before further ones wait in the outbox. On a
link with a round trip of 100 ms, that is up to 320 KB/s of such messages."""

_payload: Final = struct.Struct("!2sI").pack
_NUMBERS: Final = 1 << 32


class ReadWindow:
    """Bytes of messages with a `coalesce_key` that a client has not confirmed to have read.

    The kernel's acknowledgement is no confirmation, because the client's kernel and a proxy hold bytes that the client
    has not read. A client answers a ping when it reads the ping, and thus has read what was sent before.

    Args:
        direct: The direct transport, which writes the pings.
    """

    __slots__ = ("_after_ping", "_asked_at", "_direct", "_number", "_ping", "_unread")

    def __init__(self, direct: DirectTransport) -> None:
        self._direct = direct
        self._unread = 0
        self._after_ping = 0  # those of them that were sent after the ping
        self._asked_at = 0.0
        self._number = 0
        self._ping: bytes | None = None  # payload of the ping that the client has not answered

    @property
    def room(self) -> int:
        """Bytes that may be sent now."""
        return max(0, MAX_UNREAD_BYTES - self._unread)

    def sent(self, size: int) -> None:
        """Record sent bytes, and ask for a confirmation when half of the window is used."""
        self._unread += size
        self._after_ping += size
        if self._ping is None and self._unread >= MAX_UNREAD_BYTES // 2:
            self._number = (self._number + 1) % _NUMBERS
            self._ping = _payload(b"rd", self._number)
            self._after_ping = 0
            self._asked_at = monotonic()
            self._direct.ping(self._ping)

    def confirm(self, pong: bytes) -> bool:
        """Process a pong. Return whether it answers the ping of this window."""
        if pong != self._ping:
            return False
        self._on_confirmed()
        return True

    def confirm_until(self, asked_at: float) -> bool:
        """Process a pong to another ping that was written at `asked_at`. Return whether it confirms the ping too."""
        if self._ping is None or asked_at < self._asked_at:
            return False
        self._on_confirmed()
        return True

    def _on_confirmed(self) -> None:
        self._ping = None
        self._unread = self._after_ping
        self.sent(0)
