"""Expiry of a client's credential: the server requests a new one, and closes with 4401 if none arrives in time."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.wire.strict_json import InvalidJsonError, read_json
from fastapi_ws_stabilizer.wire.v1.frames import control_frame, to_milliseconds

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection

RENEWAL_LEAD_FRACTION: Final = 0.2
"""Fraction of a credential's lifetime that is left when the server requests a new one."""

MIN_RENEWAL_LEAD: Final = 1.0
"""Minimum seconds left at the request, or half of a lifetime under 2 s."""

MAX_RENEWAL_LEAD: Final = 30.0
"""Maximum seconds left at the request."""


MAX_RENEWAL_CHARS: Final = 8 * 1024 + 64
"""Maximum length in characters of a message that is parsed as a renewal."""


class CredentialExpiry:
    """Expiry timer of one client's credential.

    If the identity has its own expiry (`expires_at`), only the application can extend it. A renewal for which the
    application returns no time is rejected and leaves the expiry as it is.
    """

    __slots__ = ("_identity_expires", "_is_renewing", "_timer")

    def __init__(self) -> None:
        self._is_renewing = False
        self._identity_expires = False
        self._timer: asyncio.TimerHandle | None = None

    def request_renewal(self, connection: Connection, credential: str | None) -> None:
        """Pass a new credential to the application. Others are ignored until the application has decided."""
        if not self._is_renewing:
            self._is_renewing = True
            connection.resources.listener.on_renewal(connection, credential)

    def start(self, connection: Connection, expires_in: float | None, identity_expires_in: float | None) -> None:
        """Start the timer with the shorter of two lifetimes in seconds.

        Args:
            connection: The connection of the client.
            expires_in: Lifetime from `on_auth`; `None` if it set none.
            identity_expires_in: Lifetime from the identity; `None` if it has no expiry.
        """
        self._identity_expires = identity_expires_in is not None
        lifetimes = [one for one in (expires_in, identity_expires_in) if one is not None]
        self.reset(connection, min(lifetimes, default=None))

    def reset(self, connection: Connection, seconds: float | None) -> None:
        """Restart the timer with a lifetime in seconds; `None` means no expiry."""
        self.stop()
        if seconds is not None:
            lead = min(MAX_RENEWAL_LEAD, max(seconds * RENEWAL_LEAD_FRACTION, min(MIN_RENEWAL_LEAD, seconds / 2)))
            self._set_timer(seconds - lead, self._ask_for_renewal, connection, lead)

    def stop(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, delay: float, callback: Callable[..., None], *args: object) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay, callback, *args, context=contextvars.Context())

    def renewed(self, connection: Connection, expires_in: float | None) -> None:
        """Accept a new credential that the application found valid."""
        if expires_in is None and self._identity_expires:
            self.renewal_rejected(connection, "the application set no expiry for the new credential")
            return
        self._is_renewing = False
        if connection.close_info is not None:
            return
        connection.answer(
            control_frame("auth", ok=True, **({} if expires_in is None else {"in": to_milliseconds(expires_in)}))
        )
        self.reset(connection, expires_in)

    def renewal_rejected(self, connection: Connection, why: str) -> None:
        """Reject a renewal and leave the expiry as it is."""
        self._is_renewing = False
        if connection.close_info is None:
            connection.answer(control_frame("error", code="auth_refused", message=why))

    def _ask_for_renewal(self, connection: Connection, within: float) -> None:
        connection.answer(control_frame("auth", **{"in": to_milliseconds(within)}))
        self._set_timer(within, self._on_expired, connection)

    def _on_expired(self, connection: Connection) -> None:
        self._timer = None
        connection.close(DisconnectReason.POLICY, code=4401, reason="the credential has expired")


def parse_renewal(message: str | bytes) -> str | None:
    """Return the credential in a plain client's `{"type":"auth","token":...}`; `None` for any other message."""
    if not isinstance(message, str) or len(message) > MAX_RENEWAL_CHARS or '"auth"' not in message:
        return None
    try:
        value = read_json(message)
    except InvalidJsonError:
        return None
    if not isinstance(value, dict) or value.get("type") != "auth" or value.keys() != {"type", "token"}:
        return None
    token = value["token"]
    return token if isinstance(token, str) else None
