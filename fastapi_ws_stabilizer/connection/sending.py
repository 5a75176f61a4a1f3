"""The sending half of a connection: what goes into its outbox, and what the outbox tells."""

from __future__ import annotations

import abc
import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import HeartbeatType, WebSocketConfig
from fastapi_ws_stabilizer.connection.asgi_outbox import AsgiOutbox
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.inbox import Pause
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.connection.outbox_owner import SlowConsumer
from fastapi_ws_stabilizer.connection.resources import SharedResources
from fastapi_ws_stabilizer.connection.server_transport import ServerTransport
from fastapi_ws_stabilizer.connection.v1_protocol import V1Protocol
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.servers.direct import DirectTransport
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.tasks import copied, wait_for_all
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.v1.frames import control_frame

DISCONNECT_EVENT_GRACE: Final = 0.5
"""Seconds between a refused send and taking the network for lost: the server's disconnect event, which knows more, may
be one turn of the event loop away."""

_ENQUEUED: Final = (EnqueueResult.QUEUED, EnqueueResult.BACKPRESSURE, EnqueueResult.SLOW)


class SendingHalf(abc.ABC):
    """What a connection is to those who send to it, and to its outbox."""

    __slots__ = (
        "_closing",
        "_direct",
        "_parts",
        "_sequenced_count",
        "client_id",
        "close_info",
        "config",
        "connection_id",
        "dropped_messages",
        "events",
        "liveness",
        "outbox",
        "pause",
        "protocol",
        "server_transport",
        "shard",
        "socket",
        "used",
    )

    _direct: DirectTransport | None
    _sequenced_count: int
    _closing: asyncio.Future[None] | None
    """Made when somebody waits for the end."""
    _parts: SharedResources
    client_id: str
    config: WebSocketConfig
    context: contextvars.Context | None
    """The context variables of its handshake, from the accept to its end."""
    protocol: V1Protocol | None
    """What a client of `stabilizer.v1.json` and we say to each other; `None` with a plain client."""
    connection_id: str
    dropped_messages: int
    close_info: CloseInfo | None
    socket: Any
    """What user code knows this connection by."""
    outbox: AsgiOutbox | DirectOutbox
    liveness: Liveness
    pause: Pause | None
    events: EventBus
    server_transport: ServerTransport
    shard: int
    used: bool
    """Whether a message has come in, or one without a number gone out, since that was asked."""

    @abc.abstractmethod
    def close(
        self,
        reason: DisconnectReason,
        *,
        code: int | None = None,
        text: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """End the connection from our side."""

    @abc.abstractmethod
    def on_delivered(self) -> None:
        """A message has gone out. Told only where somebody wants to know."""

    @abc.abstractmethod
    def on_nonzero(self) -> None:
        """Something is held for it, where nothing may have been before."""

    @abc.abstractmethod
    def evict(self) -> None:
        """End the connection, because room is needed for others."""

    @abc.abstractmethod
    def on_limit_exceeded(self, held: int) -> None:
        """End the connection, because more is held for it than may be."""

    @abc.abstractmethod
    def on_connection_lost(self, error: BaseException) -> None:
        """The connection broke."""

    @property
    def closing(self) -> asyncio.Future[None]:
        """A future that is done when its end has begun. Shared: wait for it with `asyncio.wait` or shield it."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
            if self.close_info is not None:
                self._closing.set_result(None)
        return self._closing

    def emit(self, event: str, level: int, **fields: Any) -> None:
        """Report something about this connection."""
        self.events.emit(event, level, client_id=self.client_id, connection_id=self.connection_id, **fields)

    def emit_throttled(self, event: str, level: int, kind: str, **fields: Any) -> bool:
        """Report something about it that its client can cause as often as it likes; as `EventBus.emit_throttled`."""
        fields |= {"client_id": self.client_id, "connection_id": self.connection_id}
        return self.events.emit_throttled(event, level, kind, **fields)

    def attempt(self, step: Callable[..., object], *args: Any, **options: Any) -> bool:
        """Take one step of the end; `False` if it raised. That is reported as a bug, and the end goes on."""
        try:
            step(*args, **options)
        except Exception as error:
            self._step_failed(error)
            return False
        return True

    async def _attempt_async(self, step: Callable[..., Awaitable[object]], *args: Any) -> None:
        """As `attempt`, for a step that waits. A cancellation goes on."""
        try:
            await step(*args)
        except Exception as error:
            self._step_failed(error)

    def _step_failed(self, error: BaseException) -> None:
        fields = {"client_id": self.client_id, "connection_id": self.connection_id}
        self.events.emit_exception("internal_task_failed", error, task="ws-end", **fields)

    def _make_outbox(self, parts: SharedResources, *, numbered: bool) -> AsgiOutbox | DirectOutbox:
        limits = parts.numbered_limits if numbered else parts.outbox_limits
        if self._direct is not None:
            return DirectOutbox(
                self,
                limits,
                parts.scheduler,
                self.shard,
                direct=self._direct,
                min_bytes=self.config.compression_min_bytes,
            )
        return AsgiOutbox(
            self,
            limits,
            parts.scheduler,
            self.shard,
            send=self.server_transport.send,
            inline=self.server_transport.is_direct,
            writers=parts.writers,
        )

    # ── sending ──

    def enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame without waiting; a full outbox does what `outbox_overflow` says."""
        return self.outbox.offer(frame) in _ENQUEUED

    def answer(self, frame: EncodedMessage) -> None:
        """Send a control frame, before what is queued."""
        self.outbox.put_control(frame)

    def request_drain(self, after: float, within: float, why: DisconnectReason) -> bool:
        """Ask the client to leave by itself, and to come back; `False` if it knows no such request, or has left.

        Args:
            after: Seconds until it is to leave.
            within: Seconds until it is closed if it has not left.
            why: The reason with which its connection ends when it leaves.
        """
        if self.protocol is None or self.close_info is not None:
            return False
        milliseconds = {"after": round(after * 1000), "within": round(within * 1000)}
        self._parts.drain_requests[self.connection_id] = why
        word = "restart" if why is DisconnectReason.SERVER_SHUTDOWN else why.value
        self.answer(control_frame("drain", **milliseconds, why=word))
        return True

    def consume_activity(self) -> bool:
        """Whether a message went in or out since this was asked last."""
        outbox, protocol = self.outbox, self.protocol
        active = self.used
        if protocol is None:
            active = active or outbox.used
        else:  # its outbox takes pings too
            count = protocol.session.head + protocol.session.accepted
            active, self._sequenced_count = active or count != self._sequenced_count, count
        self.used = outbox.used = False
        return active

    @property
    def reading_paused(self) -> bool:
        """Whether we read nothing from its client, because its inbox is full."""
        return self.pause is not None

    @property
    def session(self) -> Session | None:
        """Its session; `None` of a plain client."""
        return None if self.protocol is None else self.protocol.session

    @property
    def recipient(self) -> Any:
        """As what it is in rooms and gets messages: itself, or its session."""
        return self if self.protocol is None else self.protocol.session

    @property
    def is_attached(self) -> bool:
        """Whether there is a connection: this is one."""
        return True

    @property
    def is_direct(self) -> bool:
        """Whether we are at the server's transport, and not behind ASGI."""
        return self._direct is not None

    @property
    def pings_by_protocol(self) -> bool:
        """Whether heartbeats are pings that every such client answers by itself: ping frames, or those of v1."""
        if self.protocol is not None:
            return True
        return self._direct is not None and self.config.heartbeat_type is HeartbeatType.PING

    def ping(self, frame: EncodedMessage | None, now: float) -> bool:
        """Send a heartbeat, before what is queued; `False` if the client takes nothing anyway."""
        if self.protocol is not None:
            return self.protocol.ping(now)
        if frame is None and self._direct is not None:
            if self._direct.write_paused:
                return False
            self._direct.ping(self.liveness.pinged_by_protocol(now))
            return True
        if frame is None or not self.outbox.put_control(frame):
            return False
        self.liveness.on_ping_sent(now)
        return True

    def has_backlog(self) -> bool:
        """Whether what is to be sent is stuck, so that a ping among it cannot have been answered."""
        return self.outbox.is_stalled

    def unflushed_bytes(self) -> int | None:
        """What the transport has not yet given to the network."""
        return self.server_transport.unflushed_bytes

    def send_progress(self) -> int | None:
        """A number that has grown if the client has taken bytes since; `None` where that cannot be seen."""
        return self.server_transport.progress()

    def unsent_bytes(self) -> int | None:
        """Bytes that were written and that the client's machine has not acknowledged."""
        return self.server_transport.unsent_bytes()

    def seconds_since_received(self) -> float | None:
        """Seconds since bytes last came from the client, whole message or not; `None` where that cannot be seen."""
        return self.server_transport.seconds_since_received()

    # ── what the outbox tells ──

    def on_unsent(self, count: int) -> None:
        """Messages were given to the server and not taken."""
        self._discarded(count)

    def on_dropped(self, count: int) -> None:
        """Messages were thrown away because the client is slow."""
        self.dropped_messages += count
        self.events.counters.messages_dropped += count

    def on_coalesced(self) -> None:
        """A newer message has taken the place of one that waited."""
        self.events.counters.messages_coalesced += 1

    def on_slow(self, state: SlowConsumer) -> None:
        """The client has become slow."""
        if self.close_info is not None:
            return
        self.events.counters.slow_clients[state] += 1
        self.emit("slow_client", logging.INFO, how=state.value, queued_messages=len(self.outbox))
        self._parts.on_slow(self.socket, state)
        if state is SlowConsumer.DISCONNECTED:
            if self.protocol is None:
                self.events.counters.messages_discarded += 1  # the one that found no room
            self.close(DisconnectReason.SLOW_CONSUMER)

    def on_caught_up(self) -> None:
        """The client is slow no longer."""
        self.emit("client_caught_up", logging.INFO, dropped_messages=self.dropped_messages)

    def on_send_stalled(self) -> None:
        """A send made no progress: nothing can reach this client, not even a close frame."""
        if self.close_info is None:
            self.emit("send_stuck", logging.WARNING, send_timeout=self.config.send_timeout)
            self.close(DisconnectReason.SLOW_CONSUMER)
        self.abort()

    def on_send_delayed(self) -> None:
        """A send waits for a transport: see whether too much is held for a client that may say nothing any more.

        The transport is cut if the server is closing it, for a close waits for the same client.

        uvicorn's older WebSocket implementation says nothing of its shutdown before the transport is gone.
        """
        if self.server_transport.closing:
            self.server_transport.abort()
        else:
            self._parts.budget.check_limit(self.recipient)

    def on_send_failed(self, error: BaseException) -> None:
        """The server refused a message: give it a moment to say why, then take the network for lost."""
        why = self._why_failed(error)
        self._parts.tasks.spawn(why, name=f"ws-lost-{self.connection_id}", context=copied(self.context))

    async def _why_failed(self, error: BaseException) -> None:
        if not self.reading_paused:
            await wait_for_all([self.closing], DISCONNECT_EVENT_GRACE)
        self.on_connection_lost(error)
        self.stop_sending()

    def stop_sending(self) -> None:
        """Send nothing more, not even a close frame."""
        self._discarded(self.outbox.discard())

    def abort(self) -> None:
        """Stop sending at once and cut the transport, where the server lets us."""
        self.attempt(self.stop_sending)
        self.server_transport.abort()

    def _discarded(self, count: int) -> None:
        if count and self.protocol is None:  # what is numbered is in the log of its session
            self.events.counters.messages_discarded += count
            self.emit("messages_discarded", logging.DEBUG, count=count)
