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

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, ends_session, is_terminal
from fastapi_ws_stabilizer.config import DuplicatePolicy, WebSocketConfig
from fastapi_ws_stabilizer.connection.ended import socket_after_end
from fastapi_ws_stabilizer.connection.inbox import Inbox
from fastapi_ws_stabilizer.connection.lifecycle import Connection
from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.errors import (
    InvalidTokenError,
    MemoryLimitExceededError,
    RoomLimitError,
    TokenExpiredError,
)
from fastapi_ws_stabilizer.hub.delivery import Hub
from fastapi_ws_stabilizer.limits.kept import MeteredDict
from fastapi_ws_stabilizer.limits.ledger import MemoryBudget
from fastapi_ws_stabilizer.reports import EventBus
from fastapi_ws_stabilizer.routing.hooks import HookRegistry
from fastapi_ws_stabilizer.sessions.ended import EndedSessions
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.left import MAX_EXPECTED, DetachedState, DetachedStateStore, key_of_connection
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome, Session
from fastapi_ws_stabilizer.sessions.store import SessionStore
from fastapi_ws_stabilizer.sessions.tokens import ReconnectTokens, TokenClaims, looks_like_token
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.v1 import Message

_proven: contextvars.ContextVar[TokenClaims | None] = contextvars.ContextVar("proven_claim", default=None)
"""What the token says that the current task has validated."""


TOKEN_PARAMETERS: Final = ("reconnect_token", "token")
"""Query parameters in which a reconnect token is looked for. `token` is also what a login may be called: what does not
begin as a reconnect token is left alone."""


def token_in(websocket: WebSocket) -> str | None:
    """The reconnect token of a handshake."""
    found = (websocket.query_params.get(name) for name in TOKEN_PARAMETERS)
    return next((token for token in found if looks_like_token(token)), None)


