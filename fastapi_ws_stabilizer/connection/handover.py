"""Handover: a newer connection of a client takes over from older ones, and waits for their teardown."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastapi_ws_stabilizer.tasks import wait_for_all, wait_for_first

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection


class Handover:
    """Older connections that a newer one waits for, before its hooks and handlers run.

    A connection creates it when it takes over the state of another one, or when older connections of its client still
    run their disconnect hooks.

    Attributes:
        predecessors: Older connections that still run handlers or hooks for the state that this one took over.
    """

    __slots__ = ("predecessors",)

    def __init__(self) -> None:
        self.predecessors: tuple[Connection, ...] = ()

    def add(self, previous: Connection) -> None:
        """Wait for an older connection and its own predecessors."""
        own = () if previous.handover is None else previous.handover.predecessors
        self.predecessors = tuple(one for one in (*own, previous) if not one.is_closed)

    def add_all(self, more: Iterable[Connection]) -> None:
        """Wait for further connections, for which the newer one takes over nothing."""
        self.predecessors += tuple(one for one in more if one not in self.predecessors)

    async def wait(self) -> None:
        """Wait until all predecessors have released their state. Cancelling is safe."""
        if self.predecessors:
            await asyncio.gather(*map(_wait_released, self.predecessors))
            self.predecessors = ()


async def _wait_released(connection: Connection) -> None:
    """Wait until the current message is handled and the disconnect hooks have run.

    Another connection has taken over the session. The wait for the message is bounded by `disconnect_grace`. Each hook
    has a time limit, and so has the number of hooks that run at the same time. A limit for the whole wait would be too
    short with many hooks.
    """
    drained = connection.inbox.drained
    if drained is not None:
        await wait_for_first([drained, connection.endpoint.returned], connection.config.disconnect_grace)
    await wait_for_all([connection.teardown.hooks_done.future], None)
