"""Where a client puts its credential, on an HTTP route and on a socket alike.

Starlette's `HTTPConnection` is what `Request` and `WebSocket` have in common, and FastAPI hands it to a dependency of
either. A credential itself is in no repr, error or log of this module.
"""

# No `from __future__ import annotations`: older FastAPI cannot resolve the annotations of an object's `__call__`.

import logging
import re
from typing import Final, Protocol

from fastapi import HTTPException
from starlette.requests import HTTPConnection

from fastapi_ws_stabilizer.auth.signed_tokens import looks_like_token
from fastapi_ws_stabilizer.wire.v1.frames import AUTH_PREFIX, SUBPROTOCOL
from fastapi_ws_stabilizer.wire.v1.hello import offered_credential

MAX_CREDENTIAL_BYTES: Final = 8 * 1024
"""A longer one is none."""

SUBPROTOCOL_KEY: Final = "fastapi_ws_stabilizer.subprotocol"
"""Where the scope of a socket holds the subprotocol that its handshake is to be answered with: a marker, no secret."""

HANDSHAKE_SCOPE_KEY: Final = "fastapi_ws_stabilizer.door"
"""Where the scope of a socket holds its `AdmissionController`, before any dependency runs that may want the first
message."""

logger = logging.getLogger("fastapi_ws_stabilizer")

_BEARER: Final = re.compile("bearer +([!-~]+)", re.IGNORECASE)
_NOT_READ: Final = (
    "first_message() was asked of a WebSocket that no manager.socket_for has taken yet, so nobody can hear it: put the "
    "socket first among the endpoint's parameters, and the identity into no dependencies="
)
_SUBPROTOCOL: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Door(Protocol):
    """What lets a client in far enough to hear its first message."""

    async def credential(self) -> str | None:
        """The credential in a client's hello, waiting for that; `None` if there is none. Asked again, it says the same.

        It accepts the WebSocket. For a plain client it does nothing and returns `None`.
        """


class CredentialSource(Protocol):
    """Where a credential may be. Its `str` says so to who has sent none."""

    def find(self, connection: HTTPConnection) -> str | None:
        """The credential that a connection has there; `None` if it has none."""


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
            raise ValueError(f"{marker!r} cannot mark a credential: a subprotocol is a word, such as 'bearer'")
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
        """Have the handshake answered with the marker: a browser that offers subprotocols wants one of them."""
        if self._marker is not None and self._marker in (connection.scope.get("subprotocols") or ()):
            connection.scope.setdefault(SUBPROTOCOL_KEY, self._marker)


class _FirstMessageSource:
    def __init__(self) -> None:
        self._warned = False

    def __str__(self) -> str:
        return "the first message"

    def find(self, connection: HTTPConnection) -> None:
        """Nothing: it has to be waited for."""

    async def ask(self, connection: HTTPConnection) -> str | None:
        door: Door | None = connection.scope.get(HANDSHAKE_SCOPE_KEY)
        if door is not None:
            return await door.credential()
        if connection.scope["type"] == "websocket" and not self._warned:
            self._warned = True
            logger.warning("%s", _NOT_READ, extra={"event": "first_message_not_heard"})
        return None


def bearer() -> CredentialSource:
    """The header `Authorization: Bearer <token>`. Clients that are not browsers send it."""
    return _BearerSource()


def cookie(name: str) -> CredentialSource:
    """The cookie of that name. A browser sends it by itself, for pages of every site: look at the `Origin` too."""
    return _CookieSource(name)


def query(name: str) -> CredentialSource:
    """The query parameter of that name, if it is given once. It is written to access logs: prefer a ticket.

    A reconnect token of this library, which comes as `?token=`, is no credential.
    """
    return _QuerySource(name)


def subprotocol(marker: str | None = None) -> CredentialSource:
    """What a browser can send though it cannot set a header, and what no log writes down: a subprotocol.

    `stabilizer.auth.<base64url of the credential>`, as a client of `stabilizer.v1.json` offers it; and with a marker
    also the subprotocol after that one: `new WebSocket(url, ["bearer", token])` is read by `subprotocol("bearer")`.
    The handshake is answered with the marker, never with the credential.

    Raises:
        ValueError: The marker is no word, or one of this library's.
    """
    return _SubprotocolSource(marker)


def first_message() -> CredentialSource:
    """The hello of a client of `stabilizer.v1.json`. Plain clients, and HTTP requests, have none there.

    It is tried last, wherever it stands: to hear it, the WebSocket is accepted.
    """
    return _FirstMessageSource()


class Credential:
    """A dependency that finds a credential: `token: str = Depends(Credential(bearer(), cookie("session")))`.

    The same one works on an HTTP route and on a socket. It only finds: whether the credential is good is for the
    dependency to say that wants it.

    Args:
        sources: Where it may be, tried in this order, the first message last.
        required: Whether it is an error if there is none; else there is `None`.

    Raises:
        TypeError: There is no place.
    """

    def __init__(self, *sources: CredentialSource, required: bool = True) -> None:
        if not sources:
            raise TypeError("say where a credential may be: Credential(bearer(), ...)")
        self._sources = sources
        self._required = required

    def __repr__(self) -> str:
        return f"<Credential in {_either(self._sources)}>"

    async def __call__(self, connection: HTTPConnection) -> str | None:
        """The credential of this connection. Cancelling it gives up waiting for the first message.

        Raises:
            HTTPException: 401: there is none, and it is required.
        """
        found = await self._find(connection)
        if found is None and self._required:
            headers = (
                {"WWW-Authenticate": "Bearer"} if any(isinstance(one, _BearerSource) for one in self._sources) else None
            )
            raise HTTPException(401, f"a credential is wanted, in {_either(self._sources)}", headers=headers)
        return found

    async def _find(self, connection: HTTPConnection) -> str | None:
        for source in self._sources:  # all of them, before the first one that finds something: a cookie comes by itself
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
    """What was found, if it can be a credential."""
    return text if text and len(text.encode("utf-8", "replace")) <= MAX_CREDENTIAL_BYTES else None


def _either(sources: tuple[CredentialSource, ...]) -> str:
    return " or ".join(map(str, sources))
