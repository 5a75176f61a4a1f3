"""State machine of one connection: new, open, closing, closed.

The client, the network, the heartbeat, a stalled send, a newer connection and the endpoint can all close a connection
at the same moment. The first cause wins and sets the `CloseInfo`, which wakes all waiters at once. Then the teardown
runs.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
from asyncio import _get_running_loop as running_loop
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Final, TypeVar

from fastapi import WebSocket, WebSocketDisconnect

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, detaches, local_close
from fastapi_ws_stabilizer.compat.starlette import asgi_callables, install_asgi_shim, mark_disconnected
from fastapi_ws_stabilizer.config import CompressionMode, HeartbeatType, WebSocketConfig
from fastapi_ws_stabilizer.connection.asgi_outbox import AsgiOutbox
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.direct_reader import DirectReader
from fastapi_ws_stabilizer.connection.end_errors import yield_after_error
from fastapi_ws_stabilizer.connection.ended_connection import EndedConnection
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from fastapi_ws_stabilizer.connection.handover import Handover
from fastapi_ws_stabilizer.connection.inbox import Inbox, Item, Pause
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.connection.memory_account import MemoryAccount
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.connection.pending import PendingConnection
from fastapi_ws_stabilizer.connection.protocol import PLAIN, ClientProtocol
from fastapi_ws_stabilizer.connection.pump import read_pump
from fastapi_ws_stabilizer.connection.quota import InboundQuota
from fastapi_ws_stabilizer.connection.resources import SharedResources
from fastapi_ws_stabilizer.connection.server_transport import AsgiShim, ServerTransport
from fastapi_ws_stabilizer.connection.teardown import Teardown
from fastapi_ws_stabilizer.connection.uvicorn_reader import UvicornReader
from fastapi_ws_stabilizer.errors import NotOpenError, closed_error_for
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.limits.connections import Reservation
from fastapi_ws_stabilizer.limits.inbound import RateExceeded
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.queueing import MAX_TURNS, EnqueueResult, Recipient
from fastapi_ws_stabilizer.tasks import TaskSet, copied, start, wait_for_all
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.v1.frames import Message
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome

DISCONNECT_EVENT_GRACE: Final = 0.5
"""Seconds between a rejected send and the assumption that the network is lost. The server's disconnect event has more
detail and may arrive in the next loop iteration."""

_ENQUEUED: Final = (EnqueueResult.QUEUED, EnqueueResult.BACKPRESSURE, EnqueueResult.SLOW)

T = TypeVar("T")


class Connection:
    """One accepted WebSocket: what it is, whether it is open, and the parts that it owns.

    It replaces the server's `receive` and `send` in the `WebSocket`. Code that uses that object directly therefore goes
    through the inbox and the outbox too.

    An idle connection owns an inbox, an outbox, a liveness, an endpoint task and a server transport. The other parts
    are created when they are needed. A line about each part is in `docs/concepts/memory.md`.

    Args:
        websocket: The accepted WebSocket.
        client_id: Id of the client.
        resources: Objects shared by all connections of a node.
        control_frames: Whether text pings and pongs are answered and hidden from user code.
        endpoint: Task that serves the connection.
        protocol: Protocol of the client.
        connection_id: Unique id; a new one if omitted.

    Attributes:
        connection_id: Unique id of the connection.
        close_info: Close info; `None` until the connection starts to close.
        opened: Whether `open` was called. The connection may be closed by now.
        opened_at: Time of its creation, on the monotonic clock.
        socket: Object that represents the connection in user code.
        context: Context variables of the handshake, from the accept to the end of teardown.
        inbox: Received messages that user code has not read.
        outbox: Messages that wait to be sent.
        liveness: Ping and pong state.
        server_transport: The server's transport.
        shard: Its shard, for work that is done shard by shard.
        pause: State of the pause of reading; `None` while the server reads.
        pause_reported: Whether a pause was reported.
        handover: Older connections that this one waits for; `None` if it waits for none.
        credential: Expiry of the client's credential; `None` without one.
        reservation: Connection slot; `None` before the handshake is confirmed.
        outcome: Resume outcome: how much of its state the client got back.
        used: Whether a message was received, or an unnumbered one sent, since the reaper's last check.
        bad_messages: Number of invalid messages.
        connect_hooks_started: Whether the connect or resume hooks have started.
        disconnect_hooks_pending: Whether the disconnect hooks have to run.
        inherited_state: Whether it took over the state of an earlier plain connection.
        session_end_reported: Whether the end of its session was reported, or is not its own.
    """

    __slots__ = (
        "_account",
        "_closing",
        "_pump",
        "_quota",
        "_reader",
        "_shim",
        "_tasks",
        "_teardown",
        "bad_messages",
        "client_id",
        "close_info",
        "connect_hooks_started",
        "connection_id",
        "context",
        "control_frames",
        "credential",
        "disconnect_hooks_pending",
        "endpoint",
        "handover",
        "inbox",
        "inherited_state",
        "liveness",
        "opened",
        "opened_at",
        "outbox",
        "outcome",
        "pause",
        "pause_reported",
        "protocol",
        "reservation",
        "resources",
        "server_transport",
        "session_end_reported",
        "shard",
        "socket",
        "used",
        "websocket",
    )

    def __init__(
        self,
        websocket: WebSocket,
        client_id: str,
        resources: SharedResources,
        *,
        control_frames: bool,
        endpoint: EndpointTask,
        protocol: ClientProtocol = PLAIN,
        connection_id: str | None = None,
    ) -> None:
        self.connection_id = connection_id or os.urandom(8).hex()
        self.client_id = client_id
        self.websocket = websocket
        self.resources = resources
        self.control_frames = control_frames
        self.endpoint = endpoint
        self.protocol = protocol
        self.opened = False
        self.opened_at = monotonic()
        self.close_info: CloseInfo | None = None
        self.socket: Any = None
        self.context: contextvars.Context | None = None
        self.liveness = Liveness(self.opened_at, resources.round_trips)
        self.inbox = Inbox(resources.inbox_limits)
        self.server_transport = ServerTransport(*asgi_callables(websocket))
        self.shard = resources.next_shard()
        self.outbox = self._create_outbox()
        self.used = False
        self.pause: Pause | None = None
        self.pause_reported = False
        self.bad_messages = 0
        self.credential: CredentialExpiry | None = None
        self.reservation: Reservation | None = None
        self.handover: Handover | None = None
        self.outcome = ResumeOutcome.NONE
        self.connect_hooks_started = False
        self.disconnect_hooks_pending = False
        self.inherited_state = False
        self.session_end_reported = False
        self._pump: asyncio.Task[None] | None = None
        self._reader: UvicornReader | None = None
        self._shim: AsgiShim | None = None
        self._tasks: TaskSet | None = None
        self._closing: asyncio.Future[None] | None = None
        self._teardown: Teardown | None = None
        self._quota: InboundQuota | None = None
        self._account: MemoryAccount | None = None

    def _create_outbox(self) -> AsgiOutbox | DirectOutbox:
        resources, transport = self.resources, self.server_transport
        limits = resources.numbered_limits if self.protocol.acknowledges else resources.outbox_limits
        direct = transport.direct_transport(self.websocket.scope)
        if direct is not None:
            min_bytes = resources.config.compression_min_bytes
            return DirectOutbox(self, limits, resources.scheduler, self.shard, direct=direct, min_bytes=min_bytes)
        return AsgiOutbox(
            self,
            limits,
            resources.scheduler,
            self.shard,
            send=transport.send,
            inline=transport.is_direct,
            writers=resources.writers,
        )

    @property
    def config(self) -> WebSocketConfig:
        """Options of the manager."""
        return self.resources.config

    @property
    def events(self) -> EventBus:
        """Event bus of the manager."""
        return self.resources.events

    @property
    def budget(self) -> MemoryBudget:
        """Memory budget of the node."""
        return self.resources.budget

    # ── open ──

    def open(self) -> None:
        """Start reading. After this call every path sets one `CloseInfo` and completes `closed`."""
        websocket = self.websocket
        receive, _ = asgi_callables(websocket)
        self._shim = AsgiShim(self)
        install_asgi_shim(websocket, self._shim.receive, self._shim.send)
        self.opened = True
        self.context = contextvars.copy_context()
        outbox, config, events = self.outbox, self.resources.config, self.resources.events
        self.endpoint.watch(websocket.scope)
        self.server_transport.limit_buffers(config.unsent_low_water_bytes, config.write_buffer_high_water_bytes)
        outbox.open()
        self.protocol.on_open(self)
        events.counters.connections_opened += 1
        self.emit("connection_opened", logging.INFO)
        if isinstance(outbox, DirectOutbox):
            sends_pings = config.heartbeat_type is HeartbeatType.PING
            outbox.direct.attach(
                DirectReader(self, outbox.direct, outbox),
                max_message_bytes=config.max_message_size,
                own_pings=sends_pings,
            )
            outbox.on_attached(
                compress=config.compression is CompressionMode.DEFLATE,
                bounds_unread=sends_pings and config.require_pong is not False,
            )
        elif (protocol := self.server_transport.pushing_protocol) is not None:
            self._reader = UvicornReader(self, protocol)
        else:
            # All pumps share one name, because a name for each would cost memory for every idle connection.
            self._pump = start(read_pump(self, receive), name="ws-pump", context=self.context)
        outbox.flush()  # sends the welcome, since the endpoint may begin with a long computation

    def belongs_to(self, resources: SharedResources) -> bool:
        """Whether this connection was opened with these resources and not by another manager."""
        return self.resources is resources

    # ── events ──

    def emit(self, event: str, level: int, **fields: Any) -> None:
        """Emit an event about this connection."""
        self.resources.events.emit(event, level, client_id=self.client_id, connection_id=self.connection_id, **fields)

    def emit_throttled(self, event: str, level: int, kind: str, **fields: Any) -> bool:
        """Emit an event that the client can cause without limit, throttled like `EventBus.emit_throttled`."""
        fields |= {"client_id": self.client_id, "connection_id": self.connection_id}
        return self.events.emit_throttled(event, level, kind, **fields)

    async def report_bug(self, event: str, error: BaseException) -> None:
        """Report a bug in user code once and run the error hooks, with the time limit of disconnect hooks."""
        self.events.emit_exception(event, error, client_id=self.client_id, connection_id=self.connection_id)
        await self.resources.listener.on_error(self, error)

    def attempt(self, step: Callable[..., object], *args: Any, **options: Any) -> bool:
        """Run one step of teardown. If it raises, report a bug and return `False`, so that teardown continues."""
        try:
            step(*args, **options)
        except Exception as error:
            self.report_failed_step(error)
            return False
        return True

    def report_failed_step(self, error: BaseException) -> None:
        """Report an error in one step of teardown, which is a bug of this package."""
        fields = {"client_id": self.client_id, "connection_id": self.connection_id}
        self.events.emit_exception("internal_task_failed", error, task="ws-end", **fields)

    # ── checks ──

    def check_loop(self) -> None:
        """Check that this is the event loop of the connection.

        Raises:
            WrongLoopError: This is another event loop.
        """
        self.resources.scheduler.check_loop()

    def check_opened(self) -> None:
        """Check that the connection was opened. It may be closed by now.

        Raises:
            NotOpenError: The handshake has not been accepted yet.
        """
        if not self.opened:
            raise NotOpenError

    def check_open(self) -> Connection:
        """Check that the connection is open and that this is its event loop, and return it.

        Raises:
            SocketClosed: The connection is closed.
            NotOpenError: The handshake has not been accepted yet.
            WrongLoopError: This is another event loop.
        """
        self.check_loop()
        if not self.opened or self.close_info is not None:
            raise self._error()
        return self

    async def still_open(self) -> Connection:
        """Check like `check_open`, but yield before raising, so that a loop that catches all errors lets others run.

        Raises:
            SocketClosed: The connection is closed.
            NotOpenError: The handshake has not been accepted yet.
            WrongLoopError: This is not the event loop of the connection.
        """
        self.check_loop()
        if not self.opened or self.close_info is not None:
            raise await self.closed_error()
        return self

    async def closed_error(self) -> Exception:
        """Return the error for code that uses a closed connection. Cancelling is safe.

        After a loss nothing is sent any more, but the close waits for its turn if many connections are lost at once.
        """
        if self.opened and self.close_info is None:
            await self.wait_closing()
        await self.yield_after_end()
        return self._error()

    def _error(self) -> Exception:
        return NotOpenError() if self.close_info is None else closed_error_for(self.close_info)

    async def yield_after_end(self) -> None:
        """Count an error for a closed connection, and yield to the event loop from the second one on."""
        if self.close_info is not None:
            mark_disconnected(self.websocket)
        await yield_after_error(self, self.endpoint, self.endpoint_name)

    # ── receiving ──

    @property
    def quota(self) -> InboundQuota:
        """Limits on what the client sends, created at the first use."""
        if self._quota is None:
            self._quota = InboundQuota()
        return self._quota

    def admit_message(self, raw: str | bytes, message: Message | None = None) -> bool:
        """Return whether the client may send a message now. If not, send an error frame or close the connection."""
        return not self.resources.traffic.limited or self.quota.admit(self, raw, message)

    def on_rate_exceeded(self, excess: RateExceeded, message: Message | None) -> None:
        """Reject a message that exceeds the rate of its type."""
        self.quota.on_exceeded(self, excess, message)

    def on_control_frame(self, count: int = 1) -> None:
        """Count unsolicited control frames of the client. Too many close the connection."""
        self.quota.on_control_frames(self, count)

    def on_message(self) -> None:
        """Report a received message to the memory budget. Called only if `watches_input` is set."""
        self.budget.on_inbound(self.recipient.account)

    def read_raw(self, item: Item) -> str | bytes:
        """Return the raw message, for code that does not use `stabilizer.v1.json`."""
        if not isinstance(item, Message):
            return item
        self.protocol.on_raw_read(item)
        return item.raw

    # ── sending ──

    def try_send(self, frame: EncodedMessage) -> bool:
        """Send a message of user code on the fast path. `False`, with nothing queued, if the slow path must decide.

        Hot path.

        Raises:
            WrongLoopError: This is not the event loop of the connection.
        """
        if running_loop() is not self.resources.loop:
            self.check_loop()
        if self.pause is not None:
            self.pause.sent = True
        return self.protocol.try_send(self, frame)

    async def send(self, frame: EncodedMessage) -> None:
        """Send a frame after the queued ones, and wait while the outbox is full.

        This yields to the event loop if user code has held it for long, or if the network has not accepted all frames.
        Cancelling discards the frame, unless it has just been queued or has replaced that of another sender.

        Raises:
            SocketClosed: The connection is closed.
            WrongLoopError: This is not the event loop of the connection.
        """
        if not self.try_send(frame):
            if not await self.protocol.put_wait(self, frame):
                raise await self.closed_error()
            if self.pause is not None:
                self.pause.sent = True
            self.outbox.flush()
        if self.should_yield():
            await self.yield_for_send()

    def should_yield(self) -> bool:
        """Return whether to yield to the event loop, to flush what was just sent or to let others run. Hot path."""
        outbox = self.outbox
        return (outbox._due and outbox.has_sendable_frames()) or self.resources.scheduler.exceeded()

    async def yield_for_send(self) -> None:
        """Yield to the event loop, repeatedly while sent messages still wait, but once only for a slow consumer."""
        for number in range(MAX_TURNS):
            # Some servers finish a send in another thread, which needs time and not only turns of the event loop.
            await asyncio.sleep(0 if number < MAX_TURNS // 2 else 0.001)
            if not self.outbox.has_sendable_frames():
                break

    async def send_with_ack(self, frame: EncodedMessage) -> None:
        """Queue a message and wait until the client acknowledges it. See `ClientProtocol.send_with_ack`."""
        await self.protocol.send_with_ack(self, frame)

    async def request(self, event: str, data: Any, timeout: float) -> Any:
        """Send a request to the client and wait for its reply. See `ClientProtocol.request`."""
        return await self.protocol.request(self, event, data, timeout)

    def enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame without waiting. A full outbox applies `outbox_overflow`. Return whether it was queued."""
        return self.outbox.offer(frame) in _ENQUEUED

    def answer(self, frame: EncodedMessage) -> None:
        """Send a control frame ahead of queued messages."""
        self.outbox.put_control(frame)

    async def wait_sent(self) -> None:
        """Wait until the close frame is sent, or nothing more can be sent. Cancelling is safe."""
        await asyncio.wait({self.outbox.done})

    @property
    def queued_messages(self) -> int:
        """Number of messages waiting to be sent."""
        return len(self.outbox)

    @property
    def queued_bytes(self) -> int:
        """Bytes waiting to be sent."""
        return self.outbox.held_bytes

    @property
    def dropped_messages(self) -> int:
        """Number of messages that were dropped because the client is a slow consumer."""
        return self.outbox.dropped_messages

    @property
    def is_direct(self) -> bool:
        """Whether frames go to the server's transport without ASGI."""
        return isinstance(self.outbox, DirectOutbox)

    # ── recipient ──

    @property
    def recipient(self) -> Recipient:
        """Recipient of messages and member of rooms: the session, or this connection if there is none."""
        session = self.protocol.session
        return self if session is None else session

    @property
    def recipient_id(self) -> str:
        """Id used in rooms."""
        return self.recipient.connection_id

    def request_drain(self, after: float, within: float, why: DisconnectReason) -> bool:
        """Ask the client to disconnect and reconnect. `False` for a plain client or a closing connection.

        Args:
            after: Seconds until the client should disconnect.
            within: Seconds until the server closes the connection if the client has not left.
            why: Cause of the close when the client leaves.
        """
        if self.close_info is not None or not self.protocol.request_drain(self, after, within, why):
            return False
        self.resources.drain_requests[self.connection_id] = why
        return True

    # ── memory ──

    @property
    def account(self) -> MemoryAccount:
        """Account in the memory budget, created at the first use."""
        if self._account is None:
            self._account = MemoryAccount(self)
        return self._account

    @property
    def memory_usage(self) -> int:
        """Bytes of memory held for the connection or its session."""
        session = self.protocol.session
        return self.own_memory if session is None else session.account.memory_usage

    @property
    def own_memory(self) -> int:
        """Bytes of memory held for the connection alone."""
        described = self.budget.described.get(self.connection_id, 0)
        return self.outbox.counted_bytes + self.inbox.counted_bytes + int(self.socket._user_data_bytes) + described

    def on_nonzero(self) -> None:
        """Report that memory is held now, where possibly none was before."""
        if self.budget.evicts:
            self.budget.on_nonzero(self.account if self.close_info is not None else self.recipient.account)

    def on_limit_exceeded(self, held: int) -> None:
        """Close the connection because it exceeds `max_memory_per_connection`."""
        limit = self.config.max_memory_per_connection
        if self.opened and self.close(DisconnectReason.MEMORY, reason=f"memory limit of {limit} bytes exceeded"):
            self.emit("memory_limit_exceeded", logging.WARNING, held_bytes=held, max_memory_per_connection=limit)

    # ── callbacks of the outbox ──

    def on_delivered(self) -> None:
        """Report a delivered message to the memory budget. Called only if it counts output."""
        self.budget.on_delivered(self.recipient.account)

    def on_slow(self, state: SlowConsumer) -> None:
        """Report a slow consumer, and close its connection on `DISCONNECTED`."""
        if self.close_info is not None:
            return
        self.events.counters.slow_clients[state] += 1
        self.emit("slow_client", logging.INFO, how=state.value, queued_messages=len(self.outbox))
        self.resources.listener.on_slow(self, state)
        if state is SlowConsumer.DISCONNECTED:
            if not self.protocol.acknowledges:
                self.events.counters.messages_discarded += 1  # the message that did not fit
            self.close(DisconnectReason.SLOW_CONSUMER)

    def on_caught_up(self) -> None:
        """Report a client that is no longer a slow consumer."""
        self.emit("client_caught_up", logging.INFO, dropped_messages=self.outbox.dropped_messages)

    def on_discarded(self, count: int) -> None:
        """Count messages that were queued and are never sent. A replay buffer still has those of a session."""
        if count and not self.protocol.acknowledges:
            self.events.counters.messages_discarded += count
            self.emit("messages_discarded", logging.DEBUG, count=count)

    def on_send_stalled(self) -> None:
        """Close and abort after a send made no progress, since not even a close frame can reach the client."""
        if self.close_info is None:
            self.emit("send_stuck", logging.WARNING, send_timeout=self.config.send_timeout)
            self.close(DisconnectReason.SLOW_CONSUMER)
        self.abort()

    def on_send_delayed(self) -> None:
        """Check the memory limit of a client that may be silent while a send waits for its transport.

        If the server is closing the transport, it is aborted instead, because the close waits for the same client.

        uvicorn's older WebSocket implementation does not report its shutdown before the transport is closed.
        """
        if self.server_transport.closing:
            self.server_transport.abort()
        elif self.budget.max_each is not None:
            self.budget.check_limit(self.recipient.account)

    def on_send_failed(self, error: BaseException) -> None:
        """Handle a rejected message: wait up to 0.5 s for a disconnect event, then treat the network as lost."""
        why = self._why_failed(error)
        self.resources.tasks.spawn(why, name=f"ws-lost-{self.connection_id}", context=copied(self.context))

    async def _why_failed(self, error: BaseException) -> None:
        if self.pause is None:
            await wait_for_all([self.closing], DISCONNECT_EVENT_GRACE)
        self.on_connection_lost(error)
        self.stop_sending()

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
        """Start teardown after the client, the network or the ASGI server has closed the connection."""
        self._start_closing(close_info)

    def on_connection_lost(self, error: BaseException) -> None:
        """Start teardown after the network was lost."""
        if self._start_closing(CloseInfo(DisconnectReason.NETWORK_LOST, 1006, by_peer=True)):
            self.emit("connection_lost", logging.DEBUG, cause=repr(error))

    def _start_closing(self, close_info: CloseInfo) -> bool:
        if self.close_info is not None:
            return False
        close_info = self.protocol.map_close(close_info)
        drain_cause = self.resources.drain_requests.pop(self.connection_id, None)
        if drain_cause is not None and detaches(close_info):  # the client left as asked
            close_info = replace(close_info, cause=drain_cause)
        self.close_info = close_info
        self.attempt(self.resources.listener.on_closing, self)
        self.events.counters.endings[close_info.cause] += 1
        self.teardown.start(close_info)
        return True

    @property
    def closing(self) -> asyncio.Future[None]:
        """Future that completes when closing starts. It is shared, so use `asyncio.wait` or `asyncio.shield`."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
            if self.close_info is not None:
                self._closing.set_result(None)
        return self._closing

    def mark_closing(self) -> None:
        """Complete `closing`."""
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)

    async def wait_closing(self) -> CloseInfo:
        """Wait until the connection starts to close, and return its `CloseInfo`. Cancelling is safe."""
        if self.close_info is not None:
            await self.yield_after_end()
        while self.close_info is None:
            await asyncio.shield(self.closing)
        return self.close_info

    @property
    def teardown(self) -> Teardown:
        """The teardown, created at the start of the close or when code waits for it."""
        if self._teardown is None:
            self._teardown = Teardown(self)
        return self._teardown

    @property
    def closed(self) -> asyncio.Future[None]:
        """Future that completes at the end of teardown."""
        return self.teardown.closed.future

    @property
    def is_closed(self) -> bool:
        """Whether teardown has ended."""
        return self._teardown is not None and self._teardown.closed.is_set

    @property
    def hooks_done(self) -> bool:
        """Whether the disconnect hooks have run, or were not needed."""
        return self._teardown is not None and self._teardown.hooks_done.is_set

    @property
    def waits_for_user_code(self) -> bool:
        """Whether teardown waits for the endpoint, a handler, a connect hook or the disconnect hooks."""
        if self.is_closed:
            return False
        in_hooks = self.close_info is not None and not self.disconnect_hooks_pending and not self.hooks_done
        return in_hooks or self.endpoint.is_running

    def expedite(self) -> None:
        """Cancel the endpoint of a closing connection without waiting for the rest of its grace."""
        if self.close_info is not None:
            self.teardown.cancel_endpoint()

    def force_finish(self) -> None:
        """Finish without the rest of teardown and release all waiters."""
        self.teardown.finish()

    def release(self) -> None:
        """Drop all references that form a cycle, so that reference counting frees the connection.

        Called when the teardown has ended and no code of the endpoint runs. The socket and the `WebSocket` get the
        facts about the connection instead, because user code may hold them.
        """
        ended = EndedConnection(self)
        if self._shim is not None:
            self._shim.release(ended)
        for part in (self.outbox, self.protocol, self.teardown):
            self.attempt(part.release)
        self._tasks = self._account = self._pump = self._reader = self.context = None
        self.attempt(self.resources.listener.on_ended, self, ended)

    def stop_reader(self) -> None:
        """Ignore all further events of the server."""
        if self._reader is not None:
            self._reader.stop()

    def stop_sending(self) -> None:
        """Stop sending, without a close frame."""
        self.on_discarded(self.outbox.discard())

    def abort(self) -> None:
        """Stop sending and abort the transport, where the server exposes it."""
        self.attempt(self.stop_sending)
        self.server_transport.abort()

    def stop_reading(self) -> None:
        """Cancel a pending `receive`, because granian sends no close frame while one is pending."""
        if self._pump is not None and self._pump is not asyncio.current_task():
            self._pump.cancel()

    def close_unread(self) -> None:
        """Close the inbox and discard unread messages."""
        self.close_inbox(discard=True)

    def close_inbox(self, *, discard: bool) -> None:
        """Accept no more messages. Unread messages of a session that has not ended stay for its next connection."""
        discard = discard and not self.protocol.keeps_unread
        for item in self.inbox.unread() if discard and self.protocol.acknowledges else ():
            self.attempt(self.protocol.on_failed, item)
        discarded = self.inbox.close(discard=discard)
        self.events.counters.messages_discarded += discarded
        if discarded:
            self.emit("messages_discarded", logging.DEBUG, count=discarded)

    # ── earlier connections ──

    def add_predecessor(self, previous: Connection) -> None:
        """Wait for an older connection, whose state this one takes over, before hooks and handlers run here."""
        if self.handover is None:
            self.handover = Handover()
        self.handover.add(previous)

    def wait_for_hooks_of(self, closing: list[Connection]) -> None:
        """Let hooks wait for the disconnect hooks of closing connections of the same client.

        A connection without started connect hooks has no disconnect hooks, so it is not added.
        """
        more = [one for one in closing if one.connect_hooks_started and not one.hooks_done]
        if more:
            if self.handover is None:
                self.handover = Handover()
            self.handover.add_all(more)

    async def wait_for_predecessors(self) -> None:
        """Wait until all earlier connections have released their state. Cancelling is safe."""
        if self.handover is not None:
            await self.handover.wait()
            self.handover = None

    async def wait_for_hooks(self) -> None:
        """Wait until the disconnect hooks have run. Each has a time limit. Cancelling is safe."""
        await wait_for_all([self.teardown.hooks_done.future], None)

    async def run_disconnect_hooks(self) -> None:
        """Run the disconnect hooks once, if the connect hooks have started."""
        if self.disconnect_hooks_pending and self.close_info is not None:
            self.disconnect_hooks_pending = False
            await self.resources.listener.on_disconnect(self)

    # ── user code ──

    @property
    def endpoint_name(self) -> str:
        """Qualified name of the endpoint function, with `?` for parts that the scope does not contain."""
        function = self.websocket.scope.get("endpoint")
        return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str | None) -> asyncio.Task[T]:
        """Start a task tied to this connection. Its failure closes the connection as the endpoint's would."""
        try:
            self.check_open()
        except Exception:
            coroutine.close()
            raise
        if self._tasks is None:
            self._tasks = TaskSet(self._task_failed)
        return self._tasks.spawn(coroutine, name=name or f"ws-task-{self.connection_id}")

    def cancel_tasks(self) -> list[asyncio.Task[Any]]:
        """Cancel the tied tasks, and return them."""
        return [] if self._tasks is None else self._tasks.cancel()

    def _task_failed(self, _: asyncio.Task[Any], error: BaseException) -> None:
        if isinstance(error, WebSocketDisconnect):
            return
        closing = self._close_by_error(error)
        self.resources.tasks.spawn(closing, name=f"ws-error-{self.connection_id}", context=copied(self.context))

    async def _close_by_error(self, error: BaseException) -> None:
        """Close the connection for an error of a tied task, as the application's exception handler says."""
        close_info, bug = await self.resources.listener.close_info_by_handler(self, error)
        self.close(close_info.cause, code=close_info.code, reason=close_info.reason)
        if bug is not None:
            await self.report_bug("tied_task_failed", bug)


AnyConnection = PendingConnection | Connection | EndedConnection
"""Connection of a socket: a stand-in until the handshake is accepted, and the facts about it after its end."""
