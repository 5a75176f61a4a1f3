"""Handover: a newer connection of a client takes over from an older one, and waits for its teardown."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from fastapi_ws_stabilizer.connection.metered import Metered
from fastapi_ws_stabilizer.connection.v1_protocol import V1Protocol
from fastapi_ws_stabilizer.tasks import LazyEvent, wait_for_all, wait_for_first


class Handover(Metered):
    """Part of a connection that takes over sessions and waits for predecessors."""

    __slots__ = ("_closed_event", "_hooks_done", "connect_hooks_started", "endpoint", "predecessors")

    _closed_event: LazyEvent
    _hooks_done: LazyEvent
    predecessors: tuple[Handover, ...]
    """Older connections that still run handlers or hooks for the state that this one took over."""
    connect_hooks_started: bool
    """Whether the connect or resume hooks have started."""
    endpoint: EndpointTask

    @property
    def hooks_done(self) -> bool:
        """Whether the disconnect hooks have run, or were not needed."""
        return self._hooks_done.is_set

    @property
    def is_closed(self) -> bool:
        """Whether teardown has ended."""
        return self._closed_event.is_set

    def _take_over(self, protocol: V1Protocol) -> None:
        """Attach this connection to a session: from now on it sends the session's messages and fills its inbox.

        Nothing here awaits. Therefore no message arrives in between, and none is sent or read twice.
        """
        session = protocol.session
        previous: Handover | None = session.previous_connection
        if session.inbox is not None:
            rest = session.inbox.transfer()
            self.inbox = session.inbox
            if previous is not None:  # otherwise its teardown has ended
                previous.inbox = rest
                self.add_predecessor(previous)
        session.inbox, session.previous_connection = self.inbox, self
        if protocol.max_inflated:
            self.outbox.deflate_frames()
        replaced = session.attach(self, protocol.resume_result.cursor, protocol.welcome())
        protocol.emit_outcome()
        if replaced is not None:
            replaced.close(DisconnectReason.REPLACED, reason="session taken over by another connection")

    def add_predecessor(self, previous: Handover) -> None:
        """Wait for an older connection and its own predecessors before hooks and handlers run here."""
        self.predecessors = tuple(one for one in (*previous.predecessors, previous) if not one.is_closed)

    def add_hook_predecessors(self, ended: Iterable[Handover]) -> None:
        """Let hooks wait for the disconnect hooks of closing connections of the same client.

        A connection without started connect hooks has no disconnect hooks, so it is not added.
        """
        more = tuple(
            one for one in ended if one.connect_hooks_started and not one.hooks_done and one not in self.predecessors
        )
        if more:
            self.predecessors += more

    async def wait_for_predecessors(self) -> None:
        """Wait until all predecessors have released their state. Cancelling is safe."""
        if self.predecessors:
            await asyncio.gather(*(one.wait_released() for one in self.predecessors))
            self.predecessors = ()

    async def wait_released(self) -> None:
        """Wait until the current message is handled and the disconnect hooks have run.

        Another connection has taken over the session. The wait for the message is bounded by `disconnect_grace`. Each
        hook has a time limit, and so has the number of hooks that run at the same time. A limit for the whole wait
        would be too short with many hooks.
        """
        grace = self.config.disconnect_grace
        drained = self.inbox.drained
        if drained is not None:
            await wait_for_first([drained, self.endpoint.returned], grace)
        await wait_for_all([self._hooks_done.future], None)
