"""Who gets what: everybody, one client, or the members of rooms."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

from fastapi_ws_stabilizer.close_codes import NO_STATUS, CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import RoomLimitError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.hub.broadcast import Broadcaster, BroadcastResult
from fastapi_ws_stabilizer.hub.history import RoomHistory
from fastapi_ws_stabilizer.hub.presence import Presence, PresenceList, PresenceTracker
from fastapi_ws_stabilizer.hub.recipient import Recipient
from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from fastapi_ws_stabilizer.hub.rooms import RoomMembership, check_room_name
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.memory.presence_metadata import Descriptions
from fastapi_ws_stabilizer.queueing import EnqueueResult, SendQueueLike, yield_to_writers
from fastapi_ws_stabilizer.scheduling import FlushScheduler, LoopBudget
from fastapi_ws_stabilizer.tasks import TaskSet
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.envelope import check_size, copy_for_replay

M = TypeVar("M", bound=Recipient)

_NOT_QUEUED = (EnqueueResult.DROPPED, EnqueueResult.SKIPPED, EnqueueResult.CLOSED)

SMALL_ROOM: Final = 64
"""Members that are never divided."""

_DELIBERATE = frozenset({DisconnectReason.COMPLETED, DisconnectReason.APPLICATION, DisconnectReason.POLICY})
"""Endings by which this side has said that it is over. Nobody is expected back after them."""


class Hub(Generic[M]):
    """Registry, rooms, presence and fan-out of one manager on one event loop.

    Args:
        config: Its options.
        events: Where what is broadcast is counted.
        scheduler: The turns of the event loop that work for many is cut into.
        tasks: Holds the tasks that announce who has joined and left.
        joined: Told of a client that has come to a room.
        state: Told of a client that has gone from one.
        wanted: Whether anybody wants to be told.
        away_of: The sessions of a client that are away, and what is kept of its plain connections.
        budget: Where presence metadata is counted.

    Attributes:
        registry: The open connections.
        rooms: Who is in which room, by connection.
        presence: Who is in which room, by client.
        check_loop: Raises `WrongLoopError` unless this is the event loop of all that.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        scheduler: FlushScheduler,
        tasks: TaskSet,
        *,
        joined: Callable[[Presence], Awaitable[None]],
        left: Callable[[Presence], Awaitable[None]],
        wanted: Callable[[], bool],
        away_of: Callable[[str], Sequence[Any]] = lambda _: (),
        budget: MemoryBudget | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._num_shards = config.num_shards
        self._fan_out = Broadcaster(scheduler, events.counters)
        self._detached_of = away_of
        self._history = RoomHistory(config.room_history, config.room_history_max_age)
        self.registry: ConnectionRegistry[M] = ConnectionRegistry(config.num_shards)
        self.rooms: RoomMembership[M] = RoomMembership(config.max_rooms_per_connection)
        self.presence = PresenceTracker(
            grace=config.presence_grace,
            joined=joined,
            left=left,
            wanted=wanted,
            tasks=tasks,
            emptied=self.end_if_empty,
        )
        self._descriptions = Descriptions(MemoryBudget() if budget is None else budget)
        self._detached_since: dict[str, dict[str, float]] = {}  # connection id → rooms of which it has missed something
        self.check_loop = scheduler.check_loop

    # ── sending ──

    async def broadcast(
        self,
        frame: EncodedMessage,
        rooms: str | Iterable[str] | None = None,
        exclude: Any = None,
        *,
        history: bool = True,
    ) -> BroadcastResult:
        """Queue a frame for everybody, or for the members of some rooms, each once.

        Args:
            frame: What to send.
            rooms: Names of rooms, or the name of one; everybody when left out.
            exclude: Who does not get it: a client id, a socket, or several of them.
            history: Whether the rooms remember it.

        Raises:
            TypeError: `exclude` is nothing of that kind.
            MessageEncodeError: It is larger than some clients take.
        """
        self.check_loop()
        if rooms is not None and not isinstance(rooms, str):
            rooms = tuple(rooms)
        if exclude is not None and not isinstance(exclude, str) and isinstance(exclude, Iterable):
            exclude = tuple(exclude)  # it is read when the turn of this broadcast has come
        if rooms is not None:
            frame.room = rooms if isinstance(rooms, str) else rooms[0] if len(rooms) == 1 else None

        check_size(frame)

        def audience() -> tuple[Iterable[Sequence[SendQueueLike]], frozenset[str]]:
            excluded = self.resolve_recipients(exclude)
            if rooms is not None and history and self._history.enabled:
                hidden = excluded | _client_ids_in(exclude)
                for room in (rooms,) if isinstance(rooms, str) else rooms:
                    self._history.add(room, frame, hidden)
            groups = (
                self.registry.outboxes()
                if rooms is None
                else self._recipient_groups(tuple(self.rooms.recipients(rooms)))
            )
            return groups, excluded

        return await self._fan_out.send(frame, audience)

    def _recipient_groups(self, members: Sequence[M]) -> Iterator[Sequence[SendQueueLike]]:
        """The outboxes of some members, in as many parts as everybody is divided into, unless they are few."""
        size = max(SMALL_ROOM, -(-len(members) // self._num_shards))
        for start in range(0, len(members), size):
            yield [member.outbox for member in members[start : start + size]]

    async def send_to_client(self, client_id: str, frame: EncodedMessage) -> bool:
        """Queue a frame for all connections and sessions of a client; tell whether it was queued for one.

        Raises:
            MessageEncodeError: It is larger than some clients take.
        """
        self.check_loop()
        check_size(frame)
        mailboxes: list[SendQueueLike] = [one.recipient.outbox for one in self.registry.of_client(client_id)]
        mailboxes += [session.outbox for session in self._detached_of(client_id)]
        offered = [mailbox.offer_now(frame) for mailbox in mailboxes]
        if EnqueueResult.BACKPRESSURE in offered:
            await yield_to_writers([mailbox for mailbox in mailboxes if mailbox.is_backpressured()])
        elif self._scheduler.exceeded() or any(mailbox.lingers() for mailbox in mailboxes):
            await asyncio.sleep(0)
        return any(how not in _NOT_QUEUED for how in offered)

    def resolve_recipients(self, whom: Any) -> frozenset[str]:
        """The ids of the members that are meant by a client id, a socket, or several of them."""
        if whom is None:
            return frozenset()
        if isinstance(whom, str):
            here = (connection.recipient.connection_id for connection in self.registry.of_client(whom))
            return frozenset((*here, *(session.connection_id for session in self._detached_of(whom))))
        connection_id = getattr(whom, "recipient_id", None)
        if isinstance(connection_id, str):
            return frozenset((connection_id,))
        if isinstance(whom, (bytes, bytearray)) or not isinstance(whom, Iterable):
            raise TypeError(f"exclude takes client ids and sockets, not a {type(whom).__name__}")
        return frozenset().union(*(self.resolve_recipients(one) for one in whom))

    # ── rooms ──

    def join(self, member: M, room: str, metadata: Mapping[str, Any] | None) -> PresenceList:
        """Let a connection into a room, and return who is there. Joining again renews the metadata.

        Raises:
            TypeError: The metadata is no mapping.
            RoomNameError: No room can be called so.
            RoomLimitError: The connection is in as many rooms as it may be.
            MemoryLimitExceededError: The metadata is more than may be held.
        """
        if metadata is not None and not isinstance(metadata, Mapping):
            raise TypeError(f"presence metadata is a mapping of names to values, not a {type(metadata).__name__}")
        if metadata is not None:
            check_room_name(room)
            self._descriptions.put(member, room, metadata)
        try:
            newcomer = self.rooms.join(member, room)
        except RoomLimitError:
            self._descriptions.let_go(member.connection_id, room)
            raise
        if newcomer:
            self._history.begin(room)
        if metadata is not None:
            self._is_described_by(member.connection_id, room, member.client_id)
        self.presence.join(room, member.client_id, member.connection_id, metadata)
        return self.presence.roster(room)

    def describe(self, client_id: str, room: str, metadata: Mapping[str, Any]) -> bool:
        """Describe a client anew in a room; `False` if it is not present.

        Raises:
            MemoryLimitExceededError: The metadata is more than may be held. What was there stays.
        """
        if not self.presence.knows(room, client_id):
            return False
        connection_id = next(iter(self.presence.connections(room, client_id)), None)
        if connection_id is not None and (member := self.rooms.get(room, connection_id)) is not None:
            self._descriptions.put(member, room, metadata)
            self._is_described_by(member.connection_id, room, client_id)
        elif away := [one for one in self._detached_of(client_id) if room in self.rooms.rooms_of(one)]:
            newest = away.pop()
            self._descriptions.put(newest, room, metadata)
            newest.update_saved_presence(room, metadata)
            for other in away:  # whichever comes back first, the client is described so
                self._descriptions.let_go(other.connection_id, room)
                other.update_saved_presence(room, metadata)
        else:
            self._descriptions.check(metadata)
        return self.presence.update(room, client_id, metadata)

    def _is_described_by(self, connection_id: str, room: str, client_id: str) -> None:
        """What the other connections of a client have said of it in a room is replaced."""
        for other in self.presence.connections(room, client_id):
            if other != connection_id:
                self._descriptions.let_go(other, room)

    def _leaves(self, member: M, room: str, *, at_once: bool) -> bool:
        """A member has left a room: if other connections of its client are there, they go on with its description.

        Returns:
            Whether it was present there, and not away.
        """
        was_here = self.presence.leave(room, member.client_id, member.connection_id, at_once=at_once)
        heir = next(iter(self.presence.connections(room, member.client_id)), None)
        self._descriptions.let_go(member.connection_id, room, heir)
        return was_here

    def replay_history(self, member: M, room: str, count: int, *, newcomer: bool) -> None:
        """Send a member the last messages of a room: a newcomer all of them, others what they have missed, once.

        Only a plain connection whose client came back with a token has missed something: a session gets what it missed
        by itself.
        """
        since = -math.inf if newcomer else self._detached_since.get(member.connection_id, {}).pop(room, math.inf)
        for frame in self._history.last(room, count, (member.client_id, member.connection_id), since):
            member.outbox.offer(copy_for_replay(frame))
        member.outbox.flush()

    def has_missed(self, member: M, rooms: Iterable[str], since: float) -> None:
        """The client of a connection was away since a moment: it has missed what was said in these rooms."""
        if self._history.enabled and (missed := dict.fromkeys(rooms, since)):
            self._detached_since[member.connection_id] = missed

    def end_if_empty(self, room: str) -> None:
        """End a room, and forget what was said in it, if no client is in it or expected back."""
        if not self.room_exists(room):
            self._history.end(room)

    def leave(self, member: M, room: str) -> bool:
        """Take a connection out of a room; `False` if it is not in."""
        if not self.rooms.leave(member, room):
            return False
        self._leaves(member, room, at_once=True)
        if room not in self.rooms:
            self.end_if_empty(room)
        return True

    def remove_client(self, client_id: str, room: str) -> bool:
        """Take a client out of a room, with all its connections and sessions; `False` if it is neither in nor expected.

        It is not expected back there any more.
        """
        self.check_loop()
        here = [connection.recipient for connection in self.registry.of_client(client_id)]
        state = [self.leave(member, room) for member in (*here, *self._detached_of(client_id))]
        return self.presence.give_up(room, client_id) or any(state)

    def is_in(self, client_id: str, room: str) -> bool:
        """Whether a connection or session of a client is in a room."""
        here = [connection.recipient for connection in self.registry.of_client(client_id)]
        return any(room in self.rooms.rooms_of(member) for member in (*here, *self._detached_of(client_id)))

    def room_exists(self, room: str) -> bool:
        """Whether a member is in a room, or a client is expected back there."""
        return room in self.rooms or self.presence.is_present(room)

    def room_names(self) -> list[str]:
        """The rooms that exist: those with members, oldest first, then those where clients are only expected back."""
        return list(dict.fromkeys((*self.rooms.names(), *self.presence.rooms())))

    def clients_in(self, room: str) -> list[str]:
        """The ids of the clients in a room, each once: those that are present first, then those that are away."""
        present = [who.client_id for who in self.presence.present(room)]
        return list(dict.fromkeys((*present, *(member.client_id for member in self.rooms.members(room)))))

    async def empty_room(self, room: str) -> int:
        """Let everybody leave a room, those who are expected back included; return how many connections were in it."""
        self.check_loop()
        hold = LoopBudget()
        members = self.rooms.members(room)
        for member in members:
            self.leave(member, room)
            if hold.exceeded():
                await hold.yield_to_loop()
        self.presence.expire_all(room)
        return len(members)

    async def end_room(self, room: str, code: int, reason: str) -> int:
        """End the connections of everybody in a room; return how many."""
        self.check_loop()
        hold = LoopBudget()
        ended = 0
        for member in self.rooms.members(room):
            if member.close(DisconnectReason.APPLICATION, code=code, text=reason, from_outside=True):
                ended += 1
            if hold.exceeded():
                await hold.yield_to_loop()
        return ended

    def begin_session(self, session: M) -> None:
        """Let a session get what everybody gets, from now on, with a connection or without."""
        self.registry.add_queue(session.outbox, session.shard)

    def end_session(self, session: M) -> None:
        """Take a session that is over out of everything."""
        try:
            self.registry.remove_queue(session.outbox, session.shard)
        finally:
            self.leave_rooms(session)

    def presence_metadata(self, member: M) -> dict[str, Mapping[str, Any]]:
        """The rooms of a member, and how its client is described in each."""
        return {room: self.presence.metadata(room, member.client_id) for room in self.rooms.rooms_of(member)}

    def suspend(self, session: M) -> dict[str, Mapping[str, Any]]:
        """The client of a session is away: it stays in its rooms, and is present there for the grace only.

        Returns:
            How it is described in each.
        """
        described = self.presence_metadata(session)
        for room in described:
            self.presence.leave(room, session.client_id, session.connection_id, at_once=False)
        return described

    def restore(self, session: M, described: Mapping[str, Mapping[str, Any]]) -> None:
        """The client of a session is back. Where it is still expected, it is described as it was meanwhile."""
        for room in self.rooms.rooms_of(session):
            gone = not self.presence.knows(room, session.client_id)
            self.presence.join(room, session.client_id, session.connection_id, described.get(room) if gone else None)

    def keep_rooms(self, member: M, state: M) -> None:
        """Leave the rooms of a plain connection that is ending to what is kept of it. It is present for the grace.

        What it is described with belongs to that too, which has the same connection id.
        """
        self.rooms.hand_over(member, state)
        for room in self.rooms.rooms_of(state):
            self.presence.leave(room, state.client_id, state.connection_id, at_once=False)

    def take_rooms(self, state: M) -> tuple[str, ...]:
        """Take what is kept of a plain connection out of its rooms, which its client joins anew; return their names."""
        rooms = self.rooms.leave_all(state)
        self._descriptions.let_go_all(state.connection_id)
        return rooms

    def remove(self, member: M) -> None:
        """Take a connection that is over out of everything that it was in by itself."""
        self._detached_since.pop(member.connection_id, None)
        try:
            self.registry.remove(member, mailbox=member.recipient is member)
        finally:
            self.leave_rooms(member)

    def leave_rooms(self, member: M) -> None:
        """Take a member that is over out of its rooms."""
        self._leave_presence(member, self.rooms.leave_all(member), final=_is_final(member.close_info))

    def _leave_presence(self, member: M, rooms: Iterable[str], *, final: bool) -> None:
        failure: Exception | None = None
        for room in rooms:
            try:
                was_here = self._leaves(member, room, at_once=final)
                if final and not was_here:  # it was away, and is not expected back any more
                    self.presence.give_up(room, member.client_id)
                if room not in self.rooms:
                    self.end_if_empty(room)
            except Exception as error:  # the other rooms must not keep it
                failure = error
        if not self.rooms.rooms_of(member):  # else they were handed over, with what describes it there
            self._descriptions.let_go_all(member.connection_id)
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """Say nothing more about who is where."""
        self.presence.close()


def _client_ids_in(whom: Any) -> frozenset[str]:
    """The client ids among what `exclude` may be."""
    if isinstance(whom, str):
        return frozenset((whom,))
    return frozenset().union(*map(_client_ids_in, whom)) if isinstance(whom, Iterable) else frozenset()


def _is_final(how: CloseInfo | None) -> bool:
    """Whether nobody is expected back after this ending: one side has said goodbye."""
    if how is None:
        return False
    if how.cause is DisconnectReason.CLIENT_CLOSE:
        return how.code in (1000, NO_STATUS)  # a page that is left or reloaded says 1001
    return how.cause in _DELIBERATE
