"""What `StableWebSocketProtocol` knows of uvicorn's own WebSocket protocol, and what it puts in places of it."""

from __future__ import annotations

import functools
import logging
from typing import Any, Final

import uvicorn

from fastapi_ws_stabilizer.servers.direct import DirectReceiver

try:
    from uvicorn.protocols.websockets.websockets_sansio_impl import (
        WebSocketsSansIOProtocol as WebSocketsSansIOProtocol,  # handed on
    )
except ImportError as missing:
    raise ImportError(
        f"StableWebSocketProtocol needs uvicorn 0.35 or newer with the websockets library, and this is uvicorn "
        f'{uvicorn.__version__}: pip install -U "fastapi-ws-stabilizer[uvicorn]"'
    ) from missing

logger = logging.getLogger("fastapi_ws_stabilizer")

REQUIRED_ATTRIBUTES: Final = (
    "queue",
    "conn",
    "config",
    "loop",
    "transport",
    "curr_msg_data_type",
    "handshake_complete",
    "handshake_initiated",
    "writable",
    "close_sent",
    "close_timer",
    "close_timeout",
    "read_paused",
    "frames",
    "ping_timer",
    "pong_timer",
)
_OURS_OF_CONN: Final = (
    "available_extensions",
    "extensions",
    "max_message_size",
    "close_sent",
    "close_rcvd",
    "fail",
    "parser_exc",
    "handshake_exc",
    "state",
    "writes",
)
_METHODS: Final = (
    "handle_cont",
    "handle_parser_exception",
    "handle_ping",
    "handle_pong",
    "run_asgi",
    "send_receive_event_to_app",
    "start_keepalive",
    "stop_keepalive",
)


class ReceiverQueue:
    """Stands where uvicorn has a queue: what uvicorn puts into it, its disconnect events, goes to the sink."""

    __slots__ = ("sink",)

    def __init__(self, sink: DirectReceiver) -> None:
        self.sink: DirectReceiver | None = sink

    def put_nowait(self, event: dict[str, Any]) -> None:
        """As a queue has it."""
        if self.sink is not None:
            self.sink.connection_lost(event)

    def empty(self) -> bool:
        """As a queue has it."""
        return True

    async def get(self) -> Any:
        """Tell who reads from here that nothing ever comes."""
        raise RuntimeError("this WebSocket is read by fastapi-ws-stabilizer: read from its StableSocket")


class _AlwaysWritable:
    """Stands where uvicorn has an event that its `send` waits for: what waits for the transport is in an outbox."""

    async def wait(self) -> bool:
        return True

    def set(self) -> None:
        pass

    def clear(self) -> None:
        pass


ALWAYS_WRITABLE: Final = _AlwaysWritable()


@functools.cache
def _say_once(missing: tuple[str, ...]) -> None:
    logger.warning(
        "uvicorn %s is not built as StableWebSocketProtocol knows it (%s): it works as uvicorn's own protocol, "
        "without ping frames, prepared frames and compression that is done once",
        uvicorn.__version__,
        ", ".join(missing),
        extra={"event": "uvicorn_internals_unknown", "missing": list(missing)},
    )


def missing_internals(protocol: Any) -> bool:
    """Whether something of uvicorn's protocol that we stand on is not there; says so once."""
    conn = getattr(protocol, "conn", None)
    missing = (
        *(name for name in REQUIRED_ATTRIBUTES if not hasattr(protocol, name)),
        *(f"conn.{name}" for name in _OURS_OF_CONN if not hasattr(conn, name)),
        *(name for name in _METHODS if not hasattr(WebSocketsSansIOProtocol, name)),
    )
    if missing:
        _say_once(missing)
    return bool(missing)
