"""Dependencies and exception handlers of the application see how an endpoint ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from websockets.asyncio.client import connect

from tests.support.server import LiveServer, until

KINDS = ("uvicorn-sansio", "uvicorn-wsproto", "uvicorn-stable")


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """One server of each kind."""
    with LiveServer(request.param, app="tests.live.handlers_app:app") as server:
        yield server


async def new_events(server: LiveServer, before: int, word: str) -> list[str]:
    """Return the events after `before`, once one begins with `word`."""
    await until(lambda: any(event.startswith(word) for event in server.events()[before:]))
    return server.events()[before:]


@pytest.mark.parametrize("how", ["abort", "close"])
@pytest.mark.parametrize("act", ["read", "send", "wait"])
@pytest.mark.parametrize("route", ["before", "after", "adopt", "adopt-socket"])
async def test_lost_client_rolls_back_every_dependency(server: LiveServer, route: str, act: str, how: str) -> None:
    """A client lost in mid-transaction rolls back every dependency, in each order of the parameters."""
    before, errors = len(server.events()), len(server.errors())
    ws = await connect(server.url(f"/{route}/{act}"))
    await ws.send("debit ann 100")
    await asyncio.sleep(0.1)
    if how == "abort":
        ws.transport.abort()
    else:
        await ws.close()
    events = await new_events(server, before, "rollback")
    assert not [event for event in events if event.startswith("commit")]
    assert next(event for event in events if event.startswith("rollback")).endswith("['debit ann 100']")
    assert not [event for event in events if event.startswith("handled")], "a lost client is no application error"
    assert len(server.errors()) == errors, server.log[-2000:]


ANSWERS = {
    "quota": (4290, "quota used up: ann", []),
    "payment": (4402, "pay", ["handled PaymentRequired pay"]),
    "conflict": (4409, "Conflict", []),
    "silent": (1011, "internal error", ["handled Silent"]),
    "broken": (1011, "internal error", ["bug LookupError"]),
    "bug": (1011, "internal error", ["bug ZeroDivisionError"]),
    "http": (4404, "no such room", []),
    "websocket": (4321, "by the app", ["handled WebSocketException 4321"]),
}


@pytest.mark.parametrize("act", ANSWERS)
@pytest.mark.parametrize("route", ["before", "after", "adopt", "adopt-socket", "run", "task"])
async def test_exception_handler_of_app_decides_close_code(server: LiveServer, route: str, act: str) -> None:
    """The app's exception handler decides the close code for errors of endpoints, message handlers and tasks."""
    code, reason, handler_events = ANSWERS[act]
    before, errors = len(server.events()), len(server.errors())
    async with connect(server.url(f"/{route}/{act}")) as ws:
        await ws.send("x")
        await ws.wait_closed()
        assert (ws.close_code, ws.close_reason) == (code, reason)
    transaction_end = "rollback" if route != "task" else "commit"
    events = await new_events(server, before, transaction_end)
    expected = [*handler_events, *(event for event in events if event.startswith(("rollback", "commit")))]
    assert sorted(events) == sorted(expected)
    is_bug = any(event.startswith("bug") for event in handler_events)
    lines = [line for line in server.errors()[errors:] if " ERROR " in line or "ASGI" in line]
    assert len(lines) == is_bug, server.log[-3000:]
