"""App of most live tests, with a route for each behaviour and a probe of its state."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketDisconnect, WebSocketException
from pydantic import BaseModel

from fastapi_ws_stabilizer import (
    DisconnectReason,
    SocketClosed,
    StableSocket,
    StableSocketDep,
    configure_logging,
    stable_socket,
    stats_router,
)
from tests.support.live_apps import collect_garbage, manager_from_env

configure_logging(json_lines=bool(os.environ.get("TEST_JSON_LOG")))
manager = manager_from_env(logs=False)
events: list[str] = []
released = asyncio.Event()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
    async with manager.lifespan(app) as state:
        yield state
    print("LIFESPAN ended", flush=True)


app = FastAPI(lifespan=lifespan)


class TracingMiddleware:
    """Middleware that wraps both ASGI callables, as a tracer does, for paths with the query `wrapped`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not scope.get("query_string", b"").startswith(b"wrapped"):
            await self.app(scope, receive, send)
            return

        async def traced_receive() -> Any:
            return await receive()

        async def traced_send(message: Any) -> None:
            task = asyncio.current_task()
            await send(message)
            assert asyncio.current_task() is task

        await self.app(scope, traced_receive, traced_send)


app.add_middleware(TracingMiddleware)
app.include_router(stats_router, prefix="/ws-stats")


def note(event: str) -> None:
    events.append(event)
    print("NOTE", event, flush=True)


