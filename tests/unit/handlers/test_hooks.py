"""Tests of hooks that an application registers for events."""

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
    """Do nothing."""


def plain_function(ws: Any) -> None:
    """Do nothing."""


class AsyncCallable:
    """Object with an async `__call__`."""

    async def __call__(self, ws: Any) -> None:
        """Do nothing."""

    async def method(self, ws: Any) -> None:
        """Do nothing."""


class PlainCallable:
    """Object with a sync `__call__`."""

    def __call__(self, ws: Any) -> None:
        """Do nothing."""


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
    """An async function is recognized through partials and callable objects."""
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
    """A function with fewer parameters gets the first arguments, and its defaults beyond them stay."""
    assert Signature(function, "on_disconnect", ("the socket", "the reason")).arguments == arguments


def test_hook_with_too_many_parameters_raises() -> None:
    """A function that cannot be called with the arguments of its event raises at registration."""
    with pytest.raises(TypeError, match=r"cannot be an on_connect function: it must take the socket"):
        HookRegistry(EventBus()).add("connect", lambda ws, more: None)


def test_hook_with_required_keyword_raises() -> None:
    """A required keyword parameter raises, because no event passes keyword arguments."""

    def need_keyword(ws: Any, *, db: Any) -> None:
        """Require a keyword argument."""

    with pytest.raises(TypeError, match="needs the keyword argument 'db'"):
        HookRegistry(EventBus()).add("connect", need_keyword)


async def test_sync_hook_runs_in_thread_pool() -> None:
    """A sync hook runs in the thread pool, so that it does not block the event loop."""
    threads: list[int] = []
    await Hook(lambda ws: threads.append(threading.get_ident()), 1)(SOCKET)
    assert threads != [threading.get_ident()]


async def test_async_hook_runs_on_event_loop() -> None:
    """An async hook is awaited on the event loop."""
    threads: list[int] = []

    async def hook(ws: Any) -> None:
        threads.append(threading.get_ident())

    await Hook(hook, 1)(SOCKET)
    assert threads == [threading.get_ident()]


async def test_coroutine_returned_by_sync_hook_is_awaited() -> None:
    """`manager.on_connect(lambda ws: ws.send("hi"))` sends the message."""
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
    """Hooks of one event run in order, and the first that raises stops the rest."""
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
    """A failing disconnect hook emits an event and calls the error hooks, and the other hooks run."""
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
    (event,) = heard.all
    assert (event.event, event.error) == ("disconnect_hook_failed", error)
    assert event.fields == {"client_id": "ann", "connection_id": "5f3a"}


async def test_failing_error_hook_does_not_stop_others() -> None:
    """A failing error hook emits an event, and the error hooks are not called for it."""
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
    assert [(event.event, event.error) for event in heard.all] == [("error_hook_failed", second)]


async def test_hanging_disconnect_hook_is_cancelled_at_limit() -> None:
    """A disconnect hook that exceeds its own limit is cancelled and reported, and the next one is called."""
    events = EventBus()
    recorded: list[str] = []
    events.subscribe(lambda event: recorded.append(event.event))
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
    assert recorded == ["disconnect_hook_failed"]


@pytest.mark.parametrize("event", ["disconnect", "session_end", "slow", "error"])
async def test_socket_closed_in_hook_is_logged_at_debug(event: str) -> None:
    """`SocketClosed` from a hook is logged at DEBUG, and the other hooks of the event are called."""
    events, heard, called = EventBus(), EventRecorder(), []
    events.subscribe(heard)
    hooks = HookRegistry(events)

    async def send_too_late(*_: Any) -> None:
        raise closed_error_for(local_close(DisconnectReason.CLIENT_CLOSE))

    hooks.add(event, send_too_late)
    hooks.add(event, lambda _: called.append("second"))
    socket: Any = SimpleNamespace(client_id="ann", connection_id="1")
    await getattr(hooks, event)(socket, DisconnectReason.COMPLETED)
    assert called == ["second"]
    assert [(event.event, event.level, event.error) for event in heard.all] == [("hook_stopped", logging.DEBUG, None)]
