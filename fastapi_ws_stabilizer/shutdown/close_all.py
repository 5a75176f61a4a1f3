"""Closing all connections within a time limit."""

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
    """What a shutdown did.

    Attributes:
        closed_count: Connections that ended in time: close frame sent, hooks run, endpoint finished.
        failed_count: Connections that did not, and were cut.
        duration_seconds: How long it took.
        forced_count: Connections whose transport was cut: their client took nothing, or the time was over.
        resumable_count: Sessions that a client could come back to when it was done. They are in the memory of this
            process, and end with it.
    """

    closed_count: int = 0
    failed_count: int = 0
    duration_seconds: float = 0.0
    forced_count: int = 0
    resumable_count: int = 0


async def close_all(connections: Iterable[Connection], timeout: float) -> ShutdownReport:
    """Close connections with 1012, all at the same time, and wait at most `timeout` seconds for their end.

    What is not finished by then is cut: its transport aborted, its endpoint cancelled. Connections that are ending
    already are waited for too, but counted only if this call had to cut them.
    """
    started = monotonic()
    everyone = list(connections)
    ours = []
    hold = LoopBudget()
    for connection in everyone:
        if connection.close(DisconnectReason.SERVER_SHUTDOWN):
            ours.append(connection)
        if hold.exceeded():
            await hold.yield_to_loop()
    await wait_for_all([connection.finished for connection in everyone], timeout)
    late = [connection for connection in everyone if not connection.is_finished]
    for connection in late:
        connection.abort()
        connection.endpoint.cancel()
    closed = sum(1 for connection in ours if connection.is_finished)
    return ShutdownReport(closed, len(late), monotonic() - started, forced_count=len(late))