@app.get("/probe")
async def probe() -> dict[str, Any]:
    return {
        "connections": manager.get_connection_count(),
        "clients": manager.get_active_connections(),
        "tasks": sorted(task.get_name() for task in asyncio.all_tasks()),
        "events": events,
        "endings": {reason.value: count for reason, count in manager.counters.endings.items()},
        "discarded": manager.counters.messages_discarded,
        "unread_bytes": sum(socket.unread_bytes for socket in manager.get_sockets()),
        "price": app.state.price,
        "max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


@app.post("/collect")
async def collect() -> dict[str, int]:
    return collect_garbage()


@app.post("/prices")
async def prices(seconds: float, rate: float, size: int) -> None:
    """Broadcast numbered values of which only the latest counts."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        if app.state.price < passed * rate:
            app.state.price += 1
            await manager.broadcast(f"{app.state.price:08d}".ljust(size, "x"), coalesce_key="price")
        else:
            await asyncio.sleep(0.001)


app.state.price = 0


@app.post("/broadcast")
async def broadcast(count: int, size: int, pause: float = 0.0) -> dict[str, Any]:
    slowest = 0.0
    failed = 0
    for number in range(count):
        started = time.perf_counter()
        result = await manager.broadcast(f"{number:08d}".ljust(size, "x"))
        slowest = max(slowest, time.perf_counter() - started)
        failed += result.failed
        if pause:
            await asyncio.sleep(pause)
    return {"slowest": slowest, "failed": failed}


@app.post("/forget")
async def forget() -> bool:
    events.clear()
    return True


@app.post("/release")
async def release() -> bool:
    released.set()
    return True


@app.post("/shutdown")
async def shutdown() -> int:
    return (await manager.graceful_shutdown(5)).closed_count


@app.post("/kick/{client_id}")
async def kick(client_id: str) -> bool:
    await manager.disconnect(client_id, 4403, "kicked")
    return True


@app.post("/send/{client_id}")
async def send(client_id: str, text: str, times: int = 1) -> bool:
    return all([await manager.send_to_client(client_id, text) for _ in range(times)])


# ── hooks ──


@manager.on_connect
async def connected(ws: StableSocket) -> None:
    if ws.query_params.get("connect") == "boom":
        raise ValueError("on_connect")
    if ws.query_params.get("connect") == "403":
        raise HTTPException(403, "not you")
    note(f"connect {ws.client_id}")


@manager.on_disconnect
async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
    assert ws.close_info is not None
    note(f"disconnect {ws.client_id} {reason.value} {ws.close_info.code}")


@manager.on_error
async def failed(ws: StableSocket, error: BaseException) -> None:
    note(f"error {ws.client_id} {type(error).__name__}")


# ── dependencies with clean-up ──


async def slow_resource(websocket: WebSocket) -> AsyncIterator[str]:
    name = websocket.path_params.get("client_id", "?")
    try:
        yield "open"
    except BaseException as error:
        note(f"rollback {name} {type(error).__name__}")
        raise
    else:
        note(f"commit {name}")
    finally:
        await asyncio.sleep(0.2)
        note(f"released {name}")


Resource = Annotated[str, Depends(slow_resource)]


async def slow_auth() -> None:
    await asyncio.sleep(1)


def later_401(ws: StableSocketDep) -> None:
    raise HTTPException(401, "token expired")


# ── endpoints ──


@app.websocket("/echo/{client_id}")
async def echo(ws: StableSocket = Depends(stable_socket)) -> None:
    async for message in ws:
        await ws.send(message)


@app.websocket("/idle/{client_id}")
async def idle(ws: StableSocketDep, resource: Resource) -> None:
    try:
        await asyncio.Queue[None]().get()
    except asyncio.CancelledError:
        note(f"cancelled {ws.client_id}")
        raise


@app.websocket("/idle-resource-first/{client_id}")
async def idle_resource_first(resource: Resource, ws: StableSocketDep) -> None:
    await asyncio.Queue[None]().get()


@app.websocket("/push/{client_id}")
async def push(ws: StableSocketDep, resource: Resource) -> None:
    try:
        while True:
            await ws.send("tick")
            await asyncio.sleep(0.05)
    except SocketClosed:
        note(f"push ended {ws.client_id}")
        raise


@app.websocket("/flood/{client_id}")
async def flood(ws: StableSocketDep) -> None:
    try:
        while True:
            await ws.send_bytes(b"x" * 65536)
    except SocketClosed as closed:
        note(f"flood ended {ws.client_id} {closed.close_info.cause.value}")


@app.websocket("/flush/{client_id}")
async def flush(ws: StableSocketDep, count: int, size: int, close: bool = True) -> None:
    """Queue more than the network takes at once, then close, which flushes, or read."""
    for number in range(count):
        await manager.send_to_client(ws.client_id, f"{number:08d}".ljust(size, "x"))
    note(f"queued {ws.client_id}")
    if close:
        await ws.close(4001, "bye")
        note(f"closed {ws.client_id}")
    async for _ in ws:
        pass


@app.websocket("/read-later/{client_id}")
async def read_later(ws: StableSocketDep) -> None:
    """Read nothing until `/release`, then answer each message with its first 8 characters."""
    await released.wait()
    async for message in ws:
        await ws.send(message[:8])


@app.websocket("/slow-finish/{client_id}")
async def slow_finish(ws: StableSocketDep) -> None:
    async for message in ws:
        await ws.send(message)
    await asyncio.sleep(2)
    note(f"finished {ws.client_id}")


@app.websocket("/slow-auth/{client_id}")
async def after_slow_auth(auth: Annotated[None, Depends(slow_auth)], ws: StableSocketDep) -> None:
    await ws.run()


@app.websocket("/three-senders/{client_id}")
async def three_senders(ws: StableSocketDep, delay: float) -> None:
    async def talk() -> None:
        while True:
            await ws.send("x" * 100)
            await asyncio.sleep(0)

    async def end() -> None:
        await asyncio.sleep(delay)
        await ws.close(4000, "enough")

    for _ in range(3):
        ws.create_task(talk())
    ws.create_task(end())
    async for _ in ws:
        pass


@app.websocket("/return/{client_id}")
async def return_after(ws: StableSocketDep, size: int = 0) -> None:
    if size:
        await ws.send_bytes(b"x" * size)


@app.websocket("/raise/{client_id}")
async def raise_error(ws: StableSocketDep, resource: Resource, what: str) -> None:
    if what == "value":
        raise ValueError("a bug")
    if what == "http":
        raise HTTPException(404, "no such room")
    if what == "websocket":
        raise WebSocketException(4321, "mine")
    if what == "disconnect":
        raise WebSocketDisconnect(1000)
    raise HTTPException(401, "é" * 200)


@app.websocket("/raise-resource-first/{client_id}")
async def raise_resource_first(resource: Resource, ws: StableSocketDep) -> None:
    raise ValueError("a bug")


@app.websocket("/later-401/{client_id}")
async def reject_later(ws: StableSocketDep, late: Annotated[None, Depends(later_401)]) -> None:
    note("the endpoint ran")


def current_user(token: str = "") -> str:
    if not token:
        raise HTTPException(401, "no token")
    return token


@app.websocket("/identified")
async def identified(ws: Annotated[StableSocket, Depends(manager.socket_for(current_user))]) -> None:
    await ws.send(ws.client_id)


@manager.on_handshake
async def handshake(ws: StableSocket) -> None:
    if ws.query_params.get("handshake") == "403":
        raise HTTPException(403, "not you")
    if ws.query_params.get("handshake") == "boom":
        raise ValueError("on_handshake")


@app.websocket("/needs-number/{client_id}")
async def needs_number(ws: StableSocketDep, number: int) -> None:
    note("the endpoint ran")


@app.websocket("/close/{client_id}")
async def close(ws: StableSocketDep, code: int, reason: str = "") -> None:
    try:
        await ws.close(code, reason)
        await ws.close(code, reason)
    except ValueError as error:
        note(f"refused {error}")


@app.websocket("/await-tied/{client_id}")
async def await_tied(ws: StableSocketDep) -> None:
    async def push() -> None:
        while True:
            await ws.send("tick")
            await asyncio.sleep(0.05)

    await asyncio.gather(ws.create_task(push()), ws.create_task(asyncio.Queue[None]().get()))


@app.websocket("/tied-run/{client_id}")
async def tied_run(ws: StableSocketDep) -> None:
    await asyncio.wait([ws.create_task(ws.run())])


@app.websocket("/group/{client_id}")
async def task_group(ws: StableSocketDep, what: str = "") -> None:
    """Read and push in a task group, which fails with an exception group."""

    async def push() -> None:
        while True:
            if what == "401":
                raise HTTPException(401, "expired")
            if what == "bug":
                raise ValueError("a bug")
            await ws.send("tick")
            await asyncio.sleep(0.05)

    async def read() -> None:
        while True:
            await ws.receive()

    async with asyncio.TaskGroup() as group:
        group.create_task(push())
        group.create_task(read())


@app.websocket("/own-cancel/{client_id}")
async def own_cancel(ws: StableSocketDep) -> None:
    task = asyncio.create_task(asyncio.Queue[None]().get())
    await asyncio.sleep(0)
    task.cancel()
    await task


@app.websocket("/relay/{client_id}")
async def relay(ws: StableSocketDep) -> None:
    async for message in ws:
        await manager.broadcast(message, exclude_client=ws.client_id)


@app.websocket("/two-readers/{client_id}")
async def two_readers(ws: StableSocketDep) -> None:
    first = ws.create_task(ws.receive_text())
    await asyncio.sleep(0)
    try:
        await ws.receive_text()
    except Exception as error:
        await ws.send(type(error).__name__)
    await ws.send(await first)


@app.websocket("/ten-writers/{client_id}")
async def ten_writers(ws: StableSocketDep) -> None:
    async def write(writer: int) -> None:
        for number in range(100):
            await ws.send(f"{writer} {number} " + "x" * 500)
            if number % 10 == 0:
                await asyncio.sleep(0)

    await asyncio.gather(*(ws.create_task(write(writer)) for writer in range(10)))


@app.websocket("/run/{client_id}")
async def run(ws: StableSocketDep, concurrency: int = 1) -> None:
    await ws.run(concurrency=concurrency)


class Wait(BaseModel):
    seconds: float
    name: str


@manager.on_message("wait")
async def wait(ws: StableSocket, message: Wait) -> None:
    await asyncio.sleep(message.seconds)
    note(f"handled {message.name}")
    await ws.send(message.name)


@manager.on_message("sync-wait")
def sync_wait(ws: StableSocket, message: Wait) -> None:
    time.sleep(message.seconds)
    note(f"sync {message.name}")


@manager.on_message("echo")
async def typed_echo(ws: StableSocket, message: dict[str, Any]) -> None:
    await ws.send(message)


@manager.on_message("boom")
async def boom(ws: StableSocket) -> None:
    raise ValueError("a bug in a handler")


# ── WebSockets of the application itself ──


@app.websocket("/unattached/{client_id}")
async def unattached(websocket: WebSocket) -> None:
    """Echo without the library."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


# ── adopted WebSockets ──


@app.websocket("/adopt/{client_id}")
async def adopt(websocket: WebSocket, client_id: str) -> None:
    await websocket.accept()
    try:
        await manager.connect(client_id, websocket, {"plan": "gold"})
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        await manager.disconnect(client_id)


@app.websocket("/adopt-slow/{client_id}")
async def adopt_slow(websocket: WebSocket, client_id: str) -> None:
    await websocket.accept()
    await manager.connect(client_id, websocket)
    try:
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        await asyncio.sleep(1)
        await manager.disconnect(client_id)
        note(f"adopt-slow finished {client_id}")


@app.websocket("/adopt-return/{client_id}")
async def adopt_return(websocket: WebSocket, client_id: str) -> None:
    await websocket.accept()
    await manager.connect(client_id, websocket)


@app.websocket("/adopt-raise/{client_id}")
async def adopt_raise(websocket: WebSocket, client_id: str, resource: Resource) -> None:
    await websocket.accept()
    await manager.connect(client_id, websocket)
    raise ValueError("a bug")


@app.websocket("/adopt-idle/{client_id}")
async def adopt_idle(websocket: WebSocket, client_id: str) -> None:
    await websocket.accept()
    await manager.connect(client_id, websocket)
    await asyncio.Queue[None]().get()


@app.websocket("/adopt-busy/{client_id}")
async def adopt_busy(websocket: WebSocket, client_id: str, operation: str) -> None:
    """Adopt a WebSocket on which a task still waits, in `send` or in `receive`."""
    await websocket.accept()

    async def work() -> None:
        try:
            if operation == "send":
                for _ in range(400):
                    await websocket.send_bytes(b"x" * 65536)
                note("worked")
            else:
                note(f"worked {await websocket.receive_text()}")
        except Exception as error:
            note(f"worked {type(error).__name__}")

    working = asyncio.create_task(work())
    await asyncio.sleep(0)  # the task runs until it waits
    socket = await manager.connect(client_id, websocket)
    note("adopted")
    await socket.wait_closed()
    await asyncio.wait([working])
