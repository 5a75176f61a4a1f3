"""Whether, when and with which session a client reconnects."""

from __future__ import annotations

from typing import Final

from fastapi_ws_stabilizer.client.backoff import Backoff, ReconnectAction, action_for
from fastapi_ws_stabilizer.client.connection import ConnectionLost
from fastapi_ws_stabilizer.close_codes import SUPERSEDED

MAX_RESYNCS: Final = 2
"""Maximum number of consecutive attempts to resume a session with mismatched numbers. After them the client abandons
it."""


class ReconnectPolicy:
    """Policy for reconnects, with the failures since the last stable connection.

    Args:
        backoff: The backoff.
        can_reauthenticate: Whether the client can replace a rejected credential.

    Attributes:
        abandons_session: Whether the next attempt asks for a new session.
    """

    def __init__(self, backoff: Backoff, *, can_reauthenticate: bool) -> None:
        self._backoff = backoff
        self._can_reauthenticate = can_reauthenticate
        self._auth_failures = 0
        self._resyncs = 0
        self.abandons_session = False

    @property
    def is_credential_rejected(self) -> bool:
        """Whether the server has rejected the last credential."""
        return self._auth_failures > 0

    def reset_backoff(self) -> None:
        """Reset the backoff, because your code asks for an attempt now."""
        self._backoff.reset()

    def next_delay(self, lost: ConnectionLost) -> float | None:
        """Return the seconds until the next attempt; `None` if the client must not reconnect.

        Args:
            lost: How the last connection or attempt has ended.
        """
        if lost.was_stable:
            self._backoff.reset()
            self._auth_failures = self._resyncs = 0
        code, action = lost.code, action_for(lost.code)
        self.abandons_session = code == SUPERSEDED  # another connection has the session
        if code == 4412:
            self._resyncs += 1
            if self._resyncs > MAX_RESYNCS:
                self.abandons_session = True
                action = ReconnectAction.RETRY
        if action is ReconnectAction.REAUTHENTICATE:
            self._auth_failures += 1
            if not self._can_reauthenticate or self._auth_failures > 1:
                action = ReconnectAction.STOP
        if action is ReconnectAction.STOP:
            return None
        delay = self._backoff.delay(code, lost.reason)
        if (
            lost.at_once
            or action is ReconnectAction.REAUTHENTICATE
            or (action is ReconnectAction.RETRY_NOW and lost.was_open)
        ):
            return 0.0
        return delay
