"""Sockets whose client is asked who it is before it stands at the door, where nobody can tell it that it is refused."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any, Final

from starlette.routing import WebSocketRoute

from fastapi_ws_stabilizer.compat.fastapi import included_router
from fastapi_ws_stabilizer.doctor.auth_middleware import authenticates
from fastapi_ws_stabilizer.doctor.context import MAX_DEPENDENCIES
from fastapi_ws_stabilizer.socket_context import identity_dependency

_SOCKET: Final = (identity_dependency.__module__, "identified_socket")
"""Where `manager.socket_for` makes its dependencies, and what they are called."""


def routes_with_early_identity(app: Any) -> tuple[str, ...]:
    """The paths of the WebSocket routes on which the identity of a `socket_for` runs before its socket's door.

    FastAPI keeps what a dependency has returned, and solves them in the order in which they stand, those of
    `dependencies=` first: the socket is then not there to hear what the identity raises.
    """
    return tuple(path for path, order in _solved(getattr(app, "routes", ()), "", ()) if _is_early(order))


def _solved(routes: Iterable[Any], prefix: str, before: tuple[Any, ...]) -> Iterator[tuple[str, list[Any]]]:
    """All WebSocket routes of FastAPI, each with its dependencies in the order in which they are solved."""
    for route in routes:
        if isinstance(route, WebSocketRoute):
            own = getattr(getattr(route, "dependant", None), "dependencies", ())
            whole = itertools.chain.from_iterable(map(_beneath, (*before, *own)))
            yield prefix + route.path, list(itertools.islice(whole, MAX_DEPENDENCIES))
        elif (included := included_router(route)) is not None:
            yield from _solved(included.routes, prefix + included.prefix, (*before, *included.dependencies))
        elif inner := getattr(route, "routes", None):
            yield from _solved(inner, prefix + str(getattr(route, "path", "")), ())


def _beneath(dependant: Any) -> Iterator[Any]:
    """A dependency, behind all that it needs."""
    for one in dependant.dependencies:
        yield from _beneath(one)
    yield dependant


def _is_early(order: list[Any]) -> bool:
    """Whether an identity, or a part of it that asks who comes, stands before the door of its socket."""
    for socket in order:
        call = socket.call
        if (getattr(call, "__module__", None), getattr(call, "__name__", None)) == _SOCKET:
            door, identity = socket.dependencies
            asked = [one.call for one in _beneath(identity) if one is identity or authenticates(one)]
            if any(one.call in asked for one in itertools.takewhile(functools.partial(operator.is_not, door), order)):
                return True
    return False
