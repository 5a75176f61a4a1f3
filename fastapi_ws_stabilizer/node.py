"""`Node`: everything that one manager runs on one event loop."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi_ws_stabilizer.auth.signed_tokens import ReconnectTokens
from fastapi_ws_stabilizer.config import MemoryEvictionPolicy, RejectPolicy, WebSocketConfig
from fastapi_ws_stabilizer.connection import current as own
from fastapi_ws_stabilizer.connection.client_address import ClientAddressResolver
from fastapi_ws_stabilizer.connection.closing import ClosingConnections
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.ended_connection import EndedConnection
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.connection.resources import ConnectionListener, SharedResources
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.dispatcher import Dispatcher
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.handshake.acceptor import Acceptor
from fastapi_ws_stabilizer.handshake.admission import AdmissionController
from fastapi_ws_stabilizer.handshake.hello import HelloReader
from fastapi_ws_stabilizer.handshake.rejection import Rejector
from fastapi_ws_stabilizer.handshake.session_lifecycle import SessionLifecycle
from fastapi_ws_stabilizer.hub.heartbeat import HeartbeatScheduler
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.hub.presence import Presence, PresenceList
from fastapi_ws_stabilizer.hub.reaper import ConnectionReaper
from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from fastapi_ws_stabilizer.limits.inbound import InboundRateLimiter
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.scheduling import FlushScheduler
from fastapi_ws_stabilizer.sessions.detached import DetachedRecipients, DetachedStateStore
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.store import SessionStore
from fastapi_ws_stabilizer.socket import AnyConnection, StableSocket
from fastapi_ws_stabilizer.tasks import TaskSet, copied, wait_for_all


class Node(Acceptor, ConnectionListener):
    """Everything that one manager runs on one event loop.

    It opens connections, and closes each with the code that matches the end of its endpoint.

    Attributes:
        budget: Memory budget of all connections and sessions.
        hub: Registry, rooms, presence and broadcast.
        registry: Registry of the open connections.
        sessions: Store of the sessions.
        detached: The detached sessions and detached states.
        resumption: Lifecycle of sessions and of the detached state of plain clients.
        addresses: Resolver of client addresses.
        connections: The open connections and those in teardown.
        admission: Admission control for handshakes.
        heartbeat: Scheduler of the heartbeat.
        reaper: Reaper of connections by lifetime and idle time.
        closing: Whether the node rejects new connections.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        hooks: HookRegistry,
        dispatcher: Dispatcher,
        tokens: ReconnectTokens,
        loop: asyncio.AbstractEventLoop | None = None,
        before_token: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._before_token = before_token
        self._events = events
        self._hooks = hooks
        self._dispatcher = dispatcher
        self._tasks = TaskSet(self._task_failed)
        scheduler = FlushScheduler(config.num_shards, events, loop)
        self.budget = MemoryBudget(
            config.max_total_memory,
            config.max_memory_per_connection,
            MemoryEvictionPolicy(config.memory_eviction_policy).value,
            config.memory_check_interval,
        )
        self.registry: ConnectionRegistry = ConnectionRegistry(config.num_shards)
        self.sessions = SessionStore(config, events, self.budget, next_shard=self.registry.next_shard)
        detached_states = DetachedStateStore(
            config.session_ttl if config.enable_reconnect else 0.0, config.max_detached_sessions
        )
        self.detached = DetachedRecipients(self.sessions, detached_states)
        self.hub: Hub = Hub(
            config,
            events,
            scheduler,
            self._tasks,
            self.registry,
            joined=functools.partial(self._presence, "join"),
            left=functools.partial(self._presence, "leave"),
            wanted=functools.partial(hooks.has, "join", "leave"),
            detached_of=self.detached.of_client,
            budget=self.budget,
        )
        self._idempotency = IdempotencyCache()
        self.resumption = SessionLifecycle(
            config,
            events,
            hooks,
            self.hub,
            self.sessions,
            detached_states,
            tokens,
            self.budget,
            self._idempotency,
        )
        self.connections: set[Connection] = set()
        self._closing_connections = ClosingConnections()
        self.addresses = ClientAddressResolver(config.trusted_proxies)
        rejector = Rejector(RejectPolicy(config.reject), events, self.addresses)
        self._hello_reader = HelloReader(config, self.sessions, rejector)
        self.admission = AdmissionController(
            config, events, self.addresses, rejector, self._hello_reader, closing_connections=self._closing_connections
        )
        self.heartbeat = HeartbeatScheduler(config, events)
        self.reaper = ConnectionReaper(config)
        self.closing = False
        self._warned_about_server = False
        self._hook_slots = asyncio.Semaphore(config.max_concurrent_cleanup)  # for presence hooks and slow-client hooks
        self._parts = SharedResources(
            self,
            config,
            events,
            self._tasks,
            scheduler,
            self.budget,
            InboundRateLimiter(
                config.max_message_rate,
                config.max_message_burst,
                config.max_byte_rate,
                max_message_size=config.max_message_size,
            ),
            next_shard=self.registry.next_shard,
        )

    # ── listener of connections ──

    def on_slow(self, connection: Connection, state: SlowConsumer) -> None:
        """Run the hooks for a client that has become a slow consumer, without waiting for them."""
        if self._hooks.has("slow"):
            slow = self._run_slow_hooks(connection, state)
            self._tasks.spawn(slow, name="ws-slow-hooks", context=copied(connection.context))

    async def _run_slow_hooks(self, connection: Connection, state: SlowConsumer) -> None:
        async with self._hook_slots:
            await self._hooks.slow(connection.socket, state)

    def on_ended(self, connection: Connection, ended: EndedConnection) -> None:
        """Replace a connection in its socket by the facts about it, because nothing of it is needed any more."""
        socket: StableSocket = connection.socket
        socket._end(ended)

    async def on_disconnect(self, connection: Connection) -> None:
        """Run the disconnect hooks. A cancellation cancels the current hook."""
        if connection.close_info is not None:
            await self._hooks.disconnect(connection.socket, connection.close_info.cause)

    async def on_session_end(self, connection: Connection) -> None:
        """Run the session end hooks, if the session has ended with the connection."""
        await self.resumption.notify_session_end(connection)

    async def on_error(self, connection: Connection, error: BaseException) -> None:
        """Run the error hooks with a bug in user code, after it was reported."""
        await self._hooks.error(connection.socket, error)

    # ── services of sockets ──

    def run(self, socket: StableSocket, concurrency: int) -> Coroutine[Any, Any, None]:
        """Dispatch every message of a socket to the handlers."""
        return self._dispatcher.run(socket._connection, concurrency)

    def join(self, connection: AnyConnection, room: str, metadata: Mapping[str, Any] | None) -> PresenceList:
        """Add an open connection to a room and return the presence list."""
        return self.hub.join(_open(connection).recipient, room, metadata)

    def leave_room(self, connection: AnyConnection, room: str) -> bool:
        """Remove a connection, or what it left behind, from a room; `False` if it is not in the room."""
        recipient = self.hub.rooms.get(room, connection.recipient_id)
        return recipient is not None and self.hub.leave(recipient, room)

    def rooms_of(self, connection: AnyConnection) -> tuple[str, ...]:
        """Return the rooms that a connection or its session is in, or was in when it ended."""
        recipient = connection.recipient
        if recipient is None:
            return () if connection.close_info is None else connection.close_info.rooms
        close_info = recipient.close_info
        return self.hub.rooms.rooms_of(recipient) if close_info is None else close_info.rooms

    def history(self, connection: AnyConnection, room: str, count: int, *, newcomer: bool) -> None:
        """Send the last messages of a room to a connection that has joined it, except those that it already got."""
        self.hub.replay_history(_open(connection).recipient, room, count, newcomer=newcomer)

    def address_of(self, connection: AnyConnection) -> str:
        """Return the address of the client of a connection."""
        return self.addresses.address_of(connection.websocket)

    def reconnect_token(self, connection: AnyConnection) -> str:
        """Create a reconnect token for a connection.

        Raises:
            InvalidTokenError: `enable_reconnect` is False.
        """
        self._before_token()
        return self.resumption.issue_token(connection.client_id, _open(connection))

    async def _presence(self, event: str, presence: Presence) -> None:
        async with self._hook_slots:
            await self._hooks.presence(event, Room(presence.room, lambda: self.hub, history=False), presence)

    def current_connection(self, client_id: str) -> Connection | None:
        """Return the connection that the current task or its parent opened under this client id; `None` without one."""
        connection = own.current_for(client_id)
        return connection if connection is not None and connection.belongs_to(self._parts) else None

    def connections_of_current_task(self) -> set[Connection]:
        """Return the connections for which the current task runs the endpoint, a handler or a hook.

        These connections end only after the task continues.
        """
        return {
            connection
            for connection in own.all_current()
            if connection.belongs_to(self._parts) and connection.waits_for_user_code
        }

    def resolve(self, client_id: str) -> list[Connection]:
        """Return the connections that a client id stands for.

        That is the connection that the current task opened under this client id, else all connections of the client.
        """
        connection = self.current_connection(client_id)
        return self.registry.of_client(client_id) if connection is None else [connection]

    def resume_accepting(self) -> None:
        """Accept connections again."""
        self.closing = False
        self.admission.reopen()
        self._hello_reader.reopen()

    def stop_accepting(self) -> None:
        """Reject new connections, and the handshakes in progress."""
        self.closing = True
        self._hello_reader.close()
        self.admission.close()

    async def stop(self, hook_timeout: float) -> None:
        """Stop the heartbeat, the reaper, the sessions, and all remaining tasks.

        Args:
            hook_timeout: Maximum seconds for all `on_session_end` hooks together.
        """
        self.heartbeat.stop()
        self.reaper.stop()
        await wait_for_all(self._hello_reader.pending, 1.0)
        await self.admission.wait_until_empty(1.0)
        # The time for these connections has passed, but their disconnect hooks still run.
        await wait_for_all(self._spawn_for_each(Connection.run_disconnect_hooks, "ws-last-hooks"), 1.0)
        await wait_for_all(self._spawn_for_each(self.resumption.notify_session_end, "ws-last-ends"), hook_timeout)
        for connection in list(self.connections):
            connection.force_finish()
        await self.resumption.stop(hook_timeout)
        self.hub.stop()
        self.budget.stop()
        if left_over := self._tasks.cancel():
            await wait_for_all(left_over, 1.0)

    def _spawn_for_each(
        self, call: Callable[[Connection], Coroutine[Any, Any, None]], name: str
    ) -> list[asyncio.Task[None]]:
        """Start a task for each connection that is not finished, with the context variables of the connection."""
        return [
            self._tasks.spawn(call(connection), name=name, context=copied(connection.context))
            for connection in self.connections
        ]

    def _task_failed(self, task: asyncio.Task[Any], error: BaseException) -> None:
        self._events.emit_exception("internal_task_failed", error, task=task.get_name())


def _open(connection: AnyConnection) -> Connection:
    """Return a connection that is open.

    Raises:
        SocketClosed: It has ended.
    """
    if isinstance(connection, EndedConnection):
        connection.check_open()
    return connection
