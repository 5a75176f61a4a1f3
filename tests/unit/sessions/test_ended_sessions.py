"""Tests of the records of sessions that the application has ended."""

from __future__ import annotations

import pytest

from fastapi_ws_stabilizer.close_codes import DisconnectReason, local_close
from fastapi_ws_stabilizer.sessions import ended_sessions as ended_module
from fastapi_ws_stabilizer.sessions.ended_sessions import EndedSessions

BANNED = local_close(DisconnectReason.APPLICATION, code=4403, reason="banned")
MAINTENANCE = local_close(DisconnectReason.APPLICATION, code=4321)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a clock that a test moves."""
    now = [1000.0]
    monkeypatch.setattr(ended_module, "monotonic", lambda: now[0])
    return now


def test_terminal_code_answers_each_resume() -> None:
    """A code that forbids reconnecting is found at every attempt of the client."""
    ended = EndedSessions(60)
    ended.add("token", "ann", BANNED)
    assert [ended.find("token", "ann") for _ in range(2)] == [BANNED, BANNED]


def test_other_code_answers_one_resume() -> None:
    """A code that allows reconnecting is found once."""
    ended = EndedSessions(60)
    ended.add("token", "ann", MAINTENANCE)
    assert [ended.find("token", "ann") for _ in range(2)] == [MAINTENANCE, None]


def test_other_client_finds_no_ended_session() -> None:
    """The key of one client finds nothing for another one, and stays."""
    ended = EndedSessions(60)
    ended.add("token", "ann", MAINTENANCE)
    assert (ended.find("token", "bob"), ended.find("unknown", "ann")) == (None, None)
    assert "token" in ended


def test_key_alone_finds_ended_session_of_anonymous_client() -> None:
    """If the client is anonymous, its key is sufficient."""
    ended = EndedSessions(60)
    ended.add("token", "ann", BANNED)
    assert (ended.find("token", None), ended.find("unknown", None)) == (BANNED, None)


def test_ended_session_is_forgotten_after_ttl(clock: list[float]) -> None:
    """A record expires after the ttl, which starts again when a session with the same key ends."""
    ended = EndedSessions(60)
    ended.add("token", "ann", BANNED)
    ended.add("other", "bob", BANNED)
    clock[0] += 30
    ended.add("token", "ann", BANNED)
    clock[0] += 31
    assert ("token" in ended, "other" in ended, len(ended)) == (True, False, 1)
    clock[0] += 30
    assert ended.find("token", "ann") is None


def test_number_of_ended_sessions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit, the oldest record is removed first."""
    monkeypatch.setattr(ended_module, "MAX_ENDED", 2)
    ended = EndedSessions(60)
    for name in ("a", "b", "c"):
        ended.add(name, "ann", BANNED)
    assert [name in ended for name in "abc"] == [False, True, True]


def test_forgotten_ended_session_is_not_found() -> None:
    """A client that is allowed again gets no close code."""
    ended = EndedSessions(60)
    ended.add("token", "ann", BANNED)
    ended.forget("token")
    ended.forget("token")
    assert ended.find("token", "ann") is None
