"""Negotiation of the session with a `stabilizer.v1.json` client: hello, credential, admission, resume."""

from __future__ import annotations

from fastapi import WebSocketException

from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, SUPERSEDED
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.handshake.admission import AdmissionController
from fastapi_ws_stabilizer.handshake.hello import HelloReader, credential_in
from fastapi_ws_stabilizer.handshake.rejection import REFUSALS
from fastapi_ws_stabilizer.handshake.request import ConnectionRequest
from fastapi_ws_stabilizer.sessions.store import ResumeResult, SessionStore, StaleAttemptError
from fastapi_ws_stabilizer.wire.v1.hello import Hello


class SessionNegotiator:
    """Negotiator of sessions. It closes the WebSocket of a client that gets none.

    Args:
        admission: The admission controller, which knows the other connections of a client.
        hooks: The auth hooks.
        hello_reader: The reader of hellos.
        sessions: The store of sessions.
    """

    def __init__(
        self,
        admission: AdmissionController,
        hooks: HookRegistry,
        hello_reader: HelloReader,
        sessions: SessionStore,
    ) -> None:
        self._admission = admission
        self._hooks = hooks
        self._hello_reader = hello_reader
        self._sessions = sessions

    async def negotiate(self, request: ConnectionRequest) -> ResumeResult:
        """Read the hello of an accepted client, authenticate the client, and resume or create its session.

        The order is part of the security: no check comes after a change to the session, and nothing awaits between the
        checks and the change. A cancellation leaves the session as it is.

        Returns:
            The session and the result of the resume.

        Raises:
            WebSocketException: The client was rejected, and the WebSocket is closed.
            ConnectionLimitExceededError: The hello arrived after the reservation was released for another client.
        """
        hello = await request.handshake.take_hello()
        await self._admission.wait_for_turn()
        await self._authenticate(request, hello)
        try:
            self._check_admission(request, hello)
            return self._sessions.resume(hello, request.client_id)
        except StaleAttemptError as stale:
            superseded = WebSocketException(SUPERSEDED, "a newer connection has the session")
            raise await self._reject(request, superseded) from stale
        except REFUSALS as error:
            raise await self._reject(request, error) from error

    async def _authenticate(self, request: ConnectionRequest, hello: Hello) -> None:
        """Identify the client by the session that its hello proves, and verify its credential.

        Raises:
            WebSocketException: The credential is invalid, and the WebSocket is closed.
        """
        websocket, pending = request.handshake.websocket, request.pending()
        proven = self._sessions.authenticate(hello)
        if proven is not None and request.options.client_id is None:
            request.identify(proven.client_id)  # before authentication, because the hooks read the client id
        try:
            with self._hello_reader.pending_handshake(), self._sessions.pinned(proven):
                credential = credential_in(hello, websocket)
                request.expires_in = await self._hooks.auth(pending.socket, credential)
        except Exception as error:
            raise await self._reject(request, error) from error

    def _check_admission(self, request: ConnectionRequest, hello: Hello) -> None:
        """Check that an authenticated client may connect, and confirm its reservation.

        Raises:
            ShutdownError: The manager was drained or stopped during the authentication.
            WebSocketException: The client or its session was ended by the application.
            DuplicateClientError: The client is connected, and `on_duplicate="reject"`.
            ConnectionLimitExceededError: The server is full, or the client or its address has too many connections.
        """
        client_id, handshake = request.client_id, request.handshake
        if self._hello_reader.is_closed:
            raise self._admission.stopping()
        # Again, because hooks have run since: the session may have ended, or another token may be valid.
        session = self._sessions.authenticate(hello) or self._sessions.superseded_by(hello, client_id)
        if client_id in handshake.revoked:
            raise WebSocketException(SESSION_ENDED, "revoked")
        close_info = self._sessions.ended_by_application(hello, request.options.client_id)
        if close_info is not None:
            raise WebSocketException(close_info.code, close_info.reason)
        self._admission.check_duplicate(client_id, session)
        self._admission.confirm(handshake.reservation, client_id, session=session)

    async def _reject(self, request: ConnectionRequest, error: Exception) -> WebSocketException:
        """Close the WebSocket of a client without a session, and return the exception that ends its endpoint."""
        rejection = await self._hello_reader.reject(request.handshake.websocket, error, request.client_id)
        request.handshake.rejected = True
        return rejection
