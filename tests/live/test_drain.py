"""Drains on real servers: clients are asked to reconnect, a few at a time, and no message is lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
import urllib.error
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from fastapi_ws_stabilizer.client import Client
from fastapi_ws_stabilizer.shutdown.signals import DUPLICATE_SIGNAL_WINDOW
from tests.support.raw import RawClient
from tests.support.server import UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]

APP = "tests.live.drain_app:app"
CLIENTS = 1000
SECRET = "a-secret-of-the-drain-tests"
WINDOW = 4.0
CONFIG = {"drain_window": WINDOW, "disconnect_grace": 1.0}

pytestmark = pytest.mark.timeout(90)


async def connect_clients(server: LiveServer, count: int) -> list[ClientConnection]:
    """Connect `count` clients."""
    clients: list[ClientConnection] = []
    for start in range(0, count, 100):
        urls = [server.url(f"/ws/c{number}") for number in range(start, min(start + 100, count))]
        clients += await asyncio.gather(*(connect(url, compression=None, ping_interval=None) for url in urls))
    return clients


def max_per_interval(times: list[float], interval: float = 0.1) -> int:
    """Return the largest number of times within one interval, in seconds."""
    return max(Counter(int(at / interval) for at in times).values())


class Closes:
    """Time, code and reason of each client's close."""

    def __init__(self, found: list[tuple[float, int | None, str]]) -> None:
        self.times = [at for at, _, _ in found]
        self.codes = {code for _, code, _ in found}
        self.reasons = [reason for _, _, reason in found]


async def closes(clients: list[ClientConnection], since: float) -> Closes:
    """Wait until all clients are closed."""

    async def wait_for_close(client: ClientConnection) -> tuple[float, int | None, str]:
        await client.wait_closed()
        return time.monotonic() - since, client.close_code, client.close_reason or ""

    return Closes(await asyncio.gather(*(wait_for_close(client) for client in clients)))


def are_spread_over(window: float, server: LiveServer) -> bool:
    """Return whether no 100 ms hold more than twice their share of the closes, by the server's clock.

    The clock of this process is not used, because its garbage collections with a thousand clients delay the reads.
    """
    times = [at for found in re.findall(r"ENDED AT (.*)", server.log) for at in json.loads(found)]
    return len(times) == CLIENTS and max_per_interval(times) <= 2 * len(times) * 0.1 / window


def fields(server: LiveServer, event: str) -> dict[str, Any]:
    """Return the fields of an event that the server printed."""
    found: dict[str, Any] = json.loads(re.findall(rf"{event} (.*)", server.log)[-1])
    return found


@pytest.mark.parametrize("kind", UVICORN)
async def test_drain_closes_thousand_clients_over_window(serve: Serve, kind: str) -> None:
    """Each client gets a retry hint and a close frame in the window; hooks and clean-ups end before the lifespan."""
    server = serve(kind, app=APP, config=CONFIG)
    clients = await connect_clients(server, CLIENTS)
    since = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    found = await closes(clients, since)
    await asyncio.to_thread(server.process.wait, 10)
    took = time.monotonic() - since
    assert found.codes == {1012}
    assert all(re.fullmatch(r"server shutdown; retry=\d{4,5}", reason) for reason in found.reasons)
    assert are_spread_over(WINDOW, server)
    assert fields(server, "SHUTDOWN")["closed_count"] == CLIENTS
    assert fields(server, "LIFESPAN ended") == {"hooks": CLIENTS, "clean-ups": CLIENTS}
    assert WINDOW * 0.9 < took < WINDOW + 3
    assert not server.errors()


@pytest.mark.parametrize("kind", [*UVICORN, "hypercorn"])
async def test_drain_reason_reaches_hooks_of_every_client_kind(serve: Serve, kind: str) -> None:
    """At SIGTERM session clients and plain clients both get the reason `server_shutdown`."""
    server = serve(kind, app=APP, config={"drain_window": 0.5})
    async with Client(server.url("/ws/session")), connect(server.url("/ws/plain")) as plain:
        await plain.send('{"type":"say","message":1}')
        server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(server.process.wait, 10)
    reasons = json.loads(re.findall(r"REASONS (.*)", server.log)[-1])
    assert sorted(reasons) == [
        "plain server_shutdown",
        "plain session server_shutdown",
        "session server_shutdown",
        "session session server_shutdown",
    ]


