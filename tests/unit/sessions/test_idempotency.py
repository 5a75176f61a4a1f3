"""Tests of idempotency keys: a repeated message is handled once, and its answer is repeated."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.sessions import idempotency
from fastapi_ws_stabilizer.sessions.idempotency import MAX_ANSWER_BYTES, IdempotencyCache
from fastapi_ws_stabilizer.sessions.replay_buffer import ReplayLimits
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.wire.v1.frames import Message

AGAIN = Message(None, id="c7", key="k")


def session_of(client_id: str = "ann") -> Session:
    """Return a session that stores its replies in its replay buffer."""
    return Session(client_id, 0, ReplayLimits(100, 10**6, 60.0), Counters(), lambda *_: None)


def replies(session: Session) -> list[dict[str, Any]]:
    """Return the replies."""
    return [json.loads(frame.payload) for frame in session.buffer.since(0)]


def test_new_key_is_unknown_until_handling_starts() -> None:
    """A key is new until handling of its message starts."""
    seen = IdempotencyCache()
    assert seen.look("ann", "k") is None
    seen.begin("ann", "k")
    assert seen.look("ann", "k") is not None
    assert len(seen) == 1


def test_keys_of_clients_are_separate() -> None:
    """Keys belong to a client id, and do not collide with those of another client."""
    seen = IdempotencyCache()
    seen.begin("ann", "k")
    assert seen.look("bob", "k") is None
    assert seen.look("annk", "") is None


def test_repeated_request_gets_stored_answer() -> None:
    """A repeated request gets the stored answer, in any session."""
    seen, first, second = IdempotencyCache(), session_of(), session_of()
    seen.begin("ann", "k")
    seen.complete(first, "k", {"sum": 3})
    known = seen.look("ann", "k")
    assert known is not None
    known.answer(second, AGAIN)
    known.answer(second, Message(None, id="c8", key="k"))
    assert [(reply["re"], reply["data"]) for reply in replies(second)] == [("c7", {"sum": 3}), ("c8", {"sum": 3})]
    assert replies(first) == []


def test_repeat_during_handling_waits_for_same_answer() -> None:
    """A repeat during handling is not handled, and waits for the same answer."""
    seen, session = IdempotencyCache(), session_of()
    seen.begin("ann", "k")
    known = seen.look("ann", "k")
    assert known is not None
    known.answer(session, AGAIN)
    assert replies(session) == []
    seen.complete(session_of(), "k", 5)
    assert replies(session) == [{"type": "reply", "re": "c7", "data": 5}]


def test_message_without_id_gets_no_answer() -> None:
    """For a message without an id, only the repeated handling is prevented."""
    seen, session = IdempotencyCache(), session_of()
    seen.begin("ann", "k")
    known = seen.look("ann", "k")
    assert known is not None
    known.answer(session, Message(None, key="k"))
    seen.complete(session, "k", 5)
    known.answer(session, Message(None, key="k"))
    assert replies(session) == []


@pytest.mark.parametrize("answer", ["x" * MAX_ANSWER_BYTES, object()], ids=["too large", "no JSON"])
def test_repeat_of_unstorable_answer_gets_error(answer: object) -> None:
    """Answers that are too large, or cannot be JSON, are not stored; a repeat gets an error."""
    seen, session = IdempotencyCache(), session_of()
    seen.begin("ann", "k")
    seen.complete(session, "k", answer)
    known = seen.look("ann", "k")
    assert known is not None
    known.answer(session, AGAIN)
    assert replies(session)[0]["error"]["code"] == "handled_before"


def test_answer_at_size_limit_is_stored() -> None:
    """The limit applies to the JSON of an answer, and is inclusive."""
    seen, session = IdempotencyCache(), session_of()
    seen.begin("ann", "k")
    seen.complete(session, "k", "x" * (MAX_ANSWER_BYTES - 2))
    known = seen.look("ann", "k")
    assert known is not None
    known.answer(session, AGAIN)
    assert len(replies(session)[0]["data"]) == MAX_ANSWER_BYTES - 2


def test_key_of_failed_message_is_reusable() -> None:
    """The key of a message that failed is new again."""
    seen = IdempotencyCache()
    seen.begin("ann", "k")
    seen.fail("ann", "k")
    seen.fail("ann", "k")
    assert seen.look("ann", "k") is None
    seen.complete(session_of(), "k", 1)
    assert len(seen) == 0


def test_repeat_of_failing_request_gets_error() -> None:
    """A repeat of a request that then fails gets an error, and does not wait forever."""
    seen, session = IdempotencyCache(), session_of()
    seen.begin("ann", "k")
    known = seen.look("ann", "k")
    assert known is not None
    known.answer(session, AGAIN)
    seen.fail("ann", "k")
    assert [reply["error"]["code"] for reply in replies(session)] == ["not_handled"]


def test_least_recent_client_is_evicted_above_key_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of all keys is limited; keys in recent use stay."""
    monkeypatch.setattr(idempotency, "MAX_KEYS", 3)
    seen = IdempotencyCache()
    for client_id, key in (("ann", "1"), ("bob", "1"), ("ann", "2"), ("carl", "1")):
        seen.begin(client_id, key)
    assert [seen.look(*known) is not None for known in (("ann", "1"), ("bob", "1"), ("carl", "1"))] == [
        True,
        False,
        True,
    ]
    assert len(seen) == 3


def test_oldest_key_of_client_is_evicted_above_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client displaces only its own keys."""
    monkeypatch.setattr(idempotency, "MAX_KEYS_PER_CLIENT", 3)
    seen = IdempotencyCache()
    seen.begin("bob", "1")
    for number in range(5):
        seen.begin("ann", str(number))
    assert seen.look("bob", "1") is not None
    assert [seen.look("ann", str(number)) is not None for number in range(5)] == [False, False, True, True, True]


def test_expired_key_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key removes expired ones."""
    now = [1000.0]
    monkeypatch.setattr(idempotency, "monotonic", lambda: now[0])
    seen = IdempotencyCache()
    seen.begin("ann", "old")
    now[0] += idempotency.MAX_AGE
    seen.begin("ann", "new")
    assert seen.look("ann", "old") is not None
    now[0] += 0.001
    seen.begin("ann", "newer")
    assert seen.look("ann", "old") is None
    assert len(seen) == 2
