"""Credential sources for HTTP routes and WebSockets.

Starlette's `HTTPConnection` is the common base of `Request` and `WebSocket`, and FastAPI passes it to dependencies of
both. No repr, error or log of this module contains a credential.
"""

# No `from __future__ import annotations`: older FastAPI cannot resolve the annotations of an object's `__call__`.

import logging
import re
from typing import Final, Protocol

from fastapi import HTTPException
from starlette.requests import HTTPConnection

from fastapi_ws_stabilizer.auth.signed_tokens import looks_like_token
from fastapi_ws_stabilizer.wire.handshake import SUBPROTOCOL_KEY
from fastapi_ws_stabilizer.wire.v1.frames import AUTH_PREFIX, SUBPROTOCOL
from fastapi_ws_stabilizer.wire.v1.hello import offered_credential

MAX_CREDENTIAL_BYTES: Final = 8 * 1024
"""Maximum size of a credential in bytes. A longer value counts as no credential."""

HANDSHAKE_SCOPE_KEY: Final = "fastapi_ws_stabilizer.handshake"
"""Scope key of the handshake. It is set before any dependency runs that may need the first message."""

logger = logging.getLogger("fastapi_ws_stabilizer")

_BEARER: Final = re.compile("bearer +([!-~]+)", re.IGNORECASE)
_NOT_READ: Final = (
    "first_message() ran before manager.socket_for or without it, so the first message cannot be read: put the socket "
    "first among the endpoint's parameters, and do not put the identity dependency into dependencies="
)
_SUBPROTOCOL: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class FirstMessageReader(Protocol):
    """Handshake that can accept the WebSocket and read the first message."""

    async def credential(self) -> str | None:
        """Accept the WebSocket, wait for the hello, and return its credential.

        Returns:
            The credential, the same at each call, or `None` if the hello has none. For a plain client it is `None`
            at once, and the WebSocket is not accepted.
        """


class CredentialSource(Protocol):
    """Part of a request that may hold a credential.

    Its `str` goes into the error for a client that sent no credential.
    """

    def find(self, connection: HTTPConnection) -> str | None:
        """Return the credential of a connection from this source, or `None`."""


class _BearerSource:
    def __str__(self) -> str:
        return "the header `Authorization: Bearer ...`"

    def find(self, connection: HTTPConnection) -> str | None:
        values = connection.headers.getlist("authorization")
        found = _BEARER.fullmatch(values[0].strip(" \t")) if len(values) == 1 else None
        return found.group(1) if found else None


class _CookieSource:
    def __init__(self, name: str) -> None:
        self._name = name

    def __str__(self) -> str:
        return f"the cookie {self._name!r}"

    def find(self, connection: HTTPConnection) -> str | None:
        return connection.cookies.get(self._name)


class _QuerySource:
    def __init__(self, name: str) -> None:
        self._name = name

    def __str__(self) -> str:
        return f"the query parameter {self._name!r}"

    def find(self, connection: HTTPConnection) -> str | None:
        values = [value for value in connection.query_params.getlist(self._name) if not looks_like_token(value)]
        return values[0] if len(values) == 1 else None


class _SubprotocolSource:
    def __init__(self, marker: str | None) -> None:
        if marker is not None and (not _SUBPROTOCOL.fullmatch(marker) or marker.startswith("stabilizer.")):
            raise ValueError(f"{marker!r} cannot mark a credential: use a subprotocol name such as 'bearer'")
        self._marker = marker

    def __str__(self) -> str:
        ours = f"the subprotocol `{AUTH_PREFIX}...`"
        return ours if self._marker is None else f"the subprotocols `{self._marker}, ...`, {ours}"

    def find(self, connection: HTTPConnection) -> str | None:
        offered: list[str] = connection.scope.get("subprotocols") or []
        if (credential := offered_credential(offered)) is not None:
            return credential
        if self._marker is None or self._marker not in offered[:-1]:
            return None
        marked = offered[offered.index(self._marker) + 1]
        return None if marked == SUBPROTOCOL or marked.startswith(AUTH_PREFIX) else marked

    def mark(self, connection: HTTPConnection) -> None:
        """Select the marker as the subprotocol of the answer.

        A browser that offers subprotocols requires one of them in the answer.
        """
        if self._marker is not None and self._marker in (connection.scope.get("subprotocols") or ()):
            connection.scope.setdefault(SUBPROTOCOL_KEY, self._marker)


