"""Parts that the apps of the live tests share: options from the environment, and figures of the process."""

from __future__ import annotations

import ctypes
import gc
import json
import os
from pathlib import Path

from fastapi_ws_stabilizer import WebSocketConfig, WebSocketConnectionManager, configure_logging


def config_from_env() -> WebSocketConfig:
    """Return the configuration that `LiveServer` puts into the environment of its process."""
    return WebSocketConfig(**json.loads(os.environ.get("TEST_WS_CONFIG", "{}")))


def manager_from_env(*, logs: bool = True) -> WebSocketConnectionManager:
    """Return a manager with the options of the environment.

    Args:
        logs: Whether the process writes the log of the library to standard error.
    """
    if logs:
        configure_logging()
    return WebSocketConnectionManager(config_from_env())


def collect_garbage() -> dict[str, int]:
    """Collect garbage and return free memory to the system, then report resident bytes and objects."""
    gc.unfreeze()  # what `gc_pacing` has frozen is neither collected nor counted
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "objects": len(gc.get_objects())}
