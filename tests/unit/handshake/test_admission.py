"""Tests of admission: checks of a handshake, and the release of its reservation in each outcome."""

from __future__ import annotations

import asyncio
import contextvars
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketException
from fastapi.responses import JSONResponse

from fastapi_ws_stabilizer import (
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
    scheduling,
)
from fastapi_ws_stabilizer.auth.credentials import Credential, first_message
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.errors import (
    ConnectionLimitExceededError,
    DuplicateClientError,
    OriginNotAllowedError,
    ShutdownError,
    SocketClosed,
)
from fastapi_ws_stabilizer.handshake import admission as admission_module
from fastapi_ws_stabilizer.handshake import hello as hello_module
from fastapi_ws_stabilizer.hub.registry import CLOSING_PER_SLOT
from fastapi_ws_stabilizer.limits.connections import MIN_PENDING, ConnectionLimiter
from fastapi_ws_stabilizer.socket_context import HandshakeScope
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_websocket import FakeServer, eventually, settle, with_deadline
from tests.unit.conftest import EventRecorder

HELLO = json.dumps({"type": "hello", "v": 1, "n": 1})


class Call:
    """Handshake, with the task that serves it."""

    def __init__(self, harness: AdmissionApp, path: str, **scope: Any) -> None:
        self.server = FakeServer(path, **scope)
        websocket = self.server.websocket
        self.task = asyncio.ensure_future(harness.app(websocket.scope, self.server.receive, self.server.send))

    @property
    def status(self) -> int | None:
        """The HTTP status of the answer; 101 if the WebSocket was accepted, 403 if it was closed instead."""
        for message in self.server.taken:
            if message["type"] == "websocket.http.response.start":
                return int(message["status"])
            if message["type"] == "websocket.accept":
                return 101
            if message["type"] == "websocket.close":
                return 403
        return None

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the HTTP answer."""
        (start,) = (one for one in self.server.taken if one["type"] == "websocket.http.response.start")
        return {name.decode(): value.decode() for name, value in start["headers"]}

    async def answered(self) -> int:
        """Wait for the answer, and return its status."""
        await self.server.until(lambda: self.status is not None)
        assert self.status is not None
        return self.status

    async def closed(self) -> tuple[int, str]:
        """Wait for the close frame, and return it."""
        await self.server.until(lambda: self.server.close_frames)
        return self.server.close_frames[0]

    async def wait_done(self) -> None:
        """Wait until the task has finished."""
        await with_deadline(self.task)

    async def leaves(self) -> None:
        """Disconnect as the client, and wait for the task."""
        self.server.feed_disconnect()
        await self.wait_done()


class AdmissionApp:
    """App with a manager, and with an endpoint for each entry point."""

    def __init__(self, **options: Any) -> None:
        self.manager = manager = WebSocketConnectionManager(
            WebSocketConfig(**{"heartbeat_type": "off", "disconnect_grace": 0.1, **options})
        )
        self.heard = EventRecorder()
        manager.events.subscribe(self.heard)
        self.app = app = FastAPI(lifespan=manager.lifespan)
        self.identify: Callable[[], Any] = lambda: "ann"
        self.served: list[str] = []
        self.errors: list[Exception] = []
        self.catches_error = False
        self.calls: list[Call] = []
        manager.install(app)

        @app.exception_handler(HTTPException)
        async def answer(websocket: WebSocket, error: HTTPException) -> None:
            """Answer as newer Starlette does; the oldest supported version does not answer a handshake itself."""
            body = {"detail": error.detail}
            await websocket.send_denial_response(JSONResponse(body, error.status_code, dict(error.headers or {})))

        async def identity() -> Any:
            found = self.identify()
            return await found if asyncio.iscoroutine(found) else found

        async def first(credential: str = Depends(Credential(first_message()))) -> str:
            return credential

        @app.websocket("/path/{client_id}")
        async def by_path(ws: StableSocketDep) -> None:
            await self._serve(ws)

        @app.websocket("/identity")
        async def by_identity(ws: StableSocket = Depends(manager.socket_for(identity))) -> None:
            await self._serve(ws)

        @app.websocket("/first")
        async def by_first_message(ws: StableSocket = Depends(manager.socket_for(first))) -> None:
            await self._serve(ws)

        @app.websocket("/explicit/{client_id}")
        async def explicit(websocket: WebSocket, client_id: str) -> None:
            await websocket.accept()
            metadata = {"much": "x" * int(websocket.query_params.get("much", 0))}
            try:
                if token := websocket.query_params.get("token"):
                    await manager.validate_reconnect_token(token)
                ws = await manager.connect(client_id, websocket, metadata)
            except Exception as error:
                self.errors.append(error)
                if not self.catches_error:
                    raise
                await websocket.close(4000, "catches_error")
                return
            await self._serve(ws)

    async def _serve(self, ws: StableSocket) -> None:
        self.served.append(ws.client_id)
        async for _ in ws:
            pass

    def call(self, path: str = "/path/ann", **scope: Any) -> Call:
        """Start a handshake."""
        self.calls.append(Call(self, path, **scope))
        return self.calls[-1]

    async def connect_accepted(self, path: str = "/path/ann", **scope: Any) -> Call:
        """Start a handshake, and wait until its endpoint runs."""
        before = len(self.served)
        call = self.call(path, **scope)
        assert await call.answered() == 101
        await eventually(lambda: len(self.served) > before)
        return call

    def numbered(self, path: str = "/path/ann", **scope: Any) -> Call:
        """Start a handshake of a `stabilizer.v1.json` client."""
        return self.call(path, subprotocols=[SUBPROTOCOL], **scope)

    @property
    def admission(self) -> ConnectionLimiter:
        """The limiter that counts connections."""
        return self.manager._node.admission.limiter

    @property
    def counted(self) -> tuple[int, int]:
        """The numbers of open connections and of pending handshakes."""
        return len(self.admission), self.admission._pending

    @property
    def refusals(self) -> dict[str, int]:
        """The number of rejections by cause."""
        return dict(self.manager.counters.refusals)


@pytest.fixture
async def admission_app() -> AsyncIterator[Callable[..., AdmissionApp]]:
    """Yield a factory of apps, and check at the end that all reservations are released."""
    made: list[AdmissionApp] = []

    def make(**options: Any) -> AdmissionApp:
        made.append(AdmissionApp(**options))
        return made[-1]

    yield make
    for harness in made:
        await harness.manager.graceful_shutdown(timeout=0.5)
        for call in harness.calls:
            call.server.release()
        await with_deadline(asyncio.gather(*(call.task for call in harness.calls), return_exceptions=True))
        assert harness.counted == (0, 0)
        assert not harness.admission._from_address._counts
        assert not harness.admission._pending_from._counts
        assert not harness.admission._of_client._counts


Make = Callable[..., AdmissionApp]

BROWSER = [(b"host", b"testserver"), (b"origin", b"http://testserver")]

PATHS = ["/path/{}", "/explicit/{}"]


# ── max_connections ──


async def test_full_server_rejects_handshake_with_503(admission_app: Make) -> None:
    """A full server answers a handshake with 503, a body with the cause, and Retry-After."""
    harness = admission_app(max_connections=1)
    ann = await harness.connect_accepted("/path/ann")
    rejected = harness.call("/path/bob")
    assert await rejected.answered() == 503
    assert 2 <= int(rejected.headers["retry-after"]) <= 8
    await rejected.wait_done()
    body = next(one["body"] for one in rejected.server.taken if one["type"] == "websocket.http.response.body")
    assert json.loads(body) == {"detail": "the server is full"}
    assert harness.counted == (1, 0)
    assert harness.refusals == {"max_connections": 1}
    assert harness.served == ["ann"]
    await ann.leaves()
    await harness.connect_accepted("/path/bob")


async def test_full_server_rejects_browser_with_503(admission_app: Make) -> None:
    """A full server rejects with 503 also under `reject="close"`, because an accept would cost what it has to save."""
    harness = admission_app(max_connections=1, reject="close")
    await harness.connect_accepted("/path/ann")
    assert await harness.call("/path/bob", headers=BROWSER).answered() == 503


async def test_full_server_rejects_explicit_connect_with_4503(admission_app: Make) -> None:
    """`connect()` raises; an endpoint that does not catch it closes with 4503 and a hint, without a bug report."""
    harness = admission_app(max_connections=1)
    await harness.connect_accepted("/explicit/ann")
    rejected = harness.call("/explicit/bob")
    code, reason = await rejected.closed()
    assert code == 4503
    assert reason.startswith("the server is full; retry=")
    await rejected.wait_done()
    (error,) = harness.errors
    assert isinstance(error, ConnectionLimitExceededError)
    assert error.option == "max_connections"
    assert harness.refusals == {"max_connections": 1}
    assert [one.event for one in harness.heard.all if one.error is not None] == []


async def test_full_server_closes_v1_client_4503_after_hello(admission_app: Make) -> None:
    """A v1 client might have a session, so it is accepted; without one it is closed with 4503 and a hint."""
    harness = admission_app(max_connections=1)
    await harness.connect_accepted("/path/ann")
    rejected = harness.numbered("/path/bob")
    assert await rejected.answered() == 101
    rejected.server.feed_text(HELLO)
    code, reason = await rejected.closed()
    assert code == 4503
    assert reason.startswith("the server is full; retry=")
    await rejected.wait_done()
    assert harness.counted == (1, 0)
    assert len(harness.manager._node.sessions) == 0


async def test_full_server_bounds_v1_clients_without_hello(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pending v1 clients without a hello are bounded; more handshakes get 503 until the oldest may be closed."""
    harness = admission_app(max_connections=1, hello_timeout=60)
    await harness.connect_accepted("/path/ann")
    silent = [harness.numbered(f"/path/silent{number}") for number in range(MIN_PENDING)]
    assert [await one.answered() for one in silent] == [101] * MIN_PENDING
    assert await harness.numbered("/path/bob").answered() == 503
    monkeypatch.setattr(hello_module, "MIN_HELLO_WAIT", 0.0)
    assert await harness.numbered("/path/bob").answered() == 101
    await silent[0].closed()
    assert harness.counted == (1, MIN_PENDING)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{"max_connections": 1}, {"on_duplicate": "reject"}], ids=["full", "duplicate"])
