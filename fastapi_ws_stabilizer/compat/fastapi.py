"""Private parts of FastAPI that the package relies on.

Supported: FastAPI 0.115 and newer. Each function names its fallback: what is missing on a version that does not have
the part. `tests/unit/compat/test_fastapi.py` runs on the lowest and on the newest version.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, Final, NamedTuple

from fastapi.routing import APIWebSocketRoute

EXIT_STACK_KEYS: Final = ("fastapi_function_astack", "fastapi_inner_astack", "fastapi_astack")
"""Keys of the scope under which FastAPI stores the exit stacks of a connection. The one that closes first comes first.
The names have changed over its versions."""


def find_exit_stack(scope: Mapping[str, Any]) -> AsyncExitStack | None:
    """Return the exit stack that FastAPI closes first when the endpoint of a connection ends.

    Fallback: `None`. The connection then detects the end of its endpoint only after the other dependencies are closed.
    """
    for name in EXIT_STACK_KEYS:
        stack = scope.get(name)
        if isinstance(stack, AsyncExitStack):
            return stack
    return None


class IncludedRouter(NamedTuple):
    """A router that newer FastAPI stores unchanged inside the app that includes it.

    Attributes:
        routes: The routes of the router.
        prefix: The prefix of the inclusion.
        context: FastAPI's record of the inclusion.
    """

    routes: Any
    prefix: str
    context: Any


def included_router(route: Any) -> IncludedRouter | None:
    """Return the router of an entry in `app.routes`; `None` if the entry is another kind of route.

    Called for each handshake and each router of the app, so it only reads attributes. Fallback: `None`. Older FastAPI
    copies the routes of a router into the app, so there is nothing to unwrap.
    """
    router = getattr(route, "original_router", None)
    if router is None:
        return None
    context = getattr(route, "include_context", None)
    return IncludedRouter(router.routes, str(getattr(context, "prefix", "")), context)


def included_dependencies(included: IncludedRouter) -> list[Any]:
    """Return the dependencies that a router was included with, as FastAPI solves them.

    FastAPI solves the dependencies of a route when it makes the route, which takes about 0.5 ms, so this makes one.
    Fallback: no dependencies.
    """
    dependencies = getattr(included.context, "dependencies", None) or []
    return APIWebSocketRoute("/", _no_endpoint, dependencies=dependencies).dependant.dependencies


async def _no_endpoint() -> None:
    """Placeholder endpoint of a route that exists only to resolve its dependencies."""
