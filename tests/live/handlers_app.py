"""Endpoints that fail between two steps of a transaction, and exception handlers of the app."""

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
    """Error that the app has a handler for."""


class QuotaUsedUp(AppError):
    """Subclass of that error."""


class PaymentRequired(HTTPException):
    """HTTP error that the app defines."""


class Conflict(Exception):
    """Error that the app answers with a response."""


class Silent(Exception):
    """Error with a handler that does nothing."""


class Broken(Exception):
    """Error with a handler that fails."""


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


async def work(ws: Any, done: list[str], act: str) -> None:
    """Read a debit and then a credit; the client is lost between the two."""
    done.append(await ws.receive_text())
    if act == "send":
        while True:
            await ws.send_text("tick")
            await asyncio.sleep(0.01)
    if act == "wait":
        await asyncio.Event().wait()
    if act in ERRORS:
        raise ERRORS[act]
    done.append(await ws.receive_text())


@app.websocket("/before/{act}")
async def before(done: Transaction, ws: StableSocketDep, act: str) -> None:
    await work(ws, done, act)


@app.websocket("/after/{act}")
async def after(ws: StableSocketDep, done: Transaction, act: str) -> None:
    await work(ws, done, act)


@app.websocket("/adopt/{act}")
async def adopt(websocket: WebSocket, done: Transaction, act: str) -> None:
    await websocket.accept()
    await manager.connect("ann", websocket)
    await work(websocket, done, act)


@app.websocket("/adopt-socket/{act}")
async def adopt_socket(websocket: WebSocket, done: Transaction, act: str) -> None:
    await websocket.accept()
    await work(await manager.connect("ann", websocket), done, act)


@app.websocket("/run/{act}")
async def run(done: Transaction, ws: StableSocketDep, act: str) -> None:
    ws.user_data["act"] = act
    await ws.run()


@manager.on_message
async def handle(ws: StableSocket, message: str) -> None:
    raise ERRORS[ws.user_data["act"]]


@app.websocket("/task/{act}")
async def task(done: Transaction, ws: StableSocketDep, act: str) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.05)
        raise ERRORS[act]

    ws.create_task(fail())
    await ws.wait_closed()
