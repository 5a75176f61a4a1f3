"""State machine of one connection: new, open, closing, closed.

The client, the network, the heartbeat, a stalled send, a newer connection and the endpoint can all close a connection
at the same moment. The first cause wins and sets the `CloseInfo`, which wakes all waiters at once. Then one teardown
task runs these steps in order, each with a time limit. If a step raises, it is reported as a bug and the next one runs:

1. The outbox sends the queued messages, if the close policy says so, and then the close frame.
2. Running message handlers finish, then the disconnect hooks run.
3. The endpoint gets the rest of `disconnect_grace` and is then cancelled. Tasks tied to the connection are cancelled
   when the endpoint has returned or its grace has ended.
4. The transport gets a limited time to flush, and the client to answer the close frame. Then the connection is aborted.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
from dataclasses import replace
from typing import Any, Final

from fastapi import WebSocket, WebSocketDisconnect

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, CloseInfo, DisconnectReason, detaches, local_close
from fastapi_ws_stabilizer.compat.starlette import (
    asgi_callables,
    install_asgi_shim,
    mark_disconnected,
    replace_with_ended,
)
from fastapi_ws_stabilizer.config import CompressionMode, HeartbeatType
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.direct_reader import DirectReader
from fastapi_ws_stabilizer.connection.end_errors import IGNORED, PAUSE, SPINS, end_errors_of
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from fastapi_ws_stabilizer.connection.handover import Handover
from fastapi_ws_stabilizer.connection.inbox import Inbox
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.connection.pump import read_pump
from fastapi_ws_stabilizer.connection.resources import SharedResources
from fastapi_ws_stabilizer.connection.server_transport import FLUSH_GRACE, ServerTransport
from fastapi_ws_stabilizer.errors import NotOpenError
from fastapi_ws_stabilizer.limits.connections import Reservation
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome
from fastapi_ws_stabilizer.tasks import LazyEvent, TaskSet, copied, start, wait_for_all

_MAX_FLUSH: Final = 6
"""Maximum duration of an outbox flush that makes progress, in multiples of `send_timeout`."""


class Connection(Handover):
    """One accepted WebSocket with its inbox, outbox, liveness, endpoint task and teardown.

    It replaces the server's `receive` and `send` in the `WebSocket`. Code that uses that object directly therefore goes
    through the inbox and the outbox too.
    """

    __slots__ = (
        "_abort_timer",
        "_pump",
        "_tasks",
        "bad_messages",
        "context",
        "control_frames",
        "credential",
        "disconnect_hooks_pending",
        "inherited_state",
        "opened_at",
        "pause_reported",
        "reservation",
        "resume_outcome",
        "session_end_reported",
        "watches_input",
        "websocket",
    )

    def __init__(
        self,
        websocket: WebSocket,
        client_id: str,
        parts: SharedResources,
        *,
        control_frames: bool,
        endpoint: EndpointTask,
        numbered: bool = False,
        connection_id: str | None = None,
    ) -> None:
        config = parts.config
        self.connection_id = connection_id or secrets.token_hex(8)
        self.client_id = client_id
        self.websocket = websocket
        self.config = config
        self.events = parts.events
        self.control_frames = control_frames
        self.endpoint = endpoint
        self.opened_at = monotonic()
        self.liveness = Liveness(self.opened_at, parts.round_trips)
        self.inbox = Inbox(parts.inbox_limits)
        self.server_transport = ServerTransport(*asgi_callables(websocket))
        self.shard = parts.next_shard()
        self._direct = self.server_transport.direct_transport(websocket.scope)
        self.protocol = None
        self.outbox = self._make_outbox(parts, numbered=numbered)
        self._closing = None
        self._closed_event = LazyEvent()
        self._hooks_done = LazyEvent()
        self.resume_outcome = ResumeOutcome.NONE
        self.predecessors = ()
        self.connect_hooks_started = False
        self.inherited_state = False  # whether it took over the state of an earlier plain connection
        self.session_end_reported = False
        self.close_info: CloseInfo | None = None
        self.pause = None
        self.pause_reported = False
        self.limit_reported = False
        self.disconnect_hooks_pending = False
        self.bad_messages = 0
        self.dropped_messages = 0
        self.used = False
        self._sequenced_count = 0
        self._parts = parts
        self.watches_input = parts.watches_input
        self._tasks: TaskSet | None = None
        self.context: contextvars.Context | None = None  # used only for work of this connection
        self._pump: asyncio.Task[None] | None = None
        self.opened = False
        self.reservation: Reservation | None = None
        self.residual = None
        self.credential: CredentialExpiry | None = None
        self._controls = None
        self._abort_timer: asyncio.TimerHandle | None = None

    # ── open ──

    def open(self) -> None:
        """Start reading. After this call every path sets one `CloseInfo` and completes `finished`."""
        websocket = self.websocket
        receive, _ = asgi_callables(websocket)
        install_asgi_shim(websocket, self._asgi_receive, self._asgi_send)
        self.opened = True
        self.context = contextvars.copy_context()
        self.endpoint.watch(websocket.scope)
        self.outbox.open()
        if self.protocol is not None:
            self._take_over(self.protocol)
        self.events.counters.connections_opened += 1
        self.emit("connection_opened", logging.INFO)
        if isinstance(self.outbox, DirectOutbox) and self._direct is not None:
            self._direct.attach(
                DirectReader(self, self._direct, self.outbox),
                max_message_bytes=self.config.max_message_size,
                own_pings=self.config.heartbeat_type is HeartbeatType.PING,
            )
            self.outbox.on_attached(compress=self.config.compression is CompressionMode.DEFLATE)
        else:
            # All pumps share one name, because a name for each would cost memory for every idle connection.
            self._pump = start(read_pump(self, receive), name="ws-pump", context=self.context)
        self.outbox.flush()  # sends the welcome, since the endpoint may begin with a long computation

    async def report_bug(self, event: str, error: BaseException) -> None:
        """Report a bug in user code once and run the error hooks, with the time limit of disconnect hooks."""
        self.events.emit_exception(event, error, client_id=self.client_id, connection_id=self.connection_id)
        await self._parts.listener.on_error(self, error)

    @property
    def outcome(self) -> ResumeOutcome:
        """Resume outcome: how much of its state the client got back."""
        return self.resume_outcome if self.protocol is None else self.protocol.resume_result.outcome

    def belongs_to(self, parts: SharedResources) -> bool:
        """Whether this connection was opened with these resources and not by another manager."""
        return self._parts is parts

    # ── closing ──

    def close(
        self,
        cause: DisconnectReason,
        *,
        code: int | None = None,
        reason: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Start closing from the server's side, without waiting. Return `False` if it was closing already.

        Raises:
            ValueError: `code` cannot be sent.
            NotOpenError: The handshake has not been accepted.
        """
        if not self.opened:
            raise NotOpenError
        if self.close_info is not None:
            return False  # before the code is checked, because Starlette passes 1005 and 1006 back
        return self._start_closing(local_close(cause, code=code, reason=reason, from_outside=from_outside))

    def on_peer_close(self, close_info: CloseInfo) -> None:
        """Start teardown after the client, the network or the ASGI server has closed the connection.

        If very many connections are lost at once, it starts in a later iteration of the event loop.
        """
        self._parts.closings.run(self._start_closing, close_info)

    def on_connection_lost(self, error: BaseException) -> None:
        """Start teardown after the network was lost."""
        if self._start_closing(CloseInfo(DisconnectReason.NETWORK_LOST, 1006, by_peer=True)):
            self.emit("connection_lost", logging.DEBUG, cause=repr(error))

    def _start_closing(self, close_info: CloseInfo) -> bool:
        if self.close_info is not None:
            return False
        if self.protocol is not None and close_info.code == 1000 and not close_info.by_peer:
            # Proxies send 1000 too, so clients reconnect after it.
            close_info = replace(close_info, code=SESSION_ENDED)
        drain_cause = self._parts.drain_requests.pop(self.connection_id, None)
        if drain_cause is not None and detaches(close_info):  # the client left as asked
            close_info = replace(close_info, cause=drain_cause)
        self.close_info = close_info
        attempt = self.attempt
        attempt(self._parts.listener.on_closing, self)
        self.events.counters.endings[close_info.cause] += 1
        if self.protocol is not None:
            attempt(self.protocol.close)
        if self.credential is not None:
            attempt(self.credential.reset, None)
        attempt(self._close_inbox, discard=not close_info.policy.deliver)
        if not close_info.by_peer:
            # A stalled send ends the flush earlier. This bounds a client that reads a byte now and then.
            abort_delay = _MAX_FLUSH * self.config.send_timeout if close_info.policy.flush else FLUSH_GRACE
            self._abort_timer = asyncio.get_running_loop().call_later(
                abort_delay, self.attempt, self.abort, context=self._parts.outbox_limits.context
            )
            attempt(self._stop_reading)
        if not attempt(self._close_outbox, close_info):
            attempt(self.abort)
            self.outbox.give_up()
        attempt(self.endpoint.watch, self.websocket.scope)
        attempt(self._mark_websocket_disconnected)
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)
        if not attempt(self._parts.scheduler.schedule, self._parts.scheduler.pending(self.shard), self):
            self.on_flush_due()
        return True

    def _mark_websocket_disconnected(self) -> None:
        """Set the state of Starlette's `WebSocket` to disconnected once all received messages are read."""
        replace_with_ended(self.websocket)
        if not len(self.inbox):
            mark_disconnected(self.websocket)

    def _close_outbox(self, close_info: CloseInfo) -> None:
        if close_info.by_peer:
            self._discarded(self.outbox.discard())
        else:
            self._discarded(self.outbox.finish(close_info.code, close_info.reason, flush=close_info.policy.flush))

    def close_unread(self) -> None:
        """Close the inbox and discard unread messages."""
        self._close_inbox(discard=True)

    def _close_inbox(self, *, discard: bool) -> None:
        """Accept no more messages. Unread messages of a session that has not ended stay for its next connection."""
        if self.protocol is not None:
            discard = discard and self.protocol.session.ended is not None
            for item in self.inbox.unread() if discard else ():
                self.attempt(self.protocol.on_discarded, item)
        discarded = self.inbox.close(discard=discard)
        self.events.counters.messages_discarded += discarded
        if discarded:
            self.emit("messages_discarded", logging.DEBUG, count=discarded)

    def on_flush_due(self) -> None:
        """Start the teardown task. The flush scheduler calls this soon after the close, shard by shard."""
        if self.close_info is not None and not self._closed_event.is_set:
            teardown = self._tear_down(self.close_info)
            self._parts.tasks.spawn(teardown, name=f"ws-end-{self.connection_id}", context=self.context)

    @property
    def waits_for_user_code(self) -> bool:
        """Whether teardown waits for the endpoint, a handler, a connect hook or the disconnect hooks."""
        if self._closed_event.is_set:
            return False
        in_hooks = self.close_info is not None and not self.disconnect_hooks_pending and not self._hooks_done.is_set
        return in_hooks or self.endpoint.is_running

    @property
    def closed(self) -> asyncio.Future[None]:
        """Future that completes at the end of teardown."""
        return self._closed_event.future

    async def wait_for_hooks(self) -> None:
        """Wait until the disconnect hooks have run. Each has a time limit. Cancelling is safe."""
        await wait_for_all([self._hooks_done.future], None)

    async def wait_closing(self) -> CloseInfo:
        """Wait until the connection starts to close, and return its `CloseInfo`. Cancelling is safe."""
        if self.close_info is not None:
            await self.yield_after_end()
        while self.close_info is None:
            await asyncio.shield(self.closing)
        return self.close_info

    async def _tear_down(self, close_info: CloseInfo) -> None:
        until = monotonic() + self.config.disconnect_grace
        try:
            await self._attempt_async(self._wait_for_work)
            await self._attempt_async(self.wait_for_predecessors)
            async with self._parts.cleanups:
                await self._attempt_async(self.run_disconnect_hooks)
                await self._attempt_async(self._parts.listener.on_session_end, self)
                self._hooks_done.set()
            await self._attempt_async(self._wait_for_endpoint, until)
            await self._attempt_async(self._wait_for_flush)
        finally:
            self._mark_closed(close_info)

    async def _wait_for_work(self) -> None:
        """Wait until user code has finished the message it is handling."""
        grace = self.config.disconnect_grace
        if not await wait_for_all([self.endpoint.wait_idle()], grace):
            self._cancel_endpoint()
            await wait_for_all([self.endpoint.wait_idle()], min(grace, FLUSH_GRACE))

    async def _wait_for_endpoint(self, until: float) -> None:
        """Wait for the endpoint until its grace has ended, then cancel it. Cancel the tied tasks in either case."""
        if not await wait_for_all([self.endpoint.returned], max(0.0, until - monotonic())):
            self._cancel_endpoint()
        tied = self._tasks.cancel() if self._tasks is not None else []
        await wait_for_all([self.endpoint.returned, *tied], self.config.disconnect_grace)

    async def _wait_for_flush(self) -> None:
        await wait_for_all([self.outbox.done], _MAX_FLUSH * self.config.send_timeout)

    async def run_disconnect_hooks(self) -> None:
        """Run the disconnect hooks once, if the connect hooks have started."""
        if self.disconnect_hooks_pending and self.close_info is not None:
            self.disconnect_hooks_pending = False
            await self._parts.listener.on_disconnect(self)

    def expedite(self) -> None:
        """Cancel the endpoint of a closing connection without waiting for the rest of its grace."""
        if self.close_info is not None:
            self._cancel_endpoint()

    def _cancel_endpoint(self) -> None:
        if self.endpoint.cancel():
            self.emit("endpoint_cancelled", logging.DEBUG, disconnect_grace=self.config.disconnect_grace)

    def _abandon_endpoint(self) -> None:
        """Report an endpoint that did not end when cancelled, and let the server stop without it."""
        name = self.endpoint_name
        self.emit_throttled("endpoint_does_not_end", logging.WARNING, name, endpoint=name)
        self.server_transport.forget_task(self.endpoint.task)

    @property
    def endpoint_name(self) -> str:
        """Qualified name of the endpoint function, with `?` for parts that the scope does not contain."""
        function = self.websocket.scope.get("endpoint")
        return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"

    async def yield_after_end(self) -> None:
        """Count an error for a closed connection, and yield to the event loop from the second one on.

        The log names code that ignores the errors. If that code continues, or was cancelled, it is slowed down.
        """
        if self.close_info is not None:
            mark_disconnected(self.websocket)
        task = asyncio.current_task()
        if task is None:
            return
        errors, scheduler, own = end_errors_of(task), self._parts.scheduler, task is self.endpoint.task
        times = errors.count(self.connection_id, sends=scheduler.sends, own=own)
        if not errors.is_new:
            await asyncio.sleep(0)
        if times == IGNORED and self.close_info is not None:
            name = self.endpoint_name if own else getattr(task.get_coro(), "__qualname__", "?")
            fields = {"endpoint" if own else "coroutine": name, "task": task.get_name()}
            self.emit_throttled("end_ignored", logging.WARNING, name, **fields)
        if times > SPINS or (times > IGNORED and self.endpoint.has_swallowed_cancellation):
            await asyncio.sleep(PAUSE)
        errors.mark_resumed(sends=scheduler.sends)

    def force_finish(self) -> None:
        """Finish without the rest of teardown and release all waiters."""
        self._mark_closed(self.close_info or local_close(DisconnectReason.SERVER_SHUTDOWN))

    def _mark_closed(self, close_info: CloseInfo) -> None:
        if self._closed_event.is_set:
            return
        self._closed_event.set()
        self._hooks_done.set()
        attempt = self.attempt
        attempt(self._parts.listener.on_closed, self)
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None
        attempt(self._stop_reading)
        attempt(self._cancel_endpoint)
        if not self.endpoint.has_ended:
            attempt(self._abandon_endpoint)
        self.predecessors = ()
        self._pump = self.context = None  # both refer to this connection, and the cycle would delay its collection
        if self.endpoint.tracked:  # it has returned or was cancelled, so nothing reads the inbox
            attempt(self.close_unread)
        elif self.protocol is None:
            attempt(self.inbox.stop_accounting)
        waits_for_flush = (
            close_info.policy.flush
            and close_info.cause is not DisconnectReason.SERVER_SHUTDOWN
            and not close_info.by_peer
        )
        timeout = self.config.send_timeout if waits_for_flush else FLUSH_GRACE
        attempt(self.server_transport.abort_unless_flushed, timeout, _MAX_FLUSH * timeout if waits_for_flush else 0.0)
        if not close_info.by_peer:
            attempt(self.server_transport.abort_unless_answered)
        self.emit(
            "connection_ended",
            logging.INFO,
            reason=close_info.cause.value,
            code=close_info.code,
            text=close_info.reason,
            seconds=monotonic() - self.opened_at,
        )

    def _stop_reading(self) -> None:
        """Cancel a pending `receive`, because granian sends no close frame while one is pending."""
        if self._pump is not None and self._pump is not asyncio.current_task():
            self._pump.cancel()

    # ── user code ──

    def spawn(self, coroutine: Any, name: str | None) -> asyncio.Task[Any]:
        """Start a task tied to this connection. Its failure closes the connection as the endpoint's would."""
        try:
            self.check_open()
        except Exception:
            coroutine.close()
            raise
        if self._tasks is None:
            self._tasks = TaskSet(self._task_failed)
        return self._tasks.spawn(coroutine, name=name or f"ws-task-{self.connection_id}")

    def _task_failed(self, _: asyncio.Task[Any], error: BaseException) -> None:
        if isinstance(error, WebSocketDisconnect):
            return
        closing = self._close_by_error(error)
        self._parts.tasks.spawn(closing, name=f"ws-error-{self.connection_id}", context=copied(self.context))

    async def _close_by_error(self, error: BaseException) -> None:
        """Close the connection for an error of a tied task, as the application's exception handler says."""
        close_info, bug = await self._parts.listener.close_info_by_handler(self, error)
        self.close(close_info.cause, code=close_info.code, reason=close_info.reason)
        if bug is not None:
            await self.report_bug("tied_task_failed", bug)
