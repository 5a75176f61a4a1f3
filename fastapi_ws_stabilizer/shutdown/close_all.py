"""`close_all` closes all connections within a time limit; `ShutdownReport` has the result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.scheduling import LoopBudget
from fastapi_ws_stabilizer.tasks import wait_for_all


@dataclass
class ShutdownReport:
    """Report of a drain or shutdown.

    Attributes:
        closed_count: Connections that ended in time: close frame sent, hooks run, endpoint finished.
        failed_count: Connections that did not end in time and were aborted.
        duration_seconds: Duration in seconds.
        forced_count: Connections that were aborted because their client took nothing or the time had passed.
        resumable_count: Sessions that clients could resume at the end. They are in the memory of this process, and end
            with it.
    """

    closed_count: int = 0
    failed_count: int = 0
    duration_seconds: float = 0.0
    forced_count: int = 0
    resumable_count: int = 0


async def close_all(connections: Iterable[Connection], timeout: float) -> ShutdownReport:
    """Close all connections with 1012 at the same time, and wait at most `timeout` seconds for their end.

    Then the transports of unfinished connections are aborted and their endpoints cancelled. The call also waits for
    connections that were already closing, but counts them only if it aborts them.
    """
    started = monotonic()
    connections = list(connections)
    closed_here = []
    loop_budget = LoopBudget()
    for connection in connections:
        if connection.close(DisconnectReason.SERVER_SHUTDOWN):
            closed_here.append(connection)
        if loop_budget.exceeded():
            await loop_budget.yield_to_loop()
    await wait_for_all([connection.finished for connection in connections], timeout)
    late = [connection for connection in connections if not connection.is_finished]
    for connection in late:
        connection.abort()
        connection.endpoint.cancel()
    closed = sum(1 for connection in closed_here if connection.is_finished)
    return ShutdownReport(closed, len(late), monotonic() - started, forced_count=len(late))
