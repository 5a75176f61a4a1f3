"""The signs of life of one connection."""

from __future__ import annotations

import struct
from typing import Any, Final

_payload: Final = struct.Struct("!d").pack


class Pulse:
    """When a client was last heard, and what it owes us.

    Attributes:
        last_seen: Time of the last frame from the client, on the monotonic clock.
        awaiting_since: Time of the first ping since then; `None` when nothing is owed.
        answers: Whether the client has ever answered a ping.
        rtt: Seconds from the last answered ping to its pong; `None` before the first.
        next_ping: Time of the next ping.
        due: When the heartbeat looks at it next.
        member: The connection that it beats for; `None` while it does not beat.
    """

    __slots__ = ("_ping_sent", "answers", "awaiting_since", "due", "last_seen", "member", "next_ping", "rtt")

    def __init__(self, now: float) -> None:
        self.last_seen = now
        self.awaiting_since: float | None = None
        self.answers = False
        self.rtt: float | None = None
        self.next_ping = now
        self.due = now
        self.member: Any = None
        self._ping_sent: float | None = None

    def __lt__(self, other: Pulse) -> bool:
        """Whether its beat comes first: pulses stand in the heartbeat's heap themselves."""
        return self.due < other.due

    def seen(self, now: float) -> None:
        """Any frame has come in: the client lives and owes nothing."""
        self.last_seen = now
        self.awaiting_since = None

    def pinged(self, now: float) -> None:
        """A ping has been queued."""
        if self.awaiting_since is None:
            self.awaiting_since = now
        # Of several open pings the oldest counts, so that no round trip is flattered, once we know that pings are
        # answered at all.
        if self._ping_sent is None or not self.answers:
            self._ping_sent = now

    def pinged_by_protocol(self, now: float) -> bytes:
        """A ping frame is being sent; return its payload, by which its pong is known."""
        if self.awaiting_since is None:
            self.awaiting_since = now
        self._ping_sent = now
        return _payload(now)

    def ponged_by_protocol(self, payload: bytes, now: float) -> None:
        """A pong frame has come in. One that answers no open ping says no more than that the client lives."""
        if self._ping_sent is not None and payload == _payload(self._ping_sent):
            self.ponged(now)

    def ponged(self, now: float) -> None:
        """A pong has come in."""
        self.answers = True
        if self._ping_sent is not None:
            self.rtt = now - self._ping_sent
            self._ping_sent = None

    def forgive(self) -> None:
        """What the client owes is not its fault: start counting anew at the next ping."""
        self.awaiting_since = None
        self._ping_sent = None
