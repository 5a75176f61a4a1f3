"""One-time tickets: what an HTTP route gives out, to somebody who is logged in, to come in with at a socket."""

from __future__ import annotations

from typing import Final

from fastapi_ws_stabilizer.auth.signed_tokens import SignedTokens

TICKET_PREFIX: Final = "wst1."
"""What every ticket of this version begins with."""


class Tickets(SignedTokens):
    """Issues tickets, and takes each of them once, in this process.

    A ticket stands in a URL, and so in access logs, where a used one is worth nothing. A worker does not know which of
    them another has taken: there its short life is what protects it. A reconnect token is no ticket, and the other way
    round, though the same secret signs both.

    Args:
        secrets_: Keys: the first one signs, all of them verify. A random one when there is none.
        ttl: Seconds that a ticket is good for.
    """

    prefix = TICKET_PREFIX
    context = b"fastapi-ws-stabilizer ticket 1\x00"
    kind = "ticket"

    def redeem(self, ticket: str) -> str:
        """Use a ticket up, and return the client id that it was issued for.

        Raises:
            InvalidTokenError: It is no ticket, was altered, was signed with another secret, was revoked, or was used
                before.
            TokenExpiredError: Its time is over.
        """
        return self.consume(ticket).client_id
