"""Tests of the task that always reads."""

from __future__ import annotations

from typing import Any

import pytest

from fastapi_ws_stabilizer import scheduling
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection import pump as pump_module
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.outbox import MAX_CONTROL_FRAMES
from fastapi_ws_stabilizer.connection.server_transport import ServerTransport
from fastapi_ws_stabilizer.errors import SocketClosed
from tests.support.fake_websocket import FakeServer, eventually, settle, with_deadline


async def test_messages_are_read_without_waiting_reader(bench: Any) -> None:
    """Received messages go to the inbox and are counted, whatever the endpoint is doing."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed_text("one", "")
    b.server.feed_bytes(b"two")
    await eventually(lambda: len(connection.inbox) == 3)
    assert [await connection.socket.receive() for _ in range(3)] == ["one", "", b"two"]
    assert b.events.counters.messages_received == 3


async def test_event_without_text_or_bytes_is_empty_binary(bench: Any) -> None:
    """A message with neither text nor bytes, as some servers send it, is empty bytes."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed({"type": "websocket.receive", "text": None, "bytes": None})
    assert await with_deadline(connection.socket.receive()) == b""


@pytest.mark.parametrize(
    ("ping", "pong"),
    [("ping", "pong"), ('{"type":"ping"}', '{"type":"pong"}'), ('{"type":"ping","ts":5}', '{"type":"pong","ts":5}')],
)
async def test_text_ping_is_answered_while_handler_is_busy(bench: Any, ping: str, pong: str) -> None:
    """Text pings are answered by the pump and are not messages."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed_text(ping, "data")
    await b.server.until(lambda: b.server.data == [pong])
    await eventually(lambda: len(connection.inbox) == 1)
    assert b.events.counters.messages_received == 1


async def test_text_pong_counts_as_liveness_and_is_hidden(bench: Any) -> None:
    """A pong updates liveness and is hidden from the endpoint."""
    b = bench()
    connection, _ = await b.open()
    connection.liveness.on_ping_queued(connection.opened_at)
    b.server.feed_text('{"type":"pong"}')
    await eventually(lambda: connection.liveness.has_ponged)
    assert connection.liveness.rtt is not None
    assert connection.liveness.awaiting_since is None
    assert len(connection.inbox) == 0


async def test_data_counts_as_liveness_but_not_as_pong(bench: Any) -> None:
    """Data proves life like a pong, but does not count as an answer."""
    b = bench()
    connection, _ = await b.open()
    connection.liveness.on_ping_queued(connection.opened_at)
    b.server.feed_text("data")
    await eventually(lambda: len(connection.inbox) == 1)
    assert connection.liveness.awaiting_since is None
    assert connection.liveness.last_seen >= connection.opened_at
    assert not connection.liveness.has_ponged


async def test_disabled_control_frames_are_data(bench: Any) -> None:
    """Where control frames are off, `ping` and `pong` are data like any other."""
    b = bench()
    connection, _ = await b.open(control_frames=False)
    b.server.feed_text("ping", '{"type":"pong"}')
    await eventually(lambda: len(connection.inbox) == 2)
    assert [await connection.socket.receive(), await connection.socket.receive()] == ["ping", '{"type":"pong"}']
    assert b.server.data == []


async def test_unparsable_control_text_is_data(bench: Any) -> None:
    """A half surrogate pair in a text like a control frame does not stop the reading."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed_text('{"type":"ping","ts":"\ud800"}', "next")
    await eventually(lambda: len(connection.inbox) == 2)
    assert b.task_failures == []


@pytest.mark.parametrize("message", ["x" * 11, "ä" * 6, "🌱" * 3, b"x" * 11])
async def test_message_over_max_size_closes_1009_undelivered(bench: Any, message: str | bytes) -> None:
    """One byte over `max_message_size` closes with 1009, and no reader gets the message."""
    b = bench(max_message_size=10)
    connection, _ = await b.open()
    if isinstance(message, str):
        b.server.feed_text(message)
    else:
        b.server.feed_bytes(message)
    await with_deadline(connection.closed)
    assert b.server.close_frames == [(1009, "message over 10 bytes")]
    assert connection.close_info.cause is DisconnectReason.MESSAGE_TOO_BIG
    assert b.events.counters.messages_received == 0
    assert len(connection.inbox) == 0


