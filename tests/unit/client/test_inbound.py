"""Tests of received messages of a client: handled one after the other, or queued for iteration."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fastapi_ws_stabilizer.client import inbound as incoming_module
from fastapi_ws_stabilizer.client.errors import ClientClosedError, HttpRejection
from fastapi_ws_stabilizer.client.events import ClientEvents
from fastapi_ws_stabilizer.client.inbound import InboundMessages, event_of
from fastapi_ws_stabilizer.client.requests import PendingRequests
from fastapi_ws_stabilizer.client.send_buffer import PendingMessage, SendBuffer
from fastapi_ws_stabilizer.errors import RequestError
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.v1.frames import Message, parse
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import settle, with_deadline


class Desk:
    """Inbound messages, and the replies to them."""

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self.tasks = TaskSet(lambda _, error: self.failures.append(error))
        self.buffer = SendBuffer(100, 10**6, "reject")
        self.requests = PendingRequests()
        self.incoming = InboundMessages(self.tasks, ClientEvents(self.tasks), self.buffer, self.requests)
        self.handled: list[Any] = []

    def put(self, *data: Any, event: str | None = None) -> None:
        """Receive messages."""
        for one in data:
            self.incoming.put(Message(one, event=event))

    def replies(self) -> list[tuple[str, Any, Any]]:
        """Send the waiting replies, and return the request, the data and the error of each."""
        frames = []
        while (message := self.buffer.pop_next()) is not None:
            frames.append(parse(message.frame()))
        return [(frame["re"], frame["data"], frame.get("error")) for frame in frames]


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    """Return an inbound side; its tasks are cancelled at the end."""
    made = Desk()
    yield made
    await wait_for_all(made.tasks.cancel(), 1.0)
    assert made.failures == []


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (Message(1, event="chat"), "chat"),
        (Message({"type": "chat"}), "chat"),
        (Message({"type": "a"}, event="b"), "b"),
        (Message({"type": 7}), None),
        (Message([1]), None),
        (Message("chat"), None),
        (Message(b"chat"), None),
    ],
    ids=repr,
)
def test_message_event_precedes_its_type(message: Message, event: str | None) -> None:
    """The event of a message takes precedence over the `type` in it."""
    assert event_of(message) == event


async def test_unhandled_messages_wait_for_iteration(desk: Desk) -> None:
    """Messages without a handler are read in the order in which they came."""
    desk.put("a", "b")
    assert [(await with_deadline(desk.incoming.get())).data for _ in range(2)] == ["a", "b"]  # type: ignore[union-attr]
    reading = asyncio.ensure_future(desk.incoming.get())
    await settle()
    desk.put("c")
    assert (await with_deadline(reading)).data == "c"  # type: ignore[union-attr]


async def test_cancelled_iteration_loses_no_message(desk: Desk) -> None:
    """A cancelled read takes no message."""
    reading = asyncio.ensure_future(desk.incoming.get())
    await settle()
    desk.put("a")
    reading.cancel()
    await settle()
    assert reading.cancelled()
    assert (await with_deadline(desk.incoming.get())).data == "a"  # type: ignore[union-attr]


async def test_messages_before_close_can_still_be_read(desk: Desk) -> None:
    """After the close readers get the remaining messages, and then nothing."""
    desk.put("a")
    desk.incoming.close()
    assert (await with_deadline(desk.incoming.get())).data == "a"  # type: ignore[union-attr]
    assert await with_deadline(desk.incoming.get()) is None


async def test_client_close_wakes_waiting_reader(desk: Desk) -> None:
    """A waiting reader ends when the client closes."""
    reading = asyncio.ensure_future(desk.incoming.get())
    await settle()
    desk.incoming.close()
    assert await with_deadline(reading) is None


async def test_handler_gets_data_of_its_event(desk: Desk) -> None:
    """A message goes to the handlers of its event, and one without such handlers to the fallback handler."""
    desk.incoming.on("chat", lambda data: desk.handled.append(("chat", data)))
    desk.incoming.on("chat", lambda data: desk.handled.append(("too", data)))
    desk.incoming.on("*", lambda data: desk.handled.append(("*", data)))
    desk.put(1, event="chat")
    desk.put(2, event="other")
    desk.put({"type": "chat"})
    await settle()
    assert desk.handled == [("chat", 1), ("too", 1), ("*", 2), ("chat", {"type": "chat"}), ("too", {"type": "chat"})]


async def test_handlers_run_one_after_another(desk: Desk) -> None:
    """The second message waits until the first one is handled."""
    gate = asyncio.Event()

    async def handle(data: Any) -> None:
        desk.handled.append(("begin", data))
        await gate.wait()
        desk.handled.append(("end", data))

    desk.incoming.on("chat", handle)
    desk.put(1, 2, event="chat")
    await settle()
    assert desk.handled == [("begin", 1)]
    gate.set()
    await settle()
    assert desk.handled == [("begin", 1), ("end", 1), ("begin", 2), ("end", 2)]


async def test_handler_return_value_answers_request(desk: Desk) -> None:
    """A request is answered with the first value that a handler returns; a message is not answered."""

    async def answer(data: int) -> int:
        return data + 1

    desk.incoming.on("add", lambda _: None)
    desk.incoming.on("add", answer)
    desk.incoming.on("add", lambda _: 99)
    desk.incoming.put(Message(1, event="add", id="s1"))
    desk.put(5, event="add")
    await settle()
    assert desk.replies() == [("s1", 2, None)]


async def test_request_error_of_handler_is_answer(desk: Desk) -> None:
    """A `RequestError` of the handler is the answer."""

    def refuse(_: Any) -> None:
        raise RequestError("busy", "later")

    desk.incoming.on("*", refuse)
    desk.incoming.put(Message(1, id="s1"))
    await settle()
    assert desk.replies() == [("s1", None, {"code": "busy", "message": "later"})]


async def test_handler_bug_is_logged_and_answered_without_details(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A bug is logged and answered with an error without details, and the next message is handled."""

    def fail(data: Any) -> None:
        desk.handled.append(data)
        raise KeyError("secret")

    desk.incoming.on("chat", fail)
    desk.incoming.put(Message(1, event="chat", id="s1"))
    desk.put(2, event="chat")
    await settle()
    assert desk.handled == [1, 2]
    assert [(to, error["code"]) for to, _, error in desk.replies()] == [("s1", "handler_failed")]
    assert "secret" not in str(desk.replies())
    assert len(caplog.records) == 2
    assert caplog.records[0].exc_info is not None