async def test_noticed_loss_does_not_reject_reconnect(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], path: str
) -> None:
    """A connection whose loss waits for its turn, behind very many others, rejects no client that comes later."""
    harness = admission_app(**options)
    old = await harness.connect_accepted(path.format("ann"))
    monkeypatch.setattr(scheduling, "MAX_BLOCK", -1.0)  # one loss in each iteration of the event loop
    losses = harness.manager._node._resources.closings
    for _ in range(50):
        losses.run(int)
    old.server.feed_disconnect()
    await settle()
    assert len(losses) > 1
    await harness.connect_accepted(path.format("bob" if "max_connections" in options else "ann"))
    assert harness.refusals == {}
    assert harness.manager.counters.endings == {DisconnectReason.CLIENT_CLOSE: 1}


@pytest.mark.parametrize("path", PATHS)
async def test_full_server_accepts_client_replacing_itself(admission_app: Make, path: str) -> None:
    """A full server accepts a client that replaces its half-open connection, and still has one connection."""
    harness = admission_app(max_connections=1)
    old = await harness.connect_accepted(path.format("ann"))
    await harness.connect_accepted(path.format("ann"))
    assert (await old.closed())[0] == 4409
    await old.wait_done()
    assert harness.counted == (1, 0)


async def test_full_server_runs_identity_before_rejecting(admission_app: Make) -> None:
    """A full server runs the identity dependency before it decides."""
    harness = admission_app(max_connections=1)
    old = await harness.connect_accepted("/identity")
    await harness.connect_accepted("/identity")
    assert (await old.closed())[0] == 4409
    harness.identify = lambda: "bob"
    assert await harness.call("/identity").answered() == 503


async def test_full_server_accepts_resumed_session(admission_app: Make) -> None:
    """A full server accepts a v1 client that resumes its session, also with a limit of one connection per client."""
    harness = admission_app(max_connections=1, on_duplicate="allow", max_connections_per_client=1)
    old = harness.numbered()
    old.server.feed_text(HELLO)
    await eventually(lambda: old.server.data)
    token = old.server.json[0]["token"]
    new = harness.numbered()
    new.server.feed_text(json.dumps({"type": "hello", "v": 1, "n": 2, "resume": {"token": token, "seq": 0}}))
    await eventually(lambda: new.server.data)
    assert new.server.json[0]["resume"] == "full"
    await old.wait_done()
    assert harness.counted == (1, 0)


@pytest.mark.parametrize("with_token", [True, False])
async def test_full_server_with_reject_accepts_only_token(admission_app: Make, with_token: bool) -> None:
    """`on_duplicate="reject"` retains the old connection, except for a client with a reconnect token."""
    harness = admission_app(max_connections=1, on_duplicate="reject")
    old = await harness.connect_accepted()
    query = f"token={harness.manager.generate_reconnect_token('ann')}" if with_token else ""
    new = harness.call(query=query)
    assert await new.answered() == (101 if with_token else 503)
    if with_token:
        assert (await old.closed())[0] == 4409


async def test_full_server_with_reject_accepts_token_in_connect(admission_app: Make) -> None:
    """A client with a token that was validated before `connect()` replaces its old connection too."""
    harness = admission_app(max_connections=1, on_duplicate="reject")
    old = await harness.connect_accepted("/explicit/ann")
    assert (await harness.call("/explicit/ann").closed())[0] == 4503
    await harness.connect_accepted("/explicit/ann", query=f"token={harness.manager.generate_reconnect_token('ann')}")
    assert (await old.closed())[0] == 4409


