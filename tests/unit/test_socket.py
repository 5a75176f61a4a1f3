"""Tests of the socket that endpoints, hooks and handlers get."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.errors import (
    ConcurrentReceiveError,
    MessageEncodeError,
    MessageFormatError,
    SocketClosed,
)
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_websocket import FakeServer, eventually, settle, with_deadline


async def test_socket_has_handshake_attributes_of_websocket(bench: Any) -> None:
    """Headers, parameters, cookies and other attributes are those of the handshake."""
    b = bench()
    app = object()
    b.server = FakeServer("/ws/ann", query="room=lobby", app=app, path_params={"client_id": "ann"})
    connection, socket = await b.open()
    assert socket.websocket is b.server.websocket
    assert socket.scope is b.server.websocket.scope
    assert socket.app is app
    assert socket.url.path == "/ws/ann"
    assert socket.headers["host"] == "testserver"
    assert socket.query_params["room"] == "lobby"
    assert socket.path_params == {"client_id": "ann"}
    assert socket.cookies == {"taste": "sweet"}
    assert (socket.client.host, socket.client.port) == ("10.0.0.7", 4711)
    socket.state.mark = 7
    assert b.server.websocket.state.mark == 7
    assert (socket.client_id, socket.connection_id) == ("ann", connection.connection_id)


async def test_socket_shows_age_round_trip_and_queues(bench: Any) -> None:
    """Ages, the round trip and queue lengths are attributes."""
    b = bench()
    connection, socket = await b.open()
    assert socket.rtt is None
    assert 0 <= socket.silent_seconds <= socket.connected_seconds + 0.01
    assert (socket.closed, socket.reason, socket.close_info) == (False, None, None)
    b.server.block()
    await socket.send("sending")
    await b.server.until(lambda: len(b.server.offered) == 2)
    await socket.send("äb")
    b.server.feed_text("in")
    await eventually(lambda: socket.unread_messages == 1)
    assert (socket.queued_messages, socket.queued_bytes) == (1, 3)
    assert socket.unread_bytes == connection.inbox.held_bytes > 0
    connection.liveness.on_ping_queued(connection.opened_at)
    connection.liveness.on_pong(connection.opened_at + 0.5)
    assert socket.rtt == pytest.approx(0.5)


async def test_closed_socket_shows_close_info(bench: Any) -> None:
    """After the close, the socket has its close info."""
    b = bench()
    _, socket = await b.open()
    assert repr(socket).endswith(" open>")
    b.server.feed_disconnect(1001)
    how = await with_deadline(socket.wait_closed())
    assert (how.cause, how.code) == (DisconnectReason.CLIENT_CLOSE, 1001)
    assert (socket.closed, socket.reason, socket.close_info) == (True, DisconnectReason.CLIENT_CLOSE, how)
    assert repr(socket) == f"<StableSocket client_id='ann' connection_id={socket.connection_id} client_close>"
    assert await with_deadline(socket.wait_closed()) is how


async def test_cancelled_wait_closed_does_not_affect_others(bench: Any) -> None:
    """Cancelling one wait for the close does not affect other waits."""
    b = bench()
    _, socket = await b.open()
    impatient, patient = asyncio.ensure_future(socket.wait_closed()), asyncio.ensure_future(socket.wait_closed())
    await settle()
    impatient.cancel()
    b.server.feed_disconnect()
    assert (await with_deadline(patient)).cause is DisconnectReason.CLIENT_CLOSE
    assert impatient.cancelled()


async def test_metadata_is_copied_and_user_data_starts_empty(bench: Any) -> None:
    """Metadata is a copy of what was given, user data is empty at first, and identity is the given object."""
    b = bench()
    connection, _ = await b.open()
    given = {"plan": "free"}
    socket = StableSocket(connection, None, metadata=given, identity="me")  # type: ignore[arg-type]
    given["plan"] = "paid"
    assert socket.metadata == {"plan": "free"}
    assert socket.user_data == {}
    assert socket.identity == "me"


# ── receiving ──


async def test_each_message_kind_can_be_received(bench: Any) -> None:
    """Text, bytes and JSON are received as such."""
    b = bench()
    _, socket = await b.open()
    b.server.feed_text("any", "text")
    b.server.feed_bytes(b"data")
    b.server.feed_text('{"a":1}')
    b.server.feed_bytes(b"[2]")
    assert await with_deadline(socket.receive()) == "any"
    assert await with_deadline(socket.receive_text()) == "text"
    assert await with_deadline(socket.receive_bytes()) == b"data"
    assert await with_deadline(socket.receive_json()) == {"a": 1}
    assert await with_deadline(socket.receive_json()) == [2]


async def test_wrong_message_kind_leaves_socket_usable(bench: Any) -> None:
    """A receive of another kind than the message raises, and the connection stays open."""
    b = bench()
    _, socket = await b.open()
    b.server.feed_bytes(b"data")
    b.server.feed_text("text")
    with pytest.raises(MessageFormatError, match="expected a text message"):
        await with_deadline(socket.receive_text())
    with pytest.raises(MessageFormatError, match="expected a binary message"):
        await with_deadline(socket.receive_bytes())
    b.server.feed_text("fine")
    assert await with_deadline(socket.receive_text()) == "fine"


@pytest.mark.parametrize("message", ["not json", "", "{", "NaN", b"\xff", "[" * 5000, '"\ud800"'])
async def test_invalid_json_raises_message_format_error(bench: Any, message: str | bytes) -> None:
    """For any message, `receive_json` returns a value or raises `MessageFormatError`."""
    b = bench()
    _, socket = await b.open()
    if isinstance(message, str):
        b.server.feed_text(message)
    else:
        b.server.feed_bytes(message)
    with pytest.raises(MessageFormatError, match="not JSON"):
        await with_deadline(socket.receive_json())
    assert not socket.closed


@pytest.mark.parametrize("method", ["__aiter__", "iter_text", "iter_bytes", "iter_json"])
async def test_iteration_ends_at_disconnect(bench: Any, method: str) -> None:
    """Each iteration yields all messages, and ends without an error when the client disconnects."""
    b = bench()
    _, socket = await b.open()
    if method == "iter_bytes":
        b.server.feed_bytes(b"1")
        b.server.feed_bytes(b"2")
    else:
        b.server.feed_text("1", "2")
    b.server.feed_disconnect()
    got = [message async for message in getattr(socket, method)()]
    expected = {"iter_bytes": [b"1", b"2"], "iter_json": [1, 2]}
    assert got == expected.get(method, ["1", "2"])


async def test_second_concurrent_receive_raises(bench: Any) -> None:
    """A second concurrent `receive` raises, and the first one continues."""
    b = bench()
    _, socket = await b.open()
    first = asyncio.ensure_future(socket.receive())
    await settle()
    with pytest.raises(ConcurrentReceiveError):
        await socket.receive()
    b.server.feed_text("for the first")
    assert await with_deadline(first) == "for the first"


async def test_run_delegates_to_dispatcher(bench: Any) -> None:
    """`ws.run` passes the connection and the concurrency to the dispatcher."""
    b = bench()
    connection, socket = await b.open()
    await socket.run(concurrency=3)
    assert b.dispatched == (connection, 3)


# ── sending ──


async def test_each_message_kind_can_be_sent(bench: Any) -> None:
    """Text is sent as text, bytes as binary, and everything else as JSON."""
    b = bench()
    _, socket = await b.open()
    await socket.send("text")
    await socket.send(b"data")
    await socket.send({"a": 1})
    await socket.send_text("text")
    await socket.send_bytes(b"data")
    await socket.send_json("quoted")
    await socket.send_json({"a": "ä"}, mode="binary")
    await b.server.until(lambda: len(b.server.data) == 7)
    assert b.server.data == ["text", b"data", '{"a":1}', "text", b"data", '"quoted"', '{"a":"ä"}'.encode()]


async def test_unknown_send_json_mode_raises(bench: Any) -> None:
    """`send_json` supports text and binary only."""
    b = bench()
    _, socket = await b.open()
    with pytest.raises(ValueError, match="'text' or 'binary'"):
        await socket.send_json({}, mode="smoke")


async def test_unencodable_payload_leaves_socket_usable(bench: Any) -> None:
    """The sender gets the error, the client gets nothing, and the connection stays open."""
    b = bench()
    _, socket = await b.open()
    with pytest.raises(MessageEncodeError):
        await socket.send({"x": object()})
    assert not socket.closed
    await socket.send("fine")
    await b.server.until(lambda: b.server.data == ["fine"])


async def test_send_waits_while_outbox_is_full(bench: Any) -> None:
    """A direct send waits for a slow client, and loses nothing."""
    b = bench(outbox_max_messages=2)
    _, socket = await b.open()
    b.server.block()

    async def send_all() -> None:
        for number in range(10):
            await socket.send(str(number))

    sending = asyncio.ensure_future(send_all())
    await eventually(lambda: socket.queued_messages == 2)
    await settle(50)
    assert not sending.done()
    assert socket.queued_messages == 2
    b.server.release()
    await with_deadline(sending)
    await b.server.until(lambda: len(b.server.data) == 10)
    assert b.server.data == [str(number) for number in range(10)]


@pytest.mark.parametrize("method", ["send", "send_text", "send_json"])
async def test_send_after_close_raises(bench: Any, method: str) -> None:
    """The error has the close info of the connection."""
    b = bench()
    _, socket = await b.open()
    b.server.feed_disconnect(4000)
    await with_deadline(socket.wait_closed())
    with pytest.raises(SocketClosed) as caught:
        await getattr(socket, method)("late")
    assert caught.value.code == 4000


# ── closing ──


async def test_close_flushes_before_close_frame(bench: Any) -> None:
    """When `close` returns, the last messages and the close frame are at the server."""
    b = bench()
    _, socket = await b.open()
    await socket.send("last")
    await with_deadline(socket.close(4001, "bye"))
    assert b.server.data == ["last"]
    assert b.server.close_frames == [(4001, "bye")]
    assert socket.reason is DisconnectReason.APPLICATION


async def test_second_close_sends_no_second_frame(bench: Any) -> None:
    """`close` is idempotent; the first call determines the code."""
    b = bench()
    _, socket = await b.open()
    await with_deadline(asyncio.gather(socket.close(4001), socket.close(4002)))
    await with_deadline(socket.close(4003))
    assert b.server.close_frames == [(4001, "")]


async def test_close_after_disconnect_is_silent(bench: Any) -> None:
    """After a disconnect nothing is sent."""
    b = bench()
    _, socket = await b.open()
    b.server.feed_disconnect()
    await with_deadline(socket.wait_closed())
    await with_deadline(socket.close())
    assert b.server.close_frames == []
    assert socket.reason is DisconnectReason.CLIENT_CLOSE


@pytest.mark.parametrize("code", [1005, 1006, 1015, 999, 5000])
async def test_unsendable_close_code_raises_without_closing(bench: Any, code: int) -> None:
    """An invalid code raises, and the connection stays open."""
    b = bench()
    _, socket = await b.open()
    with pytest.raises(ValueError, match=str(code)):
        await socket.close(code)
    assert not socket.closed


async def test_long_close_reason_is_truncated(bench: Any) -> None:
    """A reason is cut to 123 bytes at a character boundary."""
    b = bench()
    _, socket = await b.open()
    await with_deadline(socket.close(1000, "ä" * 100))
    assert b.server.close_frames == [(1000, "ä" * 61)]


async def test_cancelled_close_still_closes(bench: Any) -> None:
    """Cancelling a call of `close` does not stop the close."""
    b = bench()
    connection, socket = await b.open()
    b.server.block()
    closing = asyncio.ensure_future(socket.close())
    await settle()
    closing.cancel()
    await settle()
    b.server.release()
    await with_deadline(connection.closed)
    assert closing.cancelled()
    assert b.server.close_frames == [(1000, "")]


async def test_close_of_stalled_client_returns_after_send_timeout(bench: Any) -> None:
    """`close` returns after `send_timeout` at the latest, whatever the client does."""
    b = bench(send_timeout=0.03)
    connection, socket = await b.open()
    b.server.block()
    await socket.send("stuck")
    await with_deadline(socket.close())
    await with_deadline(connection.closed)
    assert b.server.close_frames == []
