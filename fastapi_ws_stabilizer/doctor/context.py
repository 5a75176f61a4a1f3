"""`DeploymentContext`: everything that the checks look at, collected once."""

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

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.doctor.network_path import NetworkPath
from fastapi_ws_stabilizer.doctor.servers import OURS, ServerProfile
from fastapi_ws_stabilizer.handshake.routes import websocket_routes

OWN_MODULES: Final = "fastapi_ws_stabilizer."

BY_HAND: Final = frozenset({"connect", "serve"})
"""Methods of a manager by which code takes a socket without a dependency of this library."""

MAX_DEPENDENCIES: Final = 500
"""How many dependencies of one route are looked through."""


@dataclass(frozen=True)
class DeploymentContext:
    """What is known of where a manager runs.

    Attributes:
        config: The options of the manager.
        server: The server; `None` if nobody has said and none is loaded.
        options: The server's options; `None` if they are not known, as in a process that runs already.
        version: The server's version, `()` if it is not installed here.
        python: The version of Python.
        way: What stands before the server.
        pre_stop: Seconds that a hook takes which the platform runs before SIGTERM.
        http2: Whether HTTP/2 is spoken all the way to the server.
        caching: Whether the platform caches the route.
        bypassing: Paths of WebSocket routes that this library does not serve.
        refuses: Whether hooks refuse connections before the accept.
        guarded: Whether hooks look at who comes, before or after it.
        logins: Names of HTTP middleware that looks like a login and does not run for WebSockets.
        unguarded: Paths of WebSocket routes behind it that do not ask who comes.
        early: Paths of WebSocket routes that ask it before the socket is there to hear a refusal.
        shadowed: Paths of WebSocket routes that are never reached, each with what takes its clients before.
        background: Paths of WebSocket routes that take `BackgroundTasks`.
        open_stats: Where the stats router is mounted without a dependency that can reject a caller.
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
        """An option of the server; `None` if it has no such option, or if its options are not known."""
        return None if name is None or self.options is None else self.options.get(name)

    @property
    def is_ours(self) -> bool:
        """Whether uvicorn is told to use `StableWebSocketProtocol`."""
        return OURS in str(self.option("ws"))


def version_of(server: ServerProfile) -> tuple[int, ...]:
    """The installed version of a server as numbers, `()` if it is not installed."""
    try:
        text = importlib.metadata.version(server.name)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


# ── the routes of an app ──


def unmanaged_routes(app: Any) -> tuple[str, ...]:
    """Paths of the WebSocket routes in which nothing of this library can be seen.

    That is neither a dependency of it, nor a call of `connect` or `serve` in the endpoint or in a dependency. A class
    is an endpoint that always reads, and is left out.
    """
    return tuple(
        path
        for path, route in websocket_routes(getattr(app, "routes", ()))
        if not inspect.isclass(route.endpoint) and not any(_serves(call) for call in callables_of(route))
    )


def callables_of(route: Any) -> Iterator[Callable[..., Any]]:
    """The endpoint of a route and all its dependencies."""
    yield route.endpoint
    waiting = [route.dependant] if hasattr(route, "dependant") else []
    for _ in range(MAX_DEPENDENCIES):
        if not waiting:
            break
        dependant = waiting.pop()
        waiting.extend(dependant.dependencies)
        if dependant.call is not None:
            yield dependant.call


def _serves(call: Callable[..., Any]) -> bool:
    if str(getattr(call, "__module__", "")).startswith(OWN_MODULES):
        return True
    while isinstance(call, functools.partial):
        call = call.func
    function = inspect.unwrap(call)
    code = getattr(function, "__code__", None) or getattr(
        inspect.getattr_static(function, "__call__", None), "__code__", None
    )
    return code is not None and not BY_HAND.isdisjoint(_names(code))


def _names(code: CodeType) -> Iterable[str]:
    """Attributes that a function's code uses, those of the functions in it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
