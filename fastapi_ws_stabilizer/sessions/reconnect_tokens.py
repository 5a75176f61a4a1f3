"""Reconnect tokens of plain clients, and the detached states that they name."""

from __future__ import annotations

import contextvars
import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from fastapi_ws_stabilizer.auth.signed_tokens import SignedTokens, TokenClaims
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo
from fastapi_ws_stabilizer.config import DuplicatePolicy, WebSocketConfig
from fastapi_ws_stabilizer.errors import InvalidTokenError, TokenExpiredError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.servers.detect import has_several_workers
from fastapi_ws_stabilizer.sessions.detached import key_of_connection
from fastapi_ws_stabilizer.sessions.ended_sessions import EndedSessions

MAX_TOKENS: Final = 100_000
"""Maximum number of remembered tokens and of clients with a token. The oldest is forgotten first."""

_verified: contextvars.ContextVar[TokenClaims | None] = contextvars.ContextVar("verified_claims", default=None)
"""Content of the token that the current task has verified with the manager."""


class ReconnectTokenRegistry:
    """Registry of the reconnect tokens of one node, with the key of the state that each of them names.

    A plain client has no session that identifies it to the server. So the server expects only clients with a token
    back, and saves the state of no other client.

    A key is the client id if the client may have one connection only. Otherwise a connection has its own key, which the
    connection that continues its state inherits.

    Args:
        config: Options of the manager.
        events: Event bus for tokens that restore nothing.
        tokens: Issuer and verifier of the tokens.

    Attributes:
        has_own_keys: Whether each connection of a client has its own key.
        in_use: Whether a token was issued or used since the start. Most applications issue none to plain clients.
    """

    def __init__(self, config: WebSocketConfig, events: EventBus, tokens: SignedTokens) -> None:
        self._events = events
        self._tokens = tokens
        self._enabled = config.enable_reconnect
        self._has_secret = config.reconnect_secret is not None
        self._has_reported = False
        self.in_use = False
        self.has_own_keys = config.on_duplicate is DuplicatePolicy.ALLOW
        self._ttl = config.reconnect_token_ttl.total_seconds()
        self._keys: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        """Number of a token → key of the state of its connection, and monotonic time of the token's expiry."""
        self._expected: OrderedDict[str, float] = OrderedDict()  # key → expiry of its newest token, the oldest first
        self._inherited: dict[str, str] = {}  # id of a connection → key that it inherited from an earlier one
        self._ended = EndedSessions(config.session_ttl)

    # ── issuing ──

    def issue(self, client_id: str, connection_id: str | None) -> str:
        """Issue a token.

        Args:
            client_id: The client.
            connection_id: The plain connection that the token is for; `None` for the one that closes last.

        Raises:
            ValueError: The client id is invalid.
            InvalidTokenError: `enable_reconnect` is False.
        """
        if not self._enabled:
            raise InvalidTokenError("disabled")
        self.report_missing_secret()
        self.in_use = True
        token = self._tokens.issue(client_id)
        key = client_id if connection_id is None else self.key_of(client_id, connection_id)
        self._ended.forget(key)  # a new token allows the client to return
        until = monotonic() + self._ttl
        self._expected[key] = until
        self._expected.move_to_end(key)
        if key != client_id:
            self._keys[self._tokens.read(token).number] = key, until
        self.expire()
        return token

    def report_missing_secret(self) -> None:
        """Report once that other workers cannot verify the tokens of this one."""
        if not self._has_secret and not self._has_reported and has_several_workers():
            self._has_reported = True
            self._events.emit("reconnect_secret_missing", logging.WARNING)

    def expire(self) -> None:
        """Forget expired tokens, and the oldest ones above `MAX_TOKENS`."""
        now = monotonic()
        while self._keys:
            number, (_, until) = next(iter(self._keys.items()))
            if until > now and len(self._keys) <= MAX_TOKENS:
                break
            del self._keys[number]
        while self._expected:
            key, until = next(iter(self._expected.items()))
            if until > now and len(self._expected) <= MAX_TOKENS:
                break
            del self._expected[key]

    def forget(self, client_id: str, keys: Iterable[str]) -> None:
        """Expect a client back under none of these keys, nor under its client id."""
        for key in (client_id, *keys):
            self._expected.pop(key, None)

    def revoke(self, client_id: str) -> None:
        """Revoke every token of a client that was issued up to now."""
        self._tokens.revoke(client_id)

    # ── keys ──

    def key_of(self, client_id: str, connection_id: str) -> str:
        """Return the key of a plain connection, inherited from the connection that it continues, if any."""
        if not self.has_own_keys:
            return client_id
        return self._inherited.get(connection_id) or key_of_connection(client_id, connection_id)

    def resumable_key_of(self, client_id: str, connection_id: str) -> str | None:
        """Return the key under which a client may return to a connection: its own, else the client id.

        `None` if no token names either of them.
        """
        now = monotonic()
        keys = (self.key_of(client_id, connection_id), client_id)
        return next((key for key in keys if self._expected.get(key, now) > now), None)

    def inherit(self, connection_id: str, key: str) -> None:
        """Let a connection continue under the key of an earlier one, so that older tokens find its state later."""
        if self.has_own_keys:
            self.in_use = True
            self._inherited[connection_id] = key

    def take_inherited(self, connection_id: str) -> str | None:
        """Return the key that the token of a connection named, and forget it; `None` if it named none."""
        return self._inherited.pop(connection_id, None)

    # ── using up ──

    def verify(self, token: str | None, client_id: str | None) -> str | None:
        """Verify the token of a handshake, and return its client id; `None` without a valid token.

        With an invalid token the client connects as a new one.
        """
        if not self._enabled or token is None:
            return None
        try:
            return self._tokens.check(token, client_id).client_id
        except (InvalidTokenError, TokenExpiredError) as problem:
            self._report_lost(client_id, problem)
            return None

    def consume_for(self, connection_id: str, token: str, client_id: str) -> bool:
        """Use up a verified token for a connection. Return `False` if it has since been used or revoked."""
        try:
            claims = self.consume(token, client_id)
        except (InvalidTokenError, TokenExpiredError) as problem:
            self._report_lost(client_id, problem)
            return False
        self._continue_from(connection_id, claims)
        return True

    def consume(self, token: str, client_id: str | None = None) -> TokenClaims:
        """Use up a token, and return its content.

        If the application ended the state of the token, the token restores nothing and is not used up. So each attempt
        gets the close code of the application.

        Args:
            token: The token that the client sent.
            client_id: The client that the token must belong to. By default any client.

        Raises:
            InvalidTokenError: The token is invalid, or was used before.
            TokenExpiredError: The token has expired.
        """
        claims = self._tokens.check(token, client_id)
        return claims if self._was_ended(claims) else self._tokens.consume(token, client_id)

    def _was_ended(self, claims: TokenClaims) -> bool:
        """Return whether the application ended the state that a token names."""
        key, _ = self._keys.get(claims.number, (claims.client_id, 0.0))
        return key in self._ended

    def _continue_from(self, connection_id: str, claims: TokenClaims) -> None:
        """Give a connection the key that its token names, if any."""
        key, _ = self._keys.get(claims.number, (None, 0.0))
        if key is not None:
            self.in_use = True
            self._inherited[connection_id] = key
            if not self._was_ended(claims):
                del self._keys[claims.number]

    def _report_lost(self, client_id: str | None, problem: InvalidTokenError | TokenExpiredError) -> None:
        self._events.counters.sessions_lost += 1
        why = getattr(problem, "problem", "expired")
        self._events.emit("session_lost", logging.INFO, client_id=client_id or "", why=why)

    # ── tokens that your code verifies ──

    @staticmethod
    def mark_verified(claims: TokenClaims) -> None:
        """Record that the current task has verified a token. It authorizes the next connection with that client id."""
        _verified.set(claims)

    @staticmethod
    def is_verified(client_id: str) -> bool:
        """Return whether the current task has verified a token of a client that no connection has used yet."""
        claims = _verified.get()
        return claims is not None and claims.client_id == client_id

    def consume_verification(self, client_id: str, connection_id: str) -> bool:
        """Return whether the current task has verified a token for a connection. Each token authorizes one connection.

        Raises:
            InvalidTokenError: The token has since been revoked.
        """
        claims = _verified.get()
        if claims is None or claims.client_id != client_id:
            return False
        _verified.set(None)
        self._tokens.check_not_revoked(claims)
        self._continue_from(connection_id, claims)
        return True

    # ── ends by the application ──

    def remember_end(self, key: str, client_id: str, close_info: CloseInfo) -> None:
        """Remember that the application ended a state, so that a returning client gets the reason."""
        self._ended.add(key, client_id, close_info)

    def ended_by_application(self, client_id: str, connection_id: str) -> CloseInfo | None:
        """Return the close info if the application ended the state that a plain client restores, else `None`."""
        return self._ended.find(self._inherited.get(connection_id, client_id), client_id)
