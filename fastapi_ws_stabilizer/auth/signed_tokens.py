"""Signed words by which a client proves, later and to any worker, which client it is: reconnect tokens, and tickets.

A token holds nothing secret and nothing but what it says: whose it is, when it was issued, until when it is good, and a
number of its own. What makes it worth something is the signature over all of that, and over what it is good for.
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
from typing import ClassVar, Final

from fastapi_ws_stabilizer.clock import wall
from fastapi_ws_stabilizer.errors import InvalidTokenError, TokenExpiredError, TokenKind
from fastapi_ws_stabilizer.wire.identifiers import check_client_id, is_name

PREFIX: Final = "wsr1."
"""What every reconnect token of this version begins with, so that somebody else's token is not taken for a bad one."""

MAX_SIGNED_TOKEN_CHARS: Final = 8192
"""Longer ones are refused before anything is decoded."""

MAX_USED: Final = 100_000
"""Used tokens that are remembered at most."""

MAX_REVOKED: Final = 100_000
"""Clients whose tokens were revoked that are remembered at most."""

_CONTEXT: Final = b"fastapi-ws-stabilizer reconnect token 1\x00"
"""Goes into each signature, so that what the same secret signs elsewhere is no reconnect token."""

_HEAD: Final = struct.Struct(">QQ12sI")  # issued and good until, in milliseconds; number; bytes of the client id
_SIGNATURE_BYTES: Final = hashlib.sha256().digest_size


@dataclass(frozen=True)
class TokenClaims:
    """What a token says, after its signature was found good.

    Attributes:
        client_id: Whose it is.
        issued: When it was made, in milliseconds of wall time.
        until: Until when it is good.
        number: What tells it from all others.
    """

    client_id: str
    issued: int
    until: int
    number: bytes


