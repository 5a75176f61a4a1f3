"""Rates of messages and bytes from clients, with rejections before a disconnect.

Each rate has two buckets. A message that does not fit in the first one is rejected, and its sender gets a retry time.
The second one, of the same size, counts rejections. A client that empties that one too is disconnected. So a client
that sends at up to twice its rate only gets rejections, but one that floods is disconnected quickly.

Messages behind a rejected one were sent before the client could know of the rejection. They are counted in a third
bucket, which has room for all messages that a client of this library has in flight.

The first bucket belongs to the client: several tabs share it, and a reconnect does not refill it. The second one
belongs to the connection, so that no connection is closed for messages of another one. An attacker with another
client's id can therefore get that client's messages rejected, but nothing more. A client without an id gets a new id,
and so full buckets, with each connection. The option `max_connect_rate_per_address` limits how often it connects.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from fastapi_ws_stabilizer.limits.rates import KeyedTokenBuckets, Rate

MAX_REMEMBERED: Final = 65_536
"""Maximum number of clients, and of connections, with a stored bucket."""

IN_FLIGHT: Final = 512
"""Maximum number of messages that a client has in flight when the first one is rejected."""

IN_FLIGHT_BYTES: Final = 1024 * 1024
"""Maximum bytes of these messages, equal to the default buffer of this library's client."""

MAX_RETRY_DELAY: Final = 60.0
"""Maximum seconds that a disconnected client is asked to wait, unless its message needs longer."""


class RateExceeded(NamedTuple):
    """Rejection of a message.

    Attributes:
        retry_after: Seconds after which to retry. With `disconnect`, the delay lets the buckets refill. Otherwise the
            client's remaining messages cause another disconnect.
        disconnect: Whether to close the connection, because too many messages were rejected.
        option: Name of the option with the limit.
        message_type: Message type that the limit applies to, if it is limited to one.
    """

    retry_after: float
    disconnect: bool
    option: str
    message_type: str | None


class KeyedRateLimiter:
    """One rate limit for each of many clients.

    Args:
        per_second: Rate in the long run.
        burst: Maximum amount at once.
        option: Name of the option with the limit.
        message_type: Message type that it applies to; all if omitted.
        in_flight: Amount that may follow a rejected message, beside the burst, before the connection is closed.
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
        self._full_after = min(burst / per_second, MAX_RETRY_DELAY)
        self._allowed = KeyedTokenBuckets(rate, MAX_REMEMBERED)
        self._refused = KeyedTokenBuckets(rate, MAX_REMEMBERED)
        self._behind = KeyedTokenBuckets(Rate(per_second, burst + in_flight), MAX_REMEMBERED)

    def take(self, client_id: str, connection_id: str, cost: float, now: float) -> RateExceeded | None:
        """Take the cost of a message; return `None` if it is allowed.

        Args:
            client_id: Client that sends it.
            connection_id: Connection that it arrived on.
            cost: Its cost. More than the burst counts as the burst.
            now: Time on the monotonic clock.
        """
        cost = min(cost, self._burst)
        wait = self._allowed.take(client_id, cost, now)
        if not wait:
            return None
        # Capping the cost at half the burst always allows two rejections. With one, a client that sends slightly early
        # would be disconnected.
        disconnect = bool(self._refused.take(connection_id, min(cost, self._burst / 2), now))
        return RateExceeded(
            max(wait, self._full_after) if disconnect else wait, disconnect, self._option, self._message_type
        )

    def count_ignored(self, connection_id: str, cost: float, now: float) -> RateExceeded | None:
        """Count a message that is ignored because one before it was rejected.

        Args:
            connection_id: Connection that it arrived on.
            cost: Its cost.
            now: Time on the monotonic clock.

        Returns:
            `None` if the client may continue.
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
    """Return the limiter of a rate; `None` without a rate.

    Args:
        per_second: The rate.
        burst: Maximum amount at once; the amount of one second if omitted, but at least 1.
        option: Name of the option with the limit.
        message_type: Message type that it applies to; all if omitted.
        in_flight: Amount that may follow a rejected message, beside the burst, before the connection is closed.

    Raises:
        ValueError: The rate is not a number above zero, the burst is below 1, or there is a burst without a rate.
    """
    if per_second is None:
        if burst is not None:
            raise ValueError("a burst needs a rate: set the rate too")
        return None
    if burst is None:
        burst = max(1.0, math.ceil(Rate(per_second, 1.0).per_second))
    if not burst >= 1:  # a message costs 1, and a smaller burst would reduce its cost
        raise ValueError(f"a burst must be at least 1, not {burst!r}")
    return KeyedRateLimiter(per_second, burst, option, message_type, in_flight=in_flight)


class InboundRateLimiter:
    """Message and byte rate limits of all clients of one manager.

    Args:
        message_rate: Messages per second; unlimited if omitted.
        message_burst: Messages at once; the number of one second if omitted.
        byte_rate: Bytes per second; unlimited if omitted.
        max_message_size: Bytes of the largest message. It is the minimum byte burst, so a client that was quiet can
            send it.
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
        """Take one message of a client; return `None` if it is allowed.

        Args:
            client_id: Client that sends it.
            connection_id: Connection that it arrived on.
            size: Its bytes.
            now: Time on the monotonic clock.
        """
        excess = None if self._messages is None else self._messages.take(client_id, connection_id, 1.0, now)
        if excess is None and self._bytes is not None:
            excess = self._bytes.take(client_id, connection_id, size, now)
        return excess

    def count_ignored(self, connection_id: str, size: int, now: float) -> RateExceeded | None:
        """Count one message that is ignored because one before it was rejected.

        Args:
            connection_id: Connection that it arrived on.
            size: Its bytes.
            now: Time on the monotonic clock.

        Returns:
            `None` if the client may continue.
        """
        excess = None if self._messages is None else self._messages.count_ignored(connection_id, 1.0, now)
        if excess is None and self._bytes is not None:
            excess = self._bytes.count_ignored(connection_id, size, now)
        return excess
