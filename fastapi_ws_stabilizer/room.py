"""`Room`: the public interface to one room, from `manager.room(name)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi_ws_stabilizer.close_codes import check_close_code
from fastapi_ws_stabilizer.hub.broadcast import BroadcastResult
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.hub.rooms import check_room_name
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.encoded import encode
from fastapi_ws_stabilizer.wrong_names import OF_ROOM, missing


class Room:
    """View of one room by its name.

    A room exists from the first join until the last member leaves. A detached client that can resume its session, or
    reconnect with its token, counts as a member.

    Attributes:
        name: Name of the room.
    """

    __slots__ = ("_get_hub", "_history", "name")

    def __init__(self, name: str, hub: Callable[[], Hub], *, history: bool = True) -> None:
        check_room_name(name)
        self.name: str = name
        self._history = history  # the default for `history` of `send`
        self._get_hub = hub  # a function, because a restarted manager has a new hub

    if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept every name

        def __getattr__(self, name: str) -> Any:
            """Raise for an unknown name, with a hint for names that other libraries use."""
            return missing(self, name, OF_ROOM)

    def __repr__(self) -> str:
        return f"<Room {self.name!r} {len(self)} connections>"

    @property
    def _hub(self) -> Hub:
        return self._get_hub()

    def __len__(self) -> int:
        return self._hub.rooms.count(self.name)

    def __bool__(self) -> bool:
        """Return whether a client is in the room, connected or detached, or is still present there."""
        return self._hub.room_exists(self.name)

    def __contains__(self, item: object) -> bool:
        """Return whether a socket, or any connection or session of a client id, is in the room."""
        if isinstance(item, StableSocket):
            return self._hub.rooms.get(self.name, item.recipient_id) is not None
        return isinstance(item, str) and self._hub.is_in(item, self.name)

    @property
    def members(self) -> list[StableSocket]:
        """The sockets of all members, in the order in which they joined.

        A detached member has its last socket, which is `closed`. `send` still reaches its session.
        """
        return [member.socket for member in self._hub.rooms.members(self.name)]

    @property
    def clients(self) -> list[str]:
        """The ids of the clients in the room, each once: first the present ones, then the detached ones."""
        return self._hub.clients_in(self.name)

    @property
    def presence(self) -> list[Presence]:
        """The present clients, in the order in which they joined.

        A client that lost its connection stays present for `presence_grace`.
        """
        return self._hub.presence.present(self.name)

    def set_presence(self, client_id: str, **metadata: Any) -> bool:
        """Replace the presence metadata of a client; `False` if the client is not present.

        Raises:
            MemoryLimitExceededError: The metadata exceeds a memory limit. The old metadata stays.
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
        """Queue a message for all members of the room, like `manager.broadcast(message, room=name)`.

        Args:
            message: `str`, bytes, or any value that can be encoded as JSON.
            exclude: Clients that do not get the message: a client id, a socket, or several of them.
            coalesce_key: A queued message with an equal key is replaced by this one.
            volatile: Whether the message is only useful now. The server does not store it for detached clients.
            history: Whether the room stores the message for new members (`room_history`). The default is `True`, and
                `False` for the room that `on_join` and `on_leave` hooks get.

        Raises:
            MessageEncodeError: The message cannot be encoded. It was sent to no client.
            TypeError: `exclude` is neither a client id, nor a socket, nor several of them.
        """
        frame = encode(message, coalesce_key, volatile=volatile)
        stored = self._history if history is None else history
        return await self._hub.broadcaster.broadcast(frame, self.name, exclude, history=stored)

    async def remove(self, client_id: str) -> bool:
        """Remove a client from the room, with all its connections and sessions. The connections stay open.

        The client's presence ends immediately. The call does not wait. It is a coroutine because rooms that span
        several processes will have to wait.

        Returns:
            Whether the client was in the room, or still present there.
        """
        return self._hub.remove_client(client_id, self.name)

    async def close(self) -> int:
        """Remove all members from the room, also detached ones, and return their number. Connections stay open.

        After a cancellation, the remaining members are still in the room.
        """
        return await self._hub.empty_room(self.name)

    async def disconnect(self, code: int = 1000, reason: str = "") -> int:
        """Close the connections of all members without waiting for them, and return their number.

        The session or state of a detached member ends. When its client reconnects to it, the server closes the new
        connection with this code.

        After a cancellation, the remaining members are still connected.

        Raises:
            ValueError: `code` cannot be sent.
        """
        check_close_code(code)
        return await self._hub.end_room(self.name, code, reason)