class Resumption:
    """Sessions and luggage of one manager on one event loop.

    Attributes:
        sessions: The sessions.
        luggage: What plain clients have left behind.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        reports: EventBus,
        hooks: HookRegistry,
        delivery: Hub[Connection],
        tokens: ReconnectTokens,
        ledger: MemoryBudget,
        seen: IdempotencyCache,
    ) -> None:
        self._reports = reports
        self._hooks = hooks
        self._delivery = delivery
        self._tokens = tokens
        self._ledger = ledger
        self._seen = seen
        self._enabled = config.enable_reconnect
        self._both_stay = config.on_duplicate is DuplicatePolicy.ALLOW
        self._token_ttl = config.reconnect_token_ttl.total_seconds()
        self._named: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        """Number of a token → key of what its connection leaves, and until when the token is good."""
        self._keys: dict[str, str] = {}  # id of a connection → key, where it goes on for another one
        self._ends = TaskSet(lambda _, error: reports.bug("internal_task_failed", error, task="ws-session-end"))
        self._ends_of: dict[str, set[asyncio.Task[None]]] = {}  # by client id, as long as they run
        self._slots = asyncio.Semaphore(config.max_concurrent_cleanup)
        self._timer: asyncio.TimerHandle | None = None
        # What is told later must not carry the context variables of the connection that happened to end before.
        self._context = contextvars.copy_context()
        self.sessions = SessionStore(
            config,
            reports,
            ledger,
            next_shard=delivery.registry.next_shard,
            began=delivery.begin_session,  # type: ignore[arg-type]  # a session is a member as a connection is
            ended=self._session_ended,
        )
        self._ended_by_application = EndedSessions(config.session_ttl)
        self.luggage = DetachedStateStore(
            config.session_ttl if config.enable_reconnect else 0.0, config.max_sessions_away
        )

    # ── going ──

    def left(self, connection: Connection) -> None:
        """A connection has begun to end: put away what may be wanted back, and take it out of everything."""
        how = connection.ending
        if connection.conversation is not None:
            connection.attempt(self._delivery.remove, connection)
            session = connection.conversation.session
            if how is None or not session.detach(connection):
                return  # another connection has taken it over
            if ends_session(how) or not session.admitted:  # else it would get in by coming back
                self.sessions.end(session, how)
            else:
                connection.attempt(self._leave_presence, session)
                self.sessions.left(session)
            return
        expected = (
            how is not None
            and (connection.begun or connection.inherits)
            and self.luggage.is_expected(connection.client_id, self._key_of(connection))
        )
        if expected and how is not None and not ends_session(how):
            connection.attempt(self._keep, connection)
        elif expected and how is not None and how.reason is DisconnectReason.APPLICATION and is_terminal(how.code):
            # The close frame may be lost with a network that is dead already.
            key = self._expected_as(connection)
            connection.attempt(self._ended_by_application.add, key, connection.client_id, how)
        self._delivery.remove(connection)

    def _keep(self, connection: Connection) -> None:
        """Keep what a plain client may come back for."""
        left = self._what_is_left(connection)
        connection.told_of_session_end = True  # it goes on for a while
        left.user_data.owner = left
        self._forget(self.luggage.leave(self._expected_as(connection), left))
        self._ledger.goes_away(left)
        self._arm()
        self._delivery.keep_rooms(connection, left)  # type: ignore[arg-type]  # it is a member as a session is

    def _leave_presence(self, session: Session) -> None:
        described = self._delivery.away(session)  # type: ignore[arg-type]
        session.left = session.left or described  # it may be over before it was back in its rooms

    def _what_is_left(self, connection: Connection) -> DetachedState:
        face = connection.face
        if face._user_data is None:  # it would be counted nowhere: the connection is over
            face._user_data = MeteredDict(self._ledger, connection)
        return DetachedState(self._delivery.described(connection), face._user_data, 0.0, face, self._forget_early)

    def _forget_early(self, left: DetachedState) -> None:
        """What a client has left is forgotten: room is needed, it was ended, or a new connection takes its place."""
        if not self.luggage.drop(left):
            return
        if left.ending is not None and left.ending.reason is DisconnectReason.APPLICATION:
            self._ended_by_application.add(left.key, left.client_id, left.ending)
        if left.ending is None:
            self._reports.totals.evictions += 1
            self._reports.tell("session_evicted", logging.WARNING, client_id=left.face.client_id, why="memory")
        self._forget([left])

    def away_of(self, client_id: str) -> list[Session | DetachedState]:
        """What there is of a client without a connection: sessions, and what is kept of its plain connections."""
        return [*self.sessions.away_of(client_id), *self.luggage.all_of(client_id)]

    def ended_by_application(self, connection: Connection) -> CloseInfo | None:
        """Return how the application has ended what a plain client with a token wants back; `None` if it has not."""
        key = self._keys.get(connection.connection_id, connection.client_id)
        return self._ended_by_application.find(key, connection.client_id)

    def forget(self, client_id: str) -> None:
        """Keep nothing of what a client has left."""
        self._forget(self.luggage.drop_of(client_id))

    async def session_over(self, connection: Connection) -> None:
        """The disconnect hooks of a connection have run: tell the hooks for the end of its session, if that is over."""
        how = connection.ending
        if connection.conversation is not None:
            session = connection.conversation.session
            how = session.over
            if how is None or session.predecessor is not connection or not self._is_news(session):
                return
        elif not (connection.begun or connection.inherits) or connection.told_of_session_end:
            return
        connection.told_of_session_end = True
        if how is not None:
            await self._hooks.session_end(connection.face, how.reason)

    def finished(self, connection: Connection) -> None:
        """Everything is done for a connection. What waits for its client's return holds nothing of the server's."""
        session = connection.session
        if session is None:
            for left in self.luggage.all_of(connection.client_id):
                if left.face is connection.face:
                    left.face = socket_after_end(connection.face)
            self._keys.pop(connection.connection_id, None)
            return
        if session.predecessor is not connection:
            return  # another connection has taken it over
        session.predecessor = None
        if session.over is not None:
            session.face = None
            return
        session.face = socket_after_end(connection.face)
        connection.inbox = session.inbox.hand_over()

    @staticmethod
    def _is_news(session: Session) -> bool:
        """Whether the end of a session is still to be told. After this it is told."""
        if not session.known or session.told:
            return False
        session.told = True
        return True

    def _session_ended(self, session: Session, how: CloseInfo) -> None:
        """A session is over: with its connection, or because its client has not come back."""
        if session.over is not None and (rooms := self._delivery.rooms.of(session)):  # type: ignore[arg-type]
            session.over = replace(session.over, rooms=rooms)
        self._delivery.end_session(session)  # type: ignore[arg-type]
        last: Connection | None = session.predecessor
        if last is not None and (last.is_finished or how.reason is DisconnectReason.MEMORY):
            last.close_unread()  # else the end of that connection does it; but room is wanted now
        elif last is not None:
            last.holds()
        if last is not None and last.hooks_done and self._is_news(session):
            self._tell_soon(last.face, how.reason)
        if last is None:
            self._discard_unread(session)
            face, session.face = session.face, None  # which knows the session
            if face is not None and self._is_news(session):
                self._tell_soon(face, how.reason)

    def _discard_unread(self, session: Session) -> None:
        """Throw away what the client of a session has sent and nobody will read any more."""
        inbox: Inbox | None = session.inbox
        if inbox is None:
            return
        for item in inbox.unread():
            if isinstance(item, Message) and item.key is not None:  # if it comes again, it is a new one
                self._seen.failed(session.client_id, item.key)
        discarded = inbox.close(discard=True)
        self._reports.totals.messages_discarded += discarded
        if discarded:
            facts: dict[str, Any] = {"client_id": session.client_id, "session_id": session.connection_id}
            self._reports.tell("messages_discarded", logging.DEBUG, count=discarded, **facts)

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
        self.luggage.expect(key, self._token_ttl)
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
        return key if self.luggage.is_expected(key) else connection.client_id

    def _key_of(self, connection: Connection) -> str:
        """The key under which what a plain connection leaves is kept: that of the connection that it goes on for."""
        if not self._both_stay:
            return connection.client_id
        own = key_of_connection(connection.client_id, connection.connection_id)
        return self._keys.get(connection.connection_id, own)

    def claim(self, websocket: WebSocket, client_id: str | None) -> str | None:
        """Read the reconnect token of a handshake: whose it is, if it is good; `None` if it has none.

        A token that is not good gets its client nothing, and costs it nothing either: it comes in as a new one.
        """
        token = token_in(websocket)
        if not self._enabled or token is None:
            return None
        try:
            claimed = self._tokens.check(token, client_id).client_id
        except (InvalidTokenError, TokenExpiredError) as problem:
            self._lost(client_id, problem)
            return None
        return claimed

    @contextmanager
    def sparing(self, client_id: str | None) -> Iterator[None]:
        """Let nothing that a client has left go for others meanwhile: it has proven who it is, and is on its way."""
        with ExitStack() as stack:
            for left in () if client_id is None else self.luggage.all_of(client_id):
                stack.enter_context(self._ledger.sparing(left))
            yield

    def redeem(self, connection: Connection, client_id: str) -> bool:
        """Use the token up that `claim` has found good; `False` if somebody else was quicker."""
        try:
            claim = self.use(token_in(connection.websocket) or "", client_id)
        except (InvalidTokenError, TokenExpiredError) as problem:
            self._lost(client_id, problem)
            return False
        self._goes_on_for(connection, claim)
        return True

    def use(self, token: str, client_id: str | None = None) -> TokenClaims:
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
        return claim if self._is_sent_away(claim) else self._tokens.use(token, client_id)

    def _is_sent_away(self, claim: TokenClaims) -> bool:
        """Whether the application has ended what a token names."""
        key, _ = self._named.get(claim.number, (claim.client_id, 0.0))
        return key in self._ended_by_application

    def _goes_on_for(self, connection: Connection, claim: TokenClaims) -> None:
        """A connection has presented a token: what that names is what it wants back."""
        key, _ = self._named.get(claim.number, (None, 0.0))
        if key is not None:
            self._keys[connection.connection_id] = key
            if not self._is_sent_away(claim):
                del self._named[claim.number]

    def _lost(self, client_id: str | None, problem: InvalidTokenError | TokenExpiredError) -> None:
        self._reports.totals.sessions_lost += 1
        why = getattr(problem, "problem", "expired")
        self._reports.tell("session_lost", logging.INFO, client_id=client_id or "", why=why)

    def restore(self, connection: Connection, open_ones: Sequence[Connection]) -> None:
        """Give a plain client that has proven who it was what it had.

        Args:
            connection: Its new connection.
            open_ones: Others of it that are open: they are half-open, and go; or other tabs', and stay.
        """
        client_id = connection.client_id
        self._forget(self.luggage.collect())
        key = self._keys.pop(connection.connection_id, None)  # what its token names
        newest = self.luggage.of(client_id)
        left = self.luggage.take(key) if key else None if newest is None else self.luggage.take(newest.key)
        last = next((one for one in reversed(open_ones) if key is None or self._key_of(one) == key), None)
        if left is not None and self._both_stay:
            self._keys[connection.connection_id] = left.key  # so that what is left later is found by older tokens too
        since = 0.0
        if left is not None:
            since = self.luggage.left_at(left)
            rooms = self._delivery.take_rooms(left)  # type: ignore[arg-type]
            left.rooms = {room: left.rooms.get(room, {}) for room in rooms}  # it may have been taken out of some
            self._ledger.leave(left)
            connection.inherits = True
            connection.follow(left.face._connection)
        elif last is not None and self._both_stay:
            left = self._what_is_left(last)
        elif last is not None:
            connection.inherits = last.told_of_session_end = True  # it goes on
            connection.follow(last)
            left = self._what_is_left(last)
            since = last.pulse.last_seen  # what was sent after that may have been lost
        if left is None:
            connection.restored = ResumeOutcome.LOST
            self._reports.totals.sessions_lost += 1
            connection.tell("session_lost", logging.INFO, why="unknown")
            return
        connection.restored = ResumeOutcome.GAP
        self._reports.totals.sessions_resumed += 1
        try:
            if connection.inherits:
                connection.face._inherit(left.user_data)
                connection.holds()
            else:
                connection.face._copy(left.user_data)
        except MemoryLimitExceededError as error:
            if connection.inherits:
                left.user_data.let_go()
            connection.tell("user_data_lost", logging.WARNING, why=str(error))
        for room, described in left.rooms.items():
            try:
                self._delivery.join(connection, room, described or None)
            except RoomLimitError:  # the limit was lowered meanwhile
                self._delivery.end_if_empty(room)
            except MemoryLimitExceededError as error:
                connection.tell("presence_metadata_lost", logging.WARNING, room=room, why=str(error))
                self._delivery.join(connection, room, None)
        if connection.inherits:
            self._delivery.has_missed(connection, left.rooms, since)

    def prove(self, claim: TokenClaims) -> None:
        """The current task has validated a token of a client: what it connects under that id is that client."""
        _proven.set(claim)
        for left in self.luggage.all_of(claim.client_id):  # it is not known when it connects: it is the last that goes
            self._ledger.enter(left)

    @staticmethod
    def has_proof(client_id: str) -> bool:
        """Whether the current task has validated a token of a client, and that has proven nothing yet."""
        claim = _proven.get()
        return claim is not None and claim.client_id == client_id

    def take_proof(self, connection: Connection) -> bool:
        """Whether the current task has validated a token of a connection's client. It proves one connection.

        Raises:
            InvalidTokenError: It was revoked since.
        """
        claim = _proven.get()
        if claim is None or claim.client_id != connection.client_id:
            return False
        _proven.set(None)
        self._tokens.check_right(claim)
        self._goes_on_for(connection, claim)
        return True

    # ── time ──

    def _forget(self, gone: Sequence[DetachedState]) -> None:
        for left in gone:
            self._ledger.leave(left)
            left.user_data.let_go()
            last: Connection = left.face._connection
            if last.ending is not None:  # it may have been taken out of rooms since
                last.ending = replace(last.ending, rooms=self._delivery.rooms.of(left))  # type: ignore[arg-type]
            self._delivery.leave_rooms(left)  # type: ignore[arg-type]
            self._tell_soon(left.face, left.face.reason if left.ending is None else left.ending.reason)

    def _tell_soon(self, face: StableSocket, reason: DisconnectReason | None) -> None:
        """Tell the hooks for the end of a session, a few at a time."""
        context = self._context.copy()
        task = self._ends.spawn(self._tell(face, reason), name=f"ws-session-end-{face.connection_id}", context=context)
        client_id = face.client_id
        self._ends_of.setdefault(client_id, set()).add(task)
        task.add_done_callback(lambda done: self._told(client_id, done), context=context)

    def _told(self, client_id: str, task: asyncio.Task[None]) -> None:
        running = self._ends_of[client_id]
        running.discard(task)
        if not running:
            del self._ends_of[client_id]

    async def wait_for_ends_of(self, client_id: str) -> None:
        """Wait until no hook for the end of a session of this client runs; each is bounded. Cancelling is safe."""
        if running := self._ends_of.get(client_id):
            await wait_for_all(list(running), None)

    async def _tell(self, face: StableSocket, reason: DisconnectReason | None) -> None:
        await face._connection.wait_for_hooks()
        async with self._slots:
            await self._hooks.session_end(face, reason or DisconnectReason.SERVER_SHUTDOWN)

    def _arm(self) -> None:
        due = self.luggage.next_due()
        if due is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                max(0.0, due - monotonic()) + 0.01, self._on_timer, context=self._context
            )

    def _on_timer(self) -> None:
        self._timer = None
        self._forget(self.luggage.collect())
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
        self._forget(self.luggage.clear())
        await wait_for_all(self._ends.tasks, patience)
        if untold := self._ends.cancel():
            self._reports.tell("session_ends_cut", logging.WARNING, count=len(untold))
