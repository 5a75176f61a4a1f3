"""Tests of the life cycle of a connection: it closes once, the same steps follow, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from starlette.websockets import WebSocketDisconnect

from fastapi_ws_stabilizer.close_codes import DisconnectReason, remote_close
from fastapi_ws_stabilizer.errors import NotOpenError, SocketClosed
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_websocket import eventually, settle, with_deadline


def transport_of(server: Any) -> list[str]:
    """Give a server a transport that records its abort."""
    aborted: list[str] = []
    server.transport = SimpleNamespace(abort=lambda: aborted.append("aborted"), get_write_buffer_size=lambda: 0)
    return aborted


async def test_opening_emits_event_and_counts(bench: Any) -> None:
    """Opening a connection emits an event with both ids."""
    b = bench()
    connection, _ = await b.open()
    (report,) = b.heard.all
    assert (report.event, report.level) == ("connection_opened", logging.INFO)
    assert report.fields == {"client_id": "ann", "connection_id": connection.connection_id}
    assert b.events.counters.connections_opened == 1


async def test_connections_of_client_have_distinct_ids(bench: Any) -> None:
    """Two connections of one client have different connection ids."""
    b, c = bench(), bench()
    first, _ = await b.open()
    second, _ = await c.open()
    assert first.client_id == second.client_id
    assert first.connection_id != second.connection_id


async def test_first_close_info_wins(bench: Any) -> None:
    """Later causes do not change the first close info."""
    b = bench()
    connection, _ = await b.open()
    assert connection.close(DisconnectReason.HEARTBEAT_TIMEOUT)
    assert not connection.close(DisconnectReason.APPLICATION, code=4000)
    connection.on_connection_lost(OSError("gone"))
    connection.on_peer_close(remote_close(1001, None, close_frame=True))
    b.server.feed_disconnect(1001)
    await with_deadline(connection.closed)
    assert connection.close_info.cause is DisconnectReason.HEARTBEAT_TIMEOUT
    assert b.server.close_frames == [(4408, "heartbeat timeout")]
    assert b.listener.closing == [connection]
    assert b.events.counters.endings == {DisconnectReason.HEARTBEAT_TIMEOUT: 1}
    assert len(b.heard.of("connection_ended")) == 1


async def test_close_event_has_cause_code_reason_and_duration(bench: Any) -> None:
    """The close event has cause, code, reason and duration, and is not a warning."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed_disconnect(4000, "see you")
    await with_deadline(connection.closed)
    (report,) = b.heard.of("connection_ended")
    fields = dict(report.fields)
    assert fields.pop("seconds") >= 0
    assert fields == {
        "client_id": "ann",
        "connection_id": connection.connection_id,
        "reason": "client_close",
        "code": 4000,
        "text": "see you",
    }
    assert report.level == logging.INFO


@pytest.mark.parametrize(
    ("reason", "flushed"),
    [
        (DisconnectReason.COMPLETED, True),
        (DisconnectReason.APPLICATION, True),
        (DisconnectReason.SERVER_SHUTDOWN, True),
        (DisconnectReason.REPLACED, True),
        (DisconnectReason.ERROR, True),
        (DisconnectReason.SLOW_CONSUMER, False),
        (DisconnectReason.HEARTBEAT_TIMEOUT, False),
    ],
)
async def test_close_policy_decides_flush_or_discard(bench: Any, reason: DisconnectReason, flushed: bool) -> None:
    """Each close policy either sends queued messages before the close frame, or counts them as discarded."""
    b = bench()
    connection, _ = await b.open()
    for number in range(3):
        assert connection.enqueue(encode(str(number)))
    connection.close(reason)
    await with_deadline(connection.closed)
    assert b.server.data == (["0", "1", "2"] if flushed else [])
    assert len(b.server.close_frames) == 1
    assert b.events.counters.messages_discarded == (0 if flushed else 3)
    assert b.events.counters.messages_sent == (3 if flushed else 0)


