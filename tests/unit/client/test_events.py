"""Tests of the listeners of a client."""

from __future__ import annotations

from typing import Any

import pytest

from fastapi_ws_stabilizer.client.events import EVENTS, ClientEvents
from fastapi_ws_stabilizer.tasks import TaskSet
from tests.support.fake_websocket import settle


def made() -> tuple[ClientEvents, list[BaseException]]:
    """Return listeners, and the failures of their tasks."""
    failures: list[BaseException] = []
    return ClientEvents(TaskSet(lambda _, error: failures.append(error))), failures


@pytest.mark.parametrize("event", EVENTS)
def test_listener_gets_only_its_event(event: str) -> None:
    """The decorator returns its function, and the listener gets only its event."""
    listeners, _ = made()
    heard: list[Any] = []

    def listener(*args: Any) -> None:
        heard.append(args)

    assert listeners.add(event, listener) is listener
    for other in EVENTS:
        listeners.emit(other, other, 1)
    assert heard == [(event, 1)]


def test_listeners_run_in_registration_order(caplog: pytest.LogCaptureFixture) -> None:
    """A failing listener is logged, and the listeners after it are called."""
    listeners, _ = made()
    heard: list[str] = []
    listeners.add("open", lambda _: heard.append("first"))
    listeners.add("open", lambda _: 1 / 0)
    listeners.add("open", lambda _: heard.append("third"))
    listeners.emit("open", "none")
    assert heard == ["first", "third"]
    assert [record.getMessage() for record in caplog.records] == ["a listener for 'open' failed"]


def test_client_listener_may_unsubscribe_during_call() -> None:
    """Unsubscribing during a call does not affect other listeners in that call, and takes effect afterwards."""
    listeners, _ = made()
    heard: list[str] = []

    def once(_: str) -> None:
        heard.append("once")
        listeners.remove("open", once)

    listeners.add("open", once)
    listeners.add("open", lambda _: heard.append("always"))
    listeners.emit("open", "none")
    listeners.emit("open", "none")
    assert heard == ["once", "always", "always"]


async def test_async_listener_runs_in_its_own_task() -> None:
    """The emitter does not wait, and a failure belongs to the task."""
    listeners, failures = made()
    heard: list[str] = []

    async def listener(outcome: str) -> None:
        heard.append(outcome)
        raise KeyError("broken")

    listeners.add("open", listener)
    listeners.emit("open", "full")
    assert heard == []
    await settle()
    assert heard == ["full"]
    assert [type(failure) for failure in failures] == [KeyError]
