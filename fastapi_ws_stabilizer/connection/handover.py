"""How one connection of a client follows another: what it takes over, and what it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from fastapi_ws_stabilizer.connection.metered import Metered
from fastapi_ws_stabilizer.connection.v1_protocol import V1Protocol
from fastapi_ws_stabilizer.tasks import LazyEvent, wait_for_all, wait_for_first


class Handover(Metered):
    """A connection that may have others before it, which are still busy for what is its own now."""

    __slots__ = ("_finished", "_hooks_done", "connect_hooks_started", "endpoint", "predecessors")

    _finished: LazyEvent
    _hooks_done: LazyEvent
    predecessors: tuple[Handover, ...]
    """Those that are still busy for what is ours now."""
    connect_hooks_started: bool
    """Whether the connect or resume hooks have begun."""
    endpoint: EndpointTask

    @property
    def hooks_done(self) -> bool:
        """Whether the hooks for its end have run, if there was something to tell them."""
        return self._hooks_done.is_set

    @property
    def is_finished(self) -> bool:
        """Whether everything is done for this connection."""
        return self._finished.is_set

    def _take_over(self, protocol: V1Protocol) -> None:
        """Become the connection of a session: its messages go out here from now on, and its inbox is filled from here.

        Nothing of this waits, so no message comes between, and none is sent or read twice.
        """
        session = protocol.session
        previous: Handover | None = session.previous_connection
        if session.inbox is not None:
            rest = session.inbox.transfer()
            self.inbox = session.inbox
            if previous is not None:  # else everything was done for it
                previous.inbox = rest
                self.add_predecessor(previous)
        session.inbox, session.previous_connection = self.inbox, self
        if protocol.max_inflated:
            self.outbox.deflate_frames()
        replaced = session.attach(self, protocol.resume_result.cursor, protocol.welcome())
        protocol.emit_outcome()
        if replaced is not None:
            replaced.close(DisconnectReason.REPLACED, text="another connection has taken the session over")

    def add_predecessor(self, previous: Handover) -> None:
        """Nothing is done here until everything is done there, and where that one waits for in its turn."""
        self.predecessors = tuple(one for one in (*previous.predecessors, previous) if not one.is_finished)

    def add_hook_predecessors(self, ended: Iterable[Handover]) -> None:
        """Begin no hook here before the hooks for the end of these connections of the same client have run.

        A connection whose connect hooks never began has none to wait for.
        """
        more = tuple(
            one for one in ended if one.connect_hooks_started and not one.hooks_done and one not in self.predecessors
        )
        if more:
            self.predecessors += more

    async def wait_for_predecessors(self) -> None:
        """Wait until nothing more is done for what is ours by the connections that had it. Cancelling is safe."""
        if self.predecessors:
            await asyncio.gather(*(one.wait_released() for one in self.predecessors))
            self.predecessors = ()

    async def wait_released(self) -> None:
        """Wait until nothing more is done here for a session that another connection has taken over.

        That is: the message that was in hand is handled, and the disconnect hooks have run. Each of them is bounded,
        and so is how many run at the same time: the wait for them needs no bound of its own, which would be too short
        where there are many.
        """
        grace = self.config.disconnect_grace
        drained = self.inbox.drained
        if drained is not None:
            await wait_for_first([drained, self.endpoint.returned], grace)
        await wait_for_all([self._hooks_done.future], None)
