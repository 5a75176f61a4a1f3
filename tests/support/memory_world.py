"""Clients under `max_total_memory`, and what should be held for them: counted from nothing, with the worst in order."""

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

CHECK_INTERVAL = 10.0

_clock = itertools.count(1)


class ModelClient:
    """One client, and all that a policy may ask of it: the moments are numbers that only grow.

    Attributes:
        line: Its connection; `None` while it is away.
        member: By what its eviction is reported: a connection or a session; `None` when nothing is held for it.
        came: When it has come, or has come back.
        spoke: When its last message came.
        got: When the last message was delivered to it.
        left: When it has left something behind; `None` while it is here.
        said: Number of its last message.
        sent: How large its messages were, by their numbers.
    """

    def __init__(self, client_id: str, *, numbered: bool, deaf: bool) -> None:
        self.client_id = client_id
        self.numbered = numbered
        self.deaf = deaf
        self.peer: Peer | None = None
        self.line: Line | None = None
        self.token: str | None = None
        self.member: str | None = None
        self.came = self.spoke = self.got = 0
        self.left: int | None = None
        self.said = 0
        self.sent: dict[int, int] = {}

    def worst_first(self, policy: str) -> tuple[bool, int]:
        """What puts it in order: those that are away go first."""
        if self.left is not None:
            return False, self.left
        return True, {"lru": max(self.came, self.spoke), "fifo": self.came, "oldest": max(self.came, self.got)}[policy]


class Taken(list[dict[str, Any]]):
    """What a server has taken; it notes when."""

    got = 0

    def append(self, message: dict[str, Any]) -> None:
        super().append(message)
        if message["type"] == "websocket.send" and not (message.get("text") or "").startswith('{"type":"ack"'):
            self.got = next(_clock)


class NotingServer(FakeServer):
    """A server that notes when it has taken its last message."""

    def __init__(self, *args: Any, **scope: Any) -> None:
        super().__init__(*args, **scope)
        self.taken = Taken()


