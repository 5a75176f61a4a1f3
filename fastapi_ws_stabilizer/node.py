"""`Node`: everything that one manager runs on one event loop."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from fastapi_ws_stabilizer.auth.signed_tokens import SignedTokens
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, CloseInfo, DisconnectReason, check_close_code
from fastapi_ws_stabilizer.config import MemoryEvictionPolicy, RejectPolicy, WebSocketConfig
from fastapi_ws_stabilizer.connection.client_address import ClientAddressResolver
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.ended_connection import EndedConnection
from fastapi_ws_stabilizer.connection.endpoint import all_current, current_for, unbind_current
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.connection.resources import ConnectionListener, SharedResources
from fastapi_ws_stabilizer.errors import ConnectionNotFoundError, MemoryLimitExceededError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.dispatcher import Dispatcher
from fastapi_ws_stabilizer.handlers.endpoint_closer import EndpointCloser
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.handshake.acceptor import Acceptor
from fastapi_ws_stabilizer.handshake.admission import AdmissionController
from fastapi_ws_stabilizer.handshake.hello import HelloReader
from fastapi_ws_stabilizer.handshake.negotiator import SessionNegotiator
from fastapi_ws_stabilizer.handshake.rejection import Rejector
from fastapi_ws_stabilizer.handshake.renewal import CredentialRenewer
from fastapi_ws_stabilizer.hub.heartbeat import HeartbeatScheduler
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.hub.reaper import ConnectionReaper
from fastapi_ws_stabilizer.hub.registry import ClosingConnections, ConnectionRegistry
from fastapi_ws_stabilizer.limits.inbound import InboundRateLimiter
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.scheduling import FlushScheduler
from fastapi_ws_stabilizer.session_lifecycle import SessionLifecycle
from fastapi_ws_stabilizer.sessions.detached import DetachedRecipients, DetachedState, DetachedStateStore
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.reconnect_tokens import ReconnectTokenRegistry
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import SessionStore
from fastapi_ws_stabilizer.sessions.v1_protocol import session_of
from fastapi_ws_stabilizer.socket import SocketServices, StableSocket
from fastapi_ws_stabilizer.tasks import TaskSet, copied, wait_for_all


class Node(ConnectionListener):
    """Everything that one manager runs on one event loop.

    It builds its parts in the order in which they need each other. As the listener of its connections it adds each one
    to the registries, and removes it at the end.

    Args:
        config: Options of the manager.
        events: Event bus.
        hooks: Hooks of the manager.
        dispatcher: Dispatcher of messages to handlers.
        tokens: Issuer and verifier of reconnect tokens.
        loop: The event loop. `None` for a manager that has not started.

    Attributes:
        loop: The event loop; `None` for a manager that has not started.
        budget: Memory budget of all connections and sessions.
        registry: Registry of the open connections.
        sessions: Store of the sessions.
        detached: The detached sessions and detached states.
        hub: Registry, rooms and presence.
        broadcaster: Sender of messages to clients and rooms.
        tokens: Reconnect tokens of plain clients.
        lifecycle: Lifecycle of sessions and detached states.
        addresses: Resolver of client addresses.
        admission: Admission control for handshakes.
        heartbeat: Scheduler of the heartbeat.
        reaper: Reaper of connections by lifetime and idle time.
        closer: Closer of connections after their endpoint.
        acceptor: Acceptor of connections.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        hooks: HookRegistry,
        dispatcher: Dispatcher,
        tokens: SignedTokens,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.loop = loop
        self._events = events
        self._hooks = hooks
        self._tasks = TaskSet(self._task_failed)
        self._hook_slots = asyncio.Semaphore(config.max_concurrent_cleanup)  # for presence hooks and slow-client hooks
        self._closing = ClosingConnections()
        scheduler = FlushScheduler(config.num_shards, events, loop)
        self.budget = MemoryBudget(
            config.max_total_memory,
            config.max_memory_per_connection,
            MemoryEvictionPolicy(config.memory_eviction_policy).value,
            config.memory_check_interval,
        )
        if loop is not None:
            self.budget.bind_loop()
        self.registry: ConnectionRegistry = ConnectionRegistry(config.num_shards)
        self.sessions = SessionStore(config, events, self.budget, next_shard=self.registry.next_shard)
        states = DetachedStateStore(
            config.session_ttl if config.enable_reconnect else 0.0, config.max_detached_sessions
        )
        self.detached = DetachedRecipients(self.sessions, states)
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
        self.broadcaster = self.hub.broadcaster
        self.tokens = ReconnectTokenRegistry(config, events, tokens)
        idempotency = IdempotencyCache()
        self.lifecycle = SessionLifecycle(
            config, events, hooks, self.hub, self.detached, self.tokens, self.budget, idempotency
        )
        self.addresses = ClientAddressResolver(config.trusted_proxies)
        rejector = Rejector(RejectPolicy(config.reject), events, self.addresses)
        self._hello_reader = HelloReader(config, rejector)
        self._resources = SharedResources(
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
        self.admission = AdmissionController(
            config,
            events,
            self.addresses,
            rejector,
            self._hello_reader,
            self.registry,
            self._closing,
            self._resources.closings,
        )
        self.heartbeat = HeartbeatScheduler(config, events)
        self.reaper = ConnectionReaper(config)
        self._renewer = CredentialRenewer(hooks, self._tasks)
        self.closer = EndpointCloser(self._tasks, config.disconnect_grace)
        self.acceptor = Acceptor(
            self._resources,
            SocketServices(self.hub, self.addresses, dispatcher.run, self.issue_token),
            hooks,
            self.admission,
            SessionNegotiator(self.admission, hooks, self._hello_reader, self.sessions),
            self.sessions,
            self.lifecycle,
            self.tokens,
            idempotency,
            self._closing,
            self.closer,
        )

    # ── connections ──

    @property
    def connections(self) -> list[Connection]:
        """The open connections, and those in teardown."""
        return [*self.registry, *self._closing]

    def current_connection(self, client_id: str) -> Connection | None:
        """Return the connection that the current task or its parent opened under this client id; `None` without one."""
        connection = current_for(client_id)
        return connection if connection is not None and connection.belongs_to(self._resources) else None

    def connections_of_current_task(self) -> set[Connection]:
        """Return the connections for which the current task runs the endpoint, a handler or a hook.

        These connections end only after the task continues.
        """
        return {
            connection
            for connection in all_current()
            if connection.belongs_to(self._resources) and connection.waits_for_user_code
        }

    def resolve(self, client_id: str) -> list[Connection]:
        """Return the connections that a client id stands for.

        That is the connection that the current task opened under this client id, else all connections of the client.
        """
        connection = self.current_connection(client_id)
        return self.registry.of_client(client_id) if connection is None else [connection]

    def issue_token(self, connection: Connection) -> str:
        """Issue a reconnect token for a connection.

        Raises:
            InvalidTokenError: `enable_reconnect` is False.
        """
        has_session = session_of(connection) is not None
        return self.tokens.issue(connection.client_id, None if has_session else connection.connection_id)

    # ── actions by client id ──

    def disconnect(self, client_id: str, code: int, reason: str) -> None:
        """Close the connections that a client id stands for. Without one of the current task, end its detached state.

        Raises:
            ConnectionNotFoundError: The client is neither connected nor detached.
            ValueError: `code` cannot be sent.
            WrongLoopError: This is not the event loop of the node.
        """
        check_close_code(code)
        self.hub.check_loop()
        targets: list[Connection | Session | DetachedState] = [*self.resolve(client_id)]
        if self.current_connection(client_id) is None:
            targets += self.detached.of_client(client_id)
        if not targets:
            raise ConnectionNotFoundError(client_id)
        for target in targets:
            target.close(DisconnectReason.APPLICATION, code=code, reason=reason, from_outside=True)

    def revoke(self, client_id: str, reason: str) -> int:
        """Close all connections of a client with 4410, end its sessions, and revoke its reconnect tokens.

        Returns:
            Number of connections and sessions that were closed.

        Raises:
            WrongLoopError: This is not the event loop of the node.
        """
        self.hub.check_loop()
        self.tokens.revoke(client_id)
        self.admission.revoke(client_id)
        targets = [*self.registry.of_client(client_id), *self.detached.of_client(client_id)]
        for target in targets:
            target.close(DisconnectReason.APPLICATION, code=SESSION_ENDED, reason=reason, from_outside=True)
        self.lifecycle.forget(client_id)
        self._events.emit("client_revoked", logging.INFO, client_id=client_id, ended=len(targets))
        return len(targets)

    def record_pong(self, client_id: str) -> None:
        """Record a pong that your code has read."""
        self.hub.check_loop()
        now = monotonic()
        for connection in self.resolve(client_id):
            connection.liveness.on_frame(now)
            connection.liveness.on_pong(now)

    def set_user_data(self, client_id: str, key: str, value: Any) -> None:
        """Set one entry of the user data on all connections of a client.

        Raises:
            ConnectionNotFoundError: The client is not connected.
            MemoryLimitExceededError: The value exceeds a memory limit. No connection is changed.
        """
        self.hub.check_loop()
        connections = self.resolve(client_id)
        if not connections:
            raise ConnectionNotFoundError(client_id)
        written: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            for connection in connections:
                data = connection.socket.user_data
                previous = {key: data[key]} if key in data else {}
                data[key] = value
                written.append((data, previous))
        except MemoryLimitExceededError:
            for changed, previous in written:
                changed.update(previous)
                if not previous:
                    del changed[key]
            raise

    def get_user_data(self, client_id: str, key: str) -> Any | None:
        """Return one entry of a client's user data; `None` if there is no such entry or client."""
        self.hub.check_loop()
        datas = (connection.socket.user_data for connection in self.resolve(client_id))
        return next((data[key] for data in datas if key in data), None)

    def generate_token(self, client_id: str) -> str:
        """Issue a reconnect token for the newest connection that a client id stands for, else for the client id.

        Raises:
            InvalidTokenError: `enable_reconnect` is False.
        """
        self.hub.check_loop()
        newest = next(reversed(self.resolve(client_id)), None)
        return self.tokens.issue(client_id, None) if newest is None else self.issue_token(newest)

    # ── listener of connections ──

    def on_admitted(self, connection: Connection) -> None:
        """Add an open connection that may stay to all registries."""
        is_plain = not connection.protocol.acknowledges  # a session is added to both when it begins
        self.registry.add(connection, with_queue=is_plain)
        if is_plain and self.budget.evicts:
            self.budget.attach(connection.account)
        self.heartbeat.add(connection)
        if self.reaper.enabled:
            self.reaper.add(connection)

    def on_closing(self, connection: Connection) -> None:
        """Remove a closing connection from all registries. An error in one step does not stop the others."""
        attempt = connection.attempt
        attempt(self._closing.add, connection)
        attempt(self._save_rooms, connection)
        if connection.reservation is not None:
            attempt(connection.reservation.release)
        attempt(self.heartbeat.remove, connection)
        attempt(self.reaper.remove, connection)
        if self.budget.evicts:
            attempt(self.budget.remove, connection.account)
        attempt(self.lifecycle.detach, connection)
        if self.budget.evicts:
            attempt(self.budget.mark_closed, connection.account)
        attempt(connection.socket._detach_user_data)

    def _save_rooms(self, connection: Connection) -> None:
        """Save the names of the rooms for the hooks, which run after the connection has left its rooms."""
        if connection.close_info is not None and (rooms := self.hub.rooms.rooms_of(connection.recipient)):
            connection.close_info = replace(connection.close_info, rooms=rooms)

    def on_closed(self, connection: Connection) -> None:
        """Release a connection at the end of its teardown."""
        connection.attempt(unbind_current, connection)
        if self.budget.evicts:
            connection.attempt(self.budget.remove, connection.account)
        connection.attempt(self._closing.remove, connection)
        connection.attempt(self.lifecycle.on_closed, connection)

    def on_ended(self, connection: Connection, ended: EndedConnection) -> None:
        """Replace a connection in its socket by the facts about it, because nothing of it is needed any more."""
        socket: StableSocket = connection.socket
        socket._end(ended)

    def on_renewal(self, connection: Connection, credential: str | None) -> None:
        """Verify a new credential of a client, without waiting. `None` is a missing one."""
        self._renewer.start(connection, credential)

    def on_evicted(self, connection: Connection) -> None:
        """Count and report a connection that is about to be closed because the memory limit is reached."""
        self._events.counters.evictions += 1
        connection.emit("connection_evicted", logging.WARNING, held_bytes=connection.memory_usage)

    def on_slow(self, connection: Connection, state: SlowConsumer) -> None:
        """Run the hooks for a client that has become a slow consumer, without waiting for them."""
        if self._hooks.has("slow"):
            slow = self._run_slow_hooks(connection, state)
            self._tasks.spawn(slow, name="ws-slow-hooks", context=copied(connection.context))

    async def _run_slow_hooks(self, connection: Connection, state: SlowConsumer) -> None:
        async with self._hook_slots:
            await self._hooks.slow(connection.socket, state)

    async def on_disconnect(self, connection: Connection) -> None:
        """Run the disconnect hooks. A cancellation cancels the current hook."""
        if connection.close_info is not None:
            await self._hooks.disconnect(connection.socket, connection.close_info.cause)

    async def on_session_end(self, connection: Connection) -> None:
        """Run the session end hooks, if the session has ended with the connection."""
        await self.lifecycle.notify_session_end(connection)

    async def on_error(self, connection: Connection, error: BaseException) -> None:
        """Run the error hooks with a bug in user code, after it was reported."""
        await self._hooks.error(connection.socket, error)

    async def close_info_by_handler(
        self, connection: Connection, error: BaseException
    ) -> tuple[CloseInfo, BaseException | None]:
        """Call the application's exception handler, and return the close info and the part of `error` that is a bug."""
        return await self.closer.close_info_by_handler(connection, error)

    async def _presence(self, event: str, presence: Presence) -> None:
        async with self._hook_slots:
            await self._hooks.presence(event, Room(presence.room, lambda: self.hub, history=False), presence)

    # ── stopping ──

    def resume_accepting(self) -> None:
        """Accept connections again."""
        self.admission.reopen()
        self._hello_reader.reopen()

    def stop_accepting(self) -> None:
        """Reject new connections, and the handshakes in progress."""
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
        await wait_for_all(self._spawn_for_each(self.lifecycle.notify_session_end, "ws-last-ends"), hook_timeout)
        for connection in self.connections:
            connection.force_finish()
        await self.lifecycle.stop(hook_timeout)
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