class SignedTokens:
    """Issues tokens of one kind, and takes each of them once, in this process.

    Args:
        secrets_: Keys: the first one signs, all of them verify. A random one when there is none.
        ttl: Seconds that a token is good for.

    Attributes:
        prefix: What its tokens begin with.
        context: Goes into each signature, so that a token of one kind is none of another.
        kind: What errors call it.
    """

    prefix: ClassVar[str]
    context: ClassVar[bytes]
    kind: ClassVar[TokenKind]

    def __init__(self, secrets_: Sequence[bytes], ttl: float) -> None:
        self._keys = tuple(secrets_) or (secrets.token_bytes(32),)
        self._ttl_ms = int(ttl * 1000)
        self._used: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # number → issued, until
        self._revoked: OrderedDict[str, int] = OrderedDict()  # client id → the last moment whose tokens are not good
        self._floor = -1
        self._latest = -1

    def __len__(self) -> int:
        """How many used tokens are remembered."""
        return len(self._used)

    def issue(self, client_id: str) -> str:
        """Make a token for a client. It is good whatever has been revoked before.

        Raises:
            ValueError: No client can be called so.
        """
        check_client_id(client_id)
        name = client_id.encode()
        now = _now()
        # After what was revoked or forgotten, also in the same millisecond, or when the clock was set back since.
        issued = max(now, self._revoked.get(client_id, -1) + 1, self._floor + 1)
        self._latest = max(self._latest, issued)
        body = _HEAD.pack(issued, now + self._ttl_ms, secrets.token_bytes(12), len(name)) + name
        return self.prefix + _text(body + _sign(self._keys[0], body, self.context))

    def read(self, token: str) -> TokenClaims:
        """Verify a token and return what it says, without using it up.

        Raises:
            InvalidTokenError: It is no token, was altered or cut, or was signed with a secret that is not ours.
            TokenExpiredError: Its time is over.
        """
        if not isinstance(token, str) or not token.startswith(self.prefix) or len(token) > MAX_SIGNED_TOKEN_CHARS:
            raise InvalidTokenError("malformed", kind=self.kind)
        try:
            text = token[len(self.prefix) :].encode("ascii")
            raw = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (UnicodeEncodeError, binascii.Error):
            raise InvalidTokenError("malformed", kind=self.kind) from None
        body, signature = raw[:-_SIGNATURE_BYTES], raw[-_SIGNATURE_BYTES:]
        if len(body) < _HEAD.size or _text(raw) != token[len(self.prefix) :]:  # two spellings of one token would be two
            raise InvalidTokenError("malformed", kind=self.kind)
        good = False
        for key in self._keys:  # all of them, always: how long it takes tells nothing
            good |= hmac.compare_digest(_sign(key, body, self.context), signature)
        if not good:
            raise InvalidTokenError("signature", kind=self.kind)
        issued, until, number, length = _HEAD.unpack_from(body)
        name = body[_HEAD.size :]
        if len(name) != length:
            raise InvalidTokenError("malformed", kind=self.kind)
        if until <= _now():
            raise TokenExpiredError(kind=self.kind)
        client_id = name.decode("utf-8", "surrogatepass")
        if not is_name(client_id):  # another version, which shares the secret, has taken such a name
            raise InvalidTokenError("malformed", kind=self.kind)
        return TokenClaims(client_id, issued, until, number)

    def check(self, token: str, client_id: str | None = None) -> TokenClaims:
        """Verify a token that is going to be used, without using it up.

        Args:
            token: What the client sent.
            client_id: Whose it must be; anybody's when left out.

        Raises:
            InvalidTokenError: As `read`; or it is another client's, was revoked, or was used before.
            TokenExpiredError: Its time is over, or so many have been used or revoked since that we do not remember
                whether it was.
        """
        claim = self.read(token)
        if client_id is not None and claim.client_id != client_id:
            raise InvalidTokenError("other_client", kind=self.kind)
        self.check_not_revoked(claim)
        if claim.number in self._used:
            raise InvalidTokenError("used", kind=self.kind)
        if claim.issued <= self._floor:
            raise TokenExpiredError(kind=self.kind)
        return claim

    def check_not_revoked(self, claim: TokenClaims) -> None:
        """Look whether what a token says still holds, which may have been used up meanwhile.

        Raises:
            InvalidTokenError: It was revoked.
        """
        if claim.issued <= self._revoked.get(claim.client_id, -1):
            raise InvalidTokenError("revoked", kind=self.kind)

    def consume(self, token: str, client_id: str | None = None) -> TokenClaims:
        """Verify a token and use it up. Raises as `check`."""
        claim = self.check(token, client_id)
        self._remember(claim)
        return claim

    def revoke(self, client_id: str) -> None:
        """Refuse every token of a client that was issued up to now, in this millisecond too.

        Tokens that another worker has issued are compared with the clock of this one, and each worker has to be told.
        It is remembered as long as such a token would be good. When too many are remembered the first is forgotten, and
        with it all tokens that were issued before it are refused from then on, whosever they are: one that was revoked
        is never good again.
        """
        now = _now()
        self._revoked[client_id] = max(now, self._latest)  # the clock may have been set back since one was issued
        self._revoked.move_to_end(client_id)
        while self._revoked:
            first, moment = next(iter(self._revoked.items()))
            if moment + self._ttl_ms > now and len(self._revoked) <= MAX_REVOKED:
                break
            # Where its time is over this refuses only what a worker with a longer ttl has issued.
            self._floor = max(self._floor, moment)
            del self._revoked[first]

    def _remember(self, claim: TokenClaims) -> None:
        """Note that a token was used, for as long as it would be good.

        When too many are remembered the first is forgotten, and with it all that were issued before it are refused from
        then on: a token is never good twice.
        """
        self._used[claim.number] = (claim.issued, claim.until)
        now = _now()
        while self._used:
            number, (issued, until) = next(iter(self._used.items()))
            if until > now:
                if len(self._used) <= MAX_USED:
                    break
                self._floor = max(self._floor, issued)
            del self._used[number]


class ReconnectTokens(SignedTokens):
    """The tokens by which a plain client gets back what it has left."""

    prefix = PREFIX
    context = _CONTEXT
    kind = "reconnect token"


def looks_like_token(text: str | None) -> bool:
    """Whether a text is meant to be one of our reconnect tokens, and not a credential of the application's own."""
    return text is not None and text.startswith(PREFIX)


def _sign(key: bytes, body: bytes, context: bytes = _CONTEXT) -> bytes:
    return hmac.new(key, context + body, hashlib.sha256).digest()


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _now() -> int:
    return int(wall() * 1000)
