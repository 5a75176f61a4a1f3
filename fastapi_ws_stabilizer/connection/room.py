"""`Room`: what user code holds of a room, from `manager.room(name)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi_ws_stabilizer.close_codes import check_close_code
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

    __slots__ = ("_delivery_now", "name")

    def __init__(self, name: str, delivery: Callable[[], Delivery[Connection]]) -> None:
        check_room_name(name)
        self.name = name
        self._delivery_now = delivery  # not the delivery: a manager that is started anew has another one

    def __repr__(self) -> str:
        return f"<Room {self.name!r} {len(self)} connections>"

    @property
    def _delivery(self) -> Delivery[Connection]:
        return self._delivery_now()

    def __len__(self) -> int:
        return self._delivery.rooms.count(self.name)

    def __bool__(self) -> bool:
        return self.name in self._delivery.rooms

    def __contains__(self, whom: object) -> bool:
        """Whether a socket, or a connection of a client id, is in the room now."""
        delivery = self._delivery
        if isinstance(whom, StableSocket):
            return self.name in delivery.rooms.of(whom._connection.member)
        connections = delivery.registry.of_client(whom) if isinstance(whom, str) else ()
        return any(self.name in delivery.rooms.of(connection.member) for connection in connections)

    @property
    def members(self) -> list[StableSocket]:
        """The connections in the room, in the order in which they joined. Who is away is in it, and is not here."""
        return [member.face for member in self._delivery.rooms.members(self.name) if member.here]

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
        """Replace the presence metadata of a client; `False` if it is not here.

        Raises:
            MemoryLimitExceededError: It is more than may be held for the client. What was there stays.
        """
        self._delivery.check_loop()
        return self._delivery.describe(client_id, self.name, metadata)

    async def send(
        self, message: Any, *, exclude: Any = None, coalesce_key: Any = None, volatile: bool = False
    ) -> BroadcastResult:
        """Queue a message for everybody in the room. As `manager.broadcast(message, room=name)`.

        Slow clients never make it raise.
        """
        return await self._delivery.broadcast(encode(message, coalesce_key, volatile=volatile), self.name, exclude)

    async def close(self) -> int:
        """Let everybody leave the room; connections stay open. Return how many connections were in it.

        Cancelling leaves the others in.
        """
        return await self._delivery.empty_room(self.name)

    async def disconnect(self, code: int = 1000, reason: str = "") -> int:
        """Close the connections of everybody in the room, and return how many. Waits for none of them.

        Cancelling leaves the others connected.

        Raises:
            ValueError: `code` cannot be sent.
        """
        check_close_code(code)
        return await self._delivery.end_room(self.name, code, reason)
