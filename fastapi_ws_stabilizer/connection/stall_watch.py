"""Detection of sends that make no progress."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.connection.outbox_owner import OutboxOwner
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits, SendQueue
from fastapi_ws_stabilizer.tasks import LazyEvent

POLL_INTERVAL: Final = 0.5
"""Maximum seconds between two checks of a blocked send."""

MIN_POLLS: Final = 4
"""Minimum number of checks within `send_timeout`. The first has no earlier value to compare with."""

STALL_THRESHOLD: Final = 0.05
"""Seconds that a send may block before the client counts as not reading."""


class StallWatch(SendQueue):
    """Send queue that detects sends without progress.

    One timer checks how long sends have been blocked. It is not restarted for each message, and there is none while no
    send is blocked.
    """

    __slots__ = ("_blocked_since", "_broken", "_done", "_due", "_progress", "_watch", "owner")

    def __init__(self, owner: OutboxOwner, limits: OutboxLimits) -> None:
        super().__init__(limits)
        self.owner = owner
        self._broken = False
        self._due = False  # whether a flush is scheduled or a send is blocked
        self._done: LazyEvent | None = None  # created when code waits for it, or when it is set
        self._blocked_since: float | None = None
        self._progress: int | None = None  # `send_progress` at the last check
        self._watch: asyncio.TimerHandle | None = None

    @property
    def is_delayed(self) -> bool:
        """Whether a send has been blocked for longer than `STALL_THRESHOLD`."""
        return self._blocked_since is not None and monotonic() - self._blocked_since > STALL_THRESHOLD

    @property
    def blocked_seconds(self) -> float:
        """Seconds for which sends have been blocked."""
        return 0.0 if self._blocked_since is None else monotonic() - self._blocked_since

    @property
    def is_stalled(self) -> bool:
        """Whether queued messages wait for longer than they do with a client that reads."""
        return self.is_delayed

    @property
    def blocked(self) -> bool:
        """Whether queued messages cannot be sent now."""
        return self._broken or self._blocked_since is not None

    def is_backpressured(self) -> bool:
        """Return whether more than half of the outbox is used while the client appears to read."""
        return self.half_full and not self.is_delayed

    def _block(self) -> None:
        """Record that sends are blocked, and start the timer."""
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
        """Check how long the send has been blocked, and report a delay or a stall."""
        self._watch = None
        since = self._blocked_since
        if since is None:
            return
        before, self._progress = self._progress, self.owner.send_progress()
        if before is not None and self._progress is not None and self._progress > before:
            self._blocked_since = since = monotonic()  # the client reads slowly
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
        """Future that completes when nothing more will be sent."""
        return self._done_latch().future

    def _set_done(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._blocked_since = None
        self._done_latch().set()

    def give_up(self) -> None:
        """Complete `done` regardless of the state."""
        StallWatch._set_done(self)

    def _done_latch(self) -> LazyEvent:
        if self._done is None:
            self._done = LazyEvent()
        return self._done
