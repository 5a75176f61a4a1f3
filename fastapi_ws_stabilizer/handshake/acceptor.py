"""Acceptance of handshakes, and adoption of WebSockets that your code has accepted."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from fastapi import HTTPException, WebSocket, WebSocketException
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, DisconnectReason, local_close
from fastapi_ws_stabilizer.compat.fastapi import find_exit_stack
from fastapi_ws_stabilizer.compat.starlette import asgi_callables
from fastapi_ws_stabilizer.config import CompressionMode, DuplicatePolicy
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask, Opened, bind_current
from fastapi_ws_stabilizer.connection.pending import PendingConnection
from fastapi_ws_stabilizer.connection.protocol import PLAIN
from fastapi_ws_stabilizer.connection.resources import SharedResources
from fastapi_ws_stabilizer.connection.server_transport import AsgiShim
from fastapi_ws_stabilizer.errors import (
    ConnectionLimitExceededError,
    DuplicateClientError,
    InvalidTokenError,
    MemoryLimitExceededError,
    OriginNotAllowedError,
    ShutdownError,
    SocketClosed,
    close_info_for,
    closed_error_for,
    is_bug,
)
from fastapi_ws_stabilizer.handlers.endpoint_closer import EndpointCloser
from fastapi_ws_stabilizer.handlers.exception_handlers import handler_for_endpoint
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.handshake.admission import AdmissionController, Handshake
from fastapi_ws_stabilizer.handshake.client_id import fresh_client_id, reconnect_token_from_request
from fastapi_ws_stabilizer.handshake.negotiator import SessionNegotiator
from fastapi_ws_stabilizer.handshake.request import ConnectionRequest, ServeOptions
from fastapi_ws_stabilizer.hub.registry import ClosingConnections
from fastapi_ws_stabilizer.net.tcp import HAS_UNSENT_LOW_WATER
from fastapi_ws_stabilizer.servers.direct import EXTENSION
from fastapi_ws_stabilizer.session_lifecycle import SessionLifecycle
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.reconnect_tokens import ReconnectTokenRegistry
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import ResumeResult, SessionStore
from fastapi_ws_stabilizer.sessions.v1_protocol import V1Protocol, session_of
from fastapi_ws_stabilizer.socket import SocketServices, StableSocket
from fastapi_ws_stabilizer.wire.handshake import HEADERS_KEY, check_headers
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome

_NOT_PINNED: Final = nullcontext()


class Acceptor:
    """Acceptor of connections: it identifies a client, runs hooks, negotiates the session, and opens the connection.

    Args:
        resources: What all connections share.
        services: What all sockets share.
        hooks: The hooks that decide about a client.
        admission: The admission controller.
        negotiator: The negotiator of sessions.
        sessions: The store of sessions.
        lifecycle: What restores rooms and user data.
        tokens: The reconnect tokens of plain clients.
        idempotency: Idempotency keys of handled messages.
        closing: The connections in teardown.
        closer: What closes a connection that fails while it is opened.
    """

    def __init__(
        self,
        resources: SharedResources,
        services: SocketServices,
        hooks: HookRegistry,
        admission: AdmissionController,
        negotiator: SessionNegotiator,
        sessions: SessionStore,
        lifecycle: SessionLifecycle,
        tokens: ReconnectTokenRegistry,
        idempotency: IdempotencyCache,
        closing: ClosingConnections,
        closer: EndpointCloser,
    ) -> None:
        self._resources = resources
        self._services = services
        self._hooks = hooks
        self._admission = admission
        self._negotiator = negotiator
        self._sessions = sessions
        self._lifecycle = lifecycle
        self._tokens = tokens
        self._idempotency = idempotency
        self._closing = closing
        self._closer = closer
        self._policy = resources.config.on_duplicate
        self._has_warned = False

    async def accept(self, handshake: Handshake, options: ServeOptions) -> Connection:
        """Identify the client of an admitted handshake, accept the WebSocket, and open a connection for it.

        The order of the steps is part of the security. The handshake hooks may reject the client, so nothing is built
        before they have run. A client of `stabilizer.v1.json` is identified by its hello, which follows the accept.

        Raises:
            WebSocketException: The connection was closed or rejected, and Starlette has nothing left to do.
            HTTPException: A handshake hook rejected the client, or failed (500).
            ShutdownError: The manager was shut down during the handshake.
            ConnectionLimitExceededError: The server is full, or the client or its address has too many connections.
        """
        request = self._identify(handshake, options)
        try:
            if not handshake.speaks_v1:
                has_token = request.claimed is not None
                self._admission.confirm(handshake.reservation, request.client_id, has_token=has_token)
            with self._pinned(request.claimed):
                if self._hooks.has("handshake"):
                    await self._run_handshake_hooks(request.pending())
                if self._admission.closed:
                    raise self._admission.stopping()
                await handshake.accept()
            if handshake.speaks_v1:
                connection = self._build(request, await self._negotiator.negotiate(request))
            else:
                self._use_token(request)
                connection = self._build(request)
        except BaseException:
            request.reject()
            raise
        self._admission.on_established(handshake)
        bind_current(connection)
        try:
            await self._open(connection, request)
        except (SocketClosed, DuplicateClientError) as error:
            code = connection.close_info.code if connection.close_info else error.close_code
            raise (self._closer.error_for_dependencies(connection, error) or WebSocketException(code)) from error
        return connection

    async def adopt(self, websocket: WebSocket, client_id: str, metadata: Mapping[str, Any] | None) -> Connection:
        """Open a connection for a WebSocket that your code has accepted.

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
        await self._admission.wait_for_turn()
        stack = find_exit_stack(websocket.scope)
        handshake = self._admit_adoption(websocket, client_id)
        handshake.endpoint = EndpointTask(cancellable=stack is not None)
        request = self._request(handshake, client_id, ServeOptions(client_id))
        try:
            with self._pinned(client_id if self._tokens.is_verified(client_id) else None):
                pending = request.pending(metadata)
            request.has_used_token = self._tokens.consume_verification(client_id, pending.connection_id)
            connection = self._build(request)
        except BaseException as error:
            request.reject()
            handshake.reservation.release()
            if isinstance(error, InvalidTokenError):
                self.reject_adoption(websocket, error, client_id)
            if stack is not None and isinstance(error, MemoryLimitExceededError):
                stack.push(functools.partial(_close_quietly, error))
            raise
        opened = bind_current(connection)
        opened.connecting = True
        if stack is not None:
            stack.push_async_exit(_AdoptingEndpoint(self._closer, connection, opened))
        elif (task := asyncio.current_task()) is not None:
            task.add_done_callback(functools.partial(_on_adopting_task_done, opened))
        await self._open(connection, request)
        opened.connecting = False
        return connection

    def reject_adoption(self, websocket: WebSocket, error: Exception, client_id: str) -> None:
        """Count and report that `connect()` rejects a client."""
        self._admission.rejector.record_rejection(websocket, error, client_id)

    # ── before the connection is built ──

    def _identify(self, handshake: Handshake, options: ServeOptions) -> ConnectionRequest:
        """Identify a client by the endpoint, else by its reconnect token; otherwise give it a new client id."""
        websocket = handshake.websocket
        token = None if handshake.speaks_v1 else reconnect_token_from_request(websocket)
        claimed = None if token is None else self._tokens.verify(token, options.client_id)
        client_id = options.client_id or claimed or fresh_client_id()
        request = self._request(handshake, client_id, options)
        request.claimed = claimed
        if options.expires_in is not None:
            request.identity_expiry = monotonic() + options.expires_in
        return request

    def _request(self, handshake: Handshake, client_id: str, options: ServeOptions) -> ConnectionRequest:
        return ConnectionRequest(handshake, client_id, options, self._services, self._resources.budget)

    def _pinned(self, client_id: str | None) -> AbstractContextManager[None]:
        """Protect the detached state of a client with a verified token from eviction; `None` is another client."""
        return _NOT_PINNED if client_id is None else self._lifecycle.pinned(client_id)

    async def _run_handshake_hooks(self, pending: PendingConnection) -> None:
        websocket = pending.websocket
        try:
            await self._hooks.handshake(pending.socket)
            if (headers := websocket.scope.get(HEADERS_KEY)) is not None:
                check_headers(headers.raw)
        except Exception as error:
            if not is_bug(error) or handler_for_endpoint(websocket, error) is not None:
                raise
            await self._hooks.report_bug("handshake_hook_failed", pending.socket, error)
            raise HTTPException(500) from error

    def _use_token(self, request: ConnectionRequest) -> None:
        """Use up the reconnect token of an accepted plain client.

        Raises:
            WebSocketException: The client was revoked, or another connection has used the token that identified it.
        """
        if request.client_id in request.handshake.revoked:
            raise WebSocketException(SESSION_ENDED, "revoked")
        if request.claimed is None:
            return
        token = reconnect_token_from_request(request.handshake.websocket) or ""
        request.has_used_token = self._tokens.consume_for(request.pending().connection_id, token, request.claimed)
        if not request.has_used_token and request.options.client_id is None:  # the hooks ran with the claimed id
            raise WebSocketException(4401, "token already used")

    def _admit_adoption(self, websocket: WebSocket, client_id: str) -> Handshake:
        """Admit a WebSocket that your code has accepted, and confirm its reservation."""
        try:
            handshake = self._admission.admit(websocket)
            self._admission.forget(handshake)  # it does not wait for anything
            has_token = self._tokens.is_verified(client_id)
            try:
                self._admission.confirm(handshake.reservation, client_id, has_token=has_token)
            except ConnectionLimitExceededError:
                handshake.reservation.release()
                raise
        except (ConnectionLimitExceededError, OriginNotAllowedError, ShutdownError) as error:
            self.reject_adoption(websocket, error, client_id)
            raise
        return handshake

    def _build(self, request: ConnectionRequest, resume_result: ResumeResult | None = None) -> Connection:
        """Build the connection of an accepted client, which takes over the ids and the socket of hooks."""
        handshake, pending, config = request.handshake, request.stand_in, self._resources.config
        connection = Connection(
            handshake.websocket,
            request.client_id,
            self._resources,
            connection_id=None if pending is None else pending.connection_id,
            control_frames=request.options.control_frames,
            endpoint=handshake.endpoint,
            protocol=PLAIN if resume_result is None else V1Protocol(resume_result, config, self._idempotency),
        )
        connection.reservation = handshake.reservation
        if resume_result is not None:
            request.session = resume_result.session
            connection.outcome = resume_result.outcome
            self._sessions.on_attached(request.session)
        expiry = None if request.identity_expiry is None else max(0.0, request.identity_expiry - monotonic())
        if request.expires_in is not None or expiry is not None:
            connection.credential = CredentialExpiry()
            connection.credential.start(connection, request.expires_in, expiry)
        if pending is None:  # no hook has run
            connection.socket = StableSocket(connection, self._services, identity=request.options.identity)
            return connection
        connection.socket = pending.socket
        try:
            pending.accept(connection)
        except MemoryLimitExceededError as error:  # a rejection would repeat at each reconnect
            connection.emit("user_data_lost", logging.WARNING, why=str(error))
        return connection

    # ── opening ──

    async def _open(self, connection: Connection, request: ConnectionRequest) -> None:
        """Open and register a connection and run its connect hooks. Close it if a step fails.

        Raises:
            SocketClosed: A connect hook rejected the client, or the client has left.
            DuplicateClientError: `on_duplicate="reject"` rejected the client.
        """
        refusal: SocketClosed | DuplicateClientError | None
        try:
            connection.open()
            self._warn_about_server_limits(connection)
            older = self._admission.others(connection.client_id, request.session)
            refusal = self._refusal(connection, older, has_used_token=request.has_used_token)
            if refusal is None:
                self._resources.listener.on_admitted(connection)
                self._restore(connection, request, older)
                self._close_duplicates(connection, request.session, older)
                await self._run_open_hooks(connection, request.session)
                if connection.close_info is not None:  # a hook closed it, or the client has left
                    refusal = closed_error_for(connection.close_info)
        except BaseException as error:
            if not connection.opened or await self._closer.close_after_endpoint(connection, error) is error:
                raise
            raise _closed_error(connection) from error
        if refusal is not None:
            await self._closer.close_after_endpoint(connection, refusal if connection.close_info is None else None)
            try:
                raise refusal
            finally:
                del refusal  # it refers to this frame

    def _refusal(
        self, connection: Connection, older: Sequence[Connection], *, has_used_token: bool
    ) -> SocketClosed | DuplicateClientError | None:
        """Return why an open connection may not stay, and close it, except for a duplicate; `None` if it may."""
        if connection.close_info is not None:  # a direct transport reports at once that the client has left
            return closed_error_for(connection.close_info)
        ended = None
        if has_used_token:
            ended = self._tokens.ended_by_application(connection.client_id, connection.connection_id)
        if ended is not None:
            connection.close(ended.cause, code=ended.code, reason=ended.reason)
        elif older and self._policy is DuplicatePolicy.REJECT and not has_used_token:  # else the older one is half-open
            return DuplicateClientError(connection.client_id)
        elif self._admission.closed:
            connection.close(DisconnectReason.SERVER_SHUTDOWN, reason=self._admission.stopping().reason)
        else:
            return None
        return _closed_error(connection)

    def _restore(self, connection: Connection, request: ConnectionRequest, older: Sequence[Connection]) -> None:
        """Restore the rooms of a resumed session, or the state of a plain client with a reconnect token."""
        if request.session is not None:
            self._lifecycle.restore_rooms(request.session)
        elif request.has_used_token:
            plain = [one for one in older if session_of(one) is None]  # a token restores nothing of a session
            self._lifecycle.restore(connection, plain)

    def _close_duplicates(self, connection: Connection, session: Session | None, older: Sequence[Connection]) -> None:
        """Close the older connections of a client, and end its detached state and its other detached sessions."""
        if self._policy is DuplicatePolicy.ALLOW:
            return
        for one in older:
            # A client with a session must not resume it, or two devices would replace each other forever.
            code = SESSION_ENDED if session_of(one) is not None else None
            one.close(DisconnectReason.REPLACED, code=code)
        client_id = connection.client_id
        if client_id in self._sessions.detached_by_client or client_id in self._lifecycle.detached_states:
            self._lifecycle.supersede_detached(client_id, session)
        # An application with a list of online clients then removes the old connection before it adds the new one.
        if closing := self._closing.of_client(client_id):
            connection.wait_for_hooks_of(closing)

    async def _run_open_hooks(self, connection: Connection, session: Session | None) -> None:
        """Run the connect hooks, or the resume hooks, after the hooks of the connections that it replaces."""
        if connection.handover is not None:
            await connection.wait_for_predecessors()
        if self._policy is not DuplicatePolicy.ALLOW and connection.client_id in self._lifecycle.end_hooks:
            await self._lifecycle.wait_for_session_end_hooks(connection.client_id)
        if connection.close_info is not None:
            return
        with connection.endpoint.running():
            connection.disconnect_hooks_pending = connection.connect_hooks_started = True
            outcome = connection.outcome
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
        if self._has_warned or (connection.is_direct and HAS_UNSENT_LOW_WATER):
            return
        self._has_warned = True
        events = self._resources.events
        unlimited = connection.server_transport.unlimited_buffers & self._resources.config.changed_options()
        if unlimited:
            events.emit("buffers_left_to_server", logging.WARNING, options=sorted(unlimited))
        if connection.is_direct:
            return
        if EXTENSION in (connection.websocket.scope.get("extensions") or ()):
            events.emit("link_wrapped", logging.WARNING)
        if self._resources.config.compression is CompressionMode.NONE:
            events.emit("compression_left_to_server", logging.WARNING)


class _AdoptingEndpoint:
    """End of an endpoint that has called `connect()`, on FastAPI's exit stack."""

    def __init__(self, closer: EndpointCloser, connection: Connection, opened: Opened) -> None:
        self._closer = closer
        self._connection = connection
        self._opened = opened

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self._opened.connecting = False
        if not self._connection.opened:
            self._opened.connection = None
            return False
        try:
            return await self._closer.exit_endpoint(self._connection, error)
        finally:
            self._opened.on_task_done()


def _on_adopting_task_done(opened: Opened, task: asyncio.Task[Any]) -> None:
    """Close the connection after the task that called `connect()` has ended. Used only without an exit stack."""
    connection = opened.connection
    if connection is not None and connection.opened and connection.close_info is None:
        close_info = close_info_for(asyncio.CancelledError() if task.cancelled() else task.exception())
        connection.close(close_info.cause, code=close_info.code, reason=close_info.reason)
    opened.on_task_done()


def _closed_error(connection: Connection) -> SocketClosed:
    return closed_error_for(connection.close_info or local_close(DisconnectReason.COMPLETED))


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
