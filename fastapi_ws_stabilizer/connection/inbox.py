"""What a client has sent and nobody has read yet."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections import deque
from collections.abc import Callable
from typing import Final

from fastapi_ws_stabilizer.errors import ConcurrentReceiveError


class InboxClosed(Exception):
    """Everything has been read and nothing more will come."""


_Items = deque[tuple[str | bytes, int]]
"""Messages with their sizes: a str grows when it is encoded."""

_NOTHING: Final[_Items] = deque(maxlen=0)
"""What every empty inbox holds, so that an idle connection need not own a queue."""


class Inbox:
    """A bounded queue with one writer, the pump, and one reader.

    The bound is in messages and in bytes of memory that they hold. It is a mark, not a wall: the message that reaches
    it is taken, and the pump then waits for room before it reads the next one.
    """

    __slots__ = (
        "_alone",
        "_closed",
        "_items",
        "_max_bytes",
        "_max_messages",
        "_reader",
        "_relief",
        "held_bytes",
        "taken",
    )

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._alone: tuple[str | bytes, int] | None = None  # the only message that waits; then the queue is empty
        self._items = _NOTHING
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self.held_bytes = 0
        self.taken = 0
        self._closed = False
        self._reader: asyncio.Future[None] | None = None
        self._relief: Callable[[], None] | None = None

    def __len__(self) -> int:
        return 1 if self._alone is not None else len(self._items)

    @property
    def full(self) -> bool:
        """Whether the mark is reached."""
        return len(self) >= self._max_messages or self.held_bytes >= self._max_bytes

    def put(self, message: str | bytes) -> None:
        """Add a message and wake the reader."""
        size = sys.getsizeof(message)
        if self._items:
            self._items.append((message, size))
        elif self._alone is None:
            self._alone = (message, size)
        else:
            self._items = deque((self._alone, (message, size)))
            self._alone = None
        self.held_bytes += size
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def room(self, timeout: float | None = None) -> bool:
        """Wait until the mark is no longer reached or the inbox is closed; tell whether it is so. Cancelling is safe.

        Args:
            timeout: Seconds to wait at most; for ever when left out.
        """
        if self.full and not self._closed:
            room = asyncio.get_running_loop().create_future()
            self._relief = functools.partial(_wake, room)
            try:
                await asyncio.wait({room}, timeout=timeout)
            finally:
                self._relief = None
        return self._closed or not self.full

    def call_when_room(self, relief: Callable[[], None]) -> None:
        """Call a function, once, as soon as the mark is no longer reached or the inbox is closed."""
        self._relief = relief

    def _relieve(self) -> None:
        relief, self._relief = self._relief, None
        if relief is not None:
            relief()

    async def get(self) -> str | bytes:
        """Wait for the next message. Cancelling loses nothing: a message is taken out only when it is returned.

        Raises:
            InboxClosed: Nothing more will come.
            ConcurrentReceiveError: Another task is waiting already.
        """
        if self._reader is not None:
            raise ConcurrentReceiveError
        while self._alone is None and not self._items:
            if self._closed:
                raise InboxClosed
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._alone is not None:
            message, size = self._alone
            self._alone = None
        else:
            message, size = self._items.popleft()
        self.held_bytes -= size
        self.taken += 1
        if not self._items:
            self._items = _NOTHING
        if self._relief is not None and not self.full:
            self._relieve()
        return message

    def close(self, *, discard: bool) -> int:
        """Take nothing more, wake who waits, and tell how many unread messages were thrown away.

        Args:
            discard: Whether what has not been read is thrown away.
        """
        self._closed = True
        discarded = 0
        if discard:
            discarded = len(self)
            self._alone = None
            self._items = _NOTHING
            self.held_bytes = 0
        if self._reader is not None:
            _wake(self._reader)
        self._relieve()
        return discarded


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
