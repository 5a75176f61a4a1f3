"""Whether the network takes what waits to be sent to a client, and for how long it has not."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.connection.outbox_owner import OutboxOwner
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits, SendQueue
from fastapi_ws_stabilizer.tasks import LazyEvent

POLL_INTERVAL: Final = 0.5
"""Seconds between two looks at a send that waits."""

MIN_POLLS: Final = 4
"""Looks within `send_timeout` at least. The first has nothing to compare with."""

STALL_THRESHOLD: Final = 0.05
"""Seconds that a send to a client which reads may wait."""


class StallWatch(SendQueue):
    """A backlog that notices when nothing of it is taken.

    The watch is one timer that looks at the time since when the client has taken nothing; it is not set anew for every
    message, and there is none as long as nothing waits.
    """

    __slots__ = ("_blocked_since", "_broken", "_done", "_due", "_progress", "_watch", "owner")

    def __init__(self, owner: OutboxOwner, limits: OutboxLimits) -> None:
        super().__init__(limits)
        self.owner = owner
        self._broken = False
        self._due = False  # whether the queue is going to be looked at anyway: a turn is booked, or a send is waiting
        self._done: LazyEvent | None = None  # made when somebody waits, or when it happens
        self._blocked_since: float | None = None
        self._progress: int | None = None  # of the transport, at the last look
        self._watch: asyncio.TimerHandle | None = None

    @property
    def is_delayed(self) -> bool:
        """Whether the network has taken nothing for longer than it does for a client that reads."""
        return self._blocked_since is not None and monotonic() - self._blocked_since > STALL_THRESHOLD

    @property
    def blocked_seconds(self) -> float:
        """For how long the network has taken nothing of what waits."""
        return 0.0 if self._blocked_since is None else monotonic() - self._blocked_since

    @property
    def is_stalled(self) -> bool:
        """Whether what is queued waits for longer than it does for a client that reads."""
        return self.is_delayed

    @property
    def blocked(self) -> bool:
        """Whether what is queued cannot be sent now."""
        return self._broken or self._blocked_since is not None

    def is_backpressured(self) -> bool:
        """Whether more than half is used, and the client seems to read."""
        return self.half_full and not self.is_delayed

    def _block(self) -> None:
        """The client takes nothing for the moment."""
        self._start_accounting()
        if self._blocked_since is None:
            self._blocked_since = monotonic()
            self._progress = None
            self._due = True
            if self._watch is None:
                self._set_watch(0.0)

    def _unblock(self) -> None:
        self._blocked_since = None
        self._due = self._broken

    def _set_watch(self, waited: float) -> None:
        timeout = self._limits.send_timeout
        delay = min(POLL_INTERVAL, timeout / MIN_POLLS, timeout - waited)
        self._watch = asyncio.get_running_loop().call_later(
            max(0.0, delay), self._check_progress, context=self._limits.context
        )

    def _check_progress(self) -> None:
        """See whether the send that waits has waited too long."""
        self._watch = None
        since = self._blocked_since
        if since is None:
            return
        before, self._progress = self._progress, self.owner.send_progress()
        if before is not None and self._progress is not None and self._progress > before:
            self._blocked_since = since = monotonic()  # the client reads, if slowly
        waited = monotonic() - since
        if waited >= self._limits.send_timeout:
            self.owner.on_send_stalled()
            return
        if waited >= POLL_INTERVAL:
            self.owner.on_send_delayed()
        if self._done is None or not self._done.is_set:
            self._set_watch(waited)

    @property
    def done(self) -> asyncio.Future[None]:
        """A future that is done when nothing will be sent any more."""
        return self._done_latch().future

    def _set_done(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._blocked_since = None
        self._done_latch().set()

    def give_up(self) -> None:
        """Nothing will be sent any more, whatever state it is in: nothing waits for it."""
        StallWatch._set_done(self)

    def _done_latch(self) -> LazyEvent:
        if self._done is None:
            self._done = LazyEvent()
        return self._done
