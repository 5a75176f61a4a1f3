"""Session: the state of one client over all its connections.

To the hub a session is a recipient like a plain connection: it is in a shard and in rooms, and accepts messages. The
session numbers each message and stores it in its replay buffer until the client acknowledges it. It also queues the
message in the outbox of the current connection, if there is one. So replay and live messages take one path. A new
connection begins with the unacknowledged part of the buffer, and later messages are queued behind it in order.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.sessions.replay_buffer import ReplayBuffer, ReplayLimits
from fastapi_ws_stabilizer.sessions.requests import PendingRequests
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.envelope import sequenced_frame, to_v1


class Outlet(Protocol):
    """Outbox of a connection, as its session uses it."""

    def try_enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame on the fast path; `False` if the slow path has to decide."""

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame without waiting."""

    def put(self, frame: EncodedMessage) -> bool:
        """Queue a frame if there is room."""

    def make_room(self, size: int) -> bool:
        """Whether a frame of `size` bytes fits, after sending what can be sent."""

    def preload(self, frames: Any) -> None:
        """Queue frames regardless of the limits."""

    async def put_wait(self, frame: EncodedMessage, queued: Any = None) -> bool:
        """Queue a frame as soon as there is room."""

    @property
    def counted_bytes(self) -> int:
        """Bytes of the queued messages with their overhead."""

    def try_send(self, frame: EncodedMessage) -> bool:
        """Queue and send a frame at once on the fast path; `False` if the slow path has to decide."""

    def flush(self) -> None:
        """Send queued messages now, as far as the network accepts them."""

    def has_sendable_frames(self) -> bool:
        """Whether messages wait that the network may accept in the next event loop iteration."""

    def is_backpressured(self) -> bool:
        """Whether more than half of it is used while the client seems to read."""


class Attachment(Protocol):
    """Connection of a session, as its session uses it."""

    socket: Any
    used: bool

    @property
    def outbox(self) -> Outlet:
        """Outbox of the connection."""

    @property
    def close_info(self) -> CloseInfo | None:
        """Close info; `None` while it is open."""

    def close(
        self,
        cause: DisconnectReason,
        *,
        code: int | None = None,
        reason: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Begin to close."""

    def evict(self) -> None:
        """Close it to free memory."""

    def on_limit_exceeded(self, held: int) -> None:
        """Close it, because it holds more memory than one client may."""


