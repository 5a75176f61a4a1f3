"""What plain clients have left behind that hold a reconnect token: their rooms and their user data, for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.limits.kept import Kept

MAX_EXPECTED: Final = 100_000
"""Clients that are expected back at most, because they hold a token. The one that got it first is forgotten first."""


@dataclass(eq=False)
class LeftBehind:
    """What one connection has left. To the ledger it is a client that is away.

    Attributes:
        rooms: Its rooms, and how its client is described in each.
        user_data: The application's.
        until: Until when it is kept.
        face: The socket that has left it.
        forget: Called when it can be kept no longer, because room is needed.
        described_bytes: How much presence metadata is in `rooms`.
    """

    rooms: Mapping[str, Mapping[str, Any]]
    user_data: Kept
    until: float
    face: Any
    forget: Callable[[LeftBehind], None]
    described_bytes: int = 0

    @property
    def connection_id(self) -> str:
        """The id of the connection that has left it."""
        return str(self.face.connection_id)

    @property
    def held_memory(self) -> int:
        """Bytes that it holds."""
        return self.user_data.held_bytes + self.described_bytes

    def evict(self) -> None:
        """Forget it, because room is needed for others."""
        self.forget(self)

    def holds_too_much(self, _: int) -> None:
        """Forget it, because it holds more than may be."""
        self.forget(self)


class LeftLuggage:
    """Keeps it.

    A plain client has no session that the server could know it by, so only those that were given a token are expected
    back, and only for `ttl` seconds.

    Args:
        ttl: Seconds that it is kept.
        max_kept: How many connections' are kept at most.
    """

    def __init__(self, ttl: float, max_kept: int) -> None:
        self._ttl = ttl
        self._max_kept = max_kept
        self._expected: OrderedDict[str, None] = OrderedDict()
        self._kept: OrderedDict[str, LeftBehind] = OrderedDict()  # by client id, the one that left first comes first

    def __len__(self) -> int:
        """Of how many connections something is kept."""
        return len(self._kept)

    def expect(self, client_id: str) -> None:
        """A client has been given a token."""
        self._expected[client_id] = None
        self._expected.move_to_end(client_id)
        while len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    def is_expected(self, client_id: str) -> bool:
        """Whether a client may come back with a token."""
        return self._ttl > 0 and client_id in self._expected

    def leave(self, client_id: str, left: LeftBehind) -> list[LeftBehind]:
        """Keep what a connection has left. Of several of one client the last one is kept.

        Returns:
            What is kept no longer, because it is too old or too much.
        """
        gone = self.collect()
        before = self._kept.pop(client_id, None)
        if before is not None:
            gone.append(before)
        left.until = monotonic() + self._ttl
        self._kept[client_id] = left
        while len(self._kept) > self._max_kept:
            gone.append(self._kept.popitem(last=False)[1])
        return gone

    def of(self, client_id: str) -> LeftBehind | None:
        """What is kept for a client, which stays where it is."""
        return self._kept.get(client_id)

    def take(self, client_id: str) -> LeftBehind | None:
        """What a client gets back that proves to be who it was; `None` if nothing is kept any more."""
        left = self._kept.get(client_id)
        if left is None or left.until <= monotonic():  # `collect` takes it out, and its end is told
            return None
        del self._kept[client_id]
        return left

    def drop(self, left: LeftBehind) -> bool:
        """Keep something no longer; `False` if it was not kept."""
        if self._kept.get(left.face.client_id) is not left:
            return False
        del self._kept[left.face.client_id]
        return True

    def drop_of(self, client_id: str) -> LeftBehind | None:
        """Keep no longer what a client has left, and expect it no more."""
        self._expected.pop(client_id, None)
        return self._kept.pop(client_id, None)

    def next_due(self) -> float | None:
        """When the first of it is kept no longer."""
        return next((left.until for left in self._kept.values()), None)

    def collect(self) -> list[LeftBehind]:
        """Take out what is kept no longer."""
        now, gone = monotonic(), []
        while self._kept:
            client_id, left = next(iter(self._kept.items()))
            if left.until > now:
                break
            gone.append(self._kept.pop(client_id))
        return gone

    def clear(self) -> list[LeftBehind]:
        """Take all of it out."""
        gone = list(self._kept.values())
        self._kept.clear()
        return gone
