"""Admission of handshakes: origin check, rates and capacity."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from fastapi import WebSocket, WebSocketException
from starlette.datastructures import MutableHeaders
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.compat.starlette import asgi_callables
from fastapi_ws_stabilizer.config import CompressionMode, DuplicatePolicy, WebSocketConfig
from fastapi_ws_stabilizer.connection.client_address import ClientAddressResolver
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from fastapi_ws_stabilizer.connection.server_transport import ServerTransport
from fastapi_ws_stabilizer.errors import (
    ConnectionLimitExceededError,
    DuplicateClientError,
    OriginNotAllowedError,
    ShutdownError,
)
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handshake.hello import HelloReader, credential_in
from fastapi_ws_stabilizer.handshake.rejection import Rejector
from fastapi_ws_stabilizer.hub.registry import MAX_CLOSING, ClosingConnections, ConnectionRegistry
from fastapi_ws_stabilizer.limits.connections import ConnectionLimiter, Reservation, retry_delay, shutdown_error
from fastapi_ws_stabilizer.net.origin import OriginPolicy
from fastapi_ws_stabilizer.net.proxies import rate_limit_key
from fastapi_ws_stabilizer.scheduling import LoopBudget, PacedCalls, PacedTasks
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.tasks import LazyEvent, start, wait_for_all
from fastapi_ws_stabilizer.wire.handshake import (
    ANSWERED_KEY,
    HEADERS_KEY,
    SERVED_KEY,
    select_subprotocol,
)
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from fastapi_ws_stabilizer.wire.v1.hello import Hello

MAX_ROUTES: Final = 64
"""Maximum number of routes for which an unanswered subprotocol is reported."""

LOSS_TIMEOUT: Final = 1.0
"""Maximum seconds until the server reports that an aborted transport is lost."""

WATCH_INTERVAL: Final = 1.0
"""Seconds between two checks whether the client of a handshake has left."""


class _NoHello:
    """Type of the marker for a handshake without a hello, which may still carry a credential."""


_NO_HELLO: Final = _NoHello()


async def _until_disconnect(receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    """Read ASGI events until the server reports a disconnect, or fails."""
    with suppress(Exception):
        while (await receive())["type"] != "websocket.disconnect":
            pass


class Handshake:
    """One opening handshake, until it becomes a connection or is rejected.

    Attributes:
        websocket: The WebSocket, accepted or not.
        speaks_v1: Whether the client offers `stabilizer.v1.json`.
        reservation: The connection slot.
        rejected: Whether the handshake was rejected and answered.
        established: Whether the handshake has become a connection.
        admission: The controller that admitted the handshake.
        parent: The same handshake at another manager, which admitted it before.
        endpoint: The task that serves the handshake. The connection takes it over.
        abandoned: Whether the client has left during the handshake.
        revoked: Client ids that were revoked since admission. The client may have been identified before.
    """

    __slots__ = (
        "_compresses",
        "_credential",
        "_hello",
        "_hello_reader",
        "abandoned",
        "admission",
        "endpoint",
        "established",
        "parent",
        "rejected",
        "reservation",
        "revoked",
        "speaks_v1",
        "websocket",
    )

    def __init__(
        self,
        websocket: WebSocket,
        reservation: Reservation,
        hello_reader: HelloReader,
        *,
        compresses: bool,
        admission: AdmissionController,
        parent: Handshake | None,
    ) -> None:
        self._compresses = compresses
        self.admission = admission
        self.parent = parent
        self.websocket = websocket
        self.speaks_v1 = SUBPROTOCOL in (websocket.scope.get("subprotocols") or ())
        self.reservation = reservation
        self._hello_reader = hello_reader
        self._hello: Hello | None = None
        self._credential: str | _NoHello | None = _NO_HELLO
        self.rejected = self.established = self.abandoned = False
        self.endpoint = EndpointTask(cancellable=True)
        self.revoked: frozenset[str] = frozenset()

    def check_abandoned(self) -> None:
        """Cancel the handshake if its client has left.

        The check reads no messages, because your code may accept the WebSocket and read them itself.
        """
        if ServerTransport(*asgi_callables(self.websocket)).closing:
            self.abandoned = True
            self.cancel()

    def cancel(self) -> None:
        """Cancel the task of the handshake, which then rejects it. Nothing happens if it is established or rejected."""
        if not self.established and not self.rejected:
            self.endpoint.cancel()

    async def wait_lost(self) -> None:
        """Wait for at most 1 s until the server has lost an abandoned handshake, and aborts its transport first.

        A transport that is closing may still have bytes to send. Until it is lost, uvicorn raises at an answer.
        """
        transport = ServerTransport(*asgi_callables(self.websocket))
        if transport.abort():
            lost = start(_until_disconnect(asgi_callables(self.websocket)[0]), name="ws-handshake-lost")
            if not await wait_for_all([lost], LOSS_TIMEOUT):
                lost.cancel()

    async def accept(self) -> None:
        """Accept the WebSocket. Nothing happens if it is accepted."""
        websocket = self.websocket
        if websocket.application_state is not WebSocketState.CONNECTED:
            if not self._compresses:
                link = ServerTransport(*asgi_callables(websocket)).direct_transport(websocket.scope)
                if link is not None:
                    link.refuse_compression()
            scope = websocket.scope
            offered = scope.get("subprotocols")
            subprotocol = select_subprotocol(scope) if offered else None
            headers: MutableHeaders | None = scope.pop(HEADERS_KEY, None)
            await websocket.accept(subprotocol, None if headers is None else headers.raw)
            if subprotocol is not None:
                scope[ANSWERED_KEY] = subprotocol
            elif offered:
                self.admission.on_unanswered(websocket)

    async def take_hello(self) -> Hello:
        """Return the hello as `hello` does, and release it. `credential` still returns the credential in it."""
        hello = await self.hello()
        self._hello = None
        return hello

    async def hello(self) -> Hello:
        """Accept a client of `stabilizer.v1.json`, and wait once for its hello.

        Raises:
            WebSocketException: No valid hello arrived in time. The WebSocket is closed.
            ConnectionLimitExceededError: The hello arrived after the reservation was released for another client.
        """
        if self.rejected:
            raise WebSocketException(1008, "already rejected")
        if self._hello is None:
            await self.accept()
            try:
                hello = await self._hello_reader.hello(self.websocket, on_evicted=self.reservation.release)
            except WebSocketException:
                self.rejected = True
                raise
            if self.admission.limiter.enabled:
                self.reservation.check()
            self._hello = hello
            self._credential = credential_in(hello, self.websocket)
        return self._hello

    async def credential(self) -> str | None:
        """Return the credential in the hello of a client of `stabilizer.v1.json`, or `None` for a plain client.

        A dependency may call this again, even when the connection is open and the endpoint reads from it. So the
        handshake stores the credential for its own lifetime, which is that of the dependency that admitted it.

        Raises:
            WebSocketException: No valid hello arrived in time. The WebSocket is closed.
        """
        if not self.speaks_v1:
            return None
        if isinstance(self._credential, _NoHello):
            self._credential = credential_in(await self.hello(), self.websocket)
        return self._credential


class AdmissionController:
    """Admission of handshakes for one manager: shutdown, origin, address, rates, capacity and duplicates.

    Args:
        config: The limits and the allowed origins.
        events: The bus for reports.
        addresses: The resolver of client addresses.
        rejector: The rejector of this manager.
        hello_reader: The reader of hellos, which gives up pending clients when the server is full.
        registry: The open connections.
        closing_connections: The connections in teardown.
        losses: The losses of connections that wait for their turn.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        addresses: ClientAddressResolver,
        rejector: Rejector,
        hello_reader: HelloReader,
        registry: ConnectionRegistry,
        closing_connections: ClosingConnections,
        losses: PacedCalls,
    ) -> None:
        self._events = events
        self._hello_reader = hello_reader
        self._registry = registry
        self._closing_connections = closing_connections
        self._losses = losses
        self._on_duplicate = config.on_duplicate
        self._max_connections = config.max_connections
        self._drain_window = config.drain_window
        self._max_cleanups = config.max_concurrent_cleanup
        self._compresses = config.compression is CompressionMode.DEFLATE
        self._addresses = addresses
        self._origins = OriginPolicy(config.allowed_origins, required=config.require_origin)
        self._requires_origin = config.require_origin
        self.rejector = rejector
        self.limiter = ConnectionLimiter(
            max_connections=config.max_connections,
            max_per_client=config.max_connections_per_client if config.on_duplicate is DuplicatePolicy.ALLOW else None,
            max_per_address=config.max_connections_per_address,
            rate=config.max_connect_rate,
            rate_per_address=config.max_connect_rate_per_address,
        )
        self.closed = False
        self._handshakes: set[Handshake] = set()
        self._turns = PacedTasks()
        self._empty: LazyEvent | None = None
        self._unanswered: set[str] = set()
        self._unchecked: list[Handshake] = []  # handshakes that the current check has still to look at
        self._timer: asyncio.TimerHandle | None = None
        self._context = contextvars.copy_context()  # not the context of the handshake that sets the timer

    def revoke(self, client_id: str) -> None:
        """Prevent the current handshakes from connecting as this client."""
        for handshake in self._handshakes:
            handshake.revoked |= {client_id}

    def close(self) -> None:
        """Reject new handshakes, and cancel the current ones."""
        self.closed = True
        for handshake in list(self._handshakes):
            handshake.cancel()

    def reopen(self) -> None:
        """Admit handshakes again after `close`."""
        self.closed = False

    async def wait_until_empty(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds until no handshake is left. Return whether none is. Cancelling is safe."""
        if not self._handshakes:
            return True
        if self._empty is None:
            self._empty = LazyEvent()
        return await wait_for_all([self._empty.future], timeout)

    def abort(self) -> None:
        """Abort the transports of all current handshakes."""
        for handshake in list(self._handshakes):
            ServerTransport(*asgi_callables(handshake.websocket)).abort()

    def stopping(self) -> ShutdownError:
        """Return the error for handshakes during shutdown, with a random delay after which to retry."""
        return shutdown_error(self._drain_window)

    def on_established(self, handshake: Handshake) -> None:
        """Remove a handshake that has become a connection."""
        handshake.established = True
        self.forget(handshake)

    def forget(self, handshake: Handshake) -> None:
        """Remove a handshake that was established or rejected. Nothing happens if it was removed."""
        self._handshakes.discard(handshake)
        if self._empty is not None and not self._handshakes:
            self._empty.set()
            self._empty = None

    def watch(self) -> None:
        """Check every `WATCH_INTERVAL` seconds, while there are handshakes, whether their clients have left."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                0.0 if self._unchecked else WATCH_INTERVAL, self._check_abandoned, context=self._context
            )

    def _check_abandoned(self) -> None:
        """Check the handshakes, and continue in the next iteration of the event loop if there are very many."""
        self._timer = None
        if not self._unchecked:
            self._unchecked = list(self._handshakes)
        loop_budget = LoopBudget()
        try:
            while self._unchecked and not loop_budget.exceeded():
                handshake = self._unchecked.pop()
                if handshake in self._handshakes and not handshake.rejected:
                    handshake.check_abandoned()
        finally:  # a transport of a foreign server may raise
            if self._handshakes:
                self.watch()
            else:
                self._unchecked.clear()

    def on_unanswered(self, websocket: WebSocket) -> None:
        """Report once for each route that the server selected none of the subprotocols that a client offered.

        RFC 6455 allows such an answer, but browsers then close the connection. The report does not contain the offered
        names, because one may be a credential.
        """
        scope = websocket.scope
        route = str(getattr(scope.get("route"), "path", scope.get("path")))
        if route in self._unanswered or len(self._unanswered) >= MAX_ROUTES:
            return
        self._unanswered.add(route)
        self._events.emit(
            "subprotocol_unanswered",
            logging.WARNING,
            route=route,
            offered=len(scope["subprotocols"]),
            served=", ".join(scope.get(SERVED_KEY, ())) or "none",
            advice="browsers and many devices close a connection if the server selects none of their subprotocols: "
            "declare the ones that the endpoint speaks with Depends(manager.socket_for(subprotocols=(...)))",
        )

    def _check_origin(self, websocket: WebSocket) -> None:
        headers = websocket.scope["headers"]  # not `websocket.headers`, which would stay in memory with the connection
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        if not origins and not self._requires_origin:  # most clients that are not browsers
            return
        hosts = self._addresses.hosts_of(websocket)
        problem = self._origins.problem(origins, hosts)
        if problem is not None:
            raise OriginNotAllowedError(problem, ", ".join(hosts))

    async def wait_for_turn(self) -> None:
        """Wait until the event loop has time for one more handshake. Without a storm it does not wait.

        It also waits for the losses of connections that are known now. Otherwise the server could reject a client
        because of its own lost connection, or because lost connections count as open. Cancelling is safe.
        """
        if self._losses:
            await self._losses.wait_for_earlier()
        if not self._turns.try_enter():
            await self._turns.enter()

    def admit(self, websocket: WebSocket, parent: Handshake | None = None) -> Handshake:
        """Admit a handshake before its client is identified, and reserve a connection slot. It does not wait.

        Args:
            websocket: The WebSocket.
            parent: The same handshake at another manager.

        Raises:
            ShutdownError: The manager is draining or stopped.
            OriginNotAllowedError: The `Origin` is not allowed.
            ConnectionLimitExceededError: The server is full, or handshakes arrive too fast.
            TooManyConnectionsError: The address has too many connections, or its handshakes arrive too fast.
        """
        if self.closed:
            raise self.stopping()
        self._check_origin(websocket)
        if len(self._closing_connections) >= MAX_CLOSING:  # a higher max_concurrent_cleanup runs more hooks at once
            raise ConnectionLimitExceededError("max_concurrent_cleanup", self._max_cleanups, retry_delay())
        if self._max_connections is not None:
            self._closing_connections.expedite_oldest(self._max_connections)
        reservation = self._reserve(websocket) if self.limiter.enabled else self.limiter.uncounted
        handshake = Handshake(
            websocket, reservation, self._hello_reader, compresses=self._compresses, admission=self, parent=parent
        )
        self._handshakes.add(handshake)
        return handshake

    def _reserve(self, websocket: WebSocket) -> Reservation:
        if self.limiter.is_full:
            self._hello_reader.evict_oldest_pending()
        address = rate_limit_key(self._addresses.address_of(websocket)) if self.limiter.by_address else ""
        return self.limiter.reserve(address, monotonic())

    # ── after the client is identified ──

    def confirm(
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
        if not self.limiter.enabled:
            return
        policy = self._on_duplicate
        replaces = policy is DuplicatePolicy.REPLACE or (policy is DuplicatePolicy.REJECT and has_token)
        replaced: list[Any] = self.others(client_id, session) if replaces else []
        if session is not None and session.connection is not None:
            replaced.append(session.connection)
        reservation.confirm(client_id, replaces=[one.reservation for one in replaced if one.reservation is not None])

    def check_duplicate(self, client_id: str, session: Session | None) -> None:
        """Check that a client is not connected, if `on_duplicate="reject"`.

        Raises:
            DuplicateClientError: The client has a connection that `session` does not take over.
        """
        if self._on_duplicate is DuplicatePolicy.REJECT and self.others(client_id, session):
            raise DuplicateClientError(client_id)

    def others(self, client_id: str, session: Session | None) -> list[Connection]:
        """Return the connections of a client except for those of `session`, which it may take over."""
        connections = self._registry.of_client(client_id)
        return connections if session is None else [one for one in connections if one.recipient is not session]
