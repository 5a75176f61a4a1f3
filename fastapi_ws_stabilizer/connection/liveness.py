"""The signs of life of one connection."""

from __future__ import annotations

import struct
from typing import Any, Final

from fastapi_ws_stabilizer.metrics.timings import Histogram

_payload: Final = struct.Struct("!d").pack

MAX_OPEN_PINGS: Final = 2048
"""Pings to one client whose pongs are expected at most: twice as many as senders may wait for its acknowledgement."""


class Liveness:
    """When a client was last heard, and what it owes us.

    Args:
        now: The time, on the monotonic clock.
        round_trips: Where round trips are counted, if they are.

    Attributes:
        last_seen: Time of the last bytes from the client that were seen, on the monotonic clock.
        awaiting_since: Time of the first ping since its last message, or of a later sign of life; `None` when nothing
            is owed.
        answers: Whether the client has ever answered a ping.
        rtt: Seconds from the last answered ping to its pong; `None` before the first.
        next_ping: Time of the next ping.
        due: When the heartbeat looks at it next.
        member: The connection that it beats for; `None` while it does not beat.
    """

    __slots__ = (
        "_open_pings",
        "_ping_sent",
        "_round_trips",
        "awaiting_since",
        "due",
        "has_ponged",
        "last_seen",
        "next_ping",
        "recipient",
        "rtt",
    )

    def __init__(self, now: float, round_trips: Histogram | None = None) -> None:
        self.last_seen = now
        self.awaiting_since: float | None = None
        self.has_ponged = False
        self.rtt: float | None = None
        self.next_ping = now
        self.due = now
        self.recipient: Any = None
        self._ping_sent: float | None = None
        self._open_pings = 0
        self._round_trips = round_trips

    def __lt__(self, other: Liveness) -> bool:
        """Whether its beat comes first: pulses stand in the heartbeat's heap themselves."""
        return self.due < other.due

    def on_frame(self, now: float) -> None:
        """Any frame has come in: the client lives and owes nothing."""
        self.last_seen = now
        self.awaiting_since = None

    def on_unmeasured_ping(self) -> None:
        """A ping has been queued that measures nothing: its pong is all that is wanted."""
        self._open_pings = min(self._open_pings + 1, MAX_OPEN_PINGS)

    def on_ping_sent(self, now: float) -> None:
        """A ping has been queued."""
        self.on_unmeasured_ping()
        if self.awaiting_since is None:
            self.awaiting_since = now
        # Of several open pings the oldest counts, so that no round trip is flattered, once we know that pings are
        # answered at all.
        if self._ping_sent is None or not self.has_ponged:
            self._ping_sent = now

    def pinged_by_protocol(self, now: float) -> bytes:
        """A ping frame is being sent; return its payload, by which its pong is known."""
        self.on_unmeasured_ping()
        if self.awaiting_since is None:
            self.awaiting_since = now
        self._ping_sent = now
        return _payload(now)

    def ponged_by_protocol(self, payload: bytes, now: float) -> bool:
        """A pong frame has come in. One that does not answer the last ping says no more than that the client lives.

        Returns:
            Whether a ping was open that it may answer.
        """
        if self._ping_sent is not None and payload == _payload(self._ping_sent):
            return self.on_pong(now)
        return self._is_expected()

    def on_pong(self, now: float) -> bool:
        """A pong has come in. Return whether a ping was open that it may answer."""
        self.has_ponged = True
        if self._ping_sent is not None:
            self.rtt = now - self._ping_sent
            self._ping_sent = None
            if self._round_trips is not None:
                self._round_trips.observe(self.rtt)
        return self._is_expected()

    def _is_expected(self) -> bool:
        expected = self._open_pings > 0
        self._open_pings -= expected
        return expected

    def reset_deadline(self) -> None:
        """What the client owes is not its fault: start counting anew at the next ping."""
        self.awaiting_since = None
        self._ping_sent = None
