"""uvicorn options that match the options of a manager."""

from __future__ import annotations

import importlib
import logging
import math
from typing import Any, Final

from fastapi_ws_stabilizer.config import CompressionMode, WebSocketConfig

MODULE: Final = "fastapi_ws_stabilizer.servers.uvicorn.protocol"

PART_OF_DRAIN: Final = 0.25
"""The server's own timeout as a fraction of `drain_timeout`. After a drain only HTTP requests are left."""

logger = logging.getLogger("fastapi_ws_stabilizer")


def shutdown_timeout(config: WebSocketConfig) -> int:
    """Return the seconds that uvicorn may wait for its connections when it stops.

    If the manager drains first, this time starts after the drain.
    """
    if not config.handle_signals:
        return math.ceil(config.drain_timeout)  # no drain runs before, so uvicorn waits for the WebSockets too
    return max(1, math.floor(config.drain_timeout * PART_OF_DRAIN))


def uvicorn_options(config: WebSocketConfig) -> dict[str, Any]:
    """Return keyword arguments of `uvicorn.run` that match a manager's options."""
    return {
        "ws": _protocol(),
        "ws_max_size": config.max_message_size,
        "ws_ping_interval": config.heartbeat_interval,
        "ws_ping_timeout": config.heartbeat_timeout,
        "ws_per_message_deflate": config.compression is CompressionMode.DEFLATE,
        "timeout_graceful_shutdown": shutdown_timeout(config),
    }


def _protocol() -> Any:
    """Return the protocol class, or uvicorn's own choice if uvicorn is too old."""
    try:
        module = importlib.import_module(MODULE)  # uvicorn is optional
    except ImportError as missing:
        logger.warning("%s", missing, extra={"event": "uvicorn_internals_unknown"})
        return "auto"
    return module.StableWebSocketProtocol
