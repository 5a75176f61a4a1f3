"""From a handshake to an open connection, by a dependency and by hand."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException, WebSocket, WebSocketException
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, DisconnectReason
from fastapi_ws_stabilizer.config import CompressionMode, DuplicatePolicy
from fastapi_ws_stabilizer.connection.conversation import V1Protocol
from fastapi_ws_stabilizer.connection.credential import CredentialExpiry
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask, close_info_for, find_exit_stack, is_bug
from fastapi_ws_stabilizer.connection.lifecycle import Connection
from fastapi_ws_stabilizer.connection.socket import Services, StableSocket
from fastapi_ws_stabilizer.errors import (
    ConnectionLimitExceededError,
    DuplicateClientError,
    InvalidTokenError,
    MemoryLimitExceededError,
    OriginNotAllowedError,
    ShutdownError,
    SocketClosed,
)
from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from fastapi_ws_stabilizer.limits.admission import Reservation
from fastapi_ws_stabilizer.routing import own
from fastapi_ws_stabilizer.routing.app_handlers import handler_for_endpoint
from fastapi_ws_stabilizer.routing.door import Handshake
from fastapi_ws_stabilizer.routing.greeting import HelloReader
from fastapi_ws_stabilizer.routing.identity import fresh_client_id
from fastapi_ws_stabilizer.routing.leaving import Leaving
from fastapi_ws_stabilizer.servers.link import has_direct_transport
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.left import DetachedState
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome, Session
from fastapi_ws_stabilizer.sessions.store import SessionStore
from fastapi_ws_stabilizer.tasks import copied
from fastapi_ws_stabilizer.wire.handshake import HEADERS_KEY, check_headers


class Opening(Leaving, Services):
    """Opens connections: asks the hooks, finds the session, registers, replaces what was there before."""

    _reception: HelloReader
    _seen: IdempotencyCache
    _told_of_server: bool
    sessions: SessionStore
    registry: ConnectionRegistry[Connection]
    closing: bool

    async def open_by_dependency(
        self,
        visitor: Handshake,
        client_id: str | None,
        *,
        identity: Any,
        good_for: float | None,
        control_frames: bool,
    ) -> Connection:
        """Run the handshake hooks, accept, register, run the connect hooks.

        Args:
            visitor: Who has knocked.
            client_id: Whose it is; `None` if the client has not said so.
            identity: What the identity dependency returned.
            good_for: For how many seconds that is good; for ever when left out.
            control_frames: Whether text pings and pongs are answered and kept from the endpoint.

        Raises:
            WebSocketException: The connection is over already; Starlette's handler for it has nothing left to do.
            HTTPException: A handshake hook refused, or failed (500).
            ShutdownError: The manager was shut down meanwhile.
            ConnectionLimitExceededError: There is no room.
        """
        websocket, numbered = visitor.websocket, visitor.numbered
        until = None if good_for is None else monotonic() + good_for
        self.ledger.begin()
        claimed = None if numbered else self.resumption.claim(websocket, client_id)
        who = client_id or claimed or fresh_client_id()
        if not numbered:  # else it can still prove to have a session
            self._settle(visitor.place, who, has_token=claimed is not None)
        endpoint = visitor.endpoint
        connection = Connection(
            websocket, who, self._parts, control_frames=control_frames, endpoint=endpoint, numbered=numbered
        )
        connection.face = StableSocket(connection, self, identity=identity)
        try:
            with self.resumption.sparing(claimed):
                await self._ask_handshake_hooks(connection)
                await visitor.let_in()
            if numbered:
                await self._begin_conversation(connection, visitor, until, is_known=client_id is not None)
            elif who in visitor.revoked:
                raise WebSocketException(SESSION_ENDED, "revoked")
            proven = claimed is not None and self.resumption.redeem(connection, claimed)
            if claimed is not None and not proven and client_id is None:  # and the hooks took it for that client
                raise WebSocketException(4401, "the token was used meanwhile")
        except BaseException:
            connection.face._let_go()
            raise
        if not numbered and until is not None:
            connection.credential = CredentialExpiry(connection, functools.partial(self._renew, connection))
            connection.credential.begins(None, max(0.0, until - monotonic()))
        connection.place = visitor.place
        visitor.inside = True
        self.door.left(visitor)
        try:
            own.bind_current(connection)
            await self._enter(connection, proven=proven)
        except (SocketClosed, DuplicateClientError) as error:
            code = connection.ending.code if connection.ending else error.close_code
            raise (self._seen_by_dependencies(connection, error) or WebSocketException(code)) from error
        return connection

    async def _ask_handshake_hooks(self, connection: Connection) -> None:
        try:
            await self._hooks.handshake(connection.face)
            if (headers := connection.websocket.scope.get(HEADERS_KEY)) is not None:
                check_headers(headers.raw)
        except Exception as error:
            if not is_bug(error) or handler_for_endpoint(connection.websocket, error) is not None:
                raise
            await connection.bug("handshake_hook_failed", error)
            raise HTTPException(500) from error
        if self.closing:
            raise self.door.stopping()

    def _settle(
        self, place: Reservation, client_id: str, *, session: Session | None = None, has_token: bool = False
    ) -> None:
        """Let a client stay, if there is room for it.

        Args:
            place: Its place.
            client_id: Who it is.
            session: The session that it has proven to have.
            has_token: Whether it has a reconnect token: what there is of it is half-open then, and goes.

        Raises:
            ConnectionLimitExceededError: There is no room.
            TooManyConnectionsError: There are too many of this client already, or from its address.
        """
        policy = self._config.on_duplicate
        goes = policy is DuplicatePolicy.REPLACE or (policy is DuplicatePolicy.REJECT and has_token)
        replaced: list[Any] = self._others(client_id, session) if goes else []
        if session is not None and session.connection is not None:
            replaced.append(session.connection)
        place.settle(client_id, replaces=[one.place for one in replaced if one.place is not None])

    async def _begin_conversation(
        self, connection: Connection, visitor: Handshake, until: float | None, *, is_known: bool
    ) -> None:
        """Take the hello of a client, and give the connection to its session.

        Args:
            connection: The connection.
            visitor: Who has knocked.
            until: Until when its identity is good, in monotonic time.
            is_known: Whether the endpoint has said who the client is. Else it is who its session says.

        Raises:
            WebSocketException: It was refused, and is closed.
        """
        good_for: list[float | None] = []

        async def authenticate(credential: str | None) -> Exception | None:
            try:
                good_for.append(await self._hooks.auth(connection.face, credential))
            except Exception as error:
                if is_bug(error):
                    await connection.bug("auth_hook_failed", error)
                return error
            return None

        def whose(session: Session | None) -> str:
            if session is not None and not is_known:
                connection.client_id = session.client_id
            return connection.client_id

        def lets_in(client_id: str, session: Session | None) -> Exception | None:
            if client_id in visitor.revoked:
                return WebSocketException(SESSION_ENDED, "revoked")
            if (how := self.sessions.ended_by_application(hello, client_id if is_known else None)) is not None:
                return WebSocketException(how.code, how.text)
            if self._config.on_duplicate is DuplicatePolicy.REJECT and self._others(client_id, session):
                return DuplicateClientError(client_id)
            try:
                self._settle(visitor.place, client_id, session=session)
            except ConnectionLimitExceededError as error:
                return error
            return None

        hello = await visitor.take_hello()
        try:
            greeting = await self._reception.greet(connection.websocket, hello, whose, authenticate, lets_in)
        except WebSocketException:  # it was told so there
            visitor.answered = True
            raise
        if (kept := connection.face._user_data) is not None:  # a handshake hook has set it
            if greeting.session.user_data is None:
                kept.owner = greeting.session
                greeting.session.user_data = kept
            else:  # the same dict: a handler of the connection before may still fill it
                kept.let_go()
                try:
                    greeting.session.user_data.update(kept)
                except MemoryLimitExceededError as error:  # to refuse its client would be to refuse it at every dial
                    connection.tell("user_data_lost", logging.WARNING, why=str(error))
        if connection.face._metadata is not None:
            connection.face._metadata.owner = greeting.session
        connection.conversation = V1Protocol(
            connection, greeting, self._seen, functools.partial(self._renew, connection)
        )
        connection.credential = connection.conversation.credential
        left = None if until is None else max(0.0, until - monotonic())
        connection.credential.begins(good_for[0], left)
        self.sessions.returned(greeting.session)

    def _others(self, client_id: str, session: Session | None) -> list[Connection]:
        """The connections of a client but those of one session: taking one's own session over is no duplicate."""
        everyone = self.registry.of_client(client_id)
        return [one for one in everyone if session is None or one.member is not session]

    def _renew(self, connection: Connection, credential: str | None) -> None:
        """A client has sent a new credential."""
        looking = self._look_at(connection, credential)
        context = copied(connection.context)
        self._tasks.spawn(looking, name=f"ws-auth-{connection.connection_id}", context=context)

    async def _look_at(self, connection: Connection, credential: str | None) -> None:
        if connection.credential is None:
            return
        if credential is None:
            connection.credential.refused("a new credential is wanted")
            return
        if not self._hooks.has("auth"):  # nobody can say that it is good
            connection.credential.refused("credentials are not renewed here")
            return
        try:
            good_for = await self._hooks.auth(connection.face, credential)
        except Exception as error:
            if is_bug(error):
                await connection.bug("auth_hook_failed", error)
            how = close_info_for(error)
            connection.end(how.reason, code=how.code, text=how.text)
        else:
            connection.credential.taken(good_for)

    async def open_by_hand(
        self, websocket: WebSocket, client_id: str, metadata: Mapping[str, Any] | None
    ) -> Connection:
        """Take over a WebSocket that the caller has accepted, register it, run the connect hooks.

        In a FastAPI endpoint the connection then ends as one of the dependency does, with an honest close code.

        Raises:
            RuntimeError: It is not accepted yet.
            SocketClosed: It was refused by a connect hook, or is gone already.
            DuplicateClientError: `on_duplicate="reject"` refused it.
            ConnectionLimitExceededError: There is no room.
            OriginNotAllowedError: A page of somebody else's site has opened it.
            InvalidTokenError: The token that it has proven itself with was revoked since.
            ShutdownError: The manager drains.
            MemoryLimitExceededError: The metadata is more than may be kept.
        """
        if websocket.application_state is not WebSocketState.CONNECTED:
            raise RuntimeError("connect() takes an open WebSocket: call `await websocket.accept()` before it")
        if isinstance(known := getattr(websocket._receive, "__self__", None), Connection):
            raise RuntimeError(f"this WebSocket is connected already, as client {known.client_id!r}")
        self.ledger.begin()
        stack = find_exit_stack(websocket.scope)
        place = self._place_by_hand(websocket, client_id)
        try:
            endpoint = EndpointTask(cancellable=stack is not None)
            connection = Connection(websocket, client_id, self._parts, control_frames=True, endpoint=endpoint)
            with self.resumption.sparing(client_id if self.resumption.has_proof(client_id) else None):
                connection.face = StableSocket(connection, self, metadata=metadata)
            proven = self._take_proof(connection)
        except BaseException as error:
            place.leave()
            if stack is not None and isinstance(error, MemoryLimitExceededError):
                stack.push(functools.partial(_close_quietly, error))
            raise
        connection.place = place
        opened = own.bind_current(connection)
        opened.connecting = True
        task = asyncio.current_task()
        if stack is not None:

            async def leave(_: Any, error: BaseException | None, __: Any) -> bool:
                opened.connecting = False
                if not connection.opened:
                    opened.connection = None
                    return False
                try:
                    failure = await self.leave(connection, error)
                finally:
                    opened.task_is_over()
                if failure is None:
                    return True
                if failure is error:
                    return False
                raise failure from error

            stack.push_async_exit(leave)
        elif task is not None:
            task.add_done_callback(lambda done: self._task_ended(opened, done))
        await self._enter(connection, proven=proven)
        opened.connecting = False
        return connection

    def _take_proof(self, connection: Connection) -> bool:
        """Whether the current task has proven who the client is.

        Raises:
            InvalidTokenError: Its token was revoked since it was validated.
        """
        try:
            return self.resumption.take_proof(connection)
        except InvalidTokenError as error:
            connection.face._let_go()
            self.refused_by_hand(connection.websocket, error, connection.client_id)
            raise

    def refused_by_hand(self, websocket: WebSocket, error: Exception, client_id: str) -> None:
        """Count and report that `connect()` refuses a client."""
        self.door.refusing.tell(websocket, error, self.door.address_of(websocket), client_id)

    def _place_by_hand(self, websocket: WebSocket, client_id: str) -> Reservation:
        try:
            visitor = self.door.knock(websocket)
            self.door.left(visitor)  # nothing of this waits
            place = visitor.place
            try:
                self._settle(place, client_id, has_token=self.resumption.has_proof(client_id))
            except ConnectionLimitExceededError:
                place.leave()
                raise
        except (ConnectionLimitExceededError, OriginNotAllowedError, ShutdownError) as error:
            self.refused_by_hand(websocket, error, client_id)
            raise
        return place

    @staticmethod
    def _task_ended(opened: own.Opened, task: asyncio.Task[Any]) -> None:
        """The task that has connected a socket by hand is over, and no exit stack has told us before."""
        connection = opened.connection
        if connection is not None and connection.opened and connection.ending is None:
            how = close_info_for(asyncio.CancelledError() if task.cancelled() else task.exception())
            connection.end(how.reason, code=how.code, text=how.text)
        opened.task_is_over()

    async def _enter(self, connection: Connection, *, proven: bool) -> None:
        """Open a connection, register it, run its connect hooks; whatever fails on the way, it is ended.

        Raises:
            SocketClosed: It was refused by a connect hook, or is gone already.
            DuplicateClientError: `on_duplicate="reject"` refused it.
        """
        self.unfinished.add(connection)
        try:
            await self._begin(connection, proven=proven)
        except BaseException as error:
            if connection.opened and connection.ending is None:
                failure = await self.leave(connection, error)
                if failure is not error:
                    raise self._closed(connection) from error
            raise

    async def _begin(self, connection: Connection, *, proven: bool) -> None:
        connection.open()
        self._say_what_is_left_to_the_server(connection)
        if connection.ending is not None:  # it was over before we came: a link tells so at once
            await self.leave(connection, None)
            raise self._closed(connection)
        session = None if connection.conversation is None else connection.conversation.session
        if proven and (how := self.resumption.ended_by_application(connection)) is not None:
            connection.end(how.reason, code=how.code, text=how.text)
            await self.leave(connection, None)
            raise self._closed(connection)
        older = self._others(connection.client_id, session)
        policy = self._config.on_duplicate
        if older and policy is DuplicatePolicy.REJECT and not proven:  # else the older one is half-open
            error = DuplicateClientError(connection.client_id)
            await self.leave(connection, error)
            raise error
        if self.closing:
            connection.end(DisconnectReason.SERVER_SHUTDOWN, text=self.door.stopping().reason)
            await self.leave(connection, None)
            raise self._closed(connection)
        self.registry.add(connection, mailbox=session is None)
        if session is None:
            self.ledger.enter(connection)
        self.heartbeat.add(connection)
        self.lifetimes.add(connection)
        if session is not None:
            left, session.left = session.left, {}
            self.delivery.back(session, left)  # type: ignore[arg-type]
        elif proven:
            plain = [one for one in older if one.conversation is None]  # what a session has is its own
            self.resumption.restore(connection, plain)
        if policy is not DuplicatePolicy.ALLOW:
            self._replace(older, connection.client_id, session)
            # An application that keeps a list of the clients that are online hears "gone" before it hears "come".
            connection.wait_for_hooks_of(self._ending.of_client(connection.client_id))
        try:
            await connection.wait_for_those_before()
            if policy is not DuplicatePolicy.ALLOW:
                await self.resumption.wait_for_ends_of(connection.client_id)
            if connection.ending is None:
                with connection.endpoint.busy():
                    await self._begin_hooks(connection, session)
        except BaseException as error:
            failure = await self.leave(connection, error)
            if failure is error:
                raise
            raise self._closed(connection) from error
        if connection.ending is not None:  # a hook closed it, or the client has left
            await self.leave(connection, None)
            raise self._closed(connection)

    def _replace(self, older: Sequence[Connection], client_id: str, session: Session | None) -> None:
        """A client is to be here once: end what else there is of it."""
        for connection in older:
            # A client with a session must not come back for it, or two devices would throw each other out for ever.
            code = SESSION_ENDED if connection.conversation is not None else None
            connection.end(DisconnectReason.REPLACED, code=code)
        for away in self.resumption.away_of(client_id):
            if isinstance(away, DetachedState):
                away.end(DisconnectReason.REPLACED)
            elif away is not session:
                self.sessions.supersede(away)

    async def _begin_hooks(self, connection: Connection, session: Session | None) -> None:
        connection.hooks_wanted = connection.begun = True
        outcome = connection.face.resumed
        back = outcome in (ResumeOutcome.FULL, ResumeOutcome.GAP)
        if session is not None:
            back = back and session.admitted  # the connection before may have been lost in its connect hooks
            session.known = True
        if back:
            await self._hooks.resume(connection.face, outcome)
        else:
            await self._hooks.connect(connection.face)
        if session is not None:
            session.admitted = True

    def _say_what_is_left_to_the_server(self, connection: Connection) -> None:
        """Say, once, what this library does not do because the server, or a middleware, stands between."""
        if self._told_of_server or connection.is_linked:
            return
        self._told_of_server = True
        if has_direct_transport(connection.websocket.scope):
            self._reports.tell("link_wrapped", logging.WARNING)
        if self._config.compression is CompressionMode.NONE:
            self._reports.tell("compression_left_to_server", logging.WARNING)


def _close_quietly(
    refusal: MemoryLimitExceededError, _: type[BaseException] | None, error: BaseException | None, __: Any
) -> bool:
    """At the end of an endpoint: exchange a refusal of `connect()` that escapes for one that Starlette closes with.

    `MemoryLimitExceededError` cannot be a `WebSocketException` itself, because it is raised in HTTP routes too.
    """
    if error is not refusal:
        return False
    how = close_info_for(refusal)
    raise WebSocketException(how.code, how.text) from refusal
