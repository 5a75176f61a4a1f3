"""The life of one connection: NEW, OPEN, ENDING, ENDED, and nothing else.

Many things can end a connection at the same moment: the client, the network, the heartbeat, a stuck send, a newer
connection, the endpoint. The first one wins and writes the `CloseInfo`; everyone who waits is woken at once; then one
task does the rest in order, each step with a limit in time. A step that raises is reported as a bug, and the next one
follows:

1. what is queued is sent, if the ending says so, and the close frame after it (the outbox's writer does that);
2. who is dispatching messages finishes, then the disconnect hooks run;
3. the endpoint gets the rest of `disconnect_grace` and is cancelled then; tasks that are tied to the connection are
   cancelled when it has returned;
4. what the transport still holds gets a moment to be flushed, and the client one to answer; it is cut off then.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
from dataclasses import replace
from typing import Any, Final

from fastapi import WebSocket, WebSocketDisconnect
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, CloseInfo, DisconnectReason, detaches, local_close
from fastapi_ws_stabilizer.compat.ended_websocket import IGNORED, PAUSE, SPINS, becomes_ended, end_errors_of
from fastapi_ws_stabilizer.config import CompressionMode, HeartbeatType
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.direct_reader import DirectReader
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask, close_info_for, is_bug
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
"""How many `send_timeout`s the flush of an outbox may take in all, as long as it makes progress."""


class Connection(Handover):
    """One accepted WebSocket: its inbox, outbox, pulse, endpoint, and its end.

    It takes the place of the server's `receive` and `send` in the `WebSocket` it is made for, so that code which uses
    that object directly goes through the inbox and the outbox too.
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
    ) -> None:
        config = parts.config
        self.connection_id = secrets.token_hex(8)
        self.client_id = client_id
        self.websocket = websocket
        self.config = config
        self.events = parts.events
        self.control_frames = control_frames
        self.endpoint = endpoint
        self.opened_at = monotonic()
        self.liveness = Liveness(self.opened_at, parts.round_trips)
        self.inbox = Inbox(parts.inbox_limits)
        self.server_transport = ServerTransport(websocket._receive, websocket._send)
        self.shard = parts.next_shard()
        self._direct = self.server_transport.direct_transport(websocket.scope)
        self.protocol = None
        self.outbox = self._make_outbox(parts, numbered=numbered)
        self._closing = None
        self._finished = LazyEvent()
        self._hooks_done = LazyEvent()
        self.resume_outcome = ResumeOutcome.NONE
        self.predecessors = ()
        self.connect_hooks_started = False
        self.inherited_state = False  # whether it has got what a plain connection before it has left
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
        self.context: contextvars.Context | None = None  # what is done for it, and only that, runs in this one
        self._pump: asyncio.Task[None] | None = None
        self.opened = False
        self.reservation: Reservation | None = None
        self.residual = None
        self.credential: CredentialExpiry | None = None
        self._controls = None
        self._abort_timer: asyncio.TimerHandle | None = None

    # ── open ──

    def open(self) -> None:
        """Start to read. From here on every path leads to one ending and to `finished`."""
        websocket = self.websocket
        receive = websocket._receive
        websocket._receive = self._asgi_receive
        websocket._send = self._asgi_send
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
            # One name for all: every idle connection would keep one of its own.
            self._pump = start(read_pump(self, receive), name="ws-pump", context=self.context)
        self.outbox.flush()  # the welcome: the endpoint may begin with a long computation

    async def report_bug(self, event: str, error: BaseException) -> None:
        """Report a bug in user code, once, and tell the error hooks, which get as long as a disconnect hook."""
        self.events.emit_exception(event, error, client_id=self.client_id, connection_id=self.connection_id)
        await self._parts.on_error(self.socket, error)

    @property
    def outcome(self) -> ResumeOutcome:
        """What its client has got back."""
        return self.resume_outcome if self.protocol is None else self.protocol.resume_result.outcome

    def belongs_to(self, parts: SharedResources) -> bool:
        """Whether this connection was opened with these parts, and not by another manager."""
        return self._parts is parts

    # ── the end ──

    def close(
        self,
        reason: DisconnectReason,
        *,
        code: int | None = None,
        text: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """End the connection from our side; `False` if it was ending already. Waits for nothing.

        Raises:
            ValueError: `code` cannot be sent.
        """
        if not self.opened:
            raise NotOpenError
        if self.close_info is not None:
            return False  # before the code is looked at: Starlette hands 1005 and 1006 back to us
        return self._start_closing(local_close(reason, code=code, text=text, from_outside=from_outside))

    def on_peer_close(self, close_info: CloseInfo) -> None:
        """The connection is gone: the client, the network or the server in front of us has ended it."""
        self._start_closing(close_info)

    def on_connection_lost(self, error: BaseException) -> None:
        """The connection broke."""
        if self._start_closing(CloseInfo(DisconnectReason.NETWORK_LOST, 1006, by_peer=True)):
            self.emit("connection_lost", logging.DEBUG, cause=repr(error))

    def _start_closing(self, close_info: CloseInfo) -> bool:
        if self.close_info is not None:
            return False
        if self.protocol is not None and close_info.code == 1000 and not close_info.by_peer:
            close_info = replace(
                close_info, code=SESSION_ENDED
            )  # proxies send 1000 too, and clients reconnect after it
        drain_cause = self._parts.drain_requests.pop(self.connection_id, None)
        if drain_cause is not None and detaches(close_info):  # the client obeyed the drain; no code closed it
            close_info = replace(close_info, cause=drain_cause)
        self.close_info = close_info
        attempt = self.attempt
        attempt(self._parts.on_closing, self)
        self.events.counters.endings[close_info.cause] += 1
        if self.protocol is not None:
            attempt(self.protocol.close)
        if self.credential is not None:
            attempt(self.credential.reset, None)
        attempt(self._close_inbox, discard=not close_info.rule.deliver)
        if not close_info.by_peer:
            # A send that is stuck ends the flush earlier; this bounds a client that reads a byte now and then.
            abort_delay = _MAX_FLUSH * self.config.send_timeout if close_info.rule.flush else FLUSH_GRACE
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
            self.flush_now()
        return True

    def _mark_websocket_disconnected(self) -> None:
        """Let Starlette's `WebSocket` say that the client has left, as soon as everything that it has sent is read."""
        becomes_ended(self.websocket)
        if not len(self.inbox):
            self.websocket.client_state = WebSocketState.DISCONNECTED

    def _close_outbox(self, close_info: CloseInfo) -> None:
        if close_info.by_peer:
            self._discarded(self.outbox.discard())
        else:
            self._discarded(self.outbox.finish(close_info.code, close_info.reason, flush=close_info.rule.flush))

    def close_unread(self) -> None:
        """Throw away what nobody will read any more."""
        self._close_inbox(discard=True)

    def _close_inbox(self, *, discard: bool) -> None:
        """Take no more messages. What is unread waits for the next connection of the session, if there may be one."""
        if self.protocol is not None:
            discard = discard and self.protocol.session.ended is not None
            for item in self.inbox.unread() if discard else ():
                self.attempt(self.protocol.on_discarded, item)
        discarded = self.inbox.close(discard=discard)
        self.events.counters.messages_discarded += discarded
        if discarded:
            self.emit("messages_discarded", logging.DEBUG, count=discarded)

    def flush_now(self) -> None:
        """Begin with the rest of the end. Called soon after it was decided, with those of others, shard by shard."""
        if self.close_info is not None and not self._finished.is_set:
            teardown = self._tear_down(self.close_info)
            self._parts.tasks.spawn(teardown, name=f"ws-end-{self.connection_id}", context=self.context)

    @property
    def waits_for_user_code(self) -> bool:
        """Whether its end has to wait for its endpoint, for a handler or connect hook, or for its disconnect hooks."""
        if self._finished.is_set:
            return False
        in_hooks = self.close_info is not None and not self.disconnect_hooks_pending and not self._hooks_done.is_set
        return in_hooks or self.endpoint.is_running

    @property
    def finished(self) -> asyncio.Future[None]:
        """A future that is done when everything is done for this connection."""
        return self._finished.future

    async def wait_for_hooks(self) -> None:
        """Wait until the hooks for its end have run; each of them is bounded. Cancelling is safe."""
        await wait_for_all([self._hooks_done.future], None)

    async def wait_closing(self) -> CloseInfo:
        """Wait for the ending. Cancelling is safe."""
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
                await self._attempt_async(self._parts.on_session_end, self)
                self._hooks_done.set()
            await self._attempt_async(self._wait_for_endpoint, until)
            await self._attempt_async(self._wait_for_flush)
        finally:
            self._mark_closed(close_info)

    async def _wait_for_work(self) -> None:
        """Wait until your code is done with the message that it has in hand."""
        grace = self.config.disconnect_grace
        if not await wait_for_all([self.endpoint.wait_idle()], grace):
            self._cancel_endpoint()
            await wait_for_all([self.endpoint.wait_idle()], min(grace, FLUSH_GRACE))

    async def _wait_for_endpoint(self, until: float) -> None:
        """Wait for the endpoint until its grace has passed, then cancel it and the tasks that are tied to it."""
        if not await wait_for_all([self.endpoint.returned], max(0.0, until - monotonic())):
            self._cancel_endpoint()
        tied = self._tasks.cancel() if self._tasks is not None else []
        await wait_for_all([self.endpoint.returned, *tied], self.config.disconnect_grace)

    async def _wait_for_flush(self) -> None:
        await wait_for_all([self.outbox.done], _MAX_FLUSH * self.config.send_timeout)

    async def run_disconnect_hooks(self) -> None:
        """Run the disconnect hooks, once, if the connect hooks have begun."""
        if self.disconnect_hooks_pending and self.close_info is not None:
            self.disconnect_hooks_pending = False
            await self._parts.on_disconnect(self.socket, self.close_info.cause)

    def expedite(self) -> None:
        """Its end takes too long: its endpoint has no grace any more."""
        if self.close_info is not None:
            self._cancel_endpoint()

    def _cancel_endpoint(self) -> None:
        if self.endpoint.cancel():
            self.emit("endpoint_cancelled", logging.DEBUG, disconnect_grace=self.config.disconnect_grace)

    def _abandon_endpoint(self) -> None:
        """The endpoint did not end when it was cancelled: say so, and let the server stop without it."""
        name = self.endpoint_name
        self.emit_throttled("endpoint_does_not_end", logging.WARNING, name, endpoint=name)
        self.server_transport.forget_task(self.endpoint.task)

    @property
    def endpoint_name(self) -> str:
        """The name of the application's function that serves this connection, as far as the framework tells it."""
        function = self.websocket.scope.get("endpoint")
        return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"

    async def yield_after_end(self) -> None:
        """Your code is told that the connection has ended. From the second time on the event loop has a turn first.

        Code that goes on is named in the log, and slowed down if it does not stop, or was cancelled.
        """
        if self.close_info is not None:
            self.websocket.client_state = WebSocketState.DISCONNECTED
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
        """Nothing more is done for this connection: let go whoever waits for its end."""
        self._mark_closed(self.close_info or local_close(DisconnectReason.SERVER_SHUTDOWN))

    def _mark_closed(self, close_info: CloseInfo) -> None:
        if self._finished.is_set:
            return
        self._finished.set()
        self._hooks_done.set()
        attempt = self.attempt
        attempt(self._parts.on_closed, self)
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None
        attempt(self._stop_reading)
        attempt(self._cancel_endpoint)
        if not self.endpoint.has_ended:
            attempt(self._abandon_endpoint)
        self.predecessors = ()
        self._pump = self.context = None  # they know this connection, and would keep it until the next collection
        if self.endpoint.tracked:  # it has ended, so nobody will read any more
            attempt(self.close_unread)
        elif self.protocol is None:
            attempt(self.inbox.stop_accounting)
        waits_for_flush = (
            close_info.rule.flush
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
        """Take back a `receive` that waits: granian sends no close frame while one does."""
        if self._pump is not None and self._pump is not asyncio.current_task():
            self._pump.cancel()

    # ── user code ──

    def spawn(self, coroutine: Any, name: str | None) -> asyncio.Task[Any]:
        """Start a task that ends with this connection, and whose failure ends it as the endpoint's would."""
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
        """End the connection by what a tied task has raised, as the application's handler says if it has one."""
        close_info: CloseInfo = close_info_for(error)
        bug = error if is_bug(error) else None
        if self._parts.close_info_by_handler is not None:
            close_info, bug = await self._parts.close_info_by_handler(self, error)
        self.close(close_info.cause, code=close_info.code, text=close_info.reason)
        if bug is not None:
            await self.report_bug("tied_task_failed", bug)
