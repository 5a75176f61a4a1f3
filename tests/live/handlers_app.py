"""Endpoints that stop half-way, with a transaction before and behind the socket, and exception handlers of the app."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketException
from fastapi.responses import JSONResponse

from fastapi_ws_stabilizer import (
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
    configure_logging,
)

configure_logging()
manager = WebSocketConnectionManager(WebSocketConfig(disconnect_grace=0.5, heartbeat_type="off"))
app = FastAPI(lifespan=manager.lifespan)
events: list[str] = []


class AppError(Exception):
    """What the app has a handler for."""


class QuotaUsedUp(AppError):
    """A subclass of it."""


class PaymentRequired(HTTPException):
    """An HTTP error of the app's own."""


class Conflict(Exception):
    """What the app answers with a response."""


class Silent(Exception):
    """What the app has a handler for that does nothing."""


class Broken(Exception):
    """What the app has a handler for that fails."""


@app.exception_handler(AppError)
async def app_error(connection: Any, error: AppError) -> None:
    await connection.close(4290, f"quota used up: {error}")


@app.exception_handler(PaymentRequired)
def payment_required(connection: Any, error: PaymentRequired) -> None:
    events.append(f"handled {type(error).__name__} {error.detail}")


@app.exception_handler(Conflict)
async def conflict(connection: Any, error: Conflict) -> JSONResponse:
    return JSONResponse({"detail": "conflict"}, 409)


@app.exception_handler(Silent)
def silent(connection: Any, error: Silent) -> None:
    events.append("handled Silent")


@app.exception_handler(Broken)
async def broken(connection: Any, error: Broken) -> None:
    raise LookupError("the handler fails")


@app.exception_handler(WebSocketException)
async def websocket_error(connection: Any, error: WebSocketException) -> None:
    events.append(f"handled WebSocketException {error.code}")
    await connection.close(error.code, "by the app")


ERRORS = {
    "quota": QuotaUsedUp("ann"),
    "payment": PaymentRequired(402, "pay"),
    "conflict": Conflict(),
    "silent": Silent(),
    "broken": Broken(),
    "bug": ZeroDivisionError("a bug"),
    "http": HTTPException(404, "no such room"),
    "websocket": WebSocketException(4321, "mine"),
}


async def transaction(websocket: WebSocket) -> AsyncIterator[list[str]]:
    done: list[str] = []
    try:
        yield done
    except BaseException as error:
        events.append(f"rollback {type(error).__name__} {done}")
        raise
    events.append(f"commit {done}")


Transaction = Annotated[list[str], Depends(transaction)]


@app.get("/probe")
async def probe() -> dict[str, Any]:
    return {"events": events, "endings": {reason.value: n for reason, n in manager.counters.endings.items()}}


@manager.on_error
async def on_error(ws: StableSocket, error: BaseException) -> None:
    events.append(f"bug {type(error).__name__}")


async def work(ws: Any, done: list[str], way: str) -> None:
    """Debit, and credit: the client is lost between the two."""
    done.append(await ws.receive_text())
    if way == "send":
        while True:
            await ws.send_text("tick")
            await asyncio.sleep(0.01)
    if way == "wait":
        await asyncio.Event().wait()
    if way in ERRORS:
        raise ERRORS[way]
    done.append(await ws.receive_text())


@app.websocket("/before/{way}")
async def before(done: Transaction, ws: StableSocketDep, way: str) -> None:
    await work(ws, done, way)


@app.websocket("/behind/{way}")
async def behind(ws: StableSocketDep, done: Transaction, way: str) -> None:
    await work(ws, done, way)


@app.websocket("/hand/{way}")
async def hand(websocket: WebSocket, done: Transaction, way: str) -> None:
    await websocket.accept()
    await manager.connect("ann", websocket)
    await work(websocket, done, way)


@app.websocket("/hand-socket/{way}")
async def hand_socket(websocket: WebSocket, done: Transaction, way: str) -> None:
    await websocket.accept()
    await work(await manager.connect("ann", websocket), done, way)


@app.websocket("/run/{way}")
async def run(done: Transaction, ws: StableSocketDep, way: str) -> None:
    ws.user_data["way"] = way
    await ws.run()


@manager.on_message
async def handle(ws: StableSocket, message: str) -> None:
    raise ERRORS[ws.user_data["way"]]


@app.websocket("/task/{way}")
async def task(done: Transaction, ws: StableSocketDep, way: str) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.05)
        raise ERRORS[way]

    ws.create_task(fail())
    await ws.wait_closed()
