"""From a WebSocket to a socket and back: what the dependencies are made of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Annotated, Any, Protocol

from fastapi import Depends, HTTPException, WebSocket

from fastapi_ws_stabilizer.connection.lifecycle import Connection
from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.errors import ShutdownError
from fastapi_ws_stabilizer.routing.identity import client_id_from, client_id_of
from fastapi_ws_stabilizer.routing.serving import Serving


class Manager(Protocol):
    """What it needs of a manager."""

    def _ensure_running(self) -> Serving:
        """Get ready for connections on the running event loop."""


class Served:
    """Accepts, registers and gives a socket, and closes it at the end. Entered and left in the task that serves it.

    A class and not a generator, because each open connection holds one.
    """

    __slots__ = ("_connection", "_manager", "_opening", "_serving")

    _connection: Connection
    _serving: Serving

    def __init__(
        self, manager: Manager, websocket: WebSocket, client_id: str | None, *, identity: Any, control_frames: bool
    ) -> None:
        self._manager = manager
        self._opening: tuple[WebSocket, str | None, Any, bool] | None = (websocket, client_id, identity, control_frames)

    async def __aenter__(self) -> StableSocket:
        if self._opening is None:
            raise RuntimeError("what manager.serve() returns can be entered once")
        websocket, client_id, identity, control_frames = self._opening
        self._opening = None
        try:
            self._serving = self._manager._ensure_running()
            self._connection = await self._serving.open_by_dependency(
                websocket,
                client_id_of(websocket) if client_id is None else client_id,
                identity=identity,
                control_frames=control_frames,
            )
        except ShutdownError as error:
            raise HTTPException(503, headers={"Retry-After": "1"}) from error
        socket: StableSocket = self._connection.face
        return socket

    async def __aexit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        failure = await self._serving.leave(self._connection, error)
        if failure is None:
            return True
        if failure is error:
            return False
        raise failure from error


class Serve(Protocol):
    """`manager.serve`."""

    def __call__(
        self, websocket: WebSocket, client_id: str | None = None, *, identity: Any = None, control_frames: bool = True
    ) -> Served:
        """Serve a WebSocket."""


def identified(
    serve: Serve, identify: Callable[..., Any], key: Callable[[Any], object] | None, control_frames: bool
) -> Callable[..., AsyncIterator[StableSocket]]:
    """Make a dependency that takes the client id from another one."""

    async def identified_socket(
        websocket: WebSocket, identity: Annotated[Any, Depends(identify)]
    ) -> AsyncIterator[StableSocket]:
        client_id = client_id_from(identity, key)
        async with serve(websocket, client_id, identity=identity, control_frames=control_frames) as socket:
            yield socket

    # Under `from __future__ import annotations` FastAPI would look for `identify` among this module's names.
    identified_socket.__annotations__ = {"websocket": WebSocket, "identity": Annotated[Any, Depends(identify)]}
    return identified_socket
