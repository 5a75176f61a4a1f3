"""Tests of a connection with a direct transport to its server, which a test controls."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

from fastapi_ws_stabilizer import scheduling as scheduling_module
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection import quota
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.connection.read_window import MAX_UNREAD_BYTES
from fastapi_ws_stabilizer.servers.direct import EXTENSION
from fastapi_ws_stabilizer.socket import READER_START_GRACE
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_websocket import FakeServer, eventually, settle


class LinkServer(FakeServer):
    """Server with a direct transport, which is its own transport."""

    def __init__(self) -> None:
        super().__init__(extensions={EXTENSION: {}})
        self.write_paused = False
        self.window_bits = 0
        self.reading = True
        self.closed: list[tuple[int, str]] = []
        self.pings: list[bytes] = []
        self.writes: list[bytes] = []
        self.error: Exception | None = None
        self.gone_before: dict[str, Any] | None = None
        self.compression = True

    @property
    def transport(self) -> LinkServer:
        return self

    in_use = False

    def write(self, data: bytes) -> None:
        if self.error is not None:
            raise self.error
        self.writes.append(data)

    def abort(self) -> None:
        self.closed.append((1006, "aborted"))

    def is_closing(self) -> bool:
        return False

    def refuse_compression(self) -> None:
        self.compression = False

    def attach(self, sink: Any, *, max_message_bytes: int, own_pings: bool) -> None:
        self.sink = sink
        if self.gone_before is not None:
            sink.connection_lost(self.gone_before)

    def ping(self, payload: bytes) -> None:
        self.pings.append(payload)

    def close(self, code: int, reason: str) -> None:
        self.closed.append((code, reason))

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def stall(self) -> None:
        """Pause writing."""
        self.write_paused = True
        self.sink.pause_writing()

    def drain(self) -> None:
        """Resume writing."""
        self.write_paused = False
        self.sink.resume_writing()


@pytest.fixture
def linked(bench: Any) -> Any:
    async def make(**options: Any) -> Any:
        b = bench(**options)
        b.server = LinkServer()
        await b.open()
        assert isinstance(b.connection.outbox, DirectOutbox)
        return b

    return make


def offer(b: Any, *texts: str) -> list[Any]:
    return [b.connection.outbox.offer(encode(text)) for text in texts]


async def test_messages_of_one_iteration_are_one_write(linked: Any) -> None:
    """Fifty messages of one iteration are one write, in order; a single message is a write too."""
    b = await linked()
    offer(b, *(f"{number:02}" for number in range(50)))
    assert b.server.writes == []
    await settle()
    assert b.server.writes == [b"".join(b"\x81\x02%02d" % number for number in range(50))]
    offer(b, "alone")
    await settle()
    assert b.server.writes[1:] == [b"\x81\x05alone"]
    assert b.events.counters.messages_sent == 51


async def test_full_transport_gets_no_more_messages(linked: Any) -> None:
    """Queued messages wait in the bounded outbox until the transport resumes."""
    b = await linked()
    b.server.stall()
    offer(b, "a", "b")
    await settle()
    assert b.server.writes == []
    assert len(b.connection.outbox) == 2
    assert b.connection.outbox.blocked
    b.server.drain()
    assert b.server.writes == [b"\x81\x01a\x81\x01b"]


async def test_large_send_queue_is_written_in_pieces(linked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each piece the connection checks whether the transport has paused writing."""
    monkeypatch.setattr("fastapi_ws_stabilizer.connection.direct_outbox.MAX_WRITE_BYTES", 10)
    b = await linked()
    b.server.stall()
    offer(b, "a" * 8, "b" * 8, "c" * 8)
    await settle()
    write = b.server.write

    def write_and_stall(data: bytes) -> None:
        write(data)
        b.server.stall()

    b.connection.outbox._write = write_and_stall
    b.server.drain()
    assert len(b.server.writes) == 1
    assert len(b.connection.outbox) == 1
    b.server.drain()
    assert b"".join(b.server.writes) == b"\x81\x08aaaaaaaa\x81\x08bbbbbbbb\x81\x08cccccccc"


