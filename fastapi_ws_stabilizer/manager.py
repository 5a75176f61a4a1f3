"""`WebSocketConnectionManager`: the façade. It holds the parts and does little itself."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from fastapi import HTTPException, WebSocket
from starlette.requests import HTTPConnection

from fastapi_ws_stabilizer.auth.signed_tokens import ReconnectTokens
from fastapi_ws_stabilizer.auth.tickets import Tickets
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, DisconnectReason, check_close_code
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.doctor.checks import run_checks
from fastapi_ws_stabilizer.doctor.collect import collect_context, report_at_start
from fastapi_ws_stabilizer.doctor.findings import Finding
from fastapi_ws_stabilizer.errors import (
    ConnectionNotFoundError,
    InvalidTokenError,
    MemoryLimitExceededError,
    ShutdownError,
    TokenExpiredError,
    WrongLoopError,
)
from fastapi_ws_stabilizer.events import Counters, EventBus
from fastapi_ws_stabilizer.from_thread import FromThread
from fastapi_ws_stabilizer.handlers.dispatcher import Dispatcher
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.handlers.registration import EventDecorators
from fastapi_ws_stabilizer.handlers.registry import HandlerRegistry
from fastapi_ws_stabilizer.handshake.client_id import Moment
from fastapi_ws_stabilizer.handshake.routes import UnmatchedRouteLogger
from fastapi_ws_stabilizer.hub.broadcast import BroadcastResult
from fastapi_ws_stabilizer.limits.connections import shutdown_error
from fastapi_ws_stabilizer.metrics.timings import Timings
from fastapi_ws_stabilizer.node import Node
from fastapi_ws_stabilizer.observability.logs import get_logger, write_event
from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.servers.detect import exits_on_signal, missing_websocket_library, several_workers
from fastapi_ws_stabilizer.servers.uvicorn.options import uvicorn_options
from fastapi_ws_stabilizer.shutdown.close_all import ShutdownReport
from fastapi_ws_stabilizer.shutdown.drain import Drain
from fastapi_ws_stabilizer.shutdown.signals import SignalHandler
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.socket_context import (
    SocketContext,
    anonymous_dependency,
    identity_dependency,
    reject_handshake,
)
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.encoded import encode
from fastapi_ws_stabilizer.wire.handshake import served_subprotocols
from fastapi_ws_stabilizer.wire.identifiers import check_client_id
from fastapi_ws_stabilizer.wrong_names import OF_MANAGER, missing

STATE_KEY: Final = "fastapi_ws_stabilizer"
"""Where an app's state, and the lifespan state of its server, hold the manager."""


