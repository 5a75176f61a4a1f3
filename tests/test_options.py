"""A test of every option: a changed value changes what a client or the application sees. One case for each field.

Most cases play the same scene twice in virtual time, on managers that differ in the option only. So a default of
minutes needs no waiting. What only a real server shows is tested on a real one.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest import mock

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from starlette.requests import HTTPConnection

from fastapi_ws_stabilizer.auth import signed_tokens as tokens
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import MemoryLimitExceededError, RoomLimitError, WebSocketStabilizerError
from fastapi_ws_stabilizer.gc_pacing import MAX_FROZEN_BY_INTERPRETER, MIN_CONNECTIONS
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.observability.logs import get_logger
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.stats import stats_router
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_link import soon
from tests.support.own_loop import run
from tests.support.raw import RawClient
from tests.support.server import LiveServer
from tests.support.stage import Line, Peer, Stage
from tests.support.virtual_time import VirtualLoop, run_virtually
from tests.support.wire_client import (
    BROWSER_OFFER,
    KIND,
    TEXT,
    Answer,
    WireClient,
    connect,
    frame,
    quiet_server,
    request,
)

SECRET = "a-secret-of-32-characters-or-more"
PING = '{"type":"ping"}'


@dataclass
class Case:
    """One option.

    Attributes:
        change: Its changed value, or the options that have to be changed together.
        scene: Actions; returns what was observed.
        before: Observation with the default.
        after: Observation with the change.
        base: Options that are the same both times.
        virtual: Whether time is virtual. In virtual time no thread can be awaited.
    """

    change: Any
    scene: Callable[[Stage], Awaitable[Any]]
    before: Any
    after: Any
    base: Mapping[str, Any] = field(default_factory=dict)
    virtual: bool = True


@dataclass
class LiveCase:
    """One option that is tested on a real server, which is the argument of `scene`."""

    change: Any
    scene: Callable[[LiveServer], Any]
    before: Any
    after: Any
    base: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False


# ── observations ──


def result_of(line: Line) -> Any:
    """Return what became of a connection: a close code, the status of a rejection, or `open`."""
    if line.close_code is not None:
        return line.close_code
    answers = [one["status"] for one in line.server.taken if one["type"] == "websocket.http.response.start"]
    return answers[0] if answers else "open"


async def seconds_until(condition: Callable[[], Any], most: float) -> int | None:
    """Return the seconds, rounded, until `condition` is true; `None` if that takes longer than `most`."""
    loop = asyncio.get_running_loop()
    since = loop.time()
    while not condition():
        if loop.time() - since > most:
            return None
        await asyncio.sleep(0.05)
    return round(loop.time() - since)


async def connect_each(stage: Stage, *client_ids: str, **scope: Any) -> list[Any]:
    """Connect clients one after the other; return what became of each."""
    lines = []
    for client_id in client_ids:
        lines.append(Line(stage, client_id, **scope))
        await soon()
    return [result_of(line) for line in lines]


async def hang(ws: StableSocket) -> None:
    """Neither read nor return."""
    await asyncio.Event().wait()


# ── heartbeat ──


async def heartbeat_period(stage: Stage) -> int | None:
    """Return the seconds from the first ping of a connection to its second."""
    line = stage.plain()
    await seconds_until(lambda: line.server.data, 40)
    return await seconds_until(lambda: len(line.server.data) > 1, 40)


async def seconds_until_timeout(stage: Stage) -> int | None:
    """Return the seconds from the first ping to the close code of a client that does not answer."""
    line = stage.plain()
    await seconds_until(lambda: line.server.data, 40)
    return await seconds_until(lambda: line.close_code == 4408, 200)


async def first_message_sent(stage: Stage) -> Any:
    """Return the first message that a client gets unprompted within 31 s."""
    line = stage.plain()
    await asyncio.sleep(31)
    return line.server.data[:1]


# ── handshakes ──


async def connect_two_clients(stage: Stage) -> list[Any]:
    return await connect_each(stage, "ann", "bob")


async def connect_same_client_twice(stage: Stage) -> list[Any]:
    return await connect_each(stage, "ann", "ann")


async def connect_without_origin(stage: Stage) -> list[Any]:
    return await connect_each(stage, "ann")


async def connect_duplicate(stage: Stage) -> list[Any]:
    """Return what becomes of the first connection of a client, and of the second."""
    lines = [stage.plain(), stage.plain()]
    await soon()
    return [result_of(line) for line in lines]


async def address_behind_proxy(stage: Stage) -> str:
    """Return the address of a client behind a proxy."""
    Line(stage, headers=[(b"host", b"testserver"), (b"x-forwarded-for", b"203.0.113.9")])
    await soon()
    return stage.socket().address


async def seconds_until_endpoint_ends(stage: Stage) -> int | None:
    """Return the seconds from the disconnect of a client to the end of its endpoint."""
    stage.endpoint = hang
    line = stage.plain()
    await soon()
    await line.leaves()
    return await seconds_until(line.task.done, 60)


# ── inbound messages ──


async def send_long_message(stage: Stage) -> Any:
    line = stage.plain()
    await line.say({"type": "note", "data": "x" * 100})
    return result_of(line)


async def send_three_messages(stage: Stage) -> tuple[int, Any]:
    """Return how many of three messages are handled, and the error code of the last reply."""
    line = stage.plain()
    for _ in range(3):
        await line.say({"type": "note", "text": "x" * 60})
    return len(stage.notes), (line.server.json or [{}])[-1].get("code")


async def send_bad_messages(stage: Stage) -> Any:
    line = stage.plain()
    await line.say("no json", "no json either")
    return result_of(line)


async def unread_messages_of_idle_endpoint(stage: Stage) -> int:
    """Return how many of eight messages are taken from the server when the endpoint does not read."""
    stage.endpoint = hang
    line = stage.plain()
    await line.say(*["x" * 1000] * 8)
    return stage.socket().unread_messages


async def send_flood(stage: Stage) -> Any:
    stage.endpoint = hang
    line = stage.plain()
    await line.say(*["x"] * 8)
    return result_of(line)


async def seconds_until_hanging_endpoint_closes(stage: Stage) -> int | None:
    """Return the seconds until a full inbox closes the connection of an endpoint that reads one message and hangs."""

    async def hangs(ws: StableSocket) -> None:
        await ws.receive()
        await asyncio.Event().wait()

    stage.endpoint = hangs
    line = stage.plain()
    await line.say(*["x"] * 8)
    return await seconds_until(lambda: line.close_code == 1013, 400)


# ── outbound messages ──


async def block_client(stage: Stage) -> tuple[Any, int]:
    """Return the close code of a client that does not read, and how many of its messages were dropped."""
    line = stage.plain()
    await soon()
    socket = stage.socket()
    line.server.block()
    for number in range(8):
        await stage.manager.send_to_client("ann", f"{number}" + "x" * 1000)
        await soon()
    return socket.close_info and socket.close_info.code, socket.dropped_messages


async def seconds_until_stalled_send_closes(stage: Stage) -> int | None:
    """Return the seconds until a send that makes no progress closes the connection."""
    line = stage.plain()
    await soon()
    socket = stage.socket()
    line.server.block()
    await socket.send("x")
    return await seconds_until(lambda: socket.closed, 60)


# ── rooms ──


async def join_two_rooms(stage: Stage) -> list[str]:
    stage.plain()
    await soon()
    try:
        for name in ("lobby", "cellar"):
            await stage.socket().join(name)
    except RoomLimitError:
        pass
    return list(stage.socket().rooms)


async def seconds_of_presence(stage: Stage) -> int | None:
    """Return the seconds for which a client is present after its connection broke."""
    line = stage.plain()
    await soon()
    await stage.socket().join("lobby")
    await line.leaves()
    return await seconds_until(lambda: not stage.manager.room("lobby").clients, 60)


# ── tokens ──


async def token_after(stage: Stage, seconds: float) -> str:
    """Return the result of validating a reconnect token after a while."""
    with mock.patch.object(tokens, "wall", asyncio.get_running_loop().time):
        try:
            token = stage.manager.generate_reconnect_token("ann")
            await asyncio.sleep(seconds)
            return await stage.manager.validate_reconnect_token(token)
        except WebSocketStabilizerError as error:
            return type(error).__name__


async def fresh_token(stage: Stage) -> str:
    return await token_after(stage, 0)


async def old_token(stage: Stage) -> str:
    return await token_after(stage, 600)


async def token_of_other_worker(stage: Stage) -> str:
    worker = WebSocketConnectionManager(WebSocketConfig(reconnect_secret=SECRET))
    try:
        return await stage.manager.validate_reconnect_token(worker.generate_reconnect_token("ann"))
    except WebSocketStabilizerError as error:
        return type(error).__name__


async def old_ticket(stage: Stage) -> Any:
    with mock.patch.object(tokens, "wall", asyncio.get_running_loop().time):
        query = f"ticket={stage.manager.issue_ticket('ann')}".encode()
        await asyncio.sleep(20)
        try:
            return await stage.manager.ticket(HTTPConnection({"type": "http", "query_string": query, "headers": []}))
        except HTTPException as error:
            return error.status_code


# ── sessions ──


async def resume_after_minute(stage: Stage) -> str:
    """Return the outcome of a client that was detached for a minute and missed three messages."""
    peer = Peer(stage)
    await (await peer.dial()).leaves()
    for number in range(3):
        await stage.manager.send_to_client("ann", f"{number}" + "x" * 500)
    await asyncio.sleep(60)
    return (await peer.dial()).outcome


async def detach_two_sessions(stage: Stage) -> dict[str, int]:
    for client_id in ("ann", "bob"):
        await (await Peer(stage, client_id).dial()).leaves()
    return stage.manager.get_session_counts()


async def seconds_without_hello(stage: Stage) -> int | None:
    line = Line(stage, subprotocols=(SUBPROTOCOL,))
    return await seconds_until(lambda: line.close_code == 4408, 60)


async def join_later(stage: Stage) -> list[Any]:
    """Return what a client gets that joins a room with history a minute after a message."""
    line = stage.plain()
    await soon()
    stage.plain("bob")
    await soon()
    await stage.socket("bob").join("lobby")
    await stage.manager.room("lobby").send("old news")
    await asyncio.sleep(60)
    await stage.socket("ann").join("lobby", history=5)
    await soon()
    return line.server.data


# ── shutdown ──


async def stay_long(stage: Stage) -> Any:
    line = stage.plain()
    await asyncio.sleep(140)
    return result_of(line)


async def drain_duration(stage: Stage) -> float:
    """Return the seconds over which the closes of fifty connections are spread."""
    lines = [stage.plain(f"client {number}") for number in range(50)]
    await soon()
    report = await stage.manager.drain()
    assert all(result_of(line) == 1012 for line in lines)
    return round(report.duration_seconds, 1)


async def shutdown_duration(stage: Stage) -> int:
    """Return the seconds for which a shutdown waits for an endpoint that does not return."""
    stage.endpoint = hang
    stage.plain()
    await soon()
    return round((await stage.manager.graceful_shutdown()).duration_seconds)


async def status_over_http(stage: Stage, method: str, path: str, **headers: str) -> int:
    """Return the status of the stats router's answer."""
    app = FastAPI()
    app.include_router(stats_router)
    app.state.fastapi_ws_stabilizer = stage.manager
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        return (await client.request(method, path, headers=headers)).status_code


