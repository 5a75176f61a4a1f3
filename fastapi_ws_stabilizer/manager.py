"""`WebSocketConnectionManager`: the public interface of the library."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from fastapi import HTTPException, WebSocket
from starlette.requests import HTTPConnection

from fastapi_ws_stabilizer.auth.signed_tokens import RECONNECT_TOKEN, TICKET, SignedTokens
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.compat.starlette import wrap_lifespan
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.doctor.checks import run_checks
from fastapi_ws_stabilizer.doctor.collect import CheckOptions, collect_context, run_startup_checks
from fastapi_ws_stabilizer.doctor.findings import Finding
from fastapi_ws_stabilizer.errors import (
    InvalidTokenError,
    ShutdownError,
    TokenExpiredError,
    WrongLoopError,
)
from fastapi_ws_stabilizer.events import Counters, EventBus
from fastapi_ws_stabilizer.from_thread import FromThread
from fastapi_ws_stabilizer.gc_pacing import PacedConnections
from fastapi_ws_stabilizer.handlers.dispatcher import Dispatcher
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.handlers.registration import HookRegistrar, MessageRegistrar
from fastapi_ws_stabilizer.handlers.registry import HandlerRegistry
from fastapi_ws_stabilizer.handshake.client_id import Moment
from fastapi_ws_stabilizer.handshake.request import ServeOptions
from fastapi_ws_stabilizer.handshake.routes import UnmatchedRouteLogger
from fastapi_ws_stabilizer.hub.broadcast import BroadcastResult
from fastapi_ws_stabilizer.limits.connections import shutdown_error
from fastapi_ws_stabilizer.metrics.timings import Timings
from fastapi_ws_stabilizer.node import Node
from fastapi_ws_stabilizer.observability.logs import get_logger, is_logged, write_event
from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.servers.uvicorn.options import uvicorn_options
from fastapi_ws_stabilizer.shutdown.drain import NodeShutdown, ShutdownReport
from fastapi_ws_stabilizer.shutdown.signals import SignalHandler
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.socket_context import (
    SocketContext,
    anonymous_dependency,
    identity_dependency,
    reject_handshake,
)
from fastapi_ws_stabilizer.wire.encoded import encode
from fastapi_ws_stabilizer.wire.handshake import served_subprotocols
from fastapi_ws_stabilizer.wire.identifiers import check_client_id
from fastapi_ws_stabilizer.wrong_names import OF_MANAGER, missing

STATE_KEY: Final = "fastapi_ws_stabilizer"
"""Key of the manager in the app's state and in the server's lifespan state."""


def _running_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop.

    Raises:
        WrongLoopError: No asyncio event loop runs. The server may run the loop of another library.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise WrongLoopError("no_asyncio") from None


class WebSocketConnectionManager:
    """Manager of all WebSocket connections of one application.

    ```python
    manager = WebSocketConnectionManager(WebSocketConfig(heartbeat_interval=30))
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocket = Depends(stable_socket)) -> None:
        await ws.run()
    ```

    The manager, its rooms and its sockets belong to the event loop that the manager was started on. Calls that only
    read (`get_...`, `room.clients`, `ws.closed`) work in any thread. Other threads send with `manager.from_thread`. Any
    other call outside that event loop raises `WrongLoopError`.

    Args:
        config: The options. `None` means the defaults.

    Attributes:
        config: The options.
        events: Event bus to which listeners subscribe.
    """

    on_handshake: HookRegistrar = HookRegistrar("handshake")
    """Call a function before a connection is accepted: `hook(ws)`.

    It can read the socket, set its `user_data`, and reject the client by raising an `HTTPException`. It is not called
    for `manager.connect()`, because your code has accepted that WebSocket before.
    """
    on_connect: HookRegistrar = HookRegistrar("connect")
    """Call a function when a connection is accepted and registered: `hook(ws)`.

    It can send, and reject the client by closing the socket or by raising. `HTTPException(403)` closes with 4403.
    """
    on_disconnect: HookRegistrar = HookRegistrar("disconnect")
    """Call a function when a connection has closed: `hook(ws, reason)`, with a `DisconnectReason`.

    It is called exactly once for each connection for which connect hooks started, after the remaining messages have
    been handled. It may take `disconnect_grace` seconds.
    """
    on_resume: HookRegistrar = HookRegistrar("resume")
    """Call a function when a client has resumed its session: `hook(ws, outcome)`, with a `ResumeOutcome`.

    It is called instead of the connect hooks, after the disconnect hooks of the previous connection. `ws.user_data` and
    `ws.rooms` are those of the session. Raising rejects the client, as in a connect hook.
    """
    on_session_end: HookRegistrar = HookRegistrar("session_end")
    """Call a function when a session has ended: `hook(ws, reason)`, with the reason of its last disconnect.

    A session ends with a close code such as 1000, or when the client does not resume within `session_ttl`. For a plain
    client without a reconnect token the session ends with its connection.
    """
    on_auth: HookRegistrar = HookRegistrar("auth")
    """Call a function with the credential of a `stabilizer.v1.json` client: `hook(ws, credential)`.

    It is called for the hello, before the client has a session, with `None` if the hello has no credential. It is
    called again for each new credential. To reject, raise an `HTTPException(401)`: the server closes with 4401, and the
    client gets a new credential. If the function returns the seconds until the credential expires, the server asks the
    client for a new one in time.
    """
    on_error: HookRegistrar = HookRegistrar("error")
    """Call a function with each bug in an endpoint, a hook, a handler or a task of a socket: `hook(ws, error)`.

    The server logs the bug and closes the connection with 1011, whatever the function does.
    """
    on_slow: HookRegistrar = HookRegistrar("slow")
    """Call a function when a client does not read its messages: `hook(ws, how)`, with a `SlowConsumer`.

    It is called once when the client lags, once when the server drops messages to it, and once when the server
    disconnects it as a slow consumer. After the client has caught up, each can happen again. `ws.queued_messages` and
    `ws.dropped_messages` show the extent. The server does not wait for the function.
    """
    on_join: HookRegistrar = HookRegistrar("join")
    """Call a function when a client has joined a room: `hook(room, presence)`, with a `Room` and a `Presence`.

    It is called once for each client, regardless of its number of connections. In one room, hooks are called one after
    the other, in the order in which clients joined and left.
    """
    on_leave: HookRegistrar = HookRegistrar("leave")
    """Call a function when a client has left a room: `hook(room, presence)`, with a `Room` and a `Presence`.

    It is called when the last connection of the client leaves with `ws.leave`, is closed by the client with 1000, or is
    closed by the application. After a lost connection it is called when `presence_grace` has passed, unless the client
    has returned.
    """
    on_message: MessageRegistrar = MessageRegistrar()
    """Call a function with messages, from `ws.run()`: `handler(ws, message)` or `handler(ws)`.

    `@manager.on_message("chat")` takes JSON objects with the `type` `chat`. `@manager.on_message` takes every message
    without a typed handler. The annotation of `message` sets its type: a pydantic model, `dict`, `str`, `bytes`, or
    another type that pydantic validates. An invalid message gets an error reply, and the connection stays open.
    """

    def __init__(self, config: WebSocketConfig | None = None) -> None:
        if config is not None and not isinstance(config, WebSocketConfig):
            raise TypeError(f"config must be a WebSocketConfig, not {config!r}: {_correct_call(config)}")
        self.config: WebSocketConfig = config or WebSocketConfig()
        self.events: EventBus = EventBus()
        self.events.subscribe(write_event, takes=is_logged)
        if self.config.enable_metrics:
            self.events.timings = Timings()
        self._handlers = HandlerRegistry()
        self._hooks = HookRegistry(self.events, self.config.disconnect_grace, self.config.hello_timeout)
        # The first connection may start the manager. Work for all connections must not run in that one's context.
        self._context = contextvars.copy_context()
        self._started_at = 0.0
        secrets = [secret.get_secret_value().encode() for secret in self.config.reconnect_secret or ()]
        self._tokens = SignedTokens(RECONNECT_TOKEN, secrets, self.config.reconnect_token_ttl.total_seconds())
        self._tickets = SignedTokens(TICKET, secrets, self.config.ticket_ttl)
        self._reported_findings: set[str] = set()
        self._app: Any = None
        self._signals = SignalHandler(self.events, self._drain_before_exit)
        self._paced = PacedConnections(self.events, self.get_connection_count, enabled=self.config.gc_pacing == "auto")
        self._create_node(None)

    if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept every name

        def __getattr__(self, name: str) -> Any:
            """Raise for an unknown name, with a hint for names that other libraries use."""
            return missing(self, name, OF_MANAGER)

    def __repr__(self) -> str:
        return f"<WebSocketConnectionManager {self.get_connection_count()} connections>"

    # ── starting and stopping ──

    async def start(self) -> None:
        """Prepare for connections on the running event loop. Further calls change nothing.

        Your code need not call this: `lifespan`, `install` and the first connection do.

        Raises:
            WrongLoopError: The manager belongs to another event loop, which still runs or has open connections. Or no
                asyncio event loop runs.
        """
        self._check_other_loop(_running_loop())
        self._context = contextvars.copy_context()
        self._shutdown.cancel()
        self._require_node()
        self._paced.start()
        if self.config.handle_signals:
            self._signals.install()

    def _require_node(self, *, from_connection: bool = False) -> Node:
        loop = _running_loop()
        if self._shutdown.has_begun and self._node.loop in (None, loop):
            raise shutdown_error(self.config.drain_window)
        if self._node.loop is loop:
            return self._node
        self._check_other_loop(loop)
        # The first start, or the previous loop has ended: TestClient without `with` makes a loop for each connection.
        self._started_at = monotonic()
        self._context.run(self._create_node, loop)
        self._paced.start()
        self._set_log_level()
        run_startup_checks(
            self.events,
            self.config,
            self._app,
            refuses=self._hooks.has("handshake"),
            guarded=self._hooks.has("handshake", "auth"),
            has_lifespan=not from_connection,
            reported=self._reported_findings,
        )
        return self._node

    def _create_node(self, loop: asyncio.AbstractEventLoop | None) -> None:
        dispatcher = Dispatcher(self._handlers, self.config, self.events)
        self._node = Node(self.config, self.events, self._hooks, dispatcher, self._tokens, loop)
        self._shutdown = NodeShutdown(self._node, self.config, self.events, self._signals)

    def _set_log_level(self) -> None:
        logger = get_logger()
        if "log_level" in self.config.model_fields_set or logger.level == logging.NOTSET:
            logger.setLevel(self.config.log_level)  # a default must not override configure_logging()

    async def _node_for(self, websocket: WebSocket) -> Node:
        """Return the node for a handshake; reject the handshake if the manager is shut down."""
        node = self._node
        if node.loop is _running_loop() and not self._shutdown.has_begun:
            return node
        try:
            return self._require_node(from_connection=True)
        except ShutdownError as error:
            raise await reject_handshake(self._node.admission, websocket, error) from error

    def _check_other_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raise if the manager's event loop is a different one that runs, or that has connections and may run again.

        Raises:
            WrongLoopError: The other event loop is in use.
        """
        current = self._node.loop
        if current is None or current is loop or current.is_closed():
            return
        if current.is_running() or self._node.registry:
            raise WrongLoopError("two_loops")

    async def graceful_shutdown(self, timeout: float | None = None) -> ShutdownReport:
        """Drain like `drain`, then release all resources. After a drain, return the report of that drain.

        The server sends each connection its queued messages and the close frame, runs its disconnect hooks, and waits
        for its endpoint. Cancelling ends the wait, but not the drain.

        Args:
            timeout: Maximum seconds for the whole shutdown. `None` means `drain_timeout`. Then the server aborts the
                connections that are left.
        """
        self._node.hub.check_loop()
        try:
            return await self._shutdown.stop(timeout)
        finally:
            self._paced.stop()

    async def drain(self, timeout: float | None = None) -> ShutdownReport:
        """Reject new connections, close the open ones over `drain_window`, and wait for them to end.

        New connections get HTTP 503 with `Retry-After`. The server gives each `stabilizer.v1.json` client a time at
        which to leave. It closes each plain client with 1012 and a reason that says when to reconnect (`retry=` in
        milliseconds). With `handle_signals`, SIGTERM and SIGINT start a drain before the server handles them. A further
        call waits for the same drain, shortens it if the new timeout ends earlier, and returns the report of that
        drain. `start()` cancels it. Cancelling this call ends the wait, but not the drain.

        In an endpoint, handler or hook, the call does not wait for the connection of that code, because the connection
        ends only after your code continues.

        Args:
            timeout: Maximum seconds for the whole drain. `None` means `drain_timeout`. Then the server aborts the
                connections that are left.
        """
        self._node.hub.check_loop()
        return await self._shutdown.drain(timeout)

    async def _drain_before_exit(self) -> ShutdownReport:
        """Drain because of a signal."""
        return await self._shutdown.drain_before_exit()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[dict[str, Any]]:
        """Run the manager as the lifespan of an app: `FastAPI(lifespan=manager.lifespan)`.

        If the app has its own lifespan, write `async with manager.lifespan(app) as state: yield state` in it.
        """
        self._attach(app)
        await self.start()
        try:
            yield {STATE_KEY: self}
        finally:
            await self.graceful_shutdown()

    def install(self, app: Any) -> None:
        """Make this the manager of an app and wrap the lifespan of the app. Further calls change nothing.

        Raises:
            RuntimeError: The app has another manager. Name each manager with `Depends(manager.socket)` instead.
        """
        installed = getattr(app.state, STATE_KEY, None)
        if installed is self:
            return
        if installed is not None:
            raise RuntimeError(
                "this app already has a manager: install one, and name the other with Depends(manager.socket)"
            )

        def wrapped(inner: Any) -> Any:
            @asynccontextmanager
            async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
                # The app's own lifespan is the outer one, because hooks may need its resources.
                async with inner(app) as state, self.lifespan(app) as own_state:
                    yield {**own_state, **(state or {})}

            return lifespan

        wrap_lifespan(app, wrapped)
        self._attach(app)

    def uvicorn_options(self) -> dict[str, Any]:
        """Return the uvicorn options that match this manager: `uvicorn.run(app, **manager.uvicorn_options())`.

        They select `StableWebSocketProtocol`. They set the message size limit, the pings of WebSockets that this
        manager does not serve, compression, and a limit for uvicorn's own shutdown. They do not set `proxy_headers`,
        which HTTP routes use for client addresses: `trusted_proxies` works with either value.
        """
        return uvicorn_options(self.config)

    def check(
        self,
        app: Any = None,
        *,
        server: str | None = None,
        server_options: Mapping[str, Any] | None = None,
        platform: str | Iterable[str] = (),
        idle_timeout: float | None = None,
        max_lifetime: float | None = None,
        grace: float | None = None,
        pre_stop: float = 0.0,
        http2: bool = False,
        caching: bool = False,
    ) -> list[Finding]:
        """Run the doctor's checks and return the settings that conflict with the app, its server or its platforms.

        `python -m fastapi_ws_stabilizer doctor` runs the same checks from the command line.

        Args:
            app: App with the routes to check. `None` means the app of this manager.
            server: Name of the server, such as `uvicorn`. `None` means the server of this process; its options are
                then unknown unless `server_options` has them.
            server_options: Server options that you set, such as `manager.uvicorn_options()`. All others count as
                defaults.
            platform: Platforms on the path, as in `WebSocketConfig.for_platform`, with their default values.
            idle_timeout: Shortest idle timeout on the path in seconds, if it is not the default.
            max_lifetime: Shortest lifetime on the path in seconds, if it is not the default.
            grace: Seconds between SIGTERM and SIGKILL, if they are not the default.
            pre_stop: Duration of the `preStop` hook in seconds.
            http2: Whether every hop to the server speaks HTTP/2.
            caching: Whether the platform caches the WebSocket route.

        Returns:
            The findings, sorted by code. The list is empty if there is no conflict.

        Raises:
            ValueError: A server, a server option or a platform is unknown.
        """
        options = CheckOptions(
            server=server,
            server_options=server_options,
            platform=platform,
            idle_timeout=idle_timeout,
            max_lifetime=max_lifetime,
            grace=grace,
            pre_stop=pre_stop,
            http2=http2,
            caching=caching,
        )
        context = collect_context(
            self.config,
            self._app if app is None else app,
            options,
            refuses=self._hooks.has("handshake"),
            guarded=self._hooks.has("handshake", "auth"),
        )
        return run_checks(context)

    def _attach(self, app: Any) -> None:
        self._app = app
        setattr(app.state, STATE_KEY, self)
        UnmatchedRouteLogger.watch(app, self.events)

    # ── dependencies ──

    async def socket(self, websocket: WebSocket) -> AsyncIterator[StableSocket]:
        """Yield a socket of this manager: the dependency `Depends(manager.socket)`."""
        async with self.serve(websocket) as socket:
            yield socket

    def socket_for(
        self,
        identify: Callable[..., Any] | None = None,
        *,
        key: Callable[[Any], object] | None = None,
        expires_at: Callable[[Any], Moment] | None = None,
        control_frames: bool = True,
        subprotocols: str | Sequence[str] = (),
    ) -> Callable[..., AsyncIterator[StableSocket]]:
        """Create a dependency that takes the client id from another dependency.

        For example, `Depends(manager.socket_for(current_user))`.

        Args:
            identify: Any FastAPI dependency. Its return value is `ws.identity`; an exception rejects the connection.
                Without it, the client id comes from the path or the query, as with `manager.socket`.
            key: Function that returns the client id for the identity. Not needed for `str`, `int` and `UUID`.
            expires_at: Function that returns the expiry of the identity: a `datetime` with a time zone, seconds since
                1970 as in a JWT's `exp`, or `None`. Before the expiry, the server asks the client for a new
                credential, which `on_auth` checks. Without a new one, the server closes the connection with 4401.
            control_frames: Whether the library handles the client's text pings and pongs instead of the endpoint.
            subprotocols: Subprotocols of the endpoint, such as `("ocpp2.1", "ocpp1.6")`. The server selects the first
                one that the client offers, which is `ws.subprotocol`. If the client offers only others, the server
                selects none and logs a warning.

        Raises:
            TypeError: `key` or `expires_at` is set without `identify`.
            ValueError: A subprotocol is not a valid name.
        """
        served = served_subprotocols(subprotocols)
        if identify is not None:
            return identity_dependency(self._node_for, self.serve, identify, key, expires_at, control_frames, served)
        if key is not None or expires_at is not None:
            raise TypeError("socket_for with key or expires_at needs a dependency that identifies the client")
        return anonymous_dependency(self.serve, control_frames, served)

    def serve(
        self,
        websocket: WebSocket,
        client_id: str | None = None,
        *,
        identity: Any = None,
        expires_in: float | None = None,
        control_frames: bool = True,
        subprotocols: str | Sequence[str] = (),
    ) -> SocketContext:
        """Return a context manager that accepts and registers a socket, and closes it at the end.

        The dependencies are built on it. Write `async with manager.serve(websocket) as socket:`. Enter and exit it in
        the task that serves the WebSocket.

        Args:
            websocket: A WebSocket that is not accepted yet.
            client_id: The client id. `None` takes it from the path or the query, or creates one.
            identity: The value of `ws.identity`.
            expires_in: Seconds until the identity expires. `None` means never.
            control_frames: Whether the library handles the client's text pings and pongs instead of the endpoint.
            subprotocols: Subprotocols of the endpoint. The server selects the first one that the client offers.

        Raises:
            ValueError: `client_id` is empty or breaks the rule for names, or a subprotocol is not a valid name.
            HTTPException: The manager is shut down (503), or a handshake hook rejected the connection.
            WebSocketException: The connection ended with this code, before the endpoint began or while it ran.
        """
        if client_id is not None:
            check_client_id(client_id)
        return SocketContext(
            self._node_for,
            websocket,
            ServeOptions(client_id, identity, expires_in, control_frames),
            served_subprotocols(subprotocols) if subprotocols else (),
        )

    # ── connections that you accept yourself ──

    async def connect(
        self, client_id: str, websocket: WebSocket, metadata: Mapping[str, Any] | None = None
    ) -> StableSocket:
        """Register a WebSocket that your code has accepted. Your code continues to read from it.

        The library then manages it like any other connection: it handles pings and pongs, and detects a disconnect. In
        a FastAPI endpoint, it closes the connection with a matching code when the endpoint ends.

        Raises:
            ValueError: `client_id` is empty, or breaks the rule for names: see `docs/concepts/security.md`.
            RuntimeError: The WebSocket is not accepted, or is already connected.
            ShutdownError: The manager drains or is shut down. If the endpoint lets it escape, the server closes with
                1012.
            SocketClosed: A connect hook rejected the connection, or it is already closed. It is a
                `WebSocketDisconnect`.
            DuplicateClientError: The client is already connected and `on_duplicate="reject"`.
            ConnectionLimitExceededError: A connection limit is reached. It is a `TooManyConnectionsError` if the limit
                is the client's or its IP address's.
            OriginNotAllowedError: The `Origin` of the handshake is not allowed.
            InvalidTokenError: The token that this task has validated for the client has since been revoked.
            MemoryLimitExceededError: The metadata exceeds a memory limit.
        """
        check_client_id(client_id)
        try:
            node = self._require_node(from_connection=True)
        except ShutdownError as error:
            self._node.acceptor.reject_adoption(websocket, error, client_id)
            raise
        connection = await node.acceptor.adopt(websocket, client_id, metadata)
        socket: StableSocket = connection.socket
        return socket

    async def disconnect(self, client_id: str, code: int = 1000, reason: str = "") -> None:
        """Close all connections of a client, without waiting for the client.

        In the task that registered a connection under this client id, the call closes that connection and never a newer
        one. It does nothing if that connection is already closed.

        A detached client counts as connected. Its session, or its state for a reconnect token, ends. When the client
        reconnects to it, the server closes the new connection with this code.

        Raises:
            ConnectionNotFoundError: The client is neither connected nor detached.
            ValueError: `code` cannot be sent.
        """
        self._node.disconnect(client_id, code, reason)

    async def handle_pong(self, client_id: str) -> None:
        """Record a pong of a client, for code that reads pongs itself. Do nothing if the client is not connected."""
        self._node.record_pong(client_id)

    # ── sending ──

    async def send_to_client(
        self, client_id: str, message: Any, *, coalesce_key: Any = None, volatile: bool = False
    ) -> bool:
        """Queue a message for all connections and detached sessions of a client, and wait for none of them.

        Args:
            client_id: The recipient.
            message: `str`, bytes, or any value that can be encoded as JSON.
            coalesce_key: A queued message with an equal key is replaced by this one.
            volatile: Whether the message is only useful now. The server does not store it for a detached client.

        Returns:
            Whether the message was queued at least once.

        Raises:
            MessageEncodeError: The message cannot be encoded.
        """
        return await self._node.broadcaster.send_to_client(client_id, encode(message, coalesce_key, volatile=volatile))

    async def broadcast(
        self,
        message: Any,
        exclude_client: str | None = None,
        *,
        room: str | Iterable[str] | None = None,
        exclude: Any = None,
        coalesce_key: Any = None,
        volatile: bool = False,
        history: bool = True,
    ) -> BroadcastResult:
        """Queue a message for all clients, or for those in a room, and wait for no client.

        The message is encoded once. Slow clients never make the call raise: the result counts them, even if all
        recipients are slow. Call `raise_for_failure()` on the result if you want an exception.

        Args:
            message: `str`, bytes, or any value that can be encoded as JSON.
            exclude_client: A client id that does not get the message.
            room: The name of a room, or several names. A client in several of the rooms gets the message once.
            exclude: Further clients that do not get the message: a client id, a socket, or several of them.
            coalesce_key: A queued message with an equal key is replaced by this one.
            volatile: Whether the message is only useful now. The server does not store it for detached clients.
            history: Whether the rooms store the message for new members, within `room_history`.

        Raises:
            MessageEncodeError: The message cannot be encoded. It was sent to no client.
            TypeError: `exclude` is neither a client id, nor a socket, nor several of them.
        """
        frame = encode(message, coalesce_key, volatile=volatile)
        return await self._node.broadcaster.broadcast(
            frame, room, exclude, exclude_client=exclude_client, history=history
        )

    def room(self, name: str) -> Room:
        """Return a room, which need not exist.

        Raises:
            RoomNameError: The name is empty, too long, or has a control character. It is a `ValueError`.
        """
        return Room(name, lambda: self._node.hub)

    def get_rooms(self) -> list[str]:
        """Return the names of the rooms in which a client is a member, connected or detached, or still present."""
        return self._node.hub.room_names()

    # ── state ──

    def get_active_connections(self) -> list[str]:
        """Return the ids of the connected clients, each once, in the order in which they connected."""
        return self._node.registry.client_ids()

    def get_connection_count(self) -> int:
        """Return the number of open connections. A client can have several."""
        return len(self._node.registry)

    def get_sockets(self, client_id: str | None = None) -> list[StableSocket]:
        """Return the sockets of all open connections, or of one client, oldest first."""
        registry = self._node.registry
        return [connection.socket for connection in (registry if client_id is None else registry.of_client(client_id))]

    def get_socket(self, connection_id: str) -> StableSocket | None:
        """Return the socket of an open connection; `None` if no open connection has this id."""
        connection = self._node.registry.get(connection_id)
        return None if connection is None else connection.socket

    def get_session_counts(self) -> dict[str, int]:
        """Return the number of `stabilizer.v1.json` sessions as `sessions`, and of the detached ones as `away`."""
        sessions = self._node.sessions
        return {"sessions": len(sessions), "away": sessions.detached_count}

    def get_memory_usage(self) -> dict[str, int | float]:
        """Return the bytes held for connections and sessions.

        They hold queued, unread and unacknowledged messages, and user data. A message in several queues counts once.
        The total is a running sum, so the call is cheap.

        Returns:
            `total_memory`, `connection_count` and `per_connection_average`.
        """
        total, count = self._node.budget.total, self.get_connection_count()
        return {
            "total_memory": total,
            "connection_count": count,
            "per_connection_average": total / count if count else 0.0,
        }

    # ── user data by client id ──

    async def set_user_data(self, client_id: str, key: str, value: Any) -> None:
        """Set one entry of `ws.user_data` on all connections of a client.

        Raises:
            ConnectionNotFoundError: The client is not connected.
            MemoryLimitExceededError: The value exceeds a memory limit. No connection is changed.
        """
        self._node.set_user_data(client_id, key, value)

    async def get_user_data(self, client_id: str, key: str) -> Any | None:
        """Return one entry of a client's `ws.user_data`; `None` if there is no such entry or client."""
        return self._node.get_user_data(client_id, key)

    # ── reconnect tokens ──

    def generate_reconnect_token(self, client: str | StableSocket) -> str:
        """Create a token that restores the rooms and user data of a plain client after a disconnect.

        The token is valid once, for `reconnect_token_ttl`, and for this client id. The client sends it as
        `?reconnect_token=` of its next connection, or your code passes it to `validate_reconnect_token`. Without
        `reconnect_secret` it is valid in this process only. A `stabilizer.v1.json` client does not need it, because
        each welcome contains a token.

        Args:
            client: The socket with the rooms and user data to restore, as with `ws.reconnect_token()`. Or a client id:
                the token is for the connection of the current endpoint, handler or hook if it has this id, else for
                the client's newest connection. If none is open, it is for the newest detached state.

        Raises:
            ValueError: The client id is empty, or breaks the rule for names.
            InvalidTokenError: `enable_reconnect` is False.
            SocketClosed: The socket is closed.
            WrongLoopError: The calling thread or event loop is not the manager's.
        """
        if isinstance(client, StableSocket):
            return client.reconnect_token()
        check_client_id(client)
        return self._node.generate_token(client)

    async def validate_reconnect_token(self, token: str) -> str:
        """Consume a reconnect token and return the client id that it was issued for.

        The next `connect()` of that client in the same task restores its rooms and its user data. If the client id of
        that call has another source, compare it with the returned one.

        If your code has ended the state of the token with `disconnect()`, the token is not consumed for `session_ttl`.
        `connect()` then closes the connection with the code of that `disconnect()`.

        Raises:
            InvalidTokenError: The token is malformed, altered, signed with another secret, revoked or already used. Or
                `enable_reconnect` is False.
            TokenExpiredError: The token has expired.
        """
        if not self.config.enable_reconnect:
            raise InvalidTokenError("disabled")
        self._node.hub.check_loop()
        return self._node.lifecycle.verify_for_current_task(token)

    # ── tickets ──

    def issue_ticket(self, client_id: str) -> str:
        """Create a single-use ticket for a handshake, in an HTTP route that has authenticated the client.

        It is valid for `ticket_ttl` seconds. Without `reconnect_secret` it is valid in this process only.

        Raises:
            ValueError: `client_id` is empty, or breaks the rule for names.
        """
        self._node.tokens.report_missing_secret()
        return self._tickets.issue(client_id)

    async def ticket(self, connection: HTTPConnection) -> str:
        """Consume the ticket in `?ticket=`: the dependency in `Depends(manager.socket_for(manager.ticket))`.

        Returns:
            The client id that the ticket was issued for.

        Raises:
            HTTPException: 401: the ticket is missing, invalid or expired.
        """
        ticket = connection.query_params.get("ticket")
        if ticket is None:
            raise HTTPException(401, "no ticket: send one as ?ticket=")
        try:
            return self._tickets.consume(ticket).client_id
        except (InvalidTokenError, TokenExpiredError) as error:
            self.events.emit("ticket_refused", logging.INFO, why=getattr(error, "problem", "expired"))
            raise HTTPException(401, error.reason) from error

    # ── revocation ──

    async def revoke(self, client_id: str, reason: str = "revoked") -> int:
        """Revoke a client's access: close all its connections with 4410 and end its sessions.

        Reconnect tokens and tickets that were issued for the client before become invalid. Later ones are valid, so a
        client that logs in again can connect again.

        Args:
            client_id: The client.
            reason: Close reason for its connections.

        Returns:
            Number of connections and sessions that were closed.

        Raises:
            ValueError: `client_id` is empty or not a `str`, so the call would revoke no client.
        """
        if not client_id or not isinstance(client_id, str):
            raise ValueError(f"client_id must be a non-empty str, not {client_id!r}")
        ended = self._node.revoke(client_id, reason)
        self._tickets.revoke(client_id)
        return ended

    # ── other threads ──

    @property
    def from_thread(self) -> FromThread:
        """Interface for other threads, such as `manager.from_thread.broadcast(...)` in a `def` route or a callback.

        Each call runs on the manager's event loop and blocks its thread until the result is available.
        """
        return FromThread(lambda: self._node)

    # ── status ──

    @property
    def counters(self) -> Counters:
        """Counters since the manager was created."""
        return self.events.counters

    @property
    def running(self) -> bool:
        """Whether the manager accepts connections: it neither drains nor is shut down."""
        return not self._shutdown.has_begun

    @property
    def uptime_seconds(self) -> float:
        """Seconds since the manager started; 0 before."""
        return monotonic() - self._started_at if self._node.loop is not None else 0.0


def _correct_call(config: Any) -> str:
    """Return the correct call for an argument that is not a config."""
    if isinstance(config, Mapping):
        return "write WebSocketConnectionManager(WebSocketConfig(**options))"
    if hasattr(config, "router"):
        return "write WebSocketConnectionManager(), and then manager.install(app)"
    return "write WebSocketConnectionManager(WebSocketConfig(heartbeat_interval=30))"
