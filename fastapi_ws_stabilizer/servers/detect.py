"""Detection of the server's properties: a missing WebSocket library, other workers, exit on a signal."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys


def websocket_library_advice() -> str | None:
    """Return what to install if uvicorn has no WebSocket library; `None` otherwise.

    Without one, uvicorn answers a WebSocket handshake with 404, which looks like a wrong path.
    """
    if "uvicorn" not in sys.modules:
        return None
    if importlib.util.find_spec("websockets") or importlib.util.find_spec("wsproto"):
        return None
    return 'uvicorn has no WebSocket library: pip install "fastapi-ws-stabilizer[uvicorn]", or websockets'


def exits_on_signal() -> bool:
    """Return whether the server ends its process soon after a signal, as granian does.

    It does so even if the signal has another handler.
    """
    return "granian" in sys.modules


def has_several_workers() -> bool:
    """Return whether other workers seem to exist.

    uvicorn's and hypercorn's workers are child processes, gunicorn's workers have loaded gunicorn, and
    `WEB_CONCURRENCY` sets the number of workers.
    """
    concurrency = os.environ.get("WEB_CONCURRENCY", "")
    return (
        multiprocessing.parent_process() is not None
        or (concurrency.isdigit() and int(concurrency) > 1)
        or "gunicorn" in sys.modules
    )
