"""Objects shared by all connections of a node."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import OutboxOverflow, WebSocketConfig
from fastapi_ws_stabilizer.connection.asgi_outbox import WriterPool
from fastapi_ws_stabilizer.connection.inbox import InboxLimits
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.limits.inbound import InboundRateLimiter
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.scheduling import CallbackSemaphore, FlushScheduler
from fastapi_ws_stabilizer.tasks import TaskSet


class SharedResources:
    """Objects and callbacks shared by all connections of a node.

    The callbacks `on_closing`, `on_evicted`, `on_closed` and `on_slow` must not block.

    Args:
        config: Options of the manager.
        events: Event bus.
        tasks: Set that holds the tasks of all connections.
        scheduler: Scheduler that flushes connections at the end of an event loop iteration.
        budget: Memory budget of all connections.
        traffic: Inbound rate limits of all clients.
        next_shard: Returns the shard of a new connection.
        on_closing: Called when a connection has started to close. It must remove the connection from all registries.
        on_evicted: Called when a connection is about to be closed because the memory limit is reached.
        on_closed: Called at the end of a connection's teardown.
        on_disconnect: Runs the disconnect hooks.
        on_session_end: Runs the session end hooks, if the session has ended with the connection.
        on_slow: Called when a client has become a slow consumer.
        on_error: Called with a bug in user code after it was reported.
        close_info_by_handler: Returns the `CloseInfo` for an error of user code, and the part of it that is a bug.

    Attributes:
        inbox_limits: Bounds of all inboxes.
        outbox_limits: Bounds of the outboxes of plain clients.
        numbered_limits: Bounds of the outboxes of `stabilizer.v1.json` clients. Numbered messages are never dropped.
        round_trips: Histogram of round trips, if they are measured.
        writers: Writer tasks for sends and close frames that block.
        cleanups: Semaphore for connections that run their disconnect hooks at the same time.
        loop: Event loop of all connections.
        watches_input: Whether each received message is checked or counted. Most configurations need neither.
        drain_requests: Causes of the drain requests to open connections, by connection id.
    """

    __slots__ = (
        "budget",
        "cleanups",
        "close_info_by_handler",
        "config",
        "drain_requests",
        "events",
        "inbox_limits",
        "loop",
        "next_shard",
        "numbered_limits",
        "on_closed",
        "on_closing",
        "on_disconnect",
        "on_error",
        "on_evicted",
        "on_session_end",
        "on_slow",
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
        config: WebSocketConfig,
        events: EventBus,
        tasks: TaskSet,
        scheduler: FlushScheduler,
        budget: MemoryBudget,
        traffic: InboundRateLimiter,
        *,
        next_shard: Callable[[], int],
        on_closing: Callable[[Any], None],
        on_evicted: Callable[[Any], None],
        on_closed: Callable[[Any], None],
        on_disconnect: Callable[[Any, DisconnectReason], Awaitable[None]],
        on_session_end: Callable[[Any], Awaitable[None]],
        on_slow: Callable[[Any, SlowConsumer], None],
        on_error: Callable[[Any, BaseException], Awaitable[None]],
        close_info_by_handler: Callable[[Any, BaseException], Awaitable[tuple[CloseInfo, BaseException | None]]]
        | None = None,
    ) -> None:
        self.config = config
        self.events = events
        self.round_trips = None if events.timings is None else events.timings.round_trips
        self.tasks = tasks
        self.scheduler = scheduler
        self.loop = scheduler.loop
        self.next_shard = next_shard
        self.on_closing = on_closing
        self.on_evicted = on_evicted
        self.on_closed = on_closed
        self.on_disconnect = on_disconnect
        self.on_session_end = on_session_end
        self.on_slow = on_slow
        self.on_error = on_error
        self.close_info_by_handler = close_info_by_handler
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
        self.drain_requests: dict[str, DisconnectReason] = {}
        self.cleanups = asyncio.Semaphore(config.max_concurrent_cleanup)
