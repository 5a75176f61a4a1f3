"""Teardown: what happens between the start of a close and its end.

One task runs these steps in order, each with a time limit. If a step raises, it is reported as a bug and the next one
runs:

1. The outbox sends the queued messages, if the close policy says so, and then the close frame.
2. Running message handlers finish, then the disconnect hooks run.
3. The endpoint gets the rest of `disconnect_grace` and is then cancelled. Tasks tied to the connection are cancelled
   when the endpoint has returned or its grace has ended.
4. The transport gets a limited time to flush, and the client to answer the close frame. Then the connection is aborted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.compat.starlette import mark_disconnected, replace_with_ended
from fastapi_ws_stabilizer.connection.server_transport import FLUSH_GRACE
from fastapi_ws_stabilizer.tasks import LazyEvent, wait_for_all

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection

_MAX_FLUSH: Final = 6
"""Maximum duration of an outbox flush that makes progress, in multiples of `send_timeout`."""


class Teardown:
    """Teardown of one connection, from the start of its close.

    Args:
        connection: The connection.

    Attributes:
        hooks_done: Set when the disconnect hooks have run, or were not needed.
        closed: Set at the end of the teardown.
    """

    __slots__ = ("_abort_timer", "_connection", "closed", "hooks_done")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._abort_timer: asyncio.TimerHandle | None = None
        self.hooks_done = LazyEvent()
        self.closed = LazyEvent()

    def start(self, close_info: CloseInfo) -> None:
        """Stop the inbox and the outbox, and schedule the rest."""
        connection = self._connection
        attempt = connection.attempt
        attempt(connection.protocol.on_closing)
        if connection.credential is not None:
            attempt(connection.credential.stop)
        attempt(connection.close_inbox, discard=not close_info.policy.deliver)
        if not close_info.by_peer:
            # A stalled send ends the flush earlier. This bounds a client that reads a byte now and then.
            abort_delay = _MAX_FLUSH * connection.config.send_timeout if close_info.policy.flush else FLUSH_GRACE
            self._abort_timer = asyncio.get_running_loop().call_later(
                abort_delay, attempt, connection.abort, context=connection.outbox.limits.context
            )
            attempt(connection.stop_reading)
        if not attempt(self._close_outbox, close_info):
            attempt(connection.abort)
            connection.outbox.give_up()
        attempt(connection.endpoint.watch, connection.websocket.scope)
        attempt(self._mark_websocket_disconnected)
        connection.mark_closing()
        scheduler = connection.resources.scheduler
        if not attempt(scheduler.schedule, scheduler.pending(connection.shard), self):
            self.on_flush_due()

    def _close_outbox(self, close_info: CloseInfo) -> None:
        connection = self._connection
        if close_info.by_peer:
            discarded = connection.outbox.discard()
        else:
            flush = close_info.policy.flush
            discarded = connection.outbox.finish(close_info.code, close_info.reason, flush=flush)
        connection.on_discarded(discarded)

    def _mark_websocket_disconnected(self) -> None:
        """Set the state of Starlette's `WebSocket` to disconnected once all received messages are read."""
        connection = self._connection
        replace_with_ended(connection.websocket)
        if not len(connection.inbox):
            mark_disconnected(connection.websocket)

    def on_flush_due(self) -> None:
        """Start the task. The flush scheduler calls this soon after the close, shard by shard."""
        if not self.closed.is_set:
            connection = self._connection
            name = f"ws-end-{connection.connection_id}"
            connection.resources.tasks.spawn(self._run(connection), name=name, context=connection.context)

    async def _run(self, connection: Connection) -> None:
        until = monotonic() + connection.config.disconnect_grace
        try:
            await self._attempt(self._wait_for_work)
            await self._attempt(connection.wait_for_predecessors)
            async with connection.resources.cleanups:
                await self._attempt(connection.run_disconnect_hooks)
                await self._attempt(connection.resources.listener.on_session_end, connection)
                self.hooks_done.set()
            await self._attempt(self._wait_for_endpoint, until)
            await self._attempt(self._wait_for_flush)
        finally:
            self.finish()

    async def _attempt(self, step: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Run one step like `Connection.attempt`. A cancellation propagates."""
        try:
            await step(*args)
        except Exception as error:
            self._connection.report_failed_step(error)

    async def _wait_for_work(self) -> None:
        """Wait until user code has finished the message it is handling."""
        endpoint, grace = self._connection.endpoint, self._connection.config.disconnect_grace
        if not await wait_for_all([endpoint.wait_idle()], grace):
            self.cancel_endpoint()
            await wait_for_all([endpoint.wait_idle()], min(grace, FLUSH_GRACE))

    async def _wait_for_endpoint(self, until: float) -> None:
        """Wait for the endpoint until its grace has ended, then cancel it. Cancel the tied tasks in either case."""
        connection = self._connection
        returned = connection.endpoint.returned
        if not await wait_for_all([returned], max(0.0, until - monotonic())):
            self.cancel_endpoint()
        await wait_for_all([returned, *connection.cancel_tasks()], connection.config.disconnect_grace)

    async def _wait_for_flush(self) -> None:
        connection = self._connection
        await wait_for_all([connection.outbox.done], _MAX_FLUSH * connection.config.send_timeout)

    def cancel_endpoint(self) -> None:
        """Cancel the endpoint, without waiting for the rest of its grace."""
        connection = self._connection
        if connection.endpoint.cancel():
            connection.emit("endpoint_cancelled", logging.DEBUG, disconnect_grace=connection.config.disconnect_grace)

    def _abandon_endpoint(self) -> None:
        """Report an endpoint that did not end when cancelled, and let the server stop without it."""
        connection = self._connection
        name = connection.endpoint_name
        connection.emit_throttled("endpoint_does_not_end", logging.WARNING, name, endpoint=name)
        connection.server_transport.forget_task(connection.endpoint.task)

    def finish(self) -> None:
        """End the teardown and release all waiters, also if steps are left."""
        if self.closed.is_set:
            return
        self.closed.set()
        self.hooks_done.set()
        connection = self._connection
        attempt = connection.attempt
        attempt(connection.resources.listener.on_closed, connection)
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None
        attempt(connection.stop_reading)
        attempt(connection.stop_reader)
        attempt(self.cancel_endpoint)
        if not connection.endpoint.has_ended:
            attempt(self._abandon_endpoint)
        if connection.endpoint.tracked:  # it has returned or was cancelled, so nothing reads the inbox
            attempt(connection.close_inbox, discard=True)
        elif not connection.protocol.acknowledges:
            attempt(connection.inbox.stop_accounting)
        close_info = connection.close_info or local_close(DisconnectReason.SERVER_SHUTDOWN)
        attempt(self._close_transport, close_info)
        connection.emit(
            "connection_ended",
            logging.INFO,
            reason=close_info.cause.value,
            code=close_info.code,
            text=close_info.reason,
            seconds=monotonic() - connection.opened_at,
        )
        attempt(connection.endpoint.call_when_over, connection.release)

    def _close_transport(self, close_info: CloseInfo) -> None:
        """Abort the transport later, unless it has flushed and the client has answered the close frame."""
        connection = self._connection
        waits_for_flush = (
            close_info.policy.flush
            and close_info.cause is not DisconnectReason.SERVER_SHUTDOWN
            and not close_info.by_peer
        )
        timeout = connection.config.send_timeout if waits_for_flush else FLUSH_GRACE
        transport = connection.server_transport
        connection.attempt(transport.abort_unless_flushed, timeout, _MAX_FLUSH * timeout if waits_for_flush else 0.0)
        if not close_info.by_peer:
            connection.attempt(transport.abort_unless_answered)

    def release(self) -> None:
        """Drop the connection after its end."""
        del self._connection
