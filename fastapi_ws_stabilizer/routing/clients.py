"""What an application does with its clients, by client id: send, look, keep something for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi_ws_stabilizer.connection.room import Room
from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.errors import (
    ConnectionNotFoundError,
    MemoryLimitExceededError,
)
from fastapi_ws_stabilizer.hub.fanout import BroadcastResult
from fastapi_ws_stabilizer.routing.serving import Node
from fastapi_ws_stabilizer.wire.payload import encode


class Clients:
    """The part of a manager that reaches those who are connected."""

    _node: Node

    # ── sending ──

    async def send_to_client(
        self, client_id: str, message: Any, *, coalesce_key: Any = None, volatile: bool = False
    ) -> bool:
        """Queue a message for a client, for all its connections; `False` if it was queued for none. Waits for nobody.

        Args:
            client_id: Who gets it.
            message: `str`, bytes, or anything that can be JSON.
            coalesce_key: If a message with an equal key still waits to be sent, this one takes its place.
            volatile: Whether it is worth nothing later: it is not kept if the client is away.

        Raises:
            MessageEncodeError: The message cannot be encoded.
        """
        return await self._node.hub.send_to_client(client_id, encode(message, coalesce_key, volatile=volatile))

    async def broadcast(
        self,
        message: Any,
        exclude_client: str | None = None,
        *,
        room: str | Iterable[str] | None = None,
        exclude: Any = None,
        coalesce_key: Any = None,
        volatile: bool = False,
        history: bool = True,
    ) -> BroadcastResult:
        """Queue a message for all connections, or for those in a room. It is encoded once, and no client is waited for.

        Slow clients never make it raise, not even if all recipients are: the result counts them. Call
        `raise_for_failure()` on the result where the caller wants an exception.

        Args:
            message: `str`, bytes, or anything that can be JSON.
            exclude_client: A client id that does not get it.
            room: The name of a room, or of several; who is in more than one gets it once.
            exclude: Who else does not get it: a client id, a socket, or several of them.
            coalesce_key: If a message with an equal key still waits to be sent to a client, this one takes its place.
            volatile: Whether it is worth nothing later: it is not kept for clients that are away.
            history: Whether the rooms remember it for newcomers, as far as `room_history` says.

        Raises:
            MessageEncodeError: The message cannot be encoded; no client got anything.
            TypeError: `exclude` is neither a client id, nor a socket, nor several of them.
        """
        frame = encode(message, coalesce_key, volatile=volatile)
        if exclude_client is not None:
            exclude = exclude_client if exclude is None else (exclude_client, exclude)
        return await self._node.hub.broadcast(frame, room, exclude, history=history)

    def room(self, name: str) -> Room:
        """A room: who is in it, to send to it, to close it. It need not exist.

        Raises:
            ValueError: The name is empty.
        """
        return Room(name, lambda: self._node.hub)

    def get_rooms(self) -> list[str]:
        """The names of the rooms that exist: a client is in them, is away, or is expected back there."""
        return self._node.hub.room_names()

    # ── looking ──

    def get_active_connections(self) -> list[str]:
        """The ids of the connected clients, each once, in the order in which they came."""
        return self._node.registry.client_ids()

    def get_connection_count(self) -> int:
        """How many connections are open; one client can have several."""
        return len(self._node.registry)

    def get_sockets(self, client_id: str | None = None) -> list[StableSocket]:
        """The open connections, or those of one client, oldest first."""
        registry = self._node.registry
        return [connection.socket for connection in (registry if client_id is None else registry.of_client(client_id))]

    def get_socket(self, connection_id: str) -> StableSocket | None:
        """The open connection with that connection id."""
        connection = self._node.registry.get(connection_id)
        return None if connection is None else connection.socket

    def get_session_counts(self) -> dict[str, int]:
        """How many `sessions` of `stabilizer.v1.json` clients there are, and how many of them wait: `away`."""
        sessions = self._node.sessions
        return {"sessions": len(sessions), "away": sessions.detached_count}

    def get_memory_usage(self) -> dict[str, int | float]:
        """What is held for connections and sessions: queued, unread and unacknowledged messages, user data, in bytes.

        A message that many hold counts once. It is a running sum, so asking costs nothing.

        Returns:
            `total_memory`, `connection_count` and `per_connection_average`.
        """
        total, count = self._node.budget.total, self.get_connection_count()
        return {
            "total_memory": total,
            "connection_count": count,
            "per_connection_average": total / count if count else 0.0,
        }

    # ── user data by client id ──

    async def set_user_data(self, client_id: str, key: str, value: Any) -> None:
        """Set one entry of `ws.user_data`, on all connections of a client.

        Raises:
            ConnectionNotFoundError: No such client is connected.
            MemoryLimitExceededError: That would be more than may be kept. What was there stays, on each of them.
        """
        self._node.hub.check_loop()
        connections = self._node.resolve(client_id)
        if not connections:
            raise ConnectionNotFoundError(client_id)
        written: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            for connection in connections:
                data = connection.socket.user_data
                before = {key: data[key]} if key in data else {}
                data[key] = value
                written.append((data, before))
        except MemoryLimitExceededError:
            for changed, was in written:
                changed.update(was)
                if not was:
                    del changed[key]
            raise

    async def get_user_data(self, client_id: str, key: str) -> Any | None:
        """One entry of a client's `ws.user_data`; `None` if there is no such entry or client."""
        self._node.hub.check_loop()
        for connection in self._node.resolve(client_id):
            if key in connection.socket.user_data:
                return connection.socket.user_data[key]
        return None
