"""Room membership by connection id.

This module only stores membership and sends nothing. A room is a name with at least one member.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Generic, Protocol, TypeVar

from fastapi_ws_stabilizer.errors import RoomLimitError, RoomNameError
from fastapi_ws_stabilizer.wire.identifiers import NAME_RULE, is_name


class RoomMember(Protocol):
    """Object with a connection id, which can be in rooms."""

    @property
    def connection_id(self) -> str:
        """Id of this connection."""


M = TypeVar("M", bound=RoomMember)


def check_room_name(name: object) -> None:
    """Raise unless a room name is valid.

    Raises:
        RoomNameError: The name is empty, not a string, too long, or has a control character.
    """
    if not isinstance(name, str) or not name:
        raise RoomNameError(name, "at least one character")
    if not is_name(name):
        raise RoomNameError(name, NAME_RULE)


class RoomMembership(Generic[M]):
    """Rooms of one manager and their members.

    A room exists while it has members. A connection in no room costs nothing here. Code that closes a connection calls
    `leave_all` and must let it join no room afterwards, because nothing would remove it again.

    Args:
        max_per_connection: Maximum number of rooms of one connection; `None` for no limit.
    """

    __slots__ = ("_max_per_connection", "_members", "_names")

    def __init__(self, max_per_connection: int | None) -> None:
        self._max_per_connection = max_per_connection
        self._members: dict[str, dict[str, M]] = {}  # room → connection id → member
        self._names: dict[str, dict[str, None]] = {}  # connection id → rooms; unlike a set, a dict is ordered

    def join(self, member: M, name: str) -> bool:
        """Add a connection to a room; `False` if it is in the room already.

        Raises:
            RoomNameError: The name is invalid.
            RoomLimitError: The connection is in `max_per_connection` rooms.
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
        """Remove a connection from a room; `False` if it is not in the room."""
        names = self._names.get(member.connection_id)
        if names is None or name not in names:
            return False
        del names[name]
        if not names:
            del self._names[member.connection_id]
        self._take_out(member.connection_id, name)
        return True

    def leave_all(self, member: M) -> tuple[str, ...]:
        """Remove a connection from all its rooms and return their names in the order of joining.

        Does nothing if its membership was handed over.
        """
        names = self.rooms_of(member)
        if names and self._members[names[0]][member.connection_id] is not member:
            return ()
        self._names.pop(member.connection_id, None)
        for name in names:
            self._take_out(member.connection_id, name)
        return names

    def hand_over(self, member: M, other: M) -> None:
        """Replace a member by another one with the same connection id, in all its rooms."""
        for name in self.rooms_of(member):
            self._members[name][member.connection_id] = other

    def _take_out(self, connection_id: str, name: str) -> None:
        members = self._members[name]
        del members[connection_id]
        if not members:
            del self._members[name]

    def rooms_of(self, member: M) -> tuple[str, ...]:
        """Return the rooms of a connection, in the order of joining."""
        return tuple(self._names.get(member.connection_id, ()))

    def get(self, name: str, connection_id: str) -> M | None:
        """Return the member of a room with that connection id."""
        return self._members.get(name, {}).get(connection_id)

    def members(self, name: str) -> list[M]:
        """Return the members of a room in the order of joining; empty if there is no such room."""
        return list(self._members.get(name, {}).values())

    def count(self, name: str) -> int:
        """Return the number of members of a room."""
        return len(self._members.get(name, ()))

    def recipients(self, names: str | Iterable[str]) -> Collection[M]:
        """Return the current members of any of these rooms, each once.

        Args:
            names: Name or names of rooms. A room that does not exist has no members.
        """
        if isinstance(names, str):  # a string is an iterable of strings too, but its letters are not rooms
            return self.members(names)
        rooms = [room for name in names if (room := self._members.get(name)) is not None]
        if len(rooms) == 1:  # the usual case for each message: one copy, and no id is hashed
            return list(rooms[0].values())
        recipients: dict[str, M] = {}
        for room in rooms:
            recipients.update(room)
        return recipients.values()

    def names(self) -> list[str]:
        """Return the rooms with members, oldest first."""
        return list(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members