class _FirstMessageSource:
    def __init__(self) -> None:
        self._warned = False

    def __str__(self) -> str:
        return "the first message"

    def find(self, connection: HTTPConnection) -> None:
        """Return `None`: only `ask` can wait for the first message."""

    async def ask(self, connection: HTTPConnection) -> str | None:
        reader: FirstMessageReader | None = connection.scope.get(HANDSHAKE_SCOPE_KEY)
        if reader is not None:
            return await reader.credential()
        if connection.scope["type"] == "websocket" and not self._warned:
            self._warned = True
            logger.warning("%s", _NOT_READ, extra={"event": "first_message_not_heard"})
        return None


def bearer() -> CredentialSource:
    """Read the header `Authorization: Bearer <token>`. Browsers cannot send it on a WebSocket."""
    return _BearerSource()


def cookie(name: str) -> CredentialSource:
    """Read the cookie of that name.

    A browser also sends cookies for pages of other sites, so check the `Origin` too.
    """
    return _CookieSource(name)


def query(name: str) -> CredentialSource:
    """Read the query parameter of that name, if it occurs once.

    Access logs contain query strings, so prefer a ticket. A reconnect token of this library, sent as `?token=`, does
    not count as a credential.
    """
    return _QuerySource(name)


def subprotocol(marker: str | None = None) -> CredentialSource:
    """Read the credential from the subprotocols that the client offers.

    A browser can send subprotocols although it cannot set headers, and access logs do not contain them. The source
    reads `stabilizer.auth.<base64url of the credential>`, which a client of `stabilizer.v1.json` offers. With a marker
    it also reads the subprotocol after the marker: `subprotocol("bearer")` reads
    `new WebSocket(url, ["bearer", token])`. The server answers with the marker, never with the credential.

    Raises:
        ValueError: The marker is not a valid subprotocol name, or is one of this library.
    """
    return _SubprotocolSource(marker)


def first_message() -> CredentialSource:
    """Read the hello of a client of `stabilizer.v1.json`. Plain clients and HTTP requests have none.

    `Credential` tries this source last, in any order of arguments, because reading the hello accepts the WebSocket.
    """
    return _FirstMessageSource()


class Credential:
    """Dependency that finds a credential: `token: str = Depends(Credential(bearer(), cookie("session")))`.

    The same object works on HTTP routes and on sockets. It does not verify the credential. The dependency that uses
    it has to do so.

    Args:
        sources: Sources to try in this order, the first message last.
        required: Whether a missing credential is an error. Otherwise the result is `None`.

    Raises:
        TypeError: No source is given.
    """

    def __init__(self, *sources: CredentialSource, required: bool = True) -> None:
        if not sources:
            raise TypeError("Credential needs at least one source: write Credential(bearer(), ...)")
        self._sources = sources
        self._required = required

    def __repr__(self) -> str:
        return f"<Credential in {_either(self._sources)}>"

    async def __call__(self, connection: HTTPConnection) -> str | None:
        """Return the credential of this connection. Cancelling stops waiting for the first message.

        Raises:
            HTTPException: 401 if a required credential is missing.
        """
        found = await self._find(connection)
        if found is None and self._required:
            headers = (
                {"WWW-Authenticate": "Bearer"} if any(isinstance(one, _BearerSource) for one in self._sources) else None
            )
            raise HTTPException(401, f"missing credential: send it in {_either(self._sources)}", headers=headers)
        return found

    async def _find(self, connection: HTTPConnection) -> str | None:
        for source in self._sources:  # all sources, because a cookie may be found first and the answer needs the marker
            if isinstance(source, _SubprotocolSource):
                source.mark(connection)
        for source in self._sources:
            if (found := _credential(source.find(connection))) is not None:
                return found
        for source in self._sources:
            if (
                isinstance(source, _FirstMessageSource)
                and (found := _credential(await source.ask(connection))) is not None
            ):
                return found
        return None


def _credential(text: str | None) -> str | None:
    """Return the text if it can be a credential, else `None`."""
    return text if text and len(text.encode("utf-8", "replace")) <= MAX_CREDENTIAL_BYTES else None


def _either(sources: tuple[CredentialSource, ...]) -> str:
    return " or ".join(map(str, sources))
