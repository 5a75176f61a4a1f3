"""Tests of the pending requests of a client."""

from __future__ import annotations

import asyncio

import pytest

from fastapi_ws_stabilizer.client.errors import ClientClosedError, SessionLostError
from fastapi_ws_stabilizer.client.requests import PendingRequests
from fastapi_ws_stabilizer.client.send_buffer import PendingMessage
from fastapi_ws_stabilizer.errors import RequestError
from tests.support.fake_websocket import settle


def opened(requests: PendingRequests, name: str) -> tuple[asyncio.Future[object], PendingMessage]:
    """Return a request, and the message in which it is sent."""
    message = PendingMessage("msg", None, {"id": name})
    return requests.open(name, message), message


async def test_answer_resolves_its_request_once() -> None:
    """An answer completes the request with its id, once."""
    requests = PendingRequests()
    (first, _), (second, _) = opened(requests, "c1"), opened(requests, "c2")
    requests.answered("c2", 2, None)
    requests.answered("c2", 3, None)
    requests.answered("c9", 9, None)
    assert (await second, first.done(), len(requests)) == (2, False, 1)


@pytest.mark.parametrize("error", [{"code": "no", "message": "never"}, {}, "no", {"code": 7}, {"code": "x" * 9999}])
async def test_error_answer_raises_short_error(error: object) -> None:
    """Any error value of a server becomes an error with a short text."""
    requests = PendingRequests()
    future, _ = opened(requests, "c1")
    requests.answered("c1", None, error)
    with pytest.raises(RequestError) as caught:
        await future
    assert len(caught.value.code) <= 64


async def test_failed_message_fails_its_request() -> None:
    """A message that fails also fails its request; an accepted message leaves its request pending."""
    requests = PendingRequests()
    (failed, lost), (waiting, accepted) = opened(requests, "c1"), opened(requests, "c2")
    cancelled, given_up = opened(requests, "c3")
    lost.fail(SessionLostError())
    accepted.accept()
    given_up.done.cancel()
    await settle()
    assert isinstance(failed.exception(), SessionLostError)
    assert not waiting.done()
    assert not cancelled.done()


async def test_lost_session_fails_accepted_requests() -> None:
    """The answer to an accepted request is lost with the session; an unaccepted one depends on its message."""
    requests = PendingRequests()
    (asked, accepted), (unsent, _) = opened(requests, "c1"), opened(requests, "c2")
    accepted.accept()
    assert requests.session_lost(replay=False) == []
    assert isinstance(asked.exception(), SessionLostError)
    assert not unsent.done()


async def test_close_fails_every_pending_request() -> None:
    """On close no request stays pending, and a cancelled one is left alone."""
    requests = PendingRequests()
    future, _ = opened(requests, "c1")
    forgotten, _ = opened(requests, "c2")
    cancelled, _ = opened(requests, "c3")
    requests.forget("c2")
    requests.forget("c2")
    cancelled.cancel()
    requests.close(ClientClosedError(1000))
    assert isinstance(future.exception(), ClientClosedError)
    assert not forgotten.done()
    assert len(requests) == 0
    requests.answered("c1", 1, None)


async def test_replay_asks_accepted_requests_again_in_order() -> None:
    """With replay, accepted requests wait for an answer in the new session, and fail only if their message does."""
    requests = PendingRequests()
    (first, one), (second, two) = opened(requests, "c1"), opened(requests, "c2")
    (failed, three), (unsent, _) = opened(requests, "c3"), opened(requests, "c4")
    one.accept()
    two.accept()
    three.fail(SessionLostError())
    await settle()
    assert requests.session_lost(replay=True) == [one, two]
    assert [future.done() for future in (first, second, failed, unsent)] == [False, False, True, False]
    requests.answered("c1", "late", None)
    two.fail(ClientClosedError(1000))
    await settle()
    assert await first == "late"
    assert isinstance(second.exception(), ClientClosedError)
