"""Who may come in: how many at a time, in all and from one address, and how many in a second.

Whoever dials *knocks* first, which costs a few dictionary look-ups and nothing else. A place is counted from then on,
but whether there is one is only decided when it is known who has come (`Place.settle`): a client whose old connection
is half-open takes that one's place and needs none of its own, or a full server could never get rid of its ghosts.
So while a server is full a few may stand in the lobby and say who they are. The lobby has its limit too, or those who
say nothing would have none.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable
from typing import Final

from fastapi_ws_stabilizer.errors import ConnectionLimitExceededError, TooManyConnectionsError
from fastapi_ws_stabilizer.limits.rate import Rate, RateTable

RETRY_WHEN_FULL: Final = 5.0
"""Seconds after which a client that found no room may try again, on average: half of that to half as much again."""

MIN_LOBBY: Final = 16
LOBBY: Final = 0.1
"""The part of `max_connections` that may come beyond it, while it is found out who they are."""

MAX_ADDRESSES: Final = 65_536
"""Addresses whose rate is remembered at most."""


class Place:
    """The place of one connection. It is given back by `leave`, once, whoever calls it first.

    Attributes:
        address: Where its client comes from.
        client_id: Whose it is, from when it was decided that it may stay.
    """

    __slots__ = ("_admission", "address", "client_id")

    def __init__(self, admission: Admission | None, address: str) -> None:
        self._admission = admission
        self.address = address
        self.client_id: str | None = None

    def settle(self, client_id: str, *, replaces: Iterable[Place] = ()) -> None:
        """It is known who has come: let it stay, if there is room.

        Args:
            client_id: Who has come.
            replaces: Places whose connections are going to end as soon as this one is there.

        Raises:
            ConnectionLimitExceededError: There is no room.
            TooManyConnectionsError: There is none for this client, or for its address.
        """
        if self._admission is not None and self.client_id is None:
            taken = [one for one in replaces if one._admission is not None and one.client_id is not None]
            self._admission._settle(self.address, client_id, taken)
            self.client_id = client_id

    def leave(self) -> None:
        """Give the place back. Nothing happens if that was done."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._leave(self.address, self.client_id)


_UNCOUNTED: Final = Place(None, "")
"""The place of everybody where there is no limit."""


class _Tally:
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


class Admission:
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
        self._lobby = max(MIN_LOBBY, LOBBY * self._max)
        self._inside = 0
        self._knocking = 0
        self._of_client = _Tally(max_per_client)
        self._from_address = _Tally(max_per_address)
        self._knocking_from = _Tally(max_per_address)
        self._rate = None if rate is None else RateTable(_burst(rate), 1)
        self._rates = None if rate_per_address is None else RateTable(_burst(rate_per_address), MAX_ADDRESSES)
        self._max_rates = (rate, rate_per_address)
        self.by_address = max_per_address is not None or rate_per_address is not None
        self._on = any(
            limit is not None for limit in (max_connections, max_per_client, max_per_address, *self._max_rates)
        )

    def __len__(self) -> int:
        """How many are inside."""
        return self._inside

    @property
    def crowded(self) -> bool:
        """Whether there is no room, not even in the lobby."""
        return self._inside + self._knocking >= self._max + self._lobby

    def knock(self, address: str, now: float) -> Place:
        """Somebody has come, and it is not known yet who.

        Args:
            address: From where; any text where it does not matter.
            now: The time, in monotonic seconds.

        Raises:
            ConnectionLimitExceededError: There is no room, and the lobby is full too; or too many came lately.
            TooManyConnectionsError: There are too many from there, or too many came from there lately.
        """
        if not self._on:
            return _UNCOUNTED
        if self.crowded:
            raise self._full()
        most = self._from_address.most
        if most is not None and self._from_address.of(address) + self._knocking_from.of(address) >= 2 * most:
            raise self._too_many("max_connections_per_address", most)
        if self._rates is not None and (wait := self._rates.take(address, 1.0, now)):
            raise TooManyConnectionsError("max_connect_rate_per_address", self._max_rates[1] or 0, wait)
        if self._rate is not None and (wait := self._rate.take("", 1.0, now)):
            raise ConnectionLimitExceededError("max_connect_rate", self._max_rates[0] or 0, wait)
        self._knocking += 1
        self._knocking_from.add(address)
        return Place(self, address)

    def _settle(self, address: str, client_id: str, replaces: Collection[Place]) -> None:
        # Whoever is replaced is counted until it is gone. Several may be about to replace the same one, and wait for a
        # hook meanwhile: they came through the lobby, so they are few.
        if not replaces and self._inside >= self._max:
            raise self._full()
        here = any(one.address == address for one in replaces)
        most = self._from_address.most
        if most is not None and self._from_address.of(address) - here >= most:
            raise self._too_many("max_connections_per_address", most)
        its_own = any(one.client_id == client_id for one in replaces)
        most = self._of_client.most
        if most is not None and self._of_client.of(client_id) - its_own >= most:
            raise self._too_many("max_connections_per_client", most)
        self._knocking -= 1
        self._knocking_from.remove(address)
        self._inside += 1
        self._from_address.add(address)
        self._of_client.add(client_id)

    def _leave(self, address: str, client_id: str | None) -> None:
        if client_id is None:
            self._knocking -= 1
            self._knocking_from.remove(address)
        else:
            self._inside -= 1
            self._from_address.remove(address)
            self._of_client.remove(client_id)

    def _full(self) -> ConnectionLimitExceededError:
        return ConnectionLimitExceededError("max_connections", int(self._max), retry_when_full())

    @staticmethod
    def _too_many(limit: str, most: int) -> TooManyConnectionsError:
        return TooManyConnectionsError(limit, most, retry_when_full())


def retry_when_full() -> float:
    """Seconds after which to try again, different for each who is told, so that they do not all come at once."""
    return random.uniform(0.5, 1.5) * RETRY_WHEN_FULL  # noqa: S311 (spreads load)


def _burst(per_second: float) -> Rate:
    return Rate(per_second, max(1.0, per_second))
