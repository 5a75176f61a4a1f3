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
from fastapi_ws_stabilizer.connection.conversation import V1Protocol
from fastapi_ws_stabilizer.connection.inbox import Pause
from fastapi_ws_stabilizer.connection.link_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.outbox_owner import SlowConsumer
from fastapi_ws_stabilizer.connection.parts import SharedResources
from fastapi_ws_stabilizer.connection.server_side import ServerTransport
from fastapi_ws_stabilizer.hub.member import EnqueueResult
from fastapi_ws_stabilizer.hub.pulse import Liveness
from fastapi_ws_stabilizer.reports import EventBus
from fastapi_ws_stabilizer.servers.link import DirectTransport
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.tasks import copied, wait_for_all
from fastapi_ws_stabilizer.wire.payload import EncodedMessage
from fastapi_ws_stabilizer.wire.v1 import control_frame

DISCONNECT_EVENT_GRACE: Final = 0.5
"""Seconds between a refused send and taking the network for lost: the server's disconnect event, which knows more, may
be one turn of the event loop away."""

_TAKEN: Final = (EnqueueResult.QUEUED, EnqueueResult.PRESSED, EnqueueResult.SLOW)


class SendingHalf(abc.ABC):
    """What a connection is to those who send to it, and to its outbox."""

    __slots__ = (
        "_link",
        "_numbers",
        "_over",
        "_parts",
        "client_id",
        "config",
        "connection_id",
        "conversation",
        "dropped_messages",
        "ending",
        "face",
        "outbox",
        "pause",
        "pulse",
        "reports",
        "server_side",
        "shard",
        "used",
    )

    _link: DirectTransport | None
    _numbers: int
    _over: asyncio.Future[None] | None
    """Made when somebody waits for the end."""
    _parts: SharedResources
    client_id: str
    config: WebSocketConfig
    context: contextvars.Context | None
    """The context variables of its handshake, from the accept to its end."""
    conversation: V1Protocol | None
    """What a client of `stabilizer.v1.json` and we say to each other; `None` with a plain client."""
    connection_id: str
    dropped_messages: int
    ending: CloseInfo | None
    face: Any
    """What user code knows this connection by."""
    outbox: AsgiOutbox | DirectOutbox
    pulse: Liveness
    pause: Pause | None
    reports: EventBus
    server_side: ServerTransport
    shard: int
    used: bool
    """Whether a message has come in, or one without a number gone out, since that was asked."""

    @abc.abstractmethod
    def end(
        self,
        reason: DisconnectReason,
        *,
        code: int | None = None,
        text: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """End the connection from our side."""

    @abc.abstractmethod
    def delivered(self) -> None:
        """A message has gone out. Told only where somebody wants to know."""

    @abc.abstractmethod
    def holds(self) -> None:
        """Something is held for it, where nothing may have been before."""

    @abc.abstractmethod
    def evict(self) -> None:
        """End the connection, because room is needed for others."""

    @abc.abstractmethod
    def holds_too_much(self, held: int) -> None:
        """End the connection, because more is held for it than may be."""

    @abc.abstractmethod
    def lost(self, error: BaseException) -> None:
        """The connection broke."""

    @property
    def over(self) -> asyncio.Future[None]:
        """A future that is done when its end has begun. Shared: wait for it with `asyncio.wait` or shield it."""
        if self._over is None:
            self._over = asyncio.get_running_loop().create_future()
            if self.ending is not None:
                self._over.set_result(None)
        return self._over

    def tell(self, event: str, level: int, **facts: Any) -> None:
        """Report something about this connection."""
        self.reports.tell(event, level, client_id=self.client_id, connection_id=self.connection_id, **facts)

    def tell_now_and_then(self, event: str, level: int, kind: str, **facts: Any) -> bool:
        """Report something about it that its client can cause as often as it likes; as `EventBus.tell_now_and_then`."""
        facts |= {"client_id": self.client_id, "connection_id": self.connection_id}
        return self.reports.tell_now_and_then(event, level, kind, **facts)

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
        facts = {"client_id": self.client_id, "connection_id": self.connection_id}
        self.reports.bug("internal_task_failed", error, task="ws-end", **facts)

    def _make_outbox(self, parts: SharedResources, *, numbered: bool) -> AsgiOutbox | DirectOutbox:
        limits = parts.numbered_limits if numbered else parts.outbox_limits
        if self._link is not None:
            return DirectOutbox(
                self,
                limits,
                parts.turns,
                self.shard,
                link=self._link,
                min_bytes=self.config.compression_min_bytes,
            )
        return AsgiOutbox(
            self,
            limits,
            parts.turns,
            self.shard,
            send=self.server_side.send,
            by_hand=self.server_side.is_direct,
            writers=parts.writers,
        )

    # ── sending ──

    def enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame without waiting; a full outbox does what `outbox_overflow` says."""
        return self.outbox.offer(frame) in _TAKEN

    def answer(self, frame: EncodedMessage) -> None:
        """Send a control frame, before what is queued."""
        self.outbox.put_urgent(frame)

    def ask_to_leave(self, after: float, within: float, why: DisconnectReason) -> bool:
        """Ask the client to leave by itself, and to come back; `False` if it knows no such request, or has left.

        Args:
            after: Seconds until it is to leave.
            within: Seconds until it is closed if it has not left.
            why: The reason with which its connection ends when it leaves.
        """
        if self.conversation is None or self.ending is not None:
            return False
        milliseconds = {"after": round(after * 1000), "within": round(within * 1000)}
        self._parts.asked_to_leave[self.connection_id] = why
        word = "restart" if why is DisconnectReason.SERVER_SHUTDOWN else why.value
        self.answer(control_frame("drain", **milliseconds, why=word))
        return True

    def was_used(self) -> bool:
        """Whether a message went in or out since this was asked last."""
        outbox, conversation = self.outbox, self.conversation
        used = self.used
        if conversation is None:
            used = used or outbox.used
        else:  # its outbox takes pings too
            count = conversation.session.head + conversation.session.accepted
            used, self._numbers = used or count != self._numbers, count
        self.used = outbox.used = False
        return used

    @property
    def reading_paused(self) -> bool:
        """Whether we read nothing from its client, because its inbox is full."""
        return self.pause is not None

    @property
    def session(self) -> Session | None:
        """Its session; `None` of a plain client."""
        return None if self.conversation is None else self.conversation.session

    @property
    def member(self) -> Any:
        """As what it is in rooms and gets messages: itself, or its session."""
        return self if self.conversation is None else self.conversation.session

    @property
    def here(self) -> bool:
        """Whether there is a connection: this is one."""
        return True

    @property
    def is_linked(self) -> bool:
        """Whether we are at the server's transport, and not behind ASGI."""
        return self._link is not None

    @property
    def pings_by_protocol(self) -> bool:
        """Whether heartbeats are pings that every such client answers by itself: ping frames, or those of v1."""
        if self.conversation is not None:
            return True
        return self._link is not None and self.config.heartbeat_type is HeartbeatType.PING

    def ping(self, frame: EncodedMessage | None, now: float) -> bool:
        """Send a heartbeat, before what is queued; `False` if the client takes nothing anyway."""
        if self.conversation is not None:
            return self.conversation.ping(now)
        if frame is None and self._link is not None:
            if self._link.write_paused:
                return False
            self._link.ping(self.pulse.pinged_by_protocol(now))
            return True
        if frame is None or not self.outbox.put_urgent(frame):
            return False
        self.pulse.pinged(now)
        return True

    def has_backlog(self) -> bool:
        """Whether what is to be sent is stuck, so that a ping among it cannot have been answered."""
        return self.outbox.stuck

    def unflushed_bytes(self) -> int | None:
        """What the transport has not yet given to the network."""
        return self.server_side.unflushed_bytes

    def send_progress(self) -> int | None:
        """A number that has grown if the client has taken bytes since; `None` where that cannot be seen."""
        return self.server_side.progress()

    def unsent_bytes(self) -> int | None:
        """Bytes that were written and that the client's machine has not acknowledged."""
        return self.server_side.unsent_bytes()

    def seconds_since_received(self) -> float | None:
        """Seconds since bytes last came from the client, whole message or not; `None` where that cannot be seen."""
        return self.server_side.seconds_since_received()

    # ── what the outbox tells ──

    def unsent(self, count: int) -> None:
        """Messages were given to the server and not taken."""
        self._discarded(count)

    def dropped(self, count: int) -> None:
        """Messages were thrown away because the client is slow."""
        self.dropped_messages += count
        self.reports.totals.messages_dropped += count

    def coalesced(self) -> None:
        """A newer message has taken the place of one that waited."""
        self.reports.totals.messages_coalesced += 1

    def slow(self, how: SlowConsumer) -> None:
        """The client has become slow."""
        if self.ending is not None:
            return
        self.reports.totals.slow_clients[how] += 1
        self.tell("slow_client", logging.INFO, how=how.value, queued_messages=len(self.outbox))
        self._parts.slow(self.face, how)
        if how is SlowConsumer.DISCONNECTED:
            if self.conversation is None:
                self.reports.totals.messages_discarded += 1  # the one that found no room
            self.end(DisconnectReason.SLOW_CONSUMER)

    def caught_up(self) -> None:
        """The client is slow no longer."""
        self.tell("client_caught_up", logging.INFO, dropped_messages=self.dropped_messages)

    def send_stuck(self) -> None:
        """A send made no progress: nothing can reach this client, not even a close frame."""
        if self.ending is None:
            self.tell("send_stuck", logging.WARNING, send_timeout=self.config.send_timeout)
            self.end(DisconnectReason.SLOW_CONSUMER)
        self.abort()

    def send_waits(self) -> None:
        """A send waits for a transport: see whether too much is held for a client that may say nothing any more.

        The transport is cut if the server is closing it, for a close waits for the same client.

        uvicorn's older WebSocket implementation says nothing of its shutdown before the transport is gone.
        """
        if self.server_side.closing:
            self.server_side.abort()
        else:
            self._parts.ledger.look_at(self.member)

    def send_failed(self, error: BaseException) -> None:
        """The server refused a message: give it a moment to say why, then take the network for lost."""
        why = self._why_failed(error)
        self._parts.tasks.spawn(why, name=f"ws-lost-{self.connection_id}", context=copied(self.context))

    async def _why_failed(self, error: BaseException) -> None:
        if not self.reading_paused:
            await wait_for_all([self.over], DISCONNECT_EVENT_GRACE)
        self.lost(error)
        self.stop_sending()

    def stop_sending(self) -> None:
        """Send nothing more, not even a close frame."""
        self._discarded(self.outbox.discard())

    def abort(self) -> None:
        """Stop sending at once and cut the transport, where the server lets us."""
        self.attempt(self.stop_sending)
        self.server_side.abort()

    def _discarded(self, count: int) -> None:
        if count and self.conversation is None:  # what is numbered is in the log of its session
            self.reports.totals.messages_discarded += count
            self.tell("messages_discarded", logging.DEBUG, count=count)
