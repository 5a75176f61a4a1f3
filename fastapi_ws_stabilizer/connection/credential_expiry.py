"""How long a client's credential is good: it is asked for a new one in time, and closed with 4401 if none comes."""

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
"""The part of a credential's life that is left when the client is asked for a new one."""

MIN_RENEWAL_LEAD: Final = 1.0
"""Seconds that are left then at least, of a life that is twice as long."""

MAX_RENEWAL_LEAD: Final = 30.0
"""Seconds before its end at which it is asked at the earliest."""


MAX_RENEWAL_CHARS: Final = 8 * 1024 + 64
"""A longer message brings no credential."""


class Holder(Protocol):
    """The connection of the client that has the credential."""

    close_info: CloseInfo | None

    def answer(self, frame: EncodedMessage) -> None:
        """Send a control frame, before what is queued."""

    def close(self, reason: DisconnectReason, *, code: int | None = None, text: str | None = None) -> bool:
        """End the connection from our side."""


class CredentialExpiry:
    """The term of one client's credential.

    Where the identity has an end of its own (`expires_at`), only a word of the application moves it: a renewal for
    which that names no time leaves it as it is.

    Args:
        holder: Its connection.
        renew: Called with a credential that the client sends later. `taken` is called when that is good.
    """

    __slots__ = ("_holder", "_identity_expires", "_renew", "_renewing", "_timer")

    def __init__(self, holder: Holder, renew: Callable[[str | None], None]) -> None:
        self._holder = holder
        self._renew = renew
        self._renewing = False
        self._identity_expires = False
        self._timer: asyncio.TimerHandle | None = None

    def renewal_requested(self, credential: str | None) -> None:
        """The client has sent a new credential. One is looked at at a time, since each is a call of the application."""
        if not self._renewing:
            self._renewing = True
            self._renew(credential)

    def start(self, expires_in: float | None, identity_expires_in: float | None) -> None:
        """It is good for the shorter of what `on_auth` and the identity say, in seconds; `None` is no word."""
        self._identity_expires = identity_expires_in is not None
        self.reset(min((one for one in (expires_in, identity_expires_in) if one is not None), default=None))

    def reset(self, seconds: float | None) -> None:
        """The credential is good for so long; for ever when left out."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            lead = min(MAX_RENEWAL_LEAD, max(seconds * RENEWAL_LEAD_FRACTION, min(MIN_RENEWAL_LEAD, seconds / 2)))
            self._timer = asyncio.get_running_loop().call_later(
                seconds - lead, self._request_renewal, lead, context=contextvars.Context()
            )

    def renewed(self, expires_in: float | None) -> None:
        """A new credential was looked at, and is good."""
        if expires_in is None and self._identity_expires:
            self.renewal_rejected("nobody has said for how long the new credential is good")
            return
        self._renewing = False
        if self._holder.close_info is not None:
            return
        self._holder.answer(
            control_frame("auth", ok=True, **({} if expires_in is None else {"in": to_milliseconds(expires_in)}))
        )
        self.reset(expires_in)

    def renewal_rejected(self, why: str) -> None:
        """Nothing has changed by a renewal: the time goes on."""
        self._renewing = False
        if self._holder.close_info is None:
            self._holder.answer(control_frame("error", code="auth_refused", message=why))

    def _request_renewal(self, within: float) -> None:
        self._holder.answer(control_frame("auth", **{"in": to_milliseconds(within)}))
        self._timer = asyncio.get_running_loop().call_later(within, self._expired, context=contextvars.Context())

    def _expired(self) -> None:
        self._timer = None
        self._holder.close(DisconnectReason.POLICY, code=4401, text="the credential has expired")


def parse_renewal(message: str | bytes) -> str | None:
    """The new credential in a message of a plain client, `{"type":"auth","token":...}`; `None` if it is no such one."""
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
    """Seconds as they cross the wire."""
    return max(1, round(seconds * 1000))
