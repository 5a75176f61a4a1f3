"""Presence by client: two tabs are one presence, and a reload is not a leave.

The actual state and the announced state are separate. `join` and `leave` change the actual state at once. The
announcements follow: each room with pending announcements has one task, which announces one change at a time, with the
state at that moment. So while a hook is slow, each client has at most one pending entry, and a change that was undone
in time is never announced.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, overload

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.tasks import TaskSet

AT_ONCE: Final = 256
"""Number of expired grace periods, or announcements of one room, that are handled before yielding to the event loop."""

BLOCK: Final = 64
"""Entries per block. Presence lists share or renew the states of a block together."""


@dataclass(frozen=True)
class Presence:
    """Snapshot of one client in one room.

    Attributes:
        client_id: The client.
        room: The room.
        metadata: Presence metadata of the client. Read-only: the presence tracker uses the same object.
        connections: Number of the client's connections in the room; 0 while the client is expected back.
        present_seconds: Seconds that the client has been in the room or, if it has left, was in it.
    """

    client_id: str
    room: str
    metadata: Mapping[str, Any] = field(hash=False)
    connections: int
    present_seconds: float = field(compare=False)


class _State(NamedTuple):
    """State of one client in one room until it changes. All presence lists of that time share it."""

    client_id: str
    metadata: Mapping[str, Any]
    connections: int
    since: float


_States = tuple[tuple[_State, ...], ...]
"""All clients of a room, in blocks of `BLOCK`, which presence lists share until something changes."""


class _Block:
    """Part of a room's entries, with their states if a presence list has read them since the last change."""

    __slots__ = ("entries", "states")

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.states: tuple[_State, ...] | None = None


class _RoomPresence:
    """Entries of one room, and the pending announcements in order."""

    __slots__ = ("announcing", "blocks", "entries", "name", "pending", "states", "unread_lists")

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: dict[str, _Entry] = {}
        self.blocks: list[_Block] = []  # the same entries
        self.states: _States | None = None
        self.pending: OrderedDict[str, _Entry] = OrderedDict()  # a plain dict is slow to empty from its front
        self.announcing = False
        self.unread_lists: list[
            weakref.ref[PresenceList]
        ] = []  # presence lists of the current state that are not read yet

    def about_to_change(self, entry: _Entry | None = None) -> None:
        """Give presence lists of the current state a copy of it before it changes.

        Args:
            entry: The entry that changes; `None` if a new one is added.
        """
        for reference in self.unread_lists:
            presence_list = reference()
            if presence_list is not None:
                presence_list.take()
        self.unread_lists.clear()
        self.states = None
        if entry is not None:
            entry.state = entry.block.states = None

    def add(self, entry: _Entry) -> _Block:
        """Add an entry to the last block and return that block."""
        self.entries[entry.client_id] = entry
        if not self.blocks or len(self.blocks[-1].entries) >= BLOCK:
            self.blocks.append(_Block())
        block = self.blocks[-1]
        block.entries.append(entry)
        block.states = None
        return block

    def remove(self, entry: _Entry) -> None:
        """Remove an entry."""
        del self.entries[entry.client_id]
        entry.block.entries.remove(entry)
        if not entry.block.entries:
            self.blocks.remove(entry.block)

    def all_states(self) -> _States:
        """Return the current states of all entries, built once after each change."""
        if self.states is None:
            for block in self.blocks:
                if block.states is None:
                    block.states = tuple(entry.snapshot() for entry in block.entries)
            self.states = tuple(block.states or () for block in self.blocks)
        return self.states


class _Entry:
    """One stay of a client in a room, from join to leave."""

    __slots__ = (
        "announced",
        "block",
        "client_id",
        "connections",
        "expected_until",
        "metadata",
        "room",
        "since",
        "state",
        "until",
    )

    def __init__(self, room: _RoomPresence, client_id: str, metadata: Mapping[str, Any], since: float) -> None:
        self.room = room
        self.client_id = client_id
        self.metadata = metadata
        self.connections: set[str] = set()
        self.since = since
        self.until: float | None = None  # time at which the client left
        self.expected_until = 0.0  # end of the grace period after a lost connection
        self.announced = False
        self.state: _State | None = None
        self.block = room.add(self)

    def snapshot(self) -> _State:
        """Return the current state, the same object until it changes."""
        if self.state is None:
            self.state = _State(self.client_id, self.metadata, len(self.connections), self.since)
        return self.state

    def to_presence(self, now: float) -> Presence:
        seconds = (now if self.until is None else self.until) - self.since
        return Presence(self.client_id, self.room.name, self.metadata, len(self.connections), seconds)


