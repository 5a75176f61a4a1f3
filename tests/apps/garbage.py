"""App that counts what its ended connections leave to the garbage collector.

Automatic collections are off, so that `POST /collect` finds everything.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from starlette.routing import WebSocketRoute

from fastapi_ws_stabilizer import SocketClosed, StableSocket, WebSocketConfig, WebSocketConnectionManager

gc.disable()

QUIET: dict[str, Any] = {
    "log_level": "CRITICAL",
    "heartbeat_interval": 1000.0,
    "heartbeat_timeout": 1000.0,
    "disconnect_grace": 1.0,
    "handle_signals": False,
}


def make_manager(**options: Any) -> WebSocketConnectionManager:
    """Return a manager that says nothing."""
    return WebSocketConnectionManager(WebSocketConfig(**{**QUIET, **options}))


managers = {
    "main": make_manager(),
    "forgetful": make_manager(session_ttl=0.1),
    "beating": make_manager(heartbeat_interval=0.1, heartbeat_timeout=0.1, require_pong=True),
    "full": make_manager(max_connections_per_client=1, on_duplicate="allow"),
    "limited": make_manager(max_total_memory=10**9, max_memory_per_connection=10**7),
}


@managers["main"].on_handshake
async def handshake(ws: StableSocket) -> None:
    if ws.client_id.startswith("refused"):
        raise HTTPException(403)


@managers["main"].on_auth
async def auth(ws: StableSocket, credential: str | None) -> None:
    if credential == "wrong":
        raise HTTPException(401)


@managers["main"].on_connect
async def connect(ws: StableSocket) -> None:
    if ws.client_id.startswith("unwelcome"):
        raise HTTPException(403)
    await ws.join("lobby", {"name": ws.client_id})
    ws.user_data["note"] = ws.client_id


@managers["main"].on_message("fail")
async def fail(ws: StableSocket) -> None:
    raise ValueError("a bug in a handler")


@managers["main"].on_message("echo")
async def echo(ws: StableSocket, message: dict[str, Any]) -> None:
    await ws.send(message)


@managers["main"].on_disconnect
async def disconnect(ws: StableSocket) -> None:
    """Run a hook, as most applications do."""


@managers["main"].on_session_end
async def session_end(ws: StableSocket) -> None:
    """Run a hook, as most applications do."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for manager in managers.values():
            await stack.enter_async_context(manager.lifespan(app))
        yield


app = FastAPI(lifespan=lifespan)


async def resource() -> AsyncIterator[int]:
    """Dependency with a clean-up."""
    yield 1


@app.websocket("/bare/{client_id}")
async def bare(websocket: WebSocket, _: Annotated[int, Depends(resource)]) -> None:
    """Endpoint without the library, for comparison. It fails if the client asks for it."""
    await websocket.accept()
    try:
        while True:
            if await websocket.receive_text() == "fail":
                raise ValueError("a bug in an endpoint")
    except WebSocketDisconnect:
        pass


async def refuse() -> None:
    """Refuse the client, as a dependency does that checks a login."""
    raise HTTPException(403)


@app.websocket("/bare/refused/{client_id}", dependencies=[Depends(refuse)])
async def refused(websocket: WebSocket, _: Annotated[int, Depends(resource)]) -> None:
    """Endpoint that is never called."""


def add_endpoints(name: str, manager: WebSocketConnectionManager) -> None:
    """Add the endpoints of one manager."""

    @app.websocket(f"/{name}/run/{{client_id}}")
    async def run(ws: Annotated[StableSocket, Depends(manager.socket)]) -> None:
        await ws.run()

    @app.websocket(f"/{name}/read/{{client_id}}")
    async def read(ws: Annotated[StableSocket, Depends(manager.socket)]) -> None:
        async for text in ws:
            if text == "close":
                await ws.close(4000, "asked for")
                return
            await ws.send(text)

    @app.websocket(f"/{name}/concurrent/{{client_id}}")
    async def concurrent(ws: Annotated[StableSocket, Depends(manager.socket)]) -> None:
        await ws.run(concurrency=2)

    @app.websocket(f"/{name}/failing/{{client_id}}")
    async def failing(ws: Annotated[StableSocket, Depends(manager.socket)]) -> None:
        async def fail_in_task() -> None:
            raise ValueError("a bug in a task")

        async for _ in ws:
            ws.create_task(fail_in_task())

    @app.websocket(f"/{name}/task/{{client_id}}")
    async def task(ws: Annotated[StableSocket, Depends(manager.socket)]) -> None:
        ws.create_task(asyncio.sleep(1000))
        ws.reconnect_token()
        await ws.wait_closed()

    @app.websocket(f"/{name}/adopt/{{client_id}}")
    async def adopt(websocket: WebSocket, client_id: str) -> None:
        await websocket.accept()
        ws = await manager.connect(client_id, websocket, metadata={"name": client_id})
        async for text in ws:
            await ws.send(text)

    @app.websocket(f"/{name}/raw/{{client_id}}")
    async def raw(websocket: WebSocket, client_id: str) -> None:
        await websocket.accept()
        await manager.connect(client_id, websocket)
        try:
            while True:
                await websocket.send_text(await websocket.receive_text())
        except WebSocketDisconnect:
            await manager.disconnect(client_id)


for name, manager in managers.items():
    add_endpoints(name, manager)


async def untracked(websocket: WebSocket) -> None:
    """Endpoint of Starlette, without an exit stack that tells its end."""
    client_id = websocket.path_params["client_id"]
    await websocket.accept()
    ws = await managers["main"].connect(client_id, websocket)
    try:
        while True:
            await ws.send(await ws.receive())
    except SocketClosed:
        await asyncio.sleep(0.01)  # the connection has ended before the endpoint


app.router.routes.append(WebSocketRoute("/main/untracked/{client_id}", untracked))

being_served: set[int] = set()
"""Ids of the scopes of WebSockets that the application serves."""


class CountServed:
    """Middleware that knows which WebSockets are served."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            being_served.add(id(scope))
        try:
            await self.app(scope, receive, send)
        finally:
            being_served.discard(id(scope))


app.add_middleware(CountServed)


@app.post("/close")
async def close_all(code: int = 4001) -> int:
    """Close all connections, as an administrator does."""
    clients = [(one, client_id) for one in managers.values() for client_id in one.get_active_connections()]
    for one, client_id in clients:
        await one.disconnect(client_id, code=code)
    return len(clients)


def left() -> int:
    """Return how many connections and detached clients have not ended, and how many endpoints have not returned."""
    nodes = [one._node for one in managers.values()]
    detached = sum(node.sessions.detached_count + len(node.detached.states) for node in nodes)
    return sum(len(node.connections) for node in nodes) + detached + len(being_served)


@app.get("/connections")
async def connections() -> int:
    """Return the number of open connections."""
    return sum(one.get_connection_count() for one in managers.values())


@app.post("/collect")
async def collect() -> int:
    """Wait until everything has ended, and return the number of objects that only the collector could free."""
    idle, deadline = 0, asyncio.get_running_loop().time() + 20
    while idle < 20 and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
        idle = 0 if left() else idle + 1
    return gc.collect() if idle else -left()
