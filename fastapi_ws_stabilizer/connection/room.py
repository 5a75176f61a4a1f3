"""`Room`: what user code holds of a room, from `manager.room(name)`."""

from __future__ import annotations

from typing import Any

from fastapi_ws_stabilizer.close_codes import DisconnectReason, check_close_code
from fastapi_ws_stabilizer.connection.lifecycle import Connection
from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.hub.delivery import Delivery
from fastapi_ws_stabilizer.hub.fanout import BroadcastResult
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.hub.rooms import check_room_name
from fastapi_ws_stabilizer.wire.payload import encode


class Room:
    """A name, and whoever is there when you look. It needs no creating, and is gone when the last one leaves.

    Attributes:
        name: Its name.
    """

    __slots__ = ("_delivery", "name")

    def __init__(self, name: str, delivery: Delivery[Connection]) -> None:
        check_room_name(name)
        self.name = name
        self._delivery = delivery

    def __repr__(self) -> str:
        return f"<Room {self.name!r} {len(self)} connections>"

    def __len__(self) -> int:
        return len(self._delivery.rooms.members(self.name))

    def __bool__(self) -> bool:
        return self.name in self._delivery.rooms

    def __contains__(self, whom: object) -> bool:
        """Whether a socket, or a connection of a client id, is in the room now."""
        if isinstance(whom, StableSocket):
            return whom in self.members
        return any(member.client_id == whom for member in self._delivery.rooms.members(self.name))

    @property
    def members(self) -> list[StableSocket]:
        """The connections in the room, in the order in which they joined."""
        return [member.face for member in self._delivery.rooms.members(self.name)]

    @property
    def clients(self) -> list[str]:
        """The ids of the clients that are present, each once."""
        return [who.client_id for who in self.presence]

    @property
    def presence(self) -> list[Presence]:
        """Who is present, by client, in order of arrival.

        A client whose connection broke is so until `presence_grace` has passed.
        """
        return self._delivery.presence.present(self.name)

    def describe(self, client_id: str, **metadata: Any) -> bool:
        """Replace the presence metadata of a client; `False` if it is not here."""
        return self._delivery.presence.update(self.name, client_id, metadata)

    async def send(self, message: Any, *, exclude: Any = None, coalesce_key: Any = None) -> BroadcastResult:
        """Queue a message for everybody in the room. As `manager.broadcast(message, room=name)`."""
        excluded = self._delivery.connections_of(exclude)
        return await self._delivery.broadcast(encode(message, coalesce_key), self.name, excluded)

    def close(self) -> int:
        """Let everybody leave the room; connections stay open. Return how many connections were in it."""
        members = self._delivery.rooms.members(self.name)
        for member in members:
            self._delivery.leave(member, self.name)
        return len(members)

    def disconnect(self, code: int = 1000, reason: str = "") -> int:
        """Close the connections of everybody in the room, and return how many. Waits for none of them.

        Raises:
            ValueError: `code` cannot be sent.
        """
        check_close_code(code)
        members = self._delivery.rooms.members(self.name)
        return sum(member.end(DisconnectReason.APPLICATION, code=code, text=reason) for member in members)
