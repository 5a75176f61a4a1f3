"""Order of messages, replies to invalid ones, and concurrent readers and writers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.support.plain_client import received_close
from tests.support.raw import RawClient
from tests.support.server import SERVERS, LiveServer, until

Serve = Callable[..., LiveServer]


def wait(seconds: float, name: str, kind: str = "wait") -> str:
    return json.dumps({"type": kind, "seconds": seconds, "name": name})


async def test_invalid_messages_get_error_replies(serve: Serve) -> None:
    """Five invalid messages of different kinds get error replies, and the sixth closes with 1008."""
    server = serve(config={"max_bad_messages": 5})
    bad = [
        (b"\xff\xfe", "bad_json"),
        ("{nonsense", "bad_json"),
        ('{"type":"wait","seconds":"soon"}', "invalid_message"),
        ("", "bad_json"),
        ('{"type":"echo","text":"\\ud800"}', "bad_json"),
    ]
    async with connect(server.url("/run/ann")) as client:
        for message, code in bad:
            await client.send(message)
            reply = json.loads(await asyncio.wait_for(client.recv(), 2))
            assert (reply["type"], reply["code"]) == ("error", code)
            assert reply["message"]
        await client.send('{"type":"echo","text":"fine"}')
        assert json.loads(await client.recv()) == {"type": "echo", "text": "fine"}
        await client.send('{"type":"unknown"}')
        with pytest.raises(ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), 2)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "too many bad messages")
    assert server.get("/ws-stats/")["bad_messages"] == 6
    assert not server.errors()


async def test_error_reply_names_fields_without_internals(server: LiveServer) -> None:
    """The reply to an invalid model names the fields, but no values, model or code."""
    async with connect(server.url("/run/reply")) as client:
        await client.send('{"type":"wait","seconds":"secret-value"}')
        reply = json.loads(await client.recv())
    assert "seconds: " in reply["message"]
    assert "name: Field required" in reply["message"]
    assert "secret-value" not in reply["message"]
    assert "Wait" not in reply["message"]


async def test_concurrent_receive_raises(server: LiveServer) -> None:
    """A second receive while one waits raises ConcurrentReceiveError, and takes no message."""
    async with connect(server.url("/two-readers/ann")) as client:
        assert await client.recv() == "ConcurrentReceiveError"
        await client.send("for the first")
        assert await client.recv() == "for the first"


async def test_concurrent_writers_preserve_their_order(server: LiveServer) -> None:
    """100 messages of each of 10 tasks arrive whole, in the order of their task."""
    async with connect(server.url("/ten-writers/ann"), max_queue=None) as client:
        received = [str(await asyncio.wait_for(client.recv(), 5)) for _ in range(1000)]
    assert all(message.endswith("x" * 500) for message in received)
    for writer in range(10):
        assert [int(m.split()[1]) for m in received if m.startswith(f"{writer} ")] == list(range(100))


async def test_messages_are_handled_in_order(server: LiveServer) -> None:
    """Replies have the order of the messages, though the first takes longest."""
    async with connect(server.url("/run/ordered")) as client:
        for seconds, name in ((0.3, "1"), (0.1, "2"), (0, "3")):
            await client.send(wait(seconds, name))
        assert [await client.recv() for _ in range(3)] == ["1", "2", "3"]


async def test_concurrency_option_handles_messages_in_parallel(server: LiveServer) -> None:
    """With ws.run(concurrency=4), four messages of 0.4 s run in parallel, and the fifth waits for one of them."""
    async with connect(server.url("/run/concurrent?concurrency=4")) as client:
        started = time.monotonic()
        for name in "12345":
            await client.send(wait(0.4, name))
        first = {await client.recv() for _ in range(4)}
        assert time.monotonic() - started < 0.75
        last = await client.recv()
        assert 0.75 < time.monotonic() - started < 1.2
    assert first == set("1234")
    assert last == "5"


async def test_blocking_handler_does_not_delay_other_sockets(server: LiveServer) -> None:
    """A `def` handler that blocks for 1 s runs in the thread pool; echoes of another socket take less than 100 ms."""
    async with connect(server.url("/run/blocker")) as blocker, connect(server.url("/echo/other")) as other:
        await blocker.send(wait(1.0, "blocked", "sync-wait"))
        slowest = 0.0
        deadline = time.monotonic() + 0.8
        while time.monotonic() < deadline:
            started = time.monotonic()
            await other.send("x")
            await other.recv()
            slowest = max(slowest, time.monotonic() - started)
        assert slowest < 0.1
        await server.until_event("sync blocked")


async def test_broadcast_to_slow_clients_keeps_sender_connected(serve: Serve) -> None:
    """A broadcast that no recipient takes does not close the connection of its sender."""
    server = serve(app="tests.live.broadcast_app:app")
    with RawClient(server.port, "/ws/slow", receive_buffer=4096) as slow:
        slow.handshake()
        async with connect(server.url("/ws/speaker")) as speaker:
            await until(lambda: server.get("/ws-stats/")["connections"] == 2)
            await speaker.send('{"type":"shout"}')
            await speaker.send('{"type":"ask"}')
            assert await asyncio.wait_for(speaker.recv(), 5) == "still here"
    assert server.get("/ws-stats/")["endings"]["slow_consumer"] == 1
    assert "broadcast_failed" in server.log
    assert not server.errors()


@pytest.mark.parametrize("kind", SERVERS)
async def test_empty_messages_arrive_in_both_directions(serve: Serve, kind: str) -> None:
    """Empty text and empty bytes are messages like others on every server."""
    server = serve(kind)
    async with connect(server.url("/echo/ann")) as client:
        for message in ("", b"", "end"):
            await client.send(message)
            assert await asyncio.wait_for(client.recv(), 5) == message
    assert not server.errors()


@pytest.mark.parametrize("kind", SERVERS)
async def test_asgi_middleware_sees_every_message(serve: Serve, kind: str) -> None:
    """A middleware that wraps both ASGI callables works with echo, broadcast and close."""
    server = serve(kind)
    async with connect(server.url("/echo/ann?wrapped"), max_queue=None) as client:
        for number in range(20):
            await client.send(str(number))
            assert await asyncio.wait_for(client.recv(), 5) == str(number)
        await asyncio.to_thread(server.post, "/broadcast?count=30&size=8")
        assert [await asyncio.wait_for(client.recv(), 5) for _ in range(30)] == [f"{n:08d}" for n in range(30)]
        await asyncio.to_thread(server.post, "/kick/ann")
        assert (await received_close(client, discard=False))[0] == 4403
    assert server.errors() == []
    assert ("link_wrapped" in server.log) == (kind == "uvicorn-stable")
