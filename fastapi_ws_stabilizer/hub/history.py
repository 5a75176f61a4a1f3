"""What rooms remember for newcomers: the last messages of each, for a while."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.wire.payload import Frame

MAX_BYTES: Final = 1024 * 1024
"""Bytes of messages that one room remembers at most."""

MAX_ROOMS: Final = 10_000
"""Rooms that are remembered at most. The one in which nothing was said for longest goes first."""


class _Said:
    """What was said in one room."""

    __slots__ = ("bytes", "messages")

    def __init__(self) -> None:
        self.messages: deque[tuple[float, Frame]] = deque()
        self.bytes = 0

    def drop_first(self) -> None:
        self.bytes -= self.messages.popleft()[1].size


class History:
    """The last messages of each room. A room that is empty is remembered as long as its messages are.

    Args:
        max_messages: Messages of one room; 0 remembers nothing.
        max_age: Seconds that a message is remembered.
    """

    __slots__ = ("_max_age", "_max_messages", "_rooms")

    def __init__(self, max_messages: int, max_age: float) -> None:
        self._max_messages = max_messages
        self._max_age = max_age
        self._rooms: OrderedDict[str, _Said] = OrderedDict()  # the one in which somebody spoke last comes last

    def __len__(self) -> int:
        """How many rooms are remembered."""
        return len(self._rooms)

    def add(self, room: str, frame: Frame) -> None:
        """Remember a message."""
        if not self._max_messages or frame.volatile:
            return
        now = monotonic()
        said = self._rooms.get(room)
        if said is None:
            said = self._rooms[room] = _Said()
        self._rooms.move_to_end(room)
        said.messages.append((now, frame))
        said.bytes += frame.size
        while len(said.messages) > self._max_messages or (len(said.messages) > 1 and said.bytes > MAX_BYTES):
            said.drop_first()
        self._forget_silent(now - self._max_age)

    def last(self, room: str, count: int) -> list[Frame]:
        """The last messages of a room, at most `count`, oldest first."""
        said = self._rooms.get(room)
        if said is None or count <= 0:
            return []
        oldest = monotonic() - self._max_age
        while said.messages and said.messages[0][0] < oldest:
            said.drop_first()
        return [frame for _, frame in list(said.messages)[-count:]]

    def _forget_silent(self, oldest: float) -> None:
        """Forget rooms in which nothing was said since."""
        while self._rooms:
            said = next(iter(self._rooms.values()))
            if len(self._rooms) <= MAX_ROOMS and said.messages and said.messages[-1][0] >= oldest:
                break
            self._rooms.popitem(last=False)
