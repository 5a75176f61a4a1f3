"""Reports about WebSocket handshakes that match no route.

Starlette answers a WebSocket without a route with a bare 403, which looks like a rejection. The first 10 such paths are
logged together with the existing paths. A mount takes all paths below it. A mount of static files fails on a WebSocket,
and another mounted app answers itself.
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
"""Maximum number of unmatched paths that are logged, so that a scanner cannot fill the log."""


class UnmatchedRouteLogger:
    """Wrapper of a router and its default app that logs WebSocket paths without a route."""

    def __init__(self, router: Any, events: EventBus) -> None:
        self._router = router
        self._default = router.default
        self._routed: Any = getattr(router, "middleware_stack", None)
        self._events = events
        self._logged: set[str] = set()

    @classmethod
    def watch(cls, app: Any, events: EventBus) -> None:
        """Wrap the router of an app. Nothing happens if it is wrapped already or has no default app."""
        router: Any = getattr(app, "router", None)
        default = getattr(router, "default", None)
        if callable(default) and not isinstance(default, cls):
            watch = router.default = cls(router, events)
            if callable(watch._routed):
                router.middleware_stack = watch.route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Log the path of a WebSocket, and call the router's own default app."""
        if scope["type"] == "websocket":
            self._log(scope)
        await self._default(scope, receive, send)

    def route(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass a request to the router. A WebSocket that matches a mount of files goes to the router's default app.

        This is not a coroutine function, because each open connection would then hold one of its frames.
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
            fields["advice"] = f"{behind} comes after {entry}: put the mount last"
        self._events.emit("no_websocket_route", logging.WARNING, **fields)


def _path_in(scope: Scope) -> str:
    """Return the path for the app's routes, without the path at which the app itself is mounted."""
    path, root = str(scope.get("path")), str(scope.get("root_path") or "")
    below = path.removeprefix(root)
    return below if below.startswith("/") else path


def _is_watched(entry: RouteEntry) -> bool:
    """Return whether a mounted app has its own manager, which logs its unmatched paths."""
    router = getattr(entry.target, "router", entry.target)
    return isinstance(getattr(router, "default", None), UnmatchedRouteLogger)


def websocket_paths(routes: Iterable[Any]) -> Iterator[str]:
    """Return the paths of all WebSocket routes, including those of mounted apps and included routers."""
    return (path for path, _ in websocket_routes(routes))


def websocket_routes(routes: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, WebSocketRoute]]:
    """Yield all WebSocket routes with their whole paths, including those of mounted apps and included routers."""
    for route in routes:
        if isinstance(route, WebSocketRoute):
            yield prefix + route.path, route
            continue
        included = included_router(route)
        inner = (getattr(route, "routes", None) or ()) if included is None else included.routes
        path = str(getattr(route, "path", "")) if included is None else included.prefix
        yield from websocket_routes(inner, prefix + path)
