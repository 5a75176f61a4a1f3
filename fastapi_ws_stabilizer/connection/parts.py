"""What a manager lends to its connections."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.reports import Reports
from fastapi_ws_stabilizer.tasks import TaskSet


class Parts:
    """What a manager lends to its connections.

    Args:
        config: Its options.
        reports: Where to tell what happens.
        tasks: Holds the tasks of all connections.
        left: Called, without waiting, when a connection has begun to end: it must be found nowhere any more.
        disconnected: Runs the disconnect hooks.
        failed: Told of a bug in user code, after it has been reported.
    """

    __slots__ = ("config", "disconnected", "failed", "left", "reports", "tasks")

    def __init__(
        self,
        config: WebSocketConfig,
        reports: Reports,
        tasks: TaskSet,
        *,
        left: Callable[[Any], None],
        disconnected: Callable[[Any, DisconnectReason], Awaitable[None]],
        failed: Callable[[Any, BaseException], Awaitable[None]],
    ) -> None:
        self.config = config
        self.reports = reports
        self.tasks = tasks
        self.left = left
        self.disconnected = disconnected
        self.failed = failed
