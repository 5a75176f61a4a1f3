"""Detached states: rooms and user data of plain clients that hold a reconnect token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import SessionStore
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage


class SkippingQueue:
    """Send queue of a detached plain client.

    Args:
        owner: The state of the client.
    """

    __slots__ = ("owner", "shard_index")

    def __init__(self, owner: DetachedState) -> None:
        self.owner = owner
        self.shard_index = 0

    def try_enqueue(self, _: EncodedMessage) -> bool:
        """Return `False`: nothing is queued."""
        return False

    def offer(self, _: EncodedMessage) -> EnqueueResult:
        """Skip the message."""
        return EnqueueResult.SKIPPED

    def offer_now(self, _: EncodedMessage) -> EnqueueResult:
        """Skip the message."""
        return EnqueueResult.SKIPPED

    def flush(self) -> None:
        """Do nothing: nothing is queued."""

    def has_sendable_frames(self) -> bool:
        """Return `False`: nothing is queued."""
        return False

    def is_backpressured(self) -> bool:
        """Return `False`: nothing is queued."""
        return False


@dataclass(eq=False)
class DetachedState:
    """State that one closed connection left behind.

    The memory budget counts it as a detached client, and its rooms have it as a member.

    Attributes:
        rooms: Rooms of the connection, with its client's presence metadata in each.
        user_data: User data of the application.
        until: Time at which it expires, on the monotonic clock.
        socket: Socket of the closed connection.
        forget: Called to discard it, because memory is needed, it was closed, or another state replaces it.
        key: Key in the store.
        close_info: Close info; `None` while it is stored, and after an eviction.
    """

    rooms: Mapping[str, Mapping[str, Any]]
    user_data: MeteredDict
    until: float
    socket: Any
    forget: Callable[[DetachedState], None]
    key: str = ""
    close_info: CloseInfo | None = None

    @property
    def connection_id(self) -> str:
        """Id of the closed connection."""
        return str(self.socket.connection_id)

    @property
    def client_id(self) -> str:
        """Id of its client."""
        return str(self.socket.client_id)

    @property
    def described_bytes(self) -> int:
        """Bytes of presence metadata in `rooms`."""
        budget = self.user_data._budget
        return 0 if budget is None else budget.described.get(self.connection_id, 0)

    @property
    def memory_usage(self) -> int:
        """Bytes that it holds."""
        return self.user_data.held_bytes + self.described_bytes

    # ── as a recipient ──

    @property
    def outbox(self) -> SkippingQueue:
        """Queue that skips each message, because a plain client does not get it later."""
        return SkippingQueue(self)

    @property
    def account(self) -> DetachedState:
        """This state: it is its own account in the memory budget."""
        return self

    def update_saved_presence(self, room: str, metadata: Mapping[str, Any]) -> None:
        """Store new presence metadata that the application has set in one of its rooms."""
        self.rooms = {**self.rooms, room: dict(metadata)}

    def close(
        self,
        cause: DisconnectReason,
        *,
        code: int | None = None,
        reason: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Discard it; `False` if it was closed before."""
        if self.close_info is not None:
            return False
        self.close_info = local_close(cause, code=code, reason=reason, from_outside=from_outside)
        self.forget(self)
        return True

    # ── memory ──

    def evict(self) -> None:
        """Discard it to free memory."""
        self.forget(self)

    def on_limit_exceeded(self, _: int) -> None:
        """Discard it, because it holds more memory than one client may."""
        self.forget(self)


MAX_DETACHED_PER_CLIENT: Final = 16
"""Detached states per client. The oldest is discarded first."""

_KEY_SEPARATOR: Final = "\n"
"""Separator in keys. No client id contains it."""


def key_of_connection(client_id: str, connection_id: str) -> str:
    """Return the key for the state of one of a client's several connections."""
    return f"{client_id}{_KEY_SEPARATOR}{connection_id}"


