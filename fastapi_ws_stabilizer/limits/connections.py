"""Limits of connections and handshakes: in total, per client and per address.

A slot is reserved when a handshake arrives, which costs a few dictionary look-ups. It is confirmed when the client is
identified (`Reservation.confirm`), so that a client can replace its own half-open connection on a full server. For that
a full server accepts a bounded number of unconfirmed reservations above `max_connections`, so handshakes that never
identify their client cannot accumulate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.errors import ConnectionLimitExceededError, ShutdownError, TooManyConnectionsError
from fastapi_ws_stabilizer.limits.rates import KeyedTokenBuckets, Rate, RetryQueue

RETRY_WHEN_FULL: Final = 5.0
"""Average seconds after which a client rejected by a full server may retry. The delay is 50 % to 150 % of this."""

MIN_RETRY_DELAY: Final = 1.0
"""Minimum seconds after which a client of a stopping server may retry, so that another server can start."""

RETRIES_PER_SECOND: Final = 100.0
"""Clients per second that a full server asks to retry."""

MIN_PENDING: Final = 16
PENDING_FRACTION: Final = 0.1
"""Fraction of `max_connections` that may be reserved above it until the clients are identified."""

MAX_ADDRESSES: Final = 65_536
"""Maximum number of remembered addresses with a handshake rate."""


class _Released:
    """State of a released reservation."""


_RELEASED: Final = _Released()


class Reservation:
    """Reservation of one connection slot.

    `release` is final, and only its first call has an effect. The state is one attribute, so a reservation cannot be
    released and confirmed at the same time.

    Attributes:
        address: Address of the client.
    """

    __slots__ = ("_holder", "_limiter", "address")

    def __init__(self, limiter: ConnectionLimiter, address: str) -> None:
        self._limiter = limiter
        self._holder: str | _Released | None = None
        self.address = address

    @property
    def client_id(self) -> str | None:
        """Client that it is confirmed for; `None` before, and after the release."""
        return self._holder if isinstance(self._holder, str) else None

    def confirm(self, client_id: str, *, replaces: Iterable[Reservation] = ()) -> None:
        """Confirm the reservation for a client.

        Args:
            client_id: The client.
            replaces: Reservations of connections that close as soon as this one is established.

        Raises:
            ConnectionLimitExceededError: The server is full, or the reservation was released before.
            TooManyConnectionsError: The client or its address has too many connections.
        """
        self.check()
        if self._holder is None:
            replaced = [one for one in replaces if one.client_id is not None]
            self._limiter._confirm(self.address, client_id, replaced)
            self._holder = client_id

    def check(self) -> None:
        """Raise if the reservation was released.

        Raises:
            ConnectionLimitExceededError: It was released, and another client may have the slot by now.
        """
        if self._holder is _RELEASED:
            raise self._limiter._released_error()

    def release(self) -> None:
        """Release the reservation. Does nothing if it was released."""
        if self._holder is not _RELEASED:
            client_id, self._holder = self.client_id, _RELEASED
            self._limiter._release(self.address, client_id)


class _Uncounted(Reservation):
    """Reservation that all connections share if there is no limit. It has no state."""

    __slots__ = ()

    def confirm(self, client_id: str, *, replaces: Iterable[Reservation] = ()) -> None:
        """Do nothing: there is no limit."""

    def release(self) -> None:
        """Do nothing: nothing is counted."""


class _Counter:
    """Count per key if there is a limit. Keys with a count of 0 are not stored."""

    __slots__ = ("_counts", "limit")

    def __init__(self, limit: int | None) -> None:
        self._counts: dict[str, int] = {}
        self.limit = limit

    def of(self, key: str) -> int:
        return self._counts.get(key, 0)

    def add(self, key: str) -> None:
        if self.limit is not None:
            self._counts[key] = self.of(key) + 1

    def remove(self, key: str) -> None:
        left = self.of(key) - 1
        if left > 0:
            self._counts[key] = left
        else:
            self._counts.pop(key, None)


class _DialRate:
    """Rate of handshakes, and retry times for rejected ones."""

    __slots__ = ("_dials", "_queue")

    def __init__(self, per_second: float, max_keys: int) -> None:
        self._dials = KeyedTokenBuckets(Rate(per_second, max(1.0, per_second)), max_keys)
        self._queue = RetryQueue(per_second, max_keys)

    def take(self, key: str, now: float) -> float:
        """Return 0.0 if one more handshake is allowed, otherwise the seconds after which to retry."""
        wait = self._dials.take(key, 1.0, now)
        return self._queue.next_delay(key, wait, now) if wait else 0.0


class ConnectionLimiter:
    """Counter and limits of connections and unconfirmed reservations.

    Args:
        max_connections: Maximum number of connections.
        max_per_client: Maximum number of connections of one client.
        max_per_address: Maximum number of connections from one address.
        rate: Handshakes per second.
        rate_per_address: Handshakes per second from one address.

    Attributes:
        by_address: Whether a limit depends on the client's address.
        enabled: Whether there is any limit.
        uncounted: The reservation that all connections share if there is none.
    """

    def __init__(
        self,
        *,
        max_connections: int | None = None,
        max_per_client: int | None = None,
        max_per_address: int | None = None,
        rate: float | None = None,
        rate_per_address: float | None = None,
    ) -> None:
        self._max = math.inf if max_connections is None else max_connections
        self._max_pending = max(MIN_PENDING, PENDING_FRACTION * self._max)
        self._established = 0
        self._pending = 0
        self._of_client = _Counter(max_per_client)
        self._from_address = _Counter(max_per_address)
        self._pending_from = _Counter(max_per_address)
        self._rate = None if rate is None else _DialRate(rate, 1)
        self._rates = None if rate_per_address is None else _DialRate(rate_per_address, MAX_ADDRESSES)
        self._retry_when_full = RetryQueue(RETRIES_PER_SECOND)
        self._max_rates = (rate, rate_per_address)
        self.uncounted: Reservation = _Uncounted(self, "")
        self.by_address = max_per_address is not None or rate_per_address is not None
        self.enabled = any(
            limit is not None for limit in (max_connections, max_per_client, max_per_address, *self._max_rates)
        )

    def __len__(self) -> int:
        """Number of established connections."""
        return self._established

    @property
    def is_full(self) -> bool:
        """Whether no reservation is possible, not even an unconfirmed one above the limit."""
        return self._established + self._pending >= self._max + self._max_pending

    def reserve(self, address: str, now: float) -> Reservation:
        """Reserve a slot for a handshake before its client is identified.

        Args:
            address: Address of the client; any text if `by_address` is false.
            now: Time on the monotonic clock.

        Raises:
            ConnectionLimitExceededError: The server is full, including unconfirmed reservations, or handshakes exceed
                the rate.
            TooManyConnectionsError: The address has too many connections, or its handshakes exceed the rate.
        """
        if not self.enabled:
            return self.uncounted
        # The limits of one address come first, so that rejections by them do not delay the retries of other clients.
        limit = self._from_address.limit
        if limit is not None and self._from_address.of(address) + self._pending_from.of(address) >= 2 * limit:
            raise self._too_many("max_connections_per_address", limit)
        if self._rates is not None and (wait := self._rates.take(address, now)):
            raise TooManyConnectionsError("max_connect_rate_per_address", self._max_rates[1] or 0, wait)
        if self.is_full:
            raise self._full()
        if self._rate is not None and (wait := self._rate.take("", now)):
            raise ConnectionLimitExceededError("max_connect_rate", self._max_rates[0] or 0, wait)
        self._pending += 1
        self._pending_from.add(address)
        return Reservation(self, address)

    def _confirm(self, address: str, client_id: str, replaces: Collection[Reservation]) -> None:
        same_address = any(one.address == address for one in replaces)
        limit = self._from_address.limit
        if limit is not None and self._from_address.of(address) - same_address >= limit:
            raise self._too_many("max_connections_per_address", limit)
        same_client = any(one.client_id == client_id for one in replaces)
        limit = self._of_client.limit
        if limit is not None and self._of_client.of(client_id) - same_client >= limit:
            raise self._too_many("max_connections_per_client", limit)
        # A replaced connection counts until it is closed. Several connections may be about to replace the same one
        # while they wait for a hook, but they come from the few reservations above the limit.
        if not replaces and self._established >= self._max:
            raise self._full()
        self._pending -= 1
        self._pending_from.remove(address)
        self._established += 1
        self._from_address.add(address)
        self._of_client.add(client_id)

    def _release(self, address: str, client_id: str | None) -> None:
        if client_id is None:
            self._pending -= 1
            self._pending_from.remove(address)
        else:
            self._established -= 1
            self._from_address.remove(address)
            self._of_client.remove(client_id)

    def _released_error(self) -> ConnectionLimitExceededError:
        """Return the error for a released reservation: another client may have the slot by now."""
        if self._max != math.inf:
            return self._full()
        by_address, by_client = self._from_address.limit, self._of_client.limit
        if by_address is not None:
            return self._too_many("max_connections_per_address", by_address)
        if by_client is not None:
            return self._too_many("max_connections_per_client", by_client)
        option = "max_connect_rate_per_address" if self._max_rates[0] is None else "max_connect_rate"
        return ConnectionLimitExceededError(option, self._max_rates[0] or self._max_rates[1] or 0, retry_delay())

    def _full(self) -> ConnectionLimitExceededError:
        wait = retry_delay() + self._retry_when_full.next_delay("", 0.0, monotonic())
        return ConnectionLimitExceededError("max_connections", int(self._max), wait)

    @staticmethod
    def _too_many(option: str, limit: int) -> TooManyConnectionsError:
        return TooManyConnectionsError(option, limit, retry_delay())


def retry_delay() -> float:
    """Return random seconds after which to retry, so that rejected clients do not return together."""
    return random.uniform(0.5, 1.5) * RETRY_WHEN_FULL  # noqa: S311 (spreads load)


def shutdown_error(window: float) -> ShutdownError:
    """Return the error with which a stopping server rejects a client, with a random retry delay.

    Args:
        window: Seconds over which the clients of that server are spread.
    """
    return ShutdownError(MIN_RETRY_DELAY + random.uniform(0.0, max(1.0, window)))  # noqa: S311 (spreads load)
