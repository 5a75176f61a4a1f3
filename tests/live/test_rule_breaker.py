"""A client that breaks every rule at once delays other clients' echoes by at most 50 ms at p99.

The options are those of a server in production, since the defaults do not limit the traffic of an application:

- `max_message_size` as small as the application's messages, and uvicorn's `--ws-max-size` the same;
- `max_message_rate`, `max_message_burst` and `max_byte_rate`;
- `max_connections_per_address`, `max_connect_rate_per_address`, `max_connections`;
- `max_bad_messages` and `hello_timeout` below their defaults, `max_memory_per_connection`;
- log level WARNING, since every rejected handshake is a line at INFO, also in uvicorn's log.

The limit of control frames needs no option, but the protocol class matters. uvicorn's own class parses a whole read of
256 KiB before other connections run, and it reads on after the close frame. A read full of small frames blocks the loop
there for seconds, which no ASGI application can prevent; one test here shows it. `StableWebSocketProtocol` parses in
slices, and discards what arrives after the end.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.support.server import ROOT, LiveServer, free_port

APP = "tests.live.identity_app:app"
MAX_DELAY = 0.050
"""Seconds by which the 99th percentile of an echo may grow."""

ECHO_INTERVAL = 0.02
MESSAGE_SIZE = 64 << 10
PRODUCTION: dict[str, Any] = {
    "max_message_size": MESSAGE_SIZE,
    "max_message_rate": 100,
    "max_message_burst": 200,
    "max_byte_rate": 512 << 10,
    "max_connections": 10_000,
    "max_connections_per_address": 20,
    "max_connect_rate_per_address": 10,
    "max_bad_messages": 10,
    "max_memory_per_connection": 4 << 20,
    "hello_timeout": 3,
    "on_duplicate": "allow",
    "heartbeat_interval": 20,
    "log_level": "WARNING",
}
ARGS = ("--ws-max-size", str(MESSAGE_SIZE), "--log-level", "warning")

FLOODS = (
    "pings",
    "pings as text",
    "tiny messages",
    "fragments",
    "giant frames",
    "bad JSON",
    "deep JSON",
    "bombs",
    "acks",
)
"""Rules that are not broken towards uvicorn's own protocol class."""

BROKEN = {
    "pings",
    "pings as text",
    "tiny messages",
    "fragments",
    "giant frames",
    "announced",
    "bad JSON",
    "deep JSON",
    "bombs",
    "acks",
    "reconnect",
    "half open",
    "refused",
}


async def echoes(client: ClientConnection, seconds: float) -> list[float]:
    """Send every 20 ms without waiting for echoes, and return the duration of each echo."""
    sent: list[float] = []
    took: list[float] = []
    count = int(seconds / ECHO_INTERVAL)

    async def read() -> None:
        while len(took) < count:
            message = await client.recv()
            if message == '{"type":"ping"}':
                await client.send('{"type":"pong"}')
            else:
                took.append(time.perf_counter() - sent[int(message)])

    reading = asyncio.create_task(read())
    started = time.perf_counter()
    for number in range(count):
        await asyncio.sleep(max(0.0, started + number * ECHO_INTERVAL - time.perf_counter()))
        sent.append(time.perf_counter())
        await client.send(f"{number}")
    await asyncio.wait_for(reading, 10)
    return took


def p99(took: list[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(took, n=100)[-1]


async def least_delay(kind: str, seconds: float, *skipped: str) -> float:
    """Return the least delay of up to three tries, since other load on the machine only adds to it."""
    delays: list[float] = []
    while len(delays) < 3 and (not delays or min(delays) > MAX_DELAY):
        delays.append(await measured_delay(kind, seconds, *skipped))
    return min(delays)


async def measured_delay(kind: str, seconds: float, *skipped: str) -> float:
    """Return the growth of a client's p99 echo while another client breaks every rule."""
    witness = connect(f"ws://127.0.0.1:{(port := free_port())}/echo/witness", compression=None)
    with LiveServer(kind, app=APP, config=PRODUCTION, args=ARGS, port=port) as server:
        async with witness as client:
            return await added_delay(server, client, seconds, *skipped)


async def added_delay(server: LiveServer, client: ClientConnection, seconds: float, *skipped: str) -> float:
    """Return the growth of this client's p99 echo."""
    await echoes(client, 0.5)
    calm = await echoes(client, seconds)
    command = (sys.executable, "-m", "tests.live.rule_breaker", str(server.port), str(seconds + 1), *skipped)
    breaker = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    try:
        await asyncio.sleep(1)
        disturbed = await echoes(client, seconds)
        output, _ = await asyncio.wait_for(breaker.communicate(), seconds + 10)
    finally:
        if breaker.returncode is None:
            breaker.kill()
            await breaker.wait()
    count = json.loads(output)
    delay = p99(disturbed) - p99(calm)
    print(f"{server.kind}: p99 {p99(calm) * 1000:.1f} ms, then {p99(disturbed) * 1000:.1f} ms, {count}")
    print("slowest", [f"{one * 1000:.0f}" for one in sorted(disturbed)[-10:]])
    assert "Traceback" not in server.log
    assert count.keys() == BROKEN - {*skipped}
    return delay


async def test_abusive_client_does_not_delay_others() -> None:
    """Pings, giant frames, bombs, half-open handshakes and endless reconnects delay an echo by at most 50 ms."""
    assert await least_delay("uvicorn-stable", 3) <= MAX_DELAY


@pytest.mark.soak
async def test_abusive_client_does_not_delay_others_on_uvicorn_class() -> None:
    """The limit holds on uvicorn's own class without the floods of frames."""
    assert await least_delay("uvicorn-sansio", 3, *FLOODS) <= MAX_DELAY


@pytest.mark.soak
async def test_long_abuse_does_not_delay_others() -> None:
    """The limit holds for 10 s of abuse."""
    assert await least_delay("uvicorn-stable", 10) <= MAX_DELAY


@pytest.mark.soak
@pytest.mark.xfail(reason="uvicorn's own class parses a whole read at once", raises=(AssertionError, TimeoutError))
async def test_frame_floods_delay_others_on_uvicorn_class() -> None:
    """Floods of frames exceed the limit on uvicorn's own class; if this passes, the docs understate uvicorn."""
    assert await measured_delay("uvicorn-sansio", 3) <= MAX_DELAY