class PresenceTracker:
    """Tracker of the clients in each room, which announces joins and leaves.

    A client is present from the join of its first connection until `grace` seconds after the leave of its last one. For
    each client of a room, `joined` and `left` are called alternately, never twice in a row. Within a room no two calls
    run at a time.

    Args:
        grace: Seconds for which a client is expected back after its last connection has left.
        joined: Called when a client has joined. It must not raise, and must end in bounded time.
        left: Called when a client has left; the same rules hold.
        wanted: Whether there are listeners, checked at each join. If a join is not announced, its leave is not either.
        tasks: Task set for the tasks that call `joined` and `left`.
        emptied: Called, without waiting, when no client is in a room or expected back there any more.
    """

    def __init__(
        self,
        *,
        grace: float,
        joined: Callable[[Presence], Awaitable[None]],
        left: Callable[[Presence], Awaitable[None]],
        wanted: Callable[[], bool],
        tasks: TaskSet,
        emptied: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._grace = grace
        self._joined = joined
        self._left = left
        self._wanted = wanted
        self._tasks = tasks
        self._emptied = emptied
        # The announcements of a room must not run in the context of the connection that happened to join first.
        self._context = contextvars.copy_context()
        self._rooms: dict[str, _RoomPresence] = {}
        self._graces: OrderedDict[_Entry, float] = OrderedDict()  # all equally long: first in, first out
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Number of rooms with a present client or a pending announcement."""
        return len(self._rooms)

    def join(self, room: str, client_id: str, connection_id: str, metadata: Mapping[str, Any] | None) -> None:
        """Add a connection of a client to a room.

        Args:
            room: The room.
            client_id: The client.
            connection_id: Its connection. Joining twice has no further effect.
            metadata: New presence metadata of the client; `None` changes nothing.
        """
        metadata = None if metadata is None else dict(metadata)
        room_presence = self._rooms.get(room)
        if room_presence is None:
            room_presence = self._rooms[room] = _RoomPresence(room)
        entry = room_presence.entries.get(client_id)
        room_presence.about_to_change(entry)
        if entry is None:
            entry = _Entry(room_presence, client_id, metadata or {}, monotonic())
            entry.connections.add(connection_id)
            if room_presence.pending.pop(client_id, None) is not None:  # back before its leave was announced
                entry.announced = True
            elif self._wanted():
                self._enqueue_announcement(entry)
        else:
            entry.connections.add(connection_id)
            entry.expected_until = 0.0
            self._graces.pop(entry, None)
            if metadata is not None:
                entry.metadata = metadata

    def leave(self, room: str, client_id: str, connection_id: str, *, at_once: bool) -> bool:
        """Remove a connection of a client from a room; `False` if it is not in the room.

        Args:
            room: The room.
            client_id: The client.
            connection_id: Its connection.
            at_once: Whether the leave is deliberate, so that no grace applies if this was the client's last connection.
        """
        entry = self._find(room, client_id)
        if entry is None or connection_id not in entry.connections:
            return False
        entry.room.about_to_change(entry)
        entry.connections.discard(connection_id)
        now = monotonic()
        if not at_once and self._grace > 0:
            entry.expected_until = now + self._grace
        elif self._grace <= 0:
            at_once = True
        if entry.connections:
            return True
        if at_once and entry.expected_until <= now:
            self._depart(entry, now)
        else:
            self._graces[entry] = now + self._grace
            self._arm()
        return True

    def give_up(self, room: str, client_id: str) -> bool:
        """Stop expecting a client back in a room; `False` if it was not expected or is present."""
        entry = self._find(room, client_id)
        if entry is None or entry.connections:
            return False
        self._graces.pop(entry, None)
        self._depart(entry, monotonic())
        return True

    def expire_all(self, room: str) -> None:
        """Stop expecting any client back in a room."""
        room_presence = self._rooms.get(room)
        for client_id in list(room_presence.entries) if room_presence is not None else ():
            self.give_up(room, client_id)

    def roster(self, room: str) -> PresenceList:
        """Return the current presence list of a room."""
        presence_list = PresenceList(room, self._rooms.get(room), monotonic())
        room_presence = self._rooms.get(room)
        if room_presence is not None:
            room_presence.unread_lists = [
                reference for reference in room_presence.unread_lists if reference() is not None
            ]
            room_presence.unread_lists.append(weakref.ref(presence_list))
        return presence_list

    def present(self, room: str) -> list[Presence]:
        """Return the clients in a room in order of arrival, including those expected back."""
        room_presence = self._rooms.get(room)
        if room_presence is None:
            return []
        now = monotonic()
        return [
            entry.to_presence(now) for entry in list(room_presence.entries.values())
        ]  # a copy: another thread may call this

    def is_present(self, room: str) -> bool:
        """Whether any client is in a room or expected back there."""
        room_presence = self._rooms.get(room)
        return room_presence is not None and bool(room_presence.entries)

    def rooms(self) -> list[str]:
        """Return the rooms with clients that are present or expected back."""
        return [
            name for name, room_presence in list(self._rooms.items()) if room_presence.entries
        ]  # a copy: other threads call this too

    def knows(self, room: str, client_id: str) -> bool:
        """Whether a client is in a room or expected back there."""
        return self._find(room, client_id) is not None

    def connections(self, room: str, client_id: str) -> list[str]:
        """Return the ids of a client's connections in a room."""
        entry = self._find(room, client_id)
        return [] if entry is None else list(entry.connections)

    def metadata(self, room: str, client_id: str) -> Mapping[str, Any]:
        """Return the presence metadata of a client in a room."""
        entry = self._find(room, client_id)
        return {} if entry is None else entry.metadata

    def update(self, room: str, client_id: str, metadata: Mapping[str, Any]) -> bool:
        """Replace the metadata of a client without an announcement; `False` if it is not present."""
        entry = self._find(room, client_id)
        if entry is None:
            return False
        entry.room.about_to_change(entry)
        entry.metadata = dict(metadata)
        return True

    def close(self) -> None:
        """Forget all clients and stop the announcements.

        A call of `joined` or `left` that has begun runs to its end.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for room in self._rooms.values():
            room.about_to_change()
            room.pending.clear()
        self._rooms.clear()
        self._graces.clear()

    def _find(self, room: str, client_id: str) -> _Entry | None:
        room_presence = self._rooms.get(room)
        return None if room_presence is None else room_presence.entries.get(client_id)

    def _depart(self, entry: _Entry, until: float) -> None:
        room = entry.room
        room.about_to_change(entry)
        room.remove(entry)
        entry.until = until
        if entry.announced:
            self._enqueue_announcement(entry)
        else:
            room.pending.pop(entry.client_id, None)
            self._forget_if_idle(room)
        if not room.entries:
            self._emptied(room.name)

    def _forget_if_idle(self, room: _RoomPresence) -> None:
        # After close() another room may have its name.
        if not (room.entries or room.pending or room.announcing) and self._rooms.get(room.name) is room:
            del self._rooms[room.name]

    # ── graces ──

    def _arm(self) -> None:
        """Set the timer to the end of the first grace. A timer that is set already ends no later."""
        if self._timer is None and self._graces:
            due = next(iter(self._graces.values()))
            self._timer = asyncio.get_running_loop().call_later(
                max(0.0, due - monotonic()), self._on_timer, context=self._context
            )

    def _on_timer(self) -> None:
        self._timer = None
        now = monotonic()
        for _ in range(AT_ONCE):
            entry, due = next(iter(self._graces.items()), (None, now))
            if entry is None or due > now:
                break
            del self._graces[entry]
            self._depart(entry, due)
        self._arm()

    # ── announcements ──

    def _enqueue_announcement(self, entry: _Entry) -> None:
        """Append a client to the pending announcements of its room."""
        room = entry.room
        room.pending[entry.client_id] = entry
        if not room.announcing:
            self._start_announcer(room)

    def _start_announcer(self, room: _RoomPresence) -> None:
        room.announcing = True  # before the task is created: an eager task begins at once
        task = self._tasks.spawn(self._announce(room), name="ws-presence", context=self._context.copy())
        task.add_done_callback(lambda task: self._announcer_done(room, task), context=self._context.copy())

    def _announcer_done(self, room: _RoomPresence, task: asyncio.Task[None]) -> None:
        room.announcing = False
        if room.pending and not task.cancelled():  # an entry was added after the last check, or a call raised
            self._start_announcer(room)
        else:
            self._forget_if_idle(room)

    async def _announce(self, room: _RoomPresence) -> None:
        """Announce the pending changes of a room until there are none.

        Cancelling stops the call that has begun. The pending changes then wait for the next change in the room.
        """
        count = 0
        while room.pending:
            _, entry = room.pending.popitem(last=False)
            if entry.until is None:
                entry.announced = True  # before the call: if the client leaves during it, the leave is announced
                await self._joined(entry.to_presence(monotonic()))
            else:
                await self._left(entry.to_presence(monotonic()))
            count += 1
            if count % AT_ONCE == 0:  # hooks that never wait do not yield to the event loop
                await asyncio.sleep(0)


class PresenceList(Sequence[Presence]):
    """Clients in a room at one moment, in order of arrival.

    Lists of different moments share their states, and each `Presence` is made when it is read. So endpoints of a room
    with thousands of clients can each hold a list, because most of the lists share the same data.
    """

    __slots__ = ("__weakref__", "_moment", "_name", "_room", "_states")

    def __init__(self, name: str, room: _RoomPresence | None, moment: float) -> None:
        self._name = name
        self._room = room  # `None` once the states are copied
        self._moment = moment
        self._states: _States = ()

    def take(self) -> None:
        """Copy the states of this moment: the list is read, or the room is about to change."""
        room, self._room = self._room, None
        if room is not None:
            self._states = room.all_states()

    def _to_presence(self, state: _State) -> Presence:
        seconds = self._moment - state.since
        return Presence(state.client_id, self._name, state.metadata, state.connections, seconds)

    def __len__(self) -> int:
        self.take()
        return sum(len(states) for states in self._states)

    def __iter__(self) -> Iterator[Presence]:
        self.take()
        return map(self._to_presence, itertools.chain.from_iterable(self._states))

    @overload
    def __getitem__(self, index: int) -> Presence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Presence]: ...
    def __getitem__(self, index: int | slice) -> Presence | list[Presence]:
        self.take()
        states = list(itertools.chain.from_iterable(self._states))
        if isinstance(index, slice):
            return [self._to_presence(state) for state in states[index]]
        return self._to_presence(states[index])

    def __repr__(self) -> str:
        return f"<PresenceList {self._name!r} {list(self)!r}>"
