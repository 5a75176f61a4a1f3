"""Hints for names that this library does not have, but that other libraries use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final


def _by_name(*rows: tuple[str, str]) -> dict[str, str]:
    return {name: hint for names, hint in rows for name in names.split()}


_ACCEPT: Final = (
    "the dependency accepts the WebSocket: write `ws: StableSocketDep` in the parameters of the endpoint. Pass a "
    "WebSocket that you have accepted yourself to `await manager.connect(client_id, websocket)`"
)
_SEND: Final = "write `await manager.send_to_client(client_id, message)`"
_TO_ROOM: Final = "write `await manager.broadcast(message, room=...)`"
_TO_ALL: Final = "write `await manager.broadcast(message)`"
_HOOKS: Final = "write @manager.on_connect, @manager.on_disconnect or @manager.on_message(...) above a function"

OF_MANAGER: Final[Mapping[str, str]] = _by_name(
    (
        "accept",
        _ACCEPT,
    ),
    (
        "connections active_connections sockets websockets",
        "`manager.get_sockets()` returns the sockets, and `manager.get_active_connections()` the client ids",
    ),
    ("clients users client_ids get_clients", "`manager.get_active_connections()` returns the client ids"),
    ("connection_count count", "write `manager.get_connection_count()`"),
    ("is_connected connected has_client", "write `bool(manager.get_sockets(client_id))`"),
    (
        "get_client get_connection get_connections",
        "write `manager.get_sockets(client_id)`, or `manager.get_socket(connection_id)` for one connection",
    ),
    ("rooms", "`manager.get_rooms()` returns the names of the rooms, and `manager.room(name)` returns one room"),
    ("get_room", "write `manager.room(name)`"),
    ("join join_room enter_room add_to_room subscribe", "a socket joins a room: write `await ws.join(room)`"),
    ("leave leave_room remove_from_room unsubscribe", "a socket leaves a room: write `await ws.leave(room)`"),
    ("close_room", "write `await manager.room(name).close()`"),
    (
        "kick ban remove close_client disconnect_client close_connection",
        "write `await manager.disconnect(client_id, code, reason)`",
    ),
    (
        "send send_to send_message send_personal_message send_text send_json send_bytes send_to_user unicast",
        _SEND,
    ),
    ("broadcast_to_room broadcast_room send_to_room room_broadcast broadcast_to to in_", _TO_ROOM),
    ("broadcast_json broadcast_text broadcast_bytes send_all", _TO_ALL),
    ("emit publish", "write `await manager.broadcast(message, room=...)`, or `manager.send_to_client(...)`"),
    ("close aclose shutdown stop", "write `await manager.graceful_shutdown()`; `manager.lifespan` calls it for you"),
    ("on event on_event on_open on_close on_receive handler", _HOOKS),
    ("message", "write @manager.on_message(...) above a function"),
    ("websocket route", "write @app.websocket(path) above an endpoint with `ws: StableSocketDep`"),
    ("dependency depends", "write `Depends(manager.socket)`"),
    ("init_app setup", "write `manager.install(app)`"),
    ("stats metrics get_stats", "read `manager.counters`, or include `stats_router`, which serves them"),
    ("user_data", "write `ws.user_data`, or `await manager.get_user_data(client_id, key)`"),
)
"""Hints for names that a manager does not have."""

OF_SOCKET: Final[Mapping[str, str]] = _by_name(
    ("accept", "the socket is accepted before your endpoint begins: delete the call"),
    ("receive_message recv read get_message next", "write `await ws.receive()`, or `async for message in ws:`"),
    ("iter_messages messages", "write `async for message in ws:`"),
    ("emit write send_message send_str send_dict reply", "write `await ws.send(message)`"),
    ("broadcast publish", "write `await manager.broadcast(message, room=...)`"),
    ("join_room enter_room subscribe", "write `await ws.join(room)`"),
    ("leave_room unsubscribe", "write `await ws.leave(room)`"),
    ("room", "`ws.rooms` has the names of its rooms, and `manager.room(name)` returns one room"),
    ("kick disconnect abort terminate end", "write `await ws.close(code, reason)`"),
    ("id sid socket_id uid uuid", "`ws.connection_id` identifies this connection, and `ws.client_id` its client"),
    (
        "user user_id current_user username",
        "`ws.identity` is the return value of the dependency of manager.socket_for(...)",
    ),
    ("data session context store extra", "write `ws.user_data`, a dict"),
    ("client_state application_state connected is_connected open is_open", "write `not ws.closed`"),
    ("is_closed", "write `ws.closed`"),
    ("close_code close_reason", "`ws.close_info` has `code` and `reason`; it is None while the connection is open"),
    ("ping pong", "the heartbeat sends the pings; `ws.rtt` is the last round trip"),
    ("latency", "write `ws.rtt`"),
    ("on on_message", "write @manager.on_message(...) above a function, and `await ws.run()` in the endpoint"),
    ("on_disconnect on_close", "write @manager.on_disconnect above a function"),
    ("remote_address ip host peer remote_addr", "write `ws.address`"),
    ("path", "write `ws.url.path`"),
    ("query", "write `ws.query_params`"),
    ("params", "write `ws.path_params` or `ws.query_params`"),
    ("spawn add_task background background_tasks", "write `ws.create_task(...)`"),
    ("wait wait_for_close", "write `await ws.wait_closed()`"),
    ("manager", "use the WebSocketConnectionManager that your module has created"),
)
"""Hints for names that a socket does not have."""

OF_ROOM: Final[Mapping[str, str]] = _by_name(
    ("broadcast emit publish send_json send_text send_bytes send_to_all", "write `await room.send(message)`"),
    ("join add enter", "a socket joins a room: write `await ws.join(room.name)`"),
    ("leave", "a socket leaves a room: write `await ws.leave(room.name)`"),
    ("kick", "write `await room.disconnect()` for all, or `await manager.disconnect(client_id)` for one"),
    ("sockets connections", "`room.members` has the sockets, and `room.clients` the client ids"),
    ("users client_ids", "write `room.clients`"),
    ("id", "write `room.name`"),
)
"""Hints for names that a room does not have."""


def missing(owner: Any, name: str, table: Mapping[str, str]) -> Any:
    """Raise an `AttributeError` for an unknown name, with a hint if the table has one.

    Python calls `__getattr__` for unknown names, and for a property that raised an `AttributeError`. Reading the
    attribute again raises that error again.

    Raises:
        AttributeError: Always.
    """
    if name in table:
        raise AttributeError(f"{type(owner).__name__} has no {name!r}: {table[name]}")
    return object.__getattribute__(owner, name)