async def test_unread_messages_are_dropped_oldest_first(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without iteration the client drops the oldest messages and warns once."""
    monkeypatch.setattr(incoming_module, "MAX_UNREAD", 2)
    with caplog.at_level(logging.WARNING):
        desk.put("a", "b", "c", "d")
    assert len(caplog.records) == 1
    await with_deadline(desk.incoming.room())
    assert (await with_deadline(desk.incoming.get())).data == "c"  # type: ignore[union-attr]


async def test_slow_iteration_pauses_reading(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """During an iteration nothing is dropped: reading pauses until there is room."""
    monkeypatch.setattr(incoming_module, "MAX_UNREAD", 2)
    desk.put("a")
    await with_deadline(desk.incoming.get())
    desk.put("b", "c")
    waiting = asyncio.ensure_future(desk.incoming.room())
    await settle()
    assert not waiting.done()
    for data in "bc":
        assert (await with_deadline(desk.incoming.get())).data == data  # type: ignore[union-attr]
    await with_deadline(waiting)


async def test_busy_handlers_pause_reading(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy handlers pause reading, so that TCP applies backpressure."""
    monkeypatch.setattr(incoming_module, "MAX_UNREAD", 2)
    gate = asyncio.Event()

    async def handle(data: Any) -> None:
        await gate.wait()

    desk.incoming.on("chat", handle)
    desk.put(1, 2, 3, event="chat")
    await settle()
    waiting = asyncio.ensure_future(desk.incoming.room())
    await settle()
    assert not waiting.done()
    gate.set()
    await with_deadline(waiting)


async def test_cancellation_inside_handler_is_answered_as_failure(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A handler that awaits a cancelled task is answered as failed, and the next message is handled."""

    async def handle(data: Any) -> Any:
        desk.handled.append(data)
        if data == 1:
            gone = asyncio.get_running_loop().create_future()
            gone.cancel()
            await gone
        return data

    desk.incoming.on("chat", handle)
    desk.incoming.put(Message(1, event="chat", id="s1"))
    desk.incoming.put(Message(2, event="chat", id="s2"))
    await settle()
    assert desk.handled == [1, 2]
    failed = {"code": "handler_failed", "message": "a handler of the client failed"}
    assert desk.replies() == [("s1", None, failed), ("s2", 2, None)]
    assert len(caplog.records) == 1


async def test_client_close_cancels_running_handler(desk: Desk) -> None:
    """Closing cancels the running handler, and later messages are not handled."""

    async def handle(data: Any) -> None:
        desk.handled.append(data)
        await asyncio.Event().wait()

    desk.incoming.on("chat", handle)
    desk.put(1, 2, event="chat")
    await settle()
    desk.incoming.close()
    assert await wait_for_all(desk.tasks.cancel(), 1.0)
    assert (desk.handled, len(desk.tasks)) == ([1], 0)


async def test_requests_of_lost_session_are_handled_unanswered(desk: Desk) -> None:
    """In a new session another request may have the same id."""
    gate = asyncio.Event()

    async def handle(data: Any) -> Any:
        await gate.wait()
        desk.handled.append(data)
        return data

    desk.incoming.on("*", handle)
    for data in (1, 2):
        desk.incoming.put(Message(data, id=f"s{data}"))
    await settle()
    desk.incoming.restart_session()
    desk.incoming.put(Message(3, id="s1"))
    gate.set()
    await settle()
    assert desk.handled == [1, 2, 3]
    assert desk.replies() == [("s1", 3, None)]


def crowded(monkeypatch: pytest.MonkeyPatch, awaits: str = "nothing") -> InboundMessages:
    """Return an inbound side with room for two messages, of a client that awaits something from the server."""
    monkeypatch.setattr(incoming_module, "MAX_UNREAD", 2)
    desk = Desk()
    if awaits != "nothing":
        message = PendingMessage("msg", None, {})
        desk.buffer.add(message)
        if awaits == "answers":
            desk.requests.open("c1", message)
            desk.buffer.pop_next()
            desk.buffer.acknowledge(1)
            assert len(desk.buffer) == 0
    return desk.incoming


async def fill(incoming: InboundMessages) -> None:
    """Read one message with `anext`, then fill the queue."""
    incoming.put(Message("a"))
    message = await incoming.get()
    assert message is not None
    for data in "bc":
        incoming.put(Message(data))


@pytest.mark.parametrize("awaits", ["handlers", "answers", "acknowledgements"])
def test_abandoned_iteration_drops_oldest_after_ten_seconds(monkeypatch: pytest.MonkeyPatch, awaits: str) -> None:
    """After ten seconds without a read the oldest message is dropped, so that reading continues."""

    @virtually
    async def play() -> None:
        incoming = crowded(monkeypatch, "nothing" if awaits == "handlers" else awaits)
        if awaits == "handlers":
            incoming.on("chat", lambda data: data)
        await fill(incoming)
        waiting = asyncio.ensure_future(incoming.room())
        await asyncio.sleep(9.5)
        assert not waiting.done()
        await asyncio.sleep(2)
        assert waiting.done()
        incoming.put(Message("d"))
        message = await incoming.get()
        assert message is not None
        assert message.data == "c"

    play()


@virtually
async def test_abandoned_iteration_drops_nothing_without_demand() -> None:
    """Without handlers and pending calls nothing is dropped, however long nothing is read."""
    with pytest.MonkeyPatch.context() as patched:
        incoming = crowded(patched)
        await fill(incoming)
        waiting = asyncio.ensure_future(incoming.room())
        await asyncio.sleep(3600)
        assert not waiting.done()
        await incoming.get()
        await soon()
        assert waiting.done()


@virtually
async def test_slow_loop_body_loses_no_message() -> None:
    """A loop body that takes less than ten seconds for a message loses nothing; later it counts as abandoned."""
    with pytest.MonkeyPatch.context() as patched:
        incoming = crowded(patched, "acknowledgements")
        incoming.put(Message("a"))
        waiting: asyncio.Future[None] | None = None
        async for message in incoming.loop():
            assert message.data == "a"
            for data in "bc":
                incoming.put(Message(data))
            waiting = asyncio.ensure_future(incoming.room())
            await asyncio.sleep(3600)
            assert not waiting.done()
            break
        assert waiting is not None
        await asyncio.sleep(8)
        assert not waiting.done(), "the next loop may begin"
        await asyncio.sleep(4)
        assert waiting.done()


@virtually
async def test_slow_handlers_do_not_abandon_iteration() -> None:
    """While slow handlers pause reading, a manual iteration has nothing to read and does not count as abandoned."""
    with pytest.MonkeyPatch.context() as patched:
        incoming, gate = crowded(patched), asyncio.Event()
        incoming.on("chat", lambda _: gate.wait())
        await fill(incoming)
        for _ in range(2):
            await incoming.get()
        for data in range(3):
            incoming.put(Message(data, event="chat"))
        await soon()
        waiting = asyncio.ensure_future(incoming.room())
        await asyncio.sleep(60)
        assert not waiting.done()
        gate.set()
        await soon()
        assert waiting.done()
        for data in "def":
            incoming.put(Message(data))
        for data in "def":
            message = await incoming.get()
            assert message is not None
            assert message.data == data


@virtually
async def test_iteration_ends_after_last_message() -> None:
    """The loop yields the messages received before the close, and then ends."""
    incoming = Desk().incoming
    incoming.put(Message("a"))
    incoming.close()
    assert [message.data async for message in incoming.loop()] == ["a"]
    assert aiter(loop := incoming.loop()) is loop


@virtually
async def test_iterator_survives_timeout_of_one_read() -> None:
    """A read that times out takes no message and does not end its iterator. A generator would end here."""
    incoming = Desk().incoming
    loop = incoming.loop()
    for _ in range(2):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(loop), 1)
    incoming.put(Message("a"))
    assert (await anext(loop)).data == "a"


@virtually
async def test_two_iterators_share_messages_and_end_together() -> None:
    """Each message goes to one of two loops, and both end when the client closes."""
    incoming = Desk().incoming
    seen: list[tuple[int, Any]] = []

    async def read(reader: int) -> None:
        async for message in incoming.loop():
            seen.append((reader, message.data))

    loops = [asyncio.ensure_future(read(reader)) for reader in range(2)]
    await soon()
    for data in range(6):
        incoming.put(Message(data))
        await soon()
    incoming.close()
    await soon()
    assert all(loop.done() for loop in loops)
    assert sorted(data for _, data in seen) == list(range(6))


@virtually
async def test_each_iterator_raises_same_final_error() -> None:
    """Every loop and every later read raises the error with which the client was closed."""
    incoming = Desk().incoming
    rejection = HttpRejection(403, "no")
    incoming.close(ClientClosedError(4403, "HTTP 403", rejection))
    errors = []
    for _ in range(3):
        with pytest.raises(ClientClosedError) as caught:
            await anext(incoming.loop())
        errors.append(caught.value)
    assert {(error.code, error.reason, error.rejection) for error in errors} == {(4403, "HTTP 403", rejection)}
    assert len({id(error) for error in errors}) == 3, "a shared error would collect tracebacks"