async def test_stalled_client_lags_then_is_disconnected(linked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds and policy are those of every outbox; the close frame is written although the transport is full."""
    monkeypatch.setattr("fastapi_ws_stabilizer.connection.stall_watch.STALL_THRESHOLD", -1.0)
    b = await linked(outbox_max_messages=2)
    b.server.stall()
    offer(b, "a")
    await settle()
    offer(b, "b", "c")
    assert b.listener.slow == [SlowConsumer.LAGGING, SlowConsumer.DISCONNECTED]
    assert b.connection.close_info.cause is DisconnectReason.SLOW_CONSUMER
    assert b.server.closed == [(4507, "slow consumer")]


async def test_stalled_client_is_aborted_after_send_timeout(linked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport that makes no progress is aborted."""
    monkeypatch.setattr("fastapi_ws_stabilizer.connection.stall_watch.POLL_INTERVAL", 0.01)
    b = await linked(send_timeout=0.03)
    b.server.stall()
    offer(b, "a")
    await eventually(lambda: (1006, "aborted") in b.server.closed)
    assert "send_stuck" in b.heard.events


@pytest.mark.parametrize("texts", [("a",), ("a", "b")])
async def test_failed_write_closes_and_counts_lost_messages(linked: Any, texts: tuple[str, ...]) -> None:
    """An exception of the transport reaches no sender, and lost messages are counted."""
    b = await linked()
    b.server.error = RuntimeError("the handle is closed")
    offer(b, *texts)
    await settle()
    offer(b, "later")
    await eventually(lambda: b.connection.close_info is not None)
    assert b.connection.close_info.cause is DisconnectReason.NETWORK_LOST
    await eventually(lambda: b.events.counters.messages_discarded == len(texts) + 1)
    assert b.task_failures == []


@pytest.mark.parametrize("texts", [("a",), ("a", "b")])
async def test_nothing_is_written_after_failed_write(linked: Any, texts: tuple[str, ...]) -> None:
    """After a failed write, later messages, the last flush and a resumed transport cause no second write."""
    b = await linked()
    attempts: list[bytes] = []

    def write(data: bytes) -> None:
        attempts.append(data)
        raise RuntimeError("the handle is closed")

    b.connection.outbox._write = write
    offer(b, *texts)
    await settle()
    offer(b, "later")
    b.server.sink.before_shutdown()
    b.server.drain()
    offer(b, "later", "still")
    await settle()
    assert len(attempts) == 1
    b.server.sink.connection_lost({"type": "websocket.disconnect", "code": 1006})
    assert b.events.counters.messages_discarded == len(texts) + 3


async def test_client_disconnect_ends_flush(linked: Any) -> None:
    """Messages before the close frame are counted, close() returns, and a drained transport gets none."""
    b = await linked()
    b.server.stall()
    offer(b, "a", "b")
    closing = asyncio.ensure_future(b.connection.socket.close(4001, "bye"))
    await settle()
    assert not closing.done()
    b.server.sink.connection_lost({"type": "websocket.disconnect", "code": 1000, "reason": ""})
    await asyncio.wait_for(closing, 5)
    b.server.drain()
    await settle()
    assert b.server.writes == b.server.closed == []
    assert b.events.counters.messages_discarded == 2
    assert b.connection.close_info.code == 4001


async def test_messages_reach_inbox_without_task(linked: Any) -> None:
    """A message that the transport has read is in the inbox at once; text pings are answered before queued messages."""
    b = await linked()
    assert len(b.tasks) == 0
    b.server.sink.message_received("hello")
    b.server.sink.message_received("ping")
    assert await b.connection.socket.receive() == "hello"
    offer(b, "data")
    await settle()
    assert b.server.writes == [b"\x81\x04pong", b"\x81\x04data"]


async def test_full_inbox_pauses_transport_until_read(linked: Any) -> None:
    """The message that fills the inbox is taken, then reading pauses; reading a message makes room."""
    b = await linked(inbox_max_messages=2)
    for text in "ab":
        b.server.sink.message_received(text)
    assert b.server.reading
    b.server.sink.message_received("c")
    assert not b.server.reading
    assert b.connection.pause
    assert [await b.connection.socket.receive() for _ in range(2)] == ["a", "b"]
    assert b.server.reading
    assert not b.connection.pause


async def test_full_unread_inbox_closes_after_pause_timeout(linked: Any) -> None:
    """An endpoint that has read, but no longer reads or sends, is closed after inbox_pause_timeout."""
    b = await linked(inbox_max_messages=1, inbox_pause_timeout=0.03)
    b.server.sink.message_received("first")
    await b.connection.socket.receive()
    b.server.sink.message_received("a")
    b.server.sink.message_received("b")
    await eventually(lambda: b.connection.close_info is not None)
    assert b.connection.close_info.code == 1013
    await eventually(lambda: b.server.closed == [(1013, "messages are not read")])


async def test_inbox_overflow_close_closes_connection(linked: Any) -> None:
    """With that policy reading never pauses, and the message over the limit is counted."""
    b = await linked(inbox_max_messages=1, inbox_overflow="close")
    b.server.sink.message_received("a")
    b.server.sink.message_received("b")
    assert b.connection.close_info.code == 1013
    assert b.events.counters.messages_discarded >= 1


async def test_messages_after_close_in_same_read_are_counted(linked: Any) -> None:
    """Messages in the same read as the one that closed the connection are discarded and counted."""
    b = await linked(inbox_max_messages=2, inbox_overflow="close")
    for number in range(10):
        b.server.sink.message_received(str(number))
    assert b.connection.close_info.code == 1013
    assert b.events.counters.messages_received == 3
    assert b.events.counters.messages_discarded == 10


async def test_heartbeat_measures_only_matching_pongs(linked: Any) -> None:
    """The payload distinguishes an answer from an unsolicited pong; a full transport gets no ping."""
    b = await linked()
    connection = b.connection
    assert connection.protocol.pings_are_answered(connection)
    now = connection.opened_at + 5
    assert connection.protocol.ping(connection, None, now)
    b.server.sink.pong_received(b"anything")
    assert connection.liveness.rtt is None
    b.server.sink.pong_received(b.server.pings[0])
    assert connection.liveness.rtt is not None
    b.server.stall()
    assert not connection.protocol.ping(connection, None, now)


async def test_pongs_up_to_ping_count_are_free(linked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pong frames as there were ping frames are free, even late ones; further ones count."""
    b = await linked()
    monkeypatch.setattr(quota, "monotonic", lambda: b.connection.opened_at)  # so no token comes back
    for number in range(300):
        b.connection.protocol.ping(b.connection, None, b.connection.opened_at + number)
    for payload in b.server.pings:
        b.server.sink.pong_received(payload)
    for _ in range(int(quota.CONTROL_FRAMES.burst)):
        b.server.sink.pong_received(b"unasked")
    assert b.connection.close_info is None
    b.server.sink.pong_received(b"unasked")
    assert b.connection.close_info.code == 4429


async def test_partial_message_counts_as_liveness(linked: Any) -> None:
    """A large message over a slow connection is not silence, and its end answers the open ping."""
    b = await linked()
    liveness = b.connection.liveness
    liveness.last_seen = liveness.awaiting_since = -1.0
    b.server.sink.data_received()
    assert liveness.last_seen > 0
    assert liveness.awaiting_since == -1.0
    b.server.sink.message_received("whole")
    assert liveness.awaiting_since is None


@pytest.mark.parametrize("frame", ["ping", "pong"])
async def test_control_frame_answers_pending_ping(linked: Any, frame: str) -> None:
    """A ping or pong of the client is a whole frame."""
    b = await linked()
    b.connection.liveness.awaiting_since = -1.0
    if frame == "ping":
        b.server.sink.ping_received()
    else:
        b.server.sink.pong_received(b"unasked")
    assert b.connection.liveness.awaiting_since is None


async def test_queued_messages_are_written_before_server_stops(linked: Any) -> None:
    """Messages queued in the iteration in which the server stops are not lost."""
    b = await linked()
    offer(b, "last words")
    b.server.sink.before_shutdown()
    assert b.server.writes == [b"\x81\x0alast words"]


async def test_compression_none_negotiates_and_sends_none(linked: Any) -> None:
    """Neither the handshake nor a frame is compressed."""
    b = await linked(compression="none", compression_min_bytes=0)
    b.connection.outbox.direct.refuse_compression()  # as the handshake does
    assert not b.server.compression
    offer(b, "x" * 100)
    await settle()
    assert b.server.writes[0][0] == 0x81


async def test_connection_lost_before_registration_is_not_registered(manager_with: Any) -> None:
    """A transport can report a lost client while user code runs between accept and registration."""
    manager, _ = manager_with()
    server = LinkServer()
    server.gone_before = {"type": "websocket.disconnect", "code": 1001, "reason": ""}
    with pytest.raises(Exception, match="connection is closed"):
        await asyncio.wait_for(manager.connect("ann", await server.accepted()), 5)
    assert manager.get_connection_count() == 0
    assert manager.get_active_connections() == []


async def test_middleware_around_direct_transport_is_logged_once(manager_with: Any) -> None:
    """Such connections use ASGI, and the log gives the reason once."""
    manager, heard = manager_with(compression="none")
    for name in ("ann", "bob"):
        server = LinkServer()
        websocket = await server.accepted()
        send = websocket._send

        async def wrapped(message: Any, send: Any = send) -> None:
            await send(message)

        websocket._send = wrapped
        await manager.connect(name, websocket)
    assert await manager.send_to_client("bob", "hi")
    await server.until(lambda: server.data == ["hi"])
    assert heard.events.count("link_wrapped") == 1
    assert heard.events.count("compression_left_to_server") == 1


@pytest.mark.parametrize(
    ("server", "options", "reported"),
    [
        pytest.param(FakeServer, {}, [], id="defaults"),
        pytest.param(FakeServer, {"unsent_low_water_bytes": 1}, [["unsent_low_water_bytes"]], id="no transport"),
        pytest.param(LinkServer, {"unsent_low_water_bytes": 1}, [], id="transport"),
    ],
)
async def test_buffer_limit_without_effect_is_logged_once(
    manager_with: Any, server: Any, options: dict[str, Any], reported: list[Any]
) -> None:
    """A changed limit for buffers that the library cannot limit is logged once, with its name."""
    manager, heard = manager_with(**options)
    for name in ("ann", "bob"):
        await manager.connect(name, await server().accepted())
    assert [report.fields["options"] for report in heard.of("buffers_left_to_server")] == reported


async def test_buffer_limit_without_system_support_is_logged(
    manager_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a system without `TCP_NOTSENT_LOWAT` only that option has no effect."""
    for module in ("fastapi_ws_stabilizer.handshake.acceptor", "fastapi_ws_stabilizer.connection.server_transport"):
        monkeypatch.setattr(f"{module}.HAS_UNSENT_LOW_WATER", False)
    manager, heard = manager_with(unsent_low_water_bytes=1, write_buffer_high_water_bytes=1)
    await manager.connect("ann", await LinkServer().accepted())
    (report,) = heard.of("buffers_left_to_server")
    assert report.fields["options"] == ["unsent_low_water_bytes"]


async def test_bug_in_message_receipt_is_logged_and_closes(linked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log names the bug, and the server sees no exception, as on other servers."""
    b = await linked()
    monkeypatch.setattr("fastapi_ws_stabilizer.connection.protocol.PlainProtocol.decode", lambda *_: 1 / 0)
    b.server.sink.message_received("x")
    assert b.connection.close_info.cause is DisconnectReason.NETWORK_LOST
    (report,) = b.heard.of("internal_task_failed")
    assert isinstance(report.error, ZeroDivisionError)


@pytest.mark.parametrize("reason", [DisconnectReason.MEMORY, DisconnectReason.APPLICATION])
async def test_failing_server_close_does_not_block_teardown(linked: Any, reason: DisconnectReason) -> None:
    """If `close` of the transport raises, the connection finishes as after a close frame."""
    b = await linked()

    def refuse(code: int, reason: str) -> None:
        raise RuntimeError("connection is closing")

    b.server.close = refuse
    b.connection.close(reason)
    await asyncio.wait({b.connection.closed}, timeout=5)
    assert b.connection.is_closed


async def test_full_transport_with_empty_queue_is_watched(linked: Any) -> None:
    """A client that does not take its only message is closed as a slow consumer after `send_timeout`."""
    b = await linked(send_timeout=0.05)
    offer(b, "large")
    b.connection.outbox._write = lambda data: (b.server.writes.append(data), b.server.stall())
    await settle()
    assert len(b.connection.outbox) == 0
    await eventually(lambda: b.connection.close_info is not None)
    assert b.connection.close_info.cause is DisconnectReason.SLOW_CONSUMER


async def test_drained_transport_is_not_watched(linked: Any) -> None:
    """The watch ends when the transport drains, and messages use the fast path again."""
    b = await linked(send_timeout=0.05)
    b.server.stall()
    b.server.drain()
    await asyncio.sleep(0.1)
    assert b.connection.close_info is None
    assert b.connection.outbox._stall is None
    assert b.connection.outbox.try_enqueue(encode("a"))


async def test_transport_full_before_attach_is_watched(linked: Any, bench: Any) -> None:
    """Bytes that the server wrote before the attach count too."""
    b = bench(send_timeout=0.05)
    b.server = LinkServer()
    b.server.write_paused = True
    await b.open()
    await eventually(lambda: b.connection.close_info is not None)
    assert b.connection.close_info.cause is DisconnectReason.SLOW_CONSUMER


# ── sends of user code ──


async def test_endpoint_send_is_written_before_yielding(linked: Any) -> None:
    """A message of the endpoint is at the transport when the call returns, whatever the endpoint does next."""
    b = await linked()
    assert b.connection.try_send(encode("now"))
    assert b.connection.try_send(encode("too"))
    assert b.server.writes == [b"\x81\x03now", b"\x81\x03too"]
    assert b.events.counters.messages_sent == 2
    assert len(b.connection.outbox) == b.connection.outbox.held_bytes == 0


async def test_endpoint_send_flushes_earlier_queued_messages(linked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that a broadcast has queued in the same iteration are sent first, and nothing is sent twice."""
    b = await linked()
    monkeypatch.setattr(scheduling_module, "monotonic", lambda: 0.0)  # the loop is not blocked for long
    offer(b, "first")
    sending = b.connection.send(encode("then"))
    with pytest.raises(StopIteration):
        sending.send(None)
    assert b.server.writes == [b"\x81\x05first\x81\x04then"]
    await settle()
    assert len(b.server.writes) == 1


async def test_endpoint_send_waits_in_outbox_while_transport_is_full(linked: Any) -> None:
    """A client that does not read gets no further writes, and queued messages are sent in order when it resumes."""
    b = await linked()
    b.server.stall()
    for text in ("a", "b"):
        await b.connection.send(encode(text))
    assert b.server.writes == []
    b.server.drain()
    await settle()
    assert b"".join(b.server.writes) == b"\x81\x01a\x81\x01b"


async def test_sender_yields_to_loop_after_max_block(linked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A send yields to the loop when it was blocked for longer than MAX_BLOCK, and otherwise does not."""
    b = await linked()
    now = [1e9]
    monkeypatch.setattr(scheduling_module, "monotonic", lambda: now[0])
    await b.connection.send(encode("first"))
    turned: list[str] = []
    asyncio.get_running_loop().call_soon(turned.append, "turned")
    await b.connection.send(encode("second"))
    assert turned == []
    now[0] += 2 * scheduling_module.MAX_BLOCK
    await b.connection.send(encode("third"))
    assert turned == ["turned"]


# ── endpoints that do not read ──


def say(b: Any, *texts: str) -> None:
    """Let the client send some messages."""
    for text in texts:
        b.server.sink.message_received(text)


async def test_unread_inbox_drops_oldest_after_pause_timeout(linked: Any) -> None:
    """An endpoint that only sends is not closed for unread messages; the oldest are dropped, counted and logged."""
    b = await linked(inbox_max_messages=2, inbox_pause_timeout=0.05)
    say(b, "1", "2", "3")
    assert b.connection.pause
    assert not b.server.reading
    await eventually(lambda: b.server.reading)
    assert not b.connection.pause
    say(b, "4", "5")
    assert b.server.reading
    assert b.connection.inbox.unread() == ["4", "5"]
    assert b.events.counters.messages_discarded == 3
    (event,) = b.heard.of("messages_not_read")
    assert "ignore_messages" in event.fields["advice"]
    assert b.connection.close_info is None


async def test_ignore_messages_never_pauses_reading(linked: Any) -> None:
    """`ws.ignore_messages()` takes effect at once, also after a read, and until the next read."""
    b = await linked(inbox_max_messages=2)
    ws = b.connection.socket
    say(b, "subscribe")
    assert await ws.receive() == "subscribe"
    ws.ignore_messages()
    say(b, *"123456")
    assert b.server.reading
    assert b.events.counters.messages_discarded == 4
    assert [await ws.receive() for _ in range(2)] == ["5", "6"]
    say(b, *"789")
    assert not b.server.reading
    assert b.heard.of("messages_not_read") == []


async def test_ignore_messages_ends_current_read_pause(linked: Any) -> None:
    """A full inbox is emptied as far as needed when the endpoint calls `ignore_messages()`."""
    b = await linked(inbox_max_messages=2)
    say(b, *"123")
    assert not b.server.reading
    b.connection.socket.ignore_messages()
    assert b.server.reading


async def waits_for_the_end(b: Any) -> asyncio.Future[Any]:
    """Return a task of the endpoint that has called `wait_closed`."""
    waiting = asyncio.ensure_future(b.connection.socket.wait_closed())
    await asyncio.sleep(0)
    return waiting


async def test_wait_closed_without_read_drops_oldest_silently(linked: Any) -> None:
    """`wait_closed` in an endpoint that has not read drops the oldest messages, soon and without a warning."""
    b = await linked(inbox_max_messages=2)
    waiting = await waits_for_the_end(b)
    say(b, *"123")
    assert not b.server.reading
    await asyncio.sleep(1.5 * READER_START_GRACE)
    say(b, *"45")
    assert b.server.reading
    assert b.events.counters.messages_discarded == 3
    assert "reading_paused" not in b.heard.events
    waiting.cancel()


async def test_cancelled_wait_closed_loses_no_message(linked: Any) -> None:
    """An endpoint that calls `wait_closed` from time to time, and has not read yet, loses no message."""
    b = await linked(inbox_max_messages=2)
    waiting = await waits_for_the_end(b)
    say(b, *"12")
    waiting.cancel()
    await asyncio.sleep(0)
    say(b, "3")
    await asyncio.sleep(1.5 * READER_START_GRACE)
    assert [await b.connection.socket.receive() for _ in range(3)] == ["1", "2", "3"]
    assert "reading_paused" in b.heard.events


@pytest.mark.parametrize("reads", [False, True])
async def test_burst_during_wait_closed_closes_only_if_later_read(linked: Any, reads: bool) -> None:
    """With inbox_overflow="close", a burst during `wait_closed` is dropped, unless the endpoint reads later."""
    b = await linked(inbox_max_messages=2, inbox_overflow="close")
    waiting = await waits_for_the_end(b)
    say(b, *"123")
    assert b.connection.close_info is None
    if reads:
        assert await b.connection.socket.receive() == "1"
    await asyncio.sleep(1.5 * READER_START_GRACE)
    assert (b.connection.close_info is not None) is reads
    waiting.cancel()


async def test_hanging_handler_beside_wait_closed_is_logged(linked: Any) -> None:
    """A handler that hangs from the first message on is named in the log, even if wait_closed is called beside it."""
    b = await linked(inbox_max_messages=2)
    waiting = await waits_for_the_end(b)
    say(b, "0")
    assert await b.connection.socket.receive() == "0"
    say(b, *"123")
    assert "reading_paused" not in b.heard.events
    await asyncio.sleep(1.5 * READER_START_GRACE)
    assert "reading_paused" in b.heard.events
    assert b.events.counters.messages_discarded == 0
    waiting.cancel()


async def test_woken_reader_loses_nothing_to_burst(linked: Any) -> None:
    """A burst that fills the inbox before the woken reader has run is read completely."""
    b = await linked(inbox_max_messages=2)
    waiting = await waits_for_the_end(b)
    await asyncio.sleep(1.5 * READER_START_GRACE)
    reading = asyncio.ensure_future(b.connection.socket.receive())
    await asyncio.sleep(0)
    say(b, *"123")
    assert await reading == "1"
    assert [await b.connection.socket.receive() for _ in range(2)] == ["2", "3"]
    assert b.events.counters.messages_discarded == 0
    waiting.cancel()


async def test_slow_reader_beside_wait_closed_loses_nothing(linked: Any) -> None:
    """When one task waits for the close and another reads slowly, reading pauses and no message is dropped."""
    b = await linked(inbox_max_messages=2)
    waiting = await waits_for_the_end(b)
    say(b, "1")
    assert await b.connection.socket.receive() == "1"
    say(b, *"234")
    assert not b.server.reading
    assert b.events.counters.messages_discarded == 0
    waiting.cancel()


async def test_endpoint_sending_after_first_read_stays_connected(linked: Any) -> None:
    """After a first read, an endpoint that only sends keeps its connection when its inbox is full."""
    b = await linked(inbox_max_messages=1, inbox_pause_timeout=0.05)
    say(b, "subscribe")
    await b.connection.socket.receive()
    say(b, *"123")
    assert not b.server.reading
    await b.connection.socket.send("news")
    await eventually(lambda: b.server.reading)
    assert b.connection.close_info is None
    assert len(b.heard.of("messages_not_read")) == 1


async def test_broadcasts_do_not_save_hanging_endpoint_from_1013(linked: Any) -> None:
    """Broadcasts do not show that the endpoint is alive: it has neither read nor sent, and is closed with 1013."""
    b = await linked(inbox_max_messages=1, inbox_pause_timeout=0.05)
    say(b, "subscribe")
    await b.connection.socket.receive()
    say(b, *"12")
    offer(b, "the news of others")
    await eventually(lambda: b.connection.close_info is not None or b.server.reading)
    assert b.connection.close_info is not None
    assert b.connection.close_info.code == 1013


async def test_idle_check_does_not_close_sending_endpoint(linked: Any) -> None:
    """Sends of the endpoint are tracked separately from the use of its connection."""
    b = await linked(inbox_max_messages=1, inbox_pause_timeout=0.05)
    say(b, "subscribe")
    await b.connection.socket.receive()
    say(b, *"12")
    await b.connection.socket.send("news")
    assert b.connection.protocol.consume_activity(b.connection)
    await eventually(lambda: b.connection.close_info is not None or b.server.reading)
    assert b.connection.close_info is None


async def test_pause_timer_holds_no_endpoint_context(linked: Any) -> None:
    """A pause that begins in code of the endpoint does not keep its context variables alive."""
    b = await linked(inbox_max_messages=1)
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")
    tenant.set("ann's")
    say(b, *"12")
    assert tenant not in b.server.sink._timer._context


# ── messages with a coalesce_key ──

VALUE_BYTES = 1000


def send_values(b: Any, count: int, first: int = 0) -> None:
    """Send values of one key, each in a write of its own."""
    for number in range(first, first + count):
        b.connection.outbox.offer_now(encode(f"{number:04}".ljust(VALUE_BYTES, "x"), "price"))


def values_written(b: Any) -> list[int]:
    """Return the numbers in the frames, each of which has a header of 4 bytes."""
    data = b"".join(b.server.writes)
    return [int(data[at + 4 : at + 8]) for at in range(0, len(data), VALUE_BYTES + 4)]


async def test_values_wait_for_pong_beyond_read_window(linked: Any) -> None:
    """Of values that the client has not confirmed to have read, at most `MAX_UNREAD_BYTES` are sent, and the latest."""
    b = await linked()
    send_values(b, 500)
    count = len(b.server.writes)
    assert MAX_UNREAD_BYTES <= count * (VALUE_BYTES + 4) <= MAX_UNREAD_BYTES + VALUE_BYTES + 4
    assert b.connection.outbox.blocked
    assert len(b.connection.outbox) == 1
    assert b.events.counters.messages_coalesced == 500 - count - 1
    (ping,) = b.server.pings
    b.server.sink.pong_received(ping)
    assert values_written(b) == [*range(count), 499]
    assert not b.connection.outbox.blocked


async def test_pongs_of_reading_client_keep_values_flowing(linked: Any) -> None:
    """A client that answers pings gets every value that it has time for."""
    b = await linked()
    for number in range(200):
        send_values(b, 1, number)
        for ping in b.server.pings:
            b.server.sink.pong_received(ping)
        b.server.pings.clear()
    assert values_written(b) == list(range(200))


async def test_messages_without_key_ignore_read_window(linked: Any) -> None:
    """Messages without a key wait for no pong and do not count, unless one with a key waits before them."""
    b = await linked()
    b.server.stall()
    for number in range(200):
        b.connection.outbox.offer_now(encode(f"{number:04}".ljust(VALUE_BYTES, "x")))
    send_values(b, 1, 200)
    b.server.drain()
    assert values_written(b) == list(range(201))
    assert b.server.pings == []
    send_values(b, 100)
    offer(b, "behind")
    await settle()
    assert not b.server.writes[-1].endswith(b"behind")
    b.server.sink.pong_received(b.server.pings[0])
    assert b.server.writes[-1].endswith(b"behind")


async def test_values_are_not_bounded_without_ping_frames(linked: Any) -> None:
    """With another heartbeat than ping frames nothing asks for pongs, and the transport alone bounds the values."""
    b = await linked(heartbeat_type="off")
    send_values(b, 200)
    assert len(b.server.writes) == 200
    assert b.server.pings == []


async def test_values_wait_for_no_pong_while_inbox_is_full(linked: Any) -> None:
    """A full inbox pauses reading, so no pong is read. The values flow, and wait for pongs again after the pause."""
    b = await linked(inbox_max_messages=1)
    send_values(b, 100)
    assert b.connection.outbox.blocked
    say(b, "1", "2")
    assert not b.server.reading
    assert not b.connection.outbox.blocked
    send_values(b, 100, 100)
    assert values_written(b)[-100:] == list(range(100, 200))
    assert [await b.connection.inbox.get() for _ in range(2)] == ["1", "2"]
    send_values(b, 100, 200)
    assert values_written(b)[-1] == 199
    assert b.connection.outbox.blocked
    for ping in b.server.pings:
        b.server.sink.pong_received(ping)
    assert values_written(b)[-1] == 299


async def test_values_wait_for_no_pong_that_is_never_required(linked: Any) -> None:
    """With `require_pong=False`, a client need not answer pings, so values do not wait for that."""
    b = await linked(require_pong=False)
    send_values(b, 200)
    assert len(b.server.writes) == 200
    assert b.server.pings == []


async def test_pong_to_later_heartbeat_confirms_values(linked: Any) -> None:
    """A client may answer only the last of several pings (RFC 6455 section 5.5.3)."""
    b = await linked()
    before = b.connection.liveness.start_ping(monotonic())
    send_values(b, 100)
    b.server.sink.pong_received(before)
    assert b.connection.outbox.blocked
    after = b.connection.liveness.start_ping(monotonic())
    b.server.sink.pong_received(after)
    assert values_written(b)[-1] == 99
    assert not b.connection.outbox.blocked


async def test_offered_value_is_sent_in_iteration_of_cancellation(linked: Any) -> None:
    """A sender is cancelled and has not run yet when there is room. The offered value that has replaced its is sent."""
    b = await linked(outbox_max_messages=1)
    b.server.stall()
    b.connection.outbox.offer(encode("queued"))
    senders = [asyncio.ensure_future(b.connection.send(encode("sent", key))) for key in ("price", "cursor")]
    await settle()
    b.connection.outbox.offer(encode("offered", "price"))
    for sender in senders:
        sender.cancel()
    b.server.drain()
    await asyncio.gather(*senders, return_exceptions=True)
    assert b"".join(b.server.writes).count(b"offered") == 1
    assert b"sent" not in b"".join(b.server.writes)


async def test_close_flushes_value_that_waits_for_pong(linked: Any) -> None:
    """A close does not wait for a pong: the latest value is sent before the close frame."""
    b = await linked()
    send_values(b, 100)
    b.connection.close(DisconnectReason.APPLICATION)
    await settle()
    assert values_written(b)[-1] == 99
    assert b.server.closed == [(1000, "")]


async def test_wait_for_pong_does_not_count_as_stalled_send(linked: Any) -> None:
    """A client that answers no ping is slow, but only the heartbeat ends its connection."""
    b = await linked(send_timeout=0.05)
    send_values(b, 100)
    await eventually(lambda: b.connection.outbox.blocked_seconds > 0.2)
    assert b.connection.close_info is None


async def test_heartbeat_closes_client_that_answers_no_ping_while_values_wait(manager_with: Any) -> None:
    """Values that wait for a pong are no excuse for silence, because a client that reads answers their ping too."""
    manager, _ = manager_with(heartbeat_interval=0.1, heartbeat_timeout=0.3, require_pong=True)
    ws = await manager.connect("ann", await LinkServer().accepted())
    for number in range(100):
        await manager.broadcast(f"{number:04}".ljust(VALUE_BYTES, "x"), coalesce_key="price")
        await settle()
    await asyncio.wait_for(ws.wait_closed(), 5)
    assert ws.reason is DisconnectReason.HEARTBEAT_TIMEOUT


async def test_stalled_transport_is_found_during_wait_for_pong(linked: Any) -> None:
    """If the transport is full too, the client is disconnected `send_timeout` later."""
    b = await linked(send_timeout=0.3)
    send_values(b, 100)
    await eventually(lambda: b.connection.outbox.blocked_seconds > 0.4)
    b.server.stall()
    assert b.connection.outbox.blocked_seconds < 0.1
    await asyncio.sleep(0.1)
    assert b.connection.close_info is None
    await eventually(lambda: b.connection.close_info is not None)
    assert b.connection.close_info.cause is DisconnectReason.SLOW_CONSUMER


async def test_full_transport_and_full_window_both_hold_values(linked: Any) -> None:
    """Neither a pong to a full transport, nor room in the transport for a full window, sends a value."""
    b = await linked()
    send_values(b, 100)
    count = len(b.server.writes)
    b.server.stall()
    b.server.drain()
    assert len(b.server.writes) == count
    b.server.stall()
    b.server.sink.pong_received(b.server.pings[0])
    assert len(b.server.writes) == count
    b.server.drain()
    assert values_written(b)[-1] == 99


# ── protocol violations ──


async def test_violation_without_unread_messages_fails_at_once(linked: Any) -> None:
    """Nothing came before the violation, so nothing is waited for."""
    b = await linked()
    failed: list[bool] = []
    b.server.sink.violation_received(lambda: failed.append(True))
    assert failed == [True]


async def test_violation_without_reader_fails_at_once(linked: Any) -> None:
    """An endpoint that does not read messages answers none, so nothing is waited for."""
    b = await linked()
    b.server.sink.message_received("unread")
    failed: list[bool] = []
    b.server.sink.violation_received(lambda: failed.append(True))
    assert failed == [True]


async def test_violation_waits_until_messages_before_it_are_read(linked: Any) -> None:
    """The connection fails after the read of the last message, and not within that read."""
    b = await linked()
    inbox = b.connection.inbox
    for text in ("first", "second", "third"):
        b.server.sink.message_received(text)
    assert await inbox.get() == "first"
    failed: list[bool] = []
    b.server.sink.violation_received(lambda: failed.append(True))
    assert await inbox.get() == "second"
    await settle()
    assert failed == []
    assert await inbox.get() == "third"
    assert failed == []
    await settle()
    assert failed == [True]


async def test_violation_fails_after_grace_if_messages_stay_unread(
    linked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy endpoint delays the failure for `VIOLATION_GRACE` seconds only, and it happens once."""
    monkeypatch.setattr("fastapi_ws_stabilizer.connection.direct_reader.VIOLATION_GRACE", 0.05)
    b = await linked()
    for text in ("first", "second"):
        b.server.sink.message_received(text)
    assert await b.connection.inbox.get() == "first"
    failed: list[bool] = []
    b.server.sink.violation_received(lambda: failed.append(True))
    await eventually(lambda: failed)
    assert await b.connection.inbox.get() == "second"
    await settle()
    assert failed == [True]


async def test_violation_fails_when_connection_closes_first(linked: Any) -> None:
    """A close for another reason does not wait for reads."""
    b = await linked()
    for text in ("first", "second"):
        b.server.sink.message_received(text)
    assert await b.connection.inbox.get() == "first"
    failed: list[bool] = []
    b.server.sink.violation_received(lambda: failed.append(True))
    b.connection.close(DisconnectReason.REPLACED)
    await settle()
    assert failed == [True]
