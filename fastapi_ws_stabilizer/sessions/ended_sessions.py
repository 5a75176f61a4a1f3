"""Sessions that the application has ended, so that a returning client gets the reason."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, is_terminal

MAX_ENDED: Final = 10_000
"""Ended sessions that are remembered. The session that ended first is forgotten first."""


class EndedSessions:
    """Close infos of ended sessions, by the token that a returning client presents.

    Args:
        ttl: Seconds that a close info is remembered.
    """

    __slots__ = ("_close_infos", "_ttl")

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._close_infos: OrderedDict[str, tuple[float, str, CloseInfo]] = (
            OrderedDict()
        )  # expiry, client id, close info

    def __len__(self) -> int:
        """Number of remembered sessions."""
        return len(self._close_infos)

    def add(self, key: str, client_id: str, close_info: CloseInfo) -> None:
        """Remember the close info of a client's session."""
        self._collect()
        self._close_infos[key] = (monotonic() + self._ttl, client_id, close_info)
        self._close_infos.move_to_end(key)
        while len(self._close_infos) > MAX_ENDED:
            self._close_infos.popitem(last=False)

    def find(self, key: str, client_id: str | None) -> CloseInfo | None:
        """Return the close info of a client's session; `None` if the application did not end it.

        If `client_id` is `None`, the key alone proves the ownership.

        A close info with a code after which clients reconnect is returned once. With a code after which they must not
        reconnect, it is returned on every attempt.
        """
        self._collect()
        _, owner, close_info = self._close_infos.get(key, (0.0, "", None))
        if close_info is None or client_id not in (None, owner):
            return None
        if not is_terminal(close_info.code):
            del self._close_infos[key]
        return close_info

    def __contains__(self, key: object) -> bool:
        """Whether the close info of a session is remembered."""
        self._collect()
        return key in self._close_infos

    def forget(self, key: str) -> None:
        """Forget the close info of a session, so that its client may return."""
        self._close_infos.pop(key, None)

    def _collect(self) -> None:
        now = monotonic()
        while self._close_infos:
            key, (until, _, _) = next(iter(self._close_infos.items()))
            if until > now:
                break
            del self._close_infos[key]
