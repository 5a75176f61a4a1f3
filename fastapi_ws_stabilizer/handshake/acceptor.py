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
from fastapi_ws_stabilizer.connection import current as own
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask, close_info_for, find_exit_stack, is_bug
from fastapi_ws_stabilizer.connection.v1_protocol import V1Protocol
from fastapi_ws_stabilizer.errors import (
    ConnectionLimitExceededError,
    DuplicateClientError,
    InvalidTokenError,
    MemoryLimitExceededError,
    OriginNotAllowedError,
    ShutdownError,
    SocketClosed,
)
from fastapi_ws_stabilizer.handlers.exception_handlers import handler_for_endpoint
from fastapi_ws_stabilizer.handshake.admission import Handshake
from fastapi_ws_stabilizer.handshake.client_id import fresh_client_id
from fastapi_ws_stabilizer.handshake.closer import Closer
from fastapi_ws_stabilizer.handshake.hello import HelloReader
from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from fastapi_ws_stabilizer.limits.connections import Reservation
from fastapi_ws_stabilizer.servers.direct import has_direct_transport
from fastapi_ws_stabilizer.sessions.detached import DetachedState
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome, Session
from fastapi_ws_stabilizer.sessions.store import SessionStore
from fastapi_ws_stabilizer.socket import Services, StableSocket
from fastapi_ws_stabilizer.tasks import copied
from fastapi_ws_stabilizer.wire.handshake import HEADERS_KEY, check_headers


