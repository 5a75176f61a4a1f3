"""`stable_socket`, and the lookup of an app's manager."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, WebSocket
from starlette.requests import HTTPConnection

from fastapi_ws_stabilizer.compat.starlette import lifespan_of, lifespan_owners
from fastapi_ws_stabilizer.errors import ManagerNotFoundError
from fastapi_ws_stabilizer.manager import STATE_KEY, WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket


def find_manager(connection: HTTPConnection) -> WebSocketConnectionManager:
    """Return the manager of the app that serves this connection.

    The search starts with the app's state. The second source is the lifespan state of the server, which also reaches
    mounted apps. The last one is the app's lifespan itself, for servers that do not run it.

    Raises:
        ManagerNotFoundError: The app has no manager. The error says how to add one.
    """
    app = connection.scope.get("app")
    manager = _installed_in(app)
    if manager is None:
        state = (connection.scope.get("state") or {}).get(STATE_KEY)
        manager = state if isinstance(state, WebSocketConnectionManager) else _manager_from_lifespan(lifespan_of(app))
    if manager is None:
        raise ManagerNotFoundError
    return manager


def manager_of_app(app: Any) -> WebSocketConnectionManager | None:
    """Return the manager of an app that no server runs; `None` if the app has no visible manager."""
    return _installed_in(app) or _manager_from_lifespan(lifespan_of(app))


def _installed_in(app: Any) -> WebSocketConnectionManager | None:
    """Return the manager in the state of an app."""
    installed = getattr(getattr(app, "state", None), STATE_KEY, None)
    return installed if isinstance(installed, WebSocketConnectionManager) else None


def _manager_from_lifespan(lifespan: Any) -> WebSocketConnectionManager | None:
    """Return the manager whose `lifespan` this is, alone or merged with those of included routers."""
    owners = lifespan_owners(lifespan)
    return next((owner for owner in owners if isinstance(owner, WebSocketConnectionManager)), None)


async def stable_socket(websocket: WebSocket) -> AsyncIterator[StableSocket]:
    """Accept, register and yield a socket, and close it when the endpoint ends. Use it as a dependency.

    The client id is the path parameter `client_id`, else the query parameter of that name, else a new id.

    The client gets 1000 when the endpoint returns, 4000 + the status after an `HTTPException`, 1008 after invalid
    parameters, and 1011 after a bug, which is logged. When the client disconnects, the socket raises `SocketClosed` in
    the endpoint. The server cancels an endpoint that still runs after `disconnect_grace`.

    Raises:
        ManagerNotFoundError: The app has no manager.
    """
    async with find_manager(websocket).serve(websocket) as socket:
        yield socket


StableSocketDep = Annotated[StableSocket, Depends(stable_socket)]
"""Short form of `ws: StableSocket = Depends(stable_socket)` for parameters of endpoints: `ws: StableSocketDep`."""
