"""Tests of the requests of the application to one client."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.close_codes import DisconnectReason, local_close
from fastapi_ws_stabilizer.errors import RequestError, SessionEndedError
from fastapi_ws_stabilizer.sessions import requests as requests_module
from fastapi_ws_stabilizer.sessions.requests import PendingRequests
from tests.support.fake_websocket import settle, with_deadline

ENDED = local_close(DisconnectReason.COMPLETED)


async def test_answer_resolves_its_own_request() -> None:
    """Each request has its own id, and its answer goes to its own future."""
    requests = PendingRequests()
    (first_id, first), (second_id, second) = requests.open(), requests.open()
    assert first_id != second_id
    requests.resolve(second_id, {"b": 2}, None)
    requests.resolve(first_id, None, None)
    assert (await first, await second) == (None, {"b": 2})


async def test_error_answer_raises_in_caller() -> None:
    """An error of the client is raised where its answer is awaited."""
    requests = PendingRequests()
    request_id, future = requests.open()
    requests.resolve(request_id, None, {"code": "busy", "message": "later"})
    with pytest.raises(RequestError, match="busy: later") as caught:
        await future
    assert (caught.value.code, caught.value.message) == ("busy", "later")


@pytest.mark.parametrize("error", ["no", 7, [], {}, {"code": 7}, {"code": "x" * 10_000, "message": ["y" * 10_000]}])
async def test_malformed_error_answer_raises_short_error(error: Any) -> None:
    """Any error value of a client becomes an error with a short text."""
    requests = PendingRequests()
    request_id, future = requests.open()
    requests.resolve(request_id, None, error)
    with pytest.raises(RequestError) as caught:
        await future
    assert len(caught.value.code) <= 64
    assert len(caught.value.message) <= 1024


async def test_unexpected_answer_is_ignored() -> None:
    """A repeated, late or unknown answer has no effect."""
    requests = PendingRequests()
    requests.resolve("s1", 1, None)
    request_id, future = requests.open()
    requests.resolve(request_id, 1, None)
    requests.resolve(request_id, 2, None)
    assert await future == 1
    late_id, late = requests.open()
    requests.forget(late_id)
    requests.resolve(late_id, 1, None)
    assert not late.done()
    cancelled_id, cancelled = requests.open()
    cancelled.cancel()
    requests.resolve(cancelled_id, 1, None)


async def test_forgetting_unknown_request_is_silent() -> None:
    """Forgetting an unknown request is not an error."""
    PendingRequests().forget("s1")


async def test_number_of_pending_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of pending requests is limited; a forgotten request makes room."""
    monkeypatch.setattr(requests_module, "MAX_OPEN", 2)
    requests = PendingRequests()
    first, _ = requests.open()
    requests.open()
    with pytest.raises(RequestError, match="2 requests") as caught:
        requests.open()
    assert caught.value.code == "too_many"
    requests.forget(first)
    requests.open()


async def test_ack_wakes_all_waiters_up_to_its_number() -> None:
    """An acknowledgement wakes all waiters for numbers up to its own."""
    requests = PendingRequests()
    waiting = {seq: asyncio.ensure_future(requests.until_acknowledged(seq)) for seq in (1, 2, 3)}
    await settle()
    requests.acknowledge(2)
    await settle()
    assert [seq for seq, task in waiting.items() if task.done()] == [1, 2]
    requests.acknowledge(5)
    await with_deadline(waiting[3])


async def test_wait_for_already_acked_number_returns_at_once() -> None:
    """An earlier acknowledgement counts, and a lower one revokes nothing."""
    requests = PendingRequests()
    requests.acknowledge(4)
    requests.acknowledge(2)
    await with_deadline(requests.until_acknowledged(4))
    requests.fail_all(ENDED)
    await with_deadline(requests.until_acknowledged(4))


async def test_wait_for_number_in_gap_fails() -> None:
    """Waiting for a message in a gap fails; messages that the client did get count as acknowledged."""
    requests = PendingRequests()
    waiting = [asyncio.ensure_future(requests.until_acknowledged(seq)) for seq in (1, 2, 3)]
    await settle()
    requests.fail_after_gap(1)
    await settle()
    assert waiting[0].exception() is None
    for task in waiting[1:]:
        error = task.exception()
        assert isinstance(error, RequestError)
        assert error.code == "missed"
    later = asyncio.ensure_future(requests.until_acknowledged(4))
    await settle()
    requests.acknowledge(4)
    await with_deadline(later)


async def test_gap_without_waiters_fails_nothing() -> None:
    """A gap without waiters fails nothing."""
    PendingRequests().fail_after_gap(3)


async def test_cancelled_ack_waiter_is_forgotten() -> None:
    """A cancelled waiter is removed, and the others are unaffected."""
    requests = PendingRequests()
    given_up = asyncio.ensure_future(requests.until_acknowledged(1))
    patient = asyncio.ensure_future(requests.until_acknowledged(2))
    await settle()
    given_up.cancel()
    await settle()
    assert given_up.cancelled()
    assert list((requests._acks or {}).values()) == [2]
    requests.acknowledge(2)
    await with_deadline(patient)
    assert not requests._acks


async def test_number_of_ack_waiters_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of waiters for acknowledgements is limited."""
    monkeypatch.setattr(requests_module, "MAX_OPEN", 1)
    requests = PendingRequests()
    first = asyncio.ensure_future(requests.until_acknowledged(1))
    await settle()
    with pytest.raises(RequestError, match="1 senders"):
        await requests.until_acknowledged(2)
    requests.acknowledge(1)
    await with_deadline(first)


async def test_session_end_fails_current_and_later_waiters() -> None:
    """The end of a session fails all waiters, and later ones at once."""
    requests = PendingRequests()
    _, answer = requests.open()
    _, abandoned = requests.open()
    sender = asyncio.ensure_future(requests.until_acknowledged(1))
    await settle()
    requests.fail_all(ENDED)
    with pytest.raises(SessionEndedError):
        await answer
    with pytest.raises(SessionEndedError):
        await with_deadline(sender)
    with pytest.raises(SessionEndedError):
        requests.open()
    with pytest.raises(SessionEndedError):
        await requests.until_acknowledged(1)
    requests.acknowledge(7)
    requests.resolve("s1", 1, None)
    assert isinstance(abandoned.exception(), SessionEndedError)


async def test_session_end_without_waiters_is_silent() -> None:
    """Ending a session without waiters is not an error."""
    requests = PendingRequests()
    requests.fail_all(ENDED)
    requests.fail_all(ENDED)
