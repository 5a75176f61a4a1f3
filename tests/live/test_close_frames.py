"""Close frames of accepted sockets for each cause, and the cause that hooks get on every server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.plain_client import received_close
from tests.support.raw import RawClient
from tests.support.server import SERVERS, UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]


async def read_to_close(server: LiveServer, path: str, *messages: str) -> tuple[int, str, int]:
    """Connect, send, and return code and reason of the close frame, and the number of bytes before it."""
    received = 0
    async with connect(server.url(path), max_size=None) as client:
        for message in messages:
            await client.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                received += len(await asyncio.wait_for(client.recv(), 5))
    frame = closed.value.rcvd
    assert frame is not None, "1006: closed without a close frame"
    return frame.code, frame.reason, received


BUGS = [
    ("/raise/bug?what=value", "endpoint_failed", "ValueError"),
    ("/group/bug?what=bug", "endpoint_failed", "ExceptionGroup"),
    ("/run/bug", "endpoint_failed", "ValueError"),
    ("/echo/bug?connect=boom", "endpoint_failed", "ValueError"),
    ("/adopt-raise/bug", "endpoint_failed", "ValueError"),
    ("/own-cancel/bug", "endpoint_failed", "CancelledError"),
]


@pytest.mark.parametrize("kind", UVICORN)
@pytest.mark.parametrize(("path", "event", "error"), BUGS)
async def test_bug_closes_with_1011_and_is_logged_once(
    serve: Serve, kind: str, path: str, event: str, error: str
) -> None:
    """A bug closes with 1011, logs one record with the connection id, and calls on_error once."""
    server = serve(kind)
    messages = ['{"type":"boom"}'] if path.startswith("/run") else []
    assert await read_to_close(server, path, *messages) == (1011, "internal error", 0)
    await server.until_event("error bug")
    assert server.events("error") == [f"error bug {error}"]
    records = [line for line in server.log.splitlines() if " ERROR " in line]
    assert len(records) == 1
    assert event in records[0]
    assert "connection_id=" in records[0]
    tracebacks = 2 if path.startswith("/group") else 1  # an exception group has one for each part
    assert server.log.count("Traceback") == tracebacks
    assert server.log.count("Exception in ASGI") == 0


REFUSALS = [
    ("/later-401/ann", 4401, "token expired"),
    ("/needs-number/ann?number=x", 1008, '[{"loc":"query.number","msg"'),
    ("/raise/ann?what=http", 4404, "no such room"),
    ("/raise/ann?what=long", 4401, "é" * 61),
    ("/raise/ann?what=websocket", 4321, "mine"),
    ("/raise/ann?what=disconnect", 1000, ""),
    ("/echo/ann?connect=403", 4403, "not you"),
    ("/group/ann?what=401", 4401, "expired"),
]


@pytest.mark.parametrize("kind", UVICORN)
async def test_rejection_closes_with_its_code_and_logs_no_error(serve: Serve, kind: str) -> None:
    """HTTPException closes with 4000 + status, invalid parameters with 1008, and WebSocketException with its code."""
    server = serve(kind)
    for path, code, reason in REFUSALS:
        found = await read_to_close(server, path)
        assert (path, found[0]) == (path, code)
        assert found[1].startswith(reason)
        assert len(found[1].encode()) <= 123
    assert server.events("the endpoint ran") == []
    assert server.events("error") == []
    assert not server.errors()


@pytest.mark.parametrize("kind", UVICORN)
async def test_rejection_before_accept_is_http_status(serve: Serve, kind: str) -> None:
    """An exception of an identity dependency or a handshake hook is answered with its status, and a bug with 500."""
    server = serve(kind)
    for path, status in (("/identified", 401), ("/echo/ann?handshake=403", 403), ("/echo/ann?handshake=boom", 500)):
        with pytest.raises(InvalidStatus) as refused:
            await connect(server.url(path))
        assert (path, refused.value.response.status_code) == (path, status)
    async with connect(server.url("/identified?token=ann")) as client:
        assert await client.recv() == "ann"
    assert server.events("connect") == ["connect ann"]
    records = [line for line in server.log.splitlines() if " ERROR fastapi_ws_stabilizer" in line]
    assert len(records) == 1
    assert "handshake_hook_failed" in records[0]
    assert server.events("error") == ["error ann ValueError"]


async def test_dependency_entered_before_socket_sees_exception(serve: Serve) -> None:
    """A dependency before the socket sees the exception and rolls back, though the server gets no exception."""
    server = serve()
    assert (await read_to_close(server, "/raise-resource-first/ann"))[0] == 1011
    await server.until_event("released ann")
    assert server.events("rollback ann") == ["rollback ann WebSocketException"]
    assert server.events("commit") == []


@pytest.mark.parametrize("kind", UVICORN)
async def test_slow_reader_gets_all_messages_after_endpoint_returns(serve: Serve, kind: str) -> None:
    """A client that reads again after 2.5 s gets what was queued before the return, and then 1000."""
    server = serve(kind)
    with RawClient(server.port, "/return/ann?size=8000000", receive_buffer=4096) as client:
        client.handshake()
        await asyncio.sleep(2.5)

        def read() -> tuple[int, int]:
            opcode, payload = client.frame()
            return opcode, len(payload)

        assert await asyncio.to_thread(read) == (2, 8_000_000)
        assert await asyncio.to_thread(client.close_frame) == (1000, "")


@pytest.mark.parametrize("kind", SERVERS)
async def test_returning_endpoint_flushes_and_closes_with_1000(serve: Serve, kind: str) -> None:
    """A client gets all of 1 MiB and then 1000 on every server, and 1000 on an adopted WebSocket."""
    server = serve(kind)
    size = 1024 * 1024
    assert await read_to_close(server, f"/return/ann?size={size}") == (1000, "", size)
    assert await read_to_close(server, "/adopt-return/ann") == (1000, "", 0)
    assert not server.errors()


async def scenario_client_close(server: LiveServer) -> None:
    async with connect(server.url("/echo/ann")) as client:
        await client.close(1001)


async def scenario_network_lost(server: LiveServer) -> None:
    with RawClient(server.port, "/echo/ann") as client:
        client.handshake()
        await server.until_event("connect")
        client.reset()


async def scenario_heartbeat_timeout(server: LiveServer) -> None:
    with RawClient(server.port, "/echo/ann") as client:  # this client does not answer ping frames
        client.handshake()
        client.send(1, b"pong")
        assert (await asyncio.to_thread(client.close_frame, 5))[0] == 4408


async def scenario_slow_consumer(server: LiveServer) -> None:
    with RawClient(server.port, "/idle/ann", receive_buffer=4096) as client:
        client.handshake()
        await server.until_event("connect")
        for _ in range(40):
            try:
                await asyncio.to_thread(server.post, "/broadcast?count=10&size=65536&pause=0.001")
            except OSError:  # HTTP 500: the only recipient is too slow
                break
        await server.until_event("disconnect ann")


async def scenario_server_shutdown(server: LiveServer) -> None:
    async with connect(server.url("/echo/ann")) as client:
        await asyncio.to_thread(server.post, "/shutdown")
        assert (await received_close(client))[0] == 1012


async def scenario_replaced(server: LiveServer) -> None:
    async with connect(server.url("/echo/ann")) as old, connect(server.url("/echo/ann")):
        assert (await received_close(old))[0] == 4409
        await server.until_event("disconnect ann replaced")
        await until(lambda: len(server.events("connect ann")) == 2)  # else the newer connection ends before its hooks
    await server.until_event("disconnect ann client_close")  # of the newer connection, else the next scenario reads it


async def scenario_policy(server: LiveServer) -> None:
    assert (await read_to_close(server, "/raise/ann?what=http"))[0] == 4404


async def scenario_error(server: LiveServer) -> None:
    assert (await read_to_close(server, "/raise/ann?what=value"))[0] == 1011


SCENARIOS = {
    "client_close": (scenario_client_close, {}),
    "network_lost": (scenario_network_lost, {}),
    "heartbeat_timeout": (scenario_heartbeat_timeout, {"heartbeat_interval": 0.3, "heartbeat_timeout": 0.3}),
    "slow_consumer": (scenario_slow_consumer, {"outbox_max_messages": 8}),
    "server_shutdown": (scenario_server_shutdown, {}),
    "replaced": (scenario_replaced, {}),
    "policy": (scenario_policy, {}),
    "error": (scenario_error, {}),
}


@pytest.mark.parametrize("kind", SERVERS)
async def test_disconnect_reason_is_same_on_every_server(serve: Serve, kind: str) -> None:
    """Eight causes give the same DisconnectReason to on_disconnect, whatever close code the server reports."""
    quick = {reason: scenario for reason, (scenario, config) in SCENARIOS.items() if not config}
    special = {reason: (scenario, config) for reason, (scenario, config) in SCENARIOS.items() if config}
    server = serve(kind)
    causes = []
    for reason, scenario in quick.items():
        if reason == "server_shutdown":
            continue
        server.post("/forget")
        await scenario(server)
        await server.until_event("disconnect ann")
        causes.append((reason, server.events("disconnect ann")[0].split()[2]))
    server.post("/forget")
    await scenario_server_shutdown(server)
    causes.append(("server_shutdown", server.events("disconnect ann")[0].split()[2]))
    for reason, (scenario, config) in special.items():
        other = serve(kind, config=config)
        await scenario(other)
        await other.until_event("disconnect ann")
        causes.append((reason, other.events("disconnect ann")[0].split()[2]))
    assert causes == [(reason, reason) for reason, _ in causes]
    assert {reason for reason, _ in causes} == set(SCENARIOS)


@pytest.mark.parametrize("kind", UVICORN)
async def test_close_validates_code_and_truncates_reason(serve: Serve, kind: str) -> None:
    """close(1006) raises, 300 bytes of emoji are cut between characters, and a second close does nothing."""
    server = serve(kind)
    assert await read_to_close(server, "/close/ann?code=4321&reason=" + "%F0%9F%98%80" * 75) == (4321, "😀" * 30, 0)
    assert (await read_to_close(server, "/close/bob?code=1006"))[0] == 1000
    assert server.events("refused close code 1006 cannot be sent")
    assert not server.errors()


async def test_message_over_limit_closes_1009_and_is_not_delivered(serve: Serve) -> None:
    """A message of max_message_size bytes is delivered, and one more byte closes with 1009; text counts in UTF-8."""
    server = serve(config={"max_message_size": 1000})
    async with connect(server.url("/echo/ann")) as client:
        for message in ("x" * 1000, b"x" * 1000, "é" * 500):
            await client.send(message)
            assert await client.recv() == message
    for message in ("x" * 1001, b"x" * 1001, "é" * 500 + "x"):
        async with connect(server.url("/echo/ann")) as client:
            await client.send(message)
            assert (await received_close(client, discard=False))[0] == 1009
    await until(lambda: len(server.events("disconnect ann message_too_big 1009")) == 3)


@pytest.mark.parametrize("kind", SERVERS)
async def test_adopting_endpoint_ends_after_disconnect(serve: Serve, kind: str) -> None:
    """An idle endpoint that only called connect() ends when its client disconnects, and leaves no task."""
    server = serve(kind)
    async with connect(server.url("/adopt-idle/ann")):
        await server.until_event("connect ann")
    await until(lambda: not [name for name in server.probe()["tasks"] if name.startswith("ws-")])
    assert server.probe()["connections"] == 0
    assert len(server.events("disconnect ann client_close")) == 1
    assert not server.errors()
