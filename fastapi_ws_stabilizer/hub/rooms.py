"""Who is in which room: by connection id, never by client id.

Membership only. Nothing here sends, waits or tells; a room is a name that somebody is in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Generic, Protocol, TypeVar

from fastapi_ws_stabilizer.errors import RoomLimitError, RoomNameError
from fastapi_ws_stabilizer.wire.identifiers import NAME_RULE, is_name


class Roomer(Protocol):
    """What can be in a room: something with an id of its own."""

    @property
    def connection_id(self) -> str:
        """The id of this one connection."""


M = TypeVar("M", bound=Roomer)


def check_room_name(name: object) -> None:
    """Raise unless a room can be called so.

    Raises:
        RoomNameError: It is empty, no string, too long, or has a control character.
    """
    if not isinstance(name, str) or not name:
        raise RoomNameError(name, "at least one character")
    if not is_name(name):
        raise RoomNameError(name, NAME_RULE)


class RoomMembership(Generic[M]):
    """The rooms of one manager, and who is in them.

    A room exists as long as somebody is in it, and a connection costs nothing here as long as it is in no room. Whoever
    ends a connection calls `leave_all`, and lets it join nothing afterwards: nobody would take it out again.

    Args:
        max_per_connection: How many rooms one connection may be in; `None` for any number.
    """

    __slots__ = ("_max_per_connection", "_members", "_names")

    def __init__(self, max_per_connection: int | None) -> None:
        self._max_per_connection = max_per_connection
        self._members: dict[str, dict[str, M]] = {}  # room → connection id → member
        self._names: dict[str, dict[str, None]] = {}  # connection id → rooms; a dict keeps the order, a set does not

    def join(self, member: M, name: str) -> bool:
        """Let a connection into a room; `False` if it is in already.

        Raises:
            RoomNameError: No room can be called so.
            RoomLimitError: The connection is in as many rooms as it may be.
        """
        check_room_name(name)
        connection_id = member.connection_id
        names = self._names.get(connection_id, {})
        if name in names:
            return False
        if self._max_per_connection is not None and len(names) >= self._max_per_connection:
            raise RoomLimitError(name, self._max_per_connection)
        names[name] = None
        self._names[connection_id] = names
        self._members.setdefault(name, {})[connection_id] = member
        return True

    def leave(self, member: M, name: str) -> bool:
        """Take a connection out of a room; `False` if it is not in."""
        names = self._names.get(member.connection_id)
        if names is None or name not in names:
            return False
        del names[name]
        if not names:
            del self._names[member.connection_id]
        self._take_out(member.connection_id, name)
        return True

    def leave_all(self, member: M) -> tuple[str, ...]:
        """Take a connection out of all its rooms and return their names, in the order in which it joined them.

        Nothing happens if its place in them was handed over.
        """
        names = self.rooms_of(member)
        if names and self._members[names[0]][member.connection_id] is not member:
            return ()
        self._names.pop(member.connection_id, None)
        for name in names:
            self._take_out(member.connection_id, name)
        return names

    def hand_over(self, member: M, other: M) -> None:
        """Put another member with the same connection id in the place of one, in all its rooms."""
        for name in self.rooms_of(member):
            self._members[name][member.connection_id] = other

    def _take_out(self, connection_id: str, name: str) -> None:
        members = self._members[name]
        del members[connection_id]
        if not members:
            del self._members[name]

    def rooms_of(self, member: M) -> tuple[str, ...]:
        """The rooms of a connection, in the order in which it joined them."""
        return tuple(self._names.get(member.connection_id, ()))

    def get(self, name: str, connection_id: str) -> M | None:
        """The member of a room with that connection id."""
        return self._members.get(name, {}).get(connection_id)

    def members(self, name: str) -> list[M]:
        """The connections in a room, in the order in which they joined it; none if there is no such room."""
        return list(self._members.get(name, {}).values())

    def count(self, name: str) -> int:
        """How many connections are in a room."""
        return len(self._members.get(name, ()))

    def recipients(self, names: str | Iterable[str]) -> Collection[M]:
        """The connections that are in any of these rooms, each once, as they are now.

        Args:
            names: Names of rooms, or the name of one. Rooms that do not exist have nobody in them.
        """
        if isinstance(names, str):  # it is an iterable of strings too, and its letters are no rooms
            return self.members(names)
        rooms = [room for name in names if (room := self._members.get(name)) is not None]
        if len(rooms) == 1:  # the usual case, per message: one copy, and no id is hashed
            return list(rooms[0].values())
        recipients: dict[str, M] = {}
        for room in rooms:
            recipients.update(room)
        return recipients.values()

    def names(self) -> list[str]:
        """The rooms that somebody is in, oldest first."""
        return list(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members
