"""Detection of sends that make no progress."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from fastapi_ws_stabilizer.clock import monotonic

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.outbox import Outbox

POLL_INTERVAL: Final = 0.5
"""Maximum seconds between two checks of a blocked send."""

MIN_POLLS: Final = 4
"""Minimum number of checks within `send_timeout`. The first has no earlier value to compare with."""

STALL_THRESHOLD: Final = 0.05
"""Seconds that a send may block before the client counts as not reading."""


class StallWatch:
    """Timer that checks the blocked sends of one outbox for progress.

    An outbox creates it when a send blocks. The timer is not restarted for each message. When it finds no blocked send,
    the outbox drops the watch.

    Args:
        outbox: The outbox.

    Attributes:
        since: Time from which the current send is blocked, on the monotonic clock; `None` while none is.
    """

    __slots__ = ("_outbox", "_progress", "_timer", "since")

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.since: float | None = None
        self._progress: int | None = None  # `send_progress` at the last check
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_delayed(self) -> bool:
        """Whether a send has been blocked for longer than `STALL_THRESHOLD`."""
        return self.since is not None and monotonic() - self.since > STALL_THRESHOLD

    def begin(self) -> None:
        """Record that a send is blocked, unless one was already."""
        if self.since is None:
            self.since = monotonic()
            self._progress = None
            if self._timer is None:
                self._set_timer(0.0)

    def restart(self) -> None:
        """Measure from now on."""
        self.since = monotonic()

    def end(self) -> None:
        """Record that no send is blocked."""
        self.since = None

    def stop(self) -> None:
        """Stop checking."""
        self.since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, waited: float) -> None:
        limits = self._outbox.limits
        delay = min(POLL_INTERVAL, limits.send_timeout / MIN_POLLS, limits.send_timeout - waited)
        self._timer = asyncio.get_running_loop().call_later(max(0.0, delay), self._check, context=limits.context)

    def _check(self) -> None:
        """Check how long the send has been blocked, and report a delay or a stall to the connection."""
        self._timer = None
        outbox = self._outbox
        if self.since is None:
            outbox.drop_stall_watch()
            return
        before, self._progress = self._progress, outbox.connection.server_transport.progress()
        if before is not None and self._progress is not None and self._progress > before:
            self.since = monotonic()  # the client reads slowly
        waited = monotonic() - self.since
        waits_for_pong = outbox.waits_for_pong  # then the heartbeat decides whether the connection ends
        if waited >= outbox.limits.send_timeout and not waits_for_pong:
            outbox.connection.on_send_stalled()
            return
        if waited >= POLL_INTERVAL:
            outbox.connection.on_send_delayed()
        if not outbox.is_done:
            self._set_timer(0.0 if waits_for_pong else waited)
