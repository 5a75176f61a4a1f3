"""Tests of parsing in slices: a pause stops it at once, and a flood does not block the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.servers.uvicorn import paced_parser
from fastapi_ws_stabilizer.servers.uvicorn.paced_parser import MAX_AFTER_END, MAX_UNPACED_BYTES
from tests.support.fake_websocket import eventually
from tests.unit.servers.test_uvicorn_protocol import REQUEST, FakeTransport, Reader, made, text_frame

FRAMES = 200
TEXTS = [f"{number:0100}" for number in range(FRAMES)]
MANY = b"".join(text_frame(text.encode()) for text in TEXTS)
"""Far more than is parsed in one go."""


class Sink:
    """Sink that takes messages until a limit, or fails.

    Attributes:
        wanted: Whether it takes further messages.
        most: Number of messages after which it pauses reading.
        fails_at: Number of the message that raises.
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
    """Transport that can be aborted too."""

    def abort(self) -> None:
        self.closed = True


@pytest.fixture
async def attached() -> Any:
    """Return a protocol with a connection that is attached to a sink."""
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


async def test_small_reads_create_no_paced_parser(attached: Any) -> None:
    """Reads of up to `MAX_UNPACED_BYTES` are parsed without a `PacedParser`, and a larger read creates one."""
    protocol, sink, _ = attached
    small = MANY[: 2 * len(text_frame(b"x" * 100))]
    protocol.data_received(small)
    assert sink.got == TEXTS[:2]
    assert protocol.paced is None
    protocol.data_received(MANY[len(small) : len(small) + MAX_UNPACED_BYTES + 1])
    assert protocol.paced is not None
    protocol.connection_lost(None)
    assert protocol.paced is None


async def test_large_read_is_parsed_whole_and_in_order(attached: Any) -> None:
    """Each message arrives once, although the read is split inside frames, and reading resumes afterwards."""
    protocol, sink, transport = attached
    protocol.data_received(MANY)
    await eventually(lambda: len(sink.got) == FRAMES)
    assert sink.got == TEXTS
    sink.most = 0
    protocol.resume_reading()
    await eventually(lambda: transport.reading)


@pytest.mark.parametrize("read", [MANY, MANY[:1000]], ids=["large read", "small read"])
async def test_pause_stops_parsing_at_its_message(attached: Any, read: bytes) -> None:
    """The message that pauses is the last, the rest waits unparsed, and nothing is lost when reading resumes."""
    protocol, sink, transport = attached
    sink.most = 5
    protocol.data_received(read)
    await asyncio.sleep(0)
    assert len(sink.got) == 5
    assert not transport.reading
    sink.most = 0
    protocol.resume_reading()
    await eventually(lambda: transport.reading)
    protocol.data_received(MANY[len(read) :])
    await eventually(lambda: len(sink.got) == FRAMES)
    assert sink.got == TEXTS


async def test_long_read_yields_to_event_loop(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long read is parsed in several iterations of the event loop, and reading pauses until then."""
    protocol, sink, transport = attached
    monkeypatch.setattr(paced_parser, "PARSE_SLICE", 0.0)
    protocol.data_received(MANY)
    assert len(sink.got) < FRAMES
    assert not transport.reading
    scheduler = 0
    while len(sink.got) < FRAMES - 1:
        await asyncio.sleep(0)
        scheduler += 1
    assert scheduler > 3


async def test_long_read_of_fragments_yields_to_event_loop(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of fragments of one message in one read are parsed in several iterations of the event loop too."""
    protocol, sink, transport = attached
    monkeypatch.setattr(paced_parser, "PARSE_SLICE", 0.0)
    fragment = text_frame(b"", first=False, last=False)
    protocol.data_received(text_frame(b"a", last=False) + 4000 * fragment + text_frame(b"b", first=False))
    assert protocol.parser.unparsed_bytes > 3000 * len(fragment)
    assert not transport.reading
    await eventually(lambda: sink.got == ["ab"])
    assert not protocol.close_sent


async def test_data_after_close_is_discarded_slowly(attached: Any) -> None:
    """A little data may hold the client's close frame and is parsed; the rest is read slowly and discarded."""
    protocol, sink, transport = attached
    sink.wanted = False
    sink.most = 0
    small = text_frame(b"x" * 100)
    for _ in range(2 * MAX_AFTER_END // len(small)):
        protocol.data_received(small)
    assert len(sink.got) <= MAX_AFTER_END // len(small)
    assert protocol.paced.discarding
    assert not transport.reading
    await eventually(lambda: transport.reading)


@pytest.mark.parametrize("later", [False, True], ids=["in the read", "in a later turn"])
async def test_parser_bug_closes_connection_without_reparsing(
    attached: Any, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    """Nothing is parsed twice, and no read waits forever."""
    protocol, sink, transport = attached
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
    sink.fails_at = 40 if later else 3
    if later:
        monkeypatch.setattr(paced_parser, "PARSE_SLICE", 0.0)
        protocol.data_received(MANY)
        await eventually(lambda: errors)
        assert isinstance(errors[0], ZeroDivisionError)
    else:
        with pytest.raises(ZeroDivisionError):
            protocol.data_received(MANY)
    assert transport.closed
    assert (protocol.parser.unparsed_bytes, len(sink.got)) == (0, sink.fails_at)
