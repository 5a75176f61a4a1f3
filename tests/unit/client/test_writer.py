"""Tests of the writer of a client's connection."""

from __future__ import annotations

import asyncio

import pytest

from fastapi_ws_stabilizer.client.send_buffer import PendingMessage, SendBuffer
from fastapi_ws_stabilizer.client.transport import TransportClosedError
from fastapi_ws_stabilizer.client.writer import MAX_PENDING_CONTROL, FrameWriter
from fastapi_ws_stabilizer.wire.v1.frames import DEFLATE_FROM
from tests.support.fake_link import FakeLink, soon, virtually


class Desk:
    """A writer, its buffer and its network."""

    def __init__(self) -> None:
        self.buffer = SendBuffer(1000, 10**6, "reject")
        self.writer = FrameWriter(self.buffer)
        self.link = FakeLink(None)
        self.task: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Desk:
        self.task = asyncio.ensure_future(self.writer.run(self.link))
        await soon()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.stop()
        await soon()
        assert self.task is not None
        assert self.task.done()

    def send(self, *data: object) -> None:
        """Queue messages."""
        for one in data:
            self.buffer.add(PendingMessage("msg", one, {}))

    @property
    def written(self) -> list[object]:
        """What was written: the data of messages, and the types of other frames."""
        return [frame.get("data", frame["type"]) for frame in self.link.sent]


@virtually
async def test_unbuffered_frames_precede_messages() -> None:
    """An unbuffered frame is written before messages that were queued earlier."""
    async with Desk() as desk:
        desk.link.may_send.clear()
        desk.send("first")
        await soon()
        desk.send("a", "b")
        desk.writer.put('{"type":"ack"}')
        desk.link.may_send.set()
        await soon()
        assert desk.written == ["first", "ack", "a", "b"]


@virtually
async def test_oldest_unbuffered_frame_is_dropped_above_limit() -> None:
    """At most 64 unbuffered frames wait, and a further one replaces the oldest."""
    async with Desk() as desk:
        desk.link.may_send.clear()
        desk.writer.put('{"type":"in_flight"}')
        await soon()
        for number in range(MAX_PENDING_CONTROL):
            assert not desk.writer.is_backpressured
            desk.writer.put(f'{{"type":"{number}"}}')
        assert desk.writer.is_backpressured
        desk.writer.put('{"type":"last"}')
        desk.link.may_send.set()
        await soon()
        assert desk.written == ["in_flight", *map(str, range(1, MAX_PENDING_CONTROL)), "last"]


@virtually
async def test_paused_messages_wait_but_unbuffered_frames_do_not() -> None:
    """A pause holds back messages only, and a second pause replaces the first."""
    async with Desk() as desk:
        desk.writer.pause_messages(1.0)
        desk.writer.pause_messages(3.0)
        desk.send("late")
        desk.writer.put('{"type":"pong"}')
        await asyncio.sleep(2.9)
        assert desk.written == ["pong"]
        await asyncio.sleep(0.2)
        assert desk.written == ["pong", "late"]


@virtually
async def test_flush_waits_until_everything_is_written() -> None:
    """A flush returns when all sendable frames are written, also if they were queued in the same iteration."""
    async with Desk() as desk:
        desk.link.may_send.clear()
        desk.send("a")
        flushing = asyncio.ensure_future(desk.writer.flush(10))
        await soon()
        assert not flushing.done()
        desk.link.may_send.set()
        await soon()
        assert (flushing.done(), desk.written) == (True, ["a"])
        await asyncio.wait_for(desk.writer.flush(10), 0.1)


@virtually
@pytest.mark.parametrize("end", ["timeout", "stop"])
async def test_flush_of_stalled_network_is_bounded(end: str) -> None:
    """A flush ends at its timeout, or when the writer is stopped."""
    desk = Desk()
    writing = asyncio.ensure_future(desk.writer.run(desk.link))
    desk.link.may_send.clear()
    desk.send("a")
    flushing = asyncio.ensure_future(desk.writer.flush(2))
    await asyncio.sleep(1.9)
    assert not flushing.done()
    if end == "stop":
        desk.writer.stop()
        await soon()
    else:
        await asyncio.sleep(0.2)
    assert flushing.done()
    desk.writer.stop()
    desk.link.may_send.set()
    await writing


@virtually
@pytest.mark.parametrize("end", ["write", "stop"])
async def test_concurrent_flushes_end_together(end: str) -> None:
    """All waiting flushes end when everything is written, or when the writer is stopped."""
    async with Desk() as desk:
        desk.link.may_send.clear()
        desk.send("a")
        flushing = [asyncio.ensure_future(desk.writer.flush(10)) for _ in range(2)]
        await soon()
        assert not any(one.done() for one in flushing)
        if end == "stop":
            desk.writer.stop()
        desk.link.may_send.set()
        await soon()
        assert all(one.done() for one in flushing)


@virtually
async def test_stopped_writer_writes_nothing_more() -> None:
    """After `stop` the writer ends, and messages stay in the buffer for the next connection."""
    async with Desk() as desk:
        desk.writer.pause_messages(1.0)
        desk.writer.stop()
        desk.send("a")
        desk.writer.put('{"type":"ack"}')
        await desk.writer.flush(10)
        await asyncio.sleep(5)
        assert (desk.written, len(desk.buffer)) == ([], 1)


@virtually
async def test_closed_transport_ends_writer_with_error() -> None:
    """The error of the transport reaches the caller of `run`."""
    desk = Desk()
    desk.link.broken = True
    desk.send("a")
    with pytest.raises(TransportClosedError, match="broken pipe"):
        await desk.writer.run(desk.link)


@virtually
async def test_writer_compresses_large_text_messages_only() -> None:
    """With compression negotiated, a text message of 512 bytes or more is a binary frame of kind 2."""
    async with Desk() as desk:
        frames: list[str | bytes] = []

        async def send(message: str | bytes) -> None:
            frames.append(message)

        desk.link.send = send  # type: ignore[method-assign]
        desk.writer.deflates = True
        desk.send("x" * DEFLATE_FROM, "x", b"x" * DEFLATE_FROM)
        await soon()
        assert [frame[:1] for frame in frames] == [b"\x02", "{", b"\x01"]
