"""Tests of the functions that users register for events."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from fastapi_ws_stabilizer.close_codes import DisconnectReason, local_close
from fastapi_ws_stabilizer.errors import closed_error_for
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handlers.hooks import Hook, HookRegistry
from fastapi_ws_stabilizer.handlers.signatures import Signature, is_async
from tests.unit.conftest import EventRecorder

SOCKET: Any = SimpleNamespace(client_id="ann", connection_id="5f3a")


async def coroutine_function(ws: Any) -> None:
    """Async."""


def plain_function(ws: Any) -> None:
    """Not async."""


class AsyncCallable:
    """An object whose call is async."""

    async def __call__(self, ws: Any) -> None:
        """Async."""

    async def method(self, ws: Any) -> None:
        """Async."""


class PlainCallable:
    """An object whose call is not async."""

    def __call__(self, ws: Any) -> None:
        """Not async."""


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (coroutine_function, True),
        (functools.partial(functools.partial(coroutine_function)), True),
        (AsyncCallable(), True),
        (functools.partial(AsyncCallable()), True),
        (AsyncCallable().method, True),
        (plain_function, False),
        (functools.partial(plain_function), False),
        (PlainCallable(), False),
        (lambda ws: None, False),
    ],
)
def test_async_functions_are_recognized(function: Any, expected: bool) -> None:
    """Partials and callable objects are looked through."""
    assert is_async(function) is expected


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lambda: None, 0),
        (lambda ws: None, 1),
        (lambda ws, reason: None, 2),
        (lambda ws, reason, extra=1: None, 2),
        (lambda ws, *, option=1: None, 1),
        (lambda *args: None, 2),
        (functools.partial(lambda db, ws, reason: None, "db"), 2),
    ],
)
def test_hook_receives_as_many_arguments_as_it_takes(function: Any, arguments: int) -> None:
    """A function that takes fewer arguments gets the first ones, and defaults beyond them stay."""
    assert Signature(function, "on_disconnect", ("the socket", "the reason")).arguments == arguments


def test_hook_with_too_many_parameters_raises() -> None:
    """A function that could not be called is refused when it is registered, by name."""
    with pytest.raises(TypeError, match=r"cannot be an on_connect function: it must take the socket"):
        HookRegistry(EventBus()).add("connect", lambda ws, more: None)


def test_hook_with_required_keyword_raises() -> None:
    """Nobody would give the keyword argument."""

    def needs(ws: Any, *, db: Any) -> None:
        """Cannot be called with a socket."""

    with pytest.raises(TypeError, match="needs the keyword argument 'db'"):
        HookRegistry(EventBus()).add("connect", needs)


async def test_sync_hook_runs_in_thread_pool() -> None:
    """Blocking user code does not block the event loop."""
    threads: list[int] = []
    await Hook(lambda ws: threads.append(threading.get_ident()), 1)(SOCKET)
    assert threads != [threading.get_ident()]


async def test_async_hook_runs_on_event_loop() -> None:
    """An async hook is awaited where it is called."""
    threads: list[int] = []

    async def hook(ws: Any) -> None:
        threads.append(threading.get_ident())

    await Hook(hook, 1)(SOCKET)
    assert threads == [threading.get_ident()]


async def test_coroutine_returned_by_sync_hook_is_awaited() -> None:
    """`manager.on_connect(lambda ws: ws.send("hi"))` does what it says."""
    sent: list[str] = []

    async def send(text: str) -> None:
        sent.append(text)

    coroutines: list[Any] = []

    def hook(ws: Any) -> Any:
        coroutines.append(send("hi"))
        return coroutines[0]

    await Hook(hook, 1)(SOCKET)
    for coroutine in coroutines:
        coroutine.close()
    assert sent == ["hi"]


@pytest.mark.parametrize(("event", "args"), [("handshake", ()), ("connect", ())])
async def test_hooks_run_in_registration_order_until_one_raises(event: str, args: tuple[Any, ...]) -> None:
    """Several hooks of one event run one after the other, and the first that raises stops them."""
    hooks = HookRegistry(EventBus())
    order: list[int] = []
    hooks.add(event, lambda ws: order.append(1))

    async def second(ws: Any) -> None:
        await asyncio.sleep(0)
        order.append(2)

    def third() -> None:
        raise ValueError("refused")

    hooks.add(event, second)
    hooks.add(event, third)
    hooks.add(event, lambda: order.append(4))
    with pytest.raises(ValueError, match="refused"):
        await getattr(hooks, event)(SOCKET, *args)
    assert order == [1, 2]


async def test_failing_disconnect_hook_does_not_stop_others() -> None:
    """A failing disconnect hook is reported and told to the error hooks; the others run."""
    events, heard = EventBus(), EventRecorder()
    events.subscribe(heard)
    hooks = HookRegistry(events)
    calls: list[Any] = []
    error = ValueError("bug")

    def fail(ws: Any) -> None:
        raise error

    hooks.add("disconnect", fail)
    hooks.add("disconnect", lambda ws, reason: calls.append(reason))
    hooks.add("error", lambda ws, error: calls.append(error))
    await hooks.disconnect(SOCKET, DisconnectReason.CLIENT_CLOSE)
    assert calls == [error, DisconnectReason.CLIENT_CLOSE]
    (report,) = heard.all
    assert (report.event, report.error) == ("disconnect_hook_failed", error)
    assert report.fields == {"client_id": "ann", "connection_id": "5f3a"}


async def test_failing_error_hook_does_not_stop_others() -> None:
    """A failing error hook is reported, and does not call the error hooks again."""
    events, heard = EventBus(), EventRecorder()
    events.subscribe(heard)
    hooks = HookRegistry(events)
    calls: list[Any] = []
    first, second = ValueError("bug"), KeyError("bug in the hook")

    def fail(ws: Any, error: BaseException) -> None:
        raise second

    hooks.add("error", fail)
    hooks.add("error", lambda ws, error: calls.append(error))
    await hooks.error(SOCKET, first)
    assert calls == [first]
    assert [(report.event, report.error) for report in heard.all] == [("error_hook_failed", second)]


async def test_hanging_disconnect_hook_is_cancelled_at_limit() -> None:
    """Each disconnect hook has its own limit; the one that passes it is cancelled and told, and the next is called."""
    events = EventBus()
    told: list[str] = []
    events.subscribe(lambda report: told.append(report.event))
    hooks = HookRegistry(events, limit=0.02)
    called: list[str] = []

    async def hang(_: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            called.append("cancelled")
            raise

    hooks.add("disconnect", hang)
    hooks.add("disconnect", lambda _: called.append("second"))
    socket: Any = SimpleNamespace(client_id="ann", connection_id="1")
    await asyncio.wait_for(hooks.disconnect(socket, DisconnectReason.COMPLETED), 5)
    assert sorted(called) == ["cancelled", "second"]
    assert told == ["disconnect_hook_failed"]


@pytest.mark.parametrize("event", ["disconnect", "session_end", "slow", "error"])
async def test_socket_closed_in_hook_is_logged_at_debug(event: str) -> None:
    """`SocketClosed` that a hook lets escape is a debug line, and the other hooks of the event are still called."""
    events, heard, called = EventBus(), EventRecorder(), []
    events.subscribe(heard)
    hooks = HookRegistry(events)

    async def sends_too_late(*_: Any) -> None:
        raise closed_error_for(local_close(DisconnectReason.CLIENT_CLOSE))

    hooks.add(event, sends_too_late)
    hooks.add(event, lambda _: called.append("second"))
    socket: Any = SimpleNamespace(client_id="ann", connection_id="1")
    await getattr(hooks, event)(socket, DisconnectReason.COMPLETED)
    assert called == ["second"]
    assert [(report.event, report.level, report.error) for report in heard.all] == [
        ("hook_stopped", logging.DEBUG, None)
    ]
