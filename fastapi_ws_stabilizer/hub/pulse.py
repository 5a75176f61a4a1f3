"""The signs of life of one connection."""

from __future__ import annotations


class Pulse:
    """When a client was last heard, and what it owes us.

    Attributes:
        last_seen: Time of the last frame from the client, on the monotonic clock.
        awaiting_since: Time of the first ping since then; `None` when nothing is owed.
        answers: Whether the client has ever answered a ping.
        rtt: Seconds from the last answered ping to its pong; `None` before the first.
        next_ping: Time of the next ping.
    """

    __slots__ = ("_ping_sent", "answers", "awaiting_since", "last_seen", "next_ping", "rtt")

    def __init__(self, now: float) -> None:
        self.last_seen = now
        self.awaiting_since: float | None = None
        self.answers = False
        self.rtt: float | None = None
        self.next_ping = now
        self._ping_sent: float | None = None

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
