"""History of rooms: the last messages of each room, for recipients that join later."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Collection
from typing import Final, NamedTuple

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

MAX_BYTES: Final = 1024 * 1024
"""Maximum bytes of messages in the history of one room, including the ids of excluded clients."""

MAX_ROOMS: Final = 10_000
"""Rooms with a history. The room with the oldest last message is forgotten first."""

MAX_ENDED: Final = 10_000
"""Ended rooms that are remembered. The room that ended first is forgotten first."""

EXCLUDED_ID_BYTES: Final = 64
"""Bytes that are counted for an excluded id beside a message."""


class _HistoryEntry(NamedTuple):
    """One message with the time it was sent and the clients and connections it excludes."""

    at: float
    frame: EncodedMessage
    excluded: frozenset[str]

    @property
    def size(self) -> int:
        return self.frame.size + EXCLUDED_ID_BYTES * len(self.excluded)


class _RoomMessages:
    """Messages of one room."""

    __slots__ = ("bytes", "messages")

    def __init__(self) -> None:
        self.messages: deque[_HistoryEntry] = deque()
        self.bytes = 0

    def drop_first(self) -> None:
        self.bytes -= self.messages.popleft().size

    def latest(self) -> float:
        """Time of the last message."""
        return self.messages[-1].at if self.messages else -math.inf


class RoomHistory:
    """Last messages of each room, until the room ends.

    Messages to a room before its first member joins are stored. After a room has ended, messages to it are not stored
    for `max_age` seconds.

    Args:
        max_messages: Messages per room; 0 stores nothing.
        max_age: Seconds that a message is stored.

    Attributes:
        enabled: Whether messages are stored.
    """

    __slots__ = ("_ended", "_max_age", "_max_messages", "_rooms", "enabled")

    def __init__(self, max_messages: int, max_age: float) -> None:
        self._max_age = max_age
        self._max_messages = max_messages
        self.enabled = max_messages > 0
        self._rooms: OrderedDict[str, _RoomMessages] = OrderedDict()  # by last message, oldest first
        self._ended: OrderedDict[str, float] = OrderedDict()  # time when a room's last member left, the earliest first

    def __len__(self) -> int:
        """Number of rooms with a history."""
        return len(self._rooms)

    def add(self, room: str, frame: EncodedMessage, excluded: frozenset[str] = frozenset()) -> None:
        """Store a message.

        Args:
            room: The room.
            frame: The message.
            excluded: Ids of the clients and connections that do not get it.
        """
        if not self._max_messages or frame.volatile:
            return
        now = monotonic()
        self._forget_ended(now)
        if room in self._ended:
            return
        stored = self._rooms.get(room)
        if stored is None:
            stored = self._rooms[room] = _RoomMessages()
        self._rooms.move_to_end(room)
        stored.messages.append(_HistoryEntry(now, frame, excluded))
        stored.bytes += stored.messages[-1].size
        while len(stored.messages) > self._max_messages or (len(stored.messages) > 1 and stored.bytes > MAX_BYTES):
            stored.drop_first()
        self._forget_stale(now - self._max_age)

    def last(
        self, room: str, count: int, recipient_ids: Collection[str] = (), since: float = -math.inf
    ) -> list[EncodedMessage]:
        """Return the last messages of a room, at most `count`, oldest first.

        Args:
            room: The room.
            count: Maximum number of messages.
            recipient_ids: Ids of the asking client and connection. Messages that exclude one of them are left out.
            since: Earliest time at which the messages were sent, on the monotonic clock.
        """
        stored = self._rooms.get(room)
        if stored is None or count <= 0:
            return []
        oldest = monotonic() - self._max_age
        while stored.messages and stored.messages[0].at < oldest:
            stored.drop_first()
        found = [one.frame for one in stored.messages if one.at >= since and one.excluded.isdisjoint(recipient_ids)]
        return found[-count:]

    def begin(self, room: str) -> None:
        """Mark a room as live again, because a member has joined."""
        self._ended.pop(room, None)

    def end(self, room: str) -> None:
        """Forget the messages of a room, because its last member has left."""
        if not self._max_messages:
            return
        now = monotonic()
        self._rooms.pop(room, None)
        self._ended[room] = now
        self._ended.move_to_end(room)
        self._forget_ended(now)

    def _forget_ended(self, now: float) -> None:
        """Forget ended rooms that are older than any message that would be stored."""
        while self._ended:
            ended = next(iter(self._ended.values()))
            if len(self._ended) <= MAX_ENDED and now - ended < self._max_age:
                break
            self._ended.popitem(last=False)

    def _forget_stale(self, oldest: float) -> None:
        """Forget rooms without a message since `oldest`, and rooms above the limit."""
        while self._rooms:
            stored = next(iter(self._rooms.values()))
            if len(self._rooms) <= MAX_ROOMS and stored.latest() >= oldest:
                break
            self._rooms.popitem(last=False)
