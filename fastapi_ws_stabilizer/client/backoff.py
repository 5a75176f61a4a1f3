"""Whether and when a client reconnects."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fastapi_ws_stabilizer.close_codes import is_terminal

_OVERLOADED_CODES: Final = frozenset({1012, 1013, 1014, 4429, 4503})
"""Close codes of servers that are overloaded or shutting down. All their clients get the same code."""

_OVERLOADED_FACTOR: Final = 5
_HINTED_ATTEMPTS: Final = 3
_RATE_LIMITED: Final = 4429
"""Close code of a limit of this client alone. The server knows how long the limit lasts, so its hint always counts."""

_MAX_HINT: Final = 300.0
_RETRY: Final = re.compile(r"\bretry=(\d{1,7})\b")


class ReconnectAction(Enum):
    """Action that a close code asks the client to take."""

    RETRY = "retry"
    """Reconnect after a delay."""
    RETRY_NOW = "retry_now"
    """Reconnect immediately."""
    REAUTHENTICATE = "reauthenticate"
    """Get a new credential and reconnect once."""
    STOP = "stop"
    """Do not reconnect."""


def action_for(code: int) -> ReconnectAction:
    """Return the action for a close code."""
    if code in (4401, 3000, 1008):
        return ReconnectAction.REAUTHENTICATE
    if code in (4000, 4412):
        return ReconnectAction.RETRY_NOW
    return ReconnectAction.STOP if is_terminal(code) else ReconnectAction.RETRY


@dataclass
class Backoff:
    """Exponential backoff with full jitter.

    Attributes:
        base: First window in seconds. The window doubles with each failure.
        max_delay: Largest window in seconds.
        min_delay: Minimum delay in seconds.
        attempt: Number of failed attempts since the last stable connection.
    """

    base: float = 1.0
    max_delay: float = 30.0
    min_delay: float = 0.2
    attempt: int = 0

    def delay(self, code: int, reason: str) -> float:
        """Return the seconds until the next attempt, and count the failure.

        The client follows the server's hint for the first three failures in a row, and after 4429 always. It adds a
        random delay of up to `min_delay` and a tenth of the hint.

        Args:
            code: Close code of the connection, or of the failed attempt.
            reason: Close reason, which may contain the hint `retry=` in milliseconds.
        """
        hint = _RETRY.search(reason)
        attempt, self.attempt = self.attempt, self.attempt + 1
        if hint is not None and (attempt < _HINTED_ATTEMPTS or code == _RATE_LIMITED):
            hinted = min(int(hint.group(1)) / 1000, _MAX_HINT)
            if attempt >= _HINTED_ATTEMPTS:  # a hint of 0 must not cause an endless loop without delays
                hinted = max(hinted, self.min_delay)
            return hinted + random.uniform(0.0, self.min_delay + hinted / 10)  # noqa: S311 (other clients get the same hint)
        window = self.base * (_OVERLOADED_FACTOR if code in _OVERLOADED_CODES else 1) * 2 ** min(attempt, 30)
        return self.min_delay + random.uniform(0.0, min(self.max_delay, window))  # noqa: S311 (spreads load, no security)

    def reset(self) -> None:
        """Start again with the first window."""
        self.attempt = 0
