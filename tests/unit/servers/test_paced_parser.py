"""Tests of how the protocol class reads: piece by piece, so that a full inbox stops it and nobody waits for a flood."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.servers.uvicorn import paced_parser as uvicorn_reading
from fastapi_ws_stabilizer.servers.uvicorn.paced_parser import MAX_AFTER_END, MAX_PARSED_AT_ONCE
from tests.support.fake_websocket import eventually
from tests.unit.servers.test_uvicorn_protocol import REQUEST, FakeTransport, Reader, made, text_frame

FRAMES = 200
TEXTS = [f"{number:0100}" for number in range(FRAMES)]
MANY = b"".join(text_frame(text.encode()) for text in TEXTS)
"""Far more than is parsed at one go."""


class Sink:
    """Takes what is read, until it has had enough, or it fails.

    Attributes:
        wanted: Whether anybody wants its messages.
        most: After so many messages it stops the reading.
        fails_at: The message that it cannot deal with.
    """

    def __init__(self, protocol: Any) -> None:
        self.protocol = protocol
        self.got: list[str | bytes] = []
        self.wanted = True
        self.most = FRAMES
        self.fails_at: int | None = None
        self.events: list[Any] = []

    def data_received(self) -> bool:
        return self.wanted

    def message_received(self, message: str | bytes) -> None:
        self.got.append(message)
        if self.fails_at == len(self.got):
            raise ZeroDivisionError
        if len(self.got) == self.most:
            self.protocol.pause_reading()

    def connection_lost(self, event: Any) -> None:
        self.events.append(event)


class Transport(FakeTransport):
    """Can be cut, too."""

    def abort(self) -> None:
        self.closed = True


@pytest.fixture
async def attached() -> Any:
    """A protocol whose connection is attached to a sink."""
    reader, transport = Reader(), Transport()
    protocol = await made(reader)
    protocol.connection_made(transport)
    protocol.data_received(REQUEST)
    await eventually(lambda: (reader.accepted and not protocol.in_use) or getattr(protocol.queue, "_getters", None))
    sink = Sink(protocol)
    protocol.attach(sink, max_message_bytes=1000, own_pings=True)
    yield protocol, sink, transport
    for task in list(protocol.tasks):
        task.cancel()
    await eventually(lambda: not protocol.tasks)


async def test_large_read_is_parsed_whole_and_in_order(attached: Any) -> None:
    """Each message arrives once, though the read is cut where a frame may be, and reading goes on afterwards."""
    protocol, sink, transport = attached
    protocol.data_received(MANY)
    await eventually(lambda: len(sink.got) == FRAMES)
    assert sink.got == TEXTS
    sink.most = 0
    protocol.resume_reading()
    await eventually(lambda: transport.reading)


async def test_full_inbox_stops_parsing_within_slice(attached: Any) -> None:
    """What one go has parsed is taken, the rest waits unparsed, and nothing is lost when there is room again."""
    protocol, sink, transport = attached
    sink.most = 5
    protocol.data_received(MANY)
    await asyncio.sleep(0)
    assert 5 <= len(sink.got) <= 5 + MAX_PARSED_AT_ONCE // 100
    assert not transport.reading
    sink.most = 0
    protocol.resume_reading()
    await eventually(lambda: len(sink.got) == FRAMES)
    assert sink.got == TEXTS


async def test_long_read_yields_to_event_loop(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that takes long is parsed in several turns of the event loop, and no more is read meanwhile."""
    protocol, sink, transport = attached
    monkeypatch.setattr(uvicorn_reading, "PARSE_SLICE", 0.0)
    protocol.data_received(MANY)
    assert len(sink.got) < FRAMES
    assert not transport.reading
    scheduler = 0
    while len(sink.got) < FRAMES - 1:
        await asyncio.sleep(0)
        scheduler += 1
    assert scheduler > 3


async def test_data_after_close_is_discarded_slowly(attached: Any) -> None:
    """A little may hold the client's close frame and is looked at; the rest is read as slowly as it is worth."""
    protocol, sink, transport = attached
    sink.wanted = False
    sink.most = 0
    small = text_frame(b"x" * 100)
    for _ in range(2 * MAX_AFTER_END // len(small)):
        protocol.data_received(small)
    assert len(sink.got) <= MAX_AFTER_END // len(small)
    assert protocol.discarding
    assert not transport.reading
    await eventually(lambda: transport.reading)


@pytest.mark.parametrize("later", [False, True], ids=["in the read", "in a later turn"])
async def test_parser_bug_closes_connection_without_reparsing(
    attached: Any, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    """Nothing is parsed twice, and nobody waits for ever for what is not read any more."""
    protocol, sink, transport = attached
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    sink.fails_at = 40 if later else 3
    if later:
        monkeypatch.setattr(uvicorn_reading, "PARSE_SLICE", 0.0)
        protocol.data_received(MANY)
        await eventually(lambda: told)
        assert isinstance(told[0], ZeroDivisionError)
    else:
        with pytest.raises(ZeroDivisionError):
            protocol.data_received(MANY)
    assert transport.closed
    assert (protocol.unparsed, len(sink.got)) == (b"", sink.fails_at)
