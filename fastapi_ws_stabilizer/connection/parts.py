"""What a manager lends to its connections."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import OutboxOverflow, WebSocketConfig
from fastapi_ws_stabilizer.connection.asgi_outbox import WriterPool
from fastapi_ws_stabilizer.connection.backlog import OutboxLimits
from fastapi_ws_stabilizer.connection.inbox import InboxLimits
from fastapi_ws_stabilizer.connection.outbox_owner import SlowConsumer
from fastapi_ws_stabilizer.hub.slots import CallbackSemaphore
from fastapi_ws_stabilizer.hub.turns import FlushScheduler
from fastapi_ws_stabilizer.limits.ledger import MemoryBudget
from fastapi_ws_stabilizer.limits.traffic import InboundRateLimiter
from fastapi_ws_stabilizer.reports import EventBus
from fastapi_ws_stabilizer.tasks import TaskSet


class SharedResources:
    """What a manager lends to its connections.

    Args:
        config: Its options.
        reports: Where to tell what happens.
        tasks: Holds the tasks of all connections.
        turns: Runs what connections have to do at the end of a turn of the event loop.
        ledger: Counts what is held for connections.
        traffic: How much their clients may send.
        next_shard: Gives a new connection its shard.
        left: Called, without waiting, when a connection has begun to end: it must be found nowhere any more.
        evicted: Called, without waiting, when a connection is going to end because room is needed.
        finished: Called, without waiting, when everything is done for a connection.
        disconnected: Runs the disconnect hooks.
        session_over: Runs the hooks for the end of a connection's session, if it has ended with it.
        slow: Called, without waiting, when a client has become slow.
        failed: Told of a bug in user code, after it has been reported.
        judge: Finds out how a connection ends by an error of user code, and what of it is a bug.

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
        "asked_to_leave",
        "cleanups",
        "config",
        "disconnected",
        "evicted",
        "failed",
        "finished",
        "inbox_limits",
        "judge",
        "ledger",
        "left",
        "loop",
        "next_shard",
        "numbered_limits",
        "outbox_limits",
        "reports",
        "round_trips",
        "session_over",
        "slow",
        "tasks",
        "traffic",
        "turns",
        "watches_input",
        "writers",
    )

    def __init__(
        self,
        config: WebSocketConfig,
        reports: EventBus,
        tasks: TaskSet,
        turns: FlushScheduler,
        ledger: MemoryBudget,
        traffic: InboundRateLimiter,
        *,
        next_shard: Callable[[], int],
        left: Callable[[Any], None],
        evicted: Callable[[Any], None],
        finished: Callable[[Any], None],
        disconnected: Callable[[Any, DisconnectReason], Awaitable[None]],
        session_over: Callable[[Any], Awaitable[None]],
        slow: Callable[[Any, SlowConsumer], None],
        failed: Callable[[Any, BaseException], Awaitable[None]],
        judge: Callable[[Any, BaseException], Awaitable[tuple[CloseInfo, BaseException | None]]] | None = None,
    ) -> None:
        self.config = config
        self.reports = reports
        self.round_trips = None if reports.timings is None else reports.timings.round_trips
        self.tasks = tasks
        self.turns = turns
        self.loop = turns.loop
        self.next_shard = next_shard
        self.left = left
        self.evicted = evicted
        self.finished = finished
        self.disconnected = disconnected
        self.session_over = session_over
        self.slow = slow
        self.failed = failed
        self.judge = judge
        self.ledger = ledger
        self.traffic = traffic
        self.watches_input = traffic.limited or ledger.watches_input
        max_unread = config.inbox_max_bytes
        if config.max_memory_per_connection is not None:  # half of it, for the message that reaches the mark is taken:
            max_unread = min(max_unread, config.max_memory_per_connection // 2)  # who sends too fast is to be slowed
        self.inbox_limits = InboxLimits(config.inbox_max_messages, max_unread, ledger)
        self.outbox_limits = OutboxLimits(config, reports.totals, ledger)
        self.numbered_limits = OutboxLimits(config, reports.totals, ledger)
        self.numbered_limits.overflow = OutboxOverflow.DISCONNECT
        # No more than a log holds: who is disconnected for being slow finds everything there that was not sent.
        self.numbered_limits.bound(max(2, config.replay_max_messages), config.replay_max_bytes)
        self.writers = WriterPool(
            tasks, CallbackSemaphore(config.max_concurrent_broadcast), CallbackSemaphore(config.max_concurrent_cleanup)
        )
        self.asked_to_leave: dict[str, DisconnectReason] = {}
        self.cleanups = asyncio.Semaphore(config.max_concurrent_cleanup)
