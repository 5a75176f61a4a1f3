"""Private parts of Starlette, and of the server behind its `WebSocket`, that the package relies on.

Supported: Starlette 0.37.2 and newer; uvicorn 0.30 and newer with each of its WebSocket protocols; hypercorn 0.17 and
newer. Each function names its fallback: what is missing on a version, or behind a server, that does not have the part.
`tests/unit/compat/test_starlette.py` runs on the lowest and on the newest version of Starlette and uvicorn, and
`tests/live` runs hypercorn.

`StableWebSocketProtocol` uses more of uvicorn: see `servers/uvicorn/compat.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketState

_MAX_WRAPPERS: Final = 8
"""Maximum number of closures around the server's `send` that are unwrapped."""

_MAX_LIFESPANS: Final = 32
"""Maximum number of merged lifespans that are searched for a manager's."""

_MAX_MIDDLEWARE: Final = 32
"""Maximum number of middleware layers around a mounted app that are unwrapped."""

_UNKNOWN: Final = object()


def asgi_callables(websocket: WebSocket) -> tuple[Any, Any]:
    """Return the ASGI `receive` and `send` of a `WebSocket`, which have no public name.

    There is no fallback, because no connection can be served without them: the first handshake raises.

    Raises:
        AttributeError: This version of Starlette stores them under other names.
    """
    return websocket._receive, websocket._send


def install_asgi_shim(websocket: WebSocket, receive: Any, send: Any) -> None:
    """Replace the ASGI `receive` and `send` of a `WebSocket`, so that code which uses it goes through a connection.

    There is no fallback: `asgi_callables` has raised before on a version that stores them under other names.
    """
    websocket._receive = receive
    websocket._send = send


def mark_handled(websocket: WebSocket) -> None:
    """Stop Starlette from sending on an answered `WebSocket`. It would close it again on a `WebSocketException`."""

    async def nothing(_: object) -> None:
        pass

    websocket._send = nothing
    mark_open(websocket)


def mark_open(websocket: WebSocket) -> None:
    """Set `application_state` to CONNECTED. Starlette raises if it closes a closed `WebSocket`."""
    websocket.application_state = WebSocketState.CONNECTED


def mark_disconnected(websocket: WebSocket) -> None:
    """Set `client_state` to DISCONNECTED, so that Starlette reports the disconnect."""
    websocket.client_state = WebSocketState.DISCONNECTED


def unwrap_send(send: Any, *, only_starlettes: bool = False) -> Any:
    """Return the server's `send` inside the closures that Starlette's exception middleware puts around it.

    Starlette's closures pass every WebSocket message on unchanged, so they can be skipped. Fallback: `send` itself. It
    does not expose the transport, so a connection is closed instead of aborted.

    Args:
        send: The `send` that the application got.
        only_starlettes: Whether to stop at a closure that is not Starlette's.
    """
    for _ in range(_MAX_WRAPPERS):
        if only_starlettes and getattr(send, "__module__", None) != "starlette._exception_handler":
            break
        names = getattr(getattr(send, "__code__", None), "co_freevars", ())
        if "send" not in names or hasattr(send, "__self__"):
            break
        try:
            send = send.__closure__[names.index("send")].cell_contents
        except ValueError:  # an empty cell
            break
    return send


def lifespan_owners(lifespan: Any) -> Iterator[Any]:
    """Yield the owners of the methods in a lifespan: its own, and those that FastAPI has merged into it.

    A merged lifespan is a closure over the others. Fallback: nothing is found, and `manager.install(app)` or a running
    lifespan names the manager.
    """
    waiting = [lifespan]
    for _ in range(_MAX_LIFESPANS):
        if not waiting:
            break
        candidate = waiting.pop(0)
        owner = getattr(candidate, "__self__", None)
        if owner is not None:
            yield owner
        candidate = getattr(candidate, "__wrapped__", candidate)
        for cell in getattr(candidate, "__closure__", None) or ():
            with suppress(ValueError):  # an empty cell
                waiting.append(cell.cell_contents)


def lifespan_of(app: Any) -> Any:
    """Return the lifespan of an app. Fallback: `None`, as for `lifespan_owners`."""
    return getattr(getattr(app, "router", None), "lifespan_context", None)


def wrap_lifespan(app: Any, wrap: Callable[[Any], Any]) -> None:
    """Replace the lifespan of an app with what `wrap` makes of it.

    There is no fallback, because a manager that is not started serves nothing.

    Raises:
        AttributeError: This version of Starlette stores the lifespan under another name.
    """
    app.router.lifespan_context = wrap(app.router.lifespan_context)


def default_app(router: Any) -> Any:
    """Return the app that a router calls for a path without a route.

    Fallback: `None`. Paths without a route are then not logged.
    """
    return getattr(router, "default", None)


def routing_app(router: Any) -> Any:
    """Return the app with which a router routes a request.

    Fallback: `None`. A WebSocket whose path matches a mount of files then fails, as without this library.
    """
    return getattr(router, "middleware_stack", None)


def install_router_apps(router: Any, default: Any, routing: Any = None) -> None:
    """Replace the default app of a router, and its routing app if one is given.

    Call it only if `default_app` and `routing_app` return what is replaced.
    """
    router.default = default
    if routing is not None:
        router.middleware_stack = routing


