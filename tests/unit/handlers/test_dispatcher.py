"""Tests of the dispatch of one connection's messages to the handlers."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from pydantic import BaseModel

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.end_errors import SPINS
from fastapi_ws_stabilizer.handlers.dispatcher import Dispatcher
from fastapi_ws_stabilizer.handlers.registry import HandlerRegistry
from tests.support.fake_websocket import eventually, settle, with_deadline


class Chat(BaseModel):
    """Message of an application."""

    text: str


def chat(number: int) -> str:
    """Return a message of type chat."""
    return f'{{"type":"chat","text":"{number}"}}'


class Run:
    """Run of the dispatcher over one connection."""

    def __init__(self, b: Any, handlers: HandlerRegistry, concurrency: int = 1) -> None:
        self.b = b
        dispatcher = Dispatcher(handlers, b.config, b.events)
        self.task = asyncio.ensure_future(dispatcher.run(b.connection, concurrency))

    async def end(self) -> None:
        """Disconnect the client, and wait until the run has ended."""
        self.b.server.feed_disconnect()
        await with_deadline(self.task)


async def test_messages_are_handled_one_at_a_time_in_order(bench: Any) -> None:
    """Each connection handles one message at a time, in order, regardless of the time that a handler takes."""
    b = bench()
    await b.open()
    handlers = HandlerRegistry()
    log: list[str] = []

    async def handle(ws: Any, message: Chat) -> None:
        log.append(f"begin {message.text}")
        await settle(5 - int(message.text))
        log.append(f"end {message.text}")

    handlers.add("chat", handle)
    run = Run(b, handlers)
    b.server.feed_text(*map(chat, range(4)))
    await run.end()
    assert log == [f"{what} {number}" for number in range(4) for what in ("begin", "end")]


async def test_concurrency_limits_parallel_handlers(bench: Any) -> None:
    """With `concurrency=3` at most three messages are handled concurrently."""
    b = bench()
    await b.open()
    handlers = HandlerRegistry()
    running, most = 0, 0
    gate = asyncio.Event()

    async def handle(ws: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1

    handlers.add("chat", handle)
    run = Run(b, handlers, concurrency=3)
    b.server.feed_text(*map(chat, range(10)))
    await eventually(lambda: running == 3)
    await settle()
    assert most == 3
    gate.set()
    await run.end()
    assert (running, most) == (0, 3)


async def test_messages_before_disconnect_are_still_handled(bench: Any) -> None:
    """Messages that arrive before the disconnect are handled."""
    b = bench()
    await b.open()
    handlers = HandlerRegistry()
    seen: list[str] = []
    handlers.add("chat", lambda ws, message: seen.append(message["text"]))
    b.server.feed_text(*map(chat, range(3)))
    b.server.feed_disconnect()
    await with_deadline(b.connection.wait_closing())
    await with_deadline(Run(b, handlers).task)
    assert seen == ["0", "1", "2"]


async def test_all_handlers_of_message_type_are_called(bench: Any) -> None:
    """Each handler of a type gets the message as its annotation says."""
    b = bench()
    await b.open()
    handlers = HandlerRegistry()
    seen: list[Any] = []

    async def as_model(ws: Any, message: Chat) -> None:
        seen.append(message)

    async def as_text(ws: Any, message: str) -> None:
        seen.append(message)

    handlers.add(None, as_model)
    handlers.add(None, as_text)
    run = Run(b, handlers)
    b.server.feed_text(chat(1))
    await run.end()
    assert seen == [Chat(text="1"), chat(1)]


@pytest.mark.parametrize(
    ("message", "code"),
    [("{", "bad_json"), ('{"type":"x"}', "unknown_type"), ("[]", "no_type"), ('{"type":"chat"}', "invalid_message")],
)
async def test_bad_message_gets_error_reply_without_close(bench: Any, message: str, code: str) -> None:
    """A bad message is answered, counted and reported, and the next message is handled."""
    b = bench()
    await b.open()
    handlers = HandlerRegistry()
    seen: list[Any] = []

    async def handle(ws: Any, message: Chat) -> None:
        seen.append(message.text)

    handlers.add("chat", handle)
    run = Run(b, handlers)
    b.server.feed_text(message, chat(1))
    await b.server.until(lambda: b.server.data)
    await eventually(lambda: seen == ["1"])
    (reply,) = b.server.json
    assert (reply["type"], reply["code"]) == ("error", code)
    assert isinstance(reply["message"], str)
    assert b.events.counters.bad_messages == 1
    assert b.heard.of("bad_message")[0].fields["code"] == code
    assert b.connection.close_info is None
    await run.end()


async def test_bad_message_event_is_throttled_per_code(bench: Any) -> None:
    """One `bad_message` event of each code is at INFO, and the others are at DEBUG, so that no client fills the log."""
    b = bench(max_bad_messages=None)
    await b.open()
    handlers = HandlerRegistry()
    handlers.add("chat", lambda ws: None)
    run = Run(b, handlers)
    b.server.feed_text("{", "{", "[]", "{", "[]")
    await b.server.until(lambda: len(b.server.data) == 5)
    levels = [(event.fields["code"], event.level) for event in b.heard.of("bad_message")]
    loud, quiet = logging.INFO, logging.DEBUG
    assert levels == [
        ("bad_json", loud),
        ("bad_json", quiet),
        ("no_type", loud),
        ("bad_json", quiet),
        ("no_type", quiet),
    ]
    assert b.events.counters.bad_messages == 5
    await run.end()


async def test_message_invalid_for_one_handler_calls_none(bench: Any) -> None:
    """A message that is invalid for one of its handlers calls none of them."""
    b = bench()
    await b.open()
    handlers = HandlerRegistry()
    seen: list[Any] = []

    async def strict(ws: Any, message: Chat) -> None:
        seen.append(message)

    handlers.add(None, lambda ws, message: seen.append(message))
    handlers.add(None, strict)
    run = Run(b, handlers)
    b.server.feed_text('{"type":"chat"}')
    await b.server.until(lambda: b.server.data)
    assert seen == []
    await run.end()


async def test_bad_messages_over_limit_close_with_1008(bench: Any) -> None:
    """After `max_bad_messages` replies the next bad message closes with 1008."""
    b = bench(max_bad_messages=2)
    await b.open()
    handlers = HandlerRegistry()
    handlers.add("chat", lambda ws: None)
    run = Run(b, handlers)
    b.server.feed_text("1", "2", "3", "4")
    await with_deadline(run.task)
    await with_deadline(b.connection.closed)
    assert [reply["code"] for reply in b.server.json] == ["no_type", "no_type"]
    assert b.server.close_frames == [(1008, "too many bad messages")]
    assert b.connection.close_info.cause is DisconnectReason.POLICY


async def test_bad_messages_without_limit_never_close(bench: Any) -> None:
    """With `max_bad_messages=None` each bad message is answered and none closes."""
    b = bench(max_bad_messages=None)
    await b.open()
    handlers = HandlerRegistry()
    handlers.add("chat", lambda ws: None)
    run = Run(b, handlers)
    b.server.feed_text(*["x"] * 150)
    await b.server.until(lambda: len(b.server.data) == 150)
    assert b.connection.close_info is None
    await run.end()


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_handler_exception_ends_run_immediately(bench: Any, concurrency: int) -> None:
    """A bug in a handler reaches the endpoint at once, and the concurrent handlers are cancelled."""
    b = bench()
    await b.open()
    handlers = HandlerRegistry()
    stopped: list[str] = []

    async def handle(ws: Any, message: Chat) -> None:
        if message.text == "1":
            raise ValueError("bug")
        try:
            await (asyncio.Event().wait() if concurrency > 1 else asyncio.sleep(0))
        except asyncio.CancelledError:
            stopped.append(message.text)
            raise

    handlers.add("chat", handle)
    run = Run(b, handlers, concurrency)
    b.server.feed_text(chat(0), chat(1))
    try:
        with pytest.raises(ValueError, match="bug"):
            await asyncio.wait_for(asyncio.shield(run.task), 1.0)
    finally:
        run.task.cancel()
        await asyncio.wait([run.task])
    assert stopped == (["0"] if concurrency > 1 else [])
    assert b.task_failures == []


async def test_handler_sending_to_closed_client_does_not_stop_run(bench: Any) -> None:
    """A handler that gets `SocketClosed` ends, but the remaining messages of its client are handled."""
    b = bench()
    _, socket = await b.open()
    handlers = HandlerRegistry()
    seen: list[str] = []

    async def handle(ws: Any, message: Chat) -> None:
        seen.append(message.text)
        await ws.send("answer")

    handlers.add("chat", handle)
    b.server.feed_text(*map(chat, range(3)))
    b.server.feed_disconnect()
    await with_deadline(socket.wait_closed())
    await with_deadline(Run(b, handlers).task)
    assert seen == ["0", "1", "2"]


async def test_handler_sending_to_other_closed_client_ends_run(bench: Any) -> None:
    """`SocketClosed` of another socket is an error of the handler, and ends the run."""
    b, other = bench(), bench()
    await b.open()
    _, closed = await other.open()
    await with_deadline(closed.close())
    handlers = HandlerRegistry()

    async def forward(ws: Any) -> None:
        await closed.send("forwarded")

    handlers.add("chat", forward)
    run = Run(b, handlers)
    b.server.feed_text(chat(0))
    with pytest.raises(Exception, match="the connection is closed: application"):
        await with_deadline(run.task)


async def test_run_without_handlers_emits_warning(bench: Any) -> None:
    """A manager that has no handlers for its messages emits one warning per run."""
    b = bench()
    await b.open()
    run = Run(b, HandlerRegistry())
    b.server.feed_text("1", "2")
    await run.end()
    (event,) = b.heard.of("no_message_handlers")
    assert event.level == logging.WARNING
    assert b.server.data == []


@pytest.mark.parametrize("concurrency", [0, -1])
async def test_concurrency_below_one_raises(bench: Any, concurrency: int) -> None:
    """A concurrency below 1 raises."""
    b = bench()
    await b.open()
    with pytest.raises(ValueError, match="concurrency must be at least 1"):
        await with_deadline(Run(b, HandlerRegistry(), concurrency).task)


async def test_cancelled_run_cancels_its_handlers(bench: Any) -> None:
    """Cancelling a run cancels all of its running handlers."""
    b = bench()
    await b.open()
    handlers = HandlerRegistry()
    state: list[str] = []

    async def handle(ws: Any) -> None:
        state.append("begin")
        try:
            await asyncio.Event().wait()
        finally:
            state.append("end")

    handlers.add("chat", handle)
    run = Run(b, handlers, concurrency=4)
    b.server.feed_text(chat(0), chat(1))
    await eventually(lambda: len(state) == 2)
    run.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await with_deadline(run.task)
    assert state == ["begin", "begin", "end", "end"]


async def test_endless_loop_around_run_yields_after_close(bench: Any) -> None:
    """A run that waited returns at once after the close, and a loop that runs again yields to the event loop."""
    b = bench()
    await b.open()
    dispatcher = Dispatcher(HandlerRegistry(), b.config, b.events)
    count = 0

    async def loop() -> None:
        nonlocal count
        while True:
            await dispatcher.run(b.connection, 1)
            count += 1

    task = asyncio.ensure_future(loop())
    await settle()
    b.server.feed_disconnect()
    await asyncio.wait({task}, timeout=0.3)
    assert SPINS <= count < SPINS + 50
    assert len(b.heard.of("end_ignored")) == 1
    task.cancel()
    await settle()
