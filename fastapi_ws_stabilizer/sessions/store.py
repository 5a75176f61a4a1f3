"""The sessions of one manager: found by token, resumed by rule, ended when their client does not come back."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, CloseInfo, DisconnectReason, is_terminal, local_close
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.sessions.ended_sessions import EndedSessions
from fastapi_ws_stabilizer.sessions.replay_buffer import ReplayLimits
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome, Session
from fastapi_ws_stabilizer.wire.v1.hello import Hello

AT_ONCE: Final = 256
"""Sessions that are ended before the event loop gets a turn."""


MAX_DETACHED_PER_CLIENT: Final = 16
"""Sessions of one client that wait for it at most: a device that begins anew each time would leave one each time."""


class StaleAttemptError(Exception):
    """A dial that its client has given up arrives late: a newer one has the session."""


@dataclass(frozen=True)
class ResumeResult:
    """What a client gets for its hello.

    Attributes:
        session: Its session.
        outcome: What became of the one that it wanted back.
        why: Why it did not get all of that.
        cursor: Number of the last message before those that this connection is sent.
        deflates: Whether its client takes and sends compressed frames.
        retries: Whether its client sends a message again that was refused with a time.
    """

    session: Session
    outcome: ResumeOutcome
    why: str | None
    cursor: int
    deflates: bool = False
    retries: bool = False


class SessionStore:
    """All sessions, those with a connection and those whose client is away.

    Args:
        config: How long and how many are kept.
        events: Where what happens to them is told.
        budget: Counts what is held for them.
        next_shard: Gives a new session its shard in the hub.
        began: Told of a new session, without waiting.
        ended: Told of one that is over, without waiting.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        budget: MemoryBudget | None = None,
        *,
        next_shard: Callable[[], int],
        began: Callable[[Session], None],
        ended: Callable[[Session, CloseInfo], None],
    ) -> None:
        self._ttl = config.session_ttl if config.enable_reconnect else 0.0
        self._max_detached = config.max_detached_sessions
        max_bytes = config.replay_max_bytes
        if config.max_memory_per_connection is not None:  # a client that acknowledges nothing leaves room for the rest
            max_bytes = min(max_bytes, config.max_memory_per_connection // 2)
        self._budget = budget = MemoryBudget() if budget is None else budget
        self._limits = ReplayLimits(config.replay_max_messages, max_bytes, config.replay_max_age, budget)
        self._events = events
        self._next_shard = next_shard
        self._began = began
        self._ended = ended
        self._by_id: dict[str, Session] = {}
        self._of_instance: dict[tuple[str, str], Session] = {}  # client id, and what tells its instances apart
        self._detached: OrderedDict[str, Session] = (
            OrderedDict()
        )  # all may stay away equally long: the first goes first
        self._detached_of: dict[str, dict[str, Session]] = {}  # client id → sessions
        self._ended_by_application = EndedSessions(self._ttl)
        self._timer: asyncio.TimerHandle | None = None
        self._context = contextvars.copy_context()  # not that of the connection that happens to set the timer

    def __len__(self) -> int:
        """How many sessions there are."""
        return len(self._by_id)

    @property
    def detached_count(self) -> int:
        """How many sessions wait for their client."""
        return len(self._detached)

    def get(self, session_id: str) -> Session | None:
        """The session with that id."""
        return self._by_id.get(session_id)

    def detached_of(self, client_id: str) -> list[Session]:
        """The sessions of a client that is away, the one that left first comes first."""
        return list(self._detached_of.get(client_id, {}).values())

    # ── the rules of resuming ──

    def superseded_by(self, hello: Hello, client_id: str) -> Session | None:
        """The session that the very same client has given up with this hello: its welcome may not have come."""
        before = self._of_instance.get((client_id, hello.instance or ""))
        return before if before is not None and hello.attempt > before.last_attempt else None

    def find(self, token: str) -> Session | None:
        """The session that a token names. Whether the token is good, `greet` looks at."""
        return self._by_id.get(token.partition(".")[0])

    def authenticate(self, hello: Hello) -> Session | None:
        """The session that a client proves to have, without touching it; `None` if it proves nothing."""
        session = None if hello.token is None else self.find(hello.token)
        if session is None or hello.token is None or not session.knows(hello.token.partition(".")[2]):
            return None
        return session

    def ended_by_application(self, hello: Hello, client_id: str | None) -> CloseInfo | None:
        """Return how the application has ended the session that a client wants back; `None` if it has not.

        Args:
            hello: What the client has said.
            client_id: Who it is; `None` where only its session would tell, which is gone: its token is a secret.
        """
        return None if hello.token is None else self._ended_by_application.find(hello.token, client_id)

    def pinned(self, session: Session | None) -> AbstractContextManager[None]:
        """Let a session not go for others meanwhile: its client has proven to have it, and is on its way."""
        return self._budget.pinned(session)

    def resume(self, hello: Hello, client_id: str) -> ResumeResult:
        """Give a client its session, the one that it wants back or a new one. Nothing is sent yet.

        Nothing of this waits, so two hellos cannot come between each other.

        Args:
            hello: What it has said.
            client_id: Who it is, authenticated again.

        Raises:
            StaleAttemptError: The same client has dialled again since.
        """
        if hello.token is None:
            return self._fresh(client_id, hello, ResumeOutcome.NONE, None)
        session = self.find(hello.token)
        if session is not None and session.client_id != client_id:  # before anything of it is touched
            denied = session.knows(hello.token.partition(".")[2])
            return self._fresh(client_id, hello, ResumeOutcome.LOST, "denied" if denied else "unknown")
        if session is not None and hello.attempt <= session.last_attempt:
            # Before the token is looked at: the newer dial may have used it up, and a new session in place of this one
            # would end the one that its client has.
            raise StaleAttemptError
        epoch = None if session is None else session.present(hello.token.partition(".")[2])
        if session is None or epoch is None:
            return self._fresh(client_id, hello, ResumeOutcome.LOST, "unknown")
        if session.until is not None and session.until <= monotonic():
            self.end(session, _expired(session))
            return self._fresh(client_id, hello, ResumeOutcome.LOST, "expired")
        session.last_attempt = hello.attempt
        session.forget_old()
        why = replay_gap(session, epoch, hello.seq)
        if why is None:
            self._events.counters.sessions_resumed += 1
            session.acknowledged(hello.seq)
            return ResumeResult(session, ResumeOutcome.FULL, None, hello.seq, hello.deflates, hello.retries)
        missed = max(0, session.head - hello.seq)
        session.forget_all()  # never a part of what was missed
        session.requests.fail_after_gap(0 if why == "epoch" else min(hello.seq, session.head))
        self._events.counters.session_gaps += 1
        self._emit(session, "session_gap", logging.WARNING, why=why, missed_messages=missed)
        return ResumeResult(session, ResumeOutcome.GAP, why, session.head, hello.deflates, hello.retries)

    def _fresh(self, client_id: str, hello: Hello, outcome: ResumeOutcome, why: str | None) -> ResumeResult:
        before = self._of_instance.get((client_id, hello.instance or ""))
        if before is not None and hello.attempt <= before.last_attempt:
            raise StaleAttemptError
        if before is not None:  # that very client has begun anew, and wants it no more
            self.supersede(before)
        session = Session(client_id, self._next_shard(), self._limits, self._events.counters, self._end_detached)
        session.last_attempt = hello.attempt
        self._by_id[session.connection_id] = session
        if hello.instance:
            session.instance = hello.instance
            self._of_instance[client_id, hello.instance] = session
        self._began(session)
        if outcome is ResumeOutcome.LOST:
            self._events.counters.sessions_lost += 1
            self._emit(session, "session_lost", logging.INFO, why=why)
        return ResumeResult(session, outcome, why, 0, hello.deflates, hello.retries)

    # ── coming and going ──

    def supersede(self, session: Session) -> None:
        """Another session takes the place of this one."""
        if session.connection is not None:
            session.connection.close(DisconnectReason.REPLACED, code=SESSION_ENDED)
        self.end(session, local_close(DisconnectReason.REPLACED))

    def on_attached(self, session: Session) -> None:
        """Its client has a connection again."""
        if self._detached.pop(session.connection_id, None) is not None:
            self._forget_detached_of(session)

    def on_detached(self, session: Session) -> None:
        """Its client is away, and may come back for a while."""
        if session.ended is not None:
            return
        if self._ttl <= 0:
            self.end(session, _expired(session))
            return
        session.until = monotonic() + self._ttl
        self._budget.detach(session)
        self._detached[session.connection_id] = session
        of_client = self._detached_of.setdefault(session.client_id, {})
        of_client[session.connection_id] = session
        if len(of_client) > MAX_DETACHED_PER_CLIENT:
            self._evict(next(iter(of_client.values())), max_detached_of_client=MAX_DETACHED_PER_CLIENT)
        while len(self._detached) > self._max_detached:
            self._evict(next(iter(self._detached.values())), max_detached_sessions=self._max_detached)
        self._arm()

    def end(self, session: Session, how: CloseInfo) -> None:
        """A session is over. Nothing happens if it was."""
        self.on_attached(session)
        if self._by_id.pop(session.connection_id, None) is None:
            return
        if self._of_instance.get((session.client_id, session.instance)) is session:
            del self._of_instance[session.client_id, session.instance]
        try:
            self._budget.remove(session)
            unacknowledged = session.finish(how)
            self._events.counters.messages_discarded += unacknowledged
            self._emit(session, "session_ended", logging.INFO, reason=how.cause.value, unacknowledged=unacknowledged)
            kicked = how.cause is DisconnectReason.APPLICATION and is_terminal(how.code)
            if kicked and (how.from_outside or how.code != SESSION_ENDED):
                # Its close frame may be lost with a network that is dead already.
                self._answer_later(session, how)
        finally:  # whatever raises, it gets no more messages, and is in no room
            self._ended(session, how)

    def _end_detached(self, session: Session, how: CloseInfo) -> None:
        if how.cause is DisconnectReason.MEMORY:
            self._events.counters.evictions += 1
            self._emit(session, "session_evicted", logging.WARNING, why="memory")
        elif how.cause is DisconnectReason.APPLICATION:
            self._answer_later(session, how)
        self.end(session, how)

    def _answer_later(self, session: Session, how: CloseInfo) -> None:
        for token in session.tokens:
            self._ended_by_application.add(token, session.client_id, how)

    def _evict(self, session: Session, **limit: int) -> None:
        self._emit(session, "session_evicted", logging.WARNING, **limit)
        self.end(session, _expired(session))

    def stop(self) -> list[Session]:
        """End all that are left, as a shutdown does, and return them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left = list(self._by_id.values())
        for session in left:
            self.end(session, local_close(DisconnectReason.SERVER_SHUTDOWN))
        return left

    def _forget_detached_of(self, session: Session) -> None:
        of_client = self._detached_of[session.client_id]
        del of_client[session.connection_id]
        if not of_client:
            del self._detached_of[session.client_id]

    def _emit(self, session: Session, event: str, level: int, **fields: Any) -> None:
        self._events.emit(event, level, client_id=session.client_id, session_id=session.connection_id, **fields)

    # ── time ──

    def _arm(self) -> None:
        if self._timer is None and self._detached:
            until = next(iter(self._detached.values())).until or 0.0
            self._timer = asyncio.get_running_loop().call_later(
                max(0.0, until - monotonic()), self._on_timer, context=self._context
            )

    def _on_timer(self) -> None:
        self._timer = None
        now = monotonic()
        for _ in range(AT_ONCE):
            session = next(iter(self._detached.values()), None)
            if session is None or (session.until or 0.0) > now:
                break
            self.end(session, _expired(session))
        self._arm()


def replay_gap(session: Session, epoch: int, seq: int) -> str | None:
    """Why a client cannot have everything after a number; `None` if it can.

    Args:
        session: Its session.
        epoch: The epoch of its token.
        seq: Number of the last message that it has processed.
    """
    if epoch != session.epoch:
        return "epoch"  # its numbers may mean other messages
    if seq > session.head:
        return "ahead"
    if seq + 1 < session.first_seq:
        return "overflow"
    return None


def _expired(session: Session) -> CloseInfo:
    """How a session ends whose client has not come back: as its last connection did."""
    how: CloseInfo | None = getattr(session.socket, "close_info", None)
    return how or local_close(DisconnectReason.SERVER_SHUTDOWN)
