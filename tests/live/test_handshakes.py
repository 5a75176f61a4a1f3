"""Thousands of handshakes over the limit are cheap, leave nothing behind, and do not delay open connections."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.support.process import cpu_seconds
from tests.support.server import LiveServer
from tests.support.wire_client import WireClient, request

Serve = Callable[..., LiveServer]

KINDS = ("uvicorn-sansio", "uvicorn-stable")
CONCURRENT_DIALS = 20
MAX_CPU_SECONDS = 0.005
"""CPU time of the server process for one rejected handshake."""

MAX_GROWTH = 3 << 20
"""Bytes. Less than 1 KiB for each of 10,000 handshakes, but enough for the allocator."""

MAX_P99 = 0.25
"""Seconds. Generous, because the tests dial, reject and echo on the same two cores."""

LIMITS: dict[str, dict[str, object]] = {
    "full": {"max_connections": 2},
    "address": {"max_connections_per_address": 2},
    "rate": {"max_connect_rate_per_address": 0.001, "max_connect_rate": 1000, "trusted_proxies": ["127.0.0.1"]},
}

LOOPBACK = "127.0.0.1"

V1 = {"Sec-WebSocket-Protocol": "stabilizer.v1.json"}


async def rejection(port: int, path: str, headers: dict[str, str | None]) -> bytes:
    """Connect, read until the server closes, and return the status, or the code of its close frame, as bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request(port, path, headers))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        if b" 101 " in head.split(b"\r\n", 1)[0]:
            first = await asyncio.wait_for(reader.readexactly(4), 10)
            return first[2:]
        return head[9:12]
    finally:
        writer.transport.abort()


async def dial_many(
    server: LiveServer, path: str, count: int, headers: dict[str, str | None], answer: set[bytes]
) -> None:
    """Dial `count` times, several at once; each handshake must be rejected."""
    numbers = iter(range(count))

    async def dial() -> None:
        for number in numbers:
            assert await rejection(server.port, f"{path}/mallory{number}", headers) in answer

    await asyncio.gather(*(dial() for _ in range(CONCURRENT_DIALS)))


async def echo(client: ClientConnection, stopped: asyncio.Event, times: list[float]) -> None:
    """Echo until `stopped` is set, and record the duration of each echo."""
    while not stopped.is_set():
        started = time.perf_counter()
        await client.send("hi")
        assert await asyncio.wait_for(client.recv(), 10) == "hi"
        times.append(time.perf_counter() - started)
        await asyncio.sleep(0.005)


