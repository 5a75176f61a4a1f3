"""A session: what a client is to the application, over all the connections that it makes.

To the hub it is a member like a plain connection: it stands in a shard and in rooms, and takes what is offered. What it
takes is numbered and kept in its log until the client has acknowledged it, and goes to the outbox of the connection
that the client has at the moment, if it has one. So replay and live traffic are one path: a connection begins with the
part of the log that its client has not seen, and everything later is queued behind it in the order of the numbers.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol

from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.sessions.replay_buffer import ReplayBuffer, ReplayLimits
from fastapi_ws_stabilizer.sessions.requests import PendingRequests
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.envelope import sequenced_frame, to_v1


class ResumeOutcome(str, Enum):
    """What a client has got back that asked for its session."""

    NONE = "none"
    """It asked for none: a new session."""
    FULL = "full"
    """Its session, and every message that it has missed."""
    GAP = "gap"
    """Its session with rooms and user data; messages that it has missed are gone, and it was told so."""
    LOST = "lost"
    """A new session: the old one is unknown here, over, or another client's."""


class Outlet(Protocol):
    """The outbox of a connection, as its session uses it."""

    def try_enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame if there is nothing to think about."""

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame without waiting."""

    def put(self, frame: EncodedMessage) -> bool:
        """Queue a frame if there is room."""

    def make_room(self, size: int) -> bool:
        """Whether a frame of `size` bytes can be queued, after what can be sent was sent."""

    def preload(self, frames: Any) -> None:
        """Queue frames, whatever room there is."""

    async def put_wait(self, frame: EncodedMessage, queued: Any = None) -> bool:
        """Queue a frame as soon as there is room."""

    @property
    def counted_bytes(self) -> int:
        """Bytes that wait, and what the messages take beside them."""

    def put_now(self, frame: EncodedMessage) -> bool:
        """Queue a frame and send it at once, if nothing waits and there is nothing to think about."""

    def flush(self) -> None:
        """Send what is queued now, as far as the network takes it."""

    def lingers(self) -> bool:
        """Whether something waits that the network may take as soon as the event loop turns."""

    def is_backpressured(self) -> bool:
        """Whether more than half of it is used, and its client seems to read."""