async def drain_over_http(stage: Stage) -> int:
    return await status_over_http(stage, "POST", "/drain", authorization=f"Bearer {SECRET}")


async def scrape(stage: Stage) -> int:
    return await status_over_http(stage, "GET", "/metrics")


# ── logs and scale ──


async def logged_events(stage: Stage) -> list[str]:
    """Return the events that reach the log."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    get_logger().addHandler(handler)
    try:
        stage.plain()
        await soon()
        return [vars(record)["event"] for record in records]
    finally:
        get_logger().removeHandler(handler)


async def sends_per_iteration(stage: Stage) -> int:
    """Return how many clients, each of them slow, a broadcast serves before the event loop runs other tasks."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    sent = 0

    class Server:
        """Server that takes each message at once, as uvicorn does, and needs 1 ms for it."""

        __module__ = "uvicorn.protocols"

        def __init__(self, take: Callable[[Any], Awaitable[None]]) -> None:
            self.take = take

        async def send(self, message: Any) -> None:
            nonlocal sent
            if message["type"] == "websocket.send":
                loop.now += 0.001
                sent += 1
            await self.take(message)

    class Slow(Line):
        async def _serve(self) -> None:
            self.server.websocket._send = Server(self.server.websocket._send).send
            await super()._serve()

    for number in range(32):
        Slow(stage, f"client {number}")
    await soon()
    broadcast = asyncio.ensure_future(stage.manager.broadcast("x"))
    most, before = 0, 0
    while sent < 32:
        await asyncio.sleep(0)
        most, before = max(most, sent - before), sent
    await broadcast
    return most


