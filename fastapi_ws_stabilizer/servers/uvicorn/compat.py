"""Private attributes of uvicorn's WebSocket protocol that `StableWebSocketProtocol` uses or replaces.

Supported: uvicorn 0.53 and newer with `websockets` 16 and newer. Fallback for older versions from uvicorn 0.35, and for
any version that lacks an attribute below: the class works like uvicorn's own protocol, and a warning names what is
missing. Before uvicorn 0.35 the base class does not exist, and this module raises an `ImportError`;
`manager.uvicorn_options()` then selects uvicorn's default. `tests/unit/compat/test_uvicorn.py` compares the lists below
with the code of the class, and runs on the lowest and on the newest version.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Final

import uvicorn

try:
    from uvicorn.protocols.websockets.websockets_sansio_impl import (
        WebSocketsSansIOProtocol as WebSocketsSansIOProtocol,  # re-exported
    )
except ImportError as missing:
    raise ImportError(
        f"StableWebSocketProtocol needs uvicorn 0.35 or newer and the websockets library, but this is uvicorn "
        f'{uvicorn.__version__}: pip install -U "fastapi-ws-stabilizer[uvicorn]"'
    ) from missing

try:
    from websockets.speedups import apply_mask as apply_mask  # re-exported
except ImportError:  # `websockets` was installed without its C extension
    from websockets.utils import apply_mask as apply_mask

logger = logging.getLogger("fastapi_ws_stabilizer")

REQUIRED_ATTRIBUTES: Final = (
    "queue",
    "conn",
    "config",
    "loop",
    "transport",
    "handshake_complete",
    "handshake_initiated",
    "writable",
    "close_sent",
    "close_timer",
    "close_timeout",
    "read_paused",
    "ping_interval",
)
"""Attributes of a new protocol object."""

HANDSHAKE_ATTRIBUTES: Final = ("request", "response", "scope")
"""Attributes of the protocol object from the client's handshake on."""

_OURS_OF_CONN: Final = (
    "available_extensions",
    "extensions",
    "max_message_size",
    "close_rcvd",
    "data_to_send",
    "eof_sent",
    "fail",
    "handshake_exc",
    "id",
    "parser",
    "reader",
    "recv_frame",
    "send_close",
    "state",
)
_METHODS: Final = (
    "connection_lost",
    "data_received",
    "handle_close",
    "handle_connect",
    "handle_pong",
    "pause_writing",
    "receive",
    "resume_writing",
    "run_asgi",
    "send",
    "shutdown",
    "stop_keepalive",
)


class _AlwaysWritable:
    """Replacement for the event that uvicorn's `send` awaits.

    The outbox, instead of `send`, waits for the transport.
    """

    async def wait(self) -> bool:
        return True

    def set(self) -> None:
        pass

    def clear(self) -> None:
        pass


ALWAYS_WRITABLE: Final = _AlwaysWritable()


_missing: dict[type, tuple[str, ...]] = {}
"""Names of missing internals, by the class of the protocol object."""

_missing_at_handshake: dict[type, tuple[str, ...]] = {}
"""Names of missing attributes after the client's handshake, by the class of the protocol object."""


@functools.cache
def _warn_once(missing: tuple[str, ...]) -> None:
    logger.warning(
        "uvicorn %s lacks internals that StableWebSocketProtocol needs (%s): it works like uvicorn's own protocol, "
        "without ping frames, shared frames and shared compression",
        uvicorn.__version__,
        ", ".join(missing),
        extra={"event": "uvicorn_internals_unknown", "missing": list(missing)},
    )


def missing_internals(protocol: Any) -> bool:
    """Return whether internals of uvicorn that the protocol needs are missing; warn once if so.

    All objects of a class have the same attributes, so only the first one is examined.
    """
    kind = type(protocol)
    if kind not in _missing:
        conn = getattr(protocol, "conn", None)
        _missing[kind] = (
            *(name for name in REQUIRED_ATTRIBUTES if not hasattr(protocol, name)),
            *(f"conn.{name}" for name in _OURS_OF_CONN if not hasattr(conn, name)),
            *(name for name in _METHODS if not hasattr(WebSocketsSansIOProtocol, name)),
        )
        if _missing[kind]:
            _warn_once(_missing[kind])
    return bool(_missing[kind])


def lacks_handshake_internals(protocol: Any) -> bool:
    """Return whether attributes that uvicorn sets at the handshake are missing; warn once if so."""
    kind = type(protocol)
    if kind not in _missing_at_handshake:
        _missing_at_handshake[kind] = tuple(name for name in HANDSHAKE_ATTRIBUTES if not hasattr(protocol, name))
        if _missing_at_handshake[kind]:
            _warn_once(_missing_at_handshake[kind])
    return bool(_missing_at_handshake[kind])
