"""Objects shared by all connections of a node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import OutboxOverflow, WebSocketConfig
from fastapi_ws_stabilizer.connection.asgi_outbox import WriterPool
from fastapi_ws_stabilizer.connection.inbox import InboxLimits
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.limits.inbound import InboundRateLimiter
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.scheduling import CallbackSemaphore, FlushScheduler, PacedCalls
from fastapi_ws_stabilizer.tasks import TaskSet

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection
    from fastapi_ws_stabilizer.connection.ended_connection import EndedConnection


class ConnectionListener(Protocol):
    """Listener of all connections of a node. Methods that are not async must not block."""

    def on_admitted(self, connection: Connection) -> None:
        """Add an open connection that may stay to all registries."""

    def on_closing(self, connection: Connection) -> None:
        """Remove a connection that has started to close from all registries."""

    def on_closed(self, connection: Connection) -> None:
        """Release a connection at the end of its teardown."""

    def on_ended(self, connection: Connection, ended: EndedConnection) -> None:
        """Replace a connection in its socket by the facts about it, because nothing of it is needed any more."""

    def on_renewal(self, connection: Connection, credential: str | None) -> None:
        """Verify a new credential of a client, without waiting. `None` is a missing one."""

    def on_evicted(self, connection: Connection) -> None:
        """Report a connection that is about to be closed because the memory limit is reached."""

    def on_slow(self, connection: Connection, state: SlowConsumer) -> None:
        """Run the hooks for a client that has become a slow consumer, without waiting for them."""

    async def on_disconnect(self, connection: Connection) -> None:
        """Run the disconnect hooks. A cancellation cancels the current hook."""

    async def on_session_end(self, connection: Connection) -> None:
        """Run the session end hooks, if the session has ended with the connection."""

    async def on_error(self, connection: Connection, error: BaseException) -> None:
        """Run the error hooks with a bug in user code, after it was reported."""

    async def close_info_by_handler(
        self, connection: Connection, error: BaseException
    ) -> tuple[CloseInfo, BaseException | None]:
        """Return the `CloseInfo` for an error of user code, and the part of it that is a bug."""


class SharedResources:
    """Objects shared by all connections of a node.

    Args:
        listener: The listener of all connections.
        config: Options of the manager.
        events: Event bus.
        tasks: Set that holds the tasks of all connections.
        scheduler: Scheduler that flushes connections at the end of an event loop iteration.
        budget: Memory budget of all connections.
        traffic: Inbound rate limits of all clients.
        next_shard: Returns the shard of a new connection.

    Attributes:
        inbox_limits: Bounds of all inboxes.
        outbox_limits: Bounds of the outboxes of plain clients.
        numbered_limits: Bounds of the outboxes of `stabilizer.v1.json` clients. Numbered messages are never dropped.
        round_trips: Histogram of round trips, if they are measured.
        writers: Writer tasks for sends and close frames that block.
        cleanups: Semaphore for connections that run their disconnect hooks at the same time.
        loop: Event loop of all connections.
        watches_input: Whether each received message is checked or counted. Most configurations need neither.
        closings: Closes by the client or the network, which are spread over event loop iterations if there are many.
        drain_requests: Causes of the drain requests to open connections, by connection id.
    """

    __slots__ = (
        "budget",
        "cleanups",
        "closings",
        "config",
        "drain_requests",
        "events",
        "inbox_limits",
        "listener",
        "loop",
        "next_shard",
        "numbered_limits",
        "outbox_limits",
        "round_trips",
        "scheduler",
        "tasks",
        "traffic",
        "watches_input",
        "writers",
    )

    def __init__(
        self,
        listener: ConnectionListener,
        config: WebSocketConfig,
        events: EventBus,
        tasks: TaskSet,
        scheduler: FlushScheduler,
        budget: MemoryBudget,
        traffic: InboundRateLimiter,
        *,
        next_shard: Callable[[], int],
    ) -> None:
        self.listener = listener
        self.config = config
        self.events = events
        self.round_trips = None if events.timings is None else events.timings.round_trips
        self.tasks = tasks
        self.scheduler = scheduler
        self.loop = scheduler.loop
        self.next_shard = next_shard
        self.budget = budget
        self.traffic = traffic
        self.watches_input = traffic.limited or budget.watches_input
        max_unread = config.inbox_max_bytes
        if config.max_memory_per_connection is not None:
            # Half, because the message that reaches the bound is still accepted. A client that sends too fast must be
            # slowed down and not closed.
            max_unread = min(max_unread, config.max_memory_per_connection // 2)
        self.inbox_limits = InboxLimits(config.inbox_max_messages, max_unread, budget)
        self.outbox_limits = OutboxLimits(config, events.counters, budget)
        self.numbered_limits = OutboxLimits(config, events.counters, budget)
        self.numbered_limits.overflow = OutboxOverflow.DISCONNECT
        # At most the bounds of a replay buffer, so that the buffer has all unsent messages when a slow consumer is
        # closed.
        self.numbered_limits.bound(max(2, config.replay_max_messages), config.replay_max_bytes)
        self.writers = WriterPool(
            tasks, CallbackSemaphore(config.max_concurrent_broadcast), CallbackSemaphore(config.max_concurrent_cleanup)
        )
        self.closings = PacedCalls(events)
        self.drain_requests: dict[str, DisconnectReason] = {}
        self.cleanups = asyncio.Semaphore(config.max_concurrent_cleanup)