async def concurrent_cleanups(stage: Stage) -> int:
    """Return how many disconnect hooks run at the same time."""
    running = most = 0

    @stage.manager.on_disconnect
    async def clean_up(ws: StableSocket) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(1)
        running -= 1

    lines = [stage.plain(f"client {number}") for number in range(3)]
    await soon()
    for line in lines:
        line.server.feed_disconnect()
    await asyncio.sleep(5)
    return most


async def concurrent_sends(stage: Stage) -> int:
    """Return how many sends of a broadcast wait for the server at the same time."""
    lines = [stage.plain(f"client {number}") for number in range(3)]
    await soon()
    for line in lines:
        line.server.block()
    await stage.manager.broadcast("x")
    await soon()
    return sum(line.server.offered[-1].get("text") == "x" for line in lines)


# ── memory ──


async def store_user_data(stage: Stage) -> str:
    stage.plain()
    await soon()
    try:
        await stage.manager.set_user_data("ann", "stored", "x" * 20_000)
    except MemoryLimitExceededError as error:
        return error.option
    return "stored"


async def store_user_data_of_two(stage: Stage) -> list[Any]:
    lines = [stage.plain("ann"), stage.plain("bob")]
    await soon()
    for client_id in ("ann", "bob"):
        await stage.manager.set_user_data(client_id, "stored", "x" * 20_000)
    await soon()
    return [result_of(line) for line in lines]


