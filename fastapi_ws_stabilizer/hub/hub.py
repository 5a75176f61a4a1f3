"""Hub of one manager: its connections, its rooms, and which clients are present there."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from fastapi_ws_stabilizer.close_codes import NO_STATUS, CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.errors import RoomLimitError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.hub.broadcast import Broadcaster
from fastapi_ws_stabilizer.hub.history import RoomHistory
from fastapi_ws_stabilizer.hub.presence import Presence, PresenceList, PresenceTracker
from fastapi_ws_stabilizer.hub.registry import ConnectionRegistry
from fastapi_ws_stabilizer.hub.rooms import RoomMembership, check_room_name
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.memory.presence_metadata import PresenceMetadataSizes
from fastapi_ws_stabilizer.queueing import Recipient
from fastapi_ws_stabilizer.scheduling import FlushScheduler, LoopBudget
from fastapi_ws_stabilizer.tasks import TaskSet
from fastapi_ws_stabilizer.wire.envelope import copy_for_replay

_DELIBERATE = frozenset({DisconnectReason.COMPLETED, DisconnectReason.APPLICATION, DisconnectReason.POLICY})
"""Causes after which no client is expected back, because this side ended the connection deliberately."""


class Hub:
    """Registry, rooms, presence and broadcast of one manager on one event loop.

    Args:
        config: Options of the manager.
        events: Event bus with the counters of broadcasts.
        scheduler: Flush scheduler, which limits how long the event loop is held.
        tasks: Task set for the tasks that announce joins and leaves.
        registry: Registry of the open connections.
        joined: Called when a client has joined a room.
        left: Called when a client has left a room.
        wanted: Whether any listener needs these calls.
        detached_of: Returns the detached sessions of a client and the detached states of its plain connections.
        budget: Memory budget that counts presence metadata.

    Attributes:
        registry: Open connections.
        rooms: Room membership by connection.
        presence: Room membership by client.
        broadcaster: Sender of messages to these connections and rooms.
        check_loop: Raises `WrongLoopError` unless it runs on the hub's event loop.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        events: EventBus,
        scheduler: FlushScheduler,
        tasks: TaskSet,
        registry: ConnectionRegistry,
        *,
        joined: Callable[[Presence], Awaitable[None]],
        left: Callable[[Presence], Awaitable[None]],
        wanted: Callable[[], bool],
        detached_of: Callable[[str], Sequence[Any]] = lambda _: (),
        budget: MemoryBudget | None = None,
    ) -> None:
        self._detached_of = detached_of
        self._history = RoomHistory(config.room_history, config.room_history_max_age)
        self.registry = registry
        self.rooms: RoomMembership[Recipient] = RoomMembership(config.max_rooms_per_connection)
        self.presence = PresenceTracker(
            grace=config.presence_grace,
            joined=joined,
            left=left,
            wanted=wanted,
            tasks=tasks,
            emptied=self.end_if_empty,
        )
        budget = MemoryBudget() if budget is None else budget
        self._metadata_sizes = PresenceMetadataSizes(budget)
        self._described = budget.described  # recipients with metadata; most have none
        self._detached_since: dict[str, dict[str, float]] = {}  # connection id → rooms with missed messages
        self.check_loop = scheduler.check_loop
        self.broadcaster = Broadcaster(
            config.num_shards, scheduler, events.counters, registry, self.rooms, self._history, detached_of
        )

    # ── rooms ──

    def join(self, recipient: Recipient, room: str, metadata: Mapping[str, Any] | None) -> PresenceList:
        """Add a connection to a room and return the presence list. Joining again renews the metadata.

        Raises:
            TypeError: The metadata is not a mapping.
            RoomNameError: The room name is invalid.
            RoomLimitError: The connection is in `max_rooms_per_connection` rooms.
            MemoryLimitExceededError: The metadata exceeds a memory limit.
        """
        if metadata is not None and not isinstance(metadata, Mapping):
            raise TypeError(f"presence metadata must be a mapping of names to values, not a {type(metadata).__name__}")
        if metadata is not None:
            check_room_name(room)
            self._metadata_sizes.put(recipient.account, room, metadata)
        try:
            newcomer = self.rooms.join(recipient, room)
        except RoomLimitError:
            self._metadata_sizes.release(recipient.connection_id, room)
            raise
        if newcomer:
            self._history.begin(room)
        if metadata is not None:
            self._release_other_metadata(recipient.connection_id, room, recipient.client_id)
        self.presence.join(room, recipient.client_id, recipient.connection_id, metadata)
        return self.presence.roster(room)

    def describe(self, client_id: str, room: str, metadata: Mapping[str, Any]) -> bool:
        """Replace a client's presence metadata in a room; `False` if it is not present.

        Raises:
            MemoryLimitExceededError: The metadata exceeds a memory limit. The old metadata stays.
        """
        if not self.presence.knows(room, client_id):
            return False
        connection_id = next(iter(self.presence.connections(room, client_id)), None)
        if connection_id is not None and (recipient := self.rooms.get(room, connection_id)) is not None:
            self._metadata_sizes.put(recipient.account, room, metadata)
            self._release_other_metadata(recipient.connection_id, room, client_id)
        elif detached := [one for one in self._detached_of(client_id) if room in self.rooms.rooms_of(one)]:
            newest = detached.pop()
            self._metadata_sizes.put(newest.account, room, metadata)
            newest.update_saved_presence(room, metadata)
            for other in detached:  # the client gets this metadata whichever session resumes first
                self._metadata_sizes.release(other.connection_id, room)
                other.update_saved_presence(room, metadata)
        else:
            self._metadata_sizes.check(metadata)
        return self.presence.update(room, client_id, metadata)

    def _release_other_metadata(self, connection_id: str, room: str, client_id: str) -> None:
        """Drop the metadata sizes of a client's other connections in a room: new metadata replaces theirs."""
        for other in self.presence.connections(room, client_id):
            if other != connection_id:
                self._metadata_sizes.release(other, room)

    def _leave_room(self, recipient: Recipient, room: str, *, at_once: bool) -> bool:
        """Update presence after a recipient has left a room.

        If other connections of its client are in the room, one of them takes over the metadata.

        Returns:
            Whether the recipient was present there and not detached.
        """
        was_present = self.presence.leave(room, recipient.client_id, recipient.connection_id, at_once=at_once)
        if recipient.connection_id in self._described:
            successor = next(iter(self.presence.connections(room, recipient.client_id)), None)
            self._metadata_sizes.release(recipient.connection_id, room, successor)
        return was_present

    def replay_history(self, recipient: Recipient, room: str, count: int, *, newcomer: bool) -> None:
        """Send the last messages of a room to a recipient.

        A recipient that is new in the room gets all of them. Other recipients get the messages that they missed, once.
        Only a plain connection that came back with a token can have missed messages, because a session replays its own.
        """
        since = -math.inf if newcomer else self._detached_since.get(recipient.connection_id, {}).pop(room, math.inf)
        for frame in self._history.last(room, count, (recipient.client_id, recipient.connection_id), since):
            recipient.outbox.offer(copy_for_replay(frame))
        recipient.outbox.flush()

    def record_missed_since(self, recipient: Recipient, rooms: Iterable[str], since: float) -> None:
        """Record that a connection's client was detached from some rooms since a time."""
        if self._history.enabled and (missed := dict.fromkeys(rooms, since)):
            self._detached_since[recipient.connection_id] = missed

    def end_if_empty(self, room: str) -> None:
        """End a room and forget its history if no client is in it or expected back."""
        if not self.room_exists(room):
            self._history.end(room)

    def leave(self, recipient: Recipient, room: str) -> bool:
        """Remove a recipient from a room; `False` if it is not in the room."""
        if not self.rooms.leave(recipient, room):
            return False
        self._leave_room(recipient, room, at_once=True)
        if room not in self.rooms:
            self.end_if_empty(room)
        return True

    def remove_client(self, client_id: str, room: str) -> bool:
        """Remove a client from a room with all its connections and sessions.

        Afterwards the client is not expected back there.

        Returns:
            `False` if the client was neither in the room nor expected back.
        """
        self.check_loop()
        here = [connection.recipient for connection in self.registry.of_client(client_id)]
        left = [self.leave(recipient, room) for recipient in (*here, *self._detached_of(client_id))]
        return self.presence.give_up(room, client_id) or any(left)

    def is_in(self, client_id: str, room: str) -> bool:
        """Whether a connection or session of a client is in a room."""
        here = [connection.recipient for connection in self.registry.of_client(client_id)]
        return any(room in self.rooms.rooms_of(recipient) for recipient in (*here, *self._detached_of(client_id)))

    def room_exists(self, room: str) -> bool:
        """Whether a room has a member or expects a client back."""
        return room in self.rooms or self.presence.is_present(room)

    def room_names(self) -> list[str]:
        """Return the rooms with members, oldest first, then those that only expect clients back."""
        return list(dict.fromkeys((*self.rooms.names(), *self.presence.rooms())))

    def clients_in(self, room: str) -> list[str]:
        """Return the ids of the clients in a room, each once: present clients first, then detached ones."""
        present = [presence.client_id for presence in self.presence.present(room)]
        return list(dict.fromkeys((*present, *(recipient.client_id for recipient in self.rooms.members(room)))))

    async def empty_room(self, room: str) -> int:
        """Remove all members of a room, and the clients that are expected back; return the number of members."""
        self.check_loop()
        loop_budget = LoopBudget()
        members = self.rooms.members(room)
        for recipient in members:
            self.leave(recipient, room)
            if loop_budget.exceeded():
                await loop_budget.yield_to_loop()
        self.presence.expire_all(room)
        return len(members)

    async def end_room(self, room: str, code: int, reason: str) -> int:
        """Close the connections of all members of a room; return how many it closed."""
        self.check_loop()
        loop_budget = LoopBudget()
        ended = 0
        for recipient in self.rooms.members(room):
            if recipient.close(DisconnectReason.APPLICATION, code=code, reason=reason, from_outside=True):
                ended += 1
            if loop_budget.exceeded():
                await loop_budget.yield_to_loop()
        return ended

    def begin_session(self, session: Recipient, shard: int) -> None:
        """Add a session to the recipients of broadcasts, attached or detached."""
        self.registry.add_queue(session.outbox, shard)

    def end_session(self, session: Recipient, shard: int) -> None:
        """Remove an ended session from broadcasts and from its rooms."""
        try:
            self.registry.remove_queue(session.outbox, shard)
        finally:
            self.leave_rooms(session)

    def presence_metadata(self, recipient: Recipient) -> dict[str, Mapping[str, Any]]:
        """Return the rooms of a recipient, with its client's metadata in each."""
        return {room: self.presence.metadata(room, recipient.client_id) for room in self.rooms.rooms_of(recipient)}

    def suspend(self, session: Recipient) -> dict[str, Mapping[str, Any]]:
        """Start the presence grace of a detached session. The session stays in its rooms.

        Returns:
            The client's metadata in each room.
        """
        metadata_by_room = self.presence_metadata(session)
        for room in metadata_by_room:
            self.presence.leave(room, session.client_id, session.connection_id, at_once=False)
        return metadata_by_room

    def restore(self, session: Recipient, metadata_by_room: Mapping[str, Mapping[str, Any]]) -> None:
        """Make a resumed session present in its rooms again.

        A room that still expects the client back has its current metadata. Elsewhere `metadata_by_room` applies.
        """
        for room in self.rooms.rooms_of(session):
            expired = not self.presence.knows(room, session.client_id)
            self.presence.join(
                room, session.client_id, session.connection_id, metadata_by_room.get(room) if expired else None
            )

    def keep_rooms(self, connection: Recipient, state: Recipient) -> None:
        """Hand the rooms of a closing plain connection over to its detached state, and start the grace.

        The presence metadata follows, because the state has the same connection id.
        """
        self.rooms.hand_over(connection, state)
        for room in self.rooms.rooms_of(state):
            self.presence.leave(room, state.client_id, state.connection_id, at_once=False)

    def take_rooms(self, state: Recipient) -> tuple[str, ...]:
        """Remove a detached state from its rooms, which its client joins again; return their names."""
        rooms = self.rooms.leave_all(state)
        self._metadata_sizes.release_all(state.connection_id)
        return rooms

    def remove(self, connection: Connection) -> None:
        """Remove a closed connection from the registry and from its own rooms."""
        self._detached_since.pop(connection.connection_id, None)
        try:
            self.registry.remove(connection, with_queue=connection.recipient is connection)
        finally:
            self.leave_rooms(connection)

    def leave_rooms(self, recipient: Recipient) -> None:
        """Remove a closed recipient from its rooms."""
        self._leave_presence(recipient, self.rooms.leave_all(recipient), final=_is_final(recipient.close_info))

    def _leave_presence(self, recipient: Recipient, rooms: Iterable[str], *, final: bool) -> None:
        failure: Exception | None = None
        for room in rooms:
            try:
                was_present = self._leave_room(recipient, room, at_once=final)
                if final and not was_present:  # it was detached, and is no longer expected back
                    self.presence.give_up(room, recipient.client_id)
                if room not in self.rooms:
                    self.end_if_empty(room)
            except Exception as error:  # an error in one room must not stop the removal from the others
                failure = error
        if recipient.connection_id in self._described and not self.rooms.rooms_of(recipient):
            self._metadata_sizes.release_all(recipient.connection_id)  # else it was handed over with the rooms
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """Stop the announcements of presence."""
        self.presence.close()


def _is_final(close_info: CloseInfo | None) -> bool:
    """Whether the client is not expected back after this close, because one side closed deliberately."""
    if close_info is None:
        return False
    if close_info.cause is DisconnectReason.CLIENT_CLOSE:
        return close_info.code in (1000, NO_STATUS)  # a page that is closed or reloaded sends 1001
    return close_info.cause in _DELIBERATE
