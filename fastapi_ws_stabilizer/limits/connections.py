"""Who may come in: how many at a time, in all and from one address, and how many in a second.

Whoever dials *knocks* first, which costs a few dictionary look-ups and nothing else. A place is counted from then on,
but whether there is one is only decided when it is known who has come (`RouteEntry.settle`): a client whose old
connection is half-open takes that one's place and needs none of its own, or a full server could never get rid of its
ghosts. So while a server is full a few may stand in the lobby and say who they are. The lobby has its limit too, or
those who say nothing would have none.
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
"""Seconds after which a client that found no room may try again, on average: half of that to half as much again."""

MIN_RETRY_DELAY: Final = 1.0
"""Seconds after which a client of a server that stops may come back at the earliest: another one is there by then."""

BACK_PER_SECOND: Final = 100.0
"""How many that found no room are asked back in a second."""

MIN_PENDING: Final = 16
PENDING_FRACTION: Final = 0.1
"""The part of `max_connections` that may come beyond it, while it is found out who they are."""

MAX_ADDRESSES: Final = 65_536
"""Addresses whose rate is remembered at most."""


class _Released:
    """The state of a reservation that was given back."""


_RELEASED: Final = _Released()


class Reservation:
    """The reservation of one connection. The first call of `leave` releases it, and a released one stays released.

    Its state is in one attribute, so that it cannot be released and confirmed at the same time.

    Attributes:
        address: Where its client comes from.
    """

    __slots__ = ("_admission", "_holder", "address")

    def __init__(self, admission: ConnectionLimiter, address: str) -> None:
        self._admission = admission
        self._holder: str | _Released | None = None
        self.address = address

    @property
    def client_id(self) -> str | None:
        """The client that it is confirmed for; `None` before, and when it is released."""
        return self._holder if isinstance(self._holder, str) else None

    def confirm(self, client_id: str, *, replaces: Iterable[Reservation] = ()) -> None:
        """Confirm the reservation for a client, if there is room.

        Args:
            client_id: The client.
            replaces: Places whose connections are going to end as soon as this one is there.

        Raises:
            ConnectionLimitExceededError: There is no room, or the reservation was released before.
            TooManyConnectionsError: There is none for this client, or for its address.
        """
        self.check()
        if self._holder is None:
            taken = [one for one in replaces if one.client_id is not None]
            self._admission._confirm(self.address, client_id, taken)
            self._holder = client_id

    def check(self) -> None:
        """Refuse to go on with a reservation that was released.

        Raises:
            ConnectionLimitExceededError: It was, and another client may have the room by now.
        """
        if self._holder is _RELEASED:
            raise self._admission._released_error()

    def release(self) -> None:
        """Release the reservation. Nothing happens if that was done."""
        if self._holder is not _RELEASED:
            client_id, self._holder = self.client_id, _RELEASED
            self._admission._release(self.address, client_id)


class _Uncounted(Reservation):
    """The reservation that all connections share where there is no limit: it has no state."""

    __slots__ = ()

    def confirm(self, client_id: str, *, replaces: Iterable[Reservation] = ()) -> None:
        """Do nothing: there is room."""

    def release(self) -> None:
        """Do nothing: nothing is counted."""


class _Counter:
    """How many there are of each, counted only if somebody wants to know. Of whom there is none, nothing is kept."""

    __slots__ = ("_counts", "most")

    def __init__(self, most: int | None) -> None:
        self._counts: dict[str, int] = {}
        self.most = most

    def of(self, key: str) -> int:
        return self._counts.get(key, 0)

    def add(self, key: str) -> None:
        if self.most is not None:
            self._counts[key] = self.of(key) + 1

    def remove(self, key: str) -> None:
        left = self.of(key) - 1
        if left > 0:
            self._counts[key] = left
        else:
            self._counts.pop(key, None)


class _DialRate:
    """How often clients may dial, and when those that are refused may try again."""

    __slots__ = ("_dials", "_queue")

    def __init__(self, per_second: float, max_keys: int) -> None:
        self._dials = KeyedTokenBuckets(Rate(per_second, max(1.0, per_second)), max_keys)
        self._queue = RetryQueue(per_second, max_keys)

    def take(self, key: str, now: float) -> float:
        """0.0 if one more may dial; otherwise the seconds after which it is its turn."""
        wait = self._dials.take(key, 1.0, now)
        return self._queue.wait(key, wait, now) if wait else 0.0


class ConnectionLimiter:
    """Counts connections, and those that are on their way to be one.

    Args:
        max_connections: Most connections.
        max_per_client: Most of one client.
        max_per_address: Most from one address.
        rate: How often somebody may come.
        rate_per_address: How often from one address.

    Attributes:
        by_address: Whether it matters where somebody comes from.
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
        self._retry_when_full = RetryQueue(BACK_PER_SECOND)
        self._max_rates = (rate, rate_per_address)
        self._uncounted = _Uncounted(self, "")
        self.by_address = max_per_address is not None or rate_per_address is not None
        self._on = any(
            limit is not None for limit in (max_connections, max_per_client, max_per_address, *self._max_rates)
        )

    def __len__(self) -> int:
        """How many are inside."""
        return self._established

    @property
    def is_full(self) -> bool:
        """Whether there is no room, not even in the lobby."""
        return self._established + self._pending >= self._max + self._max_pending

    def reserve(self, address: str, now: float) -> Reservation:
        """Somebody has come, and it is not known yet who.

        Args:
            address: From where; any text where it does not matter.
            now: The time, in monotonic seconds.

        Raises:
            ConnectionLimitExceededError: There is no room, and the lobby is full too; or too many came lately.
            TooManyConnectionsError: There are too many from there, or too many came from there lately.
        """
        if not self._on:
            return self._uncounted
        # The limits of one address come first: beyond them it moves back no other client's turn.
        most = self._from_address.most
        if most is not None and self._from_address.of(address) + self._pending_from.of(address) >= 2 * most:
            raise self._too_many("max_connections_per_address", most)
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
        here = any(one.address == address for one in replaces)
        most = self._from_address.most
        if most is not None and self._from_address.of(address) - here >= most:
            raise self._too_many("max_connections_per_address", most)
        its_own = any(one.client_id == client_id for one in replaces)
        most = self._of_client.most
        if most is not None and self._of_client.of(client_id) - its_own >= most:
            raise self._too_many("max_connections_per_client", most)
        # Whoever is replaced is counted until it is gone. Several may be about to replace the same one, and wait for a
        # hook meanwhile: they came through the lobby, so they are few.
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
        """Why a reservation that was released cannot be confirmed: another client may have it by now."""
        if self._max != math.inf:
            return self._full()
        by_address, by_client = self._from_address.most, self._of_client.most
        if by_address is not None:
            return self._too_many("max_connections_per_address", by_address)
        if by_client is not None:
            return self._too_many("max_connections_per_client", by_client)
        limit = "max_connect_rate_per_address" if self._max_rates[0] is None else "max_connect_rate"
        return ConnectionLimitExceededError(limit, self._max_rates[0] or self._max_rates[1] or 0, retry_delay())

    def _full(self) -> ConnectionLimitExceededError:
        wait = retry_delay() + self._retry_when_full.wait("", 0.0, monotonic())
        return ConnectionLimitExceededError("max_connections", int(self._max), wait)

    @staticmethod
    def _too_many(limit: str, most: int) -> TooManyConnectionsError:
        return TooManyConnectionsError(limit, most, retry_delay())


def retry_delay() -> float:
    """Seconds after which to try again, different for each who is told, so that they do not all come at once."""
    return random.uniform(0.5, 1.5) * RETRY_WHEN_FULL  # noqa: S311 (spreads load)


def shutdown_error(window: float) -> ShutdownError:
    """Why a stopping server does not take a client, and when that may try again, different for each.

    Args:
        window: Seconds that the clients of that server are spread over.
    """
    return ShutdownError(MIN_RETRY_DELAY + random.uniform(0.0, max(1.0, window)))  # noqa: S311 (spreads load)
