"""Say in the log why a WebSocket handshake got a 403: no route has its path.

Starlette answers a WebSocket for which there is no route with a bare 403, which looks like a refusal. The first few
such paths are logged together with the paths that exist. A mount takes all paths below it: one of files fails on a
WebSocket, and one of another app answers by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Iterable, Iterator
from typing import Any, Final

from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send

from fastapi_ws_stabilizer.compat.fastapi import included_router
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handshake.routes import RouteEntry, entries_for_path

MAX_LOGGED: Final = 10
"""How many different unmatched paths are told. A scanner must not fill the log."""


class UnmatchedRouteLogger:
    """Stands before a router and its default app, and tells which WebSocket paths no route serves."""

    def __init__(self, router: Any, events: EventBus) -> None:
        self._router = router
        self._default = router.default
        self._routed: Any = getattr(router, "middleware_stack", None)
        self._events = events
        self._logged: set[str] = set()

    @classmethod
    def watch(cls, app: Any, events: EventBus) -> None:
        """Begin to watch an app's router; nothing happens if it is watched already or has no such default."""
        router: Any = getattr(app, "router", None)
        default = getattr(router, "default", None)
        if callable(default) and not isinstance(default, cls):
            watch = router.default = cls(router, events)
            if callable(watch._routed):
                router.middleware_stack = watch.route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell, and let the router's own default answer."""
        if scope["type"] == "websocket":
            self._log(scope)
        await self._default(scope, receive, send)

    def route(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Hand a request to the router; a WebSocket that a mount of files would take gets the router's default.

        It is no coroutine function: an open connection would hold a frame of it.
        """
        if scope["type"] == "websocket":
            entry, behind = entries_for_path(self._router.routes, _path_in(scope))
            if entry is not None and entry.kind in ("files", "routes") and not _is_watched(entry):
                self._log(scope, entry, behind)
                if entry.kind == "files":
                    default: Awaitable[None] = self._default(scope, receive, send)
                    return default
        routed: Awaitable[None] = self._routed(scope, receive, send)
        return routed

    def _log(self, scope: Scope, entry: RouteEntry | None = None, behind: RouteEntry | None = None) -> None:
        path = str(scope.get("path"))
        if path in self._logged or len(self._logged) >= MAX_LOGGED:
            return
        self._logged.add(path)
        known = sorted(set(websocket_paths(self._router.routes)))
        fields: dict[str, Any] = {"path": path, "known": ", ".join(known) or "none"}
        if entry is not None:
            fields["taken_by"] = str(entry)
        if behind is not None:
            fields["advice"] = f"{behind} stands behind {entry}: put the mount last"
        self._events.emit("no_websocket_route", logging.WARNING, **fields)


def _path_in(scope: Scope) -> str:
    """The path that the app's routes see, without the one that the app itself is mounted at."""
    path, root = str(scope.get("path")), str(scope.get("root_path") or "")
    below = path.removeprefix(root)
    return below if below.startswith("/") else path


def _is_watched(entry: RouteEntry) -> bool:
    """Whether a mounted app has a manager of its own, which tells what no route of it takes."""
    router = getattr(entry.target, "router", entry.target)
    return isinstance(getattr(router, "default", None), UnmatchedRouteLogger)


def websocket_paths(routes: Iterable[Any]) -> Iterator[str]:
    """The paths of all WebSocket routes, those of mounted apps and included routers too."""
    return (path for path, _ in websocket_routes(routes))


def websocket_routes(routes: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, WebSocketRoute]]:
    """All WebSocket routes, those of mounted apps and included routers too, each with its whole path."""
    for route in routes:
        if isinstance(route, WebSocketRoute):
            yield prefix + route.path, route
            continue
        included = included_router(route)
        inner = (getattr(route, "routes", None) or ()) if included is None else included.routes
        path = str(getattr(route, "path", "")) if included is None else included.prefix
        yield from websocket_routes(inner, prefix + path)
