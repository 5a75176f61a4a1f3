"""WebSocket routes of an app in the order of its router, and the routes that shadow them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal, NamedTuple

from starlette.convertors import FloatConvertor, IntegerConvertor, PathConvertor, StringConvertor, UUIDConvertor
from starlette.routing import Host, Mount, WebSocketRoute, compile_path
from starlette.staticfiles import StaticFiles

from fastapi_ws_stabilizer.compat.fastapi import included_router
from fastapi_ws_stabilizer.compat.starlette import mounted_app

_SAMPLES: Final = {
    StringConvertor: "a-sample-of-the-doctor",
    PathConvertor: "a-sample/of-the-doctor",
    IntegerConvertor: "4711471147",
    FloatConvertor: "4711.4711",
    UUIDConvertor: "6f9b2d0e-4c1a-4a58-9f3e-0d6f1d6b7c11",
}
"""A value for each kind of path parameter that no route has as a fixed part."""


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
    """Return the entry that takes a path, and a later WebSocket route for it that is never reached, or `None`."""
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
