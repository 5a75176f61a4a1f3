"""`stable_socket`, and how the manager of an app is found."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, WebSocket
from starlette.requests import HTTPConnection

from fastapi_ws_stabilizer.compat.starlette import lifespan_owners
from fastapi_ws_stabilizer.errors import ManagerNotFoundError
from fastapi_ws_stabilizer.manager import STATE_KEY, WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket


def find_manager(connection: HTTPConnection) -> WebSocketConnectionManager:
    """The manager of the app that serves this connection.

    It is looked for in the app's state; in the state that the server hands down from the lifespan, which reaches
    mounted apps too; and in the app's lifespan itself, if the server has not run it.

    Raises:
        ManagerNotFoundError: There is none. The error says how to add one.
    """
    app = connection.scope.get("app")
    for found in (
        getattr(getattr(app, "state", None), STATE_KEY, None),
        (connection.scope.get("state") or {}).get(STATE_KEY),
        _manager_from_lifespan(getattr(getattr(app, "router", None), "lifespan_context", None)),
    ):
        if isinstance(found, WebSocketConnectionManager):
            return found
    raise ManagerNotFoundError


def manager_of_app(app: Any) -> WebSocketConnectionManager | None:
    """The manager of an app that nothing runs; `None` if the app does not show one."""
    installed = getattr(getattr(app, "state", None), STATE_KEY, None)
    if isinstance(installed, WebSocketConnectionManager):
        return installed
    return _manager_from_lifespan(getattr(getattr(app, "router", None), "lifespan_context", None))


def _manager_from_lifespan(lifespan: Any) -> WebSocketConnectionManager | None:
    """Return the manager whose `lifespan` this is, alone or merged with those of included routers."""
    owners = lifespan_owners(lifespan)
    return next((owner for owner in owners if isinstance(owner, WebSocketConnectionManager)), None)


async def stable_socket(websocket: WebSocket) -> AsyncIterator[StableSocket]:
    """The dependency that accepts, registers and yields a socket, and closes it when the endpoint ends.

    The client id is the path parameter `client_id`, else the query parameter of that name, else a fresh id.

    When the endpoint returns the client gets 1000, after an `HTTPException` 4000 + its status, after invalid parameters
    1008, after a bug 1011 (and the bug is logged). When the client leaves, the endpoint gets `SocketClosed` from the
    socket, and is cancelled if it is still at work after `disconnect_grace`.

    Raises:
        ManagerNotFoundError: No manager belongs to the app.
    """
    async with find_manager(websocket).serve(websocket) as socket:
        yield socket


StableSocketDep = Annotated[StableSocket, Depends(stable_socket)]
"""`ws: StableSocketDep` in an endpoint's parameters is short for `ws: StableSocket = Depends(stable_socket)`."""
