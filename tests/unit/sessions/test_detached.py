"""Tests of the detached state of plain clients."""

from __future__ import annotations

from typing import Any

import pytest

from fastapi_ws_stabilizer.memory.metered_dict import MeteredDict
from fastapi_ws_stabilizer.sessions import detached as detached_module
from fastapi_ws_stabilizer.sessions.detached import DetachedState, DetachedStateStore

ROOMS = {"lobby": {"name": "Ann"}}


class Clock:
    """Clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(detached_module, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a fake clock."""
    return Clock(monkeypatch)


def save(
    detached: DetachedStateStore,
    client_id: str,
    rooms: dict[str, dict[str, str]],
    user_data: dict[str, Any] | None,
    socket: str,
) -> list[DetachedState]:
    """Save a state."""
    return detached.save(
        client_id, DetachedState(rooms, MeteredDict(None, None, user_data), 0.0, socket, detached.discard)
    )


def sockets_of(evicted: list[DetachedState]) -> list[object]:
    """Return the owners of states."""
    return [state.socket for state in evicted]


def test_returning_client_gets_detached_state_once(clock: Clock) -> None:
    """Rooms, presence metadata and user data are returned once."""
    detached = DetachedStateStore(60, 10)
    assert save(detached, "ann", ROOMS, {"cart": [1]}, "socket") == []
    assert len(detached) == 1
    state = detached.claim("ann")
    assert state is not None
    assert (state.rooms, state.user_data, state.socket) == (ROOMS, {"cart": [1]}, "socket")
    assert detached.claim("ann") is None


def test_unknown_client_gets_no_detached_state() -> None:
    """A client without saved state gets nothing."""
    assert DetachedStateStore(60, 10).claim("ann") is None


def test_detached_state_expires_after_ttl(clock: Clock) -> None:
    """A client that reconnects too late gets nothing."""
    detached = DetachedStateStore(60, 10)
    save(detached, "ann", ROOMS, None, "ann")
    clock.now += 30
    save(detached, "bob", ROOMS, None, "bob")
    assert detached.next_due() == 1060.0
    clock.now += 29.9
    assert detached.collect() == []
    clock.now += 0.1
    assert sockets_of(detached.collect()) == ["ann"]
    assert detached.next_due() == 1090.0
    assert detached.claim("ann") is None


def test_expired_uncollected_state_is_not_returned(clock: Clock) -> None:
    """Expired state is not returned, even if it was not collected yet."""
    detached = DetachedStateStore(60, 10)
    save(detached, "ann", ROOMS, None, "ann")
    clock.now += 60
    assert detached.claim("ann") is None


def test_save_collects_expired_state(clock: Clock) -> None:
    """Saving a state removes expired ones."""
    detached = DetachedStateStore(60, 10)
    save(detached, "ann", ROOMS, None, "ann")
    clock.now += 60
    assert sockets_of(save(detached, "bob", ROOMS, None, "bob")) == ["ann"]


def test_last_connection_of_client_decides_detached_state(clock: Clock) -> None:
    """A later state of a client replaces the earlier one, and its ttl starts again."""
    detached = DetachedStateStore(60, 10)
    save(detached, "ann", ROOMS, None, "first")
    save(detached, "bob", ROOMS, None, "bob")
    clock.now += 10
    assert sockets_of(save(detached, "ann", {}, {"n": 2}, "second")) == ["first"]
    clock.now += 50
    assert sockets_of(detached.collect()) == ["bob"]
    state = detached.claim("ann")
    assert state is not None
    assert state.socket == "second"


def test_oldest_state_is_evicted_above_limit(clock: Clock) -> None:
    """Above the limit, the oldest state is evicted."""
    detached = DetachedStateStore(60, 2)
    evicted = [sockets_of(save(detached, client_id, ROOMS, None, client_id)) for client_id in ("ann", "bob", "cid")]
    assert evicted == [[], [], ["ann"]]
    assert len(detached) == 2


def test_clear_returns_all_detached_state(clock: Clock) -> None:
    """At shutdown all states are returned, so that their end can be announced."""
    detached = DetachedStateStore(60, 10)
    for client_id in ("ann", "bob"):
        save(detached, client_id, ROOMS, None, client_id)
    assert sockets_of(detached.clear()) == ["ann", "bob"]
    assert len(detached) == 0
    assert detached.next_due() is None
    assert detached.collect() == []
