"""Tests of tickets: valid once, for a short time, and as tickets only."""

from __future__ import annotations

import pytest

from fastapi_ws_stabilizer.auth import signed_tokens as tokens_module
from fastapi_ws_stabilizer.auth.signed_tokens import PREFIX, ReconnectTokens, looks_like_token
from fastapi_ws_stabilizer.auth.tickets import TICKET_PREFIX, Tickets
from fastapi_ws_stabilizer.errors import InvalidTokenError, TokenExpiredError

SECRET = b"the key of this year"


def problem_with(tickets: Tickets, ticket: str) -> str:
    """Return the problem of an invalid ticket."""
    with pytest.raises(InvalidTokenError) as caught:
        tickets.redeem(ticket)
    assert caught.value.kind == "ticket"
    assert TICKET_PREFIX not in f"{caught.value} {caught.value!r} {caught.value.args}"
    return caught.value.problem


@pytest.mark.parametrize("client_id", ["ann", "ann@example.com", "🦊", "x" * 200, "wst1."])
def test_ticket_redeems_to_its_client_id(client_id: str) -> None:
    """A redeemed ticket returns the client id that it was issued for."""
    tickets = Tickets([SECRET], 30)
    assert tickets.redeem(tickets.issue(client_id)) == client_id


@pytest.mark.parametrize("client_id", ["", None, 7])
def test_ticket_for_empty_client_id_raises(client_id: object) -> None:
    """An empty or invalid client id raises where the ticket is issued."""
    with pytest.raises(ValueError, match="non-empty"):
        Tickets([SECRET], 30).issue(client_id)  # type: ignore[arg-type]


def test_ticket_is_redeemed_only_once() -> None:
    """A second redemption of a ticket is rejected."""
    tickets = Tickets([SECRET], 30)
    ticket = tickets.issue("ann")
    tickets.redeem(ticket)
    assert problem_with(tickets, ticket) == "used"


def test_ticket_expires_after_ticket_ttl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ticket is valid for its ttl, and the error after that names the option."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(tokens_module, "wall", lambda: now[0])
    tickets = Tickets([SECRET], 30)
    late, in_time = tickets.issue("ann"), tickets.issue("ann")
    now[0] += 29.5
    assert tickets.redeem(in_time) == "ann"
    now[0] += 0.5
    with pytest.raises(TokenExpiredError, match="ticket_ttl") as caught:
        tickets.redeem(late)
    assert caught.value.reason == "ticket expired"


def test_ticket_is_valid_on_workers_with_same_secret() -> None:
    """A ticket is valid on workers with the same secret, and on no others."""
    ticket = Tickets([SECRET], 30).issue("ann")
    assert Tickets([SECRET], 30).redeem(ticket) == "ann"
    assert problem_with(Tickets([], 30), ticket) == "signature"


def test_ticket_and_reconnect_token_are_not_interchangeable() -> None:
    """The same secret signs both, but neither is valid as the other, whatever its prefix is."""
    tickets, tokens = Tickets([SECRET], 30), ReconnectTokens([SECRET], 30)
    ticket, token = tickets.issue("ann"), tokens.issue("ann")
    assert not looks_like_token(ticket)
    assert problem_with(tickets, token) == "malformed"
    assert problem_with(tickets, token.replace(PREFIX, TICKET_PREFIX)) == "signature"
    for as_token, problem in ((ticket, "malformed"), (ticket.replace(TICKET_PREFIX, PREFIX), "signature")):
        with pytest.raises(InvalidTokenError) as caught:
            tokens.consume(as_token)
        assert (caught.value.problem, caught.value.kind) == (problem, "reconnect token")


def test_revoke_invalidates_earlier_tickets_of_client() -> None:
    """Earlier tickets of the client are rejected; later ones, and those of other clients, are valid."""
    tickets = Tickets([SECRET], 30)
    ann, bob = tickets.issue("ann"), tickets.issue("bob")
    tickets.revoke("ann")
    assert problem_with(tickets, ann) == "revoked"
    assert tickets.redeem(bob) == "bob"
    assert tickets.redeem(tickets.issue("ann")) == "ann"


def test_secret_is_not_in_repr_of_tickets() -> None:
    """The repr of the object does not contain the secret."""
    tickets = Tickets([SECRET], 30)
    assert SECRET.decode() not in repr(tickets)
