"""Expiry of a client's credential: the server requests a new one, and closes with 4401 if none arrives in time."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Final, Protocol

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.strict_json import InvalidJsonError, read_json
from fastapi_ws_stabilizer.wire.v1.frames import control_frame

RENEWAL_LEAD_FRACTION: Final = 0.2
"""Fraction of a credential's lifetime that is left when the server requests a new one."""

MIN_RENEWAL_LEAD: Final = 1.0
"""Minimum seconds left at the request, or half of a lifetime under 2 s."""

MAX_RENEWAL_LEAD: Final = 30.0
"""Maximum seconds left at the request."""


MAX_RENEWAL_CHARS: Final = 8 * 1024 + 64
"""Maximum length in characters of a message that is parsed as a renewal."""


class Holder(Protocol):
    """Connection of the client that holds the credential."""

    close_info: CloseInfo | None

    def answer(self, frame: EncodedMessage) -> None:
        """Send a control frame ahead of queued messages."""

    def close(self, cause: DisconnectReason, *, code: int | None = None, reason: str | None = None) -> bool:
        """Close the connection from the server's side."""


class CredentialExpiry:
    """Expiry timer of one client's credential.

    If the identity has its own expiry (`expires_at`), only the application can extend it. A renewal for which the
    application returns no time is rejected and leaves the expiry as it is.

    Args:
        holder: The connection of the client.
        renew: Called with a credential that the client sends later. If it is valid, `renewed` must be called.
    """

    __slots__ = ("_holder", "_identity_expires", "_renew", "_renewing", "_timer")

    def __init__(self, holder: Holder, renew: Callable[[str | None], None]) -> None:
        self._holder = holder
        self._renew = renew
        self._renewing = False
        self._identity_expires = False
        self._timer: asyncio.TimerHandle | None = None

    def renewal_requested(self, credential: str | None) -> None:
        """Pass a new credential to the application. Others are ignored until the application has decided."""
        if not self._renewing:
            self._renewing = True
            self._renew(credential)

    def start(self, expires_in: float | None, identity_expires_in: float | None) -> None:
        """Start the timer with the shorter of two lifetimes in seconds.

        Args:
            expires_in: Lifetime from `on_auth`; `None` if it set none.
            identity_expires_in: Lifetime from the identity; `None` if it has no expiry.
        """
        self._identity_expires = identity_expires_in is not None
        self.reset(min((one for one in (expires_in, identity_expires_in) if one is not None), default=None))

    def reset(self, seconds: float | None) -> None:
        """Restart the timer with a lifetime in seconds; `None` means no expiry."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            lead = min(MAX_RENEWAL_LEAD, max(seconds * RENEWAL_LEAD_FRACTION, min(MIN_RENEWAL_LEAD, seconds / 2)))
            self._timer = asyncio.get_running_loop().call_later(
                seconds - lead, self._request_renewal, lead, context=contextvars.Context()
            )

    def renewed(self, expires_in: float | None) -> None:
        """Accept a new credential that the application found valid."""
        if expires_in is None and self._identity_expires:
            self.renewal_rejected("the application set no expiry for the new credential")
            return
        self._renewing = False
        if self._holder.close_info is not None:
            return
        self._holder.answer(
            control_frame("auth", ok=True, **({} if expires_in is None else {"in": to_milliseconds(expires_in)}))
        )
        self.reset(expires_in)

    def renewal_rejected(self, why: str) -> None:
        """Reject a renewal and leave the expiry as it is."""
        self._renewing = False
        if self._holder.close_info is None:
            self._holder.answer(control_frame("error", code="auth_refused", message=why))

    def _request_renewal(self, within: float) -> None:
        self._holder.answer(control_frame("auth", **{"in": to_milliseconds(within)}))
        self._timer = asyncio.get_running_loop().call_later(within, self._expired, context=contextvars.Context())

    def _expired(self) -> None:
        self._timer = None
        self._holder.close(DisconnectReason.POLICY, code=4401, reason="the credential has expired")


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


def to_milliseconds(seconds: float) -> int:
    """Convert seconds to the milliseconds that frames carry, at least 1."""
    return max(1, round(seconds * 1000))
