"""The WebSocket routes of an app, in the order in which its router tries them, and reports of paths that match none.

Starlette answers a WebSocket without a route with a bare 403, which looks like a rejection. The first 10 such paths are
logged together with the existing paths. A mount matches all paths below it. A mount of static files fails on a
WebSocket, and another mounted app answers itself.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Awaitable, Iterable, Iterator
from typing import Any, Final, Literal, NamedTuple

from starlette.convertors import FloatConvertor, IntegerConvertor, PathConvertor, StringConvertor, UUIDConvertor
from starlette.routing import Host, Mount, Route, WebSocketRoute, compile_path
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from fastapi_ws_stabilizer.compat.fastapi import included_router
from fastapi_ws_stabilizer.compat.starlette import default_app, install_router_apps, mounted_app, routing_app
from fastapi_ws_stabilizer.events import EventBus

_SAMPLES: Final = {
    StringConvertor: "a-sample-of-the-doctor",
    PathConvertor: "a-sample/of-the-doctor",
    IntegerConvertor: "4711471147",
    FloatConvertor: "4711.4711",
    UUIDConvertor: "6f9b2d0e-4c1a-4a58-9f3e-0d6f1d6b7c11",
}
"""A value for each kind of path parameter that no route has as a fixed part."""


_ENDPOINT_ROUTES: Final = (Route, WebSocketRoute)


class RouteEntry(NamedTuple):
    """Entry of a router that can match a path.

    Attributes:
        kind: `socket` for a WebSocket route and `files` for a mount of static files. `routes` is a mount with known
            routes, which come before it. `app` is a mount of another app, which may serve WebSockets or not. `host` is
            a route by `Host` header.
        path: The whole path.
        target: The route, or the mounted app.
    """

    kind: Literal["socket", "files", "routes", "app", "host"]
    path: str
    target: Any

    def __str__(self) -> str:
        if self.kind == "socket":
            return f"the WebSocket route {self.path}"
        return f"the mount at {self.path or '/'}"

    def takes(self, path: str) -> bool:
        """Return whether a path matches this entry."""
        if self.kind == "host":
            return True
        return _regex(self.path if self.kind == "socket" else f"{self.path}/{{path:path}}").match(path) is not None


def route_entries(routes: Iterable[Any], prefix: str = "") -> Iterator[RouteEntry]:
    """Yield the entries of these routes in order, including those of included routers and mounted apps."""
    for route in routes:
        if isinstance(route, WebSocketRoute):
            yield RouteEntry("socket", prefix + route.path, route)
        elif (included := included_router(route)) is not None:
            yield from route_entries(included.routes, prefix + included.prefix)
        elif isinstance(route, Mount):
            path = prefix + route.path
            app = mounted_app(route)
            inner = getattr(app, "routes", None)
            if inner is not None:
                yield from route_entries(inner, path)
                yield RouteEntry("routes", path, app)
            else:
                yield RouteEntry("files" if isinstance(app, StaticFiles) else "app", path, app)
        elif isinstance(route, Host):
            yield RouteEntry("host", prefix, route.app)


def entries_for_path(routes: Iterable[Any], path: str) -> tuple[RouteEntry | None, RouteEntry | None]:
    """Return the entry that matches a path, and a later WebSocket route for it that is never reached, or `None`."""
    first: RouteEntry | None = None
    for entry in route_entries(routes):
        if not entry.takes(path):
            continue
        if first is None:
            first = entry
            if entry.kind in ("socket", "app", "host"):
                return entry, None
        elif entry.kind == "socket":
            return first, entry
    return first, None


def shadowed_routes(app: Any) -> tuple[tuple[str, str], ...]:
    """Return the WebSocket routes that are never reached, each with the entry that shadows it."""
    before: list[RouteEntry] = []
    shadowed: list[tuple[str, str]] = []
    for entry in route_entries(getattr(app, "routes", None) or ()):
        if entry.kind == "socket" and (sample := _sample(entry.path)) is not None:
            first = next((one for one in before if one.takes(sample)), None)
            if first is not None:
                shadowed.append((entry.path, str(first)))
        if entry.kind != "host":
            before.append(entry)
    return tuple(shadowed)


@functools.lru_cache(maxsize=1024)
def _regex(path: str) -> re.Pattern[str]:
    return compile_path(path)[0]


def _sample(path: str) -> str | None:
    """Return a path that a route matches, or `None` if it has a path parameter of an unknown kind."""
    _, form, convertors = compile_path(path)
    values = {name: _SAMPLES.get(type(convertor)) for name, convertor in convertors.items()}
    return None if None in values.values() else form.format(**values)


MAX_LOGGED: Final = 10
"""Maximum number of unmatched paths that are logged, so that a scanner cannot fill the log."""


class UnmatchedRouteLogger:
    """Wrapper of a router and its default app that logs WebSocket paths without a route."""

    def __init__(self, router: Any, events: EventBus) -> None:
        self._router = router
        self._default = default_app(router)
        self._routed = routing_app(router)
        self._events = events
        self._logged: set[str] = set()

    @classmethod
    def watch(cls, app: Any, events: EventBus) -> None:
        """Wrap the router of an app. Nothing happens if it is wrapped already or has no default app."""
        router: Any = getattr(app, "router", None)
        default = default_app(router)
        if callable(default) and not isinstance(default, cls):
            watch = cls(router, events)
            install_router_apps(router, watch, watch.route if callable(watch._routed) else None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Log the path of a WebSocket, and call the router's own default app."""
        if scope["type"] == "websocket":
            self._log(scope)
        await self._default(scope, receive, send)

    def route(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass a request to the router. A WebSocket that matches a mount of files goes to the router's default app.

        This is not a coroutine function, because each open connection would then hold one of its frames.
        """
        if scope["type"] == "websocket" and not _are_plain(self._router.routes):
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


def _are_plain(routes: Iterable[Any]) -> bool:
    """Return whether all routes lead to an endpoint, and none to other routes or apps. Each handshake asks."""
    for route in routes:  # noqa: SIM110 (a generator expression takes three times as long)
        if not isinstance(route, _ENDPOINT_ROUTES):
            return False
    return True


def _path_in(scope: Scope) -> str:
    """Return the path for the app's routes, without the path at which the app itself is mounted."""
    path, root = str(scope.get("path")), str(scope.get("root_path") or "")
    below = path.removeprefix(root)
    return below if below.startswith("/") else path


def _is_watched(entry: RouteEntry) -> bool:
    """Return whether a mounted app has its own manager, which logs its unmatched paths."""
    router = getattr(entry.target, "router", entry.target)
    return isinstance(default_app(router), UnmatchedRouteLogger)


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
