"""Tokens that a client presents: reconnect tokens, and tokens of sessions."""

from __future__ import annotations

from typing import Final

from fastapi_ws_stabilizer.auth.signed_tokens import RECONNECT_TOKEN, SignedTokens, TokenClaims
from fastapi_ws_stabilizer.errors import InvalidTokenError, TokenExpiredError
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.sessions.replay_buffer import ReplayLimits
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.wire.identifiers import is_name
from tests.fuzz.choices import Choices

KEY: Final = b"a key that all fuzzers know of us"
OTHER_KEY: Final = b"and one of somebody else, not ours"
TTL: Final = 3600.0


def tokens(data: bytes) -> None:
    """Use bytes for a client id, for a token, and for changes to valid tokens."""
    choices = Choices(data)
    client_id, text = choices.text(), choices.text()
    changes = choices.rest()
    store = SignedTokens(RECONNECT_TOKEN, [KEY], TTL)
    is_rejected(store, text)
    try:
        good, foreign = store.issue(client_id), SignedTokens(RECONNECT_TOKEN, [OTHER_KEY], TTL).issue(client_id)
    except ValueError:
        assert not client_id or not is_name(client_id)
        return
    is_rejected(store, foreign)
    altered = changed(good, changes)
    if altered != good:
        is_rejected(store, altered)
    assert store.read(good).client_id == client_id
    if client_id != text:
        _refuses_for(store, good, text)
    assert store.consume(good, client_id).client_id == client_id
    is_rejected_for_use(store, good)
    is_rejected_for_use(store, altered)
    assert len(store) == 1
    _sessions_token(text, changes)


def is_rejected(store: SignedTokens, token: str) -> None:
    """Check that a text that is not a valid token is rejected for every use."""
    for use in (store.read, store.check, store.consume):
        try:
            claim: TokenClaims = use(token)
        except (InvalidTokenError, TokenExpiredError) as error:
            assert token not in str(error) or len(token) < 20, "the error contains the token"
        else:
            raise AssertionError(f"{token!r} was accepted, as {claim!r}")


def is_rejected_for_use(store: SignedTokens, token: str) -> None:
    """Check that a used token is not valid a second time."""
    try:
        claim = store.consume(token)
    except (InvalidTokenError, TokenExpiredError):
        return
    raise AssertionError(f"{token!r} was accepted a second time, as {claim!r}")


def _refuses_for(store: SignedTokens, token: str, client_id: str) -> None:
    try:
        store.check(token, client_id)
    except InvalidTokenError:
        return
    raise AssertionError(f"{token!r} is valid for {client_id!r} too")


def changed(token: str, changes: bytes) -> str:
    """Return a token after some changes: characters replaced, inserted, removed, swapped, or appended."""
    choices = Choices(changes)
    while choices:
        how, at = choices.number() % 5, choices.number(2) % (len(token) + 1)
        new = chr(choices.number()) if how in (0, 1) else ""
        if how == 0:
            token = token[:at] + new + token[at + 1 :]
        elif how == 1:
            token = token[:at] + new + token[at:]
        elif how == 2:
            token = token[:at] + token[at + 1 :]
        elif how == 3:
            token = token[:at] + token[at : at + 1].swapcase() + token[at + 1 :]
        else:
            token += choices.pick(("=", "==", ".", "\n", " ", "A", "\0"))
    return token


def _sessions_token(text: str, changes: bytes) -> None:
    session = Session("ann", 0, ReplayLimits(8, 1024, 60.0), Counters(), lambda *_: None)
    assert not session.knows(text)
    assert session.present(text) is None
    good = session.new_token().partition(".")[2]
    for bad in (text, changed(good, changes), ""):
        if bad != good:
            assert not session.knows(bad)
            assert session.present(bad) is None
    assert session.knows(good)
    assert session.present(good) == 0
    later = session.new_token().partition(".")[2]
    assert session.knows(good), "the welcome with the next token may be lost"
    session.confirm()
    assert session.knows(later)
    assert not session.knows(good)
