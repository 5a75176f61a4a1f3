"""How much a client may send: so many messages and bytes in a second, with a warning before it is cut off.

There are two buckets for a rate. What the first one has no room for is refused, and its sender is told when to try
again. The second one, of the same size, is for refusals: who goes on until that is empty too is cut off. So a client
that sends up to twice as fast as it may only hears of it, and one that floods is gone after a moment.

What comes behind a message that is to be sent again was on its way before its sender could hear of that. It is counted
in a third bucket, which has room for all that a client of ours has on its way at once.

The first bucket belongs to the client: several tabs share it, and dialling again does not fill it. The second one
belongs to the connection, so that none is cut off for what another one sends: somebody who has taken another's client
id can have its messages refused, and no more. Who comes without an id gets a fresh one with each dial, and full buckets
with it; how often somebody may dial is what `max_connect_rate_per_address` is for.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from fastapi_ws_stabilizer.limits.rates import KeyedTokenBuckets, Rate

MAX_REMEMBERED: Final = 65_536
"""Clients, and connections, whose buckets are remembered at most, beside those that are full."""

IN_FLIGHT: Final = 512
"""Messages that a client may have sent before it hears that the first of them is refused."""

IN_FLIGHT_BYTES: Final = 1024 * 1024
"""Bytes of them: as many as our client keeps, if its own option does not say more."""

MAX_DETACHED: Final = 60.0
"""Seconds that a client which was cut off is asked to stay away at most, if it need not wait longer for a message."""


class RateExceeded(NamedTuple):
    """More than may be sent.

    Attributes:
        wait: Seconds after which to try again. Who was cut off for it is to come back when its buckets are full, or it
            would be cut off again for what it has left to send.
        over: Whether its sender has been told so often enough.
        option: The name of the option that says how much may be sent.
        message_type: The type of message that it is said of, if it is one.
    """

    retry_after: float
    disconnect: bool
    option: str
    message_type: str | None


class KeyedRateLimiter:
    """One rate, for each of many clients.

    Args:
        per_second: How much may be sent in the long run.
        burst: How much at once.
        option: The name of the option that says so.
        message_type: The type of message that it is said of; all when left out.
        in_flight: How much may come behind a refused message, beside the burst, before that ends the connection.
    """

    def __init__(
        self,
        per_second: float,
        burst: float,
        option: str = "max_rate",
        message_type: str | None = None,
        *,
        in_flight: float = 0.0,
    ) -> None:
        rate = Rate(per_second, burst)
        self._burst = burst
        self._option = option
        self._message_type = message_type
        self._full_after = min(burst / per_second, MAX_DETACHED)
        self._allowed = KeyedTokenBuckets(rate, MAX_REMEMBERED)
        self._refused = KeyedTokenBuckets(rate, MAX_REMEMBERED)
        self._behind = KeyedTokenBuckets(Rate(per_second, burst + in_flight), MAX_REMEMBERED)

    def take(self, client_id: str, connection_id: str, cost: float, now: float) -> RateExceeded | None:
        """Take what a client sends; `None` if it may.

        Args:
            client_id: Who sends it.
            connection_id: Over which connection.
            cost: How much it is. More than the burst counts as the burst.
            now: The time, in monotonic seconds.
        """
        cost = min(cost, self._burst)
        wait = self._allowed.take(client_id, cost, now)
        if not wait:
            return None
        # The bucket has room for two at least: with room for one, a client that is refused once in the time of each
        # message would be cut off when it is early by a moment.
        over = bool(self._refused.take(connection_id, min(cost, self._burst / 2), now))
        return RateExceeded(max(wait, self._full_after) if over else wait, over, self._option, self._message_type)

    def refuse(self, connection_id: str, cost: float, now: float) -> RateExceeded | None:
        """Count what is ignored because something before it was refused; `None` if its sender may go on.

        Args:
            connection_id: Over which connection it has come.
            cost: How much it is.
            now: The time, in monotonic seconds.
        """
        if not self._behind.take(connection_id, min(cost, self._burst), now):
            return None
        return RateExceeded(self._full_after, True, self._option, self._message_type)


def rate_limiter(
    per_second: float | None,
    burst: float | None = None,
    option: str = "max_rate",
    message_type: str | None = None,
    *,
    in_flight: float = 0.0,
) -> KeyedRateLimiter | None:
    """The limit that goes with a rate; `None` without one.

    Args:
        per_second: The rate.
        burst: How much at once; as much as in a second when left out, and one at least.
        option: The name of the option that says so.
        message_type: The type of message that it is said of; all when left out.
        in_flight: How much may come behind a refused message, beside the burst, before that ends the connection.

    Raises:
        ValueError: The rate is not a number above zero, the burst is below one, or there is a burst without a rate.
    """
    if per_second is None:
        if burst is not None:
            raise ValueError("a burst is how many of a rate may come at once: name the rate too")
        return None
    if burst is None:
        burst = max(1.0, math.ceil(Rate(per_second, 1.0).per_second))
    if not burst >= 1:  # a message is one: with room for less, less than one would be taken for it
        raise ValueError(f"a burst is at least 1, not {burst!r}")
    return KeyedRateLimiter(per_second, burst, option, message_type, in_flight=in_flight)


class InboundRateLimiter:
    """What all clients of a manager may send.

    Args:
        message_rate: Messages in a second; any number when left out.
        message_burst: Messages at once; as many as in a second when left out.
        byte_rate: Bytes in a second; any number when left out.
        max_message_size: Bytes of the largest message, which may always be sent by somebody who was quiet.
    """

    def __init__(
        self,
        message_rate: float | None = None,
        message_burst: int | None = None,
        byte_rate: float | None = None,
        *,
        max_message_size: int = 1,
    ) -> None:
        self._messages = rate_limiter(message_rate, message_burst, "max_message_rate", in_flight=IN_FLIGHT)
        byte_burst = None if byte_rate is None else max(byte_rate, max_message_size)
        self._bytes = rate_limiter(byte_rate, byte_burst, "max_byte_rate", in_flight=IN_FLIGHT_BYTES)
        self.limited = self._messages is not None or self._bytes is not None

    def take(self, client_id: str, connection_id: str, size: int, now: float) -> RateExceeded | None:
        """Take one message of a client; `None` if it may send it.

        Args:
            client_id: Who sends it.
            connection_id: Over which connection.
            size: Its bytes.
            now: The time, in monotonic seconds.
        """
        excess = None if self._messages is None else self._messages.take(client_id, connection_id, 1.0, now)
        if excess is None and self._bytes is not None:
            excess = self._bytes.take(client_id, connection_id, size, now)
        return excess

    def refuse(self, connection_id: str, size: int, now: float) -> RateExceeded | None:
        """Count one message that is ignored because one before it was refused; `None` if its sender may go on.

        Args:
            connection_id: Over which connection it has come.
            size: Its bytes.
            now: The time, in monotonic seconds.
        """
        excess = None if self._messages is None else self._messages.refuse(connection_id, 1.0, now)
        if excess is None and self._bytes is not None:
            excess = self._bytes.refuse(connection_id, size, now)
        return excess
