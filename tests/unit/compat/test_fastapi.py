"""Tests of the private parts of FastAPI, on the installed version."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, WebSocket
from fastapi.routing import APIWebSocketRoute

from fastapi_ws_stabilizer.compat.fastapi import find_exit_stack, included_dependencies, included_router
from tests.support.fake_websocket import FakeServer


async def test_exit_stack_is_closed_before_dependencies() -> None:
    """What is pushed on the stack in an endpoint runs before the clean-up of a dependency."""
    order: list[str] = []
    app = FastAPI()

    async def dependency() -> Any:
        yield
        order.append("dependency")

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket, _: None = Depends(dependency)) -> None:
        stack = find_exit_stack(websocket.scope)
        assert isinstance(stack, AsyncExitStack)
        stack.callback(order.append, "stack")
        await websocket.accept()
        order.append("endpoint")

    server = FakeServer()
    scope = {**server.websocket.scope, "root_path": "", "subprotocols": [], "http_version": "1.1"}
    await app(scope, server.receive, server.send)
    assert order == ["endpoint", "stack", "dependency"]


async def login() -> None:
    """Stand in for a login."""


def test_routes_of_included_router_are_found_with_prefix() -> None:
    """Each WebSocket route of an app is a route, or inside an included router with its prefix and dependencies."""
    router = APIRouter()

    @router.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None: ...

    app = FastAPI()
    app.include_router(router, prefix="/api", dependencies=[Depends(login)])
    found = []
    for route in app.routes:
        if isinstance(route, APIWebSocketRoute):  # older FastAPI copies the route
            found.append((route.path, [one.call for one in route.dependant.dependencies]))
        elif (included := included_router(route)) is not None:
            calls = [one.call for one in included_dependencies(included)]
            found += [(included.prefix + inner.path, calls) for inner in included.routes]
    assert found == [("/api/ws", [login])]


def test_other_routes_are_no_included_routers() -> None:
    """A plain route is not opened."""
    assert [included_router(route) for route in FastAPI().routes] == [None] * len(FastAPI().routes)
