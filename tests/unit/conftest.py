"""Fixtures with the parts of a connection, and with managers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.client_address import ClientAddressResolver
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from fastapi_ws_stabilizer.connection.resources import SharedResources
from fastapi_ws_stabilizer.events import Event, EventBus
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from fastapi_ws_stabilizer.limits.inbound import InboundRateLimiter
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.observability.logs import get_logger
from fastapi_ws_stabilizer.scheduling import FlushScheduler
from fastapi_ws_stabilizer.socket import SocketServices, StableSocket
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from tests.support.fake_websocket import FakeServer
from tests.support.recording_listener import RecordingListener


@dataclass
class EventRecorder:
    """Recorder of the events of a manager or a connection."""

    all: list[Event] = field(default_factory=list)

    def __call__(self, report: Event) -> None:
        self.all.append(report)

    @property
    def events(self) -> list[str]:
        """Names of all events, in order."""
        return [report.event for report in self.all]

    def of(self, event: str) -> list[Event]:
        """Return the events with one name."""
        return [report for report in self.all if report.event == event]


@dataclass
class Bench:
    """One connection without a manager: the objects it needs, and a record of its callbacks."""

    config: WebSocketConfig
    server: FakeServer = field(default_factory=FakeServer)
    heard: EventRecorder = field(default_factory=EventRecorder)
    events: EventBus = field(default_factory=EventBus)
    listener: RecordingListener = field(default_factory=RecordingListener)
    task_failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.events.subscribe(self.heard)
        self.tasks = TaskSet(lambda _, error: self.task_failures.append(error))

    async def open(
        self, *, cancellable: bool = False, control_frames: bool = True, accept: bool = True
    ) -> tuple[Connection, StableSocket]:
        """Accept the WebSocket and open a connection for it."""
        websocket = await self.server.accepted() if accept else self.server.websocket
        scheduler = FlushScheduler(1, self.events)
        parts = SharedResources(
            self.listener,
            self.config,
            self.events,
            self.tasks,
            scheduler,
            MemoryBudget(),
            InboundRateLimiter(),
            next_shard=lambda: 0,
        )
        hub: Hub = Hub(
            self.config,
            self.events,
            scheduler,
            self.tasks,
            ConnectionRegistry(),
            joined=self.ignore,
            left=self.ignore,
            wanted=lambda: False,
        )
        services = SocketServices(hub, ClientAddressResolver(()), self.run_handlers, self.issue_token)
        endpoint = EndpointTask(cancellable=cancellable)
        self.connection = Connection(websocket, "ann", parts, control_frames=control_frames, endpoint=endpoint)
        socket = StableSocket(self.connection, services)
        self.connection.socket = socket
        if accept:
            self.connection.open()
        return self.connection, socket

    async def run_handlers(self, connection: Connection, concurrency: int) -> None:
        """Record what was to be dispatched."""
        self.dispatched = (connection, concurrency)

    @staticmethod
    def issue_token(_: Connection) -> str:
        """Return the same text for every connection."""
        return "token"

    @staticmethod
    async def ignore(_: Presence) -> None:
        """Ignore a join or a leave."""


@pytest.fixture
async def bench() -> AsyncIterator[Callable[..., Bench]]:
    """Return a factory of benches; remaining tasks are cancelled at the end."""
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(WebSocketConfig(**options)))
        return made[-1]

    yield make
    for one in made:
        one.server.release()
        await wait_for_all(one.tasks.cancel(), 2.0)


@pytest.fixture
async def manager_with() -> AsyncIterator[Callable[..., tuple[WebSocketConnectionManager, EventRecorder]]]:
    """Return a factory of managers with event recorders; the managers are shut down at the end."""
    made: list[WebSocketConnectionManager] = []

    def make(**options: Any) -> tuple[WebSocketConnectionManager, EventRecorder]:
        manager = WebSocketConnectionManager(WebSocketConfig(**options))
        heard = EventRecorder()
        manager.events.subscribe(heard)
        made.append(manager)
        return manager, heard

    yield make
    for manager in made:
        await manager.graceful_shutdown(timeout=0.2)


@pytest.fixture
def heard() -> tuple[EventBus, EventRecorder]:
    """Return an event bus and a recorder of its events."""
    events, ear = EventBus(), EventRecorder()
    events.subscribe(ear)
    return events, ear


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """Restore the library's logger after the test."""
    logger = get_logger()
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
    logger.propagate = propagate
