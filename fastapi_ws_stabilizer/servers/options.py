"""The options of uvicorn that go with those of a manager."""

from __future__ import annotations

import importlib
import logging
from typing import Any, Final

from fastapi_ws_stabilizer.config import CompressionMode, WebSocketConfig

MODULE: Final = "fastapi_ws_stabilizer.servers.uvicorn"

logger = logging.getLogger("fastapi_ws_stabilizer")


def uvicorn_options(config: WebSocketConfig, shutdown_timeout: int) -> dict[str, Any]:
    """Keyword arguments of `uvicorn.run`.

    Args:
        config: The options of the manager.
        shutdown_timeout: Seconds that uvicorn may wait for connections when it stops.
    """
    return {
        "ws": _protocol(),
        "ws_max_size": config.max_message_size,
        "ws_ping_interval": config.heartbeat_interval,
        "ws_ping_timeout": config.heartbeat_timeout,
        "ws_per_message_deflate": config.compression is CompressionMode.DEFLATE,
        "timeout_graceful_shutdown": shutdown_timeout,
    }


def _protocol() -> Any:
    """The protocol class; uvicorn's own choice where it is too old for ours."""
    try:
        module = importlib.import_module(MODULE)  # uvicorn is optional
    except ImportError as missing:
        logger.warning("%s", missing, extra={"event": "uvicorn_internals_unknown"})
        return "auto"
    return module.StableWebSocketProtocol