async def test_messages_received_before_disconnect_can_be_read(bench: Any) -> None:
    """After a disconnect a reader gets the messages in the inbox, and then `SocketClosed`."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed_text("1", "2")
    b.server.feed_disconnect(1001)
    await with_deadline(connection.closed)
    assert [await connection.socket.receive(), await connection.socket.receive()] == ["1", "2"]
    with pytest.raises(SocketClosed) as caught:
        await connection.socket.receive()
    assert (caught.value.code, caught.value.close_info) == (1001, connection.close_info)


async def test_local_close_counts_unread_messages(bench: Any) -> None:
    """A local close discards unread messages, and counts them."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed_text("1", "2")
    await eventually(lambda: len(connection.inbox) == 2)
    connection.close(DisconnectReason.APPLICATION)
    await with_deadline(connection.closed)
    assert b.events.counters.messages_discarded == 2
    assert b.heard.of("messages_discarded")[0].fields["count"] == 2


async def test_close_wakes_senders_and_readers_at_once(bench: Any) -> None:
    """All waiting calls wake up when the close info is set, and not after the teardown."""
    b = bench(outbox_max_messages=1, send_timeout=5)
    connection, _ = await b.open()
    b.server.block()
    assert connection.enqueue(encode("sending"))
    await b.server.until(lambda: len(b.server.offered) == 2)
    assert connection.enqueue(encode("queued"))
    sender = asyncio.ensure_future(connection.send(encode("waiting")))
    reader = asyncio.ensure_future(connection.socket.receive())
    waiter = asyncio.ensure_future(connection.wait_closing())
    await settle()
    connection.close(DisconnectReason.REPLACED)
    for task in (sender, reader):
        with pytest.raises(SocketClosed):
            await with_deadline(task)
    assert await with_deadline(waiter) == connection.close_info
    assert not connection.closed.done()


async def test_full_outbox_disconnects_slow_consumer(bench: Any) -> None:
    """A client that does not take messages queued without waiting is a slow consumer."""
    b = bench(outbox_max_messages=2)
    connection, _ = await b.open()
    b.server.block()
    assert connection.enqueue(encode("sending"))
    await b.server.until(lambda: len(b.server.offered) == 2)
    assert connection.enqueue(encode("1"))
    assert not connection.outbox.is_backpressured()
    assert connection.enqueue(encode("2"))
    assert connection.outbox.is_backpressured()
    assert not connection.outbox.put(encode("may be left out"))
    assert connection.close_info is None
    assert not connection.enqueue(encode("3"))
    assert connection.close_info.cause is DisconnectReason.SLOW_CONSUMER
    assert not connection.enqueue(encode("4"))
    b.server.release()
    await with_deadline(connection.closed)
    assert b.server.close_frames == [(4507, "slow consumer")]


async def test_stalled_send_closes_and_aborts_transport(bench: Any) -> None:
    """A send without progress for `send_timeout` is reported, closes the connection, and aborts the transport."""
    b = bench(send_timeout=0.03)
    aborted = transport_of(b.server)
    connection, _ = await b.open()
    b.server.block()
    connection.enqueue(encode("stuck"))
    await with_deadline(connection.closed)
    assert connection.close_info.cause is DisconnectReason.SLOW_CONSUMER
    assert aborted
    (report,) = b.heard.of("send_stuck")
    assert report.level == logging.WARNING
    assert report.fields["send_timeout"] == 0.03


