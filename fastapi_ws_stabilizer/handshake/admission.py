"""The door: what is asked of a handshake before there is a connection, and who is turned away."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import Final

from fastapi import WebSocket, WebSocketException
from starlette.datastructures import MutableHeaders
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.compat.starlette import asgi_callables
from fastapi_ws_stabilizer.config import CompressionMode, DuplicatePolicy, WebSocketConfig
from fastapi_ws_stabilizer.connection.closing import MAX_CLOSING, ClosingConnections
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from fastapi_ws_stabilizer.connection.server_transport import ServerTransport
from fastapi_ws_stabilizer.errors import ConnectionLimitExceededError, OriginNotAllowedError, ShutdownError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handshake.hello import HelloReader, credential_in
from fastapi_ws_stabilizer.handshake.rejection import Rejector, answered_subprotocol
from fastapi_ws_stabilizer.limits.connections import ConnectionLimiter, Reservation, retry_delay, shutdown_error
from fastapi_ws_stabilizer.net.origin import OriginPolicy
from fastapi_ws_stabilizer.net.proxies import TrustedProxies, rate_limit_key
from fastapi_ws_stabilizer.tasks import LazyEvent, wait_for_all
from fastapi_ws_stabilizer.wire.handshake import ANSWERED_KEY, HEADERS_KEY, SERVED_KEY
from fastapi_ws_stabilizer.wire.v1.hello import Hello, offers_v1

MAX_ROUTES: Final = 64
"""Routes for which it is told that subprotocols are answered by none."""

WATCH_INTERVAL: Final = 1.0
"""Seconds between two looks whether the client of a handshake is still there."""


class _NoHello:
    """In the place of a credential: no hello has come that could hold one."""


_NO_HELLO: Final = _NoHello()


class Handshake:
    """A client at the door: it has a WebSocket, accepted or not, and no connection yet.

    Attributes:
        websocket: Its WebSocket.
        numbered: Whether it speaks `stabilizer.v1.json`.
        reservation: Its place among the connections.
        answered: Whether it was turned away, and knows it.
        inside: Whether it has a connection.
        admission: The admission control where it has knocked.
        parent: The same client at another manager's door, where it has knocked before.
        endpoint: The task that serves it. Its connection takes it over.
        abandoned: Whether its client has left during the handshake.
        revoked: Clients whose right was taken away since it came: who it is may have been found out before that.
    """

    __slots__ = (
        "_compresses",
        "_credential",
        "_hello",
        "_hello_reader",
        "_timer",
        "admission",
        "endpoint",
        "established",
        "gone",
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
        self.speaks_v1 = offers_v1(websocket.scope.get("subprotocols") or ())
        self.reservation = reservation
        self._hello_reader = hello_reader
        self._hello: Hello | None = None
        self._credential: str | _NoHello | None = _NO_HELLO
        self.rejected = self.established = self.gone = False
        self.endpoint = EndpointTask(cancellable=True)
        self._timer: asyncio.TimerHandle | None = None
        self.revoked: frozenset[str] = frozenset()

    def watch(self) -> None:
        """Look now and then whether the client is still there, as long as the handshake takes.

        Nothing is read meanwhile: your code may accept the WebSocket, and what comes then is its own.
        """
        self._timer = asyncio.get_running_loop().call_later(
            WATCH_INTERVAL,
            self._check_abandoned,
            context=contextvars.Context(),  # it may outlive its connection in the event loop
        )

    def _check_abandoned(self) -> None:
        self._timer = None
        if ServerTransport(*asgi_callables(self.websocket)).closing:
            self.gone = True
            self.cut()
        elif not self.established and not self.rejected:
            self.watch()

    def stop_watching(self) -> None:
        """The handshake is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def cut(self) -> None:
        """Go on with the handshake no longer: cancel what it waits for. It is turned away then, unless it was."""
        if not self.established and not self.rejected:
            self.endpoint.cancel()

    async def accept(self) -> None:
        """Accept its WebSocket. Nothing happens if that was done."""
        websocket = self.websocket
        if websocket.application_state is not WebSocketState.CONNECTED:
            if not self._compresses:
                link = ServerTransport(*asgi_callables(websocket)).direct_transport(websocket.scope)
                if link is not None:
                    link.refuse_compression()
            scope = websocket.scope
            subprotocol = answered_subprotocol(websocket)
            headers: MutableHeaders | None = scope.pop(HEADERS_KEY, None)
            await websocket.accept(subprotocol, None if headers is None else headers.raw)
            if subprotocol is not None:
                scope[ANSWERED_KEY] = subprotocol
            elif scope.get("subprotocols"):
                self.admission.on_unanswered(websocket)

    async def take_hello(self) -> Hello:
        """As `hello`, for the last time: the hello is kept no longer. The credential in it is, as `credential` says."""
        hello = await self.hello()
        self._hello = None
        return hello

    async def hello(self) -> Hello:
        """Accept a client of `stabilizer.v1.json`, and wait for its hello, once.

        Raises:
            WebSocketException: None came in time, or none that is good. It is closed already.
            ConnectionLimitExceededError: It came when its place had been given to another client.
        """
        if self.rejected:
            raise WebSocketException(1008, "refused already")
        if self._hello is None:
            await self.accept()
            try:
                hello = await self._hello_reader.hello(self.websocket, on_evicted=self.reservation.release)
            except WebSocketException:
                self.rejected = True
                raise
            self.reservation.check()
            self._hello = hello
            self._credential = credential_in(hello, self.websocket)
        return self._hello

    async def credential(self) -> str | None:
        """The credential in the first message of a client of `stabilizer.v1.json`; `None` of a plain one.

        A dependency may ask for it again, also when the connection is open and the endpoint reads from it. So it is
        kept, as long as the dependency lives that has let the client knock.

        Raises:
            WebSocketException: No such message came. It is closed already.
        """
        if not self.speaks_v1:
            return None
        if isinstance(self._credential, _NoHello):
            self._credential = credential_in(await self.hello(), self.websocket)
        return self._credential


