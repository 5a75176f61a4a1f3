"""What outlives a connection, put away when it ends and given back when its client returns.

A client of `stabilizer.v1.json` has a session, which gets messages while it is away. A plain client has a reconnect
token, if the application gave it one, and gets its rooms and its user data back for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final

from fastapi import WebSocket

from fastapi_ws_stabilizer.auth.signed_tokens import ReconnectTokens, TokenClaims, looks_like_token
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, ends_session, is_terminal
from fastapi_ws_stabilizer.config import DuplicatePolicy, WebSocketConfig
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.inbox import Inbox
from fastapi_ws_stabilizer.ended_socket import socket_after_end
from fastapi_ws_stabilizer.errors import (
    InvalidTokenError,
    MemoryLimitExceededError,
    RoomLimitError,
    TokenExpiredError,
)
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.sessions.detached import MAX_EXPECTED, DetachedState, DetachedStateStore, key_of_connection
from fastapi_ws_stabilizer.sessions.ended_sessions import EndedSessions
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome, Session
from fastapi_ws_stabilizer.sessions.store import SessionStore
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.v1.frames import Message

_proven: contextvars.ContextVar[TokenClaims | None] = contextvars.ContextVar("proven_claim", default=None)
"""What the token says that the current task has validated."""


TOKEN_PARAMETERS: Final = ("reconnect_token", "token")
"""Query parameters in which a reconnect token is looked for. `token` is also what a login may be called: what does not
begin as a reconnect token is left alone."""


def token_in(websocket: WebSocket) -> str | None:
    """The reconnect token of a handshake."""
    found = (websocket.query_params.get(name) for name in TOKEN_PARAMETERS)
    return next((token for token in found if looks_like_token(token)), None)


class SessionLifecycle:
    """Sessions and luggage of one manager on one event loop.

    Attributes:
        sessions: The sessions.
        detached: What plain clients have left behind.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        hooks: HookRegistry,
        hub: Hub[Connection],
        tokens: ReconnectTokens,
        budget: MemoryBudget,
        seen: IdempotencyCache,
    ) -> None:
        self._events = events
        self._hooks = hooks
        self._hub = hub
        self._tokens = tokens
        self._budget = budget
        self._idempotency = seen
        self._enabled = config.enable_reconnect
        self._both_stay = config.on_duplicate is DuplicatePolicy.ALLOW
        self._token_ttl = config.reconnect_token_ttl.total_seconds()
        self._named: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        """Number of a token → key of what its connection leaves, and until when the token is good."""
        self._keys: dict[str, str] = {}  # id of a connection → key, where it goes on for another one
        self._ends = TaskSet(
            lambda _, error: events.emit_exception("internal_task_failed", error, task="ws-session-end")
        )
        self._ends_of: dict[str, set[asyncio.Task[None]]] = {}  # by client id, as long as they run
        self._slots = asyncio.Semaphore(config.max_concurrent_cleanup)
        self._timer: asyncio.TimerHandle | None = None
        # What is told later must not carry the context variables of the connection that happened to end before.
        self._context = contextvars.copy_context()
        self.sessions = SessionStore(
            config,
            events,
            budget,
            next_shard=hub.registry.next_shard,
            began=hub.begin_session,  # type: ignore[arg-type]  # a session is a member as a connection is
            ended=self._session_ended,
        )
        self._ended_by_application = EndedSessions(config.session_ttl)
        self.detached = DetachedStateStore(
            config.session_ttl if config.enable_reconnect else 0.0, config.max_detached_sessions
        )

    # ── going ──

    def detach(self, connection: Connection) -> None:
        """A connection has begun to end: put away what may be wanted back, and take it out of everything."""
        how = connection.close_info
        if connection.protocol is not None:
            connection.attempt(self._hub.remove, connection)
            session = connection.protocol.session
            if how is None or not session.detach(connection):
                return  # another connection has taken it over
            if ends_session(how) or not session.connect_hooks_passed:  # else it would get in by coming back
                self.sessions.end(session, how)
            else:
                connection.attempt(self._leave_presence, session)
                self.sessions.on_detached(session)
            return
        expected = (
            how is not None
            and (connection.connect_hooks_started or connection.inherited_state)
            and self.detached.is_resumable(connection.client_id, self._key_of(connection))
        )
        if expected and how is not None and not ends_session(how):
            connection.attempt(self._save_state, connection)
        elif expected and how is not None and how.cause is DisconnectReason.APPLICATION and is_terminal(how.code):
            # The close frame may be lost with a network that is dead already.
            key = self._expected_as(connection)
            connection.attempt(self._ended_by_application.add, key, connection.client_id, how)
        self._hub.remove(connection)

    def _save_state(self, connection: Connection) -> None:
        """Keep what a plain client may come back for."""
        state = self._detached_state_of(connection)
        connection.session_end_reported = True  # it goes on for a while
        state.user_data.owner = state
        self._forget(self.detached.save(self._expected_as(connection), state))
        self._budget.detach(state)
        self._arm()
        self._hub.keep_rooms(connection, state)  # type: ignore[arg-type]  # it is a member as a session is

    def _leave_presence(self, session: Session) -> None:
        described = self._hub.suspend(session)  # type: ignore[arg-type]
        session.saved_presence = session.saved_presence or described  # it may be over before it was back in its rooms

    def _detached_state_of(self, connection: Connection) -> DetachedState:
        socket = connection.socket
        if socket._user_data is None:  # it would be counted nowhere: the connection is over
            socket._user_data = MeteredDict(self._budget, connection)
        return DetachedState(
            self._hub.presence_metadata(connection), socket._user_data, 0.0, socket, self._forget_early
        )

    def _forget_early(self, state: DetachedState) -> None:
        """What a client has left is forgotten: room is needed, it was ended, or a new connection takes its place."""
        if not self.detached.discard(state):
            return
        if state.close_info is not None and state.close_info.cause is DisconnectReason.APPLICATION:
            self._ended_by_application.add(state.key, state.client_id, state.close_info)
        if state.close_info is None:
            self._events.counters.evictions += 1
            self._events.emit("session_evicted", logging.WARNING, client_id=state.socket.client_id, why="memory")
        self._forget([state])

    def detached_of(self, client_id: str) -> list[Session | DetachedState]:
        """What there is of a client without a connection: sessions, and what is kept of its plain connections."""
        return [*self.sessions.detached_of(client_id), *self.detached.all_of(client_id)]

    def ended_by_application(self, connection: Connection) -> CloseInfo | None:
        """Return how the application has ended what a plain client with a token wants back; `None` if it has not."""
        key = self._keys.get(connection.connection_id, connection.client_id)
        return self._ended_by_application.find(key, connection.client_id)

    def forget(self, client_id: str) -> None:
        """Keep nothing of what a client has left."""
        self._forget(self.detached.discard_of(client_id))

    async def notify_session_end(self, connection: Connection) -> None:
        """The disconnect hooks of a connection have run: tell the hooks for the end of its session, if that is over."""
        how = connection.close_info
        if connection.protocol is not None:
            session = connection.protocol.session
            how = session.ended
            if how is None or session.previous_connection is not connection or not self._claim_end_report(session):
                return
        elif not (connection.connect_hooks_started or connection.inherited_state) or connection.session_end_reported:
            return
        connection.session_end_reported = True
        if how is not None:
            await self._hooks.session_end(connection.socket, how.cause)

    def on_closed(self, connection: Connection) -> None:
        """Everything is done for a connection. What waits for its client's return holds nothing of the server's."""
        session = connection.session
        if session is None:
            for state in self.detached.all_of(connection.client_id):
                if state.socket is connection.socket:
                    state.socket = socket_after_end(connection.socket)
            self._keys.pop(connection.connection_id, None)
            return
        if session.previous_connection is not connection:
            return  # another connection has taken it over
        session.previous_connection = None
        if session.ended is not None:
            session.socket = None
            return
        session.socket = socket_after_end(connection.socket)
        connection.inbox = session.inbox.transfer()

    @staticmethod
    def _claim_end_report(session: Session) -> bool:
        """Whether the end of a session is still to be told. After this it is told."""
        if not session.connect_hooks_started or session.end_reported:
            return False
        session.end_reported = True
        return True

    def _session_ended(self, session: Session, how: CloseInfo) -> None:
        """A session is over: with its connection, or because its client has not come back."""
        if session.ended is not None and (rooms := self._hub.rooms.rooms_of(session)):  # type: ignore[arg-type]
            session.ended = replace(session.ended, rooms=rooms)
        self._hub.end_session(session)  # type: ignore[arg-type]
        last: Connection | None = session.previous_connection
        if last is not None and (last.is_finished or how.cause is DisconnectReason.MEMORY):
            last.close_unread()  # else the end of that connection does it; but room is wanted now
        elif last is not None:
            last.on_nonzero()
        if last is not None and last.hooks_done and self._claim_end_report(session):
            self._spawn_session_end(last.socket, how.cause)
        if last is None:
            self._discard_unread(session)
            socket, session.socket = session.socket, None  # which knows the session
            if socket is not None and self._claim_end_report(session):
                self._spawn_session_end(socket, how.cause)

    def _discard_unread(self, session: Session) -> None:
        """Throw away what the client of a session has sent and nobody will read any more."""
        inbox: Inbox | None = session.inbox
        if inbox is None:
            return
        for item in inbox.unread():
            if isinstance(item, Message) and item.key is not None:  # if it comes again, it is a new one
                self._idempotency.failed(session.client_id, item.key)
        discarded = inbox.close(discard=True)
        self._events.counters.messages_discarded += discarded
        if discarded:
            fields: dict[str, Any] = {"client_id": session.client_id, "session_id": session.connection_id}
            self._events.emit("messages_discarded", logging.DEBUG, count=discarded, **fields)

    # ── coming back ──

    def issue_token(self, client_id: str, connection: Connection | None) -> str:
        """Make a reconnect token for one connection of a client; for whichever it leaves last, without a connection.

        Raises:
            ValueError: No client can be called so.
            InvalidTokenError: `enable_reconnect` is False.
        """
        if not self._enabled:
            raise InvalidTokenError("disabled")
        token = self._tokens.issue(client_id)
        key = client_id if connection is None or connection.session is not None else self._key_of(connection)
        self._ended_by_application.forget(key)  # the application wants it back
        self.detached.mark_resumable(key, self._token_ttl)
        if key != client_id:
            self._named[self._tokens.read(token).number] = key, monotonic() + self._token_ttl
            self._forget_names()
        return token

    def _forget_names(self) -> None:
        """Forget what the tokens name that are not good any more."""
        now = monotonic()
        while self._named:
            number, (_, until) = next(iter(self._named.items()))
            if until > now and len(self._named) <= MAX_EXPECTED:
                break
            del self._named[number]

    def _expected_as(self, connection: Connection) -> str:
        """The key under which a connection's things are kept: its own if a token names it, else that of its client."""
        key = self._key_of(connection)
        return key if self.detached.is_resumable(key) else connection.client_id

    def _key_of(self, connection: Connection) -> str:
        """The key under which what a plain connection leaves is kept: that of the connection that it goes on for."""
        if not self._both_stay:
            return connection.client_id
        own = key_of_connection(connection.client_id, connection.connection_id)
        return self._keys.get(connection.connection_id, own)

    def verify_token(self, websocket: WebSocket, client_id: str | None) -> str | None:
        """Read the reconnect token of a handshake: whose it is, if it is good; `None` if it has none.

        A token that is not good gets its client nothing, and costs it nothing either: it comes in as a new one.
        """
        token = token_in(websocket)
        if not self._enabled or token is None:
            return None
        try:
            claimed = self._tokens.check(token, client_id).client_id
        except (InvalidTokenError, TokenExpiredError) as problem:
            self._report_lost(client_id, problem)
            return None
        return claimed

    @contextmanager
    def pinned(self, client_id: str | None) -> Iterator[None]:
        """Let nothing that a client has left go for others meanwhile: it has proven who it is, and is on its way."""
        with ExitStack() as stack:
            for state in () if client_id is None else self.detached.all_of(client_id):
                stack.enter_context(self._budget.pinned(state))
            yield

    def consume_token(self, connection: Connection, client_id: str) -> bool:
        """Use the token up that `claim` has found good; `False` if somebody else was quicker."""
        try:
            claim = self.consume(token_in(connection.websocket) or "", client_id)
        except (InvalidTokenError, TokenExpiredError) as problem:
            self._report_lost(client_id, problem)
            return False
        self._continue_from(connection, claim)
        return True

    def consume(self, token: str, client_id: str | None = None) -> TokenClaims:
        """Use a token up, and return what it says.

        The token of a client that the application has sent away gets it nothing, and stays: each dial is told.

        Args:
            token: What the client sent.
            client_id: Whose it must be; anybody's when left out.

        Raises:
            InvalidTokenError: It is not good, or was used before.
            TokenExpiredError: Its time is over.
        """
        claim = self._tokens.check(token, client_id)
        return claim if self._was_ended_by_application(claim) else self._tokens.consume(token, client_id)

    def _was_ended_by_application(self, claim: TokenClaims) -> bool:
        """Whether the application has ended what a token names."""
        key, _ = self._named.get(claim.number, (claim.client_id, 0.0))
        return key in self._ended_by_application

    def _continue_from(self, connection: Connection, claim: TokenClaims) -> None:
        """A connection has presented a token: what that names is what it wants back."""
        key, _ = self._named.get(claim.number, (None, 0.0))
        if key is not None:
            self._keys[connection.connection_id] = key
            if not self._was_ended_by_application(claim):
                del self._named[claim.number]

    def _report_lost(self, client_id: str | None, problem: InvalidTokenError | TokenExpiredError) -> None:
        self._events.counters.sessions_lost += 1
        why = getattr(problem, "problem", "expired")
        self._events.emit("session_lost", logging.INFO, client_id=client_id or "", why=why)

    def restore(self, connection: Connection, open_ones: Sequence[Connection]) -> None:
        """Give a plain client that has proven who it was what it had.

        Args:
            connection: Its new connection.
            open_ones: Others of it that are open: they are half-open, and go; or other tabs', and stay.
        """
        client_id = connection.client_id
        self._forget(self.detached.collect())
        key = self._keys.pop(connection.connection_id, None)  # what its token names
        newest = self.detached.of(client_id)
        state = self.detached.claim(key) if key else None if newest is None else self.detached.claim(newest.key)
        last = next((one for one in reversed(open_ones) if key is None or self._key_of(one) == key), None)
        if state is not None and self._both_stay:
            self._keys[connection.connection_id] = state.key  # so that what is left later is found by older tokens too
        since = 0.0
        if state is not None:
            since = self.detached.detached_at(state)
            rooms = self._hub.take_rooms(state)  # type: ignore[arg-type]
            state.rooms = {room: state.rooms.get(room, {}) for room in rooms}  # it may have been taken out of some
            self._budget.remove(state)
            connection.inherited_state = True
            connection.follow(state.socket._connection)
        elif last is not None and self._both_stay:
            state = self._detached_state_of(last)
        elif last is not None:
            connection.inherited_state = last.session_end_reported = True  # it goes on
            connection.follow(last)
            state = self._detached_state_of(last)
            since = last.liveness.last_seen  # what was sent after that may have been lost
        if state is None:
            connection.resume_outcome = ResumeOutcome.LOST
            self._events.counters.sessions_lost += 1
            connection.emit("session_lost", logging.INFO, why="unknown")
            return
        connection.resume_outcome = ResumeOutcome.GAP
        self._events.counters.sessions_resumed += 1
        try:
            if connection.inherited_state:
                connection.socket._transfer_user_data(state.user_data)
                connection.on_nonzero()
            else:
                connection.socket._copy_user_data(state.user_data)
        except MemoryLimitExceededError as error:
            if connection.inherited_state:
                state.user_data.detach()
            connection.emit("user_data_lost", logging.WARNING, why=str(error))
        for room, described in state.rooms.items():
            try:
                self._hub.join(connection, room, described or None)
            except RoomLimitError:  # the limit was lowered meanwhile
                self._hub.end_if_empty(room)
            except MemoryLimitExceededError as error:
                connection.emit("presence_metadata_lost", logging.WARNING, room=room, why=str(error))
                self._hub.join(connection, room, None)
        if connection.inherited_state:
            self._hub.record_missed_since(connection, state.rooms, since)

    def mark_verified(self, claim: TokenClaims) -> None:
        """The current task has validated a token of a client: what it connects under that id is that client."""
        _proven.set(claim)
        for state in self.detached.all_of(
            claim.client_id
        ):  # it is not known when it connects: it is the last that goes
            self._budget.attach(state)

    @staticmethod
    def is_verified(client_id: str) -> bool:
        """Whether the current task has validated a token of a client, and that has proven nothing yet."""
        claim = _proven.get()
        return claim is not None and claim.client_id == client_id

    def consume_verification(self, connection: Connection) -> bool:
        """Whether the current task has validated a token of a connection's client. It proves one connection.

        Raises:
            InvalidTokenError: It was revoked since.
        """
        claim = _proven.get()
        if claim is None or claim.client_id != connection.client_id:
            return False
        _proven.set(None)
        self._tokens.check_not_revoked(claim)
        self._continue_from(connection, claim)
        return True

    # ── time ──

    def _forget(self, gone: Sequence[DetachedState]) -> None:
        for state in gone:
            self._budget.remove(state)
            state.user_data.detach()
            last: Connection = state.socket._connection
            if last.close_info is not None:  # it may have been taken out of rooms since
                last.close_info = replace(last.close_info, rooms=self._hub.rooms.rooms_of(state))  # type: ignore[arg-type]
            self._hub.leave_rooms(state)  # type: ignore[arg-type]
            self._spawn_session_end(
                state.socket, state.socket.reason if state.close_info is None else state.close_info.cause
            )

    def _spawn_session_end(self, socket: StableSocket, reason: DisconnectReason | None) -> None:
        """Tell the hooks for the end of a session, a few at a time."""
        context = self._context.copy()
        task = self._ends.spawn(
            self._run_session_end_hooks(socket, reason), name=f"ws-session-end-{socket.connection_id}", context=context
        )
        client_id = socket.client_id
        self._ends_of.setdefault(client_id, set()).add(task)
        task.add_done_callback(lambda done: self._on_session_end_done(client_id, done), context=context)

    def _on_session_end_done(self, client_id: str, task: asyncio.Task[None]) -> None:
        running = self._ends_of[client_id]
        running.discard(task)
        if not running:
            del self._ends_of[client_id]

    async def wait_for_ends_of(self, client_id: str) -> None:
        """Wait until no hook for the end of a session of this client runs; each is bounded. Cancelling is safe."""
        if running := self._ends_of.get(client_id):
            await wait_for_all(list(running), None)

    async def _run_session_end_hooks(self, socket: StableSocket, reason: DisconnectReason | None) -> None:
        await socket._connection.wait_for_hooks()
        async with self._slots:
            await self._hooks.session_end(socket, reason or DisconnectReason.SERVER_SHUTDOWN)

    def _arm(self) -> None:
        due = self.detached.next_due()
        if due is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                max(0.0, due - monotonic()) + 0.01, self._on_timer, context=self._context
            )

    def _on_timer(self) -> None:
        self._timer = None
        self._forget(self.detached.collect())
        self._forget_names()
        self._arm()

    async def stop(self, patience: float) -> None:
        """Everything is over. Wait for the hooks that hear of it, as long as that.

        What is left of them is cancelled.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.sessions.stop()
        self._forget(self.detached.clear())
        await wait_for_all(self._ends.tasks, patience)
        if untold := self._ends.cancel():
            self._events.emit("session_ends_cut", logging.WARNING, count=len(untold))