async def test_send_waiting_on_closing_transport_is_aborted(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closing transport would wait for the same client as the send does, so it is aborted."""
    monkeypatch.setattr("fastapi_ws_stabilizer.connection.stall_watch.POLL_INTERVAL", 0.01)
    b = bench(send_timeout=60)
    aborted = transport_of(b.server)
    closing: list[bool] = []
    b.server.transport.is_closing = lambda: bool(closing)
    connection, _ = await b.open()
    b.server.block()
    connection.enqueue(encode("waiting"))
    await b.server.until(lambda: len(b.server.offered) == 2)
    await eventually(lambda: connection.outbox._stall is not None)
    assert aborted == []
    closing.append(True)
    await eventually(lambda: aborted)
    assert connection.close_info is None


async def test_stalled_close_frame_does_not_block_teardown(bench: Any) -> None:
    """A client that does not read cannot delay the teardown."""
    b = bench(send_timeout=0.03)
    aborted = transport_of(b.server)
    connection, _ = await b.open()
    b.server.block()
    connection.close(DisconnectReason.APPLICATION)
    await with_deadline(connection.closed)
    assert aborted
    assert b.heard.of("send_stuck") == []


async def test_failed_send_waits_for_disconnect_event(bench: Any) -> None:
    """When a send fails because the client has just disconnected, the close info is that of the client's disconnect."""
    b = bench()
    connection, _ = await b.open()
    b.server.fail(RuntimeError("close already sent"))
    connection.enqueue(encode("late"))
    await b.server.until(lambda: len(b.server.offered) == 2)
    b.server.feed_disconnect(1001, "going away")
    await with_deadline(connection.closed)
    assert (connection.close_info.cause, connection.close_info.code) == (DisconnectReason.CLIENT_CLOSE, 1001)


async def test_failed_send_without_event_is_lost_connection(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the server gives no cause for a failed send, the connection counts as lost."""
    monkeypatch.setattr("fastapi_ws_stabilizer.connection.connection.DISCONNECT_EVENT_GRACE", 0.01)
    b = bench()
    connection, _ = await b.open()
    b.server.fail(OSError("broken pipe"))
    connection.enqueue(encode("late"))
    await with_deadline(connection.closed)
    assert (connection.close_info.cause, connection.close_info.code) == (DisconnectReason.NETWORK_LOST, 1006)
    assert b.task_failures == []


async def test_failed_flush_counts_unsent_messages(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that the server refuses during the flush are counted as discarded."""
    monkeypatch.setattr("fastapi_ws_stabilizer.connection.connection.DISCONNECT_EVENT_GRACE", 0.01)
    b = bench()
    connection, _ = await b.open()
    b.server.fail(OSError("broken pipe"))
    for number in range(3):
        connection.enqueue(encode(str(number)))
    connection.close(DisconnectReason.SERVER_SHUTDOWN)
    await with_deadline(connection.closed)
    assert b.events.counters.messages_sent == 0
    assert b.events.counters.messages_discarded == 3
    assert (len(connection.outbox), connection.outbox.held_bytes) == (0, 0)


async def test_message_and_disconnect_in_one_iteration_close_at_once(bench: Any) -> None:
    """A message that is queued in the same iteration as the disconnect delays neither the teardown nor a close."""
    b = bench()
    connection, socket = await b.open()
    await settle()
    b.server.feed_disconnect(1001)
    connection.enqueue(encode("too late"))
    connection.on_peer_close(remote_close(1001, None, close_frame=True))
    await asyncio.wait_for(socket.close(), 1.0)
    await asyncio.wait_for(asyncio.shield(connection.closed), 1.0)
    assert b.events.counters.messages_discarded == 1


# ── before the connection is open ──


async def test_use_before_open_raises(bench: Any) -> None:
    """Before the accept, sending, receiving and closing raise an error that says so."""
    b = bench()
    connection, socket = await b.open(accept=False)
    with pytest.raises(NotOpenError, match="not accepted yet"):
        await connection.socket.receive()
    with pytest.raises(NotOpenError):
        await connection.send(encode("early"))
    with pytest.raises(NotOpenError):
        connection.close(DisconnectReason.APPLICATION)
    with pytest.raises(NotOpenError):
        await socket.close()
    assert not connection.enqueue(encode("early"))
    assert connection.close_info is None
    assert b.server.offered == []


async def test_create_task_before_open_raises(bench: Any) -> None:
    """A task of a connection that is then rejected would never end, so creating it raises."""
    b = bench()
    _, socket = await b.open(accept=False)
    waiting = asyncio.Event().wait()
    try:
        with pytest.raises(NotOpenError):
            socket.create_task(waiting)
    finally:
        waiting.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await settle()


# ── the WebSocket itself ──


async def test_websocket_receive_reads_from_inbox(bench: Any) -> None:
    """`websocket.receive_text()` returns what the pump has read, and control frames stay hidden."""
    b = bench()
    await b.open()
    b.server.feed_text("1", "ping")
    b.server.feed_bytes(b"2")
    b.server.feed_disconnect(4000, "bye")
    websocket = b.server.websocket
    assert await with_deadline(websocket.receive_text()) == "1"
    assert await with_deadline(websocket.receive_bytes()) == b"2"
    with pytest.raises(WebSocketDisconnect) as caught:
        await with_deadline(websocket.receive_text())
    assert (caught.value.code, caught.value.reason) == (4000, "bye")


async def test_websocket_send_goes_through_outbox(bench: Any) -> None:
    """`websocket.send_text()` and `send_bytes()` enqueue behind what is already queued."""
    b = bench()
    connection, _ = await b.open()
    connection.enqueue(encode("first"))
    await b.server.websocket.send_text("second")
    await b.server.websocket.send_bytes(b"third")
    await b.server.websocket.send({"type": "websocket.send", "text": None, "bytes": b"fourth"})
    await b.server.websocket.send_text("")
    await b.server.until(lambda: len(b.server.data) == 5)
    assert b.server.data == ["first", "second", b"third", b"fourth", ""]


async def test_websocket_close_closes_connection(bench: Any) -> None:
    """`websocket.close()` is a close by the application, after queued messages."""
    b = bench()
    connection, _ = await b.open()
    await b.server.websocket.send_text("last")
    await b.server.websocket.close(4001, "bye")
    await with_deadline(connection.closed)
    assert connection.close_info.cause is DisconnectReason.APPLICATION
    assert b.server.data == ["last"]
    assert b.server.close_frames == [(4001, "bye")]


@pytest.mark.parametrize("code", [1000, 1005, 1006])
async def test_websocket_close_after_close_is_silent(bench: Any, code: int) -> None:
    """A second close in an exception handler changes nothing, regardless of the code."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed_disconnect(1006)
    await with_deadline(connection.closed)
    await b.server.websocket.close(code)
    assert connection.close_info.code == 1006
    assert b.server.close_frames == []


async def test_websocket_send_after_close_raises_disconnect(bench: Any) -> None:
    """Code that catches only Starlette's error catches the library's error too."""
    b = bench()
    connection, _ = await b.open()
    b.server.feed_disconnect(1001)
    await with_deadline(connection.closed)
    with pytest.raises(WebSocketDisconnect):
        await b.server.websocket.send_text("late")


async def test_unsendable_asgi_message_raises(bench: Any) -> None:
    """An invalid ASGI message raises, and is not silently dropped."""
    b = bench()
    connection, _ = await b.open()
    with pytest.raises(RuntimeError, match=r"cannot send 'websocket\.accept'"):
        await connection.websocket._send({"type": "websocket.accept"})


# ── teardown ──


async def test_disconnect_hooks_run_once_with_cause(bench: Any) -> None:
    """Disconnect hooks run exactly once, regardless of the cause and the number of closes."""
    b = bench()
    connection, _ = await b.open()
    connection.disconnect_hooks_pending = True
    connection.close(DisconnectReason.REPLACED)
    connection.close(DisconnectReason.APPLICATION)
    b.server.feed_disconnect()
    await with_deadline(connection.closed)
    assert b.listener.disconnected == [DisconnectReason.REPLACED]


async def test_disconnect_hooks_require_connect_hooks(bench: Any) -> None:
    """Disconnect hooks do not run if the connect hooks have not begun."""
    b = bench()
    connection, _ = await b.open()
    connection.close(DisconnectReason.REPLACED)
    await with_deadline(connection.closed)
    assert b.listener.disconnected == []


async def test_disconnect_hooks_wait_for_running_handlers(bench: Any) -> None:
    """The disconnect hooks run after the received messages have been handled."""
    b = bench()
    connection, _ = await b.open()
    connection.disconnect_hooks_pending = True
    with connection.endpoint.running():
        b.server.feed_disconnect()
        await with_deadline(connection.wait_closing())
        await settle()
        assert b.listener.disconnected == []
        with connection.endpoint.running():
            pass
        await settle()
        assert b.listener.disconnected == []
    await with_deadline(connection.closed)
    assert b.listener.disconnected == [DisconnectReason.CLIENT_CLOSE]


async def test_endpoint_is_cancelled_after_disconnect_grace(bench: Any) -> None:
    """An endpoint that does not notice the close is cancelled after `disconnect_grace`, and not before."""
    b = bench(disconnect_grace=0.05)
    events: list[str] = []

    async def endpoint() -> None:
        await b.open(cancellable=True)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            events.append(f"cancelled, ours: {b.connection.endpoint.is_own_cancellation(error)}")

    task = asyncio.ensure_future(endpoint())
    await eventually(lambda: b.heard.of("connection_opened"))
    b.server.feed_disconnect()
    await with_deadline(b.connection.wait_closing())
    await settle()
    assert events == []
    await with_deadline(task)
    await with_deadline(b.connection.closed)
    assert events == ["cancelled, ours: True"]
    assert len(b.heard.of("endpoint_cancelled")) == 1


async def test_endpoint_returning_within_grace_is_not_cancelled(bench: Any) -> None:
    """An endpoint that returns within the grace is not cancelled, and ends the wait."""
    b = bench(disconnect_grace=5)

    async def endpoint() -> str:
        await b.open(cancellable=True)
        await b.connection.wait_closing()
        await asyncio.sleep(0)
        b.connection.endpoint.mark_returned()
        await b.connection.closed
        return "finished"

    task = asyncio.ensure_future(endpoint())
    await eventually(lambda: b.heard.of("connection_opened"))
    b.server.feed_disconnect()
    assert await with_deadline(task) == "finished"
    assert b.heard.of("endpoint_cancelled") == []


async def test_busy_handler_is_cancelled_after_disconnect_grace(bench: Any) -> None:
    """A handler that does not return is cancelled together with its endpoint, and the hooks run after it."""
    b = bench(disconnect_grace=0.03)
    order: list[str] = []

    async def hook(_: Any) -> None:
        order.append("hook")

    b.listener.disconnect_hook = hook

    async def endpoint() -> None:
        await b.open(cancellable=True)
        b.connection.disconnect_hooks_pending = True
        try:
            with b.connection.endpoint.running():
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            order.append("cancelled")
            b.connection.endpoint.mark_returned()

    task = asyncio.ensure_future(endpoint())
    await eventually(lambda: b.heard.of("connection_opened"))
    b.server.feed_disconnect()
    await with_deadline(task)
    await with_deadline(b.connection.closed)
    assert order == ["cancelled", "hook"]


async def test_disconnect_hooks_share_endpoint_context(bench: Any) -> None:
    """Disconnect hooks see the context variables of the endpoint's task, regardless of what closes the connection."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    b = bench()
    seen: list[str] = []

    async def hook(_: Any) -> None:
        seen.append(variable.get())

    b.listener.disconnect_hook = hook
    token = variable.set("endpoint")
    connection, _ = await b.open()
    variable.reset(token)
    connection.disconnect_hooks_pending = True
    connection.close(DisconnectReason.APPLICATION)
    await with_deadline(connection.closed)
    assert seen == ["endpoint"]


async def test_closed_connection_leaves_no_task_or_timer(bench: Any) -> None:
    """After teardown the pump, the writer, hooks and timers no longer exist."""
    b = bench()
    loop = asyncio.get_running_loop()
    before = len([timer for timer in loop._scheduled if not timer.cancelled()])  # type: ignore[attr-defined]
    connection, socket = await b.open()
    connection.disconnect_hooks_pending = True
    socket.create_task(asyncio.Event().wait())
    await socket.send("hi")
    await socket.close()
    await with_deadline(connection.closed)
    await eventually(lambda: len(b.tasks) == 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert len([timer for timer in loop._scheduled if not timer.cancelled()]) == before  # type: ignore[attr-defined]


# ── tasks of a connection ──


async def test_connection_task_is_cancelled_on_close(bench: Any) -> None:
    """A task of `ws.create_task` is cancelled when its connection closes."""
    b = bench()
    connection, socket = await b.open()
    named = socket.create_task(asyncio.Event().wait(), name="ticker")
    unnamed = socket.create_task(asyncio.Event().wait())
    assert named.get_name() == "ticker"
    assert connection.connection_id in unnamed.get_name()
    b.server.feed_disconnect()
    await with_deadline(connection.closed)
    assert named.cancelled()
    assert unnamed.cancelled()
    assert b.task_failures == []


async def test_connection_task_error_is_reported_and_closes_1011(bench: Any) -> None:
    """A failing task closes with 1011, and is reported once and to the error hooks."""
    b = bench()
    connection, socket = await b.open()
    error = ValueError("bug")

    async def fail() -> None:
        raise error

    socket.create_task(fail())
    await with_deadline(connection.closed)
    assert b.server.close_frames == [(1011, "internal error")]
    assert [report.error for report in b.heard.of("tied_task_failed")] == [error]
    assert b.listener.bugs == [error]


async def test_http_exception_in_connection_task_closes_connection(bench: Any) -> None:
    """An `HTTPException` in a task closes the connection too, and is not silently dropped."""
    b = bench()
    connection, socket = await b.open()

    async def refuse() -> None:
        raise HTTPException(403)

    socket.create_task(refuse())
    await settle()
    assert connection.close_info is not None


async def test_socket_closed_in_connection_task_is_no_bug(bench: Any) -> None:
    """A task that sends in a loop ends with `SocketClosed` when the client disconnects, and that is not an error."""
    b = bench()
    connection, socket = await b.open()

    async def work() -> None:
        await socket.wait_closed()
        await socket.send("late")

    socket.create_task(work())
    b.server.feed_disconnect()
    await with_deadline(connection.closed)
    assert b.listener.bugs == []
    assert max(report.level for report in b.heard.all) < logging.ERROR


async def test_create_task_after_close_raises(bench: Any) -> None:
    """Creating a task after the close raises, and the coroutine is closed without a warning."""
    b = bench()
    connection, socket = await b.open()
    connection.close(DisconnectReason.APPLICATION)
    with pytest.raises(SocketClosed):
        socket.create_task(asyncio.Event().wait())
    await with_deadline(connection.closed)
    assert b.task_failures == []


async def test_bug_event_has_both_ids(bench: Any) -> None:
    """The event of a bug has the connection's ids and its error, and the error hooks get it."""
    b = bench()
    connection, _ = await b.open()
    error = ValueError("bug")
    await connection.report_bug("endpoint_failed", error)
    (report,) = b.heard.of("endpoint_failed")
    assert report.fields == {"client_id": "ann", "connection_id": connection.connection_id}
    assert b.listener.bugs == [error]


async def test_random_closes_during_sends_finish_every_connection(bench: Any) -> None:
    """With any interleaving of sends, receives and closes, each connection finishes and no task fails."""
    endings = [
        lambda b: b.server.feed_disconnect(1001),
        lambda b: b.connection.close(DisconnectReason.REPLACED),
        lambda b: b.server.fail(RuntimeError("closed")) or b.server.feed_disconnect(1006),
        lambda b: b.connection.on_send_stalled(),
    ]
    for number in range(40):
        b = bench(send_timeout=1)
        connection, socket = await b.open()

        async def send(socket: Any = socket) -> None:
            while True:
                await socket.send("x")
                await asyncio.sleep(0)

        for _ in range(3):
            socket.create_task(send())
        await settle(number % 5)
        endings[number % len(endings)](b)
        await with_deadline(connection.closed)
        assert b.task_failures == []
        assert b.listener.bugs == []
