"""Liveness of one connection: pings, pongs and the round trip."""

from __future__ import annotations

import struct
from typing import Any, Final

from fastapi_ws_stabilizer.metrics.timings import Histogram

_payload: Final = struct.Struct("!d").pack

MAX_OPEN_PINGS: Final = 2048
"""Maximum number of pings with a pong outstanding: twice the number of senders that may wait for an acknowledgement."""

FREE_PONGS: Final = 8
"""Unsolicited pongs between two pings that are not counted yet. Some clients send them as a sign of life (RFC 6455,
section 5.5.3). The next one counts for all of them."""


class Liveness:
    """Ping and pong state of one client. All times are on the monotonic clock, in seconds.

    Args:
        now: Current time.
        round_trips: Histogram of round trips, if they are measured.

    Attributes:
        last_seen: Time of the last bytes received from the client.
        awaiting_since: Time of the first unanswered ping, or of later network activity; `None` if nothing is expected.
        has_ponged: Whether the client has ever answered a ping.
        rtt: Seconds from the last answered ping to its pong; `None` before the first.
        next_ping: Time of the next ping.
        due: Time of the heartbeat's next check.
        recipient: Connection that the heartbeat watches; `None` while it watches none.
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
        self._open_pings = 0  # minus the unsolicited pongs since the last ping
        self._round_trips = round_trips

    def __lt__(self, other: Liveness) -> bool:
        """Compare by `due`, because the heartbeat's heap contains these objects."""
        return self.due < other.due

    def on_frame(self, now: float) -> None:
        """Record a received frame, after which no pong is expected."""
        self.last_seen = now
        self.awaiting_since = None

    def on_unmeasured_ping(self) -> None:
        """Record a queued ping that measures no round trip and sets no deadline."""
        self._open_pings = min(max(self._open_pings, 0) + 1, MAX_OPEN_PINGS)

    def on_ping_queued(self, now: float) -> None:
        """Record a queued ping."""
        self.on_unmeasured_ping()
        if self.awaiting_since is None:
            self.awaiting_since = now
        # The round trip is measured from the oldest open ping, so that it is never too short. Before the first pong it
        # is measured from the newest one, because earlier pings may have no answer at all.
        if self._ping_sent is None or not self.has_ponged:
            self._ping_sent = now

    def start_ping(self, now: float) -> bytes:
        """Record a ping frame and return its payload, which identifies the pong."""
        self.on_unmeasured_ping()
        if self.awaiting_since is None:
            self.awaiting_since = now
        self._ping_sent = now
        return _payload(now)

    def answered_ping(self, payload: bytes) -> float | None:
        """Return the time of the last ping frame if a pong frame answers it, else `None`."""
        sent = self._ping_sent
        return sent if sent is not None and payload == _payload(sent) else None

    def on_pong_frame(self, payload: bytes, now: float) -> int:
        """Record a pong frame like `on_pong`. It measures the round trip only if it answers the last ping."""
        return self._count_unsolicited() if self.answered_ping(payload) is None else self.on_pong(now)

    def on_pong(self, now: float) -> int:
        """Record a pong.

        Returns:
            Number of unsolicited pongs to count: 0 if a ping was open that this one may answer, or for the first few.
        """
        self.has_ponged = True
        if self._ping_sent is not None:
            self.rtt = now - self._ping_sent
            self._ping_sent = None
            if self._round_trips is not None:
                self._round_trips.observe(self.rtt)
        return self._count_unsolicited()

    def _count_unsolicited(self) -> int:
        self._open_pings -= 1
        unsolicited = -self._open_pings
        if unsolicited <= FREE_PONGS:
            return 0
        return unsolicited if unsolicited == FREE_PONGS + 1 else 1

    def clear_deadline(self) -> None:
        """Restart the deadline at the next ping, because the client could not have answered."""
        self.awaiting_since = None
        self._ping_sent = None
