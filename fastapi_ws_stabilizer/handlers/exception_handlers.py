"""Exception handlers of the application: `@app.exception_handler(...)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

from fastapi import HTTPException as FastAPIHTTPException
from fastapi import WebSocket
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from fastapi_ws_stabilizer.compat.fastapi import is_handler_of_fastapi
from fastapi_ws_stabilizer.compat.starlette import is_handler_of_starlette, known_handlers
from fastapi_ws_stabilizer.errors import root_cause
from fastapi_ws_stabilizer.handlers.signatures import is_async

Handler = Callable[[Any, Any], Any]

_OF_HTTP: Final = (HTTPException, FastAPIHTTPException)


def handler_of(websocket: WebSocket, error: BaseException) -> Handler | None:
    """Return the application's own handler for an error, or `None`.

    The lookup is that of Starlette: by status, then by the classes of the error. Handlers that FastAPI and Starlette
    register themselves do not count.
    """
    handlers, by_status = known_handlers(websocket) or ({}, {})
    found = by_status.get(error.status_code) if isinstance(error, HTTPException) else None
    if found is None:
        found = next((handlers[kind] for kind in type(error).__mro__ if kind in handlers), None)
    return None if found is None or _is_of_framework(found) else found


def handler_for_endpoint(websocket: WebSocket, error: BaseException) -> Handler | None:
    """Return the application's own handler for an error of an endpoint on an accepted WebSocket, or `None`.

    A handler for `HTTPException` itself or for a status does not count, because it is for HTTP. On a WebSocket the
    close code contains the status.
    """
    error = root_cause(error)
    handlers, _ = known_handlers(websocket) or ({}, {})
    for kind in type(error).__mro__:
        if kind in handlers:
            found: Handler = handlers[kind]
            return None if kind in _OF_HTTP or _is_of_framework(found) else found
    return None


async def call(handler: Handler, websocket: WebSocket, error: BaseException) -> Any:
    """Call a handler, in the thread pool if it is not async, and return its result."""
    error = root_cause(error)
    if is_async(handler):
        return await handler(websocket, error)
    answer = await run_in_threadpool(handler, websocket, error)
    return await answer if inspect.isawaitable(answer) else answer


def _is_of_framework(handler: Any) -> bool:
    return is_handler_of_starlette(handler) or is_handler_of_fastapi(handler)