@pytest.mark.parametrize(
    ("runner", "processes"),
    [
        ("uvicorn --workers 2", 2),
        ("gunicorn", 1),
        pytest.param("uvicorn --loop uvloop", 1, marks=pytest.mark.soak),
    ],
)
async def test_drain_works_with_each_uvicorn_runner(serve: Serve, runner: str, processes: int) -> None:
    """Two workers, gunicorn and uvloop close with a hint, spread over the window, and exit in time."""
    if runner == "gunicorn":
        server = serve("gunicorn", app=APP, config=CONFIG)
    else:
        server = serve(app=APP, config=CONFIG, args=tuple(runner.split()[1:]))
    if processes > 1:
        await until(lambda: server.log.count("Application startup complete") == processes, 20)
    clients = await connect_clients(server, CLIENTS)
    since = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    found = await closes(clients, since)
    await asyncio.to_thread(server.process.wait, 15)
    assert found.codes == {1012}
    assert {reason.split(";")[0] for reason in found.reasons} == {"server shutdown"}
    assert are_spread_over(WINDOW, server)
    assert time.monotonic() - since < WINDOW + 4


@pytest.mark.parametrize(
    ("kind", "args", "number"),
    [
        ("uvicorn", ("--workers", "2"), signal.SIGTERM),
        ("gunicorn", (), signal.SIGTERM),
        ("uvicorn", ("--reload",), signal.SIGINT),
    ],
    ids=["--workers 2", "gunicorn", "--reload"],
)
async def test_signal_to_process_group_drains_once(
    serve: Serve, kind: str, args: tuple[str, ...], number: signal.Signals
) -> None:
    """Workers that get a signal twice, as from Ctrl-C and systemd, drain completely and end their lifespan."""
    server = (
        serve("gunicorn", app=APP, config=CONFIG) if kind == "gunicorn" else serve(app=APP, config=CONFIG, args=args)
    )
    workers = 2 if "--workers" in args else 1
    await until(lambda: server.log.count("pplication startup complete") == workers, 20)
    await asyncio.sleep(1)
    clients = await connect_clients(server, 150)
    since = time.monotonic()
    os.killpg(server.process.pid, number)
    found = await closes(clients, since)
    await asyncio.to_thread(server.process.wait, 15)
    assert found.codes == {1012}
    assert {reason.split("=")[0] for reason in found.reasons} == {"server shutdown; retry"}
    assert max(found.times) > 0.5
    assert "LIFESPAN ended" in server.log


async def test_stalled_client_does_not_delay_drain(serve: Serve) -> None:
    """A stalled client is cut, the others get their close frame, and the process exits in time."""
    server = serve(config={**CONFIG, "send_timeout": 30})
    with RawClient(server.port, "/flood/stalled", receive_buffer=4096) as stalled:
        stalled.handshake()
        async with connect(server.url("/idle/ann")) as ann:
            await until(lambda: server.probe()["connections"] == 2)
            await asyncio.sleep(0.3)  # the flood fills the buffers and stalls
            since = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(ann.wait_closed(), 5)
            assert (ann.close_code, (ann.close_reason or "").split(";")[0]) == (1012, "server shutdown")
            await asyncio.to_thread(server.process.wait, 10)
            assert time.monotonic() - since < 4


@pytest.mark.parametrize("kind", UVICORN)
async def test_handshake_during_drain_gets_503(serve: Serve, kind: str) -> None:
    """A handshake gets 503 with `Retry-After`, and a second SIGTERM ends the drain in less than 1 s."""
    server = serve(kind, app=APP, config={**CONFIG, "drain_window": 60})
    clients = await connect_clients(server, 500)
    server.process.send_signal(signal.SIGTERM)
    await until(lambda: "DRAIN_STARTED" in server.log)
    with pytest.raises(InvalidStatus) as refused:
        await connect(server.url("/ws/late"))
    assert refused.value.response.status_code == 503
    assert int(refused.value.response.headers["Retry-After"]) > 0
    await asyncio.sleep(DUPLICATE_SIGNAL_WINDOW)  # an earlier signal counts as the same stop
    again = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(server.process.wait, 5)
    assert time.monotonic() - again < 1
    assert {client.close_code for client in clients if await closed(client)} == {1012}