async def remaining_after_eviction(stage: Stage) -> list[str]:
    """Return the clients left of three: the oldest has just sent a message, one is silent, and one needs memory."""
    ann = stage.plain("ann")
    stage.plain("bob")
    stage.plain("carl")
    await soon()
    for client_id in ("ann", "bob"):
        await stage.manager.set_user_data(client_id, "stored", "x" * 20_000)
    await ann.say({"type": "note"})
    await stage.manager.set_user_data("carl", "stored", "x" * 20_000)
    await soon()
    return stage.manager.get_active_connections()


async def growth_is_counted(stage: Stage) -> bool:
    """Return whether a value that grows in place is counted half a minute later."""
    stage.plain()
    await soon()
    values: list[str] = []
    stage.socket().user_data["list"] = values
    values.append("x" * 20_000)
    await asyncio.sleep(30)
    return stage.manager.get_memory_usage()["total_memory"] > 20_000


async def freezes_survivors(stage: Stage) -> bool:
    """Return whether many open connections are frozen after a young garbage collection."""
    for number in range(MIN_CONNECTIONS):
        stage.plain(f"client-{number}")
    await soon()
    gc.collect(1)
    return gc.get_freeze_count() > MAX_FROZEN_BY_INTERPRETER


# ── real servers ──


def rejections(server: LiveServer) -> list[Any]:
    """Return how sockets without a login are rejected: one of a browser, and one of another client."""
    own = f"http://127.0.0.1:{server.port}"
    return [handshake_result(server, "/identified", Origin=own), handshake_result(server, "/identified")]


def connect_cross_origin(server: LiveServer) -> Any:
    return handshake_result(server, "/echo/ann", Origin="https://shop.example.com")


def handshake_result(server: LiveServer, path: str, **headers: str) -> Any:
    """Return the status of a handshake; after an accept, the code of the close frame or `open`."""
    with WireClient(server.port) as client:
        client.write(request(server.port, path, headers))
        answer: Answer = client.answer()
        if answer.status != 101:
            return answer.status
        if path == "/identified":
            return client.close_info(answer=True)[0]
        return "open"


def negotiates_compression(server: LiveServer) -> bool:
    """Return whether the server accepts compression."""
    with WireClient(server.port) as client:
        return client.upgrade(headers={"Sec-WebSocket-Extensions": BROWSER_OFFER}).deflate is not None


def compressed_echoes(server: LiveServer) -> list[bool]:
    """Return whether an echo of 100 bytes is compressed, and one of 2,000 bytes."""
    with connect(server, offer=BROWSER_OFFER) as client:
        seen = []
        for size in (100, 2000):
            client.write(frame(TEXT, b"x" * size))
            seen.append(client.message().compressed)
        return seen


def queues_for_stalled_client(server: LiveServer) -> bool:
    """Return whether most of 8 MB for a client that reads nothing waits in its outbox, and not in buffers behind it."""
    with RawClient(server.port, "/idle/ann", receive_buffer=4096) as client:
        client.handshake()
        server.post("/broadcast?count=400&size=20000")
        (found,) = server.get("/ws-stats/connections")["connections"]
        return bool(found["queued_bytes"] > 6_500_000)


def sigterm_sends_retry_hint(server: LiveServer) -> bool:
    """Return whether SIGTERM sends a reconnect delay to the client, as a drain does."""
    with connect(server) as client:
        server.process.terminate()
        code, reason = client.close_info(answer=True)
        assert code == 1012
        return "retry=" in reason


