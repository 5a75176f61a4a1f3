"""The context manager and the dependencies that turn a WebSocket into a socket and close it at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Annotated, Any

from fastapi import Depends, WebSocket, WebSocketException
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.auth.credentials import HANDSHAKE_SCOPE_KEY
from fastapi_ws_stabilizer.compat.starlette import mark_handled
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.errors import is_bug
from fastapi_ws_stabilizer.handshake.admission import AdmissionController, Handshake
from fastapi_ws_stabilizer.handshake.client_id import (
    Moment,
    client_id_from_identity,
    client_id_from_request,
    seconds_until_expiry,
)
from fastapi_ws_stabilizer.handshake.rejection import REFUSALS
from fastapi_ws_stabilizer.handshake.request import ServeOptions
from fastapi_ws_stabilizer.node import Node
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.handshake import SERVED_KEY

NodeProvider = Callable[[WebSocket], Awaitable[Node]]
"""Function that returns the running node for a handshake, and rejects the handshake if there is none."""


async def reject_handshake(admission: AdmissionController, websocket: WebSocket, error: Exception) -> Exception:
    """Reject a handshake, and mark it and its parents as rejected, so that no other scope rejects it again.

    Returns:
        The exception to raise.
    """
    handshake: Handshake | None = websocket.scope.get(HANDSHAKE_SCOPE_KEY)
    while handshake is not None:
        handshake.rejected = True
        if handshake.admission is admission:
            handshake.reservation.release()  # before the answer, because the client may read it slowly
        handshake = handshake.parent
    return await admission.rejector.reject(websocket, error)


def current_handshake(admission: AdmissionController, websocket: WebSocket) -> Handshake | None:
    """Return the handshake of this WebSocket that an admission controller has admitted; `None` without one."""
    handshake: Handshake | None = websocket.scope.get(HANDSHAKE_SCOPE_KEY)
    while handshake is not None and handshake.admission is not admission:
        handshake = handshake.parent
    return handshake


class HandshakeScope:
    """Async context manager that admits a handshake, and rejects it if its body raises. Nested scopes admit it once.

    It is a class instead of a generator, because each handshake enters one.

    Args:
        node: The node.
        websocket: The WebSocket of the handshake.
    """

    __slots__ = ("_admission", "_handshake", "_outer", "_websocket")

    def __init__(self, node: Node, websocket: WebSocket) -> None:
        self._admission = node.admission
        self._websocket = websocket
        self._outer: Handshake | None = websocket.scope.get(HANDSHAKE_SCOPE_KEY)
        self._handshake: Handshake | None = None  # the handshake that this scope has admitted

    async def __aenter__(self) -> Handshake:
        admission, websocket = self._admission, self._websocket
        if self._outer is not None and (known := current_handshake(admission, websocket)) is not None:
            return known
        try:
            await admission.wait_for_turn()
            handshake = admission.admit(websocket, self._outer)
        except REFUSALS as error:
            if is_bug(error):
                raise
            raise await reject_handshake(admission, websocket, error) from error
        admission.watch()
        self._handshake = websocket.scope[HANDSHAKE_SCOPE_KEY] = handshake
        return handshake

    async def __aexit__(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        handshake = self._handshake
        if handshake is None:
            return
        try:
            if error is not None and not handshake.established:
                await self._reject(handshake, error)
        finally:
            self._websocket.scope[HANDSHAKE_SCOPE_KEY] = self._outer
            if not handshake.established:
                self._admission.forget(handshake)
                handshake.reservation.release()

    async def _reject(self, handshake: Handshake, error: BaseException) -> None:
        """Reject a handshake whose body has raised. Return for an error that goes on."""
        admission, websocket = self._admission, self._websocket
        if isinstance(error, REFUSALS):
            if not is_bug(error) and not handshake.rejected:
                raise await reject_handshake(admission, websocket, error) from error
        elif handshake.endpoint.is_own_cancellation(error):
            if not handshake.abandoned:
                raise await reject_handshake(admission, websocket, admission.stopping()) from error
            await handshake.wait_lost()
            # Starlette sends a close. Before the accept the server silently ignores it, but later it would raise.
            if websocket.application_state is not WebSocketState.CONNECTING:
                mark_handled(websocket)
            raise WebSocketException(1000) from error


class SocketContext:
    """Async context manager that accepts and registers a socket, and closes it at the end.

    Enter and exit it in the task that serves the WebSocket. It is a class instead of a generator to save memory,
    because each open connection holds one.
    """

    __slots__ = ("_arguments", "_connection", "_node")

    _connection: Connection
    _node: Node

    def __init__(
        self,
        node_for: NodeProvider,
        websocket: WebSocket,
        options: ServeOptions,
        subprotocols: tuple[str, ...] = (),
    ) -> None:
        if subprotocols:
            websocket.scope[SERVED_KEY] = subprotocols
        self._arguments: tuple[NodeProvider, WebSocket, ServeOptions] | None = node_for, websocket, options

    async def __aenter__(self) -> StableSocket:
        if self._arguments is None:
            raise RuntimeError("manager.serve() returns a context manager that can be entered only once")
        node_for, websocket, options = self._arguments
        self._arguments = None  # one object less for each open connection
        self._node = await node_for(websocket)
        async with HandshakeScope(self._node, websocket) as handshake:
            if options.client_id is None:
                options = options._replace(client_id=client_id_from_request(websocket))
            self._connection = await self._node.acceptor.accept(handshake, options)
        socket: StableSocket = self._connection.socket
        return socket

    async def __aexit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        return await self._node.closer.exit_endpoint(self._connection, error)


def anonymous_dependency(
    serve: Callable[..., SocketContext], control_frames: bool, subprotocols: tuple[str, ...]
) -> Callable[..., AsyncIterator[StableSocket]]:
    """Create a dependency that takes the client id from the path or the query."""

    async def socket(websocket: WebSocket) -> AsyncIterator[StableSocket]:
        async with serve(websocket, control_frames=control_frames, subprotocols=subprotocols) as socket:
            yield socket

    return socket


def identity_dependency(
    node_for: NodeProvider,
    serve: Callable[..., SocketContext],
    identify: Callable[..., Any],
    key: Callable[[Any], object] | None,
    expires_at: Callable[[Any], Moment] | None,
    control_frames: bool,
    subprotocols: tuple[str, ...],
) -> Callable[..., AsyncIterator[StableSocket]]:
    """Create a dependency that takes the client id from another dependency."""

    async def handshake_guard(websocket: WebSocket) -> AsyncIterator[None]:
        """Admit the handshake before the identity dependency runs, and reject it if that dependency raises."""
        if subprotocols:
            websocket.scope[SERVED_KEY] = subprotocols
        async with HandshakeScope(await node_for(websocket), websocket):
            yield

    async def identified_socket(websocket: WebSocket, _: None, identity: Any) -> AsyncIterator[StableSocket]:
        client_id = client_id_from_identity(identity, key)
        expires_in = None if expires_at is None else seconds_until_expiry(expires_at(identity))
        served = serve(
            websocket,
            client_id,
            identity=identity,
            expires_in=expires_in,
            control_frames=control_frames,
            subprotocols=subprotocols,
        )
        async with served as socket:
            yield socket

    # With `from __future__ import annotations`, FastAPI would resolve `identify` in this module's globals.
    identified_socket.__annotations__ = {
        "websocket": WebSocket,
        "_": Annotated[None, Depends(handshake_guard)],
        "identity": Annotated[Any, Depends(identify)],
    }
    return identified_socket
