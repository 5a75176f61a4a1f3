"""Sessions that the application has ended, so that a client which comes back for one hears why."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, is_terminal

MAX_ENDED: Final = 10_000
"""Sessions of which that is remembered at most. The one that ended first is forgotten first."""


class EndedSessions:
    """How sessions were ended, by what their clients present when they come back, for as long as a session is kept.

    Args:
        ttl: Seconds that it is remembered.
    """

    __slots__ = ("_endings", "_ttl")

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._endings: OrderedDict[str, tuple[float, str, CloseInfo]] = OrderedDict()  # until when, whose, and how

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._endings)

    def add(self, key: str, client_id: str, how: CloseInfo) -> None:
        """Remember how a session of a client was ended."""
        self._collect()
        self._endings[key] = (monotonic() + self._ttl, client_id, how)
        self._endings.move_to_end(key)
        while len(self._endings) > MAX_ENDED:
            self._endings.popitem(last=False)

    def find(self, key: str, client_id: str | None) -> CloseInfo | None:
        """Return how a session of a client was ended; `None` if the application has not ended it.

        Without a client id the key alone proves whose it is.

        A code after which clients come back answers one of them. A code that tells them to stay away answers each.
        """
        self._collect()
        _, owner, how = self._endings.get(key, (0.0, "", None))
        if how is None or client_id not in (None, owner):
            return None
        if not is_terminal(how.code):
            del self._endings[key]
        return how

    def __contains__(self, key: object) -> bool:
        """Whether it is remembered how a session was ended."""
        self._collect()
        return key in self._endings

    def forget(self, key: str) -> None:
        """Forget how a session was ended: its client may come back."""
        self._endings.pop(key, None)

    def _collect(self) -> None:
        now = monotonic()
        while self._endings:
            key, (until, _, _) = next(iter(self._endings.items()))
            if until > now:
                break
            del self._endings[key]
