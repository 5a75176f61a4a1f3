"""One-time tickets, which an HTTP route issues to a logged-in user for opening a socket."""

from __future__ import annotations

from typing import Final

from fastapi_ws_stabilizer.auth.signed_tokens import SignedTokens

TICKET_PREFIX: Final = "wst1."
"""Prefix of every ticket of this version."""


class Tickets(SignedTokens):
    """Issuer and verifier of tickets. Each ticket is valid once in this process.

    A ticket is part of a URL, so it appears in access logs, but a used ticket is worthless. A worker does not know
    which tickets another worker has accepted. Across workers only the short lifetime protects a ticket. A reconnect
    token is not a valid ticket, nor a ticket a valid reconnect token, although the same secret signs both.

    Args:
        secrets_: Signing keys. The first key signs, all keys verify. Without keys, a random key is used.
        ttl: Lifetime of a ticket in seconds.
    """

    prefix = TICKET_PREFIX
    context = b"fastapi-ws-stabilizer ticket 1\x00"
    kind = "ticket"

    def redeem(self, ticket: str) -> str:
        """Use up a ticket, and return the client id that it was issued for.

        Raises:
            InvalidTokenError: The text is not a ticket, or the ticket was altered, signed with another secret,
                revoked, or used before.
            TokenExpiredError: The ticket has expired.
        """
        return self.consume(ticket).client_id
