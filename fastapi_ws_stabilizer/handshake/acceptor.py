"""Acceptance of handshakes and registration of connections, for dependencies and for `connect()`."""

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
from fastapi_ws_stabilizer.compat.fastapi import find_exit_stack
from fastapi_ws_stabilizer.compat.starlette import asgi_callables
from fastapi_ws_stabilizer.config import CompressionMode, DuplicatePolicy
from fastapi_ws_stabilizer.connection import current
from fastapi_ws_stabilizer.connection.asgi_shim import AsgiShim
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from fastapi_ws_stabilizer.errors import (
    ConnectionLimitExceededError,
    DuplicateClientError,
    InvalidTokenError,
    MemoryLimitExceededError,
    OriginNotAllowedError,
    ShutdownError,
    SocketClosed,
    close_info_for,
    is_bug,
)
from fastapi_ws_stabilizer.handlers.exception_handlers import handler_for_endpoint
from fastapi_ws_stabilizer.handshake.admission import Handshake
from fastapi_ws_stabilizer.handshake.client_id import fresh_client_id
from fastapi_ws_stabilizer.handshake.closer import Closer
from fastapi_ws_stabilizer.handshake.hello import HelloReader
from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from fastapi_ws_stabilizer.limits.connections import Reservation
from fastapi_ws_stabilizer.servers.direct import has_direct_transport
from fastapi_ws_stabilizer.sessions.detached import DetachedRecipients, DetachedState
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import SessionStore
from fastapi_ws_stabilizer.sessions.v1_protocol import V1Protocol, session_of
from fastapi_ws_stabilizer.socket import Services, StableSocket
from fastapi_ws_stabilizer.tasks import copied
from fastapi_ws_stabilizer.wire.handshake import HEADERS_KEY, check_headers
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome


