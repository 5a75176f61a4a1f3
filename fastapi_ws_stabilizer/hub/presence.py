"""Who is in a room, by client: two tabs are one person, and a reload is no departure.

What is true and what was said are kept apart. `enter` and `leave` change what is true, at once. What was said follows:
each room with something to say has one task, which says one thing at a time, always what is true when its turn comes.
So what comes and goes while a hook is slow waits as one entry per client at most, and what has undone itself by then is
never said.
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
"""How many departures, or announcements of one room, are handled before the event loop gets a turn."""

BLOCK: Final = 64
"""People whose states rosters share or renew together."""


@dataclass(frozen=True)
class Presence:
    """One client in one room, as it was when this was made.

    Attributes:
        client_id: The client.
        room: The room.
        metadata: What the client has been described with. For reading: it is the presence's own.
        connections: How many of its connections are in the room; none while it is expected back.
        present_seconds: How long it has been in the room or, once it has left, how long it was.
    """

    client_id: str
    room: str
    metadata: Mapping[str, Any] = field(hash=False)
    connections: int
    present_seconds: float = field(compare=False)


class _State(NamedTuple):
    """One client in one room, as it is until something about it changes. All rosters of that time share it."""

    client_id: str
    metadata: Mapping[str, Any]
    connections: int
    since: float


_States = tuple[tuple[_State, ...], ...]
"""All clients of a room, in parts of `BLOCK`, which rosters of different moments share as long as nothing changes."""


class _Block:
    """Some of the people of a room, and their states if a roster of this moment has asked for them."""

    __slots__ = ("people", "states")

    def __init__(self) -> None:
        self.people: list[_Entry] = []
        self.states: tuple[_State, ...] | None = None


class _RoomPresence:
    """The people of a room, and those of whom something may have to be said, in order."""

    __slots__ = ("announcing", "blocks", "entries", "name", "pending", "states", "unlooked")

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: dict[str, _Entry] = {}
        self.blocks: list[_Block] = []  # the same people
        self.states: _States | None = None
        self.pending: OrderedDict[str, _Entry] = OrderedDict()  # a plain dict is slow to empty from its front
        self.announcing = False
        self.unlooked: list[weakref.ref[PresenceList]] = []  # rosters of the state that is now

    def about_to_change(self, person: _Entry | None = None) -> None:
        """Let those who keep a roster of this moment have it.

        Args:
            person: The person whose state changes; `None` if one arrives.
        """
        for reference in self.unlooked:
            roster = reference()
            if roster is not None:
                roster.take()
        self.unlooked.clear()
        self.states = None
        if person is not None:
            person.state = person.block.states = None

    def add(self, person: _Entry) -> _Block:
        """Put a person at the end of the last block, and return that."""
        self.entries[person.client_id] = person
        if not self.blocks or len(self.blocks[-1].people) >= BLOCK:
            self.blocks.append(_Block())
        block = self.blocks[-1]
        block.people.append(person)
        block.states = None
        return block

    def remove(self, person: _Entry) -> None:
        """Take a person out."""
        del self.entries[person.client_id]
        person.block.people.remove(person)
        if not person.block.people:
            self.blocks.remove(person.block)

    def all_states(self) -> _States:
        """The states of all people at this moment, made if no roster has asked for them since the last change."""
        if self.states is None:
            for block in self.blocks:
                if block.states is None:
                    block.states = tuple(person.snapshot() for person in block.people)
            self.states = tuple(block.states or () for block in self.blocks)
        return self.states


class _Entry:
    """One stay of a client in a room, from its arrival to its departure."""

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
        self.until: float | None = None  # when it had gone
        self.expected_until = 0.0  # until when one of its connections, which broke, may be back
        self.announced = False
        self.state: _State | None = None
        self.block = room.add(self)

    def snapshot(self) -> _State:
        """Its state, the same object until something about it changes."""
        if self.state is None:
            self.state = _State(self.client_id, self.metadata, len(self.connections), self.since)
        return self.state

    def look(self, now: float) -> Presence:
        seconds = (now if self.until is None else self.until) - self.since
        return Presence(self.client_id, self.room.name, self.metadata, len(self.connections), seconds)


class PresenceTracker:
    """Knows who is present, and says who has come and who has gone.

    A client is present from the moment at which the first of its connections enters a room until `grace` seconds after
    the last of them has left it. For each client of a room, `joined` and `left` are called in turn, never twice in a
    row, and within a room never two at a time.

    Args:
        grace: Seconds for which a client whose connections have all left is expected back.
        joined: Called when a client has come. Must not raise, and must end by itself in bounded time.
        left: Called when a client has gone; the same holds.
        wanted: Whether anybody listens, asked at each arrival. A client that has come unsaid goes unsaid.
        tasks: Where the tasks that call `joined` and `left` are made.
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
        # What a room says must not carry the context variables of the one connection that happened to come first.
        self._context = contextvars.copy_context()
        self._rooms: dict[str, _RoomPresence] = {}
        self._graces: OrderedDict[_Entry, float] = OrderedDict()  # all last equally long, so the first ends first
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many rooms there are in which somebody is present or something is still to be said."""
        return len(self._rooms)

    def join(self, room: str, client_id: str, connection_id: str, metadata: Mapping[str, Any] | None) -> None:
        """A connection of a client has come into a room.

        Args:
            room: The room.
            client_id: The client.
            connection_id: Its connection. To enter twice is to enter once.
            metadata: Describes the client from now on, in place of what did so before; `None` changes nothing.
        """
        metadata = None if metadata is None else dict(metadata)
        here = self._rooms.get(room)
        if here is None:
            here = self._rooms[room] = _RoomPresence(room)
        person = here.entries.get(client_id)
        here.about_to_change(person)
        if person is None:
            person = _Entry(here, client_id, metadata or {}, monotonic())
            person.connections.add(connection_id)
            if here.pending.pop(client_id, None) is not None:  # it is back before its departure was said
                person.announced = True
            elif self._wanted():
                self._enqueue_announcement(person)
        else:
            person.connections.add(connection_id)
            person.expected_until = 0.0
            self._graces.pop(person, None)
            if metadata is not None:
                person.metadata = metadata

    def leave(self, room: str, client_id: str, connection_id: str, *, at_once: bool) -> bool:
        """A connection of a client has left a room; `False`, and nothing happens, if it was not in.

        Args:
            room: The room.
            client_id: The client.
            connection_id: Its connection.
            at_once: Whether the client means to leave, so that it is not expected back if this was its last connection.
        """
        person = self._find(room, client_id)
        if person is None or connection_id not in person.connections:
            return False
        person.room.about_to_change(person)
        person.connections.discard(connection_id)
        now = monotonic()
        if not at_once and self._grace > 0:
            person.expected_until = now + self._grace
        elif self._grace <= 0:
            at_once = True
        if person.connections:
            return True
        if at_once and person.expected_until <= now:
            self._depart(person, now)
        else:
            self._graces[person] = now + self._grace
            self._arm()
        return True

    def give_up(self, room: str, client_id: str) -> bool:
        """Expect a client back in a room no more; `False` if it was not expected, or is there."""
        person = self._find(room, client_id)
        if person is None or person.connections:
            return False
        self._graces.pop(person, None)
        self._depart(person, monotonic())
        return True

    def expire_all(self, room: str) -> None:
        """Nobody who has left a room is expected back any more."""
        here = self._rooms.get(room)
        for client_id in list(here.entries) if here is not None else ():
            self.give_up(room, client_id)

    def roster(self, room: str) -> PresenceList:
        """Who is in a room at this moment."""
        roster = PresenceList(room, self._rooms.get(room), monotonic())
        here = self._rooms.get(room)
        if here is not None:
            here.unlooked = [reference for reference in here.unlooked if reference() is not None]
            here.unlooked.append(weakref.ref(roster))
        return roster

    def present(self, room: str) -> list[Presence]:
        """Everybody who is in a room, in order of arrival, those who are expected back included."""
        here = self._rooms.get(room)
        if here is None:
            return []
        now = monotonic()
        return [person.look(now) for person in list(here.entries.values())]  # which another thread may ask for

    def is_present(self, room: str) -> bool:
        """Whether a client is in a room, or expected back there."""
        here = self._rooms.get(room)
        return here is not None and bool(here.entries)

    def rooms(self) -> list[str]:
        """The rooms in which clients are, or are expected back."""
        return [name for name, here in list(self._rooms.items()) if here.entries]  # in other threads too

    def knows(self, room: str, client_id: str) -> bool:
        """Whether a client is in a room, or expected back there."""
        return self._find(room, client_id) is not None

    def connections(self, room: str, client_id: str) -> list[str]:
        """The ids of the connections by which a client is present in a room."""
        person = self._find(room, client_id)
        return [] if person is None else list(person.connections)

    def metadata(self, room: str, client_id: str) -> Mapping[str, Any]:
        """How a client is described in a room."""
        person = self._find(room, client_id)
        return {} if person is None else person.metadata

    def update(self, room: str, client_id: str, metadata: Mapping[str, Any]) -> bool:
        """Describe a client anew; `False` if it is not present. Nothing is announced."""
        person = self._find(room, client_id)
        if person is None:
            return False
        person.room.about_to_change(person)
        person.metadata = dict(metadata)
        return True

    def close(self) -> None:
        """Forget everybody and say nothing more. A call of `joined` or `left` that has begun is left to end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for room in self._rooms.values():
            room.about_to_change()
            room.pending.clear()
        self._rooms.clear()
        self._graces.clear()

    def _find(self, room: str, client_id: str) -> _Entry | None:
        here = self._rooms.get(room)
        return None if here is None else here.entries.get(client_id)

    def _depart(self, person: _Entry, until: float) -> None:
        room = person.room
        room.about_to_change(person)
        room.remove(person)
        person.until = until
        if person.announced:
            self._enqueue_announcement(person)
        else:
            room.pending.pop(person.client_id, None)
            self._forget_if_idle(room)
        if not room.entries:
            self._emptied(room.name)

    def _forget_if_idle(self, room: _RoomPresence) -> None:
        # After close() its name may belong to another room.
        if not (room.entries or room.pending or room.announcing) and self._rooms.get(room.name) is room:
            del self._rooms[room.name]

    # ── graces ──

    def _arm(self) -> None:
        """Set the one timer to the end of the first grace. One that is set already comes no later than that."""
        if self._timer is None and self._graces:
            due = next(iter(self._graces.values()))
            self._timer = asyncio.get_running_loop().call_later(
                max(0.0, due - monotonic()), self._on_timer, context=self._context
            )

    def _on_timer(self) -> None:
        self._timer = None
        now = monotonic()
        for _ in range(AT_ONCE):
            person, due = next(iter(self._graces.items()), (None, now))
            if person is None or due > now:
                break
            del self._graces[person]
            self._depart(person, due)
        self._arm()

    # ── announcements ──

    def _enqueue_announcement(self, person: _Entry) -> None:
        """Put a client whose arrival or departure is not yet said at the end of its room's list."""
        room = person.room
        room.pending[person.client_id] = person
        if not room.announcing:
            self._start_announcer(room)

    def _start_announcer(self, room: _RoomPresence) -> None:
        room.announcing = True  # before the task is made: an eager one begins at once
        task = self._tasks.spawn(self._announce(room), name="ws-presence", context=self._context.copy())
        task.add_done_callback(lambda task: self._announcer_done(room, task), context=self._context.copy())

    def _announcer_done(self, room: _RoomPresence, task: asyncio.Task[None]) -> None:
        room.announcing = False
        if room.pending and not task.cancelled():  # it came after the last look, or a call has raised after all
            self._start_announcer(room)
        else:
            self._forget_if_idle(room)

    async def _announce(self, room: _RoomPresence) -> None:
        """Say what is unsaid in a room, until nothing is.

        Cancelling ends the call that has begun; what is unsaid then waits for the next change in the room.
        """
        said = 0
        while room.pending:
            _, person = room.pending.popitem(last=False)
            if person.until is None:
                person.announced = True  # before the call: who goes while it runs has been said to have come
                await self._joined(person.look(monotonic()))
            else:
                await self._left(person.look(monotonic()))
            said += 1
            if said % AT_ONCE == 0:  # hooks that wait for nothing give no turn
                await asyncio.sleep(0)


