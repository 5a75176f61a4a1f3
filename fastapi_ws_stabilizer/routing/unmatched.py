"""Say in the log why a WebSocket handshake got a 403: no route has its path.

Starlette answers a WebSocket for which there is no route with a bare 403, which looks like a refusal. The first few
such paths are logged together with the paths that exist.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Final

from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send

from fastapi_ws_stabilizer.reports import Reports

MAX_TOLD: Final = 10
"""How many different unmatched paths are told. A scanner must not fill the log."""


class UnmatchedSockets:
    """Stands before a router's default app and tells which WebSocket paths nobody serves."""

    def __init__(self, router: Any, reports: Reports) -> None:
        self._router = router
        self._default = router.default
        self._reports = reports
        self._told: set[str] = set()

    @classmethod
    def watch(cls, app: Any, reports: Reports) -> None:
        """Begin to watch an app's router; nothing happens if it is watched already or has no such default."""
        router: Any = getattr(app, "router", None)
        default = getattr(router, "default", None)
        if callable(default) and not isinstance(default, cls):
            router.default = cls(router, reports)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell, and let the router's own default answer."""
        path = str(scope.get("path"))
        if scope["type"] == "websocket" and path not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(path)
            known = sorted(set(websocket_paths(self._router.routes)))
            self._reports.tell("no_websocket_route", logging.WARNING, path=path, known=", ".join(known) or "none")
        await self._default(scope, receive, send)


def websocket_paths(routes: Iterable[Any]) -> Iterator[str]:
    """The paths of all WebSocket routes, those of mounted apps and included routers too."""
    return (path for path, _ in websocket_routes(routes))


def websocket_routes(routes: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, WebSocketRoute]]:
    """All WebSocket routes, those of mounted apps and included routers too, each with its whole path."""
    for route in routes:
        if isinstance(route, WebSocketRoute):
            yield prefix + route.path, route
            continue
        # A mount has `path` and `routes`; newer FastAPI keeps an included router whole, with its prefix beside it.
        included = getattr(route, "original_router", None)
        inner = getattr(route if included is None else included, "routes", None) or ()
        path = (
            getattr(getattr(route, "include_context", None), "prefix", "") if included else getattr(route, "path", "")
        )
        yield from websocket_routes(inner, prefix + str(path))