ping = {"heartbeat_type": "ping"}
inbox_of_two = {"inbox_max_messages": 2}
slow_reader = {"outbox_max_bytes": 64 * 1024 * 1024, "send_timeout": 60}
one_minute = timedelta(minutes=1)

CASES: dict[str, Case | LiveCase] = {
    "heartbeat_interval": Case(10, heartbeat_period, 30, 10, ping),
    "heartbeat_timeout": Case(20, seconds_until_timeout, 60, 20, {**ping, "require_pong": True}),
    "heartbeat_type": Case("off", first_message_sent, [PING], []),
    "heartbeat_payload": Case(
        {"heartbeat_type": "custom", "heartbeat_payload": {"beat": 1}}, first_message_sent, [PING], ['{"beat":1}']
    ),
    "require_pong": Case(True, seconds_until_timeout, None, 60, ping),
    "max_connections": Case(1, connect_two_clients, ["open", "open"], ["open", 503]),
    "max_connections_per_client": Case(
        1, connect_same_client_twice, ["open", "open"], ["open", 429], {"on_duplicate": "allow"}
    ),
    "max_connections_per_address": Case(1, connect_two_clients, ["open", "open"], ["open", 429]),
    "max_connect_rate": Case(1, connect_two_clients, ["open", "open"], ["open", 503]),
    "max_connect_rate_per_address": Case(1, connect_two_clients, ["open", "open"], ["open", 429]),
    "trusted_proxies": Case(["10.0.0.7"], address_behind_proxy, "10.0.0.7", "203.0.113.9"),
    "reject": LiveCase("http", rejections, [4401, 401], [401, 401]),
    "allowed_origins": LiveCase(["https://*.example.com"], connect_cross_origin, 403, "open"),
    "require_origin": Case(True, connect_without_origin, ["open"], [403]),
    "on_duplicate": Case("reject", connect_duplicate, [4409, "open"], ["open", 4409]),
    "disconnect_grace": Case(1, seconds_until_endpoint_ends, 10, 1),
    "max_message_size": Case(100, send_long_message, "open", 1009),
    "max_message_rate": Case(1, send_three_messages, (3, None), (1, "rate_limited")),
    "max_message_burst": Case(3, send_three_messages, (1, "rate_limited"), (3, None), {"max_message_rate": 1}),
    "max_byte_rate": Case(100, send_three_messages, (3, None), (1, "rate_limited"), {"max_message_size": 100}),
    "max_bad_messages": Case(1, send_bad_messages, "open", 1008),
    "inbox_max_messages": Case(2, unread_messages_of_idle_endpoint, 8, 2),
    "inbox_max_bytes": Case(4000, unread_messages_of_idle_endpoint, 8, 4),
    "inbox_overflow": Case("close", send_flood, "open", 1013, inbox_of_two),
    "inbox_pause_timeout": Case(20, seconds_until_hanging_endpoint_closes, 300, 20, inbox_of_two),
    "outbox_max_messages": Case(3, block_client, (None, 0), (4507, 0)),
    "outbox_max_bytes": Case(3000, block_client, (None, 0), (4507, 0)),
    "outbox_overflow": Case("drop_oldest", block_client, (4507, 0), (None, 4), {"outbox_max_messages": 3}),
    "unsent_low_water_bytes": LiveCase(None, queues_for_stalled_client, True, False, slow_reader),
    "write_buffer_high_water_bytes": LiveCase(
        16 * 1024 * 1024, queues_for_stalled_client, True, False, {**slow_reader, "unsent_low_water_bytes": 16384}
    ),
    "send_timeout": Case(1, seconds_until_stalled_send_closes, 10, 1),
    "max_rooms_per_connection": Case(1, join_two_rooms, ["lobby", "cellar"], ["lobby"]),
    "presence_grace": Case(1, seconds_of_presence, 5, 1),
    "reconnect_token_ttl": Case(one_minute, old_token, "ann", "TokenExpiredError"),
    "enable_reconnect": Case(False, fresh_token, "ann", "InvalidTokenError"),
    "reconnect_secret": Case(SECRET, token_of_other_worker, "InvalidTokenError", "ann"),
    "ticket_ttl": Case(5, old_ticket, "ann", 401),
    "session_ttl": Case(10, resume_after_minute, "full", "lost"),
    "max_detached_sessions": Case(1, detach_two_sessions, {"sessions": 2, "away": 2}, {"sessions": 1, "away": 1}),
    "hello_timeout": Case(2, seconds_without_hello, 10, 2),
    "replay_max_messages": Case(2, resume_after_minute, "full", "gap"),
    "replay_max_bytes": Case(1000, resume_after_minute, "full", "gap"),
    "replay_max_age": Case(10, resume_after_minute, "full", "gap"),
    "room_history": Case(5, join_later, [], ["old news"]),
    "room_history_max_age": Case(10, join_later, ["old news"], [], {"room_history": 5}),
    "max_lifetime": Case(100, stay_long, "open", 1001),
    "idle_timeout": Case(100, stay_long, "open", 1001),
    "drain_window": Case(0, drain_duration, 0.5, 0.0),
    "drain_timeout": Case(2, shutdown_duration, 30, 2, {"disconnect_grace": 1000}),
    "drain_secret": Case(SECRET, drain_over_http, 403, 200, virtual=False),
    "handle_signals": LiveCase(False, sigterm_sends_retry_hint, True, False, alone=True),
    "compression": LiveCase("none", negotiates_compression, True, False),
    "compression_min_bytes": LiveCase(0, compressed_echoes, [False, True], [True, True]),
    "log_level": Case("WARNING", logged_events, ["connection_opened"], []),
    "enable_metrics": Case(True, scrape, 404, 200, virtual=False),
    "num_shards": Case(1, sends_per_iteration, 6, 32),
    "max_concurrent_cleanup": Case(1, concurrent_cleanups, 3, 1),
    "max_concurrent_broadcast": Case(1, concurrent_sends, 3, 1),
    "max_memory_per_connection": Case(10_000, store_user_data, "stored", "max_memory_per_connection"),
    "max_total_memory": Case(30_000, store_user_data_of_two, ["open", "open"], [4503, "open"]),
    "memory_eviction_policy": Case(
        "fifo", remaining_after_eviction, ["ann", "carl"], ["bob", "carl"], {"max_total_memory": 50_000}
    ),
    "memory_check_interval": Case(5, growth_is_counted, False, True),
    "gc_pacing": Case("off", freezes_survivors, True, False),
}