class World:
    """A manager and its guests.

    Attributes:
        problems: What was not as the model says.
        evictions: How many had to go.
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
        self.guests: dict[str, ModelClient] = {}
        self.problems: list[str] = []
        self.evictions = 0
        self._writer: ModelClient | None = None
        self._wanted = 0
        self._stop = asyncio.Event()

    async def _endpoint(self, ws: StableSocket) -> None:
        if self.guests[ws.client_id].deaf:
            await self._stop.wait()
        else:
            await ws.run()

    @property
    def budget(self) -> Any:
        """The sums under test."""
        return self.stage.manager._node.budget

    # ── who goes ──

    def _hear(self, report: Event) -> None:
        fields = report.fields
        away = report.event == "session_evicted" and fields.get("why") == "memory"
        if away or report.event == "connection_evicted":
            self._goes(fields["client_id"])
        elif report.event == "slow_client" and fields["how"] == "disconnected":  # its session waits for it
            guest = self.guests[fields["client_id"]]
            guest.left, guest.line = next(_clock), None

    def _goes(self, client_id: str) -> None:
        self.evictions += 1
        victim = self.guests[client_id]
        for guest in self.guests.values():
            if guest.line is not None:
                guest.got = guest.line.server.taken.got  # type: ignore[attr-defined]
        candidates = [
            guest
            for guest in self.guests.values()
            if guest.member and guest is not self._writer and (guest is victim or self._holds(guest))
        ]
        worst = min(candidates, key=lambda guest: guest.worst_first(self.policy), default=None)
        if victim is not worst:
            self.problems.append(f"{client_id} went, and {worst and worst.client_id} is worse")
        if self.budget.total + self._wanted <= self.limit:
            self.problems.append(f"{client_id} went though there was room")
        victim.member = None
        victim.line = None

    def _holds(self, guest: ModelClient) -> bool:
        """Whether anything is held for a guest: else its end would free nothing."""
        node = self.stage.manager._node
        client: Any = None
        if guest.left is not None:
            client = node.sessions.get(guest.member or "") or node.resumption.detached.of(guest.client_id)
        elif guest.line is not None and guest.line.socket is not None:
            client = guest.line.socket._connection
        return client is not None and client.memory_usage > 0

    # ── what should be held ──

    def full_count(self) -> int:
        """Everything that is held, each message once, counted from nothing."""
        node = self.stage.manager._node
        sessions = list(node.sessions._by_id.values())
        frames = {id(frame): frame.size + FRAME_OVERHEAD_BYTES for session in sessions for frame in session.entries}
        inboxes: dict[int, tuple[str, Inbox]] = {
            id(session.inbox): (session.client_id, session.inbox) for session in sessions if session.inbox is not None
        }
        kept: dict[int, Any] = {id(session.user_data): session.user_data for session in sessions}
        for connection in node.connections:
            outbox = connection.outbox
            waiting = [outbox._single] if outbox._single is not None else outbox._queue[outbox._head :]
            frames.update((id(frame), frame.size + FRAME_OVERHEAD_BYTES) for frame in waiting)
            inboxes[id(connection.inbox)] = (connection.client_id, connection.inbox)
            if connection.close_info is None and connection.protocol is None:
                kept[id(connection.socket._user_data)] = connection.socket._user_data
        kept.update((id(left.user_data), left.user_data) for left in node.resumption.detached._states.values())
        unread = [(client_id, item) for client_id, inbox in inboxes.values() for item in inbox.unread()]
        return (
            sum(frames.values())
            + sum(self._size_of(client_id, item) + UNREAD_OVERHEAD_BYTES for client_id, item in unread)
            + sum(sys.getsizeof(key) + deep_size(value) for data in kept.values() for key, value in _entries(data))
        )

    def _size_of(self, client_id: str, item: Any) -> int:
        if isinstance(item, Message):  # what is counted is the text as it came
            return self.guests[client_id].sent[item.seq or 0]
        return sys.getsizeof(item)

    def check(self) -> None:
        """Compare."""
        total = self.budget.total
        assert self.problems == []
        assert total == self.full_count()
        assert total <= self.limit
        assert self.stage.bugs == []

    # ── what guests do ──

    async def comes(self, guest: ModelClient) -> None:
        """A client connects, for the first time or again."""
        if guest.line is not None:
            return
        if guest.numbered:
            guest.peer = guest.peer or Peer(self.stage, guest.client_id)
            guest.said = 0 if guest.member is None else guest.said
            line = await guest.peer.dial()
        else:
            line = self.stage.plain(guest.client_id, token=guest.token)
            await soon()
        guest.line, guest.left, guest.token = line, None, None
        guest.came = next(_clock)
        assert line.socket is not None
        guest.member = line.socket.recipient_id
        line.server.taken.got = max(line.server.taken.got, guest.came)  # type: ignore[attr-defined]

    async def leaves(self, guest: ModelClient) -> None:
        """Its connection breaks; a plain one has got a token before, every other time."""
        if guest.line is None:
            return
        if not guest.numbered:
            guest.token = self.stage.manager.generate_reconnect_token(guest.client_id)
        guest.left = next(_clock)
        line, guest.line = guest.line, None
        await line.leaves()

    async def close_normally(self, guest: ModelClient) -> None:
        """It is over for good."""
        if guest.line is None:
            return
        line, guest.line, guest.member = guest.line, None, None
        await line.leaves(1000)

    async def keeps(self, guest: ModelClient, key: str, size: int) -> None:
        """The application keeps something for it."""
        if guest.line is None or guest.line.socket is None:
            return
        data = guest.line.socket.user_data
        value = [["x" * size]]
        old = sys.getsizeof(key) + deep_size(data[key]) if key in data else 0
        before = dict(data)
        self._writer, self._wanted = guest, sys.getsizeof(key) + deep_size(value) - old
        try:
            await self.stage.manager.set_user_data(guest.client_id, key, value)
        except MemoryLimitExceededError:
            assert dict(data) == before
            held = guest.line.socket._connection.memory_usage
            if held + self._wanted <= self.limit // 2:  # what others hold can go
                self.problems.append(f"{guest.client_id} was refused {self._wanted} bytes, and holds {held}")
        finally:
            self._writer, self._wanted = None, 0

    async def grows(self, guest: ModelClient, size: int) -> None:
        """A value grows inside, and is found at the next look."""
        if guest.line is None or guest.line.socket is None:
            return
        for value in list(guest.line.socket.user_data.values()):
            value[0].append("x" * size)
        await asyncio.sleep(CHECK_INTERVAL + 1)

    async def says(self, guest: ModelClient, size: int) -> None:
        """It sends a message."""
        if guest.line is None or guest.line.socket is None or len(guest.line.socket._connection.inbox) >= 5:
            return  # what is behind a full inbox is not read, so no message has come
        guest.spoke = next(_clock)
        guest.said += 1
        if guest.numbered:
            message = {"type": "msg", "seq": guest.said, "event": "note", "data": "x" * size}
            guest.sent[guest.said] = sys.getsizeof(json.dumps(message))
            await guest.line.say(message)
        else:
            await guest.line.say({"type": "note", "data": "x" * size})

    async def acknowledges(self, guest: ModelClient) -> None:
        """It has got everything that it was sent."""
        if guest.line is None or not guest.numbered:
            return
        seqs = [frame["seq"] for frame in guest.line.frames if "seq" in frame]
        if seqs:
            await guest.line.say({"type": "ack", "seq": max(seqs)})

    def blocks(self, guest: ModelClient) -> None:
        """It reads nothing."""
        if guest.line is not None:
            guest.line.server.block()

    def reads(self, guest: ModelClient) -> None:
        """It reads again."""
        if guest.line is not None:
            guest.line.server.release()

    async def joins(self, guest: ModelClient, room: str) -> None:
        """It enters a room."""
        if guest.line is not None and guest.line.socket is not None:
            await guest.line.socket.join(room)

    async def broadcast(self, size: int, room: str | None, key: str | None) -> None:
        """Everybody, or a room, is sent one message."""
        await self.stage.manager.broadcast("x" * size, room=room, coalesce_key=key)

    async def tell(self, guest: ModelClient, size: int) -> None:
        """One client is sent a message."""
        await self.stage.manager.send_to_client(guest.client_id, "x" * size)

    async def end(self) -> None:
        """Everything is over, and nothing is held."""
        self._stop.set()
        await self.stage.__aexit__(None, None, None)
        assert self.budget.total == 0

    def add(self, client_id: str, *, numbered: bool, deaf: bool) -> ModelClient:
        """One more client."""
        return self.guests.setdefault(client_id, ModelClient(client_id, numbered=numbered, deaf=deaf))


def _entries(data: Any) -> Iterable[tuple[str, Any]]:
    return () if data is None else data.items()


@contextmanager
def noting_servers() -> Iterator[None]:
    """Let the servers of all lines note when they have taken what."""
    with mock.patch.object(stage_module, "FakeServer", NotingServer):
        yield
