"""What a client may send, on real servers: floods of messages, bytes and control frames end, honest clients stay."""

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
    """A server that lets ten messages of a client through in a second."""
    with LiveServer(request.param, app=APP, config=CONFIG) as server:
        yield server


@pytest.fixture
async def server(limited_server: LiveServer) -> AsyncIterator[LiveServer]:
    """That server, which must log no error meanwhile."""
    with no_new_errors(limited_server):
        yield limited_server


async def read_all(client: ClientConnection) -> tuple[list[Any], int, str]:
    """Read until the server closes: what came, and the code and reason."""
    found: list[Any] = []
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            found.append(json.loads(await asyncio.wait_for(client.recv(), 5)))
    assert closed.value.rcvd is not None
    return found, closed.value.rcvd.code, closed.value.rcvd.reason


async def send_evenly(client: ClientConnection, rate: float, seconds: float) -> None:
    """Send messages at a rate, until the server has had enough."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    for number in range(int(rate * seconds)):
        try:
            await client.send('{"type":"say"}')
        except ConnectionClosed:
            return
        await asyncio.sleep(max(0.0, started + (number + 1) / rate - loop.time()))


async def test_tenfold_message_rate_closes_with_4429(server: LiveServer) -> None:
    """The client gets `rate_limited` errors, and 4429 with the time to wait before half a second is over."""
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
    """The client is told, and stays."""
    async with connect(server.url("/run/fast")) as client:
        await send_evenly(client, 20, 2)
        await client.send('{"type":"ping"}')
        answers = []
        while not answers or answers[-1]["type"] != "pong":
            answers.append(json.loads(await asyncio.wait_for(client.recv(), 5)))
    assert 5 <= len(answers) <= 15


async def test_reconnect_does_not_refill_rate_limit(server: LiveServer) -> None:
    """Neither dialling again nor a second connection fills the bucket; the time that is named does."""
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
    """1 MiB is handled, 1 MiB and one byte is 1009, and the callback never runs."""
    async with connect(server.url("/echo/large"), max_size=None, compression=None) as client:
        await client.send("x" * LIMIT)
        assert len(await asyncio.wait_for(client.recv(), 5)) == LIMIT
        await client.send("x" * (LIMIT + 1))
        _, code, reason = await read_all(client)
    assert (code, reason) == (1009, f"message over {LIMIT} bytes")
    assert f"echo {LIMIT}" in server.get("/notes")
    assert f"echo {LIMIT + 1}" not in server.get("/notes")


async def test_message_type_has_its_own_rate_limit(server: LiveServer) -> None:
    """More of it is refused, and other messages of the same client are not."""
    async with connect(server.url("/run/searcher")) as client:
        for _ in range(3):
            await client.send('{"type":"search"}')
        await client.send('{"type":"say"}')
        assert json.loads(await asyncio.wait_for(client.recv(), 5))["code"] == "rate_limited"
        await until(lambda: "said searcher" in server.get("/notes"))
    assert server.get("/notes").count("searched searcher") == 2


async def test_python_client_over_rate_limit_loses_nothing(server: LiveServer) -> None:
    """The client waits as long as it is told, after a refusal and after 4429, and each message is handled once."""
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
    """Of clients of either mode."""
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
    """Where our protocol class sees them; uvicorn's own answers them itself and tells nobody."""
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
    """A client that goes on when it was closed is not read for long: megabytes of pings are no second of computing."""
    with LiveServer("uvicorn-stable", app=APP, config=CONFIG) as server, WireClient(server.port) as client:
        client.upgrade("/run")
        before = cpu_seconds(server)
        client.socket.settimeout(1)
        with suppress(OSError):  # nobody reads any more
            await asyncio.to_thread(client.write, frame(PING) * 3_000_000)
        assert cpu_seconds(server) - before < 0.5
        assert server.errors() == []


async def test_client_still_writing_reads_close_frame() -> None:
    """A large message is on its way when the close frame comes: it is thrown away, and the close frame can be read."""
    with LiveServer("uvicorn-stable", app=APP, config=CONFIG) as server, WireClient(server.port) as client:
        client.upgrade("/run")
        await asyncio.to_thread(client.write, frame(TEXT, b"x") * 60, frame(TEXT, b"x" * (LIMIT - 1)))
        while (found := await asyncio.to_thread(client.next_frame)).opcode != CLOSE:
            pass
        assert int.from_bytes(found.payload[:2], "big") == 4429
        await asyncio.to_thread(client.eof)


async def test_large_read_does_not_delay_others() -> None:
    """What one client sends in one go is parsed in slices, and arrives whole and in order."""
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
    """Twenty pings a second from each side, of either kind, are far from the ceiling."""
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
    """A client that confirms 300 messages quickly, because it was asked with as many pings, is left alone."""
    codes: list[int] = []
    async with Client(server.url("/run/confirming")) as client:
        client.on_close(lambda code, reason: codes.append(code))
        await client.send(None, event="confirm")
        await until(lambda: "confirmed confirming" in server.get("/notes"))
    assert codes in ([], [1000])
