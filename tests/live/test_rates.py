"""Rates on real servers: floods of messages, bytes and control frames are closed, and honest clients stay."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from fastapi_ws_stabilizer.client import Client
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.process import cpu_seconds, no_new_errors
from tests.support.server import LiveServer, until
from tests.support.wire_client import CLOSE, PING, PONG, TEXT, WireClient, frame

KINDS = ("uvicorn-sansio", "uvicorn-stable")
APP = "tests.live.identity_app:app"
LIMIT = 1 << 20
CONFIG = {"max_message_rate": 10, "max_message_size": LIMIT, "on_duplicate": "allow"}


@pytest.fixture(scope="module", params=KINDS)
def limited_server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """Server that accepts ten messages per second from a client."""
    with LiveServer(request.param, app=APP, config=CONFIG) as server:
        yield server


@pytest.fixture
async def server(limited_server: LiveServer) -> AsyncIterator[LiveServer]:
    """That server, which must log no error during the test."""
    with no_new_errors(limited_server):
        yield limited_server


async def read_all(client: ClientConnection) -> tuple[list[Any], int, str]:
    """Read until the server closes, and return the messages, the code and the reason."""
    found: list[Any] = []
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            found.append(json.loads(await asyncio.wait_for(client.recv(), 5)))
    assert closed.value.rcvd is not None
    return found, closed.value.rcvd.code, closed.value.rcvd.reason


async def send_evenly(client: ClientConnection, rate: float, seconds: float) -> None:
    """Send messages at a rate, until the server closes."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    for number in range(int(rate * seconds)):
        try:
            await client.send('{"type":"say"}')
        except ConnectionClosed:
            return
        await asyncio.sleep(max(0.0, started + (number + 1) / rate - loop.time()))


async def test_tenfold_message_rate_closes_with_4429(server: LiveServer) -> None:
    """At ten times the rate the client gets `rate_limited` errors, then 4429 with the time to wait."""
    async with connect(server.url("/run/flood")) as client:
        sending = asyncio.create_task(send_evenly(client, 100, 3))
        found, code, reason = await read_all(client)
        await sending
    assert code == 4429
    assert re.fullmatch(r"too many messages; retry=\d+", reason)
    assert 8 <= len(found) <= 16
    assert {(one["type"], one["code"]) for one in found} == {("error", "rate_limited")}
    handled = server.get("/notes").count("said flood")
    assert 8 <= handled <= 14


async def test_double_message_rate_gets_errors_and_stays_open(server: LiveServer) -> None:
    """At twice the rate the client gets errors, and the connection stays open."""
    async with connect(server.url("/run/fast")) as client:
        await send_evenly(client, 20, 2)
        await client.send('{"type":"ping"}')
        answers = []
        while not answers or answers[-1]["type"] != "pong":
            answers.append(json.loads(await asyncio.wait_for(client.recv(), 5)))
    assert 5 <= len(answers) <= 15


async def test_reconnect_does_not_refill_rate_limit(server: LiveServer) -> None:
    """A reconnect does not refill the bucket, but the time in the close reason does."""
    async with connect(server.url("/run/again")) as client:
        for _ in range(60):
            await client.send('{"type":"say"}')
        _, code, reason = await read_all(client)
    assert code == 4429
    (wait,) = re.findall(r"retry=(\d+)", reason)
    handled = server.get("/notes").count("said again")
    async with connect(server.url("/run/again")) as second:
        await second.send('{"type":"say"}')
        assert json.loads(await asyncio.wait_for(second.recv(), 5))["code"] == "rate_limited"
    assert server.get("/notes").count("said again") == handled
    await asyncio.sleep(int(wait) / 1000)
    async with connect(server.url("/run/again")) as third:
        await third.send('{"type":"say"}')
        await third.send("ping")
        assert await asyncio.wait_for(third.recv(), 5) == "pong"


async def test_message_one_byte_over_limit_closes_with_1009(server: LiveServer) -> None:
    """A message of 1 MiB is handled; one more byte closes with 1009, and the endpoint does not get the message."""
    async with connect(server.url("/echo/large"), max_size=None, compression=None) as client:
        await client.send("x" * LIMIT)
        assert len(await asyncio.wait_for(client.recv(), 5)) == LIMIT
        await client.send("x" * (LIMIT + 1))
        _, code, reason = await read_all(client)
    assert (code, reason) == (1009, f"message over {LIMIT} bytes")
    assert f"echo {LIMIT}" in server.get("/notes")
    assert f"echo {LIMIT + 1}" not in server.get("/notes")


async def test_message_type_has_its_own_rate_limit(server: LiveServer) -> None:
    """A type over its own rate is rejected, but other messages of the client are not."""
    async with connect(server.url("/run/searcher")) as client:
        for _ in range(3):
            await client.send('{"type":"search"}')
        await client.send('{"type":"say"}')
        assert json.loads(await asyncio.wait_for(client.recv(), 5))["code"] == "rate_limited"
        await until(lambda: "said searcher" in server.get("/notes"))
    assert server.get("/notes").count("searched searcher") == 2