class Acceptor(Closer, Services):
    """Mixin that opens connections: runs hooks, negotiates the session, registers, and closes duplicates."""

    _hello_reader: HelloReader
    _idempotency: IdempotencyCache
    _warned_about_server: bool
    sessions: SessionStore
    detached: DetachedRecipients
    registry: ConnectionRegistry
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
        """Run the handshake hooks, accept the WebSocket, register the connection and run the connect hooks.

        Args:
            handshake: The admitted handshake.
            client_id: The client id, or `None` if the endpoint names none.
            identity: The result of the identity dependency.
            expires_in: Seconds until the identity expires, or `None` for no expiry.
            control_frames: Whether text pings and pongs are answered and hidden from the endpoint.

        Raises:
            WebSocketException: The connection was closed or rejected, and Starlette has nothing left to do.
            HTTPException: A handshake hook rejected the client, or failed (500).
            ShutdownError: The manager was shut down during the handshake.
            ConnectionLimitExceededError: The server is full, or the client or its address has too many connections.
        """
        websocket, numbered = handshake.websocket, handshake.speaks_v1
        expiry = None if expires_in is None else monotonic() + expires_in
        self.budget.bind_loop()
        claimed = None if numbered else self.resumption.verify_token(websocket, client_id)
        expected_id = client_id or claimed or fresh_client_id()
        if not numbered:  # otherwise after the hello, which may prove a session
            self._confirm_reservation(handshake.reservation, expected_id, has_token=claimed is not None)
        endpoint = handshake.endpoint
        connection = Connection(websocket, expected_id, self._parts, control_frames=control_frames, endpoint=endpoint)
        connection.socket = StableSocket(connection, self, identity=identity)
        try:
            with self.resumption.pinned(claimed):
                await self._run_handshake_hooks(connection)
                await handshake.accept()
            if numbered:
                await self._negotiate_session(connection, handshake, expiry, is_known=client_id is not None)
            elif expected_id in handshake.revoked:
                raise WebSocketException(SESSION_ENDED, "revoked")
            proven = claimed is not None and self.resumption.consume_token(connection, claimed)
            if claimed is not None and not proven and client_id is None:  # the hooks ran with the claimed id
                raise WebSocketException(4401, "token already used")
        except BaseException:
            connection.socket._detach_user_data()
            raise
        if not numbered and expiry is not None:
            connection.credential = CredentialExpiry()
            connection.credential.start(connection, None, max(0.0, expiry - monotonic()))
        connection.reservation = handshake.reservation
        handshake.established = True
        self.admission.forget(handshake)
        try:
            current.bind_current(connection)
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
        """Confirm the reservation of an identified client.

        Args:
            reservation: The connection slot.
            client_id: The client.
            session: The session that the client has proven.
            has_token: Whether the client has a reconnect token. Its other connections are then half-open, and are
                replaced.

        Raises:
            ConnectionLimitExceededError: The server is full.
            TooManyConnectionsError: The client or its address has too many connections.
        """
        policy = self._config.on_duplicate
        replaces = policy is DuplicatePolicy.REPLACE or (policy is DuplicatePolicy.REJECT and has_token)
        replaced: list[Any] = self._others(client_id, session) if replaces else []
        if session is not None and session.connection is not None:
            replaced.append(session.connection)
        reservation.confirm(client_id, replaces=[one.reservation for one in replaced if one.reservation is not None])

    async def _negotiate_session(
        self, connection: Connection, handshake: Handshake, expiry: float | None, *, is_known: bool
    ) -> None:
        """Read the hello of a client, and attach the connection to its session.

        Args:
            connection: The connection.
            handshake: The handshake.
            expiry: Expiry of the identity in monotonic time, or `None`.
            is_known: Whether the endpoint gave the client id. Otherwise the session decides it.

        Raises:
            WebSocketException: The client was rejected, and the WebSocket is closed.
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
            if (close_info := self.sessions.ended_by_application(hello, client_id if is_known else None)) is not None:
                return WebSocketException(close_info.code, close_info.reason)
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
        except WebSocketException:  # `negotiate` has closed the WebSocket
            handshake.rejected = True
            raise
        if (user_data := connection.socket._user_data) is not None:  # set by a handshake hook
            if resume_result.session.user_data is None:
                user_data.owner = resume_result.session
                resume_result.session.user_data = user_data
            else:  # keep the dict, because a handler of the previous connection may still write to it
                user_data.stop_accounting()
                try:
                    resume_result.session.user_data.update(user_data)
                except MemoryLimitExceededError as error:  # a rejection would repeat at each reconnect
                    connection.emit("user_data_lost", logging.WARNING, why=str(error))
        if connection.socket._metadata is not None:
            connection.socket._metadata.owner = resume_result.session
        connection.adopt_protocol(V1Protocol(resume_result, self._config, self._idempotency))
        identity_expires_in = None if expiry is None else max(0.0, expiry - monotonic())
        if expires_in[0] is not None or identity_expires_in is not None:
            connection.credential = CredentialExpiry()
            connection.credential.start(connection, expires_in[0], identity_expires_in)
        self.sessions.on_attached(resume_result.session)

    def _others(self, client_id: str, session: Session | None) -> list[Connection]:
        """Return the connections of a client except for those of `session`, which it may take over."""
        connections = self.registry.of_client(client_id)
        return [one for one in connections if session is None or one.recipient is not session]

    def on_renewal(self, connection: Connection, credential: str | None) -> None:
        """Start a task that verifies a new credential of a client."""
        verifying = self._authenticate_renewal(connection, credential)
        context = copied(connection.context)
        self._tasks.spawn(verifying, name=f"ws-auth-{connection.connection_id}", context=context)

    async def _authenticate_renewal(self, connection: Connection, credential: str | None) -> None:
        expiry = connection.credential
        if expiry is None:
            return
        if credential is None:
            expiry.renewal_rejected(connection, "missing credential")
            return
        if not self._hooks.has("auth"):  # no hook can verify it
            expiry.renewal_rejected(connection, "credential renewal is not supported")
            return
        try:
            expires_in = await self._hooks.auth(connection.socket, credential)
        except Exception as error:
            if is_bug(error):
                await connection.report_bug("auth_hook_failed", error)
            close_info = close_info_for(error)
            connection.close(close_info.cause, code=close_info.code, reason=close_info.reason)
        else:
            expiry.renewed(connection, expires_in)

    async def adopt(self, websocket: WebSocket, client_id: str, metadata: Mapping[str, Any] | None) -> Connection:
        """Register a WebSocket that your code has accepted, and run the connect hooks.

        In a FastAPI endpoint, the server closes the connection as for the dependency, with the code for the result of
        the endpoint.

        Raises:
            RuntimeError: The WebSocket is not accepted, or is connected already.
            SocketClosed: A connect hook rejected the client, or the client has left.
            DuplicateClientError: `on_duplicate="reject"` rejected the client.
            ConnectionLimitExceededError: The server is full, or the client or its address has too many connections.
            OriginNotAllowedError: The `Origin` is not allowed.
            InvalidTokenError: The verified token of the client has since been revoked.
            ShutdownError: The manager is draining or stopped.
            MemoryLimitExceededError: The metadata exceeds the memory limit.
        """
        if websocket.application_state is not WebSocketState.CONNECTED:
            raise RuntimeError("connect() needs an accepted WebSocket: call `await websocket.accept()` before it")
        if isinstance(known := getattr(asgi_callables(websocket)[0], "__self__", None), AsgiShim):
            raise RuntimeError(f"this WebSocket is already connected, as client {known.client_id!r}")
        self.budget.bind_loop()
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
        opened = current.bind_current(connection)
        opened.connecting = True
        task = asyncio.current_task()
        if stack is not None:

            async def on_exit(_: Any, error: BaseException | None, __: Any) -> bool:
                opened.connecting = False
                if not connection.opened:
                    opened.connection = None
                    return False
                try:
                    failure = await self.close_after_endpoint(connection, error)
                finally:
                    opened.on_task_done()
                if failure is None:
                    return True
                if failure is error:
                    return False
                raise failure from error

            stack.push_async_exit(on_exit)
        elif task is not None:
            task.add_done_callback(lambda done: self._task_ended(opened, done))
        await self._register(connection, proven=proven)
        opened.connecting = False
        return connection

    def _consume_verification(self, connection: Connection) -> bool:
        """Return whether the current task has verified a token of the client.

        Raises:
            InvalidTokenError: The token has since been revoked.
        """
        try:
            return self.resumption.consume_verification(connection)
        except InvalidTokenError as error:
            connection.socket._detach_user_data()
            self.reject_adoption(connection.websocket, error, connection.client_id)
            raise

    def reject_adoption(self, websocket: WebSocket, error: Exception, client_id: str) -> None:
        """Count and report that `connect()` rejects a client."""
        self.admission.rejector.record_rejection(websocket, error, client_id)

    def _reserve_for_adoption(self, websocket: WebSocket, client_id: str) -> Reservation:
        try:
            handshake = self.admission.admit(websocket)
            self.admission.forget(handshake)  # it does not wait for anything
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
    def _task_ended(opened: current.Opened, task: asyncio.Task[Any]) -> None:
        """Close the connection after the task that called `connect()` has ended. Used only without an exit stack."""
        connection = opened.connection
        if connection is not None and connection.opened and connection.close_info is None:
            close_info = close_info_for(asyncio.CancelledError() if task.cancelled() else task.exception())
            connection.close(close_info.cause, code=close_info.code, reason=close_info.reason)
        opened.on_task_done()

    async def _register(self, connection: Connection, *, proven: bool) -> None:
        """Open and register a connection and run its connect hooks. Close it if a step fails.

        Raises:
            SocketClosed: A connect hook rejected the client, or the client has left.
            DuplicateClientError: `on_duplicate="reject"` rejected the client.
        """
        self.connections.add(connection)
        try:
            await self._open(connection, proven=proven)
        except BaseException as error:
            if connection.opened and connection.close_info is None:
                failure = await self.close_after_endpoint(connection, error)
                if failure is not error:
                    raise self._closed(connection) from error
            raise

    async def _open(self, connection: Connection, *, proven: bool) -> None:
        connection.open()
        self._warn_about_server_limits(connection)
        if connection.close_info is not None:  # a direct transport reports at once that the client has left
            await self.close_after_endpoint(connection, None)
            raise self._closed(connection)
        session = session_of(connection) if connection.protocol.acknowledges else None
        if proven and (close_info := self.resumption.ended_by_application(connection)) is not None:
            connection.close(close_info.cause, code=close_info.code, reason=close_info.reason)
            await self.close_after_endpoint(connection, None)
            raise self._closed(connection)
        older = self._others(connection.client_id, session)
        policy = self._config.on_duplicate
        if older and policy is DuplicatePolicy.REJECT and not proven:  # with a token the older one is half-open
            error = DuplicateClientError(connection.client_id)
            await self.close_after_endpoint(connection, error)
            raise error
        if self.closing:
            connection.close(DisconnectReason.SERVER_SHUTDOWN, reason=self.admission.stopping().reason)
            await self.close_after_endpoint(connection, None)
            raise self._closed(connection)
        self.registry.add(connection, with_queue=session is None)
        if session is None and self.budget.evicts:
            self.budget.attach(connection.account)
        self.heartbeat.add(connection)
        self.reaper.add(connection)
        if session is not None:
            saved_presence, session.saved_presence = session.saved_presence, {}
            self.hub.restore(session, saved_presence)
        elif proven:
            plain = [one for one in older if session_of(one) is None]  # a token restores nothing of a session
            self.resumption.restore(connection, plain)
        if policy is not DuplicatePolicy.ALLOW:
            self._close_duplicates(older, connection.client_id, session)
            # An application with a list of online clients then removes the old connection before it adds the new one.
            connection.wait_for_hooks_of(self._closing_connections.of_client(connection.client_id))
        try:
            await connection.wait_for_predecessors()
            if policy is not DuplicatePolicy.ALLOW:
                await self.resumption.wait_for_session_end_hooks(connection.client_id)
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
        """Close the older connections of a client, and end its detached state and its other detached sessions."""
        for connection in older:
            # A client with a session must not resume it, or two devices would replace each other forever.
            code = SESSION_ENDED if session_of(connection) is not None else None
            connection.close(DisconnectReason.REPLACED, code=code)
        for detached in self.detached.of_client(client_id):
            if isinstance(detached, DetachedState):
                detached.close(DisconnectReason.REPLACED)
            elif detached is not session:
                self.sessions.supersede(detached)

    async def _run_open_hooks(self, connection: Connection, session: Session | None) -> None:
        connection.disconnect_hooks_pending = connection.connect_hooks_started = True
        outcome = connection.socket.resumed
        is_resumed = outcome in (ResumeOutcome.FULL, ResumeOutcome.GAP)
        if session is not None:
            # The previous connection may have been lost during its connect hooks.
            is_resumed = is_resumed and session.connect_hooks_passed
            session.connect_hooks_started = True
        if is_resumed:
            await self._hooks.resume(connection.socket, outcome)
        else:
            await self._hooks.connect(connection.socket)
        if session is not None:
            session.connect_hooks_passed = True

    def _warn_about_server_limits(self, connection: Connection) -> None:
        """Report once each feature that the server, or middleware around it, makes unavailable."""
        if self._warned_about_server or connection.is_direct:
            return
        self._warned_about_server = True
        if has_direct_transport(connection.websocket.scope):
            self._events.emit("link_wrapped", logging.WARNING)
        if self._config.compression is CompressionMode.NONE:
            self._events.emit("compression_left_to_server", logging.WARNING)


def _close_quietly(
    raised: MemoryLimitExceededError, _: type[BaseException] | None, error: BaseException | None, __: Any
) -> bool:
    """Replace an uncaught error of `connect()` at the end of the endpoint with one that makes Starlette close.

    `MemoryLimitExceededError` cannot be a `WebSocketException` itself, because it is raised in HTTP routes too.
    """
    if error is not raised:
        return False
    close_info = close_info_for(raised)
    raise WebSocketException(close_info.code, close_info.reason) from raised
