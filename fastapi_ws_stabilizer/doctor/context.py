"""`DeploymentContext`: the input of all checks, collected once."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Final

from fastapi_ws_stabilizer.compat.fastapi import call_of, dependant_of, dependencies_of
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.doctor.network_path import NetworkPath
from fastapi_ws_stabilizer.doctor.servers import OURS, ServerProfile
from fastapi_ws_stabilizer.handshake.routes import websocket_routes

OWN_MODULES: Final = "fastapi_ws_stabilizer."

SERVING_METHODS: Final = frozenset({"connect", "serve"})
"""Methods of a manager that serve a socket without a dependency of this library."""

MAX_DEPENDENCIES: Final = 500
"""Maximum number of dependencies of one route that the doctor examines."""


@dataclass(frozen=True)
class DeploymentContext:
    """Deployment of a manager, as far as it is known.

    Attributes:
        config: The options of the manager.
        server: The server; `None` if none is named and none is loaded.
        options: The server's options; `None` if they are unknown, as in a running process.
        version: The server's version; `()` if it is not installed here.
        python: The version of Python.
        network_path: The hops before the server.
        pre_stop: Seconds of the hook that the platform runs before SIGTERM.
        http2: Whether HTTP/2 is used up to the server.
        caching: Whether the platform caches the route.
        bypassing: Paths of WebSocket routes that this library does not serve.
        refuses: Whether hooks reject connections before the accept.
        guarded: Whether hooks authenticate clients, before or after the accept.
        logins: Names of HTTP middleware that looks like a login and does not run for WebSockets.
        unguarded: Paths of the WebSocket routes of the same app that do not authenticate their clients.
        early: Paths of WebSocket routes with an identity dependency that runs before the socket dependency.
        shadowed: Paths of unreachable WebSocket routes, each with what matches before it.
        background: Paths of WebSocket routes that take `BackgroundTasks`.
        open_stats: Prefixes of stats routers without a dependency that can reject a caller.
    """

    config: WebSocketConfig
    server: ServerProfile | None = None
    options: Mapping[str, Any] | None = None
    version: tuple[int, ...] = ()
    python: tuple[int, ...] = tuple(sys.version_info[:2])
    network_path: NetworkPath = field(default_factory=NetworkPath)
    pre_stop: float = 0.0
    http2: bool = False
    caching: bool = False
    bypassing: tuple[str, ...] = ()
    refuses: bool = False
    guarded: bool = False
    logins: tuple[str, ...] = ()
    unguarded: tuple[str, ...] = ()
    early: tuple[str, ...] = ()
    shadowed: tuple[tuple[str, str], ...] = ()
    background: tuple[str, ...] = ()
    open_stats: tuple[str, ...] = ()

    def option(self, name: str | None) -> Any:
        """Return an option of the server; `None` if it is missing or unknown."""
        return None if name is None or self.options is None else self.options.get(name)

    @property
    def is_ours(self) -> bool:
        """Whether uvicorn is configured to use `StableWebSocketProtocol`."""
        return OURS in str(self.option("ws"))


def version_of(server: ServerProfile) -> tuple[int, ...]:
    """Return the installed version of a server as numbers; `()` if it is not installed."""
    try:
        text = importlib.metadata.version(server.name)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


# ── the routes of an app ──


def unmanaged_routes(app: Any) -> tuple[str, ...]:
    """Return the paths of the WebSocket routes that do not seem to use this library.

    A route uses it through a dependency, or through a call of `connect` or `serve` in the endpoint or in a dependency.
    A class is an endpoint that always reads, so it does not count.
    """
    return tuple(
        path
        for path, route in websocket_routes(getattr(app, "routes", ()))
        if not inspect.isclass(route.endpoint) and not any(_serves(call) for call in callables_of(route))
    )


def callables_of(route: Any) -> Iterator[Callable[..., Any]]:
    """Yield the endpoint of a route and all its dependencies."""
    yield route.endpoint
    for dependant in dependants_of(route):
        if (call := call_of(dependant)) is not None:
            yield call


def dependants_of(route: Any) -> Iterator[Any]:
    """Yield FastAPI's `Dependant` of the endpoint of a route and of each dependency, at most `MAX_DEPENDENCIES`."""
    own = dependant_of(route)
    waiting = [] if own is None else [own]
    for _ in range(MAX_DEPENDENCIES):
        if not waiting:
            break
        dependant = waiting.pop()
        waiting.extend(dependencies_of(dependant))
        yield dependant


def _serves(call: Callable[..., Any]) -> bool:
    if str(getattr(call, "__module__", "")).startswith(OWN_MODULES):
        return True
    while isinstance(call, functools.partial):
        call = call.func
    function = inspect.unwrap(call)
    code = getattr(function, "__code__", None) or getattr(
        inspect.getattr_static(function, "__call__", None), "__code__", None
    )
    return code is not None and not SERVING_METHODS.isdisjoint(_names(code))


def _names(code: CodeType) -> Iterable[str]:
    """Yield the attributes that the code of a function and of its nested functions uses."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
