"""Whether the server can speak WebSocket at all."""

from __future__ import annotations

import importlib.util
import sys


def missing_websocket_library() -> str | None:
    """Say what to install if we run under uvicorn and it has no WebSocket library; `None` if all is well.

    uvicorn answers a WebSocket handshake with 404 then, which looks like a wrong path.
    """
    if "uvicorn" not in sys.modules:
        return None
    if importlib.util.find_spec("websockets") or importlib.util.find_spec("wsproto"):
        return None
    return 'uvicorn has no WebSocket library: pip install "fastapi-ws-stabilizer[uvicorn]", or websockets'
