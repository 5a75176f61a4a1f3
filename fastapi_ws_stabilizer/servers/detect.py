"""What the process tells of its server: a missing WebSocket library, other workers, an exit at a signal."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
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


def exits_on_signal() -> bool:
    """Whether the server ends its process a moment after a signal, whoever else has taken it: granian does."""
    return "granian" in sys.modules


def several_workers() -> bool:
    """Whether there are signs of other workers: uvicorn's and hypercorn's are child processes, gunicorn is loaded."""
    concurrency = os.environ.get("WEB_CONCURRENCY", "")
    return (
        multiprocessing.parent_process() is not None
        or (concurrency.isdigit() and int(concurrency) > 1)
        or "gunicorn" in sys.modules
    )
