"""One connection from its handshake to its close code, around the user's endpoint."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi_ws_stabilizer.close_codes import CloseInfo
from fastapi_ws_stabilizer.config import MemoryEvictionPolicy, RejectPolicy, WebSocketConfig
from fastapi_ws_stabilizer.connection.lifecycle import Connection
from fastapi_ws_stabilizer.connection.outbox_owner import SlowConsumer
from fastapi_ws_stabilizer.connection.parts import SharedResources
from fastapi_ws_stabilizer.connection.room import Room
from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.hub.delivery import Hub
from fastapi_ws_stabilizer.hub.heartbeat import HeartbeatScheduler
from fastapi_ws_stabilizer.hub.lifetimes import ConnectionReaper
from fastapi_ws_stabilizer.hub.presence import Presence, PresenceList
from fastapi_ws_stabilizer.hub.turns import FlushScheduler
from fastapi_ws_stabilizer.limits.ledger import MemoryBudget
from fastapi_ws_stabilizer.limits.traffic import InboundRateLimiter
from fastapi_ws_stabilizer.reports import EventBus
from fastapi_ws_stabilizer.routing import own
from fastapi_ws_stabilizer.routing.dispatch import Dispatcher
from fastapi_ws_stabilizer.routing.door import AdmissionController
from fastapi_ws_stabilizer.routing.endings import ClosingConnections
from fastapi_ws_stabilizer.routing.greeting import HelloReader
from fastapi_ws_stabilizer.routing.hooks import HookRegistry
from fastapi_ws_stabilizer.routing.opening import Opening
from fastapi_ws_stabilizer.routing.refusing import Rejector
from fastapi_ws_stabilizer.routing.resumption import Resumption
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.tokens import ReconnectTokens
from fastapi_ws_stabilizer.tasks import TaskSet, copied, wait_for_all


class Node(Opening):
    """Opens connections, and ends each with the code that fits how its endpoint ended.

    Made for one event loop.

    Attributes:
        delivery: Who is connected, in which rooms, and how they are reached.
        door: Where clients knock.
        unfinished: The open connections and those whose end is still being worked on.
        closing: Whether no more connections are taken.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        reports: EventBus,
        hooks: HookRegistry,
        dispatcher: Dispatcher,
        tokens: ReconnectTokens,
        loop: asyncio.AbstractEventLoop | None = None,
        before_token: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._before_token = before_token
        self._reports = reports
        self._hooks = hooks
        self._dispatcher = dispatcher
        self._tasks = TaskSet(self._task_failed)
        turns = FlushScheduler(config.num_shards, reports, loop)
        self.ledger = MemoryBudget(
            config.max_total_memory,
            config.max_memory_per_connection,
            MemoryEvictionPolicy(config.memory_eviction_policy).value,
            config.memory_check_interval,
        )
        self.delivery: Hub[Connection] = Hub(
            config,
            reports,
            turns,
            self._tasks,
            joined=functools.partial(self._presence, "join"),
            left=functools.partial(self._presence, "leave"),
            wanted=functools.partial(hooks.has, "join", "leave"),
            away_of=lambda client_id: self.resumption.away_of(client_id),
            ledger=self.ledger,
        )
        self.registry = self.delivery.registry
        self._seen = IdempotencyCache()
        self.resumption = Resumption(config, reports, hooks, self.delivery, tokens, self.ledger, self._seen)
        self.sessions = self.resumption.sessions
        self.unfinished: set[Connection] = set()
        self._ending = ClosingConnections()
        refusing = Rejector(RejectPolicy(config.reject), reports)
        self._reception = HelloReader(
            config, self.sessions, refusing, address_of=lambda websocket: self.door.address_of(websocket)
        )
        self.door = AdmissionController(config, reports, refusing, self._reception, ending=self._ending)
        self.heartbeat = HeartbeatScheduler(config, reports)
        self.lifetimes = ConnectionReaper(config)
        self.closing = False
        self._told_of_server = False
        self._hook_slots = asyncio.Semaphore(config.max_concurrent_cleanup)  # of rooms and of slow clients
        self._parts = SharedResources(
            config,
            reports,
            self._tasks,
            turns,
            self.ledger,
            InboundRateLimiter(
                config.max_message_rate,
                config.max_message_burst,
                config.max_byte_rate,
                max_message_size=config.max_message_size,
            ),
            next_shard=self.registry.next_shard,
            left=self._left,
            evicted=self._evicted,
            finished=self._finished,
            disconnected=hooks.disconnect,
            session_over=self.resumption.session_over,
            slow=self._slow,
            failed=hooks.error,
            judge=self.judge,
        )

    # ── what sockets ask for ──

    async def run(self, socket: StableSocket, concurrency: int) -> None:
        """Hand every message of a socket to the handlers."""
        await self._dispatcher.run(socket._connection, concurrency)

    def join(self, connection: Connection, room: str, metadata: Mapping[str, Any] | None) -> PresenceList:
        """Let a connection into a room."""
        return self.delivery.join(connection.member, room, metadata)

    def leave_room(self, connection: Connection, room: str) -> bool:
        """Take a connection out of a room."""
        return self.delivery.leave(connection.member, room)

    def rooms_of(self, connection: Connection) -> tuple[str, ...]:
        """The rooms that a connection, or its session, is in, or was in when it ended."""
        ended: CloseInfo | None = connection.member.ending
        return self.delivery.rooms.of(connection.member) if ended is None else ended.rooms

    def history(self, connection: Connection, room: str, count: int, *, newcomer: bool) -> None:
        """Send the last messages of a room to a connection that has joined it, as far as it has not had them."""
        self.delivery.recall(connection.member, room, count, newcomer=newcomer)

    def address_of(self, connection: Connection) -> str:
        """Where the client of a connection comes from."""
        return self.door.address_of(connection.websocket)

    def reconnect_token(self, connection: Connection) -> str:
        """Make a reconnect token for a connection.

        Raises:
            InvalidTokenError: `enable_reconnect` is False.
        """
        self._before_token()
        return self.resumption.issue_token(connection.client_id, connection)

    async def _presence(self, event: str, who: Presence) -> None:
        async with self._hook_slots:
            await self._hooks.presence(event, Room(who.room, lambda: self.delivery, history=False), who)

    def _slow(self, socket: StableSocket, how: SlowConsumer) -> None:
        if self._hooks.has("slow"):
            context = copied(socket._connection.context)
            self._tasks.spawn(self._tell_slow(socket, how), name="ws-slow-hooks", context=context)

    async def _tell_slow(self, socket: StableSocket, how: SlowConsumer) -> None:
        async with self._hook_slots:
            await self._hooks.slow(socket, how)

    def own_connection(self, client_id: str) -> Connection | None:
        """The connection that the current task, or the one that has started it, has opened under this client id."""
        connection = own.current_for(client_id)
        return connection if connection is not None and connection.belongs_to(self._parts) else None

    def served_here(self) -> set[Connection]:
        """The connections whose endpoint, handler or hook is the current task: they end when it goes on."""
        return {one for one in own.all_current() if one.belongs_to(self._parts) and one.waits_for_user_code}

    def meant(self, client_id: str) -> list[Connection]:
        """The connections that a call with this client id means: the current task's own one, else all of the client."""
        connection = self.own_connection(client_id)
        return self.registry.of_client(client_id) if connection is None else [connection]

    def reopen(self) -> None:
        """Take connections again."""
        self.closing = False
        self.door.reopen()
        self._reception.reopen()

    def close(self) -> None:
        """Take no more connections, and refuse those that are being opened."""
        self.closing = True
        self._reception.close()
        self.door.close()

    async def stop(self, patience: float) -> None:
        """Let go of the heartbeat, of the sessions, and of tasks that are left over.

        Args:
            patience: Seconds that the hooks for the end of sessions may take in all.
        """
        self.heartbeat.stop()
        self.lifetimes.stop()
        await wait_for_all(self._reception.guests, 1.0)
        await self.door.wait_until_empty(1.0)
        # Their time is over, but nobody's disconnect goes untold.
        await wait_for_all(self._for_unfinished(Connection.run_disconnect_hooks, "ws-last-hooks"), 1.0)
        await wait_for_all(self._for_unfinished(self.resumption.session_over, "ws-last-ends"), patience)
        for connection in list(self.unfinished):
            connection.give_up()
        await self.resumption.stop(patience)
        self.delivery.stop()
        self.ledger.stop()
        if left_over := self._tasks.cancel():
            await wait_for_all(left_over, 1.0)

    def _for_unfinished(
        self, what: Callable[[Connection], Coroutine[Any, Any, None]], name: str
    ) -> list[asyncio.Task[None]]:
        """Do something for each connection that is not finished, each in a task with its own context variables."""
        return [
            self._tasks.spawn(what(connection), name=name, context=copied(connection.context))
            for connection in self.unfinished
        ]

    def _task_failed(self, task: asyncio.Task[Any], error: BaseException) -> None:
        self._reports.bug("internal_task_failed", error, task=task.get_name())
