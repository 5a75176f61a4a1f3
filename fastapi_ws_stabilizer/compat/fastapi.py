"""Private parts of FastAPI that the package relies on.

Supported: FastAPI 0.115 and newer. Each function names its fallback: what is missing on a version that does not have
the part. `tests/unit/compat/test_fastapi.py` runs on the lowest and on the newest version.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, Final, NamedTuple

from fastapi import HTTPException, exception_handlers
from fastapi.responses import JSONResponse, Response
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


# ── the dependencies of a route ──

_CONNECTION_FIELDS: Final = (
    "path_params",
    "query_params",
    "header_params",
    "cookie_params",
    "request_param_name",
    "websocket_param_name",
    "http_connection_param_name",
)
"""Fields of a FastAPI dependency that name what it reads from a connection."""


def dependant_of(route: Any) -> Any:
    """Return FastAPI's `Dependant` of the endpoint of a route.

    Fallback: `None`, as for a route of Starlette. The doctor then sees the endpoint alone.
    """
    return getattr(route, "dependant", None)


def dependencies_of(dependant: Any) -> list[Any]:
    """Return the dependencies of a `Dependant`, as further ones, in the order of the signature. Fallback: none."""
    return list(getattr(dependant, "dependencies", None) or ())


def route_dependencies(route: Any) -> list[Any]:
    """Return the dependencies of a route, those of `dependencies=` first. Fallback: none."""
    return dependencies_of(dependant_of(route))


def call_of(dependant: Any) -> Any:
    """Return the function or object that FastAPI calls for a `Dependant`. Fallback: `None`."""
    return getattr(dependant, "call", None)


def reads_connection(dependant: Any) -> bool:
    """Return whether a `Dependant` itself reads a parameter, a header or the connection. Fallback: `False`."""
    return any(getattr(dependant, name, None) for name in _CONNECTION_FIELDS)


def takes_background_tasks(dependant: Any) -> bool:
    """Return whether a `Dependant` itself takes `BackgroundTasks`. Fallback: `False`."""
    return getattr(dependant, "background_tasks_param_name", None) is not None


# ── exception handlers ──


def is_handler_of_fastapi(handler: Any) -> bool:
    """Return whether FastAPI has registered an exception handler itself: a function of its module.

    Fallback: `False`. The handler then counts as the application's own.
    """
    return getattr(handler, "__module__", None) == exception_handlers.__name__


async def http_answer(error: HTTPException) -> Response:
    """Return FastAPI's answer for an error. FastAPI's handler gets no request, because it reads none.

    Fallback: if it reads one, the answer that it gives today, as JSON. Awaiting this never waits, so a cancellation
    has no effect.

    Raises:
        TypeError: The detail cannot be encoded as JSON.
        ValueError: The detail cannot be encoded as JSON.
    """
    try:
        return await exception_handlers.http_exception_handler(None, error)  # type: ignore[arg-type]
    except AttributeError:
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