def code(number: int) -> bytes:
    """Return a close code as it is encoded in a close frame."""
    return number.to_bytes(2, "big")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("limit", "browser", "answer", "count"),
    [
        pytest.param("full", False, {b"503"}, 1000, id="full"),
        pytest.param("address", True, {code(4429), b"429"}, 1000, id="address, browser"),
        pytest.param("full", False, {b"503"}, 10_000, id="full, long", marks=pytest.mark.soak),
        pytest.param("full", True, {b"503"}, 10_000, id="full, browser, long", marks=pytest.mark.soak),
        pytest.param("address", False, {b"429"}, 10_000, id="address, long", marks=pytest.mark.soak),
        pytest.param(
            "address", True, {code(4429), b"429"}, 10_000, id="address, browser, long", marks=pytest.mark.soak
        ),
        pytest.param("rate", False, {b"429"}, 10_000, id="rate, long", marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
async def test_rejected_handshakes_use_little_cpu_and_memory(
    serve: Serve, kind: str, limit: str, browser: bool, answer: set[bytes], count: int
) -> None:
    """A rejected handshake takes less than 5 ms of CPU and no memory, and open connections echo all the time."""
    server = serve(
        kind,
        app="tests.live.limits_app:app",
        args=("--log-level", "warning", "--no-proxy-headers"),
        env={"TEST_LIMITS": json.dumps({"limited": LIMITS[limit]}), "PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1"},
    )
    headers: dict[str, str | None] = {"Origin": f"http://127.0.0.1:{server.port}"} if browser else {}
    times: list[float] = []
    stopped = asyncio.Event()
    async with AsyncExitStack() as connections:
        clients = [
            await connections.enter_async_context(
                connect(server.url(f"/limited/path/{name}"), additional_headers={"X-Forwarded-For": address})
            )
            for name, address in (("ann", LOOPBACK if limit == "address" else "10.0.0.1"), ("bob", LOOPBACK))
        ]
        echoing = [asyncio.create_task(echo(client, stopped, times)) for client in clients]
        await dial_many(server, "/limited/path", 300, headers, answer)  # until caches and the allocator are warm
        before, cpu, echoed = server.post("/collect"), cpu_seconds(server), len(times)
        await dial_many(server, "/limited/path", count, headers, answer)
        spent = cpu_seconds(server) - cpu
        stopped.set()
        await asyncio.gather(*echoing)
        after = server.post("/collect")
        found = server.get("/limited/counts")
    during = sorted(times[echoed:])
    p99 = during[int(len(during) * 0.99)]
    print(
        f"\n{kind}, {limit}{', a browser' if browser else ''}, {count}: {spent / count * 1000:.2f} ms of CPU each, "
        f"{after['rss'] - before['rss']:+,} bytes, p99 of {len(during)} echoes {p99 * 1000:.1f} ms"
    )
    assert spent / count < MAX_CPU_SECONDS
    assert after["rss"] - before["rss"] < MAX_GROWTH
    assert after["objects"] - before["objects"] < 0.1 * count
    assert p99 < MAX_P99
    assert sum(found["refusals"].values()) == 300 + count
    assert {name: found[name] for name in ("established", "pending", "connections", "unfinished", "sessions")} == {
        "established": 2,
        "pending": 0,
        "connections": 2,
        "unfinished": 2,
        "sessions": 0,
    }


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
async def test_pending_v1_handshakes_are_bounded(serve: Serve, kind: str) -> None:
    """`stabilizer.v1.json` handshakes without a hello get 503 above a bound, even on a server that is not full.

    Accepted ones are closed with 4408 after `hello_timeout`.
    """
    server = serve(
        kind, app="tests.live.limits_app:app", env={"TEST_LIMITS": json.dumps({"limited": {"max_connections": 50}})}
    )

    async def dial(number: int) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request(server.port, f"/limited/path/silent{number}", V1))
        return (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10))[9:12], reader, writer

    # After MIN_HELLO_WAIT the server gives up the oldest silent client for a new one. A slow machine, too, serves this
    # number before that.
    silent = await asyncio.gather(*(dial(number) for number in range(100)))
    try:
        answers = [answer for answer, _, _ in silent]
        assert answers.count(b"101") == 50 + 16
        assert answers.count(b"503") == 100 - 50 - 16
        closed = await asyncio.gather(*(reader.readexactly(4) for answer, reader, _ in silent if answer == b"101"))
        assert {frame[2:] for frame in closed} == {code(4408)}
    finally:
        for _, _, writer in silent:
            writer.transport.abort()
    assert server.get("/limited/counts")["sessions"] == 0


async def test_unclosed_rejected_browsers_are_bounded(serve: Serve) -> None:
    """Of the browsers of one address, one in 5 s is accepted to get a close code; the others get an HTTP status.

    The server holds an accepted client that does not answer the close frame for a while, but not the others.
    """
    limits = {"limited": {"max_connections_per_address": 1}}
    server = serve(app="tests.live.limits_app:app", env={"TEST_LIMITS": json.dumps(limits)})

    def dial_all(open_clients: ExitStack) -> list[int]:
        answers = []
        for _ in range(1200):
            client = WireClient(server.port)
            answers.append(client.upgrade("/limited/path", {"Origin": f"http://{LOOPBACK}:{server.port}"}).status)
            open_clients.callback(client.close) if answers[-1] == 101 else client.close()
        return answers

    async with connect(server.url("/limited/path/ann")):
        with ExitStack() as open_clients:
            answers = await asyncio.to_thread(dial_all, open_clients)
            open_files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
    assert answers[0] == 101
    assert set(answers[1:]) <= {101, 429}
    assert answers.count(429) > 1190
    assert open_files < answers.count(101) + 100
