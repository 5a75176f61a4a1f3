"""What rooms remember for newcomers: the last messages of each, for a while."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Collection
from typing import Final, NamedTuple

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

MAX_BYTES: Final = 1024 * 1024
"""Bytes of messages that one room remembers at most, with the names of those that they were not for."""

MAX_ROOMS: Final = 10_000
"""Rooms that are remembered at most. The one in which nothing was said for longest goes first."""

MAX_ENDED: Final = 10_000
"""Rooms of which it is remembered at most that they have ended. The one that ended first is forgotten first."""

NAME_BYTES: Final = 64
"""What a name beside a message counts."""


class _HistoryEntry(NamedTuple):
    """One message: when it was sent, and to which clients and connections it was not."""

    at: float
    frame: EncodedMessage
    excluded: frozenset[str]

    @property
    def size(self) -> int:
        return self.frame.size + NAME_BYTES * len(self.excluded)


class _RoomMessages:
    """What was said in one room."""

    __slots__ = ("bytes", "messages")

    def __init__(self) -> None:
        self.messages: deque[_HistoryEntry] = deque()
        self.bytes = 0

    def drop_first(self) -> None:
        self.bytes -= self.messages.popleft().size

    def latest(self) -> float:
        """When something was said in it last."""
        return self.messages[-1].at if self.messages else -math.inf


class RoomHistory:
    """The last messages of each room, until the room ends.

    What is sent to a room before its first member comes is remembered for that one. What is sent to one that has ended
    is not, for as long as a message would be remembered.

    Args:
        max_messages: Messages of one room; 0 remembers nothing.
        max_age: Seconds that a message is remembered.
    """

    __slots__ = ("_ended", "_max_age", "_max_messages", "_rooms")

    def __init__(self, max_messages: int, max_age: float) -> None:
        self._max_age = max_age
        self._max_messages = max_messages
        self._rooms: OrderedDict[str, _RoomMessages] = (
            OrderedDict()
        )  # the one in which something was said last comes last
        self._ended: OrderedDict[str, float] = OrderedDict()  # when a room's last member left, the earliest first

    def __len__(self) -> int:
        """How many rooms are remembered."""
        return len(self._rooms)

    @property
    def enabled(self) -> bool:
        """Whether anything is remembered."""
        return self._max_messages > 0

    def add(self, room: str, frame: EncodedMessage, excluded: frozenset[str] = frozenset()) -> None:
        """Remember a message.

        Args:
            room: The room.
            frame: The message.
            excluded: The ids of the clients and connections that it was not for.
        """
        if not self._max_messages or frame.volatile:
            return
        now = monotonic()
        self._forget_ended(now)
        if room in self._ended:
            return
        said = self._rooms.get(room)
        if said is None:
            said = self._rooms[room] = _RoomMessages()
        self._rooms.move_to_end(room)
        said.messages.append(_HistoryEntry(now, frame, excluded))
        said.bytes += said.messages[-1].size
        while len(said.messages) > self._max_messages or (len(said.messages) > 1 and said.bytes > MAX_BYTES):
            said.drop_first()
        self._forget_silent(now - self._max_age)

    def last(
        self, room: str, count: int, names: Collection[str] = (), since: float = -math.inf
    ) -> list[EncodedMessage]:
        """The last messages of a room, at most `count`, oldest first.

        Args:
            room: The room.
            count: How many.
            names: The ids of the client and the connection that they are for: messages that excluded one are left out.
            since: The moment after which they were sent, on the monotonic clock.
        """
        said = self._rooms.get(room)
        if said is None or count <= 0:
            return []
        oldest = monotonic() - self._max_age
        while said.messages and said.messages[0].at < oldest:
            said.drop_first()
        found = [one.frame for one in said.messages if one.at >= since and one.excluded.isdisjoint(names)]
        return found[-count:]

    def begin(self, room: str) -> None:
        """A member has come to a room."""
        self._ended.pop(room, None)

    def end(self, room: str) -> None:
        """The last member of a room has left: forget what was said in it."""
        if not self._max_messages:
            return
        now = monotonic()
        self._rooms.pop(room, None)
        self._ended[room] = now
        self._ended.move_to_end(room)
        self._forget_ended(now)

    def _forget_ended(self, now: float) -> None:
        """Forget that rooms have ended, where no message of that time would be remembered any more."""
        while self._ended:
            ended = next(iter(self._ended.values()))
            if len(self._ended) <= MAX_ENDED and now - ended < self._max_age:
                break
            self._ended.popitem(last=False)

    def _forget_silent(self, oldest: float) -> None:
        """Forget rooms in which nothing was said since."""
        while self._rooms:
            said = next(iter(self._rooms.values()))
            if len(self._rooms) <= MAX_ROOMS and said.latest() >= oldest:
                break
            self._rooms.popitem(last=False)
