"""Store of one manager's sessions: it finds, resumes and expires them."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, CloseInfo, DisconnectReason, is_terminal, local_close
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.sessions.ended_sessions import EndedSessions
from fastapi_ws_stabilizer.sessions.replay_buffer import ReplayLimits
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.wire.v1.hello import Hello, ResumeOutcome

AT_ONCE: Final = 256
"""Sessions that the timer ends before it yields to the event loop."""


MAX_DETACHED_PER_CLIENT: Final = 16
"""Detached sessions per client. A device that never resumes would otherwise leave one for each connection."""


class StaleAttemptError(Exception):
    """A stale connection attempt arrived after a newer one took the session."""


@dataclass(frozen=True)
class ResumeResult:
    """Result of a hello.

    Attributes:
        session: Session of the client.
        outcome: Outcome of the resume request.
        why: Reason for a `gap` or `lost` outcome.
        cursor: Number of the last message before those that this connection gets.
        deflates: Whether the client sends and receives compressed frames.
        retries: Whether the client sends a message again that was rejected with a retry time.
    """

    session: Session
    outcome: ResumeOutcome
    why: str | None
    cursor: int
    deflates: bool = False
    retries: bool = False


class SessionListener(Protocol):
    """Listener of the sessions of a store. Its methods must not block."""

    def on_session_began(self, session: Session) -> None:
        """Handle a new session."""

    def on_session_ended(self, session: Session, close_info: CloseInfo) -> None:
        """Handle the end of a session, which gets no more messages."""


class SessionStore:
    """Store of all sessions, attached and detached.

    Args:
        config: Options, with the lifetime and the limits of sessions.
        events: Event bus for session events.
        budget: Memory budget that counts what sessions hold.
        next_shard: Returns the shard of a new session in the hub.

    Attributes:
        listener: Listener of all sessions. Set it before the first one begins.
        detached_by_client: The detached sessions by client id and session id, for clients with one.
    """

    listener: SessionListener

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        budget: MemoryBudget | None = None,
        *,
        next_shard: Callable[[], int],
    ) -> None:
        self._ttl = config.session_ttl if config.enable_reconnect else 0.0
        self._max_detached = config.max_detached_sessions
        max_bytes = config.replay_max_bytes
        if config.max_memory_per_connection is not None:  # leave half for other data if the client acknowledges nothing
            max_bytes = min(max_bytes, config.max_memory_per_connection // 2)
        self._budget = budget = MemoryBudget() if budget is None else budget
        self._limits = ReplayLimits(config.replay_max_messages, max_bytes, config.replay_max_age, budget)
        self._events = events
        self._next_shard = next_shard
        self._by_id: dict[str, Session] = {}
        self._of_instance: dict[tuple[str, str], Session] = {}  # by client id and instance id
        self._detached: OrderedDict[str, Session] = OrderedDict()  # all expire after the same time: first in, first out
        self.detached_by_client: dict[str, dict[str, Session]] = {}
        self._ended_by_application = EndedSessions(self._ttl)
        self._timer: asyncio.TimerHandle | None = None
        self._context = contextvars.copy_context()  # not the context of the connection that sets the timer

    def __len__(self) -> int:
        """Number of sessions."""
        return len(self._by_id)

    @property
    def detached_count(self) -> int:
        """Number of detached sessions."""
        return len(self._detached)

    def get(self, session_id: str) -> Session | None:
        """Return the session with that id."""
        return self._by_id.get(session_id)

    def detached_of(self, client_id: str) -> list[Session]:
        """Return the detached sessions of a client, in the order in which they detached."""
        return list(self.detached_by_client.get(client_id, {}).values())

    # ── resuming ──

    def superseded_by(self, hello: Hello, client_id: str) -> Session | None:
        """Return the session that the same client instance gives up with this hello.

        The instance may give it up because its welcome was lost.
        """
        previous = self._of_instance.get((client_id, hello.instance or ""))
        return previous if previous is not None and hello.attempt > previous.last_attempt else None

    def find(self, token: str) -> Session | None:
        """Return the session that a token names. It does not check the token."""
        return self._by_id.get(token.partition(".")[0])

    def authenticate(self, hello: Hello) -> Session | None:
        """Return the session of a valid token without changing it; `None` if the token is missing or invalid."""
        session = None if hello.token is None else self.find(hello.token)
        if session is None or hello.token is None or not session.knows(hello.token.partition(".")[2]):
            return None
        return session

    def ended_by_application(self, hello: Hello, client_id: str | None) -> CloseInfo | None:
        """Return the close info of a session that the application ended; `None` if there is none.

        Args:
            hello: Hello of the client.
            client_id: Client id; `None` if only the ended session has it. The token is then the proof.
        """
        return None if hello.token is None else self._ended_by_application.find(hello.token, client_id)

    def pinned(self, session: Session | None) -> AbstractContextManager[None]:
        """Protect a session from eviction while its authenticated client resumes it."""
        return self._budget.pinned(session)

    def resume(self, hello: Hello, client_id: str) -> ResumeResult:
        """Give a client the session that it asks for, or a new one. Nothing is sent yet.

        It never waits, so two hellos cannot interleave.

        Args:
            hello: Hello of the client.
            client_id: Client id, authenticated again.

        Raises:
            StaleAttemptError: The same client has since made a newer attempt.
        """
        if hello.token is None:
            return self._fresh(client_id, hello, ResumeOutcome.NONE, None)
        session = self.find(hello.token)
        if session is not None and session.client_id != client_id:  # before any change to the session
            denied = session.knows(hello.token.partition(".")[2])
            return self._fresh(client_id, hello, ResumeOutcome.LOST, "denied" if denied else "unknown")
        if session is not None and hello.attempt <= session.last_attempt:
            # Before the token check: the newer attempt may have consumed the token, and a replacement session would end
            # the client's current one.
            raise StaleAttemptError
        epoch = None if session is None else session.present(hello.token.partition(".")[2])
        if session is None or epoch is None:
            return self._fresh(client_id, hello, ResumeOutcome.LOST, "unknown")
        if session.until is not None and session.until <= monotonic():
            self.end(session, _expired(session))
            return self._fresh(client_id, hello, ResumeOutcome.LOST, "expired")
        session.last_attempt = hello.attempt
        session.buffer.forget_old()
        why = gap_reason(session, epoch, hello.seq)
        if why is None:
            self._events.counters.sessions_resumed += 1
            session.acknowledge(hello.seq)
            return ResumeResult(session, ResumeOutcome.FULL, None, hello.seq, hello.deflates, hello.retries)
        missed = max(0, session.head - hello.seq)
        session.buffer.forget_all()  # never replay only a part of what was missed
        session.requests.fail_after_gap(0 if why == "epoch" else min(hello.seq, session.head))
        self._events.counters.session_gaps += 1
        self._emit(session, "session_gap", logging.WARNING, why=why, missed_messages=missed)
        return ResumeResult(session, ResumeOutcome.GAP, why, session.head, hello.deflates, hello.retries)

    def _fresh(self, client_id: str, hello: Hello, outcome: ResumeOutcome, why: str | None) -> ResumeResult:
        previous = self._of_instance.get((client_id, hello.instance or ""))
        if previous is not None and hello.attempt <= previous.last_attempt:
            raise StaleAttemptError
        if previous is not None:  # the same client instance has started over, and gives this session up
            self.supersede(previous)
        session = Session(client_id, self._next_shard(), self._limits, self._events.counters, self._end_detached)
        session.last_attempt = hello.attempt
        self._by_id[session.connection_id] = session
        if hello.instance:
            session.instance = hello.instance
            self._of_instance[client_id, hello.instance] = session
        self.listener.on_session_began(session)
        if outcome is ResumeOutcome.LOST:
            self._events.counters.sessions_lost += 1
            self._emit(session, "session_lost", logging.INFO, why=why)
        return ResumeResult(session, outcome, why, 0, hello.deflates, hello.retries)

    # ── attaching and detaching ──

    def supersede(self, session: Session) -> None:
        """End a session that another session replaces."""
        if session.connection is not None:
            session.connection.close(DisconnectReason.REPLACED, code=SESSION_ENDED)
        self.end(session, local_close(DisconnectReason.REPLACED))

    def on_attached(self, session: Session) -> None:
        """Remove a session from the detached ones, because it has a connection again."""
        if self._detached.pop(session.connection_id, None) is not None:
            self._forget_detached_of(session)

    def on_detached(self, session: Session) -> None:
        """Add a session to the detached ones until it expires. It ends at once if sessions cannot be resumed."""
        if session.ended is not None:
            return
        if self._ttl <= 0:
            self.end(session, _expired(session))
            return
        session.until = monotonic() + self._ttl
        if self._budget.evicts:
            self._budget.detach(session)
        self._detached[session.connection_id] = session
        of_client = self.detached_by_client.setdefault(session.client_id, {})
        of_client[session.connection_id] = session
        if len(of_client) > MAX_DETACHED_PER_CLIENT:
            self._evict(next(iter(of_client.values())), max_detached_of_client=MAX_DETACHED_PER_CLIENT)
        while len(self._detached) > self._max_detached:
            self._evict(next(iter(self._detached.values())), max_detached_sessions=self._max_detached)
        self._arm()

    def end(self, session: Session, close_info: CloseInfo) -> None:
        """End a session. Does nothing if it has ended."""
        self.on_attached(session)
        if self._by_id.pop(session.connection_id, None) is None:
            return
        if self._of_instance.get((session.client_id, session.instance)) is session:
            del self._of_instance[session.client_id, session.instance]
        try:
            self._budget.remove(session)
            unacknowledged = session.finish(close_info)
            self._events.counters.messages_discarded += unacknowledged
            self._emit(
                session, "session_ended", logging.INFO, reason=close_info.cause.value, unacknowledged=unacknowledged
            )
            blocks_client = close_info.cause is DisconnectReason.APPLICATION and is_terminal(close_info.code)
            if blocks_client and (close_info.from_outside or close_info.code != SESSION_ENDED):
                # The close frame may be lost on a dead network.
                self._remember_end(session, close_info)
        finally:  # even after an error it must get no more messages and leave its rooms
            self.listener.on_session_ended(session, close_info)

    def _end_detached(self, session: Session, close_info: CloseInfo) -> None:
        if close_info.cause is DisconnectReason.MEMORY:
            self._events.counters.evictions += 1
            self._emit(session, "session_evicted", logging.WARNING, why="memory")
        elif close_info.cause is DisconnectReason.APPLICATION:
            self._remember_end(session, close_info)
        self.end(session, close_info)

    def _remember_end(self, session: Session, close_info: CloseInfo) -> None:
        for token in session.tokens:
            self._ended_by_application.add(token, session.client_id, close_info)

    def _evict(self, session: Session, **limit: int) -> None:
        self._emit(session, "session_evicted", logging.WARNING, **limit)
        self.end(session, _expired(session))

    def stop(self) -> list[Session]:
        """End all remaining sessions, as a shutdown does, and return them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        remaining = list(self._by_id.values())
        for session in remaining:
            self.end(session, local_close(DisconnectReason.SERVER_SHUTDOWN))
        return remaining

    def _forget_detached_of(self, session: Session) -> None:
        of_client = self.detached_by_client[session.client_id]
        del of_client[session.connection_id]
        if not of_client:
            del self.detached_by_client[session.client_id]

    def _emit(self, session: Session, event: str, level: int, **fields: Any) -> None:
        self._events.emit(event, level, client_id=session.client_id, session_id=session.connection_id, **fields)

    # ── expiry ──

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


def gap_reason(session: Session, epoch: int, seq: int) -> str | None:
    """Return why a client cannot get all messages after a number; `None` if it can.

    Args:
        session: Session of the client.
        epoch: Epoch of its token.
        seq: Number of the last message that the client has processed.
    """
    if epoch != session.epoch:
        return "epoch"  # its numbers may refer to other messages
    if seq > session.head:
        return "ahead"
    if seq + 1 < session.buffer.first_seq:
        return "overflow"
    return None


def _expired(session: Session) -> CloseInfo:
    """Return the close info of an expired session: that of its last connection."""
    close_info: CloseInfo | None = getattr(session.socket, "close_info", None)
    return close_info or local_close(DisconnectReason.SERVER_SHUTDOWN)