class DetachedStateStore:
    """Store of detached states, each for `ttl` seconds.

    The key of a state is the client id if the client had one connection, else the client id and the connection id.

    Args:
        ttl: Seconds that a state is stored.
        max_states: Maximum number of states.

    Attributes:
        by_client: The states by client id and key, for clients with a state.
    """

    def __init__(self, ttl: float, max_states: int) -> None:
        self._ttl = ttl
        self._max_states = max_states
        self._states: OrderedDict[str, DetachedState] = OrderedDict()  # by key, the oldest first
        self.by_client: dict[str, dict[str, DetachedState]] = {}

    def __len__(self) -> int:
        """Number of stored states."""
        return len(self._states)

    def save(self, key: str, state: DetachedState) -> list[DetachedState]:
        """Store the state of a closed connection. It replaces an older state with the same key.

        Returns:
            The states that were discarded, because they are expired, replaced or too many.
        """
        discarded = self.collect()
        if key in self._states:
            discarded.append(self._take_out(key))
        state.until, state.key = monotonic() + self._ttl, key
        self._states[key] = state
        of_client = self.by_client.setdefault(_client_of(key), {})
        of_client[key] = state
        if len(of_client) > MAX_DETACHED_PER_CLIENT:
            discarded.append(self._take_out(next(iter(of_client))))
        while len(self._states) > self._max_states:
            discarded.append(self._take_out(next(iter(self._states))))
        return discarded

    def of(self, client_id: str) -> DetachedState | None:
        """Return the newest state of a client without removing it."""
        return next(reversed(self.all_of(client_id)), None)

    def all_of(self, client_id: str) -> list[DetachedState]:
        """Return all states of a client without removing them, oldest first."""
        return list(self.by_client.get(client_id, {}).values())

    def claim(self, key: str) -> DetachedState | None:
        """Remove and return the state of an authenticated client; `None` if there is none."""
        state = self._states.get(key)
        if state is None or state.until <= monotonic():  # `collect` removes it and reports its end
            return None
        return self._take_out(key)

    def discard(self, state: DetachedState) -> bool:
        """Remove a state; `False` if it was not stored."""
        if self._states.get(state.key) is not state:
            return False
        self._take_out(state.key)
        return True

    def discard_of(self, client_id: str) -> list[DetachedState]:
        """Remove and return all states of a client."""
        return [self._take_out(state.key) for state in self.all_of(client_id)]

    def detached_at(self, state: DetachedState) -> float:
        """Return the time at which a state was stored, on the monotonic clock."""
        return state.until - self._ttl

    def next_due(self) -> float | None:
        """Return the expiry of the first state."""
        return next((state.until for state in self._states.values()), None)

    def collect(self) -> list[DetachedState]:
        """Remove and return expired states."""
        now, discarded = monotonic(), []
        while self._states:
            key, state = next(iter(self._states.items()))
            if state.until > now:
                break
            discarded.append(self._take_out(key))
        return discarded

    def clear(self) -> list[DetachedState]:
        """Remove and return all states."""
        discarded = list(self._states.values())
        self._states.clear()
        self.by_client.clear()
        return discarded

    def _take_out(self, key: str) -> DetachedState:
        client_id = _client_of(key)
        of_client = self.by_client[client_id]
        del of_client[key]
        if not of_client:
            del self.by_client[client_id]
        return self._states.pop(key)


def _client_of(key: str) -> str:
    return key.partition(_KEY_SEPARATOR)[0]


class DetachedRecipients:
    """The detached sessions of one node, and the detached states of its plain clients, by client.

    Args:
        sessions: The store of sessions.
        states: The store of detached states.
    """

    def __init__(self, sessions: SessionStore, states: DetachedStateStore) -> None:
        self.sessions = sessions
        self.states = states

    def of_client(self, client_id: str) -> list[Session | DetachedState]:
        """Return the detached sessions of a client, and the detached states of its plain connections."""
        return [*self.sessions.detached_of(client_id), *self.states.all_of(client_id)]
