"""Bounded queue of received messages that the endpoint has not read yet."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections import deque
from collections.abc import Callable
from copy import copy
from typing import Final

from fastapi_ws_stabilizer.errors import ConcurrentReceiveError
from fastapi_ws_stabilizer.memory.budget import UNREAD_OVERHEAD_BYTES, MemoryBudget
from fastapi_ws_stabilizer.tasks import LazyEvent, wait_for_all
from fastapi_ws_stabilizer.wire.v1.frames import Message


class InboxClosed(Exception):
    """Error of a read from an inbox that is closed and empty, or was transferred.

    Attributes:
        waited: Whether the read has waited, so that its task has yielded to the event loop.
    """

    def __init__(self, *, waited: bool) -> None:
        self.waited = waited


Item = str | bytes | Message
"""Entry of an inbox: the raw message of a plain client, or the parsed message of a `stabilizer.v1.json` client."""

_Items = deque[tuple[Item, int]]
"""Messages with their sizes at receipt, because the size of a str grows when it is encoded."""

_EMPTY: Final[_Items] = deque(maxlen=0)
"""Queue shared by all empty inboxes, so that an idle connection owns none."""


class InboxLimits:
    """Bounds and memory budget shared by all inboxes of a manager.

    Args:
        max_messages: Maximum number of waiting messages.
        max_bytes: Maximum bytes of memory held by waiting messages.
        budget: Memory budget that counts the messages.

    Attributes:
        drops: Whether the oldest messages are dropped for new ones, because the endpoint does not read.
        undecided: Whether it is not decided yet if the endpoint reads.
        keeping: The same bounds, for inboxes that drop nothing.
        dropping: The same bounds, for inboxes that drop the oldest messages.
        deciding: The same bounds, for inboxes with an undecided endpoint.
    """

    __slots__ = ("budget", "deciding", "dropping", "drops", "keeping", "max_bytes", "max_messages", "undecided")

    def __init__(self, max_messages: int, max_bytes: int, budget: MemoryBudget | None = None) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.budget = MemoryBudget() if budget is None else budget
        self.drops = self.undecided = False
        self.keeping = self.dropping = self.deciding = self
        dropping, deciding = copy(self), copy(self)
        dropping.drops = deciding.undecided = True
        for one in (self, dropping, deciding):
            one.dropping, one.deciding = dropping, deciding


_UNCOUNTED: Final = InboxLimits(0, 0)
"""Limits of inboxes that no memory budget counts any more."""


class Pause:
    """State of a connection while reading is paused because its inbox is full.

    Attributes:
        sent: Whether the connection's own methods have sent anything since the pause began. Broadcasts and heartbeats
            do not count, because they do not show that the endpoint is running.
    """

    __slots__ = ("sent",)

    def __init__(self) -> None:
        self.sent = False


class Inbox:
    """Bounded queue with one writer, the read pump or the direct reader, and one reader.

    The bounds count messages and the bytes of memory that they hold. They are soft. The message that reaches a bound is
    accepted, and the pump then waits for room before it reads the next one.

    If the client has a session, the inbox belongs to it and moves from one connection to the next.
    """

    __slots__ = (
        "_closed",
        "_drained",
        "_handling",
        "_items",
        "_limits",
        "_on_room",
        "_reader",
        "_single",
        "held_bytes",
        "reads",
    )

    def __init__(self, limits: InboxLimits) -> None:
        self._single: tuple[Item, int] | None = None  # the only waiting message; the queue is then empty
        self._items = _EMPTY
        self._limits = limits
        self.held_bytes = 0
        self.reads = 0
        self._closed = False
        self._reader: asyncio.Future[None] | None = None
        self._on_room: Callable[[], None] | None = None
        self._handling = False  # whether the reader may still be handling the last message
        self._drained: LazyEvent | None = None

    def __len__(self) -> int:
        return 1 if self._single is not None else len(self._items)

    @property
    def full(self) -> bool:
        """Whether a bound is reached."""
        limits = self._limits
        return len(self) >= limits.max_messages or self.held_bytes >= limits.max_bytes

    @property
    def drops(self) -> bool:
        """Whether the oldest messages are dropped for new ones, because the endpoint does not read."""
        return self._limits.drops

    @property
    def undecided(self) -> bool:
        """Whether it is not decided yet if the endpoint reads."""
        return self._limits.undecided

    def begin_to_decide(self) -> None:
        """Mark the endpoint as undecided until `drop_when_full` or `end_to_decide` is called."""
        if not self.drops:
            self._limits = self._limits.deciding

    def end_to_decide(self) -> None:
        """Stop waiting for a decision. It stays unknown whether the endpoint reads."""
        if self.undecided:
            self._limits = self._limits.keeping

    def drop_when_full(self) -> None:
        """Drop the oldest messages for new ones from now on. A later reader gets the remaining messages."""
        self._limits = self._limits.dropping

    @property
    def ignored(self) -> bool:
        """Whether messages are dropped, and no reader has read since or is waiting."""
        return self._limits.drops and not self.has_reader

    @property
    def has_reader(self) -> bool:
        """Whether a message was read since `reads` was reset, or a reader is waiting or about to read."""
        return bool(self.reads) or self._reader is not None  # `_reader` stays set until its message is returned

    def take_requests(self) -> list[Message]:
        """Remove and return the requests, which are the messages with an id."""
        waiting = tuple(self._items) if self._single is None else (self._single,)
        requests = [(item, size) for item, size in waiting if isinstance(item, Message) and item.id is not None]
        if not requests:
            return []
        taken = sum(size for _, size in requests)
        self.held_bytes -= taken
        self._limits.budget.total -= taken + UNREAD_OVERHEAD_BYTES * len(requests)
        rest = deque(entry for entry in waiting if not (isinstance(entry[0], Message) and entry[0].id is not None))
        self._single = None
        self._items = rest or _EMPTY
        if not self.full:
            self._notify_room()
        return [item for item, _ in requests]

    def drop_oldest(self) -> list[Item]:
        """Remove and return the oldest messages until no bound is reached."""
        dropped: list[Item] = []
        while self.full and len(self):
            if self._single is not None:
                message, size = self._single
                self._single = None
            else:
                message, size = self._items.popleft()
            self.held_bytes -= size
            self._limits.budget.total -= size + UNREAD_OVERHEAD_BYTES
            dropped.append(message)
        if not self._items:
            self._items = _EMPTY
        self._notify_room()
        return dropped

    @property
    def has_waiting_reader(self) -> bool:
        """Whether a reader is waiting, so that the next message is read at once."""
        return self._reader is not None and not self._reader.done()

    @property
    def counted_bytes(self) -> int:
        """Bytes counted in the memory budget, including the overhead of each message."""
        return self.held_bytes + UNREAD_OVERHEAD_BYTES * len(self)

    def put(self, message: Item, size: int | None = None) -> None:
        """Add a message and wake the reader.

        Args:
            message: The message.
            size: Bytes of memory that it holds, if `sys.getsizeof` does not show them.
        """
        if size is None:
            size = sys.getsizeof(message)
        if self._items:
            self._items.append((message, size))
        elif self._single is None:
            self._single = (message, size)
        else:
            self._items = deque((self._single, (message, size)))
            self._single = None
        self.held_bytes += size
        budget = self._limits.budget
        budget.total += size + UNREAD_OVERHEAD_BYTES
        if budget.total > budget.limit:
            budget.schedule_eviction()
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def wait_for_room(self, timeout: float | None = None, take: Callable[[], None] | None = None) -> bool:
        """Wait until no bound is reached or the inbox is closed. Cancelling is safe.

        Args:
            timeout: Maximum wait in seconds; unbounded if omitted.
            take: Called synchronously when there is room or the inbox is closed, but not on timeout. It runs before the
                caller that closes the inbox continues and may cancel the waiting task.

        Returns:
            Whether there is room or the inbox is closed.
        """
        if self.full and not self._closed:
            room = asyncio.get_running_loop().create_future()
            on_room = self._on_room = functools.partial(_wake, room, take)
            try:
                await wait_for_all([room], timeout)
            finally:
                if self._on_room is on_room:  # otherwise the inbox was transferred and another callback is set
                    self._on_room = None
        return self._closed or not self.full

    def notify_when_room(self, on_room: Callable[[], None]) -> None:
        """Call a function once, as soon as no bound is reached or the inbox is closed."""
        self._on_room = on_room

    def _notify_room(self) -> None:
        on_room, self._on_room = self._on_room, None
        if on_room is not None:
            on_room()

    async def get(self) -> Item:
        """Wait for the next message. Cancelling is safe, because a message is removed only when it is returned.

        Raises:
            InboxClosed: The inbox is closed and empty, or was transferred.
            ConcurrentReceiveError: Another task is already waiting.
        """
        if self._reader is not None:
            raise ConcurrentReceiveError
        self._handling = waited = False
        while self._single is None and not self._items:
            if self._closed:
                if self._drained is not None:
                    self._drained.set()
                raise InboxClosed(waited=waited)
            reader = self._reader = asyncio.get_running_loop().create_future()
            waited = True
            try:
                await reader
            finally:
                is_current = self._reader is reader
                if is_current:
                    self._reader = None
            if not is_current:  # the inbox was transferred in the meantime, and has another reader
                raise InboxClosed(waited=True)
        if self._single is not None:
            message, size = self._single
            self._single = None
        else:
            message, size = self._items.popleft()
        self.held_bytes -= size
        self._limits.budget.total -= size + UNREAD_OVERHEAD_BYTES
        self.reads += 1
        self._handling = True
        if not self._items:
            self._items = _EMPTY
        if self._on_room is not None and not self.full:
            self._notify_room()
        return message

    def transfer(self) -> Inbox:
        """Disconnect the current reader and reopen the inbox for another one.

        Returns:
            An empty, closed inbox for the old reader. Its `drained` completes when that reader has finished its last
            message.
        """
        rest = Inbox(self._limits)
        self._limits = self._limits.keeping  # the old endpoint's reads say nothing about the new one
        self.reads = 0
        rest._closed = True
        rest._drained = LazyEvent()
        if not self._handling:
            rest._drained.set()
        self._handling = self._closed = False
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_exception(InboxClosed(waited=True))
        self._notify_room()
        return rest

    def stop_accounting(self) -> None:
        """Stop counting unread messages. The connection is closed, but user code may still read them."""
        self._limits.budget.total -= self.counted_bytes
        self._limits = _UNCOUNTED

    @property
    def drained(self) -> asyncio.Future[None] | None:
        """Future that completes when the old reader has finished its last message; `None` if not transferred."""
        return None if self._drained is None else self._drained.future

    def unread(self) -> list[Item]:
        """Return the unread messages, oldest first."""
        waiting = list(self._items) if self._single is None else [self._single]
        return [item for item, _ in waiting]

    def close(self, *, discard: bool) -> int:
        """Accept no more messages and wake all waiters. Return the number of discarded messages.

        Args:
            discard: Whether to discard unread messages.
        """
        self._closed = True
        discarded = 0
        if discard:
            discarded = len(self)
            self._limits.budget.total -= self.counted_bytes
            self._single = None
            self._items = _EMPTY
            self.held_bytes = 0
        if self._reader is not None:
            _wake(self._reader)
        self._notify_room()
        return discarded


def _wake(future: asyncio.Future[None], first: Callable[[], None] | None = None) -> None:
    if first is not None:
        first()
    if not future.done():
        future.set_result(None)
