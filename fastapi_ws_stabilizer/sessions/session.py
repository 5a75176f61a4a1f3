"""Session: the state of one client over all its connections.

To the hub a session is a recipient like a plain connection: it is in rooms, and its outbox is in a shard and accepts
messages, also while the session has no connection.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.inbox import Inbox
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.sessions.outbox import SessionOutbox
from fastapi_ws_stabilizer.sessions.replay_buffer import ReplayBuffer, ReplayLimits
from fastapi_ws_stabilizer.sessions.requests import PendingRequests
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.envelope import sequenced_frame

NO_PRESENCE: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
"""Saved presence of every session that has none."""


class Session:
    """Session of one client: its identity, its tokens, its user data, and its messages in both directions.

    Args:
        client_id: Client that owns it.
        shard: Shard of its outbox in the hub.
        limits: Limits of the replay buffer.
        counters: Counters of the manager.
        end_detached: Called to end it while it is detached.

    Attributes:
        connection_id: Session id, which the hub uses in place of a connection id. No connection has the same id.
        client_id: As above.
        shard: As above.
        outbox: Messages to the client.
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
        "_budget",
        "_confirmed",
        "_end_detached",
        "_issued",
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
        "outbox",
        "previous_connection",
        "requests",
        "saved_presence",
        "shard",
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
        self.connection_id = secrets.token_hex(8)
        self.client_id = client_id
        self.shard = shard
        self.outbox = SessionOutbox(self, limits, counters)
        self.connection: Connection | None = None
        self.previous_connection: Connection | None = None
        self.socket: Any = None
        self.accepted = 0
        self.last_attempt = -1
        self.instance = ""
        self.epoch = 0
        self.user_data: MeteredDict | None = None
        self.inbox: Inbox | None = None
        self.saved_presence = NO_PRESENCE
        self.requests = PendingRequests()
        self.until: float | None = None
        self.connect_hooks_started = self.connect_hooks_passed = self.end_reported = False
        self.ended: CloseInfo | None = None
        self._budget = limits.budget
        self._end_detached = end_detached
        self._confirmed: tuple[str, int] | None = None  # secret, and the epoch in which it was issued
        self._issued: tuple[str, int] | None = None

    def __repr__(self) -> str:
        state = "ended" if self.ended else "detached" if self.connection is None else "attached"
        return f"<Session {self.connection_id} of {self.client_id!r} {state}>"

    # ── as a recipient ──

    @property
    def close_info(self) -> CloseInfo | None:
        """Close info; `None` while it is alive, attached or detached."""
        return self.ended

    def update_saved_presence(self, room: str, metadata: Mapping[str, Any]) -> None:
        """Store new presence metadata that the application has set in one of its rooms."""
        self.saved_presence = {**self.saved_presence, room: dict(metadata)}

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
    def account(self) -> Session:
        """This session: it is its own account in the memory budget."""
        return self

    @property
    def memory_usage(self) -> int:
        """Bytes that are held for it."""
        unread = 0 if self.inbox is None else self.inbox.counted_bytes
        user_data_bytes = 0 if self.user_data is None else self.user_data.held_bytes
        metadata = 0 if self.connection is None else int(self.connection.socket._metadata_bytes)
        presence_bytes = self._budget.described.get(self.connection_id, 0)
        return self.outbox.counted_bytes + unread + user_data_bytes + metadata + presence_bytes

    def evict(self) -> None:
        """End it to free memory."""
        if self.connection is not None:
            self.connection.account.evict()
        else:
            self._end_detached(self, local_close(DisconnectReason.MEMORY))

    def on_limit_exceeded(self, held: int) -> None:
        """End it, because it holds more memory than one client may."""
        if self.connection is not None:
            self.connection.on_limit_exceeded(held)
        else:
            self._end_detached(self, local_close(DisconnectReason.MEMORY))

    # ── messages ──

    @property
    def buffer(self) -> ReplayBuffer:
        """Messages that the client has not acknowledged."""
        return self.outbox.buffer

    @property
    def head(self) -> int:
        """Number of the last message to the client; 0 before the first."""
        return self.outbox.buffer.head

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
        self.outbox.offer_now(frame)

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

    def attach(self, connection: Connection, seq: int, welcome: EncodedMessage) -> Connection | None:
        """Attach a new connection, which begins with `welcome` and the messages after number `seq`.

        Returns:
            The previous connection, which must be closed now. The session ignores its later frames.
        """
        previous, self.connection = self.connection, connection
        self._budget.attach(self)
        self.until = None
        self.socket = connection.socket
        self.outbox.target = connection.outbox
        self.buffer.unsent = None
        connection.outbox.preload([welcome, *self.buffer.since(seq)])
        return previous

    def detach(self, connection: Connection) -> bool:
        """Detach a closed connection; `False` if the session has another connection already."""
        if self.connection is not connection:
            return False
        self.connection = self.outbox.target = None
        self.buffer.unsent = None  # the connection may have sent what was queued in it
        return True

    def acknowledge(self, seq: int) -> bool:
        """Drop all messages up to an acknowledged number; `False` if the number was never sent."""
        buffer = self.outbox.buffer
        if seq > buffer.head:
            return False
        buffer.forget_up_to(seq)
        self.requests.acknowledge(seq)
        return True

    def rewind(self, lost: int) -> None:
        """Undo the last messages, as a store does that lost its newest entries.

        Numbers are then used a second time, so tokens of earlier epochs prove nothing.

        Args:
            lost: Number of messages that the store lost.
        """
        self.epoch += 1
        self.buffer.rewind(lost)

    def finish(self, close_info: CloseInfo) -> int:
        """End it and return the number of unacknowledged messages."""
        self.ended = close_info
        unacknowledged = self.outbox.close()
        if self.user_data is not None:
            self.user_data.stop_accounting()
        self.requests.fail_all(close_info)
        return unacknowledged
