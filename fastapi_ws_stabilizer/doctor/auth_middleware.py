"""HTTP middleware that looks like a login, and the WebSocket routes beside it: it runs for HTTP requests alone."""

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
from fastapi_ws_stabilizer.compat.fastapi import included_router
from fastapi_ws_stabilizer.doctor.context import MAX_DEPENDENCIES, OWN_MODULES

OWN_SOCKETS: Final = frozenset({"stable_socket", "socket"})
"""Dependencies of this library that let everybody in."""

_NAME: Final = re.compile("auth|jwt|token|login|permission|apikey", re.IGNORECASE)
_WORD: Final = re.compile("authorization|unauthorized|forbidden|http_40[13]|ws_1008", re.IGNORECASE)
_HEADERS: Final = frozenset({"authorization", "www-authenticate"})
_CODES: Final = frozenset({401, 403, 4401, 4403, 1008})
"""What code answers with that lets not everybody in."""

_SIGHTS: Final = (
    "path_params",
    "query_params",
    "header_params",
    "cookie_params",
    "request_param_name",
    "websocket_param_name",
    "http_connection_param_name",
)
"""Where FastAPI writes down what of a connection a dependency looks at."""


def unguarded_routes(app: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of HTTP middleware that looks like a login, and the paths of the WebSocket routes that it leaves open.

    Open is a route without a dependency that asks who comes, and without code in its endpoint that refuses somebody.
    Middleware of a mounted app counts for the routes of that one.
    """
    logins: dict[str, None] = {}
    paths: dict[str, None] = {}
    for path, route, before in _routes(getattr(app, "routes", ()), "", _logins(app)):
        if before and not is_authenticated(route):
            logins.update(dict.fromkeys(before))
            paths[path] = None
    return tuple(logins), tuple(paths)


def is_authenticated(route: WebSocketRoute) -> bool:
    """Whether a route seems to look at who comes."""
    dependencies = getattr(getattr(route, "dependant", None), "dependencies", ())
    return any(map(authenticates, dependencies)) or _refuses(route.endpoint)


def authenticates(dependant: Any) -> bool:
    """Whether a dependency seems to be an identity: it, with what is beneath it, looks at who comes and can refuse.

    One of this library or of `fastapi.security` is, but our sockets that take a client at its word.
    """
    looks = refuses = False
    waiting = [dependant]
    for _ in range(MAX_DEPENDENCIES):
        if not waiting:
            break
        one = waiting.pop()
        waiting.extend(one.dependencies)
        call = _whole(one.call)
        if str(getattr(call, "__module__", "")).startswith(OWN_MODULES):
            if getattr(call, "__name__", "") not in OWN_SOCKETS:
                return True
        elif isinstance(call, (SecurityBase, Credential)):
            return True
        else:
            looks = looks or any(getattr(one, name, None) for name in _SIGHTS)
            refuses = refuses or _can_refuse(call)
    return looks and refuses


def _can_refuse(call: Callable[..., Any]) -> bool:
    name = str(getattr(call, "__name__", type(call).__name__))
    return any(_NAME.search(word.replace("_", "")) for word in (name, *_words(call))) or any(
        _raises(code) or _speaks_of_refusal(code) for code in _codes(call)
    )


def _words(call: Callable[..., Any]) -> Iterator[str]:
    """What code calls, and its variables."""
    for code in _codes(call):
        yield from code.co_names
        yield from code.co_varnames


def _raises(code: CodeType) -> bool:
    """Whether code raises an error of its own: one that it hands on is another's."""
    if any(step.opname == "RAISE_VARARGS" and step.arg for step in dis.get_instructions(code)):
        return True
    return any(_raises(constant) for constant in code.co_consts if isinstance(constant, CodeType))


def _routes(
    routes: Iterable[Any], prefix: str, logins: tuple[str, ...]
) -> Iterator[tuple[str, WebSocketRoute, tuple[str, ...]]]:
    """All WebSocket routes with their paths, and with the logins before them that do not run for them."""
    for route in routes:
        if isinstance(route, WebSocketRoute):
            yield prefix + route.path, route, logins
        elif (included := included_router(route)) is not None:
            if not any(map(authenticates, included.dependencies)):
                yield from _routes(included.routes, prefix + included.prefix, logins)
        elif inner := getattr(route, "routes", None):
            more = _logins(getattr(route, "app", None))
            yield from _routes(inner, prefix + str(getattr(route, "path", "")), (*logins, *more))


def _logins(app: Any) -> tuple[str, ...]:
    """The names of an app's HTTP middleware that looks like a login."""
    found = (_login(middleware) for middleware in getattr(app, "user_middleware", ()))
    return tuple(name for name in found if name is not None)


def _login(middleware: Any) -> str | None:
    kind = middleware.cls
    if not (inspect.isclass(kind) and issubclass(kind, BaseHTTPMiddleware)):
        return None  # what speaks ASGI itself may look at sockets too
    takes_dispatch = kind.__init__ is BaseHTTPMiddleware.__init__
    by_place = middleware.args[0] if middleware.args and takes_dispatch else None
    dispatch = _whole(middleware.kwargs.get("dispatch") or by_place or kind)
    name = str(getattr(dispatch, "__name__", type(dispatch).__name__))
    return name if _NAME.search(name.replace("_", "")) or _refuses(dispatch) else None


def _refuses(target: Any) -> bool:
    """Whether code seems to look at a credential, or to refuse somebody."""
    return any(_speaks_of_refusal(code) for code in _codes(target))


def _codes(target: Any) -> Iterator[CodeType]:
    """The code of a function, or of all methods of a class, or of an object's, that are not Starlette's."""
    function = inspect.unwrap(_whole(target))
    if (code := getattr(function, "__code__", None)) is not None:
        yield code
        return
    for kind in (function if inspect.isclass(function) else type(function)).__mro__:
        if not kind.__module__.startswith(("starlette.", "fastapi.", "builtins", "abc")):
            for member in vars(kind).values():
                code = getattr(inspect.unwrap(getattr(member, "__func__", member)), "__code__", None)
                if code is not None:
                    yield code


def _whole(function: Any) -> Any:
    """A function without the arguments that a partial has given it."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _speaks_of_refusal(code: CodeType) -> bool:
    if any(map(_WORD.search, (*code.co_names, *code.co_varnames))):
        return True
    for constant in _flat(code.co_consts):
        if isinstance(constant, CodeType):
            if _speaks_of_refusal(constant):
                return True
        elif isinstance(constant, str):
            if constant.lower() in _HEADERS:
                return True
        elif isinstance(constant, int) and constant in _CODES:
            return True
    return False


def _flat(constants: Iterable[Any]) -> Iterator[Any]:
    """Constants, and those in them: `status in (401, 403)` has one."""
    for constant in constants:
        if isinstance(constant, (tuple, frozenset)):
            yield from _flat(constant)
        else:
            yield constant