async def test_handshake_over_closing_limit_is_rejected_with_503(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close frees its slot at once, but handshakes get 503 while too many disconnect hooks are running."""
    monkeypatch.setattr(admission_module, "MAX_CLOSING", 2)
    harness = admission_app(disconnect_grace=60)
    gate = asyncio.Event()

    @harness.manager.on_disconnect
    async def slow(ws: StableSocket, reason: Any) -> None:
        await gate.wait()

    for number in range(2):
        call = await harness.connect_accepted(f"/path/{number}")
        call.server.feed_disconnect()
        await eventually(lambda: harness.manager.get_connection_count() == 0)
    assert await harness.call("/path/next").answered() == 503
    assert harness.manager.counters.refusals == {"max_concurrent_cleanup": 1}
    gate.set()
    await eventually(lambda: not harness.manager._node.connections)
    await harness.connect_accepted("/path/next")


async def test_unresponsive_endpoints_do_not_block_handshakes(admission_app: Make) -> None:
    """When too many endpoints run on after their disconnect, the oldest are cancelled before their grace ends."""
    harness = admission_app(max_connections=1, disconnect_grace=60)
    cancelled: list[str] = []

    @harness.app.websocket("/deaf/{client_id}")
    async def deaf(ws: StableSocketDep) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(ws.client_id)
            raise

    calls = []
    for number in range(CLOSING_PER_SLOT + 1):
        calls.append(call := harness.call(f"/deaf/{number}"))
        assert await call.answered() == 101
        await eventually(lambda: harness.manager.get_connection_count() == 1)
        call.server.feed_disconnect()
        await eventually(lambda: harness.manager.get_connection_count() == 0)
    await harness.connect_accepted("/path/next")
    await eventually(lambda: cancelled == ["0", "1"])
    for call in calls:
        call.task.cancel()


async def test_pending_handshake_over_limit_closes_oldest_with_4408(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a full server the oldest client without a hello is closed with 4408 when another one needs its reservation."""
    monkeypatch.setattr(hello_module, "MIN_HELLO_WAIT", 0.0)
    harness = admission_app(max_connections=1, hello_timeout=60)
    old = await harness.connect_accepted("/path/ann")
    silent_calls = [harness.call("/first", subprotocols=[SUBPROTOCOL]) for _ in range(MIN_PENDING)]
    for one in silent_calls:
        assert await one.answered() == 101
    await harness.connect_accepted("/path/ann")  # its old connection is half-open
    assert (await old.closed())[0] == 4409
    assert (await silent_calls[0].closed())[0] == 4408
    assert not silent_calls[1].server.close_frames


@pytest.mark.parametrize("path", ["/path/late", "/identity", "/first"])
async def test_hello_after_lost_reservation_closes_with_4503(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A hello that arrives as its reservation goes to another client is closed with 4503."""
    monkeypatch.setattr(hello_module, "MIN_HELLO_WAIT", 0.0)
    harness = admission_app(max_connections=1, hello_timeout=60)
    harness.identify = lambda: "late"
    credentials: list[str | None] = []

    @harness.manager.on_auth
    async def look(ws: StableSocket, credential: str | None) -> None:
        credentials.append(credential)

    silent = [harness.numbered(path)]
    assert await silent[0].answered() == 101
    silent += [harness.numbered("/path/silent") for _ in range(MIN_PENDING)]
    for one in silent:
        assert await one.answered() == 101
    newcomer = harness.numbered("/path/new")  # takes the first reservation, in the loop iteration of its hello
    silent[0].server.feed_text(json.dumps({"type": "hello", "v": 1, "n": 1, "auth": "late"}))
    code, reason = await silent[0].closed()
    assert code == 4503
    assert "retry=" in reason
    assert credentials == []
    newcomer.server.feed_text(HELLO)
    await eventually(lambda: harness.served)
    assert harness.served == ["new"]
    assert harness.manager.get_connection_count() == harness.counted[0] == 1
    assert harness.refusals["max_connections"] == 1


async def test_hello_is_discarded_after_accept_except_credential(admission_app: Make) -> None:
    """After accept only the credential of the hello is retained, for dependencies that read it again."""
    harness = admission_app()
    call = harness.call("/first", subprotocols=[SUBPROTOCOL])
    assert await call.answered() == 101
    call.server.feed_text(json.dumps({"type": "hello", "v": 1, "n": 1, "auth": "a-secret"}))
    await eventually(lambda: harness.served)
    (handshake,) = [value for key, value in call.server.websocket.scope.items() if "stabilizer.handshake" in str(key)]
    assert handshake._hello is None
    assert handshake._credential == "a-secret"


@pytest.mark.parametrize("asked_before", [True, False])
@pytest.mark.parametrize("where", ["hello", "subprotocol", "none"])
async def test_repeated_first_message_returns_same_credential(
    admission_app: Make, asked_before: bool, where: str
) -> None:
    """`first_message()` returns the same credential when it is read again, and consumes no message of the client."""
    harness = admission_app(hello_timeout=0.2)
    found: list[str | None] = []
    one, two = Credential(first_message(), required=False), Credential(first_message(), required=False)

    async def user(websocket: WebSocket) -> str:
        if asked_before:
            found.append(await one(websocket))
        return "ann"

    @harness.app.websocket("/twice")
    async def endpoint(
        ws: StableSocket = Depends(harness.manager.socket_for(user)), again: str | None = Depends(two)
    ) -> None:
        found.append(again)
        found.append(await ws.receive())

    offered = [SUBPROTOCOL, "stabilizer.auth.YS1zZWNyZXQ"] if where == "subprotocol" else [SUBPROTOCOL]
    call = harness.call("/twice", subprotocols=offered)
    assert await call.answered() == 101
    call.server.feed_text(
        json.dumps({"type": "hello", "v": 1, "n": 1, **({"auth": "a-secret"} if where == "hello" else {})})
    )
    call.server.feed_text('{"type":"msg","seq":1,"data":"hi"}')
    await call.wait_done()
    credential = None if where == "none" else "a-secret"
    assert found == [credential] * (1 + asked_before) + ["hi"]
    assert await call.closed() == (4410, "")


async def test_admission_retains_no_headers(admission_app: Make) -> None:
    """Admission reads origin, host and address, but retains no headers."""
    harness = admission_app(trusted_proxies=["10.0.0.0/8"], max_connections_per_address=2)
    server = FakeServer(headers=[*BROWSER, (b"x-forwarded-for", b"198.51.100.7")])
    ws = await harness.manager.connect("ann", await server.accepted())
    assert not hasattr(ws.websocket, "_headers")


# ── limits per client and address, and rates ──


async def test_connection_over_client_limit_is_rejected_with_429(admission_app: Make) -> None:
    """With `on_duplicate="allow"` a connection above the client limit gets 429, and another client is accepted."""
    harness = admission_app(on_duplicate="allow", max_connections_per_client=2)
    await harness.connect_accepted("/path/ann")
    await harness.connect_accepted("/explicit/ann")
    rejected = harness.call("/path/ann")
    assert await rejected.answered() == 429
    assert "retry-after" in rejected.headers
    assert (await harness.call("/explicit/ann").closed())[0] == 4429
    await harness.connect_accepted("/path/bob")
    assert harness.refusals == {"max_connections_per_client": 2}


async def test_concurrent_handshakes_count_for_client_limit(admission_app: Make) -> None:
    """Handshakes that still run their hooks count for the client limit."""
    harness = admission_app(on_duplicate="allow", max_connections_per_client=2)
    gate = asyncio.Event()

    @harness.manager.on_handshake
    async def slow(ws: StableSocket) -> None:
        await gate.wait()

    calls = [harness.call() for _ in range(5)]
    await settle()
    gate.set()
    assert sorted([await call.answered() for call in calls]) == [101, 101, 429, 429, 429]


async def test_client_limit_is_ignored_with_replace_policy(admission_app: Make) -> None:
    """With `on_duplicate="replace"` concurrent handshakes of a client are not rejected by its client limit."""
    harness = admission_app(max_connections_per_client=1)
    gate = asyncio.Event()

    @harness.manager.on_handshake
    async def slow(ws: StableSocket) -> None:
        await gate.wait()

    calls = [harness.call() for _ in range(3)]
    await settle()
    gate.set()
    assert [await call.answered() for call in calls] == [101] * 3


async def test_connection_over_address_limit_is_rejected_with_429(admission_app: Make) -> None:
    """A connection above the address limit gets 429 with Retry-After, and a browser is closed with 4429 and a hint."""
    harness = admission_app(max_connections_per_address=2)
    await harness.connect_accepted("/path/ann")
    await harness.connect_accepted("/explicit/bob")
    rejected = harness.call("/path/cem")
    assert await rejected.answered() == 429
    assert 2 <= int(rejected.headers["retry-after"]) <= 8
    code, reason = await harness.call("/path/cem", headers=BROWSER).closed()
    assert code == 4429
    assert reason.startswith("too many connections; retry=")
    await harness.connect_accepted("/path/cem", client=("10.0.0.8", 1))


async def test_ipv6_network_counts_as_one_address(admission_app: Make) -> None:
    """The addresses of an IPv6 /64 network share one address limit."""
    harness = admission_app(max_connections_per_address=1)
    await harness.connect_accepted("/path/ann", client=("2001:db8::1", 1))
    assert await harness.call("/path/bob", client=("2001:db8::ffff:2", 1)).answered() == 429
    await harness.connect_accepted("/path/bob", client=("2001:db8:0:1::1", 1))


@pytest.mark.parametrize(
    ("trusted", "status"), [((), 429), (("10.0.0.7",), 101), (("10.0.0.8",), 429)], ids=["none", "peer", "other"]
)
async def test_forwarded_address_counts_only_from_trusted_proxy(
    admission_app: Make, trusted: tuple[str, ...], status: int
) -> None:
    """X-Forwarded-For counts from a trusted proxy only; a client that sends it itself does not change its address."""
    harness = admission_app(max_connections_per_address=1, trusted_proxies=trusted)
    await harness.connect_accepted("/path/ann", headers=[(b"x-forwarded-for", b"1.1.1.1")])
    assert await harness.call("/path/bob", headers=[(b"x-forwarded-for", b"2.2.2.2")]).answered() == status


async def test_handshake_over_rate_is_rejected_with_429(admission_app: Make) -> None:
    """Handshakes above the rate of one address get 429, and handshakes above the total rate get 503."""
    harness = admission_app(max_connect_rate_per_address=2, max_connect_rate=3)
    await harness.connect_accepted("/path/ann")
    await harness.connect_accepted("/path/bob")
    rejected = harness.call("/path/cem")
    assert await rejected.answered() == 429
    assert rejected.headers["retry-after"] == "1"
    await harness.connect_accepted("/path/cem", client=("10.0.0.8", 1))
    assert await harness.call("/path/dan", client=("10.0.0.9", 1)).answered() == 503
    assert harness.refusals == {"max_connect_rate_per_address": 1, "max_connect_rate": 1}


# ── origin ──


@pytest.mark.parametrize("reject", ["auto", "close", "http"])
async def test_foreign_origin_is_rejected_with_403(admission_app: Make, reject: str) -> None:
    """A foreign origin gets 403 before accept under each `reject` policy, and takes no slot."""
    harness = admission_app(reject=reject)
    assert await harness.call(headers=[(b"host", b"a.example"), (b"origin", b"https://evil.example")]).answered() == 403
    assert harness.counted == (0, 0)
    assert harness.served == []


async def test_foreign_origin_closes_explicit_connect_with_4403(admission_app: Make) -> None:
    """`connect()` raises for a foreign origin; an endpoint that does not catch the error closes with 4403."""
    harness = admission_app()
    call = harness.call("/explicit/ann", headers=[(b"host", b"a.example"), (b"origin", b"https://evil.example")])
    assert await call.closed() == (4403, "origin not allowed")
    assert isinstance(harness.errors[0], OriginNotAllowedError)
    assert harness.refusals == {"4403": 1}


@pytest.mark.parametrize(("trusted", "status"), [((), 403), (("10.0.0.7",), 101)], ids=["none", "peer"])
async def test_forwarded_host_counts_only_from_trusted_proxy(
    admission_app: Make, trusted: tuple[str, ...], status: int
) -> None:
    """X-Forwarded-Host counts as a host of the server from a trusted proxy only."""
    harness = admission_app(trusted_proxies=trusted)
    headers = [(b"host", b"inner:8000"), (b"x-forwarded-host", b"a.example"), (b"origin", b"https://a.example")]
    assert await harness.call(headers=headers).answered() == status


class Wire:
    """Transport that knows its peer."""

    def __init__(self, peer: Any) -> None:
        self._peer = peer

    def get_extra_info(self, name: str) -> Any:
        """Return the value that uvicorn asks for too."""
        return {"peername": self._peer}[name]

    def abort(self) -> None:
        """Abort, which has no effect here."""


FORWARDED = [
    (b"host", b"inner:8000"),
    (b"x-forwarded-host", b"a.example"),
    (b"x-forwarded-for", b"203.0.113.9"),
    (b"origin", b"https://a.example"),
]

REWRITTEN: dict[str, tuple[tuple[str, ...], Any, str, int, str]] = {
    # trusted proxies, peer of the transport, client that the server reports, status, address
    "proxy": (("127.0.0.1",), ("127.0.0.1", 4711), "203.0.113.9", 101, "203.0.113.9"),
    "proxy on unix socket": (("unix",), "", "203.0.113.9", 101, "203.0.113.9"),
    "client naming proxy": (("10.0.0.7",), ("198.51.100.1", 4711), "10.0.0.7", 403, "198.51.100.1"),
    "none trusted": ((), ("127.0.0.1", 4711), "203.0.113.9", 403, "203.0.113.9"),
}


@pytest.mark.parametrize("case", REWRITTEN)
async def test_address_rewritten_by_server_does_not_hide_proxy(admission_app: Make, case: str) -> None:
    """Trust depends on the peer of the transport instead of the rewritten client, except without `trusted_proxies`."""
    trusted, peer, client, status, address = REWRITTEN[case]
    harness = admission_app(trusted_proxies=trusted)
    call = harness.call(headers=FORWARDED, client=(client, 0))
    call.server.transport = Wire(peer)  # type: ignore[attr-defined]
    assert await call.answered() == status
    assert harness.manager._node.addresses.address_of(call.server.websocket) == address


async def test_origin_rejection_event_names_compared_hosts(admission_app: Make) -> None:
    """The event names the hosts that the origin is compared with, including the one that a trusted proxy forwards."""
    harness = admission_app(trusted_proxies=["10.0.0.7"])
    foreign = (b"origin", b"https://evil.example")
    assert await harness.call(headers=[*FORWARDED[:3], foreign]).answered() == 403
    assert await harness.call("/path/bob", headers=[*FORWARDED[:3], foreign], client=("10.0.0.8", 1)).answered() == 403
    recorded = [(one.fields["origin"], one.fields["host"]) for one in harness.heard.of("connection_refused")]
    assert recorded == [("https://evil.example", "inner:8000, a.example"), ("https://evil.example", "inner:8000")]


async def test_required_origin_rejects_missing_origin_with_403(admission_app: Make) -> None:
    """With `require_origin` a handshake without an origin gets 403."""
    harness = admission_app(require_origin=True)
    assert await harness.call().answered() == 403
    await harness.connect_accepted(headers=BROWSER)


# ── reservations are released ──

REFUSALS: dict[str, tuple[Exception, int, int]] = {
    "401": (HTTPException(401), 401, 4401),
    "4401": (WebSocketException(4401, "bad token"), 401, 4401),
    "1008": (WebSocketException(1008), 403, 1008),
    "bug": (ValueError("a bug"), 500, 4500),
}


@pytest.mark.parametrize("what", REFUSALS)
async def test_handshake_hook_rejection_releases_reservation(admission_app: Make, what: str) -> None:
    """A rejection by the handshake hook, or a bug in it, releases the reservation; a browser gets a close code."""
    harness = admission_app(max_connections=1)
    error, status, code = REFUSALS[what]
    rejects = True

    @harness.manager.on_handshake
    async def hook(ws: StableSocket) -> None:
        if rejects:
            raise error

    for _ in range(3):
        call = harness.call("/path/mallory")
        assert await call.answered() == status
        await call.wait_done()
        assert harness.counted == (0, 0)
    assert (await harness.call("/path/mallory", headers=BROWSER).closed())[0] == code
    rejects = False
    await harness.connect_accepted()


@pytest.mark.parametrize("what", ["401", "4401", "1008"])
async def test_identity_rejection_releases_reservation(admission_app: Make, what: str) -> None:
    """A rejection by the identity dependency releases the reservation."""
    harness = admission_app(max_connections=1)
    error, status, _ = REFUSALS[what]

    def refuse() -> None:
        raise error

    harness.identify = refuse
    call = harness.call("/identity")
    assert await call.answered() == status
    await call.wait_done()
    assert harness.counted == (0, 0)
    harness.identify = lambda: "ann"
    await harness.connect_accepted("/identity")


@pytest.mark.parametrize("what", ["raises", "not a client id"])
async def test_failing_identity_releases_reservation(admission_app: Make, what: str) -> None:
    """A bug in the identity dependency propagates to the server, and the reservation is released."""
    harness = admission_app(max_connections=1)

    def bug() -> Any:
        if what == "raises":
            raise ValueError("a bug")
        return object()

    harness.identify = bug
    call = harness.call("/identity")
    with pytest.raises(ValueError if what == "raises" else TypeError):
        await call.wait_done()
    assert harness.counted == (0, 0)


async def test_hello_timeout_releases_reservation(admission_app: Make) -> None:
    """A hello timeout closes with 4408 and releases the reservation."""
    harness = admission_app(max_connections=1, hello_timeout=0.02)
    for path in ("/path/ann", "/first"):
        call = harness.numbered(path)
        assert (await call.closed())[0] == 4408
        await call.wait_done()
        assert harness.counted == (0, 0)


@pytest.mark.parametrize("path", ["/path/ann", "/first"])
async def test_disconnect_before_hello_releases_reservation(admission_app: Make, path: str) -> None:
    """A disconnect before the hello releases the reservation."""
    harness = admission_app(max_connections=1)
    call = harness.numbered(path)
    await call.answered()
    assert harness.counted == (0, 1)
    await call.leaves()
    assert harness.counted == (0, 0)


async def test_disconnect_during_handshake_releases_reservation(admission_app: Make) -> None:
    """A WebSocket that fails during the handshake ends its task and releases the reservation."""
    harness = admission_app(max_connections=1)

    @harness.manager.on_handshake
    async def gone(ws: StableSocket) -> None:
        call.server.fail(OSError("gone"))

    call = harness.call()
    with pytest.raises(Exception):  # noqa: B017, PT011 (which one is Starlette's affair)
        await call.wait_done()
    assert harness.counted == (0, 0)


@pytest.mark.parametrize("where", ["hook", "identity", "hello"])
async def test_cancelled_handshake_releases_reservation(admission_app: Make, where: str) -> None:
    """A handshake that the server cancels releases its reservation."""
    harness = admission_app(max_connections=1)
    never = asyncio.Event()

    @harness.manager.on_handshake
    async def hook(ws: StableSocket) -> None:
        if where == "hook":
            await never.wait()

    async def identify() -> str:
        await never.wait()
        return "ann"

    harness.identify = identify
    call = {
        "hook": lambda: harness.call(),
        "identity": lambda: harness.call("/identity"),
        "hello": lambda: harness.numbered(),
    }[where]()
    await eventually(lambda: sum(harness.counted) == 1)
    await settle()
    call.task.cancel()
    await asyncio.wait([call.task])
    assert harness.counted == (0, 0)


async def test_failed_explicit_connect_releases_reservation(admission_app: Make) -> None:
    """`connect()` that fails in a connect hook, or as a duplicate, releases its reservation."""
    harness = admission_app(max_connections=5, on_duplicate="reject")

    @harness.manager.on_connect
    async def hook(ws: StableSocket) -> None:
        if ws.client_id == "mallory":
            raise HTTPException(403)

    call = harness.call("/explicit/mallory")
    assert (await call.closed())[0] == 4403
    await call.wait_done()
    assert isinstance(harness.errors.pop(), SocketClosed)
    await harness.connect_accepted("/explicit/ann")
    call = harness.call("/explicit/ann")
    assert (await call.closed())[0] == 4409
    await call.wait_done()
    assert isinstance(harness.errors.pop(), DuplicateClientError)
    assert harness.counted == (1, 0)


async def test_rejected_browser_releases_reservation_before_close(admission_app: Make) -> None:
    """The reservation of a rejected browser is released before its close frame, which may take long, is sent."""
    harness = admission_app(max_connections=1)

    def refuse() -> None:
        call.server.block()
        raise HTTPException(401)

    harness.identify = refuse
    call = harness.call("/identity", headers=BROWSER)
    await eventually(lambda: call.server.offered)
    assert harness.counted == (0, 0)


async def test_rejected_handshakes_leave_no_session_or_task(admission_app: Make) -> None:
    """1,000 rejected handshakes leave no session, no connection and no task."""
    harness = admission_app(max_connections=1)
    await harness.connect_accepted()
    tasks = len(asyncio.all_tasks())
    for _ in range(1000):
        call = Call(harness, "/path/mallory")
        await call.wait_done()
        assert call.status == 503
    assert len(harness.manager._node.sessions) == 0
    assert len(harness.manager._node.connections) == 1
    assert len(asyncio.all_tasks()) == tasks
    assert harness.refusals == {"max_connections": 1000}


# ── drain ──


@pytest.mark.parametrize("headers", [[], BROWSER], ids=["program", "browser"])
@pytest.mark.parametrize("reject", ["auto", "close"])
async def test_drain_rejects_new_handshakes_with_503(admission_app: Make, headers: list[Any], reject: str) -> None:
    """A drain rejects all new handshakes with 503 and Retry-After, under each `reject` policy."""
    harness = admission_app(reject=reject)
    await harness.connect_accepted("/path/ann")
    harness.manager._node.stop_accepting()
    for path in ("/path/bob", "/identity"):
        call = harness.call(path, headers=headers)
        assert await call.answered() == 503
        assert int(call.headers["retry-after"]) >= 1
    with pytest.raises(ShutdownError):
        harness.manager._node.admission.admit(harness.call("/nowhere").server.websocket)


@pytest.mark.parametrize("where", ["hook", "identity", "hello", "auth"])
@pytest.mark.parametrize("headers", [[], BROWSER], ids=["program", "browser"])
async def test_drain_rejects_pending_handshake(admission_app: Make, where: str, headers: list[Any]) -> None:
    """A drain cancels the code that a handshake waits for, rejects its client, and counts the rejection once."""
    harness = admission_app(hello_timeout=60)
    cancelled = asyncio.Event()
    entered = asyncio.Event()

    async def hang() -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def identify() -> str:
        await hang()
        return "ann"

    async def hook(ws: StableSocket) -> None:
        if where in ("hook", "auth"):
            await hang()

    harness.identify = identify
    (harness.manager.on_auth if where == "auth" else harness.manager.on_handshake)(hook)
    await harness.manager.start()
    call = {
        "hook": lambda: harness.call("/path/ann", headers=headers),
        "identity": lambda: harness.call("/identity", headers=headers),
        "hello": lambda: harness.numbered("/path/ann", headers=headers),
        "auth": lambda: harness.numbered("/path/ann", headers=headers),
    }[where]()
    if where == "auth":
        call.server.feed_text(HELLO)
    await (call.answered() if where == "hello" else with_deadline(entered.wait()))
    await with_deadline(harness.manager.drain(30))
    await call.wait_done()
    if where in ("hook", "identity"):
        assert call.status == 503
        assert int(call.headers["retry-after"]) >= 1
    else:
        code, reason = await call.closed()
        assert (code, reason.split("=")[0]) == (1012, "server shutdown; retry")
    assert where == "hello" or cancelled.is_set()
    assert harness.refusals == {"1012": 1}
    assert harness.served == []
    assert [one.event for one in harness.heard.all if one.error is not None] == []


async def test_drain_timeout_ends_uncancellable_handshake(admission_app: Make) -> None:
    """A drain waits for a handshake until its timeout, and the client is rejected when your code returns."""
    harness = admission_app()
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def identify() -> str:
        entered.set()
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue
        return "ann"

    harness.identify = identify
    await harness.manager.start()
    call = harness.call("/identity")
    await with_deadline(entered.wait())
    loop = asyncio.get_running_loop()
    since = loop.time()
    await with_deadline(harness.manager.drain(0.5))
    assert 0.4 <= loop.time() - since < 2
    go_on.set()
    assert await call.answered() == 503
    await call.wait_done()
    assert harness.served == []


async def test_handshake_hook_over_hello_timeout_rejects_with_500(admission_app: Make) -> None:
    """A handshake hook that exceeds `hello_timeout` is cancelled and reported, and its client gets 500."""
    harness = admission_app(hello_timeout=0.1)
    cancelled = asyncio.Event()

    @harness.manager.on_handshake
    async def hang(ws: StableSocket) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    call = harness.call()
    assert await call.answered() == 500
    await call.wait_done()
    await with_deadline(cancelled.wait())
    (event,) = [one for one in harness.heard.all if one.error is not None]
    assert event.event == "handshake_hook_failed"
    assert "hello_timeout" in str(event.error)


async def test_handshake_hook_sets_context_variables_for_endpoint(admission_app: Make) -> None:
    """A context variable that a handshake hook sets is visible in the endpoint."""
    harness = admission_app()
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="")
    seen: list[str] = []

    @harness.manager.on_handshake
    async def choose(ws: StableSocket) -> None:
        tenant.set("blue")

    @harness.app.websocket("/tenant")
    async def endpoint(ws: StableSocketDep) -> None:
        seen.append(tenant.get())

    await harness.call("/tenant").wait_done()
    assert seen == ["blue"]


@pytest.mark.parametrize("path", ["/path/ann", "/identity"])
async def test_disconnect_cancels_pending_handshake(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """When the transport reports a disconnect, a pending handshake is cancelled, without a rejection or an error."""
    monkeypatch.setattr(admission_module, "WATCH_INTERVAL", 0.01)
    harness = admission_app()
    entered, cancelled = asyncio.Event(), asyncio.Event()
    disconnected = False

    async def hang() -> str:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return "ann"

    @harness.manager.on_handshake
    async def hook(ws: StableSocket) -> None:
        await hang()

    harness.identify = hang
    monkeypatch.setattr(admission_module.ServerTransport, "closing", property(lambda _: disconnected))
    call = harness.call(path)
    await with_deadline(entered.wait())
    await asyncio.sleep(0.05)
    assert not cancelled.is_set()
    disconnected = True
    await with_deadline(cancelled.wait())
    await call.wait_done()
    assert harness.counted == (0, 0)
    assert harness.refusals == {}
    assert [one.event for one in harness.heard.all if one.error is not None] == []


class WatchedHandshakes:
    """Handshakes whose hooks wait, and whose clients leave when the test says so."""

    def __init__(self, harness: AdmissionApp, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(admission_module, "WATCH_INTERVAL", 0.01)
        monkeypatch.setattr(admission_module, "ServerTransport", self._transport)
        self._harness = harness
        self.waiting: set[str] = set()
        self.left: set[str] = set()
        self.checks: list[str] = []
        self.seconds = 0.0  # that each check takes
        self.on_abort: Callable[[], object] | None = None
        harness.manager.on_handshake(self._wait)

    async def _wait(self, ws: StableSocket) -> None:
        self.waiting.add(ws.client_id)
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting.remove(ws.client_id)

    def _transport(self, receive: Any, _: Any) -> Any:
        return self._Transport(self, receive.__self__.websocket.path_params["client_id"])

    class _Transport:
        def __init__(self, watched: WatchedHandshakes, client_id: str) -> None:
            self._watched = watched
            self._client_id = client_id

        @property
        def closing(self) -> bool:
            self._watched.checks.append(self._client_id)
            time.sleep(self._watched.seconds)
            return self._client_id in self._watched.left

        def abort(self) -> bool:
            if self._watched.on_abort is None:
                return False
            self._watched.on_abort()
            return True

    async def start(self, *client_ids: str) -> None:
        for client_id in client_ids:
            self._harness.call(f"/path/{client_id}")
        await eventually(lambda: self.waiting >= set(client_ids))


async def test_each_abandoned_handshake_is_cancelled(admission_app: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handshake whose client has left is cancelled within `WATCH_INTERVAL`, and no other one.

    One timer watches all of them. It stops after the last one.
    """
    harness = admission_app()
    watched = WatchedHandshakes(harness, monkeypatch)
    await watched.start("ann", "bob")
    await asyncio.sleep(0.03)
    await watched.start("cid")
    for client_id in ("bob", "cid", "ann"):
        watched.left.add(client_id)
        await eventually(lambda: not watched.waiting & watched.left)
        assert len(watched.waiting) == 3 - len(watched.left)
    await eventually(lambda: harness.manager._node.admission._timer is None)
    await watched.start("dan")
    watched.left.add("dan")
    await eventually(lambda: not watched.waiting)


async def test_very_many_handshakes_are_checked_in_parts(admission_app: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of very many handshakes is divided among iterations of the event loop, and reaches each of them."""
    harness = admission_app()
    watched = WatchedHandshakes(harness, monkeypatch)
    names = [f"c{number}" for number in range(10)]
    await watched.start(*names)
    watched.seconds = scheduling.MAX_BLOCK / 2
    await asyncio.sleep(0.1)  # until no check has begun before
    watched.checks.clear()
    by_iteration = []
    while len(watched.checks) < 30:
        before = len(watched.checks)
        await asyncio.sleep(0)
        by_iteration.append(len(watched.checks) - before)
        assert len(by_iteration) < 100_000
    assert max(by_iteration) <= 4
    assert set(Counter(watched.checks[:30]).values()) <= {2, 3, 4}
    watched.left.update(names)
    await eventually(lambda: not watched.waiting)


async def test_failing_check_does_not_stop_the_others(admission_app: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport of a server that raises does not end the watch over the other handshakes."""
    harness = admission_app()
    watched = WatchedHandshakes(harness, monkeypatch)
    await watched.start("ann", "bob")
    with monkeypatch.context() as patch:
        patch.setattr(watched._Transport, "closing", property(lambda _: 1 / 0))
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        await asyncio.sleep(0.05)
    watched.left.update({"ann", "bob"})
    await eventually(lambda: not watched.waiting)


@pytest.mark.parametrize("path", ["/path/bob", "/identity"])
async def test_rejection_after_shutdown_is_counted(admission_app: Make, path: str) -> None:
    """A manager that is shut down rejects as during a drain, with one count and one event."""
    harness = admission_app()
    await harness.manager.graceful_shutdown(timeout=0.5)
    call = harness.call(path, headers=BROWSER)
    assert await call.answered() == 503
    await call.wait_done()
    assert harness.refusals == {"1012": 1}
    assert len(harness.heard.of("connection_refused")) == 1


# ── errors of connect() ──


def revoked(harness: AdmissionApp) -> str:
    """Return the query of a token that is revoked between its validation and its use."""
    token = harness.manager.generate_reconnect_token("bob")
    validate = harness.manager.validate_reconnect_token

    async def validated(token: str) -> str:
        client_id = await validate(token)
        await harness.manager.revoke(client_id)
        return client_id

    harness.manager.validate_reconnect_token = validated  # type: ignore[method-assign]
    return f"token={token}"


REJECTED_CONNECTS: dict[str, tuple[dict[str, Any], int, str, Callable[[AdmissionApp], Any]]] = {
    "drain": ({}, 1012, r"server shutdown; retry=\d{4,5}", lambda harness: harness.manager.drain(0.1)),
    "shut down": ({}, 1012, r"server shutdown; retry=\d{4,5}", lambda harness: harness.manager.graceful_shutdown(0.1)),
    "full": (
        {"max_connections": 1},
        4503,
        r"the server is full; retry=\d+",
        lambda harness: harness.connect_accepted("/explicit/ann"),
    ),
    "duplicate": (
        {"on_duplicate": "reject"},
        4409,
        "already connected",
        lambda harness: harness.connect_accepted("/explicit/bob"),
    ),
    "revoked token": ({}, 4401, "invalid reconnect token", revoked),
    "memory": ({"max_memory_per_connection": 10_000}, 4503, "memory limit exceeded", lambda harness: "much=20000"),
}


@pytest.mark.parametrize("catches_error", [False, True], ids=["raised", "caught"])
@pytest.mark.parametrize("case", REJECTED_CONNECTS)
async def test_rejected_explicit_connect_closes_without_traceback(
    admission_app: Make, case: str, catches_error: bool
) -> None:
    """A rejection by `connect()` closes the connection, whether the endpoint catches the error or not."""
    options, code, reason, begin = REJECTED_CONNECTS[case]
    harness = admission_app(**options)
    harness.catches_error = catches_error
    query = begin(harness)
    query = await query if asyncio.iscoroutine(query) else query
    call = harness.call("/explicit/bob", query=query if isinstance(query, str) else "")
    closed = await call.closed()
    await call.wait_done()  # raises what the server would log
    if catches_error and case != "duplicate":  # `connect()` has closed a duplicate itself
        assert closed == (4000, "catches_error")
    else:
        assert closed[0] == code
        assert re.fullmatch(reason, closed[1])
    assert len(harness.errors) == 1
    assert [one.event for one in harness.heard.all if one.error is not None] == []
    expected = 1 if case in ("full", "duplicate") else 0
    assert harness.counted == (expected, 0) if "max_connections" in options else harness.counted == (0, 0)
    assert len(harness.manager._node.connections) == expected


# ── two managers ──


class TwoManagerApp:
    """App with a route that has sockets of two managers."""

    def __init__(self, make: Make, first: dict[str, Any], second: dict[str, Any]) -> None:
        self.first, self.second = make(**first), make(**second)
        self.asked: list[str] = []

        async def identity(credential: str | None = Depends(Credential(first_message(), required=False))) -> str:
            self.asked.append(str(credential))
            return "ann"

        @self.first.app.websocket("/both")
        async def both(
            ws: StableSocket = Depends(self.first.manager.socket_for(lambda: "ann")),
            other: StableSocket = Depends(self.second.manager.socket_for(identity)),
        ) -> None:
            raise AssertionError("unreachable")

        @self.first.app.websocket("/two")
        async def two_handshakes(
            _: None = Depends(self._handshake_dependency(self.first)),
            other: None = Depends(self._handshake_dependency(self.second)),
        ) -> None:
            raise AssertionError("unreachable")

    @staticmethod
    def _handshake_dependency(harness: AdmissionApp) -> Callable[..., AsyncIterator[None]]:
        async def dependency(websocket: WebSocket) -> AsyncIterator[None]:
            async with HandshakeScope(harness.manager._require_node(), websocket):
                yield

        return dependency


FOREIGN = [(b"host", b"testserver"), (b"origin", b"https://evil.example")]


async def test_second_manager_checks_accepted_handshake(admission_app: Make) -> None:
    """A client that one manager has accepted is checked by the second manager too."""
    apps = TwoManagerApp(admission_app, {"allowed_origins": ["*"]}, {})
    call = apps.first.call("/both", headers=FOREIGN)
    assert await call.closed() == (4403, "origin not allowed")
    await call.wait_done()
    assert apps.asked == []
    assert (apps.first.refusals, apps.second.refusals) == ({}, {"4403": 1})


async def test_handshake_rejected_by_one_manager_skips_other(admission_app: Make) -> None:
    """A handshake that one manager rejects gets one answer, and one manager counts it."""
    apps = TwoManagerApp(admission_app, {"allowed_origins": ["*"]}, {})
    call = apps.first.call("/two", headers=FOREIGN)
    assert await call.answered() == 403
    await call.wait_done()
    assert [message["type"] for message in call.server.taken] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert (apps.first.refusals, apps.second.refusals) == ({}, {"4403": 1})


async def test_abandoned_handshake_after_accept_is_quiet(admission_app: Make) -> None:
    """A client that leaves between the accept and the connection causes no second close, and no error.

    uvicorn raises an `OSError` from a send to a client that has left, and would log it as a bug of the application.
    """
    harness = admission_app()
    server: FakeServer | None = None

    async def dependency(websocket: WebSocket) -> AsyncIterator[None]:
        async with HandshakeScope(harness.manager._require_node(), websocket) as handshake:
            await handshake.accept()
            assert server is not None
            server.fail(ConnectionError("the client has left"))
            handshake.abandoned = True
            handshake.cancel()
            await asyncio.sleep(5.0)
            yield

    @harness.app.websocket("/accepted")
    async def accepted(_: None = Depends(dependency)) -> None:
        raise AssertionError("unreachable")

    call = harness.call("/accepted")
    server = call.server
    await call.wait_done()
    assert [message["type"] for message in call.server.offered] == ["websocket.accept"]


async def test_abandoned_handshake_answers_after_server_has_lost_it(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transport that is closing is aborted, and the answer waits until the server knows that it is lost.

    Until then uvicorn raises at an answer, and logs a bug of the application.
    """
    harness = admission_app()
    watched = WatchedHandshakes(harness, monkeypatch)
    call = harness.call("/path/ann")
    await eventually(lambda: watched.waiting)
    call.server.fail(AssertionError("the transport is not lost"))
    watched.on_abort = lambda: asyncio.get_running_loop().call_later(0.05, lose)

    def lose() -> None:
        call.server.fail(ConnectionError("the client has left"))
        call.server.feed_disconnect()

    watched.left.add("ann")
    with pytest.raises(ConnectionError):
        await call.wait_done()
    assert [message["type"] for message in call.server.offered] == ["websocket.close"]


async def test_server_that_reports_no_loss_delays_abandoned_handshake_for_a_second(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for the loss is bounded, and leaves no task behind."""
    monkeypatch.setattr(admission_module, "LOSS_TIMEOUT", 0.05)
    harness = admission_app()
    watched = WatchedHandshakes(harness, monkeypatch)
    watched.on_abort = lambda: None
    call = harness.call("/path/ann")
    await eventually(lambda: watched.waiting)
    watched.left.add("ann")
    await call.wait_done()
    await settle()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "ws-handshake-lost"]


async def test_abandoned_handshake_after_close_is_quiet(admission_app: Make) -> None:
    """A client that leaves after the server has closed its handshake causes no second close, and no error."""
    harness = admission_app()

    async def dependency(websocket: WebSocket) -> AsyncIterator[None]:
        async with HandshakeScope(harness.manager._require_node(), websocket) as handshake:
            await websocket.accept()
            await websocket.close(4503)
            handshake.abandoned = True
            handshake.cancel()
            await asyncio.sleep(5.0)
            yield

    @harness.app.websocket("/closing")
    async def closing(_: None = Depends(dependency)) -> None:
        raise AssertionError("unreachable")

    call = harness.call("/closing")
    await call.wait_done()
    assert [message["type"] for message in call.server.taken] == ["websocket.accept", "websocket.close"]


# ── after the hello ──

NUMBERED: dict[str, tuple[dict[str, Any], str, str, int, str, str]] = {
    "full": ({"max_connections": 1}, "/path/bob", HELLO, 4503, "max_connections", "bob"),
    "too many": (
        {"max_connections_per_client": 1, "on_duplicate": "allow"},
        "/path/ann",
        HELLO,
        4429,
        "max_connections_per_client",
        "ann",
    ),
    "duplicate": ({"on_duplicate": "reject"}, "/path/ann", HELLO, 4409, "4409", "ann"),
    "bad credential": ({}, "/path/mallory", HELLO, 4401, "4401", "mallory"),
    "nonsense": ({}, "/path/bob", "nonsense", 4400, "4400", ""),
    "no hello": ({"hello_timeout": 0.05}, "/path/bob", "", 4408, "4408", ""),
}


@pytest.mark.parametrize("what", NUMBERED)
async def test_rejection_after_hello_is_counted(admission_app: Make, what: str) -> None:
    """The rejection of a v1 client after its hello is counted and emits an event like any other."""
    options, path, said, code, kind, client_id = NUMBERED[what]
    harness = admission_app(**options)

    @harness.manager.on_auth
    async def authenticate(ws: StableSocket, _: str | None) -> None:
        if ws.client_id == "mallory":
            raise HTTPException(401)

    await harness.connect_accepted("/path/ann")
    call = harness.numbered(path)
    if said:
        call.server.feed_text(said)
    assert (await call.closed())[0] == code
    await call.wait_done()
    assert harness.refusals == {kind: 1}
    (event,) = harness.heard.of("connection_refused")
    assert (event.fields["address"], event.fields["code"]) == ("10.0.0.7", code)
    assert event.fields.get("client_id", "") == client_id
    assert event.fields.get("option", kind) == kind


async def test_rejected_explicit_connect_event_has_client_id(admission_app: Make) -> None:
    """The event of a rejected `connect()` has the client id."""
    harness = admission_app(max_connections=1)
    await harness.connect_accepted("/path/ann")
    await harness.call("/explicit/bob").closed()
    assert [one.fields["client_id"] for one in harness.heard.of("connection_refused")] == ["bob"]
