"""Who a connection belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

from fastapi import WebSocket


def client_id_of(websocket: WebSocket) -> str | None:
    """The path parameter `client_id`, else the query parameter; `None` if there is neither."""
    given = websocket.path_params.get("client_id")
    if given is None:
        given = websocket.query_params.get("client_id")
    return str(given) if given not in (None, "") else None


def fresh_client_id() -> str:
    """An id for a client that has not said who it is."""
    return uuid4().hex


def client_id_from(identity: Any, key: Callable[[Any], object] | None) -> str:
    """The client id that stands for what an identity dependency returned.

    Raises:
        TypeError: There is no telling; the error says how to.
    """
    chosen = identity if key is None else key(identity)
    if isinstance(chosen, (str, int, UUID)) and not isinstance(chosen, bool) and str(chosen):
        return str(chosen)
    if key is None:
        raise TypeError(
            f"a {type(identity).__name__} is no client id: say which part of it is one, "
            "manager.socket_for(identify, key=lambda identity: identity.id)"
        )
    raise TypeError(
        f"the key of manager.socket_for gave {chosen!r}, and a client id is a str, int or UUID that says something"
    )