class Attachment(Protocol):
    """The connection of a session."""

    socket: Any
    used: bool

    @property
    def outbox(self) -> Outlet:
        """What waits to be sent."""

    @property
    def close_info(self) -> CloseInfo | None:
        """How it ended; `None` while it is open."""

    def close(
        self,
        reason: DisconnectReason,
        *,
        code: int | None = None,
        text: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Begin its end."""

    def evict(self) -> None:
        """End it, because room is needed for others."""

    def on_limit_exceeded(self, held: int) -> None:
        """End it, because more is held for it than may be."""


class Session(ReplayBuffer):
    """One session, and its log: it is the log itself, because a broadcast touches each session once.

    Attributes:
        connection_id: Its id, by which the hub knows it: no connection has the same.
        client_id: Whose it is.
        shard: Its shard in the hub.
        place: Where it stands in its shard.
        connection: The connection that it has now; `None` while its client is away.
        socket: What user code knows it by: the socket of its last connection.
        accepted: Number of the last message of its client that was taken.
        dials: The highest dial counter that its client has presented.
        instance: What tells its client instance from others, if that says so.
        user_data: The application's, the same over all its connections.
        inbox: What its client has sent and nobody has read.
        left: Rooms and presence metadata, while its client is away.
        requests: What the application waits for.
        known: Whether the application has heard of it: its connect hooks have begun.
        admitted: Whether it was let in: its connect hooks have gone through.
        told: Whether its end was told.
        over: How it ended; `None` while it lives.
    """

    __slots__ = (
        "_confirmed",
        "_counters",
        "_end_detached",
        "_issued",
        "_target",
        "accepted",
        "client_id",
        "connect_hooks_passed",
        "connect_hooks_started",
        "connection",
        "connection_id",
        "end_reported",
        "ended",
        "epoch",
        "inbox",
        "instance",
        "last_attempt",
        "previous_connection",
        "requests",
        "saved_presence",
        "shard",
        "shard_index",
        "socket",
        "until",
        "user_data",
    )

    def __init__(
        self,
        client_id: str,
        shard: int,
        limits: ReplayLimits,
        counters: Counters,
        end_away: Callable[[Session, CloseInfo], None],
    ) -> None:
        super().__init__(limits)
        self.connection_id = secrets.token_hex(8)
        self.client_id = client_id
        self.shard = shard
        self.shard_index = 0
        self.connection: Attachment | None = None
        self._target: Outlet | None = None  # the outbox of that connection
        self.previous_connection: Any = None
        self.socket: Any = None
        self.accepted = 0
        self.last_attempt = -1
        self.instance = ""
        self.epoch = 0
        self.user_data: MeteredDict | None = None
        self.inbox: Any = None
        self.saved_presence: dict[str, Any] = {}
        self.requests = PendingRequests()
        self.until: float | None = None
        self.connect_hooks_started = self.connect_hooks_passed = self.end_reported = False
        self.ended: CloseInfo | None = None
        self._counters = counters
        self._end_detached = end_away
        self._confirmed: tuple[str, int] | None = None  # secret, and the epoch in which it was issued
        self._issued: tuple[str, int] | None = None

    def __repr__(self) -> str:
        how = "over" if self.ended else "away" if self.connection is None else "attached"
        return f"<Session {self.connection_id} of {self.client_id!r} {how}>"

    # ── as a member of the hub ──

    @property
    def owner(self) -> Session:
        """Itself: it is its own mailbox."""
        return self

    @property
    def outbox(self) -> Session:
        """Itself."""
        return self

    @property
    def close_info(self) -> CloseInfo | None:
        """How it ended; `None` while it lives, with a connection or without."""
        return self.ended

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Number and keep a message, and queue it if there is a connection. Hot path, as that of an outbox.

        First the queue, then the log: making room may let in who has waited, and both must agree on the order.
        """
        frame = frame.enveloped or to_v1(frame)
        outlet = self._target
        if outlet is None or frame.volatile or not outlet.try_enqueue(frame):
            return self._offer_with_care(frame)
        self.append(frame)
        return EnqueueResult.QUEUED

    def offer_now(self, frame: EncodedMessage) -> EnqueueResult:
        """As `offer`, and send it now, as far as the network takes it: the caller may go on computing."""
        outlet = self._target
        enveloped = frame.enveloped or to_v1(frame)
        if outlet is not None and not enveloped.volatile and outlet.put_now(enveloped):
            self.append(enveloped)
            return EnqueueResult.QUEUED
        offered = self.offer(frame)
        self.flush()
        return offered

    def _offer_with_care(self, frame: EncodedMessage) -> EnqueueResult:
        if self.ended is not None:
            return EnqueueResult.CLOSED
        if frame.volatile:
            return self._offer_volatile(frame)
        connection, outlet = self.connection, self._target
        offered = EnqueueResult.QUEUED if outlet is None else outlet.offer(frame)
        if self.ended is not None:  # the outbox was full, which has ended the session: its log takes nothing any more
            self._counters.messages_discarded += 1
            return EnqueueResult.CLOSED
        self.append(frame)
        if offered is not EnqueueResult.CLOSED or connection is None:
            return offered
        # It is in the log, and the client gets it when it comes back.
        how = connection.close_info
        slow = how is not None and how.cause is DisconnectReason.SLOW_CONSUMER
        return EnqueueResult.SLOW if slow else EnqueueResult.QUEUED

    def _offer_volatile(self, frame: EncodedMessage) -> EnqueueResult:
        if self._target is None or self.connection is None:
            return EnqueueResult.SKIPPED
        self.connection.used = True
        if self._target.put(frame):
            return EnqueueResult.QUEUED
        self._counters.messages_dropped += 1
        return EnqueueResult.DROPPED

    def flush(self) -> None:
        """Send what is queued now, if there is a connection."""
        if self._target is not None:
            self._target.flush()

    def lingers(self) -> bool:
        """Whether something waits that the network may take as soon as the event loop turns."""
        return self._target is not None and self._target.lingers()

    def is_backpressured(self) -> bool:
        """Whether more than half of its outbox is used, and its client seems to read."""
        return self._target is not None and self._target.is_backpressured()

    def update_saved_presence(self, room: str, metadata: Mapping[str, Any]) -> None:
        """The application has described its client anew in one of its rooms."""
        self.saved_presence[room] = dict(metadata)

    @property
    def recipient(self) -> Session:
        """Itself."""
        return self

    @property
    def is_attached(self) -> bool:
        """Whether it has a connection."""
        return self.connection is not None

    def close(
        self,
        reason: DisconnectReason,
        *,
        code: int | None = None,
        text: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Begin the end of its connection; without one it is over at once. `False` if it was."""
        if self.connection is not None:
            return self.connection.close(reason, code=code, text=text, from_outside=from_outside)
        if self.ended is not None:
            return False
        how = local_close(reason, code=code, text=text, from_outside=from_outside)
        if how.code == 1000:  # as where it has a connection: 1000 also comes from proxies, and keeps no client away
            how = replace(how, code=SESSION_ENDED)
        self._end_detached(self, how)
        return True

    # ── memory ──

    @property
    def memory_usage(self) -> int:
        """Bytes that are held for it. What waits to be sent is in its log too, and counts once."""
        queued = 0 if self._target is None else self._target.counted_bytes
        unread = 0 if self.inbox is None else int(self.inbox.counted_bytes)
        kept = 0 if self.user_data is None else self.user_data.held_bytes
        metadata = 0 if self.connection is None else int(self.connection.socket._metadata_bytes)
        described = self._limits.budget.described.get(self.connection_id, 0)
        return max(self.counted_bytes, queued) + unread + kept + metadata + described

    def evict(self) -> None:
        """End it, because room is needed for others."""
        if self.connection is not None:
            self.connection.evict()
        else:
            self._end_detached(self, local_close(DisconnectReason.MEMORY))

    def on_limit_exceeded(self, held: int) -> None:
        """End it, because more is held for it than may be."""
        if self.connection is not None:
            self.connection.on_limit_exceeded(held)
        else:
            self._end_detached(self, local_close(DisconnectReason.MEMORY))

    # ── what its own connection sends ──

    async def put_wait(
        self, connection: Attachment, frame: EncodedMessage, numbered: Callable[[int], object] | None = None
    ) -> bool:
        """Number, keep and queue a message as soon as there is room; `False` if the connection ended before.

        Cancelling while it waits leaves the message out.

        Args:
            connection: Its connection.
            frame: The message.
            numbered: Called with its number in the moment in which it is queued.
        """
        frame = frame.enveloped or to_v1(frame)
        if frame.volatile:
            connection.used = True
            return await connection.outbox.put_wait(frame)

        def record(queued: EncodedMessage) -> None:
            if self.ended is not None:
                return
            seq = self.append(queued)
            if numbered is not None:
                numbered(seq)

        return await connection.outbox.put_wait(frame, record)

    def put_now(self, connection: Attachment, frame: EncodedMessage) -> bool:
        """Number, keep and send a message if there is nothing to think about; `False` says nothing but that there is.

        Hot path.
        """
        frame = frame.enveloped or to_v1(frame)
        if frame.volatile or connection is not self.connection or not connection.outbox.put_now(frame):
            return False
        self.append(frame)
        return True

    def reply(self, to: str, data: Any = None, *, error: dict[str, str] | None = None) -> None:
        """Answer a request of the client, in its turn among the messages, so that it survives a reconnect.

        Raises:
            MessageEncodeError: The answer cannot be JSON that the client reads, or is too large.
        """
        frame = (
            sequenced_frame("reply", data, re=to)
            if error is None
            else sequenced_frame("reply", None, re=to, error=error)
        )
        self.offer_now(frame)

    # ── tokens ──

    def new_token(self) -> str:
        """Make the token of the next welcome. The one presented last stays good until this one is confirmed."""
        self._issued = (secrets.token_urlsafe(24), self.epoch)
        return f"{self.connection_id}.{self._issued[0]}"

    @property
    def tokens(self) -> list[str]:
        """The tokens that its client may present: the last one that it is known to have, and a newer one."""
        known = {token[0] for token in (self._confirmed, self._issued) if token is not None}
        return [f"{self.connection_id}.{secret}" for secret in known]

    def knows(self, secret: str) -> bool:
        """Whether a token is good, without presenting it."""
        good = False
        for known in (self._issued, self._confirmed):
            good |= known is not None and hmac.compare_digest(known[0].encode(), secret.encode("utf-8", "replace"))
        return good

    def present(self, secret: str) -> int | None:
        """Take a token that a client presents: return the epoch in which it was issued; `None` if it is not good.

        Presenting confirms it: the welcome that would bring the next one may be lost.
        """
        found: tuple[str, int] | None = None
        for known in (self._confirmed, self._issued):  # both, always: how long it takes does not tell which one it was
            if known is not None and hmac.compare_digest(known[0].encode(), secret.encode("utf-8", "replace")):
                found = known
        if found is None:
            return None
        self._confirmed = found
        return found[1]

    def confirm(self) -> None:
        """The client has got the token of the last welcome: it has sent a frame since."""
        self._confirmed = self._issued

    # ── its client comes and goes ──

    def attach(self, connection: Attachment, seq: int, welcome: EncodedMessage) -> Attachment | None:
        """Give it a new connection, which begins with `welcome` and the messages after number `seq`.

        Returns:
            The connection that it had, which is to be closed now. What that one still receives is not its any more.
        """
        before, self.connection = self.connection, connection
        self._limits.budget.attach(self)
        self.until = None
        self.socket = connection.socket
        self._target = connection.outbox
        self._target.preload([welcome, *self.since(seq)])
        return before

    def detach(self, connection: Attachment) -> bool:
        """Its connection is over; `False` if it has another one already."""
        if self.connection is not connection:
            return False
        self.connection = self._target = None
        return True

    def acknowledged(self, seq: int) -> bool:
        """The client has got everything up to a number; `False` if that many were never sent."""
        if seq > self.head:
            return False
        self.forget_up_to(seq)
        self.requests.acknowledged(seq)
        return True

    def rewind(self, lost: int) -> None:
        """Its store has gone back in time: numbers will be given out a second time, so tokens of before prove nothing.

        Args:
            lost: How many of the last messages it no longer knows.
        """
        self.epoch += 1
        super().rewind(lost)

    def finish(self, how: CloseInfo) -> int:
        """It is over. Return how many messages its client has not acknowledged."""
        self.ended = how
        self._target = None
        left = len(self.kept)
        self.forget_all()
        if self.user_data is not None:
            self.user_data.detach()
        self.requests.fail_all(how)
        return left
