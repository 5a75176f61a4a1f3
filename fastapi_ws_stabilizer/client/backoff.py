"""When to dial again, and when not to."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fastapi_ws_stabilizer.close_codes import is_terminal

_SLOW: Final = frozenset({1012, 1013, 1014, 4429, 4503})
"""Codes of servers that are overloaded or on their way down: everybody else was told the same."""

_SLOWER: Final = 5
_HINTED_ATTEMPTS: Final = 3
_TOO_MUCH: Final = 4429
"""The code of a limit of this very client, which knows how long it lasts: its hint counts each time."""

_MAX_HINT: Final = 300.0
_RETRY: Final = re.compile(r"\bretry=(\d{1,7})\b")


class ReconnectAction(Enum):
    """What a close code asks of a client."""

    AGAIN = "again"
    """Dial again, after a while."""
    NOW = "now"
    """Dial again at once."""
    REFRESH = "refresh"
    """Get new credentials and dial once."""
    FINAL = "final"
    """Do not come back."""


def action_for(code: int) -> ReconnectAction:
    """What a close code asks of a client."""
    if code in (4401, 3000, 1008):
        return ReconnectAction.REFRESH
    if code in (4000, 4412):
        return ReconnectAction.NOW
    return ReconnectAction.FINAL if is_terminal(code) else ReconnectAction.AGAIN


@dataclass
class Backoff:
    """Full jitter over a window that doubles.

    Attributes:
        base: Seconds of the first window.
        most: Seconds of the largest one.
        least: Seconds that are always waited.
        attempt: How many dials have failed since the last connection that was stable.
    """

    base: float = 1.0
    max_delay: float = 30.0
    min_delay: float = 0.2
    attempt: int = 0

    def delay(self, code: int, reason: str) -> float:
        """Seconds until the next dial, after a connection or a dial that ended so. Counts it.

        A hint of the server is kept to, three times in a row, and after 4429 always. Up to a tenth of it and `least` is
        added at random.
        """
        hint = _RETRY.search(reason)
        attempt, self.attempt = self.attempt, self.attempt + 1
        if hint is not None and (attempt < _HINTED_ATTEMPTS or code == _TOO_MUCH):
            hinted = min(int(hint.group(1)) / 1000, _MAX_HINT)
            if attempt >= _HINTED_ATTEMPTS:  # a hint of no time is no reason to dial without a pause for ever
                hinted = max(hinted, self.min_delay)
            return hinted + random.uniform(0.0, self.min_delay + hinted / 10)  # noqa: S311 (others were told the same)
        window = self.base * (_SLOWER if code in _SLOW else 1) * 2 ** min(attempt, 30)
        return self.min_delay + random.uniform(0.0, min(self.max_delay, window))  # noqa: S311 (spreads load, guards nothing)

    def reset(self) -> None:
        """The connection was stable."""
        self.attempt = 0
