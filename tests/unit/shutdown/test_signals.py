"""Tests of signals: how often they are forwarded, and the state after a manager has stopped."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.shutdown import signals
from fastapi_ws_stabilizer.shutdown.signals import SignalHandler
from tests.unit.conftest import EventRecorder


@pytest.fixture(autouse=True)
def server() -> Iterator[list[int]]:
    """Return the signals received by a server that has installed its handler first."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


class Draining:
    """Drain that ends when a test says so."""

    def __init__(self) -> None:
        self.count = 0
        self.finished = asyncio.Event()
        self.signals = SignalHandler(EventBus(), self)

    async def __call__(self) -> None:
        self.count += 1
        await self.finished.wait()


async def tell() -> None:
    """Send SIGTERM, and let its handlers run."""
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.02)


def in_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Use a clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(signals, "monotonic", lambda: now[0])

    def put(seconds: float) -> None:
        now[0] = 100.0 + seconds

    return put


async def test_signal_is_forwarded_once_after_drain(server: list[int]) -> None:
    """The server gets the signal once, after the drain."""
    drain = Draining()
    drain.signals.install()
    await tell()
    assert (drain.count, server) == (1, [])
    drain.finished.set()
    await asyncio.sleep(0.02)
    assert server == [signal.SIGTERM]
    drain.signals.restore()


async def test_quickly_repeated_signal_counts_once(server: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group and a master may both send the signal, so a quick repetition does not count."""
    put = in_time(monkeypatch)
    drain = Draining()
    drain.signals.install()
    await tell()
    put(0.3)
    await tell()
    assert (drain.count, server) == (1, [])
    drain.finished.set()
    await asyncio.sleep(0.02)
    assert server == [signal.SIGTERM]
    drain.signals.restore()


async def test_second_signal_is_forwarded_immediately_and_only_once(
    server: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvicorn would interpret a late first signal as a request to skip the end of the lifespan."""
    put = in_time(monkeypatch)
    drain = Draining()
    drain.signals.install()
    await tell()
    put(2.0)
    await tell()
    assert server == [signal.SIGTERM]
    drain.finished.set()
    await asyncio.sleep(0.02)
    assert server == [signal.SIGTERM]
    drain.signals.restore()


async def test_stopped_manager_forwards_every_signal(server: list[int]) -> None:
    """Every signal is forwarded, also if a library has installed a handler on top that calls the manager's."""
    drain = Draining()
    drain.signals.install()
    ours: Any = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: ours(number, frame))
    drain.signals.restore()
    await tell()
    await tell()
    assert (drain.count, server) == (0, [signal.SIGTERM, signal.SIGTERM])


@pytest.mark.parametrize("first", [0, 1])
async def test_two_managers_may_stop_in_any_order(server: list[int], first: int) -> None:
    """The process can be stopped after the first manager has stopped, and after both."""
    drains = [Draining(), Draining()]
    for drain in drains:
        drain.signals.install()
        drain.finished.set()
    drains[first].signals.restore()
    await tell()
    await asyncio.sleep(0.02)
    assert server == [signal.SIGTERM]
    assert [drain.count for drain in drains] == ([0, 1] if first == 0 else [1, 0])
    drains[1 - first].signals.restore()
    await tell()
    assert server == [signal.SIGTERM, signal.SIGTERM]


async def test_two_managers_drain_concurrently_on_signal(server: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first signal is forwarded when both are done, and a second one at once."""
    put = in_time(monkeypatch)
    drains = [Draining(), Draining()]
    for drain in drains:
        drain.signals.install()
    await tell()
    assert [drain.count for drain in drains] == [1, 1]
    drains[0].finished.set()
    await asyncio.sleep(0.02)
    assert server == []
    put(2.0)
    await tell()
    assert server == [signal.SIGTERM]
    drains[1].finished.set()
    await asyncio.sleep(0.02)
    assert server == [signal.SIGTERM]
    for drain in reversed(drains):
        drain.signals.restore()


async def test_restarted_manager_drains_again_on_signal(server: list[int]) -> None:
    """A restarted manager handles signals again, in the same loop and in another one."""
    drain = Draining()
    drain.finished.set()
    for times in (1, 2):
        drain.signals.install()
        await tell()
        await asyncio.sleep(0.02)
        assert (drain.count, len(server)) == (times, times)
        drain.signals.restore()
    assert not isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), SignalHandler)


async def test_previous_signal_handlers_are_restored(server: list[int]) -> None:
    """The previous handlers are restored, even in the middle of a drain."""
    before = signal.getsignal(signal.SIGTERM)
    drain = Draining()
    drain.signals.install()
    await tell()
    drain.signals.restore()
    drain.finished.set()
    await asyncio.sleep(0.02)
    assert server == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_listening_off_main_thread_is_reported_once() -> None:
    """Signals are delivered to the main thread only."""
    heard = EventRecorder()
    events = EventBus()
    events.subscribe(heard)
    listening = SignalHandler(events, Draining)  # type: ignore[arg-type]  # never called

    async def listen() -> None:
        listening.install()
        listening.install()

    thread = threading.Thread(target=lambda: asyncio.run(listen()))
    thread.start()
    thread.join()
    assert [event.event for event in heard.all] == ["signals_not_heard"]


async def test_handler_swallowing_signal_is_reported(server: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the process still runs some seconds after the signal was forwarded, a warning names its handler."""
    monkeypatch.setattr(signals, "STILL_RUNNING_DELAY", 0.1)
    heard = EventRecorder()

    def swallow(number: int, _: Any) -> None:
        server.append(number)

    signal.signal(signal.SIGTERM, swallow)
    drain = Draining()
    drain.signals._events.subscribe(heard)
    drain.finished.set()
    drain.signals.install()
    await tell()
    await asyncio.sleep(0.2)
    assert server == [signal.SIGTERM]
    (event,) = heard.of("still_running")
    assert event.fields["signal"] == "SIGTERM"
    assert "swallow" in event.fields["handler"]
    drain.signals.restore()


@pytest.mark.parametrize("again", [False, True], ids=["stopped", "started again"])
async def test_end_after_forwarded_signal_is_not_reported(
    server: list[int], monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Nothing is reported when the lifespan ends, or starts again, before that time."""
    monkeypatch.setattr(signals, "STILL_RUNNING_DELAY", 0.1)
    heard = EventRecorder()
    drain = Draining()
    drain.signals._events.subscribe(heard)
    drain.finished.set()
    drain.signals.install()
    await tell()
    assert server == [signal.SIGTERM]
    drain.signals.install() if again else drain.signals.restore()
    await asyncio.sleep(0.2)
    assert heard.of("still_running") == []
    drain.signals.restore()


async def test_still_running_report_uses_context_of_manager(server: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal in code of a client is forwarded there, but the report runs in the manager's context."""
    monkeypatch.setattr(signals, "STILL_RUNNING_DELAY", 0.01)
    put = in_time(monkeypatch)
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")
    contexts: list[str] = []
    drain = Draining()
    drain.signals._events.subscribe(lambda event: contexts.append(tenant.get()))
    drain.signals.install()

    async def code_of_a_client() -> None:
        tenant.set("ann's")
        await tell()
        put(5.0)
        await tell()

    await asyncio.create_task(code_of_a_client())
    await asyncio.sleep(0.1)
    assert contexts == ["none"]
    drain.finished.set()
    drain.signals.restore()
