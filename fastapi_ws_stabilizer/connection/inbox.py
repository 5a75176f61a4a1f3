"""What a client has sent and nobody has read yet."""

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
    """Everything has been read and nothing more will come."""


Item = str | bytes | Message
"""What waits in an inbox: a message of a plain client as it came, or one of `stabilizer.v1.json` with what it says."""

_Items = deque[tuple[Item, int]]
"""Messages with their sizes: a str grows when it is encoded."""

_EMPTY: Final[_Items] = deque(maxlen=0)
"""What every empty inbox holds, so that an idle connection need not own a queue."""


class InboxLimits:
    """The bounds that all inboxes of a manager share, and where they count.

    Args:
        max_messages: Most messages that wait.
        max_bytes: Most bytes of them.
        budget: Where they are counted.

    Attributes:
        drops: Whether the oldest messages make room for new ones, because the endpoint does not read.
        undecided: Whether it will soon be known that an endpoint does not read.
        keeping: The same bounds, for inboxes that drop nothing.
        dropping: The same bounds, for inboxes that drop.
        deciding: The same bounds, for inboxes of which it is not known yet.
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
"""The bounds of what no ledger counts any more."""


class Pause:
    """Reading is paused, because an inbox is full.

    Attributes:
        sent: Whether the connection's own methods have sent anything since then. What others send to its client, and
            heartbeats, are no sign that its endpoint is well.
    """

    __slots__ = ("sent",)

    def __init__(self) -> None:
        self.sent = False


class Inbox:
    """A bounded queue with one writer, the pump, and one reader.

    The bound is in messages and in bytes of memory that they hold. It is a mark, not a wall: the message that reaches
    it is taken, and the pump then waits for room before it reads the next one.

    It belongs to a session where there is one, and is handed from one connection to the next.
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
        self._single: tuple[Item, int] | None = None  # the only message that waits; then the queue is empty
        self._items = _EMPTY
        self._limits = limits
        self.held_bytes = 0
        self.reads = 0
        self._closed = False
        self._reader: asyncio.Future[None] | None = None
        self._on_room: Callable[[], None] | None = None
        self._handling = False  # whether its reader may still be busy with the message that it has taken last
        self._drained: LazyEvent | None = None

    def __len__(self) -> int:
        return 1 if self._single is not None else len(self._items)

    @property
    def full(self) -> bool:
        """Whether the mark is reached."""
        limits = self._limits
        return len(self) >= limits.max_messages or self.held_bytes >= limits.max_bytes

    @property
    def drops(self) -> bool:
        """Whether the oldest messages make room for new ones, because the endpoint reads none."""
        return self._limits.drops

    @property
    def undecided(self) -> bool:
        """Whether it will soon be known that the endpoint does not read."""
        return self._limits.undecided

    def begin_to_decide(self) -> None:
        """It will soon be known whether the endpoint reads: `drop_when_full` or `end_to_decide` says so."""
        if not self.drops:
            self._limits = self._limits.deciding

    def end_to_decide(self) -> None:
        """It is not known whether the endpoint reads, and will not be known soon."""
        if self.undecided:
            self._limits = self._limits.keeping

    def drop_when_full(self) -> None:
        """Let the oldest messages make room for new ones from now on. A reader that comes gets those that are left."""
        self._limits = self._limits.dropping

    @property
    def ignored(self) -> bool:
        """Whether the endpoint has said that it does not read, and has neither read since nor waits for a message."""
        return self._limits.drops and not self.has_reader

    @property
    def has_reader(self) -> bool:
        """Whether a message was taken since `taken` was set back, or a reader waits for one or is about to take it."""
        return bool(self.reads) or self._reader is not None  # which stays until it has taken a message

    def take_requests(self) -> list[Message]:
        """Take out the messages that ask for an answer, and return them."""
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
        """Take out the oldest messages until the mark is no longer reached, and return them."""
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
        """Whether its reader waits, so that the next message is taken at once."""
        return self._reader is not None and not self._reader.done()

    @property
    def counted_bytes(self) -> int:
        """What it holds, with what each message takes beside its text: what is in the ledger."""
        return self.held_bytes + UNREAD_OVERHEAD_BYTES * len(self)

    def put(self, message: Item, size: int | None = None) -> None:
        """Add a message and wake the reader.

        Args:
            message: The message.
            size: Bytes of memory that it holds, where that is more than can be seen.
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
        """Wait until the mark is no longer reached or the inbox is closed; tell whether it is so. Cancelling is safe.

        Args:
            timeout: Seconds to wait at most; for ever when left out.
            take: Called at the very moment that ends the wait, unless that is the timeout: before what closes the inbox
                goes on, and may cancel whoever waits.
        """
        if self.full and not self._closed:
            room = asyncio.get_running_loop().create_future()
            on_room = self._on_room = functools.partial(_wake, room, take)
            try:
                await wait_for_all([room], timeout)
            finally:
                if self._on_room is on_room:  # else the inbox was handed over, and another one wants to be told
                    self._on_room = None
        return self._closed or not self.full

    def notify_when_room(self, on_room: Callable[[], None]) -> None:
        """Call a function, once, as soon as the mark is no longer reached or the inbox is closed."""
        self._on_room = on_room

    def _notify_room(self) -> None:
        on_room, self._on_room = self._on_room, None
        if on_room is not None:
            on_room()

    async def get(self) -> Item:
        """Wait for the next message. Cancelling loses nothing: a message is taken out only when it is returned.

        Raises:
            InboxClosed: Nothing more will come.
            ConcurrentReceiveError: Another task is waiting already.
        """
        if self._reader is not None:
            raise ConcurrentReceiveError
        self._handling = False
        while self._single is None and not self._items:
            if self._closed:
                if self._drained is not None:
                    self._drained.set()
                raise InboxClosed
            reader = self._reader = asyncio.get_running_loop().create_future()
            try:
                await reader
            finally:
                is_current = self._reader is reader
                if is_current:
                    self._reader = None
            if not is_current:  # the inbox was handed over while we were woken, and another one reads it
                raise InboxClosed
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
        """Turn its reader away and open it again for another one.

        Returns:
            An inbox for the reader that was turned away: empty, closed, and it tells when that reader has done with the
            message that it had in hand.
        """
        rest = Inbox(self._limits)
        self._limits = self._limits.keeping  # what its reader has read, and said of reading, holds for that one alone
        self.reads = 0
        rest._closed = True
        rest._drained = LazyEvent()
        if not self._handling:
            rest._drained.set()
        self._handling = self._closed = False
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_exception(InboxClosed())
        self._notify_room()
        return rest

    def stop_accounting(self) -> None:
        """Its connection is over, and whoever may still read what is unread does so on their own account."""
        self._limits.budget.total -= self.counted_bytes
        self._limits = _UNCOUNTED

    @property
    def drained(self) -> asyncio.Future[None] | None:
        """Of an inbox that was left behind: a future that is done when its reader has nothing in hand any more."""
        return None if self._drained is None else self._drained.future

    def unread(self) -> list[Item]:
        """The messages that wait, oldest first."""
        waiting = list(self._items) if self._single is None else [self._single]
        return [item for item, _ in waiting]

    def close(self, *, discard: bool) -> int:
        """Take nothing more, wake who waits, and tell how many unread messages were thrown away.

        Args:
            discard: Whether what has not been read is thrown away.
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
