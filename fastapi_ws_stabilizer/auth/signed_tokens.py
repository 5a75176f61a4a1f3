"""Signed tokens that prove a client id to any worker: reconnect tokens and tickets.

A plain client restores its state with a reconnect token. An HTTP route issues a ticket to a logged-in user for opening
a socket. A ticket is part of a URL, so it appears in access logs, but a used ticket is worthless.

A token contains nothing secret: the client id, the time of issue, the time of expiry and a unique number. Its signature
covers all of these and the kind of token.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fastapi_ws_stabilizer.clock import wall
from fastapi_ws_stabilizer.errors import InvalidTokenError, TokenExpiredError, TokenKind
from fastapi_ws_stabilizer.wire.identifiers import check_client_id, is_name

MAX_SIGNED_TOKEN_CHARS: Final = 8192
"""Maximum length of a token in characters. A longer token is rejected before anything is decoded."""

MAX_USED: Final = 100_000
"""Maximum number of used tokens that are remembered."""

MAX_REVOKED: Final = 100_000
"""Maximum number of clients with revoked tokens that are remembered."""

_HEAD: Final = struct.Struct(">QQ12sI")  # issued and expiry in milliseconds, number, bytes of the client id
_SIGNATURE_BYTES: Final = hashlib.sha256().digest_size


@dataclass(frozen=True)
class TokenPurpose:
    """Purpose of a token. A token of one purpose is not valid for another, although the same secret signs both.

    Attributes:
        kind: Name of the kind of token in errors.
        prefix: Prefix of every token of this purpose and version. A token of another system is not reported as an
            invalid one.
        context: Part of each signature, so that other data signed with the same secret is not a valid token.
    """

    kind: TokenKind
    prefix: str
    context: bytes


RECONNECT_TOKEN: Final = TokenPurpose(
    kind="reconnect token", prefix="wsr1.", context=b"fastapi-ws-stabilizer reconnect token 1\x00"
)
"""A plain client restores its state with it."""

TICKET: Final = TokenPurpose(kind="ticket", prefix="wst1.", context=b"fastapi-ws-stabilizer ticket 1\x00")
"""A client opens one socket with it."""


@dataclass(frozen=True)
class TokenClaims:
    """Content of a token with a valid signature.

    Attributes:
        client_id: The client that the token was issued for.
        issued: Time of issue, in milliseconds of wall time.
        until: Time of expiry, in milliseconds of wall time.
        number: Unique number of the token.
    """

    client_id: str
    issued: int
    until: int
    number: bytes


class SignedTokens:
    """Issuer and verifier of the tokens of one purpose. Each token is valid once in this process.

    A worker does not know which tokens another worker has accepted. Across workers only its lifetime protects a token.

    Args:
        purpose: Purpose of the tokens, `RECONNECT_TOKEN` or `TICKET`.
        secrets_: Signing keys. The first key signs, all keys verify. Without keys, a random key is used.
        ttl: Lifetime of a token in seconds.
    """

    def __init__(self, purpose: TokenPurpose, secrets_: Sequence[bytes], ttl: float) -> None:
        self._purpose = purpose
        self._keys = tuple(secrets_) or (secrets.token_bytes(32),)
        self._ttl_ms = int(ttl * 1000)
        self._used: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # number → issued, until
        self._revoked: OrderedDict[str, int] = OrderedDict()  # client id → latest time of issue that is revoked
        self._issued_after = -1
        self._latest = -1

    def __len__(self) -> int:
        """Return the number of used tokens that are remembered."""
        return len(self._used)

    def issue(self, client_id: str) -> str:
        """Issue a token for a client. Earlier revocations do not affect it.

        Raises:
            ValueError: The client id is invalid.
        """
        check_client_id(client_id)
        name = client_id.encode()
        now = _now()
        # Later than what was revoked or forgotten, even in the same millisecond or after the clock was set back.
        issued = max(now, self._revoked.get(client_id, -1) + 1, self._issued_after + 1)
        self._latest = max(self._latest, issued)
        body = _HEAD.pack(issued, now + self._ttl_ms, secrets.token_bytes(12), len(name)) + name
        return self._purpose.prefix + _text(body + self._sign(self._keys[0], body))

    def read(self, token: str) -> TokenClaims:
        """Verify a token and return its content, without using it up.

        Raises:
            InvalidTokenError: The text is not a token of this purpose, was altered or truncated, or was signed with an
                unknown secret.
            TokenExpiredError: The token has expired.
        """
        prefix = self._purpose.prefix
        if not isinstance(token, str) or not token.startswith(prefix) or len(token) > MAX_SIGNED_TOKEN_CHARS:
            raise self._invalid("malformed")
        try:
            text = token[len(prefix) :].encode("ascii")
            raw = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (UnicodeEncodeError, binascii.Error):
            raise self._invalid("malformed") from None
        body, signature = raw[:-_SIGNATURE_BYTES], raw[-_SIGNATURE_BYTES:]
        if len(body) < _HEAD.size or _text(raw) != token[len(prefix) :]:  # one encoding for each token
            raise self._invalid("malformed")
        matches = False
        for key in self._keys:  # always all keys, so that the duration does not reveal which key matches
            matches |= hmac.compare_digest(self._sign(key, body), signature)
        if not matches:
            raise self._invalid("signature")
        issued, until, number, length = _HEAD.unpack_from(body)
        name = body[_HEAD.size :]
        if len(name) != length:
            raise self._invalid("malformed")
        if until <= _now():
            raise TokenExpiredError(kind=self._purpose.kind)
        client_id = name.decode("utf-8", "surrogatepass")
        if not is_name(client_id):  # another version with the same secret may allow such a name
            raise self._invalid("malformed")
        return TokenClaims(client_id, issued, until, number)

    def check(self, token: str, client_id: str | None = None) -> TokenClaims:
        """Verify that a token can be used, without using it up.

        Args:
            token: The token that the client sent.
            client_id: The client that the token must belong to. By default any client.

        Raises:
            InvalidTokenError: As for `read`, or the token belongs to another client, was revoked, or was used before.
            TokenExpiredError: The token has expired. It also counts as expired if the records of its use or revocation
                may have been dropped because of `MAX_USED` or `MAX_REVOKED`.
        """
        claim = self.read(token)
        if client_id is not None and claim.client_id != client_id:
            raise self._invalid("other_client")
        self.check_not_revoked(claim)
        if claim.number in self._used:
            raise self._invalid("used")
        if claim.issued <= self._issued_after:
            raise TokenExpiredError(kind=self._purpose.kind)
        return claim

    def check_not_revoked(self, claim: TokenClaims) -> None:
        """Check that a verified token has not been revoked since its check. It may have been used.

        Raises:
            InvalidTokenError: The token was revoked.
        """
        if claim.issued <= self._revoked.get(claim.client_id, -1):
            raise self._invalid("revoked")

    def consume(self, token: str, client_id: str | None = None) -> TokenClaims:
        """Verify a token and use it up. Raises the same errors as `check`."""
        claim = self.check(token, client_id)
        self._remember(claim)
        return claim

    def revoke(self, client_id: str) -> None:
        """Revoke every token of a client that was issued up to now, including this millisecond.

        Tokens from another worker are compared with the clock of this worker, and each worker needs its own call. A
        revocation is remembered for the lifetime of a token. At most `MAX_REVOKED` revocations are remembered. When the
        oldest is dropped, all tokens issued up to its time are rejected, whichever client they belong to. So a revoked
        token never becomes valid again.
        """
        now = _now()
        self._revoked[client_id] = max(now, self._latest)  # the clock may have been set back since the last issue
        self._revoked.move_to_end(client_id)
        while self._revoked:
            first, moment = next(iter(self._revoked.items()))
            if moment + self._ttl_ms > now and len(self._revoked) <= MAX_REVOKED:
                break
            # For an expired revocation this rejects only tokens from a worker with a longer ttl.
            self._issued_after = max(self._issued_after, moment)
            del self._revoked[first]

    def _invalid(self, problem: str) -> InvalidTokenError:
        return InvalidTokenError(problem, kind=self._purpose.kind)

    def _sign(self, key: bytes, body: bytes) -> bytes:
        return hmac.new(key, self._purpose.context + body, hashlib.sha256).digest()

    def _remember(self, claim: TokenClaims) -> None:
        """Remember until its expiry that a token was used.

        At most `MAX_USED` tokens are remembered. When the oldest is dropped, all tokens issued up to its time of issue
        are rejected. So a token is never valid twice.
        """
        self._used[claim.number] = (claim.issued, claim.until)
        now = _now()
        while self._used:
            number, (issued, until) = next(iter(self._used.items()))
            if until > now:
                if len(self._used) <= MAX_USED:
                    break
                self._issued_after = max(self._issued_after, issued)
            del self._used[number]


def looks_like_token(text: str | None) -> bool:
    """Return whether a text looks like a reconnect token of this library, not a credential of the application."""
    return text is not None and text.startswith(RECONNECT_TOKEN.prefix)


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _now() -> int:
    return int(wall() * 1000)
