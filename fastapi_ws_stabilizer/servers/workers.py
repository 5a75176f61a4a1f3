"""Whether this process is one of several that serve the same application."""

from __future__ import annotations

import multiprocessing
import os
import sys


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