class AdmissionController:
    """Asks who comes: from which page, from which address, whether there is room.

    Args:
        config: What is asked.
        events: Where refusals are told.
        rejector: Turns away who may not come in.
        hello_reader: Takes the hellos.
        endings: The connections that are over, and whose end is still worked on.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        rejector: Rejector,
        hello_reader: HelloReader,
        endings: ClosingConnections,
    ) -> None:
        self._events = events
        self._hello_reader = hello_reader
        self._endings = endings
        self._max = config.max_connections
        self._drain_window = config.drain_window
        self._max_cleanups = config.max_concurrent_cleanup
        self._compresses = config.compression is CompressionMode.DEFLATE
        self._proxies = TrustedProxies(config.trusted_proxies)
        self._reads_headers = bool(config.trusted_proxies)
        self._origins = OriginPolicy(config.allowed_origins, required=config.require_origin)
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
        self._empty: LazyEvent | None = None
        self._unanswered: set[str] = set()

    def revoke(self, client_id: str) -> None:
        """Let in nobody as that client who stands at the door now."""
        for handshake in self._handshakes:
            handshake.revoked |= {client_id}

    def close(self) -> None:
        """Let nobody in any more, and turn those away who stand at the door."""
        self.closed = True
        for handshake in list(self._handshakes):
            handshake.cut()

    def reopen(self) -> None:
        """Let clients in again."""
        self.closed = False

    async def wait_until_empty(self, timeout: float) -> bool:
        """Wait until all handshakes are over, at most `timeout` seconds; tell whether they are. Cancelling is safe."""
        if not self._handshakes:
            return True
        if self._empty is None:
            self._empty = LazyEvent()
        return await wait_for_all([self._empty.future], timeout)

    def abort(self) -> None:
        """Cut the connections whose handshakes do not come to an end."""
        for handshake in list(self._handshakes):
            ServerTransport(*asgi_callables(handshake.websocket)).abort()

    def stopping(self) -> ShutdownError:
        """Why nobody is let in any more, and when to come back."""
        return shutdown_error(self._drain_window)

    def forget(self, handshake: Handshake) -> None:
        """Somebody stands at the door no more: inside, or turned away. Nothing happens if that was told."""
        self._handshakes.discard(handshake)
        handshake.stop_watching()
        if self._empty is not None and not self._handshakes:
            self._empty.set()
            self._empty = None

    def on_unanswered(self, websocket: WebSocket) -> None:
        """Report, once for a route, that a client has offered subprotocols and was answered none.

        RFC 6455 lets a server do so, and browsers close the connection then. What was offered may be a credential, and
        is not told.
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
            advice="browsers and many devices close a connection whose subprotocols are answered by none: name those "
            "that the endpoint speaks with Depends(manager.socket_for(subprotocols=(...)))",
        )

    def address_of(self, websocket: WebSocket) -> str:
        """Where a client comes from: what a trusted proxy says, else the other end of the connection."""
        return self._proxies.client_of(self._peer_of(websocket), _headers(websocket, b"x-forwarded-for"))

    def _peer_of(self, websocket: WebSocket) -> str | None:
        """The other end of a connection; without `trusted_proxies`, whom the server has put there.

        A server that believes X-Forwarded-For has put somebody in the place of the proxy, and a client may have named
        that one. So with `trusted_proxies` the transport is asked, where it can be reached.
        """
        peer = ServerTransport(*asgi_callables(websocket)).peer if self._reads_headers else None
        if peer is not None:
            return peer
        return None if websocket.client is None else websocket.client.host

    def _check_origin(self, websocket: WebSocket) -> None:
        hosts = _headers(websocket, b"host")
        if self._proxies.trusts(self._peer_of(websocket)):
            hosts += [host.strip() for value in _headers(websocket, b"x-forwarded-host") for host in value.split(",")]
        problem = self._origins.problem(_headers(websocket, b"origin"), hosts)
        if problem is not None:
            raise OriginNotAllowedError(problem, ", ".join(hosts))

    def admit(self, websocket: WebSocket, parent: Handshake | None = None) -> Handshake:
        """Ask what can be asked of a handshake before it is known who has come. Nothing of it waits.

        Args:
            websocket: The WebSocket.
            parent: The same client at another manager's door.

        Raises:
            ShutdownError: Nobody is let in any more.
            OriginNotAllowedError: A page of somebody else's site has opened it.
            ConnectionLimitExceededError: There is no room.
            TooManyConnectionsError: There are too many from its address, or it comes too often.
        """
        if self.closed:
            raise self.stopping()
        self._check_origin(websocket)
        if len(self._endings) >= MAX_CLOSING:  # the option by which more hooks run at the same time
            raise ConnectionLimitExceededError("max_concurrent_cleanup", self._max_cleanups, retry_delay())
        self._endings.expedite_oldest(self._max)
        if self.limiter.is_full:
            self._hello_reader.evict_oldest_pending()
        address = rate_limit_key(self.address_of(websocket)) if self.limiter.by_address else ""
        reservation = self.limiter.reserve(address, monotonic())
        handshake = Handshake(
            websocket, reservation, self._hello_reader, compresses=self._compresses, admission=self, parent=parent
        )
        self._handshakes.add(handshake)
        return handshake


def _headers(websocket: WebSocket, name: bytes) -> list[str]:
    """The values of all headers of a name. Starlette's own would stay in memory for as long as the connection."""
    return [value.decode("latin-1") for key, value in websocket.scope["headers"] if key == name]
