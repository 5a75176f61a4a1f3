"""Sending half of a connection: its use of the outbox, and the outbox's callbacks."""

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
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
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
"""Seconds between a rejected send and the assumption that the network is lost. The server's disconnect event has more
detail and may arrive in the next loop iteration."""

_ENQUEUED: Final = (EnqueueResult.QUEUED, EnqueueResult.BACKPRESSURE, EnqueueResult.SLOW)


class SendingHalf(abc.ABC):
    """Part of a connection that senders and the outbox use."""

    __slots__ = (
        "_closing",
        "_direct",
        "_parts",
        "_sequenced_count",
        "client_id",
        "close_info",
        "config",
        "connection_id",
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
    """Created when code waits for the close."""
    _parts: SharedResources
    client_id: str
    config: WebSocketConfig
    context: contextvars.Context | None
    """Context variables of the handshake, from the accept to the end of teardown."""
    protocol: V1Protocol | None
    """Server side of `stabilizer.v1.json`; `None` for a plain client."""
    connection_id: str
    close_info: CloseInfo | None
    socket: Any
    """Object that represents this connection in user code."""
    outbox: AsgiOutbox | DirectOutbox
    liveness: Liveness
    pause: Pause | None
    events: EventBus
    server_transport: ServerTransport
    shard: int
    used: bool
    """Whether a message was received, or an unnumbered one sent, since the last `consume_activity`."""

    @abc.abstractmethod
    def close(
        self,
        cause: DisconnectReason,
        *,
        code: int | None = None,
        reason: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Close the connection from the server's side."""

    @abc.abstractmethod
    def on_delivered(self) -> None:
        """Handle a message accepted by the server or its transport. Called only if `reports_delivery` is set."""

    @abc.abstractmethod
    def on_nonzero(self) -> None:
        """Report that memory is held now, where possibly none was before."""

    @abc.abstractmethod
    def evict(self) -> None:
        """Close the connection because the memory limit of the server is reached."""

    @abc.abstractmethod
    def on_limit_exceeded(self, held: int) -> None:
        """Close the connection because it exceeds `max_memory_per_connection`."""

    @abc.abstractmethod
    def on_connection_lost(self, error: BaseException) -> None:
        """Start teardown after the network was lost."""

    @property
    def closing(self) -> asyncio.Future[None]:
        """Future that completes when closing starts. It is shared, so use `asyncio.wait` or `asyncio.shield`."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
            if self.close_info is not None:
                self._closing.set_result(None)
        return self._closing

    def emit(self, event: str, level: int, **fields: Any) -> None:
        """Emit an event about this connection."""
        self.events.emit(event, level, client_id=self.client_id, connection_id=self.connection_id, **fields)

    def emit_throttled(self, event: str, level: int, kind: str, **fields: Any) -> bool:
        """Emit an event that the client can cause without limit, throttled like `EventBus.emit_throttled`."""
        fields |= {"client_id": self.client_id, "connection_id": self.connection_id}
        return self.events.emit_throttled(event, level, kind, **fields)

    def attempt(self, step: Callable[..., object], *args: Any, **options: Any) -> bool:
        """Run one step of teardown. If it raises, report a bug and return `False`, so that teardown continues."""
        try:
            step(*args, **options)
        except Exception as error:
            self._step_failed(error)
            return False
        return True

    async def _attempt_async(self, step: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Run one asynchronous step of teardown like `attempt`. A cancellation propagates."""
        try:
            await step(*args)
        except Exception as error:
            self._step_failed(error)

    def _step_failed(self, error: BaseException) -> None:
        fields = {"client_id": self.client_id, "connection_id": self.connection_id}
        self.events.emit_exception("internal_task_failed", error, task="ws-end", **fields)

    # ── sending ──

    def enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame without waiting. A full outbox applies `outbox_overflow`. Return whether it was queued."""
        return self.outbox.offer(frame) in _ENQUEUED

    def answer(self, frame: EncodedMessage) -> None:
        """Send a control frame ahead of queued messages."""
        self.outbox.put_control(frame)

    def request_drain(self, after: float, within: float, why: DisconnectReason) -> bool:
        """Ask the client to disconnect and reconnect. `False` for a plain client or a closing connection.

        Args:
            after: Seconds until the client should disconnect.
            within: Seconds until the server closes the connection if the client has not left.
            why: Cause of the close when the client leaves.
        """
        if self.protocol is None or self.close_info is not None:
            return False
        milliseconds = {"after": round(after * 1000), "within": round(within * 1000)}
        self._parts.drain_requests[self.connection_id] = why
        word = "restart" if why is DisconnectReason.SERVER_SHUTDOWN else why.value
        self.answer(control_frame("drain", **milliseconds, why=word))
        return True

    def consume_activity(self) -> bool:
        """Return whether a message was received or sent since the last call."""
        outbox, protocol = self.outbox, self.protocol
        active = self.used
        if protocol is None:
            active = active or outbox.used
        else:  # its outbox contains pings too
            count = protocol.session.head + protocol.session.accepted
            active, self._sequenced_count = active or count != self._sequenced_count, count
        self.used = outbox.used = False
        return active

    @property
    def dropped_messages(self) -> int:
        """Number of messages that were dropped because the client is a slow consumer."""
        return self.outbox.dropped_messages

    @property
    def reading_paused(self) -> bool:
        """Whether reading from the client is paused because the inbox is full."""
        return self.pause is not None

    @property
    def session(self) -> Session | None:
        """Session of the client; `None` for a plain client."""
        return None if self.protocol is None else self.protocol.session

    @property
    def recipient(self) -> Any:
        """Recipient of messages and member of rooms: the session, or this connection if there is none."""
        return self if self.protocol is None else self.protocol.session

    @property
    def is_direct(self) -> bool:
        """Whether frames go to the server's transport without ASGI."""
        return self._direct is not None

    @property
    def pings_by_protocol(self) -> bool:
        """Whether heartbeats are pings that clients answer automatically: WebSocket or v1 ping frames."""
        if self.protocol is not None:
            return True
        return self._direct is not None and self.config.heartbeat_type is HeartbeatType.PING

    def ping(self, frame: EncodedMessage | None, now: float) -> bool:
        """Send a heartbeat. Return `False` if it cannot be sent now, because sends are blocked.

        A v1 ping is queued after the waiting messages. All others are sent ahead of them.
        """
        if self.protocol is not None:
            return self.protocol.ping(now)
        if frame is None and self._direct is not None:
            if self._direct.write_paused:
                return False
            self._direct.ping(self.liveness.start_ping(now))
            return True
        if frame is None or not self.outbox.put_control(frame):
            return False
        self.liveness.on_ping_queued(now)
        return True

    def has_backlog(self) -> bool:
        """Return whether sends are stalled, so that a queued ping cannot have been answered."""
        return self.outbox.is_stalled

    def unflushed_bytes(self) -> int | None:
        """Return the bytes in the transport's buffer; `None` where they cannot be measured."""
        return self.server_transport.unflushed_bytes

    def send_progress(self) -> int | None:
        """Return a number that grows when the client accepts bytes; `None` where this cannot be measured."""
        return self.server_transport.progress()

    def unsent_bytes(self) -> int | None:
        """Return the bytes that were written but not acknowledged by the client's TCP stack; `None` if unknown."""
        return self.server_transport.unsent_bytes()

    def seconds_since_received(self) -> float | None:
        """Return the seconds since bytes last arrived from the client; `None` where this cannot be measured."""
        return self.server_transport.seconds_since_received()

    # ── callbacks of the outbox ──

    def on_slow(self, state: SlowConsumer) -> None:
        """Report a slow consumer, and close its connection on `DISCONNECTED`."""
        if self.close_info is not None:
            return
        self.events.counters.slow_clients[state] += 1
        self.emit("slow_client", logging.INFO, how=state.value, queued_messages=len(self.outbox))
        self._parts.listener.on_slow(self, state)  # type: ignore[arg-type]  # every instance is a `Connection`
        if state is SlowConsumer.DISCONNECTED:
            if self.protocol is None:
                self.events.counters.messages_discarded += 1  # the message that did not fit
            self.close(DisconnectReason.SLOW_CONSUMER)

    def on_caught_up(self) -> None:
        """Report a client that is no longer a slow consumer."""
        self.emit("client_caught_up", logging.INFO, dropped_messages=self.outbox.dropped_messages)

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
        else:
            self._parts.budget.check_limit(self.recipient)

    def on_send_failed(self, error: BaseException) -> None:
        """Handle a rejected message: wait up to 0.5 s for a disconnect event, then treat the network as lost."""
        why = self._why_failed(error)
        self._parts.tasks.spawn(why, name=f"ws-lost-{self.connection_id}", context=copied(self.context))

    async def _why_failed(self, error: BaseException) -> None:
        if not self.reading_paused:
            await wait_for_all([self.closing], DISCONNECT_EVENT_GRACE)
        self.on_connection_lost(error)
        self.stop_sending()

    def stop_sending(self) -> None:
        """Stop sending, without a close frame."""
        self.on_discarded(self.outbox.discard())

    def abort(self) -> None:
        """Stop sending and abort the transport, where the server exposes it."""
        self.attempt(self.stop_sending)
        self.server_transport.abort()

    def on_discarded(self, count: int) -> None:
        """Count messages that were queued and are never sent."""
        if count and self.protocol is None:  # numbered messages are in the session's replay buffer
            self.events.counters.messages_discarded += count
            self.emit("messages_discarded", logging.DEBUG, count=count)
