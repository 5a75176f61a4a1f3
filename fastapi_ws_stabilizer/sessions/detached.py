"""What plain clients have left behind that hold a reconnect token: their rooms and their user data, for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage

MAX_EXPECTED: Final = 100_000
"""Clients that are expected back at most, because they hold a token. The one that got it first is forgotten first."""


@dataclass(eq=False)
class DetachedState:
    """What one connection has left. To the ledger it is a client that is away, and in its rooms it is their member.

    Attributes:
        rooms: The rooms that it was in, and how its client is described in each.
        user_data: The application's.
        until: Until when it is kept.
        socket: The socket that has left it.
        forget: Called when it is to be kept no longer: room is needed, it was ended, or another takes its place.
        key: Under which it is kept.
        close_info: How it was ended; `None` while it is kept, and where room was needed.
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
        """The id of the connection that has left it."""
        return str(self.socket.connection_id)

    @property
    def client_id(self) -> str:
        """The client that it belongs to."""
        return str(self.socket.client_id)

    @property
    def described_bytes(self) -> int:
        """How much presence metadata is in `rooms`."""
        budget = self.user_data._budget
        return 0 if budget is None else budget.described.get(self.connection_id, 0)

    @property
    def memory_usage(self) -> int:
        """Bytes that it holds."""
        return self.user_data.held_bytes + self.described_bytes

    # ── as a member of rooms ──

    @property
    def recipient(self) -> DetachedState:
        """Itself."""
        return self

    @property
    def owner(self) -> DetachedState:
        """Itself: it is its own mailbox."""
        return self

    @property
    def outbox(self) -> DetachedState:
        """Itself."""
        return self

    @property
    def is_attached(self) -> bool:
        """Whether there is a connection: there is none."""
        return False

    def update_saved_presence(self, room: str, metadata: Mapping[str, Any]) -> None:
        """The application has described its client anew in one of its rooms."""
        self.rooms = {**self.rooms, room: dict(metadata)}

    def offer(self, _: EncodedMessage) -> EnqueueResult:
        """Take no message: a plain client gets none later."""
        return EnqueueResult.SKIPPED

    def offer_now(self, frame: EncodedMessage) -> EnqueueResult:
        """As `offer`."""
        return self.offer(frame)

    def flush(self) -> None:
        """Send what is queued: nothing is."""

    def lingers(self) -> bool:
        """Whether something waits that the network may take: nothing does."""
        return False

    def is_backpressured(self) -> bool:
        """Whether something waits in it: nothing does."""
        return False

    def close(
        self,
        reason: DisconnectReason,
        *,
        code: int | None = None,
        text: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Keep it no longer; `False` if it was ended before."""
        if self.close_info is not None:
            return False
        self.close_info = local_close(reason, code=code, text=text, from_outside=from_outside)
        self.forget(self)
        return True

    # ── memory ──

    def evict(self) -> None:
        """Forget it, because room is needed for others."""
        self.forget(self)

    def on_limit_exceeded(self, _: int) -> None:
        """Forget it, because it holds more than may be."""
        self.forget(self)


MAX_DETACHED_PER_CLIENT: Final = 16
"""Connections of one client of which something is kept at most; the one that left first is forgotten first."""

_BETWEEN: Final = "\n"
"""Stands in keys, and in no client id."""


def key_of_connection(client_id: str, connection_id: str) -> str:
    """The key under which what one of several connections of a client leaves is kept."""
    return f"{client_id}{_BETWEEN}{connection_id}"


class DetachedStateStore:
    """Keeps it.

    A plain client has no session that the server could know it by, so only those that were given a token are expected
    back, and only for `ttl` seconds.

    What is kept has a key: the client id where a client has one connection, else the client id and a connection.

    Args:
        ttl: Seconds that it is kept.
        max_states: How many connections' are kept at most.
    """

    def __init__(self, ttl: float, max_states: int) -> None:
        self._ttl = ttl
        self._max_states = max_states
        self._expected: OrderedDict[str, float] = OrderedDict()  # until when, the one that got its token first is first
        self._states: OrderedDict[str, DetachedState] = OrderedDict()  # by key, the one that left first comes first
        self._of_client: dict[str, dict[str, DetachedState]] = {}  # the same, by client id and key

    def __len__(self) -> int:
        """Of how many connections something is kept."""
        return len(self._states)

    def mark_resumable(self, key: str, seconds: float) -> None:
        """A client has been given a token, which is good for that long."""
        now = monotonic()
        self._expected[key] = now + seconds
        self._expected.move_to_end(key)
        self._forget_resumable(now)

    def is_resumable(self, *keys: str) -> bool:
        """Whether a client may come back with a token for one of these keys."""
        now = monotonic()
        return self._ttl > 0 and any(self._expected.get(key, now) > now for key in keys)

    def _forget_resumable(self, now: float) -> None:
        """Forget those whose token is not good any more."""
        while self._expected:
            key, until = next(iter(self._expected.items()))
            if until > now and len(self._expected) <= MAX_EXPECTED:
                break
            del self._expected[key]

    def save(self, key: str, state: DetachedState) -> list[DetachedState]:
        """Keep what a connection has left. Of several with one key the last one is kept.

        Returns:
            What is kept no longer, because it is too old or too much.
        """
        gone = self.collect()
        if key in self._states:
            gone.append(self._take_out(key))
        state.until, state.key = monotonic() + self._ttl, key
        self._states[key] = state
        of_client = self._of_client.setdefault(_client_of(key), {})
        of_client[key] = state
        if len(of_client) > MAX_DETACHED_PER_CLIENT:
            gone.append(self._take_out(next(iter(of_client))))
        while len(self._states) > self._max_states:
            gone.append(self._take_out(next(iter(self._states))))
        return gone

    def of(self, client_id: str) -> DetachedState | None:
        """What is kept for a client, which stays where it is; of several, what was left last."""
        return next(reversed(self.all_of(client_id)), None)

    def all_of(self, client_id: str) -> list[DetachedState]:
        """All that is kept for a client, which stays where it is; what was left first comes first."""
        return list(self._of_client.get(client_id, {}).values())

    def claim(self, key: str) -> DetachedState | None:
        """What a client gets back that proves to be who it was; `None` if nothing is kept any more."""
        state = self._states.get(key)
        if state is None or state.until <= monotonic():  # `collect` takes it out, and its end is told
            return None
        return self._take_out(key)

    def discard(self, state: DetachedState) -> bool:
        """Keep something no longer; `False` if it was not kept."""
        if self._states.get(state.key) is not state:
            return False
        self._take_out(state.key)
        return True

    def discard_of(self, client_id: str) -> list[DetachedState]:
        """Keep no longer what a client has left, and expect it no more."""
        gone = [self._take_out(state.key) for state in self.all_of(client_id)]
        for key in (client_id, *(state.key for state in gone)):
            self._expected.pop(key, None)
        return gone

    def detached_at(self, state: DetachedState) -> float:
        """When something was left, on the monotonic clock."""
        return state.until - self._ttl

    def next_due(self) -> float | None:
        """When the first of it is kept no longer."""
        return next((state.until for state in self._states.values()), None)

    def collect(self) -> list[DetachedState]:
        """Take out what is kept no longer."""
        now, gone = monotonic(), []
        self._forget_resumable(now)
        while self._states:
            key, state = next(iter(self._states.items()))
            if state.until > now:
                break
            gone.append(self._take_out(key))
        return gone

    def clear(self) -> list[DetachedState]:
        """Take all of it out."""
        gone = list(self._states.values())
        self._states.clear()
        self._of_client.clear()
        return gone

    def _take_out(self, key: str) -> DetachedState:
        client_id = _client_of(key)
        of_client = self._of_client[client_id]
        del of_client[key]
        if not of_client:
            del self._of_client[client_id]
        return self._states.pop(key)


def _client_of(key: str) -> str:
    return key.partition(_BETWEEN)[0]