class Session(ReplayBuffer):
    """Session of one client, including its replay buffer.

    It is a subclass of the buffer, because a broadcast then touches one object per session.

    Attributes:
        connection_id: Session id, which the hub uses in place of a connection id. No connection has the same id.
        client_id: Client that owns it.
        shard: Its shard in the hub.
        shard_index: Its index in that shard.
        connection: Current connection; `None` while it is detached.
        previous_connection: Last connection that took the session over, until its teardown is complete.
        socket: Socket of its last connection, for user code.
        accepted: Number of the last message from the client that was accepted.
        last_attempt: Highest attempt number that its client has sent.
        instance: Id that distinguishes instances of one client, if the client sends one.
        epoch: Number of rewinds; a token of an older epoch does not prove which messages the client has.
        user_data: User data of the application, the same over all connections.
        inbox: Messages from the client that no code has read yet.
        saved_presence: Rooms and presence metadata while it is detached.
        requests: Requests and acknowledgements that the application awaits.
        until: Time at which it expires while detached, on the monotonic clock.
        connect_hooks_started: Whether its connect hooks have started, so that the application knows it.
        connect_hooks_passed: Whether its connect hooks have accepted it.
        end_reported: Whether its end was reported to the application.
        ended: Close info; `None` while it is alive.
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
        end_detached: Callable[[Session, CloseInfo], None],
    ) -> None:
        super().__init__(limits)
        self.connection_id = secrets.token_hex(8)
        self.client_id = client_id
        self.shard = shard
        self.shard_index = 0
        self.connection: Attachment | None = None
        self._target: Outlet | None = None  # outbox of that connection
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
        self._end_detached = end_detached
        self._confirmed: tuple[str, int] | None = None  # secret, and the epoch in which it was issued
        self._issued: tuple[str, int] | None = None

    def __repr__(self) -> str:
        state = "ended" if self.ended else "detached" if self.connection is None else "attached"
        return f"<Session {self.connection_id} of {self.client_id!r} {state}>"

    # ── as a recipient ──

    @property
    def owner(self) -> Session:
        """This session: it is its own send queue."""
        return self

    @property
    def outbox(self) -> Session:
        """This session."""
        return self

    @property
    def close_info(self) -> CloseInfo | None:
        """Close info; `None` while it is alive, attached or detached."""
        return self.ended

    def offer(self, frame: EncodedMessage) -> EnqueueResult:
        """Number and store a message, and queue it if there is a connection.

        The outbox comes before the buffer, because making room may let waiting senders in, and both must have the same
        order. Hot path, like `offer` of an outbox.
        """
        frame = frame.enveloped or to_v1(frame)
        outlet = self._target
        if outlet is None or frame.volatile or not outlet.try_enqueue(frame):
            return self._offer_slow_path(frame)
        self.append(frame)
        return EnqueueResult.QUEUED

    def offer_now(self, frame: EncodedMessage) -> EnqueueResult:
        """Offer a frame and send it at once, as far as the network accepts it.

        The caller may compute for long afterwards without yielding to the event loop.
        """
        outlet = self._target
        enveloped = frame.enveloped or to_v1(frame)
        if outlet is not None and not enveloped.volatile and outlet.try_send(enveloped):
            self.append(enveloped)
            return EnqueueResult.QUEUED
        enqueued = self.offer(frame)
        self.flush()
        return enqueued

    def _offer_slow_path(self, frame: EncodedMessage) -> EnqueueResult:
        if self.ended is not None:
            return EnqueueResult.CLOSED
        if frame.volatile:
            return self._offer_volatile(frame)
        connection, outlet = self.connection, self._target
        enqueued = EnqueueResult.QUEUED if outlet is None else outlet.offer(frame)
        if self.ended is not None:  # the full outbox ended the session, and its buffer is closed
            self._counters.messages_discarded += 1
            return EnqueueResult.CLOSED
        self.append(frame)
        if enqueued is not EnqueueResult.CLOSED or connection is None:
            return enqueued
        # It is in the buffer, and the client gets it when it resumes.
        close_info = connection.close_info
        slow = close_info is not None and close_info.cause is DisconnectReason.SLOW_CONSUMER
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

    def has_sendable_frames(self) -> bool:
        """Whether messages wait that the network may accept in the next event loop iteration."""
        return self._target is not None and self._target.has_sendable_frames()

    def is_backpressured(self) -> bool:
        """Whether more than half of its outbox is used while the client seems to read."""
        return self._target is not None and self._target.is_backpressured()

    def update_saved_presence(self, room: str, metadata: Mapping[str, Any]) -> None:
        """Store new presence metadata that the application has set in one of its rooms."""
        self.saved_presence[room] = dict(metadata)

    @property
    def recipient(self) -> Session:
        """This session."""
        return self

    def close(
        self,
        cause: DisconnectReason,
        *,
        code: int | None = None,
        reason: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Begin to close its connection, or end it at once if it is detached; `False` if it has ended."""
        if self.connection is not None:
            return self.connection.close(cause, code=code, reason=reason, from_outside=from_outside)
        if self.ended is not None:
            return False
        close_info = local_close(cause, code=code, reason=reason, from_outside=from_outside)
        if close_info.code == 1000:  # proxies send 1000 too, so clients reconnect after it
            close_info = replace(close_info, code=SESSION_ENDED)
        self._end_detached(self, close_info)
        return True

    # ── memory ──

    def adopt_user_data(self, user_data: MeteredDict) -> None:
        """Take over user data that was set before its client was known to be this session's.

        If the session has user data already, that dict stays and gets the entries of the new one, because a handler of
        the previous connection may still write to it.

        Raises:
            MemoryLimitExceededError: Both do not fit together. The session's own data is unchanged.
        """
        if self.user_data is None:
            user_data.owner, self.user_data = self, user_data
            return
        user_data.stop_accounting()
        self.user_data.update(user_data)

    @property
    def memory_usage(self) -> int:
        """Bytes that are held for it. A queued message is in the buffer too, but counts once."""
        queued = 0 if self._target is None else self._target.counted_bytes
        unread = 0 if self.inbox is None else int(self.inbox.counted_bytes)
        user_data_bytes = 0 if self.user_data is None else self.user_data.held_bytes
        metadata = 0 if self.connection is None else int(self.connection.socket._metadata_bytes)
        presence_bytes = self._limits.budget.described.get(self.connection_id, 0)
        return max(self.counted_bytes, queued) + unread + user_data_bytes + metadata + presence_bytes

    def evict(self) -> None:
        """End it to free memory."""
        if self.connection is not None:
            self.connection.evict()
        else:
            self._end_detached(self, local_close(DisconnectReason.MEMORY))

    def on_limit_exceeded(self, held: int) -> None:
        """End it, because it holds more memory than one client may."""
        if self.connection is not None:
            self.connection.on_limit_exceeded(held)
        else:
            self._end_detached(self, local_close(DisconnectReason.MEMORY))

    # ── sending through its own connection ──

    async def put_wait(
        self, connection: Attachment, frame: EncodedMessage, numbered: Callable[[int], object] | None = None
    ) -> bool:
        """Number, store and queue a message as soon as there is room.

        Cancelling while it waits discards the message.

        Args:
            connection: Its connection.
            frame: The message.
            numbered: Called with the message's number at the moment it is queued.

        Returns:
            `False` if the connection closed before.
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

    def try_send(self, connection: Attachment, frame: EncodedMessage) -> bool:
        """Number, store and send a message on the fast path; `False` if the slow path has to decide.

        `False` means that nothing was queued. Hot path.
        """
        frame = frame.enveloped or to_v1(frame)
        if frame.volatile or connection is not self.connection or not connection.outbox.try_send(frame):
            return False
        self.append(frame)
        return True

    def reply(self, to: str, data: Any = None, *, error: dict[str, str] | None = None) -> None:
        """Answer a request of the client. The answer is numbered like a message, so it survives a reconnect.

        Raises:
            MessageEncodeError: The answer cannot be encoded as JSON that clients read, or is too large.
        """
        frame = (
            sequenced_frame("reply", data, re=to)
            if error is None
            else sequenced_frame("reply", None, re=to, error=error)
        )
        self.offer_now(frame)

    # ── tokens ──

    def new_token(self) -> str:
        """Create the token of the next welcome.

        The last presented token stays valid until this one is confirmed.
        """
        self._issued = (secrets.token_urlsafe(24), self.epoch)
        return f"{self.connection_id}.{self._issued[0]}"

    @property
    def tokens(self) -> list[str]:
        """Tokens that its client may present: the last confirmed one and, if issued, a newer one."""
        known = {token[0] for token in (self._confirmed, self._issued) if token is not None}
        return [f"{self.connection_id}.{secret}" for secret in known]

    def knows(self, secret: str) -> bool:
        """Whether a token is valid. Does not confirm it."""
        valid = False
        for known in (self._issued, self._confirmed):
            valid |= known is not None and hmac.compare_digest(known[0].encode(), secret.encode("utf-8", "replace"))
        return valid

    def present(self, secret: str) -> int | None:
        """Confirm a presented token and return its epoch; `None` if it is invalid.

        It is confirmed because the welcome with the next token may be lost.
        """
        found: tuple[str, int] | None = None
        for known in (self._confirmed, self._issued):  # always both: the duration must not reveal which one matched
            if known is not None and hmac.compare_digest(known[0].encode(), secret.encode("utf-8", "replace")):
                found = known
        if found is None:
            return None
        self._confirmed = found
        return found[1]

    def confirm(self) -> None:
        """Confirm the token of the last welcome, because the client has since sent a frame."""
        self._confirmed = self._issued

    # ── attaching and detaching ──

    def attach(self, connection: Attachment, seq: int, welcome: EncodedMessage) -> Attachment | None:
        """Attach a new connection, which begins with `welcome` and the messages after number `seq`.

        Returns:
            The previous connection, which must be closed now. The session ignores its later frames.
        """
        previous, self.connection = self.connection, connection
        self._limits.budget.attach(self)
        self.until = None
        self.socket = connection.socket
        self._target = connection.outbox
        self._target.preload([welcome, *self.since(seq)])
        return previous

    def detach(self, connection: Attachment) -> bool:
        """Detach a closed connection; `False` if the session has another connection already."""
        if self.connection is not connection:
            return False
        self.connection = self._target = None
        return True

    def acknowledge(self, seq: int) -> bool:
        """Drop all messages up to an acknowledged number; `False` if the number was never sent."""
        if seq > self.head:
            return False
        self.forget_up_to(seq)
        self.requests.acknowledge(seq)
        return True

    def rewind(self, lost: int) -> None:
        """Undo the last messages, as a store does that lost its newest entries.

        Numbers are then used a second time, so tokens of earlier epochs prove nothing.

        Args:
            lost: Number of messages that the store lost.
        """
        self.epoch += 1
        super().rewind(lost)

    def finish(self, close_info: CloseInfo) -> int:
        """End it and return the number of unacknowledged messages."""
        self.ended = close_info
        self._target = None
        unacknowledged = len(self.entries)
        self.forget_all()
        if self.user_data is not None:
            self.user_data.stop_accounting()
        self.requests.fail_all(close_info)
        return unacknowledged
