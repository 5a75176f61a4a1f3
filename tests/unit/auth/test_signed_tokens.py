"""Tests of signed tokens: valid once, for one client and one purpose, for a limited time, with the right secret."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.auth import signed_tokens as tokens_module
from fastapi_ws_stabilizer.auth.signed_tokens import (
    MAX_SIGNED_TOKEN_CHARS,
    RECONNECT_TOKEN,
    TICKET,
    SignedTokens,
    looks_like_token,
)
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import InvalidTokenError, TokenExpiredError
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.wire.identifiers import is_name

PREFIX = RECONNECT_TOKEN.prefix
OLD, NEW = b"the key of last year", b"the key of this year"
IDS = ["ann@example.com", "a.b.c", "🦊", "x" * 200, " ", "ü", "a-_=.b", "wsr1."]
INVALID_IDS = ["", "a\x00b\x1f\n", "\ud800", "x" * 257, "a\u2028b"]


class WallClock:
    """Wall clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_800_000_000.0
        monkeypatch.setattr(tokens_module, "wall", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    """Return a fake wall clock."""
    return WallClock(monkeypatch)


def raw_of(token: str) -> bytes:
    """Return the bytes in a token."""
    text = token[len(PREFIX) :]
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def token_of(raw: bytes) -> str:
    """Return a token of these bytes."""
    return PREFIX + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def problem_with(tokens: SignedTokens, token: str, client_id: str | None = None) -> str:
    """Return the problem of an invalid token."""
    with pytest.raises(InvalidTokenError) as caught:
        tokens.consume(token, client_id)
    assert caught.value.__cause__ is None
    assert PREFIX not in f"{caught.value} {caught.value!r} {caught.value.args}"
    return caught.value.problem


@pytest.mark.parametrize("client_id", INVALID_IDS, ids=ascii)
def test_token_for_invalid_client_id_is_rejected(client_id: str) -> None:
    """No token is issued for an invalid client id, and a signed token with one is malformed."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60.0)
    with pytest.raises(ValueError, match=r"^client_id .*(must|has|contains)"):
        tokens.issue(client_id)
    if client_id:
        raw, name = raw_of(tokens.issue("ann")), client_id.encode("utf-8", "surrogatepass")
        body = raw[:28] + len(name).to_bytes(4, "big") + name
        foreign = token_of(body + hmac.new(NEW, RECONNECT_TOKEN.context + body, hashlib.sha256).digest())
        assert problem_with(tokens, foreign) == "malformed"


@pytest.mark.parametrize("client_id", IDS)
def test_token_contains_its_client_id(client_id: str) -> None:
    """A token is valid for its client id, with any characters."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    assert tokens.consume(tokens.issue(client_id), client_id).client_id == client_id


@given(st.text(min_size=1, max_size=256).filter(is_name))
def test_any_client_id_survives_round_trip(client_id: str) -> None:
    """The token of any valid client id contains exactly that id."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    assert tokens.read(tokens.issue(client_id)).client_id == client_id


def test_first_version_token_stays_valid(clock: WallClock) -> None:
    """A token of the first format version stays readable, for workers and clients of an older release."""
    token = "wsr1.AAABoxhcUAAAAAGjGF06YAABAgMEBQYHCAkKCwAAAANhbm4Qics_i7kSvClX2cd4VjX6ljxaLwo3LbTJ630pU0Jlkg"
    claim = SignedTokens(RECONNECT_TOKEN, [NEW], 60).consume(token, "ann")
    assert (claim.issued, claim.until, claim.number) == (1_800_000_000_000, 1_800_000_060_000, bytes(range(12)))


def test_reading_token_does_not_consume_it() -> None:
    """A token that was only read is still valid."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    token = tokens.issue("ann")
    assert tokens.read(token) == tokens.read(token) == tokens.consume(token)


def test_token_is_valid_once() -> None:
    """A second use of a token is rejected as used."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    token = tokens.issue("ann")
    tokens.consume(token)
    assert problem_with(tokens, token) == "used"
    assert len(tokens) == 1


def test_simultaneously_issued_tokens_differ(clock: WallClock) -> None:
    """Two tokens of one client and one moment differ, and each is valid once."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    first, second = tokens.issue("ann"), tokens.issue("ann")
    assert tokens.consume(first).number != tokens.consume(second).number


def test_token_of_other_client_is_rejected_unconsumed() -> None:
    """A token that another client presents is rejected, and stays valid for its own client."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    token = tokens.issue("ann")
    assert problem_with(tokens, token, "bob") == "other_client"
    assert tokens.consume(token, "ann").client_id == "ann"


@pytest.mark.parametrize("pair", [("ann", "ann "), ("a", "ab"), ("é", "e\u0301"), ("1", "\u0661")])
def test_similar_client_ids_are_different(pair: tuple[str, str]) -> None:
    """A token is bound to the exact characters of its client id."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    assert problem_with(tokens, tokens.issue(pair[0]), pair[1]) == "other_client"


def test_truncated_token_is_rejected() -> None:
    """No prefix of a token is a valid token."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    token = tokens.issue("ann@example.com")
    problems = {problem_with(tokens, token[:length]) for length in range(len(token))}
    assert problems == {"malformed", "signature"}
    assert len(tokens) == 0


def test_token_with_altered_byte_is_rejected() -> None:
    """A token with any altered byte is rejected, including its signature."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    raw = raw_of(tokens.issue("ann@example.com"))
    for index in range(len(raw)):
        for bit in (0x01, 0x80):
            altered = raw[:index] + bytes([raw[index] ^ bit]) + raw[index + 1 :]
            assert problem_with(tokens, token_of(altered)) == "signature"


def test_token_with_altered_character_is_rejected() -> None:
    """A token with any altered character is rejected, including its prefix."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    token = tokens.issue("ann")
    for index in range(len(token)):
        other = "B" if token[index] == "A" else "A"
        altered = token[:index] + other + token[index + 1 :]
        assert problem_with(tokens, altered) in ("malformed", "signature")


def test_forged_token_is_rejected() -> None:
    """A token that is signed with another secret is rejected."""
    tokens, forger = (
        SignedTokens(RECONNECT_TOKEN, [NEW], 60),
        SignedTokens(RECONNECT_TOKEN, [b"a guess, and a bad one"], 60),
    )
    assert problem_with(tokens, forger.issue("ann"), "ann") == "signature"


def test_plain_hmac_with_same_secret_is_rejected() -> None:
    """A plain HMAC with the right key is rejected, because the signature includes its purpose."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    body = raw_of(tokens.issue("ann"))[:-32]
    assert problem_with(tokens, token_of(body + hmac.digest(NEW, body, hashlib.sha256))) == "signature"


def test_token_of_other_secret_is_rejected() -> None:
    """Tokens of two managers without a shared secret are not valid for each other."""
    mine, yours = SignedTokens(RECONNECT_TOKEN, [], 60), SignedTokens(RECONNECT_TOKEN, [], 60)
    assert problem_with(yours, mine.issue("ann")) == "signature"
    assert mine.consume(mine.issue("ann")).client_id == "ann"


def test_shared_secret_is_valid_in_every_process() -> None:
    """A token is valid in each process with its secret."""
    assert (
        SignedTokens(RECONNECT_TOKEN, [NEW], 60)
        .consume(SignedTokens(RECONNECT_TOKEN, [NEW], 60).issue("ann"))
        .client_id
        == "ann"
    )


def test_token_from_before_rotation_is_valid_with_old_key() -> None:
    """The first key signs, and all keys verify."""
    before, after = SignedTokens(RECONNECT_TOKEN, [OLD], 60), SignedTokens(RECONNECT_TOKEN, [NEW, OLD], 60)
    assert after.consume(before.issue("ann")).client_id == "ann"
    assert SignedTokens(RECONNECT_TOKEN, [NEW], 60).consume(after.issue("ann")).client_id == "ann"


def test_token_from_before_rotation_is_invalid_without_old_key() -> None:
    """After the old key is removed, its tokens are rejected."""
    assert (
        problem_with(SignedTokens(RECONNECT_TOKEN, [NEW], 60), SignedTokens(RECONNECT_TOKEN, [OLD], 60).issue("ann"))
        == "signature"
    )


def test_token_expires_after_ttl(clock: WallClock) -> None:
    """A token is valid for its ttl and not a millisecond longer."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    token = tokens.issue("ann")
    clock.now += 59.999
    assert tokens.read(token).client_id == "ann"
    clock.now += 0.001
    with pytest.raises(TokenExpiredError) as caught:
        tokens.consume(token, "ann")
    assert token not in str(caught.value)
    assert len(tokens) == 0


def test_expired_forged_token_is_reported_as_forged(clock: WallClock) -> None:
    """The signature is checked first, so that an expired forgery is reported as a bad signature."""
    token = SignedTokens(RECONNECT_TOKEN, [OLD], 60).issue("ann")
    clock.now += 1000
    assert problem_with(SignedTokens(RECONNECT_TOKEN, [NEW], 60), token) == "signature"


def test_consumed_expired_token_is_reported_as_expired(clock: WallClock) -> None:
    """Used tokens are stored only until they expire."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    token = tokens.issue("ann")
    tokens.consume(token)
    clock.now += 60
    with pytest.raises(TokenExpiredError):
        tokens.consume(token)
    tokens.consume(tokens.issue("bob"))
    assert len(tokens) == 1


def test_second_spelling_of_token_is_rejected() -> None:
    """A token has one spelling: padding, another alphabet, spaces and altered unused bits are rejected."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    while not {"-", "_"} <= set(token := tokens.issue("ann")):
        pass
    text = token[len(PREFIX) :]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    assert len(text) % 4, "the last character of this token has unused bits"
    loose = text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1]
    spellings = [
        text + "=" * (-len(text) % 4),
        text + "=",
        text.replace("-", "+").replace("_", "/"),
        text.replace("-", "+"),
        text.replace("_", "/"),
        text[:8] + "\n" + text[8:],
        text + " ",
        " " + text,
        loose,
        text.replace("-", "\u2010"),
    ]
    for spelling in spellings:
        assert problem_with(tokens, PREFIX + spelling) == "malformed"
    assert problem_with(tokens, "WSR1." + text) == "malformed"
    assert tokens.consume(token).client_id == "ann"


def test_wrong_client_id_length_is_rejected() -> None:
    """A signed token with a wrong length of its client id is rejected."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    body = raw_of(tokens.issue("ann"))[:-32] + b"a"
    assert problem_with(tokens, token_of(body + tokens._sign(NEW, body))) == "malformed"


@pytest.mark.parametrize(
    "junk", ["", "x", PREFIX, PREFIX + "!", PREFIX + "é", PREFIX + "A" * 9000, "a.b.c", "wsr2.AAAA"]
)
def test_junk_is_malformed_token(junk: str) -> None:
    """Text that is no token is reported as malformed."""
    assert problem_with(SignedTokens(RECONNECT_TOKEN, [NEW], 60), junk) == "malformed"


@pytest.mark.parametrize("junk", [None, 7, b"wsr1.AAAA", ["wsr1."]])
def test_non_text_is_malformed_token(junk: object) -> None:
    """A value that is not a text raises the error of a malformed token, not a type error."""
    with pytest.raises(InvalidTokenError) as caught:
        SignedTokens(RECONNECT_TOKEN, [NEW], 60).consume(junk)  # type: ignore[arg-type]
    assert caught.value.problem == "malformed"


@given(st.one_of(st.text(), st.text().map(PREFIX.__add__), st.binary(max_size=200).map(token_of)))
def test_random_text_is_rejected_and_not_stored(text: str) -> None:
    """Random text raises the error for invalid tokens, and is not stored."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    with pytest.raises(InvalidTokenError):
        tokens.consume(text)
    assert len(tokens) == 0


def test_invalid_tokens_use_no_memory() -> None:
    """20,000 invalid tokens leave nothing in memory, because only valid ones are stored."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    raw = raw_of(tokens.issue("ann"))
    for number in range(20_000):
        bogus = number.to_bytes(8, "big") + raw[8:] if number % 2 else number.to_bytes(4, "big") * 20
        with pytest.raises(InvalidTokenError):
            tokens.consume(token_of(bogus))
    assert len(tokens) == 0
    assert len(tokens._used) == len(tokens._revoked) == 0
    assert vars(tokens).keys() == {"_purpose", "_keys", "_ttl_ms", "_used", "_revoked", "_issued_after", "_latest"}


def test_oversized_token_is_rejected_undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oversized token is rejected before it is decoded."""
    monkeypatch.setattr(tokens_module.base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    assert problem_with(SignedTokens(RECONNECT_TOKEN, [NEW], 60), PREFIX + "A" * MAX_SIGNED_TOKEN_CHARS) == "malformed"


def test_forgotten_consumed_token_stays_invalid(clock: WallClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the oldest used tokens are forgotten, all tokens that were issued earlier are rejected."""
    monkeypatch.setattr(tokens_module, "MAX_USED", 3)
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    issued = []
    for _ in range(10):
        issued.append(tokens.issue("ann"))
        clock.now += 0.001
    unused = issued.pop(5)
    for token in issued:
        tokens.consume(token)
        assert len(tokens) <= 3
    for token in issued:
        with pytest.raises((InvalidTokenError, TokenExpiredError)):
            tokens.consume(token)
    with pytest.raises(TokenExpiredError):
        tokens.consume(unused)
    assert tokens.consume(tokens.issue("ann")).client_id == "ann"


def test_out_of_order_consumed_tokens_stay_invalid(clock: WallClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor rises to the newest forgotten token, in any order of use."""
    monkeypatch.setattr(tokens_module, "MAX_USED", 2)
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    issued = []
    for _ in range(8):
        issued.append(tokens.issue("ann"))
        clock.now += 0.001
    used = []
    for token in (issued[7], issued[0], issued[6], issued[1], issued[5], issued[2]):
        try:
            tokens.consume(token)
        except TokenExpiredError:
            continue
        used.append(token)
    assert issued[7] in used
    for _ in range(2):
        clock.now += 0.001
        tokens.consume(tokens.issue("ann"))
    for token in used:
        with pytest.raises((InvalidTokenError, TokenExpiredError)):
            tokens.consume(token)


def test_expired_consumed_tokens_free_room_without_floor(clock: WallClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expired used tokens are forgotten without a rise of the floor."""
    monkeypatch.setattr(tokens_module, "MAX_USED", 2)
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    for _ in range(2):
        tokens.consume(tokens.issue("ann"))
    clock.now += 30
    waiting = tokens.issue("bob")
    clock.now += 30
    tokens.consume(tokens.issue("cid"))
    assert len(tokens) == 1
    assert tokens.consume(waiting).client_id == "bob"


# ── revocation ──


def test_token_issued_before_revocation_is_rejected() -> None:
    """All earlier tokens of the client are rejected, from any process, and tokens of other clients stay valid."""
    tokens, other_worker = SignedTokens(RECONNECT_TOKEN, [NEW], 60), SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    before = [tokens.issue("ann"), tokens.issue("ann"), other_worker.issue("ann")]
    bob = tokens.issue("bob")
    tokens.revoke("ann")
    assert [problem_with(tokens, token, "ann") for token in before] == ["revoked"] * 3
    assert tokens.consume(bob).client_id == "bob"


def test_token_issued_after_revocation_is_valid(clock: WallClock) -> None:
    """A token that is issued after the revocation is valid, even in the same millisecond."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    before = tokens.issue("ann")
    tokens.revoke("ann")
    after = tokens.issue("ann")
    assert problem_with(tokens, before) == "revoked"
    assert tokens.consume(after, "ann").client_id == "ann"


def test_second_revocation_in_same_millisecond_applies(clock: WallClock) -> None:
    """With several revocations in a millisecond, only a token issued after the last one is valid."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    issued = []
    for _ in range(3):
        issued.append(tokens.issue("ann"))
        tokens.revoke("ann")
    assert [problem_with(tokens, token) for token in issued] == ["revoked"] * 3
    assert tokens.consume(tokens.issue("ann")).client_id == "ann"


def test_clock_set_back_does_not_undo_revocation(clock: WallClock) -> None:
    """A revocation rejects earlier tokens after the clock is set back too, and new tokens are valid."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    before = tokens.issue("ann")
    clock.now -= 3600
    tokens.revoke("ann")
    assert problem_with(tokens, before) == "revoked"
    token = tokens.issue("ann")
    clock.now += 59.999
    assert tokens.read(token).client_id == "ann"
    clock.now += 0.001
    with pytest.raises(TokenExpiredError):
        tokens.read(token)


def test_latest_revocation_applies(clock: WallClock) -> None:
    """A second revocation rejects the tokens that were issued since the first."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    tokens.revoke("ann")
    clock.now += 1
    between = tokens.issue("ann")
    clock.now += 1
    tokens.revoke("ann")
    assert problem_with(tokens, between) == "revoked"


def test_revocation_covers_consumed_and_unused_tokens() -> None:
    """A revocation rejects used and unused tokens, and a rejection stores nothing."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    used, unused = tokens.issue("ann"), tokens.issue("ann")
    tokens.consume(used)
    tokens.revoke("ann")
    assert problem_with(tokens, used) == problem_with(tokens, unused) == "revoked"
    assert len(tokens) == 1


def test_revocation_is_forgotten_after_revoked_tokens_expire(clock: WallClock) -> None:
    """A revocation is forgotten after its tokens have expired, and other clients' tokens stay valid."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    revoked = tokens.issue("ann")
    tokens.revoke("ann")
    clock.now += 1
    good = tokens.issue("bob")
    clock.now += 58.5
    tokens.revoke("cid")
    assert list(tokens._revoked) == ["ann", "cid"]
    clock.now += 0.5
    tokens.revoke("cid")
    assert list(tokens._revoked) == ["cid"]
    with pytest.raises(TokenExpiredError):
        tokens.consume(revoked)
    assert tokens.consume(good).client_id == "bob"


def test_forgotten_revocation_rejects_longer_lived_token(clock: WallClock) -> None:
    """A token with a longer ttl from another worker is rejected after the revocation is forgotten."""
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    long = SignedTokens(RECONNECT_TOKEN, [NEW], 3600).issue("ann")
    tokens.revoke("ann")
    clock.now += 61
    tokens.revoke("bob")
    assert list(tokens._revoked) == ["bob"]
    with pytest.raises(TokenExpiredError):
        tokens.consume(long)


def test_revoked_token_stays_invalid_above_revocation_limit(clock: WallClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above MAX_REVOKED, all tokens are rejected that were issued before the forgotten revocation."""
    monkeypatch.setattr(tokens_module, "MAX_REVOKED", 3)
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    issued = {}
    for number in range(8):
        issued[f"client {number}"] = tokens.issue(f"client {number}")
        clock.now += 0.001
    for client_id in list(issued)[:5]:
        tokens.revoke(client_id)
        assert len(tokens._revoked) <= 3
        clock.now += 0.001
    for token in issued.values():
        with pytest.raises((InvalidTokenError, TokenExpiredError)):
            tokens.consume(token)
    assert tokens.consume(tokens.issue("client 0")).client_id == "client 0"


def test_repeated_revocation_uses_one_entry(clock: WallClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated revocation renews one entry and does not evict others."""
    monkeypatch.setattr(tokens_module, "MAX_REVOKED", 2)
    tokens = SignedTokens(RECONNECT_TOKEN, [NEW], 60)
    for client_id in ("ann", "bob", "ann", "ann"):
        tokens.revoke(client_id)
        clock.now += 1
    assert list(tokens._revoked) == ["bob", "ann"]
    assert tokens._issued_after == -1


async def test_logs_and_reprs_contain_no_token_or_secret(caplog: pytest.LogCaptureFixture) -> None:
    """No token and no secret is in a log, a repr, an error or a config."""
    secret = "a secret of at least sixteen bytes"
    config = WebSocketConfig(reconnect_secret=secret)
    with caplog.at_level(logging.DEBUG):
        manager = WebSocketConnectionManager(config)
        token = manager.generate_reconnect_token("ann")
        assert await manager.validate_reconnect_token(token) == "ann"
        with pytest.raises(InvalidTokenError) as caught:
            await manager.validate_reconnect_token(token)
    claim = SignedTokens(RECONNECT_TOKEN, [secret.encode()], 60).read(token)
    texts = [caplog.text, repr(manager), str(manager), repr(config), str(config), repr(manager._tokens)]
    texts += [str(caught.value), repr(caught.value), repr(claim), str(caught.value.args)]
    for text in texts:
        assert token not in text
        assert secret not in text


def test_token_is_distinguished_from_credential() -> None:
    """Only a text with the prefix of a token is recognized as one."""
    assert looks_like_token(SignedTokens(RECONNECT_TOKEN, [NEW], 60).issue("ann"))
    assert not looks_like_token("eyJhbGciOi.J9.x")
    assert not looks_like_token(None)


# ── tickets ──


def problem_with_ticket(tickets: SignedTokens, ticket: str) -> str:
    """Return the problem of an invalid ticket."""
    with pytest.raises(InvalidTokenError) as caught:
        tickets.consume(ticket)
    assert caught.value.kind == "ticket"
    assert TICKET.prefix not in f"{caught.value} {caught.value!r} {caught.value.args}"
    return caught.value.problem


@pytest.mark.parametrize("client_id", ["ann", "ann@example.com", "🦊", "x" * 200, "wst1."])
def test_ticket_contains_its_client_id(client_id: str) -> None:
    """A consumed ticket returns the client id that it was issued for."""
    tickets = SignedTokens(TICKET, [NEW], 30)
    assert tickets.consume(tickets.issue(client_id)).client_id == client_id


@pytest.mark.parametrize("client_id", ["", None, 7])
def test_ticket_for_empty_client_id_raises(client_id: object) -> None:
    """An empty or invalid client id raises where the ticket is issued."""
    with pytest.raises(ValueError, match="non-empty"):
        SignedTokens(TICKET, [NEW], 30).issue(client_id)  # type: ignore[arg-type]


def test_ticket_is_consumed_only_once() -> None:
    """A second use of a ticket is rejected."""
    tickets = SignedTokens(TICKET, [NEW], 30)
    ticket = tickets.issue("ann")
    tickets.consume(ticket)
    assert problem_with_ticket(tickets, ticket) == "used"


def test_ticket_expires_after_ticket_ttl(clock: WallClock) -> None:
    """A ticket is valid for its ttl, and the error after that names the option."""
    tickets = SignedTokens(TICKET, [NEW], 30)
    late, in_time = tickets.issue("ann"), tickets.issue("ann")
    clock.now += 29.5
    assert tickets.consume(in_time).client_id == "ann"
    clock.now += 0.5
    with pytest.raises(TokenExpiredError, match="ticket_ttl") as caught:
        tickets.consume(late)
    assert caught.value.reason == "ticket expired"


def test_ticket_is_valid_on_workers_with_same_secret() -> None:
    """A ticket is valid on workers with the same secret, and on no others."""
    ticket = SignedTokens(TICKET, [NEW], 30).issue("ann")
    assert SignedTokens(TICKET, [NEW], 30).consume(ticket).client_id == "ann"
    assert problem_with_ticket(SignedTokens(TICKET, [], 30), ticket) == "signature"


def test_ticket_and_reconnect_token_are_not_interchangeable() -> None:
    """The same secret signs both, but neither is valid as the other, whatever its prefix is."""
    tickets, tokens = SignedTokens(TICKET, [NEW], 30), SignedTokens(RECONNECT_TOKEN, [NEW], 30)
    ticket, token = tickets.issue("ann"), tokens.issue("ann")
    assert not looks_like_token(ticket)
    assert problem_with_ticket(tickets, token) == "malformed"
    assert problem_with_ticket(tickets, token.replace(PREFIX, TICKET.prefix)) == "signature"
    for as_token, problem in ((ticket, "malformed"), (ticket.replace(TICKET.prefix, PREFIX), "signature")):
        with pytest.raises(InvalidTokenError) as caught:
            tokens.consume(as_token)
        assert (caught.value.problem, caught.value.kind) == (problem, "reconnect token")


def test_revoke_invalidates_earlier_tickets_of_client() -> None:
    """Earlier tickets of the client are rejected; later ones, and those of other clients, are valid."""
    tickets = SignedTokens(TICKET, [NEW], 30)
    ann, bob = tickets.issue("ann"), tickets.issue("bob")
    tickets.revoke("ann")
    assert problem_with_ticket(tickets, ann) == "revoked"
    assert tickets.consume(bob).client_id == "bob"
    assert tickets.consume(tickets.issue("ann")).client_id == "ann"


def test_secret_is_not_in_repr_of_tickets() -> None:
    """The repr of the object does not contain the secret."""
    tickets = SignedTokens(TICKET, [NEW], 30)
    assert NEW.decode() not in repr(tickets)
