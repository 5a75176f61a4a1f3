"""uvicorn: a protocol class with direct transport, and the options to start it with.

`uvicorn --ws fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol` finds the class here. It is imported when
it is asked for, because importing the package must not need uvicorn.
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