class Acceptor(Closer, Services):
    """Opens connections: asks the hooks, finds the session, registers, replaces what was there before."""

    _hello_reader: HelloReader
    _seen: IdempotencyCache
    _warned_about_server: bool
    sessions: SessionStore
    registry: ConnectionRegistry[Connection]
    closing: bool

    async def accept(
        self,
        handshake: Handshake,
        client_id: str | None,
        *,
        identity: Any,
        expires_in: float | None,
        control_frames: bool,
    ) -> Connection:
        """Run the handshake hooks, accept, register, run the connect hooks.

        Args:
            handshake: Who has knocked.
            client_id: Whose it is; `None` if the client has not said so.
            identity: What the identity dependency returned.
            expires_in: For how many seconds that is good; for ever when left out.
            control_frames: Whether text pings and pongs are answered and kept from the endpoint.

        Raises:
            WebSocketException: The connection is over already; Starlette's handler for it has nothing left to do.
            HTTPException: A handshake hook refused, or failed (500).
            ShutdownError: The manager was shut down meanwhile.
            ConnectionLimitExceededError: There is no room.
        """
        websocket, numbered = handshake.websocket, handshake.speaks_v1
        until = None if expires_in is None else monotonic() + expires_in
        self.budget.begin()
        claimed = None if numbered else self.resumption.verify_token(websocket, client_id)
        expected_id = client_id or claimed or fresh_client_id()
        if not numbered:  # else it can still prove to have a session
            self._confirm_reservation(handshake.reservation, expected_id, has_token=claimed is not None)
        endpoint = handshake.endpoint
        connection = Connection(
            websocket, expected_id, self._parts, control_frames=control_frames, endpoint=endpoint, numbered=numbered
        )
        connection.socket = StableSocket(connection, self, identity=identity)
        try:
            with self.resumption.pinned(claimed):
                await self._run_handshake_hooks(connection)
                await handshake.accept()
            if numbered:
                await self._negotiate_session(connection, handshake, until, is_known=client_id is not None)
            elif expected_id in handshake.revoked:
                raise WebSocketException(SESSION_ENDED, "revoked")
            proven = claimed is not None and self.resumption.consume_token(connection, claimed)
            if claimed is not None and not proven and client_id is None:  # and the hooks took it for that client
                raise WebSocketException(4401, "the token was used meanwhile")
        except BaseException:
            connection.socket._detach_user_data()
            raise
        if not numbered and until is not None:
            connection.credential = CredentialExpiry(connection, functools.partial(self._renew, connection))
            connection.credential.start(None, max(0.0, until - monotonic()))
        connection.reservation = handshake.reservation
        handshake.established = True
        self.admission.forget(handshake)
        try:
            own.bind_current(connection)
            await self._register(connection, proven=proven)
        except (SocketClosed, DuplicateClientError) as error:
            code = connection.close_info.code if connection.close_info else error.close_code
            raise (self._error_for_dependencies(connection, error) or WebSocketException(code)) from error
        return connection

    async def _run_handshake_hooks(self, connection: Connection) -> None:
        try:
            await self._hooks.handshake(connection.socket)
            if (headers := connection.websocket.scope.get(HEADERS_KEY)) is not None:
                check_headers(headers.raw)
        except Exception as error:
            if not is_bug(error) or handler_for_endpoint(connection.websocket, error) is not None:
                raise
            await connection.report_bug("handshake_hook_failed", error)
            raise HTTPException(500) from error
        if self.closing:
            raise self.admission.stopping()

    def _confirm_reservation(
        self, reservation: Reservation, client_id: str, *, session: Session | None = None, has_token: bool = False
    ) -> None:
        """Let a client stay, if there is room for it.

        Args:
            reservation: Its place.
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
        reservation.confirm(client_id, replaces=[one.reservation for one in replaced if one.reservation is not None])

    async def _negotiate_session(
        self, connection: Connection, handshake: Handshake, until: float | None, *, is_known: bool
    ) -> None:
        """Take the hello of a client, and give the connection to its session.

        Args:
            connection: The connection.
            handshake: Who has knocked.
            until: Until when its identity is good, in monotonic time.
            is_known: Whether the endpoint has said who the client is. Else it is who its session says.

        Raises:
            WebSocketException: It was refused, and is closed.
        """
        expires_in: list[float | None] = []

        async def authenticate(credential: str | None) -> Exception | None:
            try:
                expires_in.append(await self._hooks.auth(connection.socket, credential))
            except Exception as error:
                if is_bug(error):
                    await connection.report_bug("auth_hook_failed", error)
                return error
            return None

        def client_id_of(session: Session | None) -> str:
            if session is not None and not is_known:
                connection.client_id = session.client_id
            return connection.client_id

        def check_admission(client_id: str, session: Session | None) -> Exception | None:
            if client_id in handshake.revoked:
                return WebSocketException(SESSION_ENDED, "revoked")
            if (how := self.sessions.ended_by_application(hello, client_id if is_known else None)) is not None:
                return WebSocketException(how.code, how.reason)
            if self._config.on_duplicate is DuplicatePolicy.REJECT and self._others(client_id, session):
                return DuplicateClientError(client_id)
            try:
                self._confirm_reservation(handshake.reservation, client_id, session=session)
            except ConnectionLimitExceededError as error:
                return error
            return None

        hello = await handshake.take_hello()
        try:
            resume_result = await self._hello_reader.negotiate(
                connection.websocket, hello, client_id_of, authenticate, check_admission
            )
        except WebSocketException:  # it was told so there
            handshake.rejected = True
            raise
        if (user_data := connection.socket._user_data) is not None:  # a handshake hook has set it
            if resume_result.session.user_data is None:
                user_data.owner = resume_result.session
                resume_result.session.user_data = user_data
            else:  # the same dict: a handler of the connection before may still fill it
                user_data.detach()
                try:
                    resume_result.session.user_data.update(user_data)
                except MemoryLimitExceededError as error:  # to refuse its client would be to refuse it at every dial
                    connection.emit("user_data_lost", logging.WARNING, why=str(error))
        if connection.socket._metadata is not None:
            connection.socket._metadata.owner = resume_result.session
        connection.protocol = V1Protocol(
            connection, resume_result, self._seen, functools.partial(self._renew, connection)
        )
        connection.credential = connection.protocol.credential
        detached = None if until is None else max(0.0, until - monotonic())
        connection.credential.start(expires_in[0], detached)
        self.sessions.on_attached(resume_result.session)

    def _others(self, client_id: str, session: Session | None) -> list[Connection]:
        """The connections of a client but those of one session: taking one's own session over is no duplicate."""
        everyone = self.registry.of_client(client_id)
        return [one for one in everyone if session is None or one.recipient is not session]

    def _renew(self, connection: Connection, credential: str | None) -> None:
        """A client has sent a new credential."""
        looking = self._authenticate_renewal(connection, credential)
        context = copied(connection.context)
        self._tasks.spawn(looking, name=f"ws-auth-{connection.connection_id}", context=context)

    async def _authenticate_renewal(self, connection: Connection, credential: str | None) -> None:
        if connection.credential is None:
            return
        if credential is None:
            connection.credential.renewal_rejected("a new credential is wanted")
            return
        if not self._hooks.has("auth"):  # nobody can say that it is good
            connection.credential.renewal_rejected("credentials are not renewed here")
            return
        try:
            expires_in = await self._hooks.auth(connection.socket, credential)
        except Exception as error:
            if is_bug(error):
                await connection.report_bug("auth_hook_failed", error)
            how = close_info_for(error)
            connection.close(how.cause, code=how.code, text=how.reason)
        else:
            connection.credential.renewed(expires_in)

    async def adopt(self, websocket: WebSocket, client_id: str, metadata: Mapping[str, Any] | None) -> Connection:
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
        self.budget.begin()
        stack = find_exit_stack(websocket.scope)
        reservation = self._reserve_for_adoption(websocket, client_id)
        try:
            endpoint = EndpointTask(cancellable=stack is not None)
            connection = Connection(websocket, client_id, self._parts, control_frames=True, endpoint=endpoint)
            with self.resumption.pinned(client_id if self.resumption.is_verified(client_id) else None):
                connection.socket = StableSocket(connection, self, metadata=metadata)
            proven = self._consume_verification(connection)
        except BaseException as error:
            reservation.release()
            if stack is not None and isinstance(error, MemoryLimitExceededError):
                stack.push(functools.partial(_close_quietly, error))
            raise
        connection.reservation = reservation
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
                    failure = await self.close_after_endpoint(connection, error)
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
        await self._register(connection, proven=proven)
        opened.connecting = False
        return connection

    def _consume_verification(self, connection: Connection) -> bool:
        """Whether the current task has proven who the client is.

        Raises:
            InvalidTokenError: Its token was revoked since it was validated.
        """
        try:
            return self.resumption.consume_verification(connection)
        except InvalidTokenError as error:
            connection.socket._detach_user_data()
            self.reject_adoption(connection.websocket, error, connection.client_id)
            raise

    def reject_adoption(self, websocket: WebSocket, error: Exception, client_id: str) -> None:
        """Count and report that `connect()` refuses a client."""
        self.admission.rejector.record(websocket, error, self.admission.address_of(websocket), client_id)

    def _reserve_for_adoption(self, websocket: WebSocket, client_id: str) -> Reservation:
        try:
            handshake = self.admission.admit(websocket)
            self.admission.forget(handshake)  # nothing of this waits
            reservation = handshake.reservation
            try:
                self._confirm_reservation(reservation, client_id, has_token=self.resumption.is_verified(client_id))
            except ConnectionLimitExceededError:
                reservation.release()
                raise
        except (ConnectionLimitExceededError, OriginNotAllowedError, ShutdownError) as error:
            self.reject_adoption(websocket, error, client_id)
            raise
        return reservation

    @staticmethod
    def _task_ended(opened: own.Opened, task: asyncio.Task[Any]) -> None:
        """The task that has connected a socket by hand is over, and no exit stack has told us before."""
        connection = opened.connection
        if connection is not None and connection.opened and connection.close_info is None:
            how = close_info_for(asyncio.CancelledError() if task.cancelled() else task.exception())
            connection.close(how.cause, code=how.code, text=how.reason)
        opened.task_is_over()

    async def _register(self, connection: Connection, *, proven: bool) -> None:
        """Open a connection, register it, run its connect hooks; whatever fails on the way, it is ended.

        Raises:
            SocketClosed: It was refused by a connect hook, or is gone already.
            DuplicateClientError: `on_duplicate="reject"` refused it.
        """
        self.connections.add(connection)
        try:
            await self._begin(connection, proven=proven)
        except BaseException as error:
            if connection.opened and connection.close_info is None:
                failure = await self.close_after_endpoint(connection, error)
                if failure is not error:
                    raise self._closed(connection) from error
            raise

    async def _begin(self, connection: Connection, *, proven: bool) -> None:
        connection.open()
        self._warn_about_server_limits(connection)
        if connection.close_info is not None:  # it was over before we came: a link tells so at once
            await self.close_after_endpoint(connection, None)
            raise self._closed(connection)
        session = None if connection.protocol is None else connection.protocol.session
        if proven and (how := self.resumption.ended_by_application(connection)) is not None:
            connection.close(how.cause, code=how.code, text=how.reason)
            await self.close_after_endpoint(connection, None)
            raise self._closed(connection)
        older = self._others(connection.client_id, session)
        policy = self._config.on_duplicate
        if older and policy is DuplicatePolicy.REJECT and not proven:  # else the older one is half-open
            error = DuplicateClientError(connection.client_id)
            await self.close_after_endpoint(connection, error)
            raise error
        if self.closing:
            connection.close(DisconnectReason.SERVER_SHUTDOWN, text=self.admission.stopping().reason)
            await self.close_after_endpoint(connection, None)
            raise self._closed(connection)
        self.registry.add(connection, with_queue=session is None)
        if session is None:
            self.budget.attach(connection)
        self.heartbeat.add(connection)
        self.reaper.add(connection)
        if session is not None:
            detached, session.saved_presence = session.saved_presence, {}
            self.hub.restore(session, detached)  # type: ignore[arg-type]
        elif proven:
            plain = [one for one in older if one.protocol is None]  # what a session has is its own
            self.resumption.restore(connection, plain)
        if policy is not DuplicatePolicy.ALLOW:
            self._close_duplicates(older, connection.client_id, session)
            # An application that keeps a list of the clients that are online hears "gone" before it hears "come".
            connection.wait_for_hooks_of(self._closing_connections.of_client(connection.client_id))
        try:
            await connection.wait_for_predecessors()
            if policy is not DuplicatePolicy.ALLOW:
                await self.resumption.wait_for_ends_of(connection.client_id)
            if connection.close_info is None:
                with connection.endpoint.running():
                    await self._run_open_hooks(connection, session)
        except BaseException as error:
            failure = await self.close_after_endpoint(connection, error)
            if failure is error:
                raise
            raise self._closed(connection) from error
        if connection.close_info is not None:  # a hook closed it, or the client has left
            await self.close_after_endpoint(connection, None)
            raise self._closed(connection)

    def _close_duplicates(self, older: Sequence[Connection], client_id: str, session: Session | None) -> None:
        """A client is to be here once: end what else there is of it."""
        for connection in older:
            # A client with a session must not come back for it, or two devices would throw each other out for ever.
            code = SESSION_ENDED if connection.protocol is not None else None
            connection.close(DisconnectReason.REPLACED, code=code)
        for away in self.resumption.detached_of(client_id):
            if isinstance(away, DetachedState):
                away.close(DisconnectReason.REPLACED)
            elif away is not session:
                self.sessions.supersede(away)

    async def _run_open_hooks(self, connection: Connection, session: Session | None) -> None:
        connection.disconnect_hooks_pending = connection.connect_hooks_started = True
        outcome = connection.socket.resumed
        back = outcome in (ResumeOutcome.FULL, ResumeOutcome.GAP)
        if session is not None:
            back = (
                back and session.connect_hooks_passed
            )  # the connection before may have been lost in its connect hooks
            session.connect_hooks_started = True
        if back:
            await self._hooks.resume(connection.socket, outcome)
        else:
            await self._hooks.connect(connection.socket)
        if session is not None:
            session.connect_hooks_passed = True

    def _warn_about_server_limits(self, connection: Connection) -> None:
        """Say, once, what this library does not do because the server, or a middleware, stands between."""
        if self._warned_about_server or connection.is_direct:
            return
        self._warned_about_server = True
        if has_direct_transport(connection.websocket.scope):
            self._events.emit("link_wrapped", logging.WARNING)
        if self._config.compression is CompressionMode.NONE:
            self._events.emit("compression_left_to_server", logging.WARNING)


def _close_quietly(
    refusal: MemoryLimitExceededError, _: type[BaseException] | None, error: BaseException | None, __: Any
) -> bool:
    """At the end of an endpoint: exchange a refusal of `connect()` that escapes for one that Starlette closes with.

    `MemoryLimitExceededError` cannot be a `WebSocketException` itself, because it is raised in HTTP routes too.
    """
    if error is not refusal:
        return False
    how = close_info_for(refusal)
    raise WebSocketException(how.code, how.reason) from refusal