# ── the test ──


class Servers:
    """Real servers, each started once for its options."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._running: dict[str, LiveServer] = {}

    def get(self, options: Mapping[str, Any], *, alone: bool) -> LiveServer:
        """Return the server with these options; with `alone`, one that no other case uses."""
        key = repr(sorted(options.items()))
        server = None if alone else self._running.get(key)
        if server is None:
            server = self._stack.enter_context(quiet_server(**options))
            if not alone:
                self._running[key] = server
        return server


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """Run real servers for the tests of this module."""
    with ExitStack() as stack:
        yield Servers(stack)


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """Reset the level of the library's logger, and restore it afterwards: `log_level` sets it."""
    logger = get_logger()
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(level)


def changed(option: str, case: Case | LiveCase) -> dict[str, Any]:
    """Return the options that are changed."""
    return case.change if isinstance(case.change, dict) else {option: case.change}


def played(case: Case, options: Mapping[str, Any]) -> Any:
    """Return the observation of a scene with these options. Heartbeats are off unless the case is about them."""

    async def play() -> Any:
        quiet = "ping" if case.scene is first_message_sent else "off"
        async with Stage(**{"heartbeat_type": quiet, **case.base, **options}) as stage:
            return await case.scene(stage)

    return run_virtually(play()) if case.virtual else run(play())


@pytest.mark.parametrize(
    "option",
    [
        pytest.param(option, marks=pytest.mark.live if isinstance(CASES.get(option), LiveCase) else ())
        for option in WebSocketConfig.model_fields
    ],
)
def test_every_option_has_observable_effect(option: str, servers: Servers) -> None:
    """Every option has an effect: the default and another value differ, both as documented."""
    assert option in CASES, f"CASES has no case for {option}"
    case = CASES[option]
    change = changed(option, case)
    assert option not in case.base
    assert all(WebSocketConfig.model_fields[name].default != value for name, value in change.items())
    assert case.before != case.after
    seen = []
    for options in ({}, change):
        if isinstance(case, LiveCase):
            seen.append(case.scene(servers.get({**case.base, **options}, alone=case.alone)))
        else:
            seen.append(played(case, options))
    assert seen == [case.before, case.after]


def test_every_case_names_existing_option() -> None:
    """Every case belongs to an existing option."""
    assert set(CASES) == set(WebSocketConfig.model_fields)
    assert KIND == "uvicorn-stable"  # on this server the library does the compression