def _running_loop() -> asyncio.AbstractEventLoop:
    """The running event loop.

    Raises:
        WrongLoopError: None of asyncio's runs: the server may run one of another library.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise WrongLoopError("no_asyncio") from None


class WebSocketConnectionManager(EventDecorators):
    """All WebSockets of one application: who is connected, what they are sent, what their messages mean.

    ```python
    manager = WebSocketConnectionManager(WebSocketConfig(heartbeat_interval=30))
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocket = Depends(stable_socket)) -> None:
        await ws.run()
    ```

    It belongs to the event loop that it was started on, and so do its rooms and its sockets. Calls that only look
    (`get_...`, `room.clients`, `ws.closed`) may be made anywhere; other threads send by `manager.from_thread`; all else
    outside of that loop raises `WrongLoopError`.

    Args:
        config: Its options; the defaults when left out.

    Attributes:
        config: Its options.
        events: Where to subscribe to what happens.
    """

    def __init__(self, config: WebSocketConfig | None = None) -> None:
        if config is not None and not isinstance(config, WebSocketConfig):
            raise TypeError(f"a manager takes a WebSocketConfig, not {config!r}: {_what_to_write(config)}")
        self.config: WebSocketConfig = config or WebSocketConfig()
        self.events: EventBus = EventBus()
        self.events.subscribe(write_event)
        if self.config.enable_metrics:
            self.events.timings = Timings()
        super().__init__(
            HookRegistry(self.events, self.config.disconnect_grace, self.config.hello_timeout), HandlerRegistry()
        )
        # What it does for all connections must not run with the context variables of the first one, which may start it.
        self._context = contextvars.copy_context()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shut = False
        self._started_at = 0.0
        secrets = [secret.get_secret_value().encode() for secret in self.config.reconnect_secret or ()]
        self._tokens = ReconnectTokens(secrets, self.config.reconnect_token_ttl.total_seconds())
        self._tickets = Tickets(secrets, self.config.ticket_ttl)
        self._reported_workers = False
        self._reported_findings: set[str] = set()
        self._app: Any = None
        self._tasks = TaskSet(lambda _, __: None)  # whoever waits for it reads its failure
        self._drain: Drain | None = None
        self._drained: asyncio.Task[ShutdownReport] | None = None
        self._signals = SignalHandler(self.events, self._drain_before_exit)
        self._node = self._create_node()

    if not TYPE_CHECKING:  # a type checker would take every name for one that is there

        def __getattr__(self, name: str) -> Any:
            """Say what to write instead of a name that it does not have."""
            return missing(self, name, OF_MANAGER)

    def __repr__(self) -> str:
        return f"<WebSocketConnectionManager {self.get_connection_count()} connections>"

    # ── starting and stopping ──

    async def start(self) -> None:
        """Get ready for connections on the running event loop. Calling it again changes nothing.

        Nobody has to call it: `lifespan`, `install` and the first connection do.

        Raises:
            WrongLoopError: It serves on another event loop, which still runs or has open connections; or no asyncio
                event loop runs.
        """
        self._check_other_loop(_running_loop())
        self._context = contextvars.copy_context()
        self._shut = False
        if self._drain is not None:
            self._drain.cancel()
        self._drain = self._drained = None
        self._node.resume_accepting()
        self._require_node()
        if self.config.handle_signals:
            self._signals.listen()

    def _require_node(self) -> Node:
        loop = _running_loop()
        if self._shut and self._loop in (None, loop):
            raise shutdown_error(self.config.drain_window)
        if self._loop is loop:
            return self._node
        self._check_other_loop(loop)
        # Either the first start, or a loop of the past: a TestClient without `with` makes one for each connection.
        self._loop = loop
        self._shut = False
        self._started_at = monotonic()
        self._drain = self._drained = None
        self._node = self._context.run(self._create_node)
        logger = get_logger()
        if "log_level" in self.config.model_fields_set or logger.level == logging.NOTSET:
            logger.setLevel(self.config.log_level)  # a default does not undo what configure_logging() was told
        if problem := missing_websocket_library():
            self.events.emit("websocket_library_missing", logging.ERROR, problem=problem)
        refuses, guarded = self._hooks.has("handshake"), self._hooks.has("handshake", "auth")
        report_at_start(
            self.events, self.config, self._app, refuses=refuses, guarded=guarded, reported=self._reported_findings
        )
        return self._node

    async def _node_for(self, websocket: WebSocket) -> Node:
        """Return the node for a handshake; reject the handshake if the manager is shut down."""
        try:
            return self._require_node()
        except ShutdownError as error:
            raise await reject_handshake(self._node.admission, websocket, error) from error

    def _check_other_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raise if another event loop than this one is in use: it runs, or it has connections and may run again."""
        known = self._loop
        if known is None or known is loop or known.is_closed():
            return
        if known.is_running() or self._node.registry:
            raise WrongLoopError("two_loops")

    def _create_node(self) -> Node:
        dispatcher = Dispatcher(self._handlers, self.config, self.events)
        return Node(self.config, self.events, self._hooks, dispatcher, self._tokens, self._loop, self._report_workers)

    async def graceful_shutdown(self, timeout: float | None = None) -> ShutdownReport:
        """Drain, as `drain` does, and let go of everything. Called after a drain it reports what that did.

        Each connection is sent what is queued for it and the close frame, its disconnect hooks run, its endpoint
        finishes. Cancelling ends the waiting, and not the drain.

        Args:
            timeout: Seconds that all of it may take; `drain_timeout` when left out. What is not done then is cut.
        """
        self._node.hub.check_loop()
        timeout = self.config.drain_timeout if timeout is None else timeout
        until = monotonic() + timeout
        mine = self._node.served_here()
        try:
            window = 0.0 if exits_on_signal() else self.config.drain_window
            report = await self._drained_within(timeout, window, mine)
        finally:
            self._signals.stop()
            if mine:  # else it would cut the end of the socket whose code has called this
                self._tasks.spawn(self._stop_after_drain(self._node, until), name="ws-stop")
            else:
                await self._node.stop(max(1.0, until - monotonic()))
        self.events.emit("shutdown", logging.INFO, **vars(report))
        return report

    async def _stop_after_drain(self, node: Node, until: float) -> None:
        if self._drained is not None:
            await wait_for_all([self._drained], max(0.0, until - monotonic()))
        await node.stop(max(1.0, until - monotonic()))

    async def drain(self, timeout: float | None = None) -> ShutdownReport:
        """Take no new connections, let those that are open come back elsewhere, spread over a while, and wait for them.

        New ones get HTTP 503 with `Retry-After`. Clients of `stabilizer.v1.json` are told a moment at which to leave;
        plain ones are closed with 1012 and a reason that says when to come back (`retry=` in milliseconds). SIGTERM
        and SIGINT do this by themselves, before the server hears of them (`handle_signals`). Calling it again waits for
        the same drain, makes it quicker if its time is shorter, and returns what that did. `start()` ends it.

        In an endpoint, handler or hook of a socket it does not wait for that socket, which ends when your code goes on.

        Args:
            timeout: Seconds that all of it may take; `drain_timeout` when left out. What is not done then is cut.
        """
        self._node.hub.check_loop()
        return await self._drained_within(timeout, self.config.drain_window, self._node.served_here())

    async def _drain_before_exit(self) -> ShutdownReport:
        """Drain, at once where the server does not wait: then that reaches more clients than none."""
        # A signal may be heard in the middle of any connection's code, which is not to be spared for that.
        return await self._drained_within(None, 0.0 if exits_on_signal() else self.config.drain_window)

    async def _drained_within(
        self, timeout: float | None, window: float, mine: Set[Connection] = frozenset()
    ) -> ShutdownReport:
        timeout = self.config.drain_timeout if timeout is None else timeout
        self._shut = True
        self._node.stop_accepting()
        running = self._drained
        if self._drain is None or running is None or (running.done() and (running.cancelled() or running.exception())):
            self._drain = Drain(self.events, window, timeout, self._node.sessions.__len__)
            work = self._drain.run(self._node.connections, self._node.admission)
            running = self._drained = self._tasks.spawn(work, name="ws-drain", context=self._context.copy())
        else:
            self._drain.shorten(timeout)
        if mine and not running.done():
            return await self._drain.wait_for_others(self._node.connections, mine)
        await wait_for_all([running], None)
        return running.result()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[dict[str, Any]]:
        """The lifespan of an app that has no other: `FastAPI(lifespan=manager.lifespan)`.

        In a lifespan of your own: `async with manager.lifespan(app) as state: yield state`.
        """
        self._attach(app)
        await self.start()
        try:
            yield {STATE_KEY: self}
        finally:
            await self.graceful_shutdown()

    def install(self, app: Any) -> None:
        """Make this the manager of an app, around whatever lifespan it has. Calling it again changes nothing.

        Raises:
            RuntimeError: Another manager is installed; name each with `Depends(manager.socket)` instead.
        """
        installed = getattr(app.state, STATE_KEY, None)
        if installed is self:
            return
        if installed is not None:
            raise RuntimeError(
                "this app has a manager already: install one, and name the other with Depends(manager.socket)"
            )
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
            async with inner(app) as state, self.lifespan(app) as ours:  # hooks may need what the app's own holds
                yield {**ours, **(state or {})}

        app.router.lifespan_context = lifespan
        self._attach(app)

    def uvicorn_options(self) -> dict[str, Any]:
        """The options of uvicorn that go with this manager's: `uvicorn.run(app, **manager.uvicorn_options())`.

        They choose `StableWebSocketProtocol`, and set the limit of messages, the pings of WebSockets that this manager
        does not serve, compression, and a bound to uvicorn's own shutdown. They leave `proxy_headers` alone, with which
        HTTP routes know their clients: `trusted_proxies` does not need it to be off.
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
        """Make the doctor's checks: what of these options, the app, its server and its platforms do not go together.

        `python -m fastapi_ws_stabilizer doctor` does the same from outside.

        Args:
            app: The app whose routes are looked at; the one that this manager belongs to when left out.
            server: What serves it, such as `uvicorn`. Left out, it is the one that this process runs under, of whose
                options nothing is known unless `server_options` says it.
            server_options: Its options that are set, such as `manager.uvicorn_options()`. Others have their defaults.
            platform: The platforms on the way, as in `WebSocketConfig.for_platform`, with their defaults.
            idle_timeout: Seconds of the shortest idle timeout on the way, where it is not that default.
            max_lifetime: Seconds of the shortest lifetime, likewise.
            grace: Seconds between SIGTERM and SIGKILL, likewise.
            pre_stop: Seconds that a `preStop` hook takes.
            http2: Whether HTTP/2 is spoken all the way to the server.
            caching: Whether the platform caches the WebSocket route.

        Returns:
            The findings in the order of their codes; empty if all is well.

        Raises:
            ValueError: A server, an option of it or a platform is not known.
        """
        return run_checks(
            collect_context(
                self.config,
                self._app if app is None else app,
                refuses=self._hooks.has("handshake"),
                guarded=self._hooks.has("handshake", "auth"),
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
        )

    def _attach(self, app: Any) -> None:
        self._app = app
        setattr(app.state, STATE_KEY, self)
        UnmatchedRouteLogger.watch(app, self.events)

    # ── dependencies ──

    async def socket(self, websocket: WebSocket) -> AsyncIterator[StableSocket]:
        """The dependency for an endpoint that names its manager: `Depends(manager.socket)`."""
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
        """Make a dependency that takes the client id from another one: `Depends(manager.socket_for(current_user))`.

        Args:
            identify: Any FastAPI dependency. What it returns is `ws.identity`; what it raises refuses the connection.
                Left out, the client id is that of the path or the query, as with `manager.socket`.
            key: Makes the client id of what `identify` returned. Not needed for `str`, `int` and `UUID`.
            expires_at: Says until when that is good: a `datetime` with its time zone, seconds since 1970 as in a JWT's
                `exp`, or `None`. The client is asked for a new credential before, which `on_auth` looks at, and is
                closed with 4401 if none has come.
            control_frames: Whether text pings and pongs of the client are answered and kept from the endpoint.
            subprotocols: What the endpoint speaks, such as `("ocpp2.1", "ocpp1.6")`. The handshake is answered with the
                first of them that the client offers, which is `ws.subprotocol`; with none, and a warning, where it
                offers only others.

        Raises:
            TypeError: There is a `key` or `expires_at` without an identity.
            ValueError: A subprotocol is no name of one.
        """
        served = served_subprotocols(subprotocols)
        if identify is not None:
            return identity_dependency(self._node_for, self.serve, identify, key, expires_at, control_frames, served)
        if key is not None or expires_at is not None:
            raise TypeError("socket_for with key or expires_at needs a dependency that says who comes")
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
        """Accept, register and yield a socket, and close it at the end: what the dependencies are made of.

        `async with manager.serve(websocket) as socket:`, entered and left in the task that serves the WebSocket.

        Args:
            websocket: A WebSocket that is not accepted yet.
            client_id: Whose it is; taken from the path or query, or made up, when left out.
            identity: What `ws.identity` is.
            expires_in: For how many seconds that is good; for ever when left out.
            control_frames: Whether text pings and pongs of the client are answered and kept from the endpoint.
            subprotocols: What the endpoint speaks: the first that the client offers is answered.

        Raises:
            ValueError: `client_id` is empty, or breaks the rule for names; or a subprotocol is no name of one.
            HTTPException: The manager is shut down (503), or a handshake hook refused.
            WebSocketException: The connection ended, with this code, before the endpoint could begin or while it ran.
        """
        if client_id is not None:
            check_client_id(client_id)
        return SocketContext(
            self._node_for,
            websocket,
            client_id,
            identity=identity,
            expires_in=expires_in,
            control_frames=control_frames,
            subprotocols=served_subprotocols(subprotocols),
        )

    # ── connections by hand ──

    async def connect(
        self, client_id: str, websocket: WebSocket, metadata: Mapping[str, Any] | None = None
    ) -> StableSocket:
        """Register a WebSocket that you have accepted. You go on reading from it yourself.

        From here on it is looked after like any other: pongs are answered, its end is noticed, and in a FastAPI
        endpoint it is closed with an honest code when the endpoint ends.

        Raises:
            ValueError: `client_id` is empty, or breaks the rule for names: see `docs/concepts/security.md`.
            RuntimeError: The WebSocket is not accepted.
            ShutdownError: The manager drains or is shut down. The endpoint that lets it escape closes with 1012.
            SocketClosed: A connect hook refused it, or it is gone. It is a `WebSocketDisconnect`.
            DuplicateClientError: The client is connected and `on_duplicate="reject"`.
            ConnectionLimitExceededError: There is no room for it; `TooManyConnectionsError` if that is its own doing.
            OriginNotAllowedError: A page of somebody else's site has opened it.
            MemoryLimitExceededError: The metadata is more than may be kept.
        """
        check_client_id(client_id)
        try:
            node = self._require_node()
        except ShutdownError as error:
            self._node.reject_adoption(websocket, error, client_id)
            raise
        connection = await node.adopt(websocket, client_id, metadata)
        socket: StableSocket = connection.socket
        return socket

    async def disconnect(self, client_id: str, code: int = 1000, reason: str = "") -> None:
        """Close a client's connection; all of them if it has several. Returns without waiting for the client.

        In the task that has registered a connection under this client id it means that one and never a newer one, and
        is quiet if that is over already.

        A client that is away is treated as connected: its session, or what is kept for its reconnect token, ends, and
        it is closed with this code when it comes back for that.

        Raises:
            ConnectionNotFoundError: No such client is connected or away.
            ValueError: `code` cannot be sent.
        """
        check_close_code(code)
        self._node.hub.check_loop()
        connections = self._node.resolve(client_id)
        away = [] if self._node.current_connection(client_id) else self._node.resumption.detached_of(client_id)
        if not connections and not away:
            raise ConnectionNotFoundError(client_id)
        targets: list[Any] = [*connections, *away]
        for one in targets:
            one.close(DisconnectReason.APPLICATION, code=code, text=reason, from_outside=True)

    async def handle_pong(self, client_id: str) -> None:
        """Note that a client has answered, for code that reads pongs itself. Nothing happens if it is gone."""
        self._node.hub.check_loop()
        now = monotonic()
        for connection in self._node.resolve(client_id):
            connection.liveness.on_frame(now)
            connection.liveness.on_pong(now)

    # ── sending ──

    async def send_to_client(
        self, client_id: str, message: Any, *, coalesce_key: Any = None, volatile: bool = False
    ) -> bool:
        """Queue a message for a client, for all its connections; `False` if it was queued for none. Waits for nobody.

        Args:
            client_id: Who gets it.
            message: `str`, bytes, or anything that can be JSON.
            coalesce_key: If a message with an equal key still waits to be sent, this one takes its place.
            volatile: Whether it is worth nothing later: it is not kept if the client is away.

        Raises:
            MessageEncodeError: The message cannot be encoded.
        """
        return await self._node.hub.send_to_client(client_id, encode(message, coalesce_key, volatile=volatile))

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
        """Queue a message for all connections, or for those in a room. It is encoded once, and no client is waited for.

        Slow clients never make it raise, not even if all recipients are: the result counts them. Call
        `raise_for_failure()` on the result where the caller wants an exception.

        Args:
            message: `str`, bytes, or anything that can be JSON.
            exclude_client: A client id that does not get it.
            room: The name of a room, or of several; who is in more than one gets it once.
            exclude: Who else does not get it: a client id, a socket, or several of them.
            coalesce_key: If a message with an equal key still waits to be sent to a client, this one takes its place.
            volatile: Whether it is worth nothing later: it is not kept for clients that are away.
            history: Whether the rooms remember it for newcomers, as far as `room_history` says.

        Raises:
            MessageEncodeError: The message cannot be encoded; no client got anything.
            TypeError: `exclude` is neither a client id, nor a socket, nor several of them.
        """
        frame = encode(message, coalesce_key, volatile=volatile)
        if exclude_client is not None:
            exclude = exclude_client if exclude is None else (exclude_client, exclude)
        return await self._node.hub.broadcast(frame, room, exclude, history=history)

    def room(self, name: str) -> Room:
        """A room: who is in it, to send to it, to close it. It need not exist.

        Raises:
            ValueError: The name is empty.
        """
        return Room(name, lambda: self._node.hub)

    def get_rooms(self) -> list[str]:
        """The names of the rooms that exist: a client is in them, is away, or is expected back there."""
        return self._node.hub.room_names()

    # ── looking ──

    def get_active_connections(self) -> list[str]:
        """The ids of the connected clients, each once, in the order in which they came."""
        return self._node.registry.client_ids()

    def get_connection_count(self) -> int:
        """How many connections are open; one client can have several."""
        return len(self._node.registry)

    def get_sockets(self, client_id: str | None = None) -> list[StableSocket]:
        """The open connections, or those of one client, oldest first."""
        registry = self._node.registry
        return [connection.socket for connection in (registry if client_id is None else registry.of_client(client_id))]

    def get_socket(self, connection_id: str) -> StableSocket | None:
        """The open connection with that connection id."""
        connection = self._node.registry.get(connection_id)
        return None if connection is None else connection.socket

    def get_session_counts(self) -> dict[str, int]:
        """How many `sessions` of `stabilizer.v1.json` clients there are, and how many of them wait: `away`."""
        sessions = self._node.sessions
        return {"sessions": len(sessions), "away": sessions.detached_count}

    def get_memory_usage(self) -> dict[str, int | float]:
        """What is held for connections and sessions: queued, unread and unacknowledged messages, user data, in bytes.

        A message that many hold counts once. It is a running sum, so asking costs nothing.

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
        """Set one entry of `ws.user_data`, on all connections of a client.

        Raises:
            ConnectionNotFoundError: No such client is connected.
            MemoryLimitExceededError: That would be more than may be kept. What was there stays, on each of them.
        """
        self._node.hub.check_loop()
        connections = self._node.resolve(client_id)
        if not connections:
            raise ConnectionNotFoundError(client_id)
        written: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            for connection in connections:
                data = connection.socket.user_data
                before = {key: data[key]} if key in data else {}
                data[key] = value
                written.append((data, before))
        except MemoryLimitExceededError:
            for changed, was in written:
                changed.update(was)
                if not was:
                    del changed[key]
            raise

    async def get_user_data(self, client_id: str, key: str) -> Any | None:
        """One entry of a client's `ws.user_data`; `None` if there is no such entry or client."""
        self._node.hub.check_loop()
        for connection in self._node.resolve(client_id):
            if key in connection.socket.user_data:
                return connection.socket.user_data[key]
        return None

    # ── coming back ──

    def generate_reconnect_token(self, client: str | StableSocket) -> str:
        """Make a token by which a plain client gets the rooms and user data of a connection back after a disconnect.

        It is good once, for `reconnect_token_ttl`, and for this client id. The client presents it as
        `?reconnect_token=` of its next connection, or in any way that leads to `validate_reconnect_token`. Without
        `reconnect_secret` it is good in this process only. A client of `stabilizer.v1.json` needs none: it has its own,
        in each welcome.

        Args:
            client: The socket whose rooms and user data it is for: `ws.reconnect_token()` says the same. Or a client
                id, which means the connection of the current endpoint, handler or hook if that has this id, else the
                client's newest one; if none is open, what the client has left last.

        Raises:
            ValueError: The client id is empty, or breaks the rule for names.
            InvalidTokenError: `enable_reconnect` is False.
            SocketClosed: The socket is closed.
            WrongLoopError: This is another thread or event loop than the manager's.
        """
        if isinstance(client, StableSocket):
            return client.reconnect_token()
        check_client_id(client)
        self._node.hub.check_loop()
        self._report_workers()
        newest = next(reversed(self._node.resolve(client)), None)
        return self._node.resumption.issue_token(client, newest)

    def _report_workers(self) -> None:
        if self.config.reconnect_secret is None and not self._reported_workers and several_workers():
            self._reported_workers = True
            self.events.emit("reconnect_secret_missing", logging.WARNING)

    async def validate_reconnect_token(self, token: str) -> str:
        """Use a token up, and return the client id that it was issued for.

        The token of a client that you have kicked stays good for `session_ttl`: `connect()` tells it so at each dial.

        The next `connect()` of that client in the same task gets its rooms and its user data back. Compare what this
        returns with the client id that you connect, if that one comes from somewhere else.

        Raises:
            InvalidTokenError: It is no token, was altered, was signed with another secret, or was used before.
            TokenExpiredError: Its time is over.
        """
        if not self.config.enable_reconnect:
            raise InvalidTokenError("disabled")
        self._node.hub.check_loop()
        claim = self._node.resumption.consume(token)
        self._node.resumption.mark_verified(claim)
        return claim.client_id

    # ── tickets ──

    def issue_ticket(self, client_id: str) -> str:
        """Make a ticket with which a client comes in once, for an HTTP route that knows who asks for it.

        It is good for `ticket_ttl` seconds. Without `reconnect_secret` it is good in this process only.

        Raises:
            ValueError: `client_id` is empty, or breaks the rule for names.
        """
        self._report_workers()
        return self._tickets.issue(client_id)

    async def ticket(self, connection: HTTPConnection) -> str:
        """The dependency that takes the ticket in `?ticket=`: `Depends(manager.socket_for(manager.ticket))`.

        Returns:
            The client id that it was issued for.

        Raises:
            HTTPException: 401: there is none, or it is not good.
        """
        ticket = connection.query_params.get("ticket")
        if ticket is None:
            raise HTTPException(401, "a ticket is wanted, as ?ticket=")
        try:
            return self._tickets.redeem(ticket)
        except (InvalidTokenError, TokenExpiredError) as error:
            self.events.emit("ticket_refused", logging.INFO, why=getattr(error, "problem", "expired"))
            raise HTTPException(401, error.reason) from error

    # ── taking the right away ──

    async def revoke(self, client_id: str, reason: str = "revoked") -> int:
        """Take a client's right to be here: close all its connections with 4410, and end its sessions.

        Reconnect tokens and tickets that were issued for it before are not good any more. What is issued later is, so
        somebody who may log in again can come back.

        Args:
            client_id: Whose right.
            reason: What its connections are told.

        Returns:
            How many connections and sessions were ended.

        Raises:
            ValueError: `client_id` is empty, or no `str`: nobody would be shut out.
        """
        if not client_id or not isinstance(client_id, str):
            raise ValueError(f"client_id must be a str that is not empty, not {client_id!r}")
        self._node.hub.check_loop()
        self._tokens.revoke(client_id)
        self._tickets.revoke(client_id)
        node = self._node
        node.admission.revoke(client_id)
        ended: list[Any] = [*node.registry.of_client(client_id), *node.resumption.detached_of(client_id)]
        for one in ended:
            one.close(DisconnectReason.APPLICATION, code=SESSION_ENDED, text=reason, from_outside=True)
        node.resumption.forget(client_id)
        self.events.emit("client_revoked", logging.INFO, client_id=client_id, ended=len(ended))
        return len(ended)

    # ── other threads ──

    @property
    def from_thread(self) -> FromThread:
        """What other threads call: `manager.from_thread.broadcast(...)` in a `def` route or a callback.

        Each call runs on the manager's event loop, and blocks the thread until its result is there.
        """
        return FromThread(self)

    # ── how it is doing ──

    @property
    def counters(self) -> Counters:
        """What has been counted since the manager was made."""
        return self.events.counters

    @property
    def running(self) -> bool:
        """Whether it takes connections: it has not been shut down."""
        return not self._shut

    @property
    def uptime_seconds(self) -> float:
        """Seconds since it was started; 0 before."""
        return monotonic() - self._started_at if self._loop is not None else 0.0


def _what_to_write(config: Any) -> str:
    """What to write instead of making a manager of something that is no config."""
    if isinstance(config, Mapping):
        return "write WebSocketConnectionManager(WebSocketConfig(**options))"
    if hasattr(config, "router"):
        return "write WebSocketConnectionManager(), and then manager.install(app)"
    return "write WebSocketConnectionManager(WebSocketConfig(heartbeat_interval=30))"
