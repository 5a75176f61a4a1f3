"""Parts of the answer to an opening handshake: the subprotocol and headers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

SERVED_KEY: Final = "fastapi_ws_stabilizer.served_subprotocols"
"""Scope key of the subprotocols that the endpoint of a socket supports, in the server's order of preference."""

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
