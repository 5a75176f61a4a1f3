"""Clients under `max_total_memory`, and a model that counts what should be held and evicted."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from fastapi_ws_stabilizer.connection.inbox import Inbox
from fastapi_ws_stabilizer.errors import MemoryLimitExceededError
from fastapi_ws_stabilizer.events import Event
from fastapi_ws_stabilizer.memory.budget import FRAME_OVERHEAD_BYTES, UNREAD_OVERHEAD_BYTES
from fastapi_ws_stabilizer.memory.sizing import deep_size
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import Message
from tests.support import stage as stage_module
from tests.support.fake_link import soon
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Line, Peer, Stage
from tests.support.waiting import waiting_messages

CHECK_INTERVAL = 10.0

_clock = itertools.count(1)


class ModelClient:
    """One client, with the facts that an eviction policy uses. Moments are numbers that only grow.

    Attributes:
        line: Its connection; `None` while it is detached.
        recipient: Id in the event of its eviction: of a connection or a session; `None` when nothing is held for it.
        connected: Moment of its last connect.
        spoke: Moment of its last message.
        got: Moment at which the last message was delivered to it.
        detached: Moment at which it became detached; `None` while it is connected.
        said: Number of its last message.
        sent: Sizes of its messages in bytes, by number.
    """

    def __init__(self, client_id: str, *, numbered: bool, deaf: bool) -> None:
        self.client_id = client_id
        self.numbered = numbered
        self.deaf = deaf
        self.peer: Peer | None = None
        self.line: Line | None = None
        self.token: str | None = None
        self.recipient: str | None = None
        self.connected = self.spoke = self.got = 0
        self.detached: int | None = None
        self.said = 0
        self.sent: dict[int, int] = {}

    def eviction_order(self, policy: str) -> tuple[bool, int]:
        """Return its sort key: detached clients are evicted first."""
        if self.detached is not None:
            return False, self.detached
        return True, {
            "lru": max(self.connected, self.spoke),
            "fifo": self.connected,
            "oldest": max(self.connected, self.got),
        }[policy]


class Taken(list[dict[str, Any]]):
    """Messages that a server has taken, with the moment of the last one."""

    got = 0

    def append(self, message: dict[str, Any]) -> None:
        super().append(message)
        if message["type"] == "websocket.send" and not (message.get("text") or "").startswith('{"type":"ack"'):
            self.got = next(_clock)


class RecordingServer(FakeServer):
    """Server that records when it has taken its last message."""

    def __init__(self, *args: Any, **scope: Any) -> None:
        super().__init__(*args, **scope)
        self.taken = Taken()


class World:
    """A manager and its clients.

    Attributes:
        problems: Differences from the model.
        evictions: Number of evictions.
    """

    def __init__(self, policy: str, limit: int) -> None:
        self.policy = policy
        self.limit = limit
        self.stage = Stage(
            max_total_memory=limit,
            memory_eviction_policy=policy,
            memory_check_interval=CHECK_INTERVAL,
            replay_max_messages=8,
            outbox_max_messages=12,
            outbox_overflow="drop_oldest",
            inbox_max_messages=5,
            send_timeout=10_000,
            inbox_pause_timeout=10_000,
            disconnect_grace=1,
            log_level="CRITICAL",
        )
        self.stage.manager.events.subscribe(self._hear)
        self.stage.endpoint = self._endpoint
        self.clients: dict[str, ModelClient] = {}
        self.problems: list[str] = []
        self.evictions = 0
        self._writer: ModelClient | None = None
        self._wanted = 0
        self._stop = asyncio.Event()

    async def _endpoint(self, ws: StableSocket) -> None:
        if self.clients[ws.client_id].deaf:
            await self._stop.wait()
        else:
            await ws.run()

    @property
    def budget(self) -> Any:
        """The memory budget under test."""
        return self.stage.manager._node.budget

    # ── evictions ──

    def _hear(self, report: Event) -> None:
        fields = report.fields
        is_detached = report.event == "session_evicted" and fields.get("why") == "memory"
        if is_detached or report.event == "connection_evicted":
            self._evicted(fields["client_id"])
        elif report.event == "slow_client" and fields["how"] == "disconnected":  # its session is detached
            client = self.clients[fields["client_id"]]
            client.detached, client.line = next(_clock), None

    def _evicted(self, client_id: str) -> None:
        self.evictions += 1
        victim = self.clients[client_id]
        for client in self.clients.values():
            if client.line is not None:
                client.got = client.line.server.taken.got  # type: ignore[attr-defined]
        candidates = [
            client
            for client in self.clients.values()
            if client.recipient and client is not self._writer and (client is victim or self._holds(client))
        ]
        worst = min(candidates, key=lambda client: client.eviction_order(self.policy), default=None)
        if victim is not worst:
            self.problems.append(f"{client_id} was evicted before {worst and worst.client_id}")
        if self.budget.total + self._wanted <= self.limit:
            self.problems.append(f"{client_id} was evicted although there was room")
        victim.recipient = None
        victim.line = None

    def _holds(self, client: ModelClient) -> bool:
        """Return whether memory is held for a client. If not, evicting it would free nothing."""
        node = self.stage.manager._node
        holder: Any = None
        if client.detached is not None:
            holder = node.sessions.get(client.recipient or "") or node.detached.states.of(client.client_id)
        elif client.line is not None and client.line.socket is not None:
            holder = client.line.socket._connection
        return holder is not None and holder.memory_usage > 0

    # ── expected totals ──

    def full_count(self) -> int:
        """Return the bytes of everything that is held, each message once, counted from scratch."""
        node = self.stage.manager._node
        sessions = list(node.sessions._by_id.values())
        frames = {
            id(frame): frame.size + FRAME_OVERHEAD_BYTES for session in sessions for frame in session.buffer.entries
        }
        inboxes: dict[int, tuple[str, Inbox]] = {
            id(session.inbox): (session.client_id, session.inbox) for session in sessions if session.inbox is not None
        }
        user_data: dict[int, Any] = {id(session.user_data): session.user_data for session in sessions}
        for connection in node.connections:
            waiting = waiting_messages(connection.outbox)
            frames.update((id(frame), frame.size + FRAME_OVERHEAD_BYTES) for frame in waiting)
            inboxes[id(connection.inbox)] = (connection.client_id, connection.inbox)
            if connection.close_info is None and connection.protocol.session is None:
                user_data[id(connection.socket._user_data)] = connection.socket._user_data
        user_data.update((id(one.user_data), one.user_data) for one in node.detached.states._states.values())
        unread = [(client_id, item) for client_id, inbox in inboxes.values() for item in inbox.unread()]
        return (
            sum(frames.values())
            + sum(self._size_of(client_id, item) + UNREAD_OVERHEAD_BYTES for client_id, item in unread)
            + sum(sys.getsizeof(key) + deep_size(value) for data in user_data.values() for key, value in _entries(data))
        )

    def _size_of(self, client_id: str, item: Any) -> int:
        if isinstance(item, Message):  # the received text is what is counted
            return self.clients[client_id].sent[item.seq or 0]
        return sys.getsizeof(item)

    def check(self) -> None:
        """Compare the budget with the model."""
        total = self.budget.total
        assert self.problems == []
        assert total == self.full_count()
        assert total <= self.limit
        assert self.stage.bugs == []

    # ── actions of clients ──

    async def connects(self, client: ModelClient) -> None:
        """Connect a client, for the first time or again."""
        if client.line is not None:
            return
        if client.numbered:
            client.peer = client.peer or Peer(self.stage, client.client_id)
            client.said = 0 if client.recipient is None else client.said
            line = await client.peer.dial()
        else:
            line = self.stage.plain(client.client_id, token=client.token)
            await soon()
        client.line, client.detached, client.token = line, None, None
        client.connected = next(_clock)
        assert line.socket is not None
        client.recipient = line.socket.recipient_id
        line.server.taken.got = max(line.server.taken.got, client.connected)  # type: ignore[attr-defined]

    async def leaves(self, client: ModelClient) -> None:
        """Break its connection; a plain client gets a reconnect token before."""
        if client.line is None:
            return
        if not client.numbered:
            client.token = self.stage.manager.generate_reconnect_token(client.client_id)
        client.detached = next(_clock)
        line, client.line = client.line, None
        await line.leaves()

    async def close_normally(self, client: ModelClient) -> None:
        """Close its connection with 1000, so that its session ends."""
        if client.line is None:
            return
        line, client.line, client.recipient = client.line, None, None
        await line.leaves(1000)

    async def stores(self, client: ModelClient, key: str, size: int) -> None:
        """Store user data for it."""
        if client.line is None or client.line.socket is None:
            return
        data = client.line.socket.user_data
        value = [["x" * size]]
        old = sys.getsizeof(key) + deep_size(data[key]) if key in data else 0
        before = dict(data)
        self._writer, self._wanted = client, sys.getsizeof(key) + deep_size(value) - old
        try:
            await self.stage.manager.set_user_data(client.client_id, key, value)
        except MemoryLimitExceededError:
            assert dict(data) == before
            held = client.line.socket._connection.memory_usage
            if held + self._wanted <= self.limit // 2:  # data of other clients can be evicted
                self.problems.append(f"{client.client_id} could not store {self._wanted} bytes, and holds {held}")
        finally:
            self._writer, self._wanted = None, 0

    async def grows(self, client: ModelClient, size: int) -> None:
        """Let a value grow in place, and wait for the next check."""
        if client.line is None or client.line.socket is None:
            return
        for value in list(client.line.socket.user_data.values()):
            value[0].append("x" * size)
        await asyncio.sleep(CHECK_INTERVAL + 1)

    async def says(self, client: ModelClient, size: int) -> None:
        """Send a message from it."""
        if client.line is None or client.line.socket is None or len(client.line.socket._connection.inbox) >= 5:
            return  # a message behind a full inbox is not read, so it does not count
        client.spoke = next(_clock)
        client.said += 1
        if client.numbered:
            message = {"type": "msg", "seq": client.said, "event": "note", "data": "x" * size}
            client.sent[client.said] = sys.getsizeof(json.dumps(message))
            await client.line.say(message)
        else:
            await client.line.say({"type": "note", "data": "x" * size})

    async def acknowledges(self, client: ModelClient) -> None:
        """Acknowledge everything that it was sent."""
        if client.line is None or not client.numbered:
            return
        seqs = [frame["seq"] for frame in client.line.frames if "seq" in frame]
        if seqs:
            await client.line.say({"type": "ack", "seq": max(seqs)})

    def blocks(self, client: ModelClient) -> None:
        """Let it stop reading."""
        if client.line is not None:
            client.line.server.block()

    def reads(self, client: ModelClient) -> None:
        """Let it read again."""
        if client.line is not None:
            client.line.server.release()

    async def joins(self, client: ModelClient, room: str) -> None:
        """Let it join a room."""
        if client.line is not None and client.line.socket is not None:
            await client.line.socket.join(room)

    async def broadcast(self, size: int, room: str | None, key: str | None) -> None:
        """Send one message to all clients, or to a room."""
        await self.stage.manager.broadcast("x" * size, room=room, coalesce_key=key)

    async def sends_to(self, client: ModelClient, size: int) -> None:
        """Send one message to one client."""
        await self.stage.manager.send_to_client(client.client_id, "x" * size)

    async def end(self) -> None:
        """Close everything, and check that nothing is held."""
        self._stop.set()
        await self.stage.__aexit__(None, None, None)
        assert self.budget.total == 0

    def add(self, client_id: str, *, numbered: bool, deaf: bool) -> ModelClient:
        """Add a client."""
        return self.clients.setdefault(client_id, ModelClient(client_id, numbered=numbered, deaf=deaf))


def _entries(data: Any) -> Iterable[tuple[str, Any]]:
    return () if data is None else data.items()


@contextmanager
def recording_servers() -> Iterator[None]:
    """Replace the servers of all lines by ones that record when they take messages."""
    with mock.patch.object(stage_module, "FakeServer", RecordingServer):
        yield
