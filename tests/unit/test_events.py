"""Tests of the event bus, through which the core informs its listeners."""

from __future__ import annotations

import logging

import pytest

from fastapi_ws_stabilizer.events import MAX_THROTTLED_KINDS, THROTTLE_INTERVAL, Event, EventBus


def test_every_listener_gets_every_event() -> None:
    """An event reaches all listeners with its name, level and fields."""
    events = EventBus()
    first: list[Event] = []
    second: list[Event] = []
    events.subscribe(first.append)
    events.subscribe(second.append)
    events.emit("connection_opened", logging.INFO, client_id="ann")
    assert first == second == [Event("connection_opened", logging.INFO, {"client_id": "ann"})]


def test_unsubscribed_listener_gets_no_event() -> None:
    """The function that `subscribe` returns ends the subscription."""
    events = EventBus()
    heard: list[Event] = []
    stop = events.subscribe(heard.append)
    stop()
    events.emit("x", logging.INFO)
    assert heard == []


def test_listener_may_unsubscribe_during_call() -> None:
    """A listener that unsubscribes during an event does not affect the others."""
    events = EventBus()
    heard: list[str] = []

    def once(report: Event) -> None:
        heard.append("once")
        stop()

    stop = events.subscribe(once)
    events.subscribe(lambda report: heard.append("always"))
    events.emit("x", logging.INFO)
    events.emit("x", logging.INFO)
    assert heard == ["once", "always", "always"]


def test_failing_listener_is_logged_and_others_are_called(caplog: pytest.LogCaptureFixture) -> None:
    """The failure of one listener is logged, and the others still get the event."""
    events = EventBus()
    heard: list[Event] = []

    def broken(report: Event) -> None:
        raise ValueError("broken listener")

    events.subscribe(broken)
    events.subscribe(heard.append)
    events.emit("x", logging.INFO)
    assert len(heard) == 1
    assert [record.event for record in caplog.records] == ["listener_failed"]
    assert "broken listener" in caplog.text


def test_listener_gets_only_levels_it_takes() -> None:
    """A listener gets the events of the levels that it takes, and no event is created that no listener takes."""
    events = EventBus()
    taken: list[Event] = []
    every: list[Event] = []
    events.subscribe(taken.append, takes=lambda level: level >= logging.WARNING)
    events.emit("quiet", logging.INFO, payload=object())
    stop = events.subscribe(every.append)
    events.emit("info", logging.INFO)
    events.emit("warning", logging.WARNING)
    stop()
    assert [event.event for event in taken] == ["warning"]
    assert [event.event for event in every] == ["info", "warning"]


def test_event_without_taker_is_not_created(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that no listener takes costs one question, and no object."""
    created: list[str] = []
    monkeypatch.setattr("fastapi_ws_stabilizer.events.Event", lambda name, *_: created.append(name))
    events = EventBus()
    events.subscribe(lambda _: None, takes=lambda level: level >= logging.WARNING)
    events.emit("connection_opened", logging.INFO, client_id="ann")
    events.emit("server_full", logging.WARNING)
    assert created == ["server_full"]


def test_emit_exception_emits_error_event() -> None:
    """A bug is emitted at level ERROR with the exception itself."""
    events = EventBus()
    heard: list[Event] = []
    events.subscribe(heard.append)
    error = ValueError("bug")
    events.emit_exception("endpoint_failed", error, connection_id="5f")
    assert heard == [Event("endpoint_failed", logging.ERROR, {"connection_id": "5f"}, error)]


def test_counters_start_at_zero_and_are_per_manager() -> None:
    """Each manager has its own counters, which start at zero."""
    one, other = EventBus(), EventBus()
    one.counters.broadcasts += 1
    one.counters.endings["x"] += 1  # type: ignore[index]
    assert other.counters.broadcasts == 0
    assert not other.counters.endings


class Clock:
    """Clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("fastapi_ws_stabilizer.events.monotonic", lambda: self.now)


def test_throttled_event_is_emitted_once_per_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first event of a kind has its level, later ones are at DEBUG, and the next at its level has their number."""
    clock, events = Clock(monkeypatch), EventBus()
    heard: list[Event] = []
    events.subscribe(heard.append)
    assert events.emit_throttled("refused", logging.WARNING, "full", client="ann")
    assert not events.emit_throttled("refused", logging.WARNING, "full", client="bob")
    clock.now += THROTTLE_INTERVAL
    assert events.emit_throttled("refused", logging.WARNING, "full", client="cid")
    assert events.emit_throttled("refused", logging.INFO, "late", client="dan")
    assert heard == [
        Event("refused", logging.WARNING, {"client": "ann"}),
        Event("refused", logging.DEBUG, {"client": "bob"}),
        Event("refused", logging.WARNING, {"client": "cid", "more": 1}),
        Event("refused", logging.INFO, {"client": "dan"}),
    ]


def test_throttling_of_one_event_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds are counted for each event; when one event has too many, only its own kinds share a minute."""
    Clock(monkeypatch)
    events = EventBus()
    emitted = [events.emit_throttled("refused", logging.WARNING, f"{kind}") for kind in range(2 * MAX_THROTTLED_KINDS)]
    assert emitted == [True] * (MAX_THROTTLED_KINDS + 1) + [False] * (MAX_THROTTLED_KINDS - 1)
    assert events.emit_throttled("limited", logging.WARNING, "0")
    assert events.emit_throttled("limited", logging.WARNING, "")
