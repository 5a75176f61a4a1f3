"""The options of uvicorn that go with those of a manager."""

from __future__ import annotations

from typing import Any

from fastapi_ws_stabilizer.config import CompressionMode, WebSocketConfig


def uvicorn_options(config: WebSocketConfig, shutdown_timeout: int) -> dict[str, Any]:
    """Keyword arguments of `uvicorn.run`.

    Args:
        config: The options of the manager.
        shutdown_timeout: Seconds that uvicorn may wait for connections when it stops.
    """
    return {
        "ws": "fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol",
        "ws_max_size": config.max_message_size,
        "ws_ping_interval": config.heartbeat_interval,
        "ws_ping_timeout": config.heartbeat_timeout,
        "ws_per_message_deflate": config.compression is CompressionMode.DEFLATE,
        "timeout_graceful_shutdown": shutdown_timeout,
    }
