"""Detection of WebSocket routes that rely on HTTP authentication middleware (D17).

Such middleware runs for HTTP requests only.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any, Final

from fastapi.security.base import SecurityBase
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import WebSocketRoute

from fastapi_ws_stabilizer.auth.credentials import Credential
from fastapi_ws_stabilizer.compat.fastapi import (
    call_of,
    dependencies_of,
    included_dependencies,
    included_router,
    reads_connection,
    route_dependencies,
)
from fastapi_ws_stabilizer.compat.starlette import http_middleware
from fastapi_ws_stabilizer.doctor.context import MAX_DEPENDENCIES, OWN_MODULES

OWN_SOCKETS: Final = frozenset({"stable_socket", "socket"})
"""Dependencies of this library that accept every client."""

_LOGIN_NAME: Final = re.compile("auth|jwt|token|login|permission|apikey", re.IGNORECASE)
_REJECTION_WORD: Final = re.compile("authorization|unauthorized|forbidden|http_40[13]|ws_1008", re.IGNORECASE)
_HEADERS: Final = frozenset({"authorization", "www-authenticate"})
_CODES: Final = frozenset({401, 403, 4401, 4403, 1008})
"""Status and close codes with which code rejects a client."""


def unguarded_routes(app: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of HTTP authentication middleware, and the paths of unguarded routes.

    A WebSocket route is unguarded if no dependency authenticates the client, and no code in its endpoint rejects a
    client. Middleware of a mounted app counts for the routes of that app.
    """
    logins: dict[str, None] = {}
    paths: dict[str, None] = {}
    for path, route, before in _routes(getattr(app, "routes", ()), "", _logins(app)):
        if before and not is_authenticated(route):
            logins.update(dict.fromkeys(before))
            paths[path] = None
    return tuple(logins), tuple(paths)


def is_authenticated(route: WebSocketRoute) -> bool:
    """Return whether a route seems to authenticate its clients."""
    return any(map(authenticates, route_dependencies(route))) or _rejects(route.endpoint)


def authenticates(dependant: Any) -> bool:
    """Return whether a dependency seems to authenticate the client.

    Together with its own dependencies it must read something from the connection, and be able to reject. Dependencies
    of this library and of `fastapi.security` count, except those in `OWN_SOCKETS`.
    """
    reads = rejects = False
    waiting = [dependant]
    for _ in range(MAX_DEPENDENCIES):
        if not waiting:
            break
        one = waiting.pop()
        waiting.extend(dependencies_of(one))
        call = _without_partial(call_of(one))
        if str(getattr(call, "__module__", "")).startswith(OWN_MODULES):
            if getattr(call, "__name__", "") not in OWN_SOCKETS:
                return True
        elif isinstance(call, (SecurityBase, Credential)):
            return True
        else:
            reads = reads or reads_connection(one)
            rejects = rejects or _can_reject(call)
    return reads and rejects


def _can_reject(call: Callable[..., Any]) -> bool:
    name = str(getattr(call, "__name__", type(call).__name__))
    return any(_LOGIN_NAME.search(word.replace("_", "")) for word in (name, *_identifiers(call))) or any(
        _raises(code) or _mentions_rejection(code) for code in _codes(call)
    )


def _identifiers(call: Callable[..., Any]) -> Iterator[str]:
    """Yield the names that code calls, and its variables."""
    for code in _codes(call):
        yield from code.co_names
        yield from code.co_varnames


def _raises(code: CodeType) -> bool:
    """Return whether code raises its own error, instead of passing one on."""
    if any(step.opname == "RAISE_VARARGS" and step.arg for step in dis.get_instructions(code)):
        return True
    return any(_raises(constant) for constant in code.co_consts if isinstance(constant, CodeType))


def _routes(
    routes: Iterable[Any], prefix: str, logins: tuple[str, ...]
) -> Iterator[tuple[str, WebSocketRoute, tuple[str, ...]]]:
    """Yield all WebSocket routes with their paths and the login middleware that does not cover them."""
    for route in routes:
        if isinstance(route, WebSocketRoute):
            yield prefix + route.path, route, logins
        elif (included := included_router(route)) is not None:
            if not any(map(authenticates, included_dependencies(included))):
                yield from _routes(included.routes, prefix + included.prefix, logins)
        elif inner := getattr(route, "routes", None):
            more = _logins(getattr(route, "app", None))
            yield from _routes(inner, prefix + str(getattr(route, "path", "")), (*logins, *more))


def _logins(app: Any) -> tuple[str, ...]:
    """Return the names of an app's HTTP middleware that looks like a login."""
    found = (_login(*middleware) for middleware in http_middleware(app))
    return tuple(name for name in found if name is not None)


def _login(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    takes_dispatch = kind.__init__ is BaseHTTPMiddleware.__init__
    positional = args[0] if args and takes_dispatch else None
    dispatch = _without_partial(kwargs.get("dispatch") or positional or kind)
    name = str(getattr(dispatch, "__name__", type(dispatch).__name__))
    return name if _LOGIN_NAME.search(name.replace("_", "")) or _rejects(dispatch) else None


def _rejects(target: Any) -> bool:
    """Return whether code seems to read a credential, or to reject a client."""
    return any(_mentions_rejection(code) for code in _codes(target))


def _codes(target: Any) -> Iterator[CodeType]:
    """Yield the code of a function, or of all methods of a class or an object, without Starlette's."""
    function = inspect.unwrap(_without_partial(target))
    if (code := getattr(function, "__code__", None)) is not None:
        yield code
        return
    for kind in (function if inspect.isclass(function) else type(function)).__mro__:
        if not kind.__module__.startswith(("starlette.", "fastapi.", "builtins", "abc")):
            for member in vars(kind).values():
                code = getattr(inspect.unwrap(getattr(member, "__func__", member)), "__code__", None)
                if code is not None:
                    yield code


def _without_partial(function: Any) -> Any:
    """Return the function inside a `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _mentions_rejection(code: CodeType) -> bool:
    if any(map(_REJECTION_WORD.search, (*code.co_names, *code.co_varnames))):
        return True
    for constant in _flat(code.co_consts):
        if isinstance(constant, CodeType):
            if _mentions_rejection(constant):
                return True
        elif isinstance(constant, str):
            if constant.lower() in _HEADERS:
                return True
        elif isinstance(constant, int) and constant in _CODES:
            return True
    return False


def _flat(constants: Iterable[Any]) -> Iterator[Any]:
    """Yield constants and nested constants: `status in (401, 403)` has one."""
    for constant in constants:
        if isinstance(constant, (tuple, frozenset)):
            yield from _flat(constant)
        else:
            yield constant