@pytest.mark.parametrize("message", ["x" * 10, "ä" * 5, "🌱🌱äx"[:2] + "xx", b"x" * 10])
async def test_message_at_max_size_is_accepted(bench: Any, message: str | bytes) -> None:
    """Exactly `max_message_size` bytes are allowed."""
    b = bench(max_message_size=10)
    connection, _ = await b.open()
    if isinstance(message, str):
        b.server.feed_text(message)
    else:
        b.server.feed_bytes(message)
    assert await with_deadline(connection.socket.receive()) == message


async def test_full_inbox_pauses_reading_until_read(bench: Any) -> None:
    """With `inbox_overflow="pause"` reading stops at the limit, is reported once, and resumes when there is room."""
    b = bench(inbox_max_messages=2)
    connection, _ = await b.open()
    b.server.feed_text("1", "2", "3", "4", "5")
    await eventually(lambda: connection.pause)
    await settle()
    assert len(connection.inbox) == 2
    assert [await with_deadline(connection.socket.receive()) for _ in range(5)] == ["1", "2", "3", "4", "5"]
    await eventually(lambda: not connection.pause)
    assert len(b.heard.of("reading_paused")) == 1
    assert connection.close_info is None


async def test_read_pause_does_not_count_as_silence(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a read pause never counts as the client's silence."""
    b = bench(inbox_max_messages=1)
    connection, _ = await b.open()
    b.server.feed_text("1", "2")
    await eventually(lambda: connection.pause)
    connection.liveness.last_seen = 0.0
    connection.liveness.awaiting_since = 0.0
    await connection.socket.receive()
    await eventually(lambda: not connection.pause)
    assert connection.liveness.last_seen > 0.0
    assert connection.liveness.awaiting_since is None


@pytest.mark.parametrize(("is_closing", "starts"), [(False, 1), (True, 0)])
async def test_keepalive_starts_again_after_read_pause(bench: Any, is_closing: bool, starts: int) -> None:
    """The server's own pings start again after a pause, but not on a transport that is closing.

    uvicorn has stopped them at its loss, and would stop them no more.
    """

    class Transport:
        def abort(self) -> None: ...

        def is_closing(self) -> bool:
            return is_closing

    b = bench(inbox_max_messages=1)
    calls: list[str] = []
    b.server.transport = Transport()
    b.server.stop_keepalive = lambda: calls.append("stop")
    b.server.start_keepalive = lambda: calls.append("start")
    connection, _ = await b.open()
    pump_module.begin_pause(connection)
    pump_module.resume(connection)
    assert calls == ["stop"] + ["start"] * starts


async def test_connection_can_close_during_read_pause(bench: Any) -> None:
    """A connection can be closed during a read pause, and received messages can still be read."""
    b = bench(inbox_max_messages=1)
    connection, _ = await b.open()
    b.server.feed_text("1", "2")
    await eventually(lambda: connection.pause)
    connection.close(DisconnectReason.SERVER_SHUTDOWN)
    await with_deadline(connection.closed)
    assert await connection.socket.receive() == "1"
    assert b.server.close_frames == [(1012, "server shutdown")]


@pytest.mark.parametrize(
    "reason",
    [
        DisconnectReason.REPLACED,
        DisconnectReason.LIFETIME,
        DisconnectReason.SERVER_SHUTDOWN,
        DisconnectReason.HEARTBEAT_TIMEOUT,
    ],
)
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
async def test_close_during_read_pause_delivers_read_messages(
    bench: Any, reason: DisconnectReason, tracked: bool
) -> None:
    """A close that delivers unread messages delivers the message that filled the inbox too."""
    b = bench(inbox_max_messages=2)
    connection, _ = await b.open(cancellable=tracked)
    b.server.feed_text("1", "2", "3")
    await eventually(lambda: connection.pause)
    connection.close(reason)
    read = [await with_deadline(connection.socket.receive()) for _ in range(3)]
    with pytest.raises(SocketClosed):
        await with_deadline(connection.socket.receive())
    assert read == ["1", "2", "3"]
    assert b.events.counters.messages_received == 3
    assert b.events.counters.messages_discarded == 0
    connection.endpoint.mark_returned()


@pytest.mark.parametrize("code", [None, 1000])
async def test_close_during_read_pause_counts_discarded_messages(bench: Any, code: int | None) -> None:
    """Each received message is handled or counted as discarded, also if the endpoint reads only a part."""
    b = bench(inbox_max_messages=2)
    connection, _ = await b.open(cancellable=True)
    b.server.feed_text("1", "2", "3")
    await eventually(lambda: connection.pause)
    connection.close(DisconnectReason.SERVER_SHUTDOWN if code is None else DisconnectReason.APPLICATION, code=code)
    handled = 1 if code is None else 0
    if handled:
        assert await with_deadline(connection.socket.receive()) == "1"
    connection.endpoint.mark_returned()
    await with_deadline(connection.closed)
    assert b.events.counters.messages_discarded + handled == b.events.counters.messages_received == 3


async def test_inbox_overflow_close_closes_with_1013(bench: Any) -> None:
    """With `inbox_overflow="close"` a client that sends faster than the endpoint reads is closed with 1013."""
    b = bench(inbox_max_messages=2, inbox_overflow="close")
    connection, _ = await b.open()
    b.server.feed_text("1", "2", "3")
    await with_deadline(connection.closed)
    assert b.server.close_frames == [(1013, "inbox full")]
    assert b.events.counters.messages_discarded == 3


async def test_inbox_max_bytes_pauses_reading(bench: Any) -> None:
    """`inbox_max_bytes` pauses the reading like `inbox_max_messages`."""
    b = bench(inbox_max_bytes=1000)
    connection, _ = await b.open()
    b.server.feed_text("x" * 2000, "next")
    await eventually(lambda: connection.pause)
    assert len(connection.inbox) == 1


@pytest.mark.parametrize(
    ("code", "reason", "expected", "seen"),
    [
        (1000, "", DisconnectReason.CLIENT_CLOSE, 1000),
        (1001, None, DisconnectReason.CLIENT_CLOSE, 1001),
        (4000, "later", DisconnectReason.CLIENT_CLOSE, 4000),
        (1005, None, DisconnectReason.NETWORK_LOST, 1006),
        (1006, "", DisconnectReason.NETWORK_LOST, 1006),
        (1012, None, DisconnectReason.SERVER_SHUTDOWN, 1012),
        (None, None, DisconnectReason.NETWORK_LOST, 1006),
    ],
)
async def test_disconnect_event_decides_close_info(
    bench: Any, code: Any, reason: Any, expected: DisconnectReason, seen: int
) -> None:
    """A disconnect event determines the close info, and nothing more is sent."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed_disconnect(code, reason)
    await with_deadline(connection.closed)
    assert (connection.close_info.cause, connection.close_info.code) == (expected, seen)
    assert connection.close_info.by_peer
    assert b.server.close_frames == []


async def test_failing_receive_is_lost_connection(bench: Any) -> None:
    """A server that fails in `receive` counts as a lost connection, and no error is logged."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed(RuntimeError("stream closed"))
    await with_deadline(connection.closed)
    assert (connection.close_info.cause, connection.close_info.code) == (DisconnectReason.NETWORK_LOST, 1006)
    assert b.heard.of("connection_lost")[0].fields["cause"] == "RuntimeError('stream closed')"
    assert max(report.level for report in b.heard.all) < 30


@pytest.mark.parametrize("max_block", [scheduling.MAX_BLOCK, -1.0], ids=["at once", "later"])
async def test_disconnect_with_failing_server_object_ends_connection(
    bench: Any, monkeypatch: pytest.MonkeyPatch, max_block: float
) -> None:
    """If the server's objects fail when asked about a loss, the connection ends too, also if the loss has waited."""
    monkeypatch.setattr(scheduling, "MAX_BLOCK", max_block)
    monkeypatch.setattr(ServerTransport, "saw_close_frame", lambda *_: 1 / 0)
    b = bench()
    connection, _ = await b.open()
    b.server.feed_disconnect()
    await eventually(lambda: connection.close_info)
    assert connection.close_info.cause is DisconnectReason.NETWORK_LOST
    assert len(b.heard.of("internal_task_failed")) == 1


async def test_ping_flood_is_not_fully_answered(bench: Any) -> None:
    """A client that pings without reading gets no further answers, so that no queue grows."""
    b = bench()
    connection, _ = await b.open()
    b.server.block()
    b.server.feed_text(*["ping"] * 100, "data")
    await eventually(lambda: len(connection.inbox) == 1)
    assert len(connection.outbox) <= MAX_CONTROL_FRAMES
    assert connection.close_info is None


async def test_pump_bug_is_reported_and_closes_connection(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the pump is reported, and closes the connection, which would have no reader."""
    b = bench()
    connection, _ = await b.open()
    monkeypatch.setattr(type(connection.inbox), "put", lambda self, message: 1 / 0)
    b.server.feed_text("hello")
    await with_deadline(connection.closed)
    assert connection.close_info.cause is DisconnectReason.NETWORK_LOST
    assert [type(report.error) for report in b.heard.of("internal_task_failed")] == [ZeroDivisionError]


@pytest.mark.parametrize(
    ("options", "watches"),
    [
        ({}, False),
        ({"max_total_memory": 10**9}, True),
        ({"max_memory_per_connection": 10**8}, True),
        ({"max_message_rate": 10**6}, True),
        ({"max_byte_rate": 10**9}, True),
    ],
)
async def test_message_size_is_checked_only_with_reachable_limit(
    manager_with: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], watches: bool
) -> None:
    """Without a reachable limit, message sizes are not computed."""
    calls: list[str] = []
    may_send = Connection.admit_message
    monkeypatch.setattr(Connection, "admit_message", lambda *args: bool(calls.append("may") or may_send(*args)))
    monkeypatch.setattr(Connection, "on_message", lambda _: calls.append("heard"))
    manager, _ = manager_with(**options)
    server = FakeServer()
    ws = await manager.connect("ann", await server.accepted())
    server.feed_text("one")
    assert await with_deadline(ws.receive_text()) == "one"
    assert calls == (["may", "heard"] if watches else [])


async def test_pump_drops_oldest_after_pause_timeout_without_read(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After inbox_pause_timeout without a read, reading resumes, and the oldest messages are dropped and counted."""
    monkeypatch.setattr(pump_module, "_POLL_INTERVAL", 0.01)
    b = bench(inbox_max_messages=2, inbox_pause_timeout=0.05)
    connection, _ = await b.open()
    b.server.feed_text("1", "2", "3")
    await eventually(lambda: connection.pause)
    await eventually(lambda: not connection.pause)
    b.server.feed_text("4", "5")
    await eventually(lambda: connection.inbox.unread() == ["4", "5"])
    assert b.events.counters.messages_discarded == 3
    assert len(b.heard.of("messages_not_read")) == 1
    assert connection.close_info is None


async def test_pump_closes_hanging_endpoint_after_pause_timeout(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that has read, but no longer reads or sends, is closed after inbox_pause_timeout."""
    monkeypatch.setattr(pump_module, "_POLL_INTERVAL", 0.01)
    b = bench(inbox_max_messages=1, inbox_pause_timeout=0.05)
    connection, _ = await b.open()
    b.server.feed_text("first")
    await with_deadline(connection.socket.receive())
    b.server.feed_text("1", "2")
    await with_deadline(connection.closed)
    assert b.server.close_frames == [(1013, "messages are not read")]


async def test_pump_does_not_pause_with_ignore_messages(bench: Any) -> None:
    """With `ignore_messages` reading resumes at once."""
    b = bench(inbox_max_messages=2)
    connection, _ = await b.open()
    connection.socket.ignore_messages()
    b.server.feed_text(*"123456")
    await eventually(lambda: connection.inbox.unread() == ["5", "6"])
    assert b.events.counters.messages_discarded == 4
    assert b.heard.of("reading_paused") == []
