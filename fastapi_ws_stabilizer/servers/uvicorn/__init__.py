"""Integration with uvicorn: a protocol class with direct transport, and options to start it.

`uvicorn --ws fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol` finds the class here. It is imported on
demand, because the package must be importable without uvicorn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.servers.uvicorn.protocol import StableWebSocketProtocol

__all__ = ["StableWebSocketProtocol"]


def __getattr__(name: str) -> Any:
    if name == "StableWebSocketProtocol":
        from fastapi_ws_stabilizer.servers.uvicorn.protocol import StableWebSocketProtocol

        return StableWebSocketProtocol
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
