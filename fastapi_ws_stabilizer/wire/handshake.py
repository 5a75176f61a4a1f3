"""What the answer to an opening handshake says beside yes: a subprotocol, and headers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

SERVED_KEY: Final = "fastapi_ws_stabilizer.served_subprotocols"
"""Where the scope of a socket holds the subprotocols that its endpoint speaks, in the order of the server's choice."""

ANSWERED_KEY: Final = "fastapi_ws_stabilizer.answered_subprotocol"
"""Where it holds the one that its handshake was answered with."""

HEADERS_KEY: Final = "fastapi_ws_stabilizer.accept_headers"
"""Where it holds the headers that go with the accept, until they have gone."""

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_RESERVED: Final = "stabilizer."
_FORGES: Final = re.compile(rb"[\r\n\x00]")


def served_subprotocols(names: str | Sequence[str]) -> tuple[str, ...]:
    """The subprotocols of an endpoint; one can be given as a text.

    Raises:
        ValueError: A name is no token of RFC 6455, or is one that this library answers itself.
    """
    served = (names,) if isinstance(names, str) else tuple(names)
    for name in served:
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise ValueError(f"subprotocol {name!r} is no name: write one such as 'ocpp1.6', without spaces or commas")
        if name.startswith(_RESERVED):
            raise ValueError(f"subprotocol {name!r} needs no mention: names with {_RESERVED!r} are answered anyway")
    return served


def first_offered(served: Iterable[str], offered: Collection[str]) -> str | None:
    """The first of the server's subprotocols that the client offers; `None` if they have none in common."""
    return next((name for name in served if name in offered), None)


def check_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Let no header forge another one.

    Raises:
        ValueError: A name or a value has a line break or a NUL in it.
    """
    for name, value in headers:
        if _FORGES.search(name) or _FORGES.search(value):
            raise ValueError(f"header {name!r} of ws.accept_headers has a line break or a NUL in it")