def http_middleware(app: Any) -> Iterator[tuple[type, tuple[Any, ...], dict[str, Any]]]:
    """Yield class, positional and keyword arguments of each HTTP middleware of an app.

    Only subclasses of `BaseHTTPMiddleware` count, because other middleware may also run for WebSockets. Fallback:
    nothing is yielded.
    """
    for middleware in getattr(app, "user_middleware", ()):
        kind = getattr(middleware, "cls", None)
        if isinstance(kind, type) and issubclass(kind, BaseHTTPMiddleware):
            yield kind, tuple(getattr(middleware, "args", ())), dict(getattr(middleware, "kwargs", {}))


def known_handlers(websocket: WebSocket) -> tuple[dict[Any, Any], dict[int, Any]] | None:
    """Return Starlette's exception handlers by class and by status.

    Fallback: `None`, as outside of Starlette. The application's own handlers are then not called.
    """
    known: tuple[dict[Any, Any], dict[int, Any]] | None = websocket.scope.get("starlette.exception_handlers")
    return known


def is_handler_of_starlette(handler: Any) -> bool:
    """Return whether Starlette has registered an exception handler itself: a method of its middleware.

    Fallback: `False`. The handler then counts as the application's own.
    """
    return isinstance(getattr(handler, "__self__", None), ExceptionMiddleware)


def mounted_app(route: Any) -> Any:
    """Return the app of a mount without the middleware around it. Fallback: the app with its middleware."""
    app = getattr(route, "_base_app", route.app)
    for _ in range(_MAX_MIDDLEWARE):
        inner = getattr(app, "app", None)
        if inner is None or isinstance(app, StaticFiles) or hasattr(app, "routes"):
            break
        app = inner
    return app


class _EndedWebSocket(WebSocket):
    """Starlette's `WebSocket` of a closed connection.

    Starlette rejects a read after a disconnect at once, even if messages are unread. Here unread messages are read
    first. Then each read reports the disconnect again, and yields to the event loop.
    """

    async def receive(self) -> Any:
        """Return the next ASGI event: unread messages, then the disconnect on every call."""
        return await self._receive()

    async def send(self, message: Any) -> None:
        """As Starlette's."""
        await self._repeated()
        await super().send(message)

    async def receive_text(self) -> str:
        """As Starlette's."""
        await self._repeated()
        return await super().receive_text()

    async def receive_bytes(self) -> bytes:
        """As Starlette's."""
        await self._repeated()
        return await super().receive_bytes()

    async def receive_json(self, mode: str = "text") -> Any:
        """As Starlette's."""
        await self._repeated()
        return await super().receive_json(mode)

    async def _repeated(self) -> None:
        """Report a call to the connection before Starlette rejects it."""
        if self.application_state is not WebSocketState.CONNECTED:
            await self._receive.__self__.yield_after_end()  # type: ignore[attr-defined]


@functools.cache
def _ended_class(kind: type[WebSocket]) -> type[WebSocket]:
    return type(f"Ended{kind.__name__}", (_EndedWebSocket, kind), {})


def replace_with_ended(websocket: WebSocket) -> None:
    """Make a `WebSocket` behave as closed, including references held by user code."""
    websocket.__class__ = _ended_class(type(websocket))


# ── the server's protocol object, which owns the ASGI `receive` and `send` ──


def transport_of(*protocols: Any) -> Any:
    """Return the asyncio transport of the first protocol object that has one.

    uvicorn's protocol objects have the attribute `transport`. Fallback: `None`. The connection is then closed instead
    of aborted, and bytes in the buffer are not seen.
    """
    for protocol in protocols:
        transport = getattr(protocol, "transport", None)
        if callable(getattr(transport, "abort", None)):
            return transport
    return None


def forget_task(task: Any, *protocols: Any) -> None:
    """Remove a task from the tasks that the server waits for at shutdown.

    uvicorn's protocol objects have them in the attribute `tasks`. Fallback: nothing is removed, and the server waits
    for the task up to its own timeout.
    """
    for protocol in protocols:
        tasks = getattr(protocol, "tasks", None)
        if isinstance(tasks, set):
            tasks.discard(task)


def close_frame_was_received(receiver: Any, sender: Any) -> bool | None:
    """Return whether the client has sent a close frame; `None` if the protocol objects do not know it.

    uvicorn on `websockets` stores the frame as `conn.close_rcvd`. On `wsproto`, uvicorn's `conn` and hypercorn's
    `connection` have a state. Fallback: `None`. The `websocket.disconnect` event then decides.

    Args:
        receiver: The owner of the ASGI `receive`, or `None`.
        sender: The owner of the ASGI `send`, or `None`.
    """
    websockets_state = getattr(getattr(receiver, "conn", None), "close_rcvd", _UNKNOWN)
    if websockets_state is not _UNKNOWN:
        return websockets_state is not None
    for wsproto in (getattr(receiver, "conn", None), getattr(sender, "connection", None)):
        name = getattr(getattr(wsproto, "state", None), "name", None)
        if name in ("CLOSED", "REMOTE_CLOSING"):
            return True
        if name in ("OPEN", "LOCAL_CLOSING"):
            return False
    return None
