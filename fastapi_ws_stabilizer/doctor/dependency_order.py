"""Detection of identity dependencies that run before the socket dependency (D19).

At that time the library cannot yet reject the client with a readable reason.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any, Final

from starlette.routing import WebSocketRoute

from fastapi_ws_stabilizer.compat.fastapi import (
    call_of,
    dependencies_of,
    included_dependencies,
    included_router,
    route_dependencies,
)
from fastapi_ws_stabilizer.doctor.auth_middleware import authenticates
from fastapi_ws_stabilizer.doctor.context import MAX_DEPENDENCIES
from fastapi_ws_stabilizer.socket_context import identity_dependency

_SOCKET: Final = (identity_dependency.__module__, "identified_socket")
"""Module and name of the dependencies that `manager.socket_for` creates."""


def routes_with_early_identity(app: Any) -> tuple[str, ...]:
    """Return the paths of the WebSocket routes with an identity that runs before its socket.

    FastAPI resolves dependencies in their order, those of `dependencies=` first, and caches results. So the identity
    dependency can raise before the socket exists.
    """
    return tuple(path for path, order in _routes_in_order(getattr(app, "routes", ()), "", ()) if _is_early(order))


def _routes_in_order(routes: Iterable[Any], prefix: str, before: tuple[Any, ...]) -> Iterator[tuple[str, list[Any]]]:
    """Yield all WebSocket routes with their dependencies in the order in which FastAPI solves them."""
    for route in routes:
        if isinstance(route, WebSocketRoute):
            whole = itertools.chain.from_iterable(map(_flattened, (*before, *route_dependencies(route))))
            yield prefix + route.path, list(itertools.islice(whole, MAX_DEPENDENCIES))
        elif (included := included_router(route)) is not None:
            yield from _routes_in_order(
                included.routes, prefix + included.prefix, (*before, *included_dependencies(included))
            )
        elif inner := getattr(route, "routes", None):
            yield from _routes_in_order(inner, prefix + str(getattr(route, "path", "")), ())


def _flattened(dependant: Any) -> Iterator[Any]:
    """Yield a dependency, after all its own dependencies."""
    for one in dependencies_of(dependant):
        yield from _flattened(one)
    yield dependant


def _is_early(order: list[Any]) -> bool:
    """Return whether an identity, or an authenticating part of it, comes before the admission of its socket."""
    for socket in order:
        call = call_of(socket)
        if (getattr(call, "__module__", None), getattr(call, "__name__", None)) == _SOCKET:
            admission, identity = dependencies_of(socket)
            calls = [call_of(one) for one in _flattened(identity) if one is identity or authenticates(one)]
            earlier = itertools.takewhile(functools.partial(operator.is_not, admission), order)
            if any(call_of(one) in calls for one in earlier):
                return True
    return False
