"""Parts of an opening handshake and of its answer: the subprotocol and headers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL

SERVED_KEY: Final = "fastapi_ws_stabilizer.served_subprotocols"
"""Scope key of the subprotocols that the endpoint of a socket supports, in the server's order of preference."""

SUBPROTOCOL_KEY: Final = "fastapi_ws_stabilizer.subprotocol"
"""Scope key of the subprotocol to answer the handshake with. It is a marker, not a secret."""

ANSWERED_KEY: Final = "fastapi_ws_stabilizer.answered_subprotocol"
"""Scope key of the subprotocol in the answer to the handshake."""

HEADERS_KEY: Final = "fastapi_ws_stabilizer.accept_headers"
"""Scope key of the headers to send with the accept. The entry is removed when they are sent."""

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_RESERVED: Final = "stabilizer."
_FORGES: Final = re.compile(rb"[\r\n\x00]")


def served_subprotocols(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the subprotocols of an endpoint as a tuple. A single one may be a string.

    Raises:
        ValueError: A name is not a token of RFC 6455, or this library answers it itself.
    """
    served = (names,) if isinstance(names, str) else tuple(names)
    for name in served:
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise ValueError(
                f"subprotocol {name!r} is invalid: write a name such as 'ocpp1.6', without spaces or commas"
            )
        if name.startswith(_RESERVED):
            raise ValueError(
                f"remove subprotocol {name!r}: the library answers names that start with {_RESERVED!r} itself"
            )
    return served


def select_subprotocol(scope: Mapping[str, Any]) -> str | None:
    """Return the subprotocol to answer a handshake with, or `None`.

    It is `stabilizer.v1.json`, else the first subprotocol of the endpoint, else the marker of a credential, if the
    client offers it. A browser that offers subprotocols rejects an answer without one.
    """
    offered: Collection[str] = scope.get("subprotocols") or ()
    if SUBPROTOCOL in offered:
        return SUBPROTOCOL
    chosen = first_offered(scope.get(SERVED_KEY, ()), offered)
    if chosen is None:
        chosen = scope.get(SUBPROTOCOL_KEY)
    return chosen if chosen in offered else None


def header_values(scope: Mapping[str, Any], name: bytes) -> list[str]:
    """Return the values of all headers with a name in lower case.

    `websocket.headers` would stay in memory for the lifetime of the connection.
    """
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def first_offered(served: Iterable[str], offered: Collection[str]) -> str | None:
    """Return the first of the server's subprotocols that the client offers; `None` without a match."""
    return next((name for name in served if name in offered), None)


def check_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Check that no header contains another header.

    Raises:
        ValueError: A name or a value contains a line break or a NUL.
    """
    for name, value in headers:
        if _FORGES.search(name) or _FORGES.search(value):
            raise ValueError(f"header {name!r} of ws.accept_headers contains a line break or a NUL")
