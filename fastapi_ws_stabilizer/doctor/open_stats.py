"""Detection of stats routers without a dependency that can reject a caller (D21)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from fastapi.routing import APIRoute

from fastapi_ws_stabilizer.compat.fastapi import call_of, included_dependencies, included_router, route_dependencies
from fastapi_ws_stabilizer.doctor.auth_middleware import authenticates

MODULE: Final = "fastapi_ws_stabilizer.stats.router"
FIRST_ENDPOINT: Final = "overview"
"""Endpoint at the prefix of the router."""


def open_stats_routers(app: Any) -> tuple[str, ...]:
    """Return the prefixes under which the stats router answers every caller."""
    return tuple(dict.fromkeys(path.rstrip("/") or "/" for path in _open_routes(getattr(app, "routes", ()), "")))


def _open_routes(routes: Iterable[Any], prefix: str) -> Iterator[str]:
    for route in routes:
        if isinstance(route, APIRoute):
            is_stats = getattr(route.endpoint, "__module__", "") == MODULE and route.endpoint.__name__ == FIRST_ENDPOINT
            # The router's own dependency, which finds the manager, belongs to this library and does not count.
            own = [one for one in route_dependencies(route) if getattr(call_of(one), "__module__", "") != MODULE]
            if is_stats and not any(map(authenticates, own)):
                yield prefix + route.path
        elif (included := included_router(route)) is not None:
            if not any(map(authenticates, included_dependencies(included))):
                yield from _open_routes(included.routes, prefix + included.prefix)
        elif inner := getattr(route, "routes", None):
            yield from _open_routes(inner, prefix + str(getattr(route, "path", "")))