async def closed(client: ClientConnection) -> bool:
    """Wait until a client is closed."""
    await asyncio.wait_for(client.wait_closed(), 5)
    return True


async def test_disabled_signal_handling_leaves_close_to_server(serve: Serve) -> None:
    """Without signal handling uvicorn closes all clients itself, without a hint."""
    server = serve(app=APP, config={**CONFIG, "handle_signals": False})
    clients = await connect_clients(server, 100)
    since = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    found = await closes(clients, since)
    assert found.codes == {1012}
    assert set(found.reasons) == {""}
    assert max(found.times) < 2


async def drain_command(*arguments: str, secret: str | None = SECRET) -> tuple[int, str, str]:
    """Run `python -m fastapi_ws_stabilizer drain`."""
    env = {name: value for name, value in os.environ.items() if name != "WS_DRAIN_SECRET"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fastapi_ws_stabilizer", "drain", *arguments),
        env={**env, **({} if secret is None else {"WS_DRAIN_SECRET": secret})},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, out.decode(), err.decode()


async def test_drain_command_closes_clients_before_sigterm(serve: Serve) -> None:
    """The command closes all clients and waits; readiness is off afterwards, and SIGTERM has nothing left to do."""
    server = serve(app=APP, config={**CONFIG, "drain_secret": SECRET})
    clients = await connect_clients(server, 100)
    code, out, err = await drain_command(f"http://127.0.0.1:{server.port}/ws-stats", "--timeout", "10")
    assert (code, err) == (0, "")
    assert json.loads(out)["closed_count"] == 100
    assert [client.close_code for client in clients if await closed(client)] == [1012] * 100
    with pytest.raises(urllib.error.HTTPError, match="503"):
        server.get("/ws-stats/health/ready")
    assert await asyncio.to_thread(server.terminate, 3) < 2
    assert not server.errors()


@pytest.mark.parametrize(
    ("arguments", "secret", "code", "message"),
    [
        (["{url}"], None, 2, "no secret: set WS_DRAIN_SECRET"),
        (["{url}"], "wrong" * 5, 1, "refused: HTTP 403"),
        (["http://127.0.0.1:9"], SECRET, 1, "no answer"),
        (["ftp://127.0.0.1"], SECRET, 2, "not an http"),
    ],
)
async def test_rejected_drain_command_prints_one_line(
    serve: Serve, arguments: list[str], secret: str | None, code: int, message: str
) -> None:
    """The command fails with one line and no traceback."""
    server = serve(app=APP, config={**CONFIG, "drain_secret": SECRET})
    url = f"http://127.0.0.1:{server.port}/ws-stats"
    found, _, err = await drain_command(*(argument.format(url=url) for argument in arguments), secret=secret)
    assert found == code
    assert message in err
    assert "Traceback" not in err


@pytest.mark.soak
async def test_clients_reconnect_spread_out_after_restart(serve: Serve) -> None:
    """500 clients disconnect when asked to, and reconnect to the new server spread over time."""
    first = serve(app=APP, config=CONFIG)
    dials: list[float] = []
    clients = [Client(first.url(f"/ws/c{number}"), max_delay=4.0) for number in range(500)]
    for client in clients:
        client.start()
    await asyncio.gather(*(asyncio.wait_for(client.wait_open(), 20) for client in clients))
    for client in clients:
        client.on_state(lambda state: dials.append(time.monotonic()) if state == "connecting" else None)
    first.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(first.process.wait, 15)
    second = await asyncio.to_thread(lambda: LiveServer(app=APP, config=CONFIG, port=first.port))
    try:
        await asyncio.to_thread(second.wait_until_up)  # while the clients reconnect
        await asyncio.gather(*(asyncio.wait_for(until_open(client), 25) for client in clients))
        answers = await asyncio.gather(*(client.request("say", number) for number, client in enumerate(clients)))
        assert answers == list(range(500))
        since = min(dials)
        assert max_per_interval([at - since for at in dials]) <= 0.1 * len(dials)
        await asyncio.gather(*(client.close() for client in clients))
    finally:
        await asyncio.to_thread(second.stop)


async def until_open(client: Client) -> None:
    """Wait until a client is connected to any server."""
    while client.state != "open":
        await asyncio.sleep(0.05)
