"""Going away well: no new connections, a word to each client when to come back, closes spread over a while.

All at once, thousands of clients would be back in the same instant, on a server that has just begun. So each is told a
moment of its own: a client of `stabilizer.v1.json` leaves by itself at it, a plain one is closed then.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.lifecycle import Connection
from fastapi_ws_stabilizer.connection.server_side import LINGER
from fastapi_ws_stabilizer.hub.lifetimes import LEAVES_BY_ITSELF
from fastapi_ws_stabilizer.hub.turns import HoldTimer
from fastapi_ws_stabilizer.reports import Reports
from fastapi_ws_stabilizer.shutdown.closing import ShutdownReport, close_all
from fastapi_ws_stabilizer.tasks import wait_for_all

CLOSES_PER_SECOND: Final = 100.0
"""Closes are spread no wider than this, so that nobody waits ten seconds for a handful of connections."""

PART_OF_TIMEOUT: Final = 0.6
"""The part of the whole time that the closes may be spread over. The rest is for hooks, and for who is slow."""

COME_BACK_AFTER: Final = 1.0
"""Seconds after its close at which a plain client may come back at the earliest; it is told a random moment later."""


class Drain:
    """One drain of one manager.

    Args:
        reports: Where it is told.
        window: Seconds that the closes are spread over at most.
        resumable: Counts the sessions that clients can come back to.
    """

    def __init__(self, reports: Reports, window: float, resumable: Callable[[], int]) -> None:
        self._reports = reports
        self._resumable = resumable
        self._window = window

    async def run(self, connections: Iterable[Connection], timeout: float) -> ShutdownReport:
        """Close all connections within a time, and wait for their ends: hooks, endpoints, dependencies.

        Cancelling leaves connections to themselves.

        Args:
            connections: Those that are open or ending.
            timeout: Seconds that all of it may take. What is not done by then is cut.
        """
        started = monotonic()
        everyone = [connection for connection in connections if connection.ending is None]
        window = min(self._window, timeout * PART_OF_TIMEOUT, len(everyone) / CLOSES_PER_SECOND)
        self._reports.tell("drain_started", logging.INFO, connections=len(everyone), window_seconds=window)
        random.shuffle(everyone)
        moments = self._announce(everyone, window)
        closed = await self._close_in_turn(moments, started)
        await wait_for_all([connection.finished for connection in closed], LINGER)
        forced = [connection for connection in closed if connection.outbox.stuck]
        for connection in forced:  # its client takes nothing, not even the goodbye
            connection.abort()
        report = await close_all(connections, max(0.0, started + timeout - monotonic()))
        report.closed_count += sum(connection.is_finished for connection in closed)
        report.forced_count += sum(connection.is_finished for connection in forced)  # the others are counted there
        report.resumable_count = self._resumable()
        report.duration_seconds = monotonic() - started
        return report

    def _announce(self, everyone: list[Connection], window: float) -> list[tuple[float, Connection]]:
        """Give each its moment, evenly, and tell those that can be told."""
        step = window / len(everyone) if everyone else 0.0
        moments = []
        for number, connection in enumerate(everyone):
            after = step * (number + 0.5)
            if connection.ask_to_leave(after, window, "restart"):
                after += LEAVES_BY_ITSELF
            moments.append((after, connection))
        moments.sort(key=lambda one: one[0])
        return moments

    async def _close_in_turn(self, moments: list[tuple[float, Connection]], started: float) -> list[Connection]:
        """Close each at its moment, unless it has left; return those that were closed or have left."""
        hold = HoldTimer()
        done = []
        for after, connection in moments:
            wait = started + after - monotonic()
            if wait > 0 and connection.ending is None:
                await asyncio.sleep(wait)
            elif hold.held_long():
                await hold.let_go()
            retry = COME_BACK_AFTER + random.uniform(0.0, max(1.0, self._window))  # noqa: S311 (spreads load)
            connection.end(DisconnectReason.SERVER_SHUTDOWN, text=f"server shutdown; retry={round(retry * 1000)}")
            done.append(connection)
        return done
