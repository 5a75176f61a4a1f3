"""What a manager lends to its connections."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import OutboxOverflow, WebSocketConfig
from fastapi_ws_stabilizer.connection.asgi_outbox import WriterPool
from fastapi_ws_stabilizer.connection.inbox import InboxLimits
from fastapi_ws_stabilizer.connection.outbox_owner import SlowConsumer
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.limits.inbound import InboundRateLimiter
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.scheduling import CallbackSemaphore, FlushScheduler
from fastapi_ws_stabilizer.tasks import TaskSet


class SharedResources:
    """What a manager lends to its connections.

    Args:
        config: Its options.
        events: Where to tell what happens.
        tasks: Holds the tasks of all connections.
        scheduler: Runs what connections have to do at the end of a turn of the event loop.
        budget: Counts what is held for connections.
        traffic: How much their clients may send.
        next_shard: Gives a new connection its shard.
        left: Called, without waiting, when a connection has begun to end: it must be found nowhere any more.
        evicted: Called, without waiting, when a connection is going to end because room is needed.
        finished: Called, without waiting, when everything is done for a connection.
        disconnected: Runs the disconnect hooks.
        session_over: Runs the hooks for the end of a connection's session, if it has ended with it.
        slow: Called, without waiting, when a client has become slow.
        on_error: Told of a bug in user code, after it has been reported.
        close_info_by_handler: Finds out how a connection ends by an error of user code, and what of it is a bug.

    Attributes:
        inbox_limits: What all inboxes share.
        outbox_limits: What all outboxes of plain clients share.
        numbered_limits: What those of `stabilizer.v1.json` clients share: nothing that is numbered is ever dropped.
        round_trips: Where round trips are counted, if they are.
        writers: The tasks of sends and close frames that wait for the server.
        cleanups: How many may run their disconnect hooks at the same time.
        loop: The event loop of all connections.
        watches_input: Whether anybody wants to know of each message that comes in. Most often nobody does.
        asked_to_leave: The open connections whose clients were asked to leave, by id, and the reason.
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
        if config.max_memory_per_connection is not None:  # half of it, for the message that reaches the mark is taken:
            max_unread = min(max_unread, config.max_memory_per_connection // 2)  # who sends too fast is to be slowed
        self.inbox_limits = InboxLimits(config.inbox_max_messages, max_unread, budget)
        self.outbox_limits = OutboxLimits(config, events.counters, budget)
        self.numbered_limits = OutboxLimits(config, events.counters, budget)
        self.numbered_limits.overflow = OutboxOverflow.DISCONNECT
        # No more than a log holds: who is disconnected for being slow finds everything there that was not sent.
        self.numbered_limits.bound(max(2, config.replay_max_messages), config.replay_max_bytes)
        self.writers = WriterPool(
            tasks, CallbackSemaphore(config.max_concurrent_broadcast), CallbackSemaphore(config.max_concurrent_cleanup)
        )
        self.drain_requests: dict[str, DisconnectReason] = {}
        self.cleanups = asyncio.Semaphore(config.max_concurrent_cleanup)
