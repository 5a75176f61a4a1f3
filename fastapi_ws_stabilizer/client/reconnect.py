"""Whether a client dials again after a connection was lost, when, and as whom."""

from __future__ import annotations

from typing import Final

from fastapi_ws_stabilizer.client.backoff import Backoff, ReconnectAction, action_for
from fastapi_ws_stabilizer.client.owner import ConnectionLost
from fastapi_ws_stabilizer.close_codes import SUPERSEDED

MAX_RESYNCS: Final = 2
"""How often in a row a session is taken up again whose numbers did not fit. After that it is given up."""


class ReconnectPolicy:
    """What is known of the dials since the last connection that was stable.

    Args:
        backoff: How long to wait.
        refreshes: Whether a refused credential can be replaced.

    Attributes:
        gives_session_up: Whether the next dial asks for a new session.
    """

    def __init__(self, backoff: Backoff, *, refreshes: bool) -> None:
        self._backoff = backoff
        self._refreshes = refreshes
        self._auth_failures = 0
        self._resyncs = 0
        self.gives_session_up = False

    @property
    def credential_rejected(self) -> bool:
        """Whether the server has refused the last credential."""
        return self._auth_failures > 0

    def at_once(self) -> None:
        """Somebody wants the next dial now, whatever was before."""
        self._backoff.reset()

    def stable(self) -> None:
        """A connection has been open for long enough to forget what was before."""
        self._backoff.reset()
        self._auth_failures = self._resyncs = 0

    def after(self, lost: ConnectionLost) -> float | None:
        """Seconds until the next dial after a connection, or a dial, that ended so; `None` if there is to be none."""
        code, what = lost.code, action_for(lost.code)
        self.gives_session_up = code == SUPERSEDED  # another connection has it
        if code == 4412:
            self._resyncs += 1
            if self._resyncs > MAX_RESYNCS:
                self.gives_session_up = True
                what = ReconnectAction.AGAIN
        if what is ReconnectAction.REFRESH:
            self._auth_failures += 1
            if not self._refreshes or self._auth_failures > 1:
                what = ReconnectAction.FINAL
        if what is ReconnectAction.FINAL:
            return None
        delay = self._backoff.delay(code, lost.reason)
        if lost.at_once or what is ReconnectAction.REFRESH or (what is ReconnectAction.NOW and lost.was_open):
            return 0.0
        return delay
