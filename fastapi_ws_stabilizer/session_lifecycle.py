"""State that outlives a connection: saved at teardown and restored when the client reconnects.

A client of `stabilizer.v1.json` has a session, which gets messages while it is detached. A plain client may have a
reconnect token from the application, which restores its rooms and its user data.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, ends_session, is_terminal
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.errors import MemoryLimitExceededError, RoomLimitError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.sessions.detached import DetachedRecipients, DetachedState
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.reconnect_tokens import ReconnectTokenRegistry
from fastapi_ws_stabilizer.sessions.session import NO_PRESENCE, Session
from fastapi_ws_stabilizer.sessions.store import SessionListener
from fastapi_ws_stabilizer.sessions.v1_protocol import session_of
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.v1.frames import Message
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome


class SessionLifecycle(SessionListener):
    """Sessions and detached states of one node: what saves, restores and ends them.

    Args:
        config: Options of the manager.
        events: Event bus.
        hooks: The session end hooks.
        hub: The rooms of sessions and detached states.
        detached: The stores of both.
        tokens: The reconnect tokens of plain clients.
        budget: Memory budget that counts both.
        idempotency: Idempotency keys of the messages that an ended session leaves unread.

    Attributes:
        end_hooks: Tasks that run session end hooks, by client id, for clients with one.
        detached_states: Detached states of plain clients, by client id, for clients with one.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        hooks: HookRegistry,
        hub: Hub,
        detached: DetachedRecipients,
        tokens: ReconnectTokenRegistry,
        budget: MemoryBudget,
        idempotency: IdempotencyCache,
    ) -> None:
        self._events = events
        self._hooks = hooks
        self._hub = hub
        self._detached = detached
        self._sessions = detached.sessions
        self._states = detached.states
        self.detached_states: Mapping[str, object] = detached.states.by_client
        self._tokens = tokens
        self._budget = budget
        self._idempotency = idempotency
        self._end_hook_tasks = TaskSet(
            lambda _, error: events.emit_exception("internal_task_failed", error, task="ws-session-end")
        )
        self.end_hooks: dict[str, set[asyncio.Task[None]]] = {}
        self._end_hook_slots = asyncio.Semaphore(config.max_concurrent_cleanup)
        self._timer: asyncio.TimerHandle | None = None
        # Later hooks must not get the context variables of the connection that happens to close before them.
        self._context = contextvars.copy_context()
        self._sessions.listener = self

    # ── detaching ──

    def detach(self, connection: Connection) -> None:
        """Save the state of a closing connection if its client may resume, and remove the connection from the hub."""
        close_info = connection.close_info
        if (session := session_of(connection)) is not None:
            connection.attempt(self._hub.remove, connection)
            if close_info is None or not session.detach(connection):
                return  # another connection has taken the session over
            if ends_session(close_info) or not session.connect_hooks_passed:  # a resume would skip the connect hooks
                self._sessions.end(session, close_info)
            else:
                connection.attempt(self._leave_presence, session)
                self._sessions.on_detached(session)
            return
        key = None
        if self._tokens.in_use and (connection.connect_hooks_started or connection.inherited_state):
            key = self._tokens.resumable_key_of(connection.client_id, connection.connection_id)
        if key is not None and close_info is not None:
            if not ends_session(close_info):
                connection.attempt(self._save_state, connection, key)
            elif close_info.cause is DisconnectReason.APPLICATION and is_terminal(close_info.code):
                # The close frame may be lost if the network is down.
                connection.attempt(self._tokens.remember_end, key, connection.client_id, close_info)
        self._hub.remove(connection)

    def _save_state(self, connection: Connection, key: str) -> None:
        """Save the state that a plain client may restore with a token."""
        state = self._detached_state_of(connection)
        connection.session_end_reported = True  # the session ends later, with the state
        state.user_data.owner = state
        self._forget(self._states.save(key, state))
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
        if not self._states.discard(state):
            return
        if state.close_info is not None and state.close_info.cause is DisconnectReason.APPLICATION:
            self._tokens.remember_end(state.key, state.client_id, state.close_info)
        if state.close_info is None:
            self._events.counters.evictions += 1
            self._events.emit("session_evicted", logging.WARNING, client_id=state.socket.client_id, why="memory")
        self._forget([state])

    def forget(self, client_id: str) -> None:
        """Discard all detached states of a plain client, and expect it back with no earlier token."""
        discarded = self._states.discard_of(client_id)
        self._tokens.forget(client_id, [state.key for state in discarded])
        self._forget(discarded)

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
            if self._tokens.in_use:
                self._tokens.take_inherited(connection.connection_id)
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

    @contextmanager
    def pinned(self, client_id: str) -> Iterator[None]:
        """Protect the detached state of a verified client from eviction during its handshake."""
        with ExitStack() as stack:
            for state in self._states.all_of(client_id):
                stack.enter_context(self._budget.pinned(state))
            yield

    def verify_for_current_task(self, token: str) -> str:
        """Use up a token that your code got, and return its client id.

        It authorizes the next connection of the current task with that client id.

        Raises:
            InvalidTokenError: The token is invalid, or was used before.
            TokenExpiredError: The token has expired.
        """
        claims = self._tokens.consume(token)
        self._tokens.mark_verified(claims)
        for state in self._states.all_of(claims.client_id):
            self._budget.attach(state)  # evicted last, because the time until the connection is unknown
        return claims.client_id

    def restore_rooms(self, session: Session) -> None:
        """Make a resumed session present in its rooms again."""
        saved_presence, session.saved_presence = session.saved_presence, NO_PRESENCE
        self._hub.restore(session, saved_presence)

    def restore(self, connection: Connection, open_connections: Sequence[Connection]) -> None:
        """Restore the state of a plain client with a verified token.

        Args:
            connection: The new connection.
            open_connections: The open plain connections of the client. They are half-open and will be closed, but with
                `on_duplicate="allow"` they belong to other tabs and stay open.
        """
        self._forget(self._states.collect())
        state, since = self._claim_state(connection, open_connections)
        if state is None:
            connection.outcome = ResumeOutcome.LOST
            self._events.counters.sessions_lost += 1
            connection.emit("session_lost", logging.INFO, why="unknown")
            return
        connection.outcome = ResumeOutcome.GAP
        self._events.counters.sessions_resumed += 1
        self._restore_user_data(connection, state)
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

    def _claim_state(
        self, connection: Connection, open_connections: Sequence[Connection]
    ) -> tuple[DetachedState | None, float]:
        """Return the state that a connection restores, and the monotonic time since which messages may be lost.

        It is the detached state that the token names, else the newest one of the client, else that of an open
        connection. With `on_duplicate="allow"` an open connection keeps its state, and the new one gets a copy.
        """
        client_id, tokens = connection.client_id, self._tokens
        key = tokens.take_inherited(connection.connection_id)  # the key that the token names
        newest = self._states.of(client_id)
        state = self._states.claim(key) if key else None if newest is None else self._states.claim(newest.key)
        if state is not None:
            tokens.inherit(connection.connection_id, state.key)
            rooms = self._hub.take_rooms(state)
            state.rooms = {room: state.rooms.get(room, {}) for room in rooms}  # without rooms it was removed from
            self._budget.remove(state)
            connection.inherited_state = True
            if isinstance(state.socket._connection, Connection):
                connection.add_predecessor(state.socket._connection)
            return state, self._states.detached_at(state)
        same_key = (
            one for one in reversed(open_connections) if key in (None, tokens.key_of(client_id, one.connection_id))
        )
        last = next(same_key, None)
        if last is None:
            return None, 0.0
        if not tokens.has_own_keys:
            connection.inherited_state = last.session_end_reported = True  # the session continues
            connection.add_predecessor(last)
        return self._detached_state_of(last), last.liveness.last_seen

    @staticmethod
    def _restore_user_data(connection: Connection, state: DetachedState) -> None:
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

    def supersede_detached(self, client_id: str, session: Session | None) -> None:
        """End the detached states of a client, and its detached sessions except for `session`."""
        for detached in self._detached.of_client(client_id):
            if isinstance(detached, DetachedState):
                detached.close(DisconnectReason.REPLACED)
            elif detached is not session:
                self._sessions.supersede(detached)

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
        self.end_hooks.setdefault(client_id, set()).add(task)
        task.add_done_callback(lambda done: self._on_session_end_done(client_id, done), context=context)

    def _on_session_end_done(self, client_id: str, task: asyncio.Task[None]) -> None:
        running = self.end_hooks[client_id]
        running.discard(task)
        if not running:
            del self.end_hooks[client_id]

    async def wait_for_session_end_hooks(self, client_id: str) -> None:
        """Wait until no session end hook of this client is running. Each hook has a time limit. Cancelling is safe."""
        if running := self.end_hooks.get(client_id):
            await wait_for_all(list(running), None)

    async def _run_session_end_hooks(self, socket: StableSocket, reason: DisconnectReason | None) -> None:
        if isinstance(socket._connection, Connection):
            await socket._connection.wait_for_hooks()
        async with self._end_hook_slots:
            await self._hooks.session_end(socket, reason or DisconnectReason.SERVER_SHUTDOWN)

    def _arm(self) -> None:
        due = self._states.next_due()
        if due is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                max(0.0, due - monotonic()) + 0.01, self._on_timer, context=self._context
            )

    def _on_timer(self) -> None:
        self._timer = None
        self._forget(self._states.collect())
        self._tokens.expire()
        self._arm()

    async def stop(self, patience: float) -> None:
        """End all sessions and detached state, and wait at most `patience` seconds for the session end hooks.

        Then the remaining hooks are cancelled.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._sessions.stop()
        self._forget(self._states.clear())
        await wait_for_all(self._end_hook_tasks.tasks, patience)
        if cancelled := self._end_hook_tasks.cancel():
            self._events.emit("session_ends_cut", logging.WARNING, count=len(cancelled))
