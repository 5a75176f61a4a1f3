"""Profiles of ASGI servers: their options with defaults, and their limits.

Options have the names of the server's command line, with underscores. The facts come from the sources and from tests
with uvicorn 0.54, hypercorn 0.18, granian 2.8, daphne 4.2, gunicorn 27 and uvicorn-worker 0.4.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

OURS: Final = "StableWebSocketProtocol"


@dataclass(frozen=True)
class ServerProfile:
    """Profile of one ASGI server.

    Attributes:
        name: Its name.
        modules: Modules of which at least one is loaded while it runs.
        options: The options that the checks use, with their default values.
        ping_interval: Option with the seconds between two pings; `None` if it sends no pings.
        graceful_timeout: Option that limits its shutdown; `None` if it has none.
        bounds_drain: Whether that timeout starts at SIGTERM. The master process then also kills a worker that is still
            draining.
        recyclers: Options that end healthy workers, and their sockets with them.
        lifetime: Option with the maximum lifetime of a WebSocket, in seconds.
        sends_denials: Whether the status of a rejection before the accept reaches the client.
        sends_every_code: Whether it sends close codes below 3000 other than 1000.
    """

    name: str
    modules: tuple[str, ...]
    options: Mapping[str, Any] = field(hash=False)
    ping_interval: str | None = None
    graceful_timeout: str | None = None
    bounds_drain: bool = False
    recyclers: tuple[str, ...] = ()
    lifetime: str | None = None
    sends_denials: bool = True
    sends_every_code: bool = True

    @property
    def is_uvicorn(self) -> bool:
        """Whether uvicorn's protocols serve its sockets."""
        return self.name in ("uvicorn", "uvicorn-worker")


_UVICORN: Final = {
    "workers": 1,
    "ws": "auto",
    "ws_ping_interval": 20.0,
    "ws_ping_timeout": 20.0,
    "timeout_graceful_shutdown": None,
    "limit_concurrency": None,
    "limit_max_requests": None,
    "reload": False,
}


def _server(name: str, modules: tuple[str, ...], options: Mapping[str, Any], **fields: Any) -> ServerProfile:
    return ServerProfile(name, modules, MappingProxyType(dict(options)), **fields)


SERVERS: Final[Mapping[str, ServerProfile]] = MappingProxyType(
    {
        server.name: server
        for server in (
            # In the order of detection: gunicorn loads uvicorn, and so may an app that another server runs.
            _server(
                "granian",
                ("granian",),
                {"workers": 1, "workers_lifetime": None, "workers_max_rss": None, "reload": False},
                recyclers=("workers_lifetime", "workers_max_rss", "reload"),
            ),
            _server(
                "hypercorn",
                ("hypercorn",),
                {
                    "workers": 1,
                    "websocket_ping_interval": None,
                    "graceful_timeout": 3.0,
                    "max_requests": None,
                    "reload": False,
                },
                ping_interval="websocket_ping_interval",
                graceful_timeout="graceful_timeout",
                recyclers=("max_requests", "reload"),
            ),
            _server(
                "daphne",
                ("daphne",),
                {"ping_interval": 20.0, "ping_timeout": 30.0, "websocket_timeout": 86400.0},
                ping_interval="ping_interval",
                lifetime="websocket_timeout",
                sends_denials=False,
                sends_every_code=False,
            ),
            _server(
                "uvicorn-worker",
                ("uvicorn_worker", "uvicorn.workers"),
                {**_UVICORN, "graceful_timeout": 30.0, "max_requests": 0},
                ping_interval="ws_ping_interval",
                graceful_timeout="graceful_timeout",
                bounds_drain=True,
                recyclers=("max_requests", "reload"),
            ),
            _server(
                "gunicorn",
                ("gunicorn.workers.gasgi",),
                {"workers": 1, "graceful_timeout": 30.0, "max_requests": 0, "reload": False},
                graceful_timeout="graceful_timeout",
                bounds_drain=True,
                recyclers=("max_requests", "reload"),
                sends_denials=False,
            ),
            _server(
                "uvicorn",
                ("uvicorn",),
                _UVICORN,
                ping_interval="ws_ping_interval",
                graceful_timeout="timeout_graceful_shutdown",
                recyclers=("limit_max_requests", "reload"),
            ),
        )
    }
)
"""Known servers by name."""

WORDS: Final = frozenset({"ws", "reload"})
"""Options with values that are not numbers."""


def find_server(name: str) -> ServerProfile:
    """Return the profile of a server.

    Raises:
        ValueError: The server is unknown; the error lists the known ones.
    """
    try:
        return SERVERS[name]
    except KeyError:
        raise ValueError(f"unknown server {name!r}; known servers: {', '.join(sorted(SERVERS))}") from None


def running_server() -> ServerProfile | None:
    """Return the server that seems to run this process; `None` if none is loaded."""
    return next((server for server in SERVERS.values() if not sys.modules.keys().isdisjoint(server.modules)), None)


def with_defaults(server: ServerProfile, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return all options of a server that the checks use. Other options are dropped.

    Raises:
        ValueError: A name looks like a misspelt option, or a value is not a number where one is required.
    """
    options = dict(server.options)
    for spelt, value in given.items():
        name = spelt.lstrip("-").replace("-", "_")
        if name not in options:
            if similar := difflib.get_close_matches(name, options, n=1, cutoff=0.9):
                raise ValueError(f"{server.name} has no option {name!r}; did you mean {similar[0]!r}?")
            continue
        if name not in WORDS and not (value is None or type(value) in (int, float)):
            raise ValueError(f"{name} of {server.name} must be a number or None, not {value!r}")
        options[name] = getattr(value, "__name__", value)  # `ws` may be a class
    return options
