"""`Room`: what user code holds of a room, from `manager.room(name)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi_ws_stabilizer.close_codes import check_close_code
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.hub.broadcast import BroadcastResult
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.hub.rooms import check_room_name
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.encoded import encode
from fastapi_ws_stabilizer.wrong_names import OF_ROOM, missing


class Room:
    """A name, and the clients that are there when you look. It needs no creating, and ends when the last one leaves.

    A client that is away, and may come back to its session or with its reconnect token, is in the room as others are.

    Attributes:
        name: Its name.
    """

    __slots__ = ("_delivery_now", "_history", "name")

    def __init__(self, name: str, hub: Callable[[], Hub[Connection]], *, history: bool = True) -> None:
        check_room_name(name)
        self.name: str = name
        self._history = history  # whether what is sent by this object is remembered where the call does not say
        self._delivery_now = hub  # not the delivery: a manager that is started anew has another one

    if not TYPE_CHECKING:  # a type checker would take every name for one that is there

        def __getattr__(self, name: str) -> Any:
            """Say what to write instead of a name that it does not have."""
            return missing(self, name, OF_ROOM)

    def __repr__(self) -> str:
        return f"<Room {self.name!r} {len(self)} connections>"

    @property
    def _hub(self) -> Hub[Connection]:
        return self._delivery_now()

    def __len__(self) -> int:
        return self._hub.rooms.count(self.name)

    def __bool__(self) -> bool:
        """Whether a client is in the room, is away, or is expected back there."""
        return self._hub.room_exists(self.name)

    def __contains__(self, whom: object) -> bool:
        """Whether a socket, or a client id with any of its connections, is in the room now, present or away."""
        if isinstance(whom, StableSocket):
            return self.name in self._hub.rooms.rooms_of(whom._connection.recipient)
        return isinstance(whom, str) and self._hub.is_in(whom, self.name)

    @property
    def members(self) -> list[StableSocket]:
        """The sockets of all members, in the order in which they joined.

        The socket of a member that is away is its last one, and is `closed`. `send` reaches its session all the same.
        """
        return [member.socket for member in self._hub.rooms.members(self.name)]

    @property
    def clients(self) -> list[str]:
        """The ids of the clients in the room, each once: those that are present, then those that are away."""
        return self._hub.clients_in(self.name)

    @property
    def presence(self) -> list[Presence]:
        """Who is present, by client, in order of arrival.

        A client whose connection broke is so until `presence_grace` has passed.
        """
        return self._hub.presence.present(self.name)

    def set_presence(self, client_id: str, **metadata: Any) -> bool:
        """Replace the presence metadata of a client; `False` if it is not here.

        Raises:
            MemoryLimitExceededError: It is more than may be held for the client. What was there stays.
        """
        self._hub.check_loop()
        return self._hub.describe(client_id, self.name, metadata)

    async def send(
        self,
        message: Any,
        *,
        exclude: Any = None,
        coalesce_key: Any = None,
        volatile: bool = False,
        history: bool | None = None,
    ) -> BroadcastResult:
        """Queue a message for all members of the room. As `manager.broadcast(message, room=name)`.

        Args:
            message: `str`, bytes, or anything that can be JSON.
            exclude: Who does not get it: a client id, a socket, or several of them.
            coalesce_key: If a message with an equal key still waits to be sent to a client, this one takes its place.
            volatile: Whether it is worth nothing later: it is not kept for clients that are away.
            history: Whether the room remembers it for newcomers (`room_history`). When left out it does, except for
                what `on_join` and `on_leave` send with the room that they are given.
        """
        frame = encode(message, coalesce_key, volatile=volatile)
        kept = self._history if history is None else history
        return await self._hub.broadcast(frame, self.name, exclude, history=kept)

    async def remove(self, client_id: str) -> bool:
        """Take a client out of the room, with all its connections, present or away. They stay open.

        Its presence ends at once. Needs no waiting: it is awaitable so that it can become so where rooms span several
        processes.

        Returns:
            Whether it was in the room, or expected back there.
        """
        return self._hub.remove_client(client_id, self.name)

    async def close(self) -> int:
        """Take all members out of the room, those that are away too; connections stay open. Return how many there were.

        Cancelling leaves the others in.
        """
        return await self._hub.empty_room(self.name)

    async def disconnect(self, code: int = 1000, reason: str = "") -> int:
        """Close the connections of all members, and return how many there were. Waits for none of them.

        What is kept of a member that is away ends, and its client is closed with this code when it comes back.

        Cancelling leaves the others connected.

        Raises:
            ValueError: `code` cannot be sent.
        """
        check_close_code(code)
        return await self._hub.end_room(self.name, code, reason)