class PresenceList(Sequence[Presence]):
    """Who is present in a room, in order of arrival, in the moment in which it was made.

    What it holds it shares with the rosters of other moments, and a `Presence` is made when it is looked at: in a room
    of thousands in which each endpoint keeps its roster, most of them hold the same.
    """

    __slots__ = ("__weakref__", "_moment", "_name", "_room", "_states")

    def __init__(self, name: str, room: _RoomPresence | None, moment: float) -> None:
        self._name = name
        self._room = room  # until its states are taken
        self._moment = moment
        self._states: _States = ()

    def take(self) -> None:
        """Take the states of this moment: they are looked at, or the room is about to change."""
        room, self._room = self._room, None
        if room is not None:
            self._states = room.all_states()

    def _look(self, state: _State) -> Presence:
        seconds = self._moment - state.since
        return Presence(state.client_id, self._name, state.metadata, state.connections, seconds)

    def __len__(self) -> int:
        self.take()
        return sum(len(states) for states in self._states)

    def __iter__(self) -> Iterator[Presence]:
        self.take()
        return map(self._look, itertools.chain.from_iterable(self._states))

    @overload
    def __getitem__(self, index: int) -> Presence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Presence]: ...
    def __getitem__(self, index: int | slice) -> Presence | list[Presence]:
        self.take()
        states = list(itertools.chain.from_iterable(self._states))
        if isinstance(index, slice):
            return [self._look(state) for state in states[index]]
        return self._look(states[index])

    def __repr__(self) -> str:
        return f"<PresenceList {self._name!r} {list(self)!r}>"
