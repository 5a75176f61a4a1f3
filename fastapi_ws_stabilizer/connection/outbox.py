"""What waits to be sent to a client, and the one writer that sends it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.tasks import TaskSet
from fastapi_ws_stabilizer.wire.payload import Frame, close_message

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


_LOOK_INTERVAL: Final = 0.5
"""Seconds between two looks at a send that waits."""


_HEALTHY_SEND: Final = 0.05
"""Seconds that a send to a client which reads may wait."""


class OutboxOwner(Protocol):
    """Who is told what happens to the messages. Calls come from the event loop and must not wait."""

    def sent(self) -> None:
        """A message was taken by the server."""

    def unsent(self) -> None:
        """A message was given to the server and not taken."""

    def unflushed_bytes(self) -> int | None:
        """What the transport still holds; `None` where it cannot be seen."""

    def send_stuck(self) -> None:
        """A send has made no progress for `send_timeout`."""

    def send_waits(self) -> None:
        """A send has made no progress for a while, and `send_timeout` is not over."""

    async def send_failed(self, error: Exception) -> None:
        """The server refused a message: the connection is gone. Awaited by the writer, which ends then."""


class Outbox:
    """A bounded queue with many writers and one task that empties it.

    The task exists only while there is something to send, so an idle connection has none. A watch for a stuck send is
    one timer that looks at the time when the current send began; it is not set anew for every message.
    """

    __slots__ = (
        "_close",
        "_max_bytes",
        "_max_messages",
        "_owner",
        "_queue",
        "_send",
        "_send_timeout",
        "_sending_since",
        "_shut",
        "_tasks",
        "_unflushed",
        "_waiters",
        "_watch",
        "_writer",
        "done",
        "held_bytes",
        "name",
    )

    def __init__(
        self,
        send: Send,
        owner: OutboxOwner,
        tasks: TaskSet,
        *,
        name: str,
        max_messages: int,
        max_bytes: int,
        send_timeout: float,
    ) -> None:
        self._send = send
        self._owner = owner
        self._tasks = tasks
        self.name = name
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._send_timeout = send_timeout
        self._queue: deque[Frame] = deque()
        self.held_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._sending_since: float | None = None
        self._unflushed: int | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._waiters: deque[tuple[asyncio.Future[bool], Frame]] = deque()
        self._shut = True
        self._close: tuple[int, str] | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __len__(self) -> int:
        return len(self._queue)

    def open(self) -> None:
        """Take messages from now on."""
        self._shut = False

    def has_room(self, size: int) -> bool:
        """Whether a message of `size` bytes fits. Any message fits into an empty outbox."""
        if not self._queue:
            return True
        return len(self._queue) < self._max_messages and self.held_bytes + size <= self._max_bytes

    @property
    def send_waits(self) -> bool:
        """Whether a send has been waiting for longer than a healthy one does."""
        return self._sending_since is not None and monotonic() - self._sending_since > _HEALTHY_SEND

    @property
    def half_full(self) -> bool:
        """Whether more than half of one of the bounds is used."""
        return 2 * len(self._queue) > self._max_messages or 2 * self.held_bytes > self._max_bytes

    def put(self, frame: Frame) -> bool:
        """Queue a frame without waiting; `False` if there is no room or the outbox is shut."""
        if self._shut or not self.has_room(frame.size):
            return False
        self._append(frame)
        return True

    async def put_wait(self, frame: Frame) -> bool:
        """Queue a frame as soon as there is room, after those who waited before; `False` if the outbox was shut.

        The writer hands free room to who waits, so `put` cannot take it away. The wait is bounded by the sends before
        it: one that makes no progress ends the connection. Cancelling leaves the frame out, unless it has just been
        queued.
        """
        if not self._waiters and self.put(frame):
            return True
        if self._shut:
            return False
        waiter: tuple[asyncio.Future[bool], Frame] = (asyncio.get_running_loop().create_future(), frame)
        self._waiters.append(waiter)
        try:
            return await waiter[0]
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._serve_waiters()
            raise

    def finish(self, code: int, text: str, *, flush: bool) -> int:
        """Take nothing more, send what is queued and then the close frame; `done` is set when that is over.

        Args:
            code: Close code.
            text: Close reason.
            flush: Whether what is queued is still sent; else it is thrown away.

        Returns:
            How many messages were thrown away.
        """
        if self._shut:
            return 0
        self._shut = True
        discarded = 0 if flush else self._clear()
        self._close = (code, text)
        self._turn_away()
        self._start_writer()
        return discarded

    def discard(self) -> int:
        """Take nothing more, send nothing more, and tell how many messages were thrown away."""
        self._shut = True
        self._close = None
        discarded = self._clear()
        self._turn_away()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        writer = self._writer
        if writer is None:
            self._set_done()
        elif writer is not asyncio.current_task():  # the writer itself may be the one that found the end
            writer.cancel()
            # A task that is cancelled before its first step runs none of its code, so its end is heard from outside.
            writer.add_done_callback(lambda _: self._set_done())
        return discarded

    def _append(self, frame: Frame) -> None:
        self._queue.append(frame)
        self.held_bytes += frame.size
        if self._writer is None:
            self._start_writer()

    def _start_writer(self) -> None:
        if self._writer is None:
            self._writer = self._tasks.spawn(self._write(), name=self.name)

    async def _write(self) -> None:
        in_flight = False
        try:
            while self._queue or self._close is not None:
                self._sending_since = monotonic()
                if self._watch is None:
                    self._watch = asyncio.get_running_loop().call_later(self._next_look(0.0), self._look)
                if self._queue:
                    frame = self._queue.popleft()
                    self.held_bytes -= frame.size
                    in_flight = True
                    await self._send(frame.message())
                    in_flight = False
                    self._owner.sent()
                    if self._waiters:
                        self._serve_waiters()
                elif self._close is not None:
                    close, self._close = self._close, None
                    await self._send(close_message(*close))
        except Exception as error:
            self._sending_since = None
            await self._owner.send_failed(error)
        finally:
            if in_flight:
                self._owner.unsent()
            self._sending_since = None
            self._writer = None
            if self._shut:
                self._set_done()

    def _look(self) -> None:
        """See whether the send that runs now has taken too long."""
        self._watch = None
        since = self._sending_since
        if since is None:
            return
        left = self._owner.unflushed_bytes()
        if left is not None and self._unflushed is not None and left < self._unflushed:
            self._sending_since = since = monotonic()  # the client reads, if slowly
        self._unflushed = left
        waited = monotonic() - since
        if waited >= self._send_timeout:
            self._owner.send_stuck()
            return
        if waited >= _LOOK_INTERVAL:
            self._owner.send_waits()
        self._watch = asyncio.get_running_loop().call_later(self._next_look(waited), self._look)

    def _next_look(self, waited: float) -> float:
        return min(_LOOK_INTERVAL, self._send_timeout - waited)

    def _clear(self) -> int:
        discarded = len(self._queue)
        self._queue.clear()
        self.held_bytes = 0
        return discarded

    def _serve_waiters(self) -> None:
        """Queue what others wait to send, in their order, as far as there is room."""
        while self._waiters and self.has_room(self._waiters[0][1].size):
            waiter, frame = self._waiters.popleft()
            if not waiter.done():
                self._append(frame)
                waiter.set_result(True)

    def _turn_away(self) -> None:
        for waiter, _ in self._waiters:
            if not waiter.done():
                waiter.set_result(False)
        self._waiters.clear()

    def _set_done(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if not self.done.done():
            self.done.set_result(None)