async def test_python_client_over_rate_limit_loses_nothing(server: LiveServer) -> None:
    """The client waits as long as the server asks, and each message is handled once."""
    refused: list[Exception] = []
    async with Client(server.url("/run/patient"), stable_after=0.1) as client:
        client.on_error(refused.append)
        sent = [client.send(number, event="say") for number in range(40)]
        await asyncio.wait_for(asyncio.gather(*sent), 20)
        await until(lambda: server.get("/notes").count("said patient") == 40)
    assert refused == []


# ── control frames ──


@pytest.mark.parametrize("mode", ["plain", "v1"])
async def test_text_ping_flood_closes_with_4429(server: LiveServer, mode: str) -> None:
    """A flood of text pings closes plain and session clients with 4429."""
    protocols = [Subprotocol(SUBPROTOCOL)] if mode == "v1" else None
    async with connect(server.url(f"/run/pinging-{mode}"), subprotocols=protocols) as client:
        if mode == "v1":
            await client.send(json.dumps({"type": "hello", "v": 1, "n": 1}))
        for _ in range(1000):
            try:
                await client.send('{"type":"ping"}')
            except ConnectionClosed:
                break
        _, code, reason = await read_all(client)
    assert code == 4429
    assert reason.startswith("too many control frames; retry=")


@pytest.mark.parametrize("opcode", [PING, PONG])
async def test_protocol_frame_flood_closes_with_4429(opcode: int) -> None:
    """A flood of ping or pong frames closes with 4429 on our protocol class, which counts them."""
    with LiveServer("uvicorn-stable", app=APP, config=CONFIG) as server, WireClient(server.port) as client:
        client.upgrade("/run")
        client.write(frame(opcode, b"x") * 150)
        client.write(frame(PING, b"last"))
        await asyncio.sleep(0.1)
        client.write(frame(opcode, b"x") * 1000)
        while (found := await asyncio.to_thread(client.next_frame)).opcode != CLOSE:
            assert found.opcode == PONG
        assert int.from_bytes(found.payload[:2], "big") == 4429
        assert found.payload[2:].startswith(b"too many control frames; retry=")
        assert server.errors() == []


async def test_flood_after_close_uses_little_cpu() -> None:
    """Megabytes of pings after the close take less than 0.5 s of CPU, because the server stops reading."""
    with LiveServer("uvicorn-stable", app=APP, config=CONFIG) as server, WireClient(server.port) as client:
        client.upgrade("/run")
        before = cpu_seconds(server)
        client.socket.settimeout(1)
        with suppress(OSError):  # the server no longer reads
            await asyncio.to_thread(client.write, frame(PING) * 3_000_000)
        assert cpu_seconds(server) - before < 0.5
        assert server.errors() == []


async def test_client_still_writing_reads_close_frame() -> None:
    """A client in the middle of a large message can read the close frame, because the server discards the rest."""
    with LiveServer("uvicorn-stable", app=APP, config=CONFIG) as server, WireClient(server.port) as client:
        client.upgrade("/run")
        await asyncio.to_thread(client.write, frame(TEXT, b"x") * 60, frame(TEXT, b"x" * (LIMIT - 1)))
        while (found := await asyncio.to_thread(client.next_frame)).opcode != CLOSE:
            pass
        assert int.from_bytes(found.payload[:2], "big") == 4429
        await asyncio.to_thread(client.eof)


async def test_large_read_does_not_delay_others() -> None:
    """A large write of one client is parsed in slices, and arrives whole and in order."""
    with LiveServer("uvicorn-stable", app=APP, config={"max_message_size": LIMIT}) as server:
        with WireClient(server.port) as client:
            client.upgrade("/echo")
            payloads = [b"%d" % number for number in range(20_000)]
            sending = asyncio.create_task(asyncio.to_thread(client.write, *(frame(TEXT, one) for one in payloads)))
            found = await asyncio.to_thread(lambda: [client.next_frame().payload for _ in payloads])
            await sending
            assert found == payloads


@pytest.mark.parametrize("kind", KINDS)
async def test_ordinary_pings_are_not_rate_limited(kind: str) -> None:
    """Twenty pings per second from each side are far below the limit of control frames."""
    config = {"heartbeat_interval": 0.05, "heartbeat_timeout": 5, "require_pong": True}
    with LiveServer(kind, app=APP, config=config) as server:
        plain = connect(server.url("/run/plain"), ping_interval=0.05)
        async with plain as client, Client(server.url("/run/numbered")) as numbered:

            async def answer() -> None:
                async for message in client:
                    if json.loads(message)["type"] == "ping":
                        await client.send('{"type":"pong"}')

            answering = asyncio.create_task(answer())
            lost: list[int] = []
            numbered.on_close(lambda code, reason: lost.append(code))
            await asyncio.sleep(3)
            assert not answering.done()
            assert lost == []
            answering.cancel()


async def test_requested_acks_are_not_rate_limited(server: LiveServer) -> None:
    """A client that acknowledges 300 messages quickly, as the server asked, stays connected."""
    codes: list[int] = []
    async with Client(server.url("/run/confirming")) as client:
        client.on_close(lambda code, reason: codes.append(code))
        await client.send(None, event="confirm")
        await until(lambda: "confirmed confirming" in server.get("/notes"))
    assert codes in ([], [1000])
