"""State that outlives a connection: saved at teardown and restored when the client reconnects.

A client of `stabilizer.v1.json` has a session, which gets messages while it is detached. A plain client may have a
reconnect token from the application, which restores its rooms and its user data.
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
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import SessionListener, SessionStore
from fastapi_ws_stabilizer.sessions.v1_protocol import session_of
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.v1.frames import Message
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome

_proven: contextvars.ContextVar[TokenClaims | None] = contextvars.ContextVar("proven_claim", default=None)
"""Content of the token that the current task has verified with the manager."""


TOKEN_PARAMETERS: Final = ("reconnect_token", "token")
"""Query parameters that may contain a reconnect token.

A login may use `token` too, so a value without the prefix of a reconnect token is ignored.
"""


def token_in(websocket: WebSocket) -> str | None:
    """Return the reconnect token of a handshake, or `None`."""
    found = (websocket.query_params.get(name) for name in TOKEN_PARAMETERS)
    return next((token for token in found if looks_like_token(token)), None)


class SessionLifecycle(SessionListener):
    """Sessions and detached state of one node.

    Attributes:
        sessions: The store of sessions.
        detached: The store of the detached state of plain clients.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        hooks: HookRegistry,
        hub: Hub,
        sessions: SessionStore,
        detached: DetachedStateStore,
        tokens: ReconnectTokens,
        budget: MemoryBudget,
        idempotency: IdempotencyCache,
    ) -> None:
        self.sessions = sessions
        self.detached = detached
        self._events = events
        self._hooks = hooks
        self._hub = hub
        self._tokens = tokens
        self._budget = budget
        self._idempotency = idempotency
        self._enabled = config.enable_reconnect
        self._allows_duplicates = config.on_duplicate is DuplicatePolicy.ALLOW
        self._token_ttl = config.reconnect_token_ttl.total_seconds()
        self._token_keys: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        """Number of a token → key of the state of its connection, and monotonic time of the token's expiry."""
        self._inherited_keys: dict[str, str] = {}  # id of a connection → key that it inherited from an earlier one
        self._end_hook_tasks = TaskSet(
            lambda _, error: events.emit_exception("internal_task_failed", error, task="ws-session-end")
        )
        self._end_hooks_of_client: dict[str, set[asyncio.Task[None]]] = {}  # client id → running tasks
        self._end_hook_slots = asyncio.Semaphore(config.max_concurrent_cleanup)
        self._timer: asyncio.TimerHandle | None = None
        # Later hooks must not get the context variables of the connection that happens to close before them.
        self._context = contextvars.copy_context()
        self._ended_by_application = EndedSessions(config.session_ttl)
        sessions.listener = self

    # ── detaching ──

    def detach(self, connection: Connection) -> None:
        """Save the state of a closing connection if its client may resume, and remove the connection from the hub."""
        close_info = connection.close_info
        if (session := session_of(connection)) is not None:
            connection.attempt(self._hub.remove, connection)
            if close_info is None or not session.detach(connection):
                return  # another connection has taken the session over
            if ends_session(close_info) or not session.connect_hooks_passed:  # a resume would skip the connect hooks
                self.sessions.end(session, close_info)
            else:
                connection.attempt(self._leave_presence, session)
                self.sessions.on_detached(session)
            return
        expected = (
            close_info is not None
            and (connection.connect_hooks_started or connection.inherited_state)
            and self.detached.is_resumable(connection.client_id, self._key_of(connection))
        )
        if expected and close_info is not None and not ends_session(close_info):
            connection.attempt(self._save_state, connection)
        elif (
            expected
            and close_info is not None
            and close_info.cause is DisconnectReason.APPLICATION
            and is_terminal(close_info.code)
        ):
            # The close frame may be lost if the network is down.
            key = self._resumable_key(connection)
            connection.attempt(self._ended_by_application.add, key, connection.client_id, close_info)
        self._hub.remove(connection)

    def _save_state(self, connection: Connection) -> None:
        """Save the state that a plain client may restore with a token."""
        state = self._detached_state_of(connection)
        connection.session_end_reported = True  # the session ends later, with the state
        state.user_data.owner = state
        self._forget(self.detached.save(self._resumable_key(connection), state))
        self._budget.detach(state)
        self._arm()
        self._hub.keep_rooms(connection, state)

    def _leave_presence(self, session: Session) -> None:
        presence = self._hub.suspend(session)
        session.saved_presence = session.saved_presence or presence  # not restored yet if it closes early

    def _detached_state_of(self, connection: Connection) -> DetachedState:
        socket = connection.socket
        if socket._user_data is None:  # the socket of a closing connection would not account for a new dict
            socket._user_data = MeteredDict(self._budget, connection.account)
        return DetachedState(
            self._hub.presence_metadata(connection), socket._user_data, 0.0, socket, self._forget_early
        )

    def _forget_early(self, state: DetachedState) -> None:
        """Discard a detached state early, because of memory, a close, or a newer connection."""
        if not self.detached.discard(state):
            return
        if state.close_info is not None and state.close_info.cause is DisconnectReason.APPLICATION:
            self._ended_by_application.add(state.key, state.client_id, state.close_info)
        if state.close_info is None:
            self._events.counters.evictions += 1
            self._events.emit("session_evicted", logging.WARNING, client_id=state.socket.client_id, why="memory")
        self._forget([state])

    def ended_by_application(self, connection: Connection) -> CloseInfo | None:
        """Return the close info if the application ended the state that a plain client restores, else `None`."""
        key = self._inherited_keys.get(connection.connection_id, connection.client_id)
        return self._ended_by_application.find(key, connection.client_id)

    def forget(self, client_id: str) -> None:
        """Discard all detached state of a plain client."""
        self._forget(self.detached.discard_of(client_id))

    async def notify_session_end(self, connection: Connection) -> None:
        """Run the session end hooks after the disconnect hooks of a connection, if its session has ended."""
        close_info = connection.close_info
        if (session := session_of(connection)) is not None:
            close_info = session.ended
            if (
                close_info is None
                or session.previous_connection is not connection
                or not self._claim_end_report(session)
            ):
                return
        elif not (connection.connect_hooks_started or connection.inherited_state) or connection.session_end_reported:
            return
        connection.session_end_reported = True
        if close_info is not None:
            await self._hooks.session_end(connection.socket, close_info.cause)

    def on_closed(self, connection: Connection) -> None:
        """Detach the session from a closed connection, so that it does not keep objects of the server alive."""
        session = session_of(connection)
        if session is None:
            self._inherited_keys.pop(connection.connection_id, None)
            return
        if session.previous_connection is not connection:
            return  # another connection has taken the session over
        session.previous_connection = None
        if session.ended is not None:
            session.socket = None
        elif session.inbox is not None:
            connection.inbox = session.inbox.transfer()

    @staticmethod
    def _claim_end_report(session: Session) -> bool:
        """Return whether the session end hooks still have to run, and mark them as run."""
        if not session.connect_hooks_started or session.end_reported:
            return False
        session.end_reported = True
        return True

    def on_session_began(self, session: Session) -> None:
        """Add a new session to the recipients of broadcasts."""
        self._hub.begin_session(session, session.shard)

    def on_session_ended(self, session: Session, close_info: CloseInfo) -> None:
        """Clean up after a session that ended with its connection, or because its client did not resume."""
        if session.ended is not None and (rooms := self._hub.rooms.rooms_of(session)):
            session.ended = replace(session.ended, rooms=rooms)
        self._hub.end_session(session, session.shard)
        last = session.previous_connection
        if last is not None and (last.is_closed or close_info.cause is DisconnectReason.MEMORY):
            last.close_unread()  # otherwise the teardown of that connection does it, but memory is needed now
        elif last is not None:
            last.on_nonzero()
        if last is not None and last.hooks_done and self._claim_end_report(session):
            self._spawn_session_end(last.socket, close_info.cause)
        if last is None:
            self._discard_unread(session)
            socket, session.socket = session.socket, None  # the socket refers to the session
            if socket is not None and self._claim_end_report(session):
                self._spawn_session_end(socket, close_info.cause)

    def _discard_unread(self, session: Session) -> None:
        """Discard received messages of an ended session that no handler will read."""
        inbox = session.inbox
        if inbox is None:
            return
        for item in inbox.unread():
            if isinstance(item, Message) and item.key is not None:  # a repeat is then handled as a new message
                self._idempotency.fail(session.client_id, item.key)
        discarded = inbox.close(discard=True)
        self._events.counters.messages_discarded += discarded
        if discarded:
            fields: dict[str, Any] = {"client_id": session.client_id, "session_id": session.connection_id}
            self._events.emit("messages_discarded", logging.DEBUG, count=discarded, **fields)

    # ── resuming ──

    def issue_token(self, client_id: str, connection: Connection | None) -> str:
        """Issue a reconnect token for one connection of a client; without one, for the connection that closes last.

        Raises:
            ValueError: The client id is invalid.
            InvalidTokenError: `enable_reconnect` is False.
        """
        if not self._enabled:
            raise InvalidTokenError("disabled")
        token = self._tokens.issue(client_id)
        key = client_id if connection is None or session_of(connection) is not None else self._key_of(connection)
        self._ended_by_application.forget(key)  # a new token allows the client to return
        self.detached.mark_resumable(key, self._token_ttl)
        if key != client_id:
            self._token_keys[self._tokens.read(token).number] = key, monotonic() + self._token_ttl
            self._expire_token_keys()
        return token

    def _expire_token_keys(self) -> None:
        """Forget the keys of expired tokens, and the oldest keys above `MAX_EXPECTED`."""
        now = monotonic()
        while self._token_keys:
            number, (_, until) = next(iter(self._token_keys.items()))
            if until > now and len(self._token_keys) <= MAX_EXPECTED:
                break
            del self._token_keys[number]

    def _resumable_key(self, connection: Connection) -> str:
        """Return the key for the state of a connection: its own if a token names it, else the client id."""
        key = self._key_of(connection)
        return key if self.detached.is_resumable(key) else connection.client_id

    def _key_of(self, connection: Connection) -> str:
        """Return the key of a plain connection, inherited from the connection that it continues, if any."""
        if not self._allows_duplicates:
            return connection.client_id
        own = key_of_connection(connection.client_id, connection.connection_id)
        return self._inherited_keys.get(connection.connection_id, own)

    def verify_token(self, websocket: WebSocket, client_id: str | None) -> str | None:
        """Verify the reconnect token of a handshake, and return its client id, or `None`.

        With an invalid token the client connects as a new one.
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
        """Protect the detached state of a verified client from eviction during its handshake."""
        with ExitStack() as stack:
            for state in () if client_id is None else self.detached.all_of(client_id):
                stack.enter_context(self._budget.pinned(state))
            yield

    def consume_token(self, connection: Connection, client_id: str) -> bool:
        """Use up the token that `verify_token` accepted. Return False if it has since been used or revoked."""
        try:
            claim = self.consume(token_in(connection.websocket) or "", client_id)
        except (InvalidTokenError, TokenExpiredError) as problem:
            self._report_lost(client_id, problem)
            return False
        self._continue_from(connection, claim)
        return True

    def consume(self, token: str, client_id: str | None = None) -> TokenClaims:
        """Use up a token, and return its content.

        If the application ended the state of the token, the token restores nothing and is not used up. So each attempt
        gets the close code of the application.

        Args:
            token: The token that the client sent.
            client_id: The client that the token must belong to. By default any client.

        Raises:
            InvalidTokenError: The token is invalid, or was used before.
            TokenExpiredError: The token has expired.
        """
        claim = self._tokens.check(token, client_id)
        return claim if self._was_ended_by_application(claim) else self._tokens.consume(token, client_id)

    def _was_ended_by_application(self, claim: TokenClaims) -> bool:
        """Return whether the application ended the state that a token names."""
        key, _ = self._token_keys.get(claim.number, (claim.client_id, 0.0))
        return key in self._ended_by_application

    def _continue_from(self, connection: Connection, claim: TokenClaims) -> None:
        """Give a connection the key that its token names, if any."""
        key, _ = self._token_keys.get(claim.number, (None, 0.0))
        if key is not None:
            self._inherited_keys[connection.connection_id] = key
            if not self._was_ended_by_application(claim):
                del self._token_keys[claim.number]

    def _report_lost(self, client_id: str | None, problem: InvalidTokenError | TokenExpiredError) -> None:
        self._events.counters.sessions_lost += 1
        why = getattr(problem, "problem", "expired")
        self._events.emit("session_lost", logging.INFO, client_id=client_id or "", why=why)

    def restore(self, connection: Connection, open_connections: Sequence[Connection]) -> None:
        """Restore the state of a plain client with a verified token.

        Args:
            connection: The new connection.
            open_connections: The open plain connections of the client. They are half-open and will be closed, but with
                `on_duplicate="allow"` they belong to other tabs and stay open.
        """
        client_id = connection.client_id
        self._forget(self.detached.collect())
        key = self._inherited_keys.pop(connection.connection_id, None)  # the key that the token names
        newest = self.detached.of(client_id)
        state = self.detached.claim(key) if key else None if newest is None else self.detached.claim(newest.key)
        last = next((one for one in reversed(open_connections) if key is None or self._key_of(one) == key), None)
        if state is not None and self._allows_duplicates:
            self._inherited_keys[connection.connection_id] = state.key  # so that older tokens find its state later
        since = 0.0
        if state is not None:
            since = self.detached.detached_at(state)
            rooms = self._hub.take_rooms(state)
            state.rooms = {room: state.rooms.get(room, {}) for room in rooms}  # without rooms it was removed from
            self._budget.remove(state)
            connection.inherited_state = True
            if isinstance(state.socket._connection, Connection):
                connection.add_predecessor(state.socket._connection)
        elif last is not None and self._allows_duplicates:
            state = self._detached_state_of(last)
        elif last is not None:
            connection.inherited_state = last.session_end_reported = True  # the session continues
            connection.add_predecessor(last)
            state = self._detached_state_of(last)
            since = last.liveness.last_seen  # later messages may have been lost
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
                state.user_data.stop_accounting()
            connection.emit("user_data_lost", logging.WARNING, why=str(error))
        for room, presence in state.rooms.items():
            try:
                self._hub.join(connection, room, presence or None)
            except RoomLimitError:  # the limit has since been lowered
                self._hub.end_if_empty(room)
            except MemoryLimitExceededError as error:
                connection.emit("presence_metadata_lost", logging.WARNING, room=room, why=str(error))
                self._hub.join(connection, room, None)
        if connection.inherited_state:
            self._hub.record_missed_since(connection, state.rooms, since)

    def mark_verified(self, claim: TokenClaims) -> None:
        """Record that the current task has verified a token. It authorizes the next connection with that client id."""
        _proven.set(claim)
        for state in self.detached.all_of(claim.client_id):
            self._budget.attach(state)  # evicted last, because the time until the connection is unknown

    @staticmethod
    def is_verified(client_id: str) -> bool:
        """Return whether the current task has verified a token of a client that no connection has used yet."""
        claim = _proven.get()
        return claim is not None and claim.client_id == client_id

    def consume_verification(self, connection: Connection) -> bool:
        """Return whether the current task has verified a token for a connection. Each token authorizes one connection.

        Raises:
            InvalidTokenError: The token has since been revoked.
        """
        claim = _proven.get()
        if claim is None or claim.client_id != connection.client_id:
            return False
        _proven.set(None)
        self._tokens.check_not_revoked(claim)
        self._continue_from(connection, claim)
        return True

    # ── expiry ──

    def _forget(self, states: Sequence[DetachedState]) -> None:
        for state in states:
            self._budget.remove(state)
            state.user_data.stop_accounting()
            last: Connection = state.socket._connection
            if last.close_info is not None:  # the application may have removed it from rooms
                last.close_info = replace(last.close_info, rooms=self._hub.rooms.rooms_of(state))
            self._hub.leave_rooms(state)
            self._spawn_session_end(
                state.socket, state.socket.reason if state.close_info is None else state.close_info.cause
            )

    def _spawn_session_end(self, socket: StableSocket, reason: DisconnectReason | None) -> None:
        """Start a task for the session end hooks. At most `max_concurrent_cleanup` tasks run hooks at once."""
        context = self._context.copy()
        task = self._end_hook_tasks.spawn(
            self._run_session_end_hooks(socket, reason), name=f"ws-session-end-{socket.connection_id}", context=context
        )
        client_id = socket.client_id
        self._end_hooks_of_client.setdefault(client_id, set()).add(task)
        task.add_done_callback(lambda done: self._on_session_end_done(client_id, done), context=context)

    def _on_session_end_done(self, client_id: str, task: asyncio.Task[None]) -> None:
        running = self._end_hooks_of_client[client_id]
        running.discard(task)
        if not running:
            del self._end_hooks_of_client[client_id]

    async def wait_for_session_end_hooks(self, client_id: str) -> None:
        """Wait until no session end hook of this client is running. Each hook has a time limit. Cancelling is safe."""
        if running := self._end_hooks_of_client.get(client_id):
            await wait_for_all(list(running), None)

    async def _run_session_end_hooks(self, socket: StableSocket, reason: DisconnectReason | None) -> None:
        if isinstance(socket._connection, Connection):
            await socket._connection.wait_for_hooks()
        async with self._end_hook_slots:
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
        self._expire_token_keys()
        self._arm()

    async def stop(self, patience: float) -> None:
        """End all sessions and detached state, and wait at most `patience` seconds for the session end hooks.

        Then the remaining hooks are cancelled.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.sessions.stop()
        self._forget(self.detached.clear())
        await wait_for_all(self._end_hook_tasks.tasks, patience)
        if cancelled := self._end_hook_tasks.cancel():
            self._events.emit("session_ends_cut", logging.WARNING, count=len(cancelled))
