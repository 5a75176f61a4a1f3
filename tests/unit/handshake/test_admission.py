"""Tests of the door: what is asked of a handshake, and that a place is given back however the handshake ends."""

from __future__ import annotations

import asyncio
import contextvars
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketException
from fastapi.responses import JSONResponse

from fastapi_ws_stabilizer import StableSocket, StableSocketDep, WebSocketConfig, WebSocketConnectionManager
from fastapi_ws_stabilizer.auth.credentials import Credential, first_message
from fastapi_ws_stabilizer.connection.closing import CLOSING_PER_SLOT
from fastapi_ws_stabilizer.errors import (
    ConnectionLimitExceededError,
    DuplicateClientError,
    OriginNotAllowedError,
    ShutdownError,
    SocketClosed,
)
from fastapi_ws_stabilizer.handshake import admission as door_module
from fastapi_ws_stabilizer.handshake import hello as greeting_module
from fastapi_ws_stabilizer.limits.connections import MIN_PENDING, ConnectionLimiter
from fastapi_ws_stabilizer.socket_context import handshake_scope
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_websocket import FakeServer, eventually, settle, with_deadline
from tests.unit.conftest import EventRecorder

HELLO = json.dumps({"type": "hello", "v": 1, "n": 1})


class Call:
    """One handshake, and the task that serves it."""

    def __init__(self, house: AdmissionApp, path: str, **scope: Any) -> None:
        self.server = FakeServer(path, **scope)
        websocket = self.server.websocket
        self.task = asyncio.ensure_future(house.app(websocket.scope, self.server.receive, self.server.send))

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
        """Wait for the answer."""
        await self.server.until(lambda: self.status is not None)
        assert self.status is not None
        return self.status

    async def closed(self) -> tuple[int, str]:
        """Wait for the close frame."""
        await self.server.until(lambda: self.server.close_frames)
        return self.server.close_frames[0]

    async def over(self) -> None:
        """Wait until nothing more is done for it."""
        await with_deadline(self.task)

    async def leaves(self) -> None:
        """Let the client go, and wait."""
        self.server.feed_disconnect()
        await self.over()


class AdmissionApp:
    """An app behind a door, with an endpoint for each way in."""

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
            """As newer Starlette does by itself; the oldest that is supported does not answer a handshake."""
            body = {"detail": error.detail}
            await websocket.send_denial_response(JSONResponse(body, error.status_code, dict(error.headers or {})))

        async def who() -> Any:
            found = self.identify()
            return await found if asyncio.iscoroutine(found) else found

        async def first(credential: str = Depends(Credential(first_message()))) -> str:
            return credential

        @app.websocket("/path/{client_id}")
        async def by_path(ws: StableSocketDep) -> None:
            await self._serve(ws)

        @app.websocket("/who")
        async def by_identity(ws: StableSocket = Depends(manager.socket_for(who))) -> None:
            await self._serve(ws)

        @app.websocket("/first")
        async def by_first_message(ws: StableSocket = Depends(manager.socket_for(first))) -> None:
            await self._serve(ws)

        @app.websocket("/hand/{client_id}")
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
        """Let somebody dial."""
        self.calls.append(Call(self, path, **scope))
        return self.calls[-1]

    async def connect_accepted(self, path: str = "/path/ann", **scope: Any) -> Call:
        """Let somebody in."""
        before = len(self.served)
        call = self.call(path, **scope)
        assert await call.answered() == 101
        await eventually(lambda: len(self.served) > before)
        return call

    def numbered(self, path: str = "/path/ann", **scope: Any) -> Call:
        """Let a client of `stabilizer.v1.json` dial."""
        return self.call(path, subprotocols=[SUBPROTOCOL], **scope)

    @property
    def admission(self) -> ConnectionLimiter:
        """What counts."""
        return self.manager._node.admission.limiter

    @property
    def counted(self) -> tuple[int, int]:
        """How many are inside, and how many on their way."""
        return len(self.admission), self.admission._pending

    @property
    def refusals(self) -> dict[str, int]:
        """Why how many were turned away."""
        return dict(self.manager.counters.refusals)


@pytest.fixture
async def admission_app() -> AsyncIterator[Callable[..., AdmissionApp]]:
    """Make houses; at the end nobody is in them, and no count is off."""
    made: list[AdmissionApp] = []

    def make(**options: Any) -> AdmissionApp:
        made.append(AdmissionApp(**options))
        return made[-1]

    yield make
    for house in made:
        await house.manager.graceful_shutdown(timeout=0.5)
        for call in house.calls:
            call.server.release()
        await with_deadline(asyncio.gather(*(call.task for call in house.calls), return_exceptions=True))
        assert house.counted == (0, 0)
        assert not house.admission._from_address._counts
        assert not house.admission._pending_from._counts
        assert not house.admission._of_client._counts


Make = Callable[..., AdmissionApp]

BROWSER = [(b"host", b"testserver"), (b"origin", b"http://testserver")]

PATHS = ["/path/{}", "/hand/{}"]


# ── max_connections ──


async def test_full_server_rejects_handshake_with_503(admission_app: Make) -> None:
    """At a full server a handshake is answered with 503, a body that says why, and when to come back."""
    house = admission_app(max_connections=1)
    ann = await house.connect_accepted("/path/ann")
    refused = house.call("/path/bob")
    assert await refused.answered() == 503
    assert 2 <= int(refused.headers["retry-after"]) <= 8
    await refused.over()
    body = next(one["body"] for one in refused.server.taken if one["type"] == "websocket.http.response.body")
    assert json.loads(body) == {"detail": "the server is full"}
    assert house.counted == (1, 0)
    assert house.refusals == {"max_connections": 1}
    assert house.served == ["ann"]
    await ann.leaves()
    await house.connect_accepted("/path/bob")


async def test_full_server_rejects_browser_with_503(admission_app: Make) -> None:
    """To accept and close it would cost what is to be saved."""
    house = admission_app(max_connections=1, reject="close")
    await house.connect_accepted("/path/ann")
    assert await house.call("/path/bob", headers=BROWSER).answered() == 503


async def test_full_server_rejects_explicit_connect_with_4503(admission_app: Make) -> None:
    """`connect()` raises, and an endpoint that lets it escape closes 4503 with a hint, without a report of a bug."""
    house = admission_app(max_connections=1)
    await house.connect_accepted("/hand/ann")
    refused = house.call("/hand/bob")
    code, reason = await refused.closed()
    assert code == 4503
    assert reason.startswith("the server is full; retry=")
    await refused.over()
    (error,) = house.errors
    assert isinstance(error, ConnectionLimitExceededError)
    assert error.limit == "max_connections"
    assert house.refusals == {"max_connections": 1}
    assert [one.event for one in house.heard.all if one.error is not None] == []


async def test_full_server_closes_v1_client_4503_after_hello(admission_app: Make) -> None:
    """It might have had a session: it is accepted, and closed 4503 with a hint when it has none."""
    house = admission_app(max_connections=1)
    await house.connect_accepted("/path/ann")
    refused = house.numbered("/path/bob")
    assert await refused.answered() == 101
    refused.server.feed_text(HELLO)
    code, reason = await refused.closed()
    assert code == 4503
    assert reason.startswith("the server is full; retry=")
    await refused.over()
    assert house.counted == (1, 0)
    assert len(house.manager._node.sessions) == 0


async def test_full_server_bounds_v1_clients_without_hello(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who says nothing has a place in the lobby; beyond that there is 503 for everybody, until a moment has passed."""
    house = admission_app(max_connections=1, hello_timeout=60)
    await house.connect_accepted("/path/ann")
    silent = [house.numbered(f"/path/silent{number}") for number in range(MIN_PENDING)]
    assert [await one.answered() for one in silent] == [101] * MIN_PENDING
    assert await house.numbered("/path/bob").answered() == 503
    monkeypatch.setattr(greeting_module, "MIN_HELLO_WAIT", 0.0)
    assert await house.numbered("/path/bob").answered() == 101
    await silent[0].closed()
    assert house.counted == (1, MIN_PENDING)


@pytest.mark.parametrize("way", PATHS)
async def test_full_server_accepts_client_replacing_itself(admission_app: Make, way: str) -> None:
    """At a full server a client whose old connection is half-open is let in, and there is still one connection."""
    house = admission_app(max_connections=1)
    old = await house.connect_accepted(way.format("ann"))
    await house.connect_accepted(way.format("ann"))
    assert (await old.closed())[0] == 4409
    await old.over()
    assert house.counted == (1, 0)


async def test_full_server_runs_identity_before_rejecting(admission_app: Make) -> None:
    """At a full server it is asked who comes, before it is decided."""
    house = admission_app(max_connections=1)
    old = await house.connect_accepted("/who")
    await house.connect_accepted("/who")
    assert (await old.closed())[0] == 4409
    house.identify = lambda: "bob"
    assert await house.call("/who").answered() == 503


async def test_full_server_accepts_resumed_session(admission_app: Make) -> None:
    """At a full server a client of `stabilizer.v1.json` comes back to its session, whatever the policy is."""
    house = admission_app(max_connections=1, on_duplicate="allow", max_connections_per_client=1)
    old = house.numbered()
    old.server.feed_text(HELLO)
    await eventually(lambda: old.server.data)
    token = old.server.json[0]["token"]
    new = house.numbered()
    new.server.feed_text(json.dumps({"type": "hello", "v": 1, "n": 2, "resume": {"token": token, "seq": 0}}))
    await eventually(lambda: new.server.data)
    assert new.server.json[0]["resume"] == "full"
    await old.over()
    assert house.counted == (1, 0)


@pytest.mark.parametrize("with_token", [True, False])
async def test_full_server_with_reject_accepts_only_token(admission_app: Make, with_token: bool) -> None:
    """`on_duplicate="reject"` keeps the old connection, but for a client that proves to be the same one."""
    house = admission_app(max_connections=1, on_duplicate="reject")
    old = await house.connect_accepted()
    query = f"token={house.manager.generate_reconnect_token('ann')}" if with_token else ""
    new = house.call(query=query)
    assert await new.answered() == (101 if with_token else 503)
    if with_token:
        assert (await old.closed())[0] == 4409


async def test_full_server_with_reject_accepts_token_in_connect(admission_app: Make) -> None:
    """A client whose token was validated before `connect()` takes the place of its old connection, too."""
    house = admission_app(max_connections=1, on_duplicate="reject")
    old = await house.connect_accepted("/hand/ann")
    assert (await house.call("/hand/ann").closed())[0] == 4503
    await house.connect_accepted("/hand/ann", query=f"token={house.manager.generate_reconnect_token('ann')}")
    assert (await old.closed())[0] == 4409


async def test_handshake_over_closing_limit_is_rejected_with_503(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who leaves makes room at once, but not while hooks are slower than clients come and go; the log says so."""
    monkeypatch.setattr(door_module, "MAX_CLOSING", 2)
    house = admission_app(disconnect_grace=60)
    gate = asyncio.Event()

    @house.manager.on_disconnect
    async def slow(ws: StableSocket, reason: Any) -> None:
        await gate.wait()

    for number in range(2):
        call = await house.connect_accepted(f"/path/{number}")
        call.server.feed_disconnect()
        await eventually(lambda: house.manager.get_connection_count() == 0)
    assert await house.call("/path/next").answered() == 503
    assert house.manager.counters.refusals == {"max_concurrent_cleanup": 1}
    gate.set()
    await eventually(lambda: not house.manager._node.connections)
    await house.connect_accepted("/path/next")


async def test_unresponsive_endpoints_do_not_block_handshakes(admission_app: Make) -> None:
    """Where many have left whose endpoints do not notice, the grace of the one that left first is over."""
    house = admission_app(max_connections=1, disconnect_grace=60)
    cancelled: list[str] = []

    @house.app.websocket("/deaf/{client_id}")
    async def deaf(ws: StableSocketDep) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(ws.client_id)
            raise

    calls = []
    for number in range(CLOSING_PER_SLOT + 1):
        calls.append(call := house.call(f"/deaf/{number}"))
        assert await call.answered() == 101
        await eventually(lambda: house.manager.get_connection_count() == 1)
        call.server.feed_disconnect()
        await eventually(lambda: house.manager.get_connection_count() == 0)
    await house.connect_accepted("/path/next")
    await eventually(lambda: cancelled == ["0", "1"])
    for call in calls:
        call.task.cancel()


async def test_pending_handshake_over_limit_closes_oldest_with_4408(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a full server the lobby does not fill with clients that never say hello: the oldest of them goes."""
    monkeypatch.setattr(greeting_module, "MIN_HELLO_WAIT", 0.0)
    house = admission_app(max_connections=1, hello_timeout=60)
    old = await house.connect_accepted("/path/ann")
    silent_calls = [house.call("/first", subprotocols=[SUBPROTOCOL]) for _ in range(MIN_PENDING)]
    for one in silent_calls:
        assert await one.answered() == 101
    await house.connect_accepted("/path/ann")  # whose old connection is half-open
    assert (await old.closed())[0] == 4409
    assert (await silent_calls[0].closed())[0] == 4408
    assert not silent_calls[1].server.close_frames


@pytest.mark.parametrize("path", ["/path/late", "/who", "/first"])
async def test_hello_after_lost_reservation_closes_with_4503(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A hello that arrives as its reservation is given to another client does not get in past `max_connections`."""
    monkeypatch.setattr(greeting_module, "MIN_HELLO_WAIT", 0.0)
    house = admission_app(max_connections=1, hello_timeout=60)
    house.identify = lambda: "late"
    credentials: list[str | None] = []

    @house.manager.on_auth
    async def look(ws: StableSocket, credential: str | None) -> None:
        credentials.append(credential)

    silent = [house.numbered(path)]
    assert await silent[0].answered() == 101
    silent += [house.numbered("/path/silent") for _ in range(MIN_PENDING)]
    for one in silent:
        assert await one.answered() == 101
    newcomer = house.numbered("/path/new")  # takes the reservation of the first one, in the same turn as its hello
    silent[0].server.feed_text(json.dumps({"type": "hello", "v": 1, "n": 1, "auth": "late"}))
    code, reason = await silent[0].closed()
    assert code == 4503
    assert "retry=" in reason
    assert credentials == []
    newcomer.server.feed_text(HELLO)
    await eventually(lambda: house.served)
    assert house.served == ["new"]
    assert house.manager.get_connection_count() == house.counted[0] == 1
    assert house.refusals["max_connections"] == 1


async def test_hello_is_discarded_after_accept_except_credential(admission_app: Make) -> None:
    """Once its client is inside, only the credential of it is kept, for dependencies that ask again."""
    house = admission_app()
    call = house.call("/first", subprotocols=[SUBPROTOCOL])
    assert await call.answered() == 101
    call.server.feed_text(json.dumps({"type": "hello", "v": 1, "n": 1, "auth": "a-secret"}))
    await eventually(lambda: house.served)
    (handshake,) = [value for key, value in call.server.websocket.scope.items() if "stabilizer.handshake" in str(key)]
    assert handshake._hello is None
    assert handshake._credential == "a-secret"


@pytest.mark.parametrize("asked_before", [True, False])
@pytest.mark.parametrize("where", ["hello", "subprotocol", "none"])
async def test_repeated_first_message_returns_same_credential(
    admission_app: Make, asked_before: bool, where: str
) -> None:
    """Asked again when the connection is open, `first_message()` says the same, and takes no message of the client."""
    house = admission_app(hello_timeout=0.2)
    found: list[str | None] = []
    one, two = Credential(first_message(), required=False), Credential(first_message(), required=False)

    async def user(websocket: WebSocket) -> str:
        if asked_before:
            found.append(await one(websocket))
        return "ann"

    @house.app.websocket("/twice")
    async def endpoint(
        ws: StableSocket = Depends(house.manager.socket_for(user)), again: str | None = Depends(two)
    ) -> None:
        found.append(again)
        found.append(await ws.receive())

    offered = [SUBPROTOCOL, "stabilizer.auth.YS1zZWNyZXQ"] if where == "subprotocol" else [SUBPROTOCOL]
    call = house.call("/twice", subprotocols=offered)
    assert await call.answered() == 101
    call.server.feed_text(
        json.dumps({"type": "hello", "v": 1, "n": 1, **({"auth": "a-secret"} if where == "hello" else {})})
    )
    call.server.feed_text('{"type":"msg","seq":1,"data":"hi"}')
    await call.over()
    credential = None if where == "none" else "a-secret"
    assert found == [credential] * (1 + asked_before) + ["hi"]
    assert await call.closed() == (4410, "")


async def test_admission_retains_no_headers(admission_app: Make) -> None:
    """The door looks at origin, host and address, and leaves nothing of the headers in memory."""
    house = admission_app(trusted_proxies=["10.0.0.0/8"], max_connections_per_address=2)
    server = FakeServer(headers=[*BROWSER, (b"x-forwarded-for", b"198.51.100.7")])
    ws = await house.manager.connect("ann", await server.accepted())
    assert not hasattr(ws.websocket, "_headers")


# ── of one client, from one address, too often ──


async def test_connection_over_client_limit_is_rejected_with_429(admission_app: Make) -> None:
    """With `on_duplicate="allow"` the next one of the same client gets 429, and of another client is let in."""
    house = admission_app(on_duplicate="allow", max_connections_per_client=2)
    await house.connect_accepted("/path/ann")
    await house.connect_accepted("/hand/ann")
    refused = house.call("/path/ann")
    assert await refused.answered() == 429
    assert "retry-after" in refused.headers
    assert (await house.call("/hand/ann").closed())[0] == 4429
    await house.connect_accepted("/path/bob")
    assert house.refusals == {"max_connections_per_client": 2}


async def test_concurrent_handshakes_count_for_client_limit(admission_app: Make) -> None:
    """While hooks of the first ones still run they count already."""
    house = admission_app(on_duplicate="allow", max_connections_per_client=2)
    gate = asyncio.Event()

    @house.manager.on_handshake
    async def slow(ws: StableSocket) -> None:
        await gate.wait()

    calls = [house.call() for _ in range(5)]
    await settle()
    gate.set()
    assert sorted([await call.answered() for call in calls]) == [101, 101, 429, 429, 429]


async def test_client_limit_is_ignored_with_replace_policy(admission_app: Make) -> None:
    """With `on_duplicate="replace"` a client that dials thrice at once is not refused for being there already."""
    house = admission_app(max_connections_per_client=1)
    gate = asyncio.Event()

    @house.manager.on_handshake
    async def slow(ws: StableSocket) -> None:
        await gate.wait()

    calls = [house.call() for _ in range(3)]
    await settle()
    gate.set()
    assert [await call.answered() for call in calls] == [101] * 3


async def test_connection_over_address_limit_is_rejected_with_429(admission_app: Make) -> None:
    """The next one from there gets 429 and when to come back; a browser is closed 4429 with a hint."""
    house = admission_app(max_connections_per_address=2)
    await house.connect_accepted("/path/ann")
    await house.connect_accepted("/hand/bob")
    refused = house.call("/path/cem")
    assert await refused.answered() == 429
    assert 2 <= int(refused.headers["retry-after"]) <= 8
    code, reason = await house.call("/path/cem", headers=BROWSER).closed()
    assert code == 4429
    assert reason.startswith("too many connections; retry=")
    await house.connect_accepted("/path/cem", client=("10.0.0.8", 1))


async def test_ipv6_network_counts_as_one_address(admission_app: Make) -> None:
    """Whoever has 2^64 addresses has the places of one."""
    house = admission_app(max_connections_per_address=1)
    await house.connect_accepted("/path/ann", client=("2001:db8::1", 1))
    assert await house.call("/path/bob", client=("2001:db8::ffff:2", 1)).answered() == 429
    await house.connect_accepted("/path/bob", client=("2001:db8:0:1::1", 1))


@pytest.mark.parametrize(
    ("trusted", "status"), [((), 429), (("10.0.0.7",), 101), (("10.0.0.8",), 429)], ids=["none", "peer", "other"]
)
async def test_forwarded_address_counts_only_from_trusted_proxy(
    admission_app: Make, trusted: tuple[str, ...], status: int
) -> None:
    """X-Forwarded-For is believed from a trusted proxy; a client that writes it itself is still one client."""
    house = admission_app(max_connections_per_address=1, trusted_proxies=trusted)
    await house.connect_accepted("/path/ann", headers=[(b"x-forwarded-for", b"1.1.1.1")])
    assert await house.call("/path/bob", headers=[(b"x-forwarded-for", b"2.2.2.2")]).answered() == status


async def test_handshake_over_rate_is_rejected_with_429(admission_app: Make) -> None:
    """The handshakes from one address have a rate, and so have those of all."""
    house = admission_app(max_connect_rate_per_address=2, max_connect_rate=3)
    await house.connect_accepted("/path/ann")
    await house.connect_accepted("/path/bob")
    refused = house.call("/path/cem")
    assert await refused.answered() == 429
    assert refused.headers["retry-after"] == "1"
    await house.connect_accepted("/path/cem", client=("10.0.0.8", 1))
    assert await house.call("/path/dan", client=("10.0.0.9", 1)).answered() == 503
    assert house.refusals == {"max_connect_rate_per_address": 1, "max_connect_rate": 1}


# ── origin ──


@pytest.mark.parametrize("reject", ["auto", "close", "http"])
async def test_foreign_origin_is_rejected_with_403(admission_app: Make, reject: str) -> None:
    """It is refused before accept whatever `reject` says, and takes no place."""
    house = admission_app(reject=reject)
    assert await house.call(headers=[(b"host", b"a.example"), (b"origin", b"https://evil.example")]).answered() == 403
    assert house.counted == (0, 0)
    assert house.served == []


async def test_foreign_origin_closes_explicit_connect_with_4403(admission_app: Make) -> None:
    """`connect()` raises, and the endpoint that lets it escape closes with the code that says so."""
    house = admission_app()
    call = house.call("/hand/ann", headers=[(b"host", b"a.example"), (b"origin", b"https://evil.example")])
    assert await call.closed() == (4403, "origin not allowed")
    assert isinstance(house.errors[0], OriginNotAllowedError)
    assert house.refusals == {"4403": 1}


@pytest.mark.parametrize(("trusted", "status"), [((), 403), (("10.0.0.7",), 101)], ids=["none", "peer"])
async def test_forwarded_host_counts_only_from_trusted_proxy(
    admission_app: Make, trusted: tuple[str, ...], status: int
) -> None:
    """X-Forwarded-Host counts as our host only from a trusted proxy."""
    house = admission_app(trusted_proxies=trusted)
    headers = [(b"host", b"inner:8000"), (b"x-forwarded-host", b"a.example"), (b"origin", b"https://a.example")]
    assert await house.call(headers=headers).answered() == status


class Wire:
    """A transport that knows its other end."""

    def __init__(self, peer: Any) -> None:
        self._peer = peer

    def get_extra_info(self, name: str) -> Any:
        """What uvicorn asks it, too."""
        return {"peername": self._peer}[name]

    def abort(self) -> None:
        """Cut."""


FORWARDED = [
    (b"host", b"inner:8000"),
    (b"x-forwarded-host", b"a.example"),
    (b"x-forwarded-for", b"203.0.113.9"),
    (b"origin", b"https://a.example"),
]

REWRITTEN: dict[str, tuple[tuple[str, ...], Any, str, int, str]] = {
    # trusted, who is at the other end, whom the server has put there, status, address
    "proxy": (("127.0.0.1",), ("127.0.0.1", 4711), "203.0.113.9", 101, "203.0.113.9"),
    "proxy on unix socket": (("unix",), "", "203.0.113.9", 101, "203.0.113.9"),
    "client naming proxy": (("10.0.0.7",), ("198.51.100.1", 4711), "10.0.0.7", 403, "198.51.100.1"),
    "none trusted": ((), ("127.0.0.1", 4711), "203.0.113.9", 403, "203.0.113.9"),
}


@pytest.mark.parametrize("who", REWRITTEN)
async def test_address_rewritten_by_server_does_not_hide_proxy(admission_app: Make, who: str) -> None:
    """It has put somebody else in the place of the other end, and that one decides; without `trusted_proxies`, not."""
    trusted, peer, client, status, address = REWRITTEN[who]
    house = admission_app(trusted_proxies=trusted)
    call = house.call(headers=FORWARDED, client=(client, 0))
    call.server.transport = Wire(peer)  # type: ignore[attr-defined]
    assert await call.answered() == status
    assert house.manager._node.admission.address_of(call.server.websocket) == address


async def test_origin_rejection_event_names_compared_hosts(admission_app: Make) -> None:
    """The log names the hosts that are ours, those that a trusted proxy says too: one of them has to be the page's."""
    house = admission_app(trusted_proxies=["10.0.0.7"])
    foreign = (b"origin", b"https://evil.example")
    assert await house.call(headers=[*FORWARDED[:3], foreign]).answered() == 403
    assert await house.call("/path/bob", headers=[*FORWARDED[:3], foreign], client=("10.0.0.8", 1)).answered() == 403
    told = [(one.fields["origin"], one.fields["host"]) for one in house.heard.of("connection_refused")]
    assert told == [("https://evil.example", "inner:8000, a.example"), ("https://evil.example", "inner:8000")]


async def test_required_origin_rejects_missing_origin_with_403(admission_app: Make) -> None:
    """With `require_origin` a client that sends none gets 403."""
    house = admission_app(require_origin=True)
    assert await house.call().answered() == 403
    await house.connect_accepted(headers=BROWSER)


# ── everything is given back ──

REFUSALS: dict[str, tuple[Exception, int, int]] = {
    "401": (HTTPException(401), 401, 4401),
    "4401": (WebSocketException(4401, "bad token"), 401, 4401),
    "1008": (WebSocketException(1008), 403, 1008),
    "bug": (ValueError("a bug"), 500, 4500),
}


@pytest.mark.parametrize("what", REFUSALS)
async def test_handshake_hook_rejection_releases_reservation(admission_app: Make, what: str) -> None:
    """After a refusal of the hook, or a bug in it, there is room for the next; a browser reads why."""
    house = admission_app(max_connections=1)
    error, status, code = REFUSALS[what]
    rejector = True

    @house.manager.on_handshake
    async def hook(ws: StableSocket) -> None:
        if rejector:
            raise error

    for _ in range(3):
        call = house.call("/path/mallory")
        assert await call.answered() == status
        await call.over()
        assert house.counted == (0, 0)
    assert (await house.call("/path/mallory", headers=BROWSER).closed())[0] == code
    rejector = False
    await house.connect_accepted()


@pytest.mark.parametrize("what", ["401", "4401", "1008"])
async def test_identity_rejection_releases_reservation(admission_app: Make, what: str) -> None:
    """After a refusal of the identity dependency there is room for the next."""
    house = admission_app(max_connections=1)
    error, status, _ = REFUSALS[what]

    def refuse() -> None:
        raise error

    house.identify = refuse
    call = house.call("/who")
    assert await call.answered() == status
    await call.over()
    assert house.counted == (0, 0)
    house.identify = lambda: "ann"
    await house.connect_accepted("/who")


@pytest.mark.parametrize("what", ["raises", "not a client id"])
async def test_failing_identity_releases_reservation(admission_app: Make, what: str) -> None:
    """A bug leaves as it is, for the server to log, and there is room for the next."""
    house = admission_app(max_connections=1)

    def bug() -> Any:
        if what == "raises":
            raise ValueError("a bug")
        return object()

    house.identify = bug
    call = house.call("/who")
    with pytest.raises(ValueError if what == "raises" else TypeError):
        await call.over()
    assert house.counted == (0, 0)


async def test_hello_timeout_releases_reservation(admission_app: Make) -> None:
    """It is closed 4408, and there is room for the next."""
    house = admission_app(max_connections=1, hello_timeout=0.02)
    for path in ("/path/ann", "/first"):
        call = house.numbered(path)
        assert (await call.closed())[0] == 4408
        await call.over()
        assert house.counted == (0, 0)


@pytest.mark.parametrize("path", ["/path/ann", "/first"])
async def test_disconnect_before_hello_releases_reservation(admission_app: Make, path: str) -> None:
    """It is gone without a word, and there is room for the next."""
    house = admission_app(max_connections=1)
    call = house.numbered(path)
    await call.answered()
    assert house.counted == (0, 1)
    await call.leaves()
    assert house.counted == (0, 0)


async def test_disconnect_during_handshake_releases_reservation(admission_app: Make) -> None:
    """What the server says of a WebSocket that is gone ends its task, and there is room for the next."""
    house = admission_app(max_connections=1)

    @house.manager.on_handshake
    async def gone(ws: StableSocket) -> None:
        call.server.fail(OSError("gone"))

    call = house.call()
    with pytest.raises(Exception):  # noqa: B017, PT011 (which one is Starlette's affair)
        await call.over()
    assert house.counted == (0, 0)


@pytest.mark.parametrize("where", ["hook", "identity", "hello"])
async def test_cancelled_handshake_releases_reservation(admission_app: Make, where: str) -> None:
    """A server that gives a handshake up leaves no place taken."""
    house = admission_app(max_connections=1)
    never = asyncio.Event()

    @house.manager.on_handshake
    async def hook(ws: StableSocket) -> None:
        if where == "hook":
            await never.wait()

    async def identify() -> str:
        await never.wait()
        return "ann"

    house.identify = identify
    call = {
        "hook": lambda: house.call(),
        "identity": lambda: house.call("/who"),
        "hello": lambda: house.numbered(),
    }[where]()
    await eventually(lambda: sum(house.counted) == 1)
    await settle()
    call.task.cancel()
    await asyncio.wait([call.task])
    assert house.counted == (0, 0)


async def test_failed_explicit_connect_releases_reservation(admission_app: Make) -> None:
    """By hand: refused by a connect hook, or a duplicate, it is counted no more."""
    house = admission_app(max_connections=5, on_duplicate="reject")

    @house.manager.on_connect
    async def hook(ws: StableSocket) -> None:
        if ws.client_id == "mallory":
            raise HTTPException(403)

    call = house.call("/hand/mallory")
    assert (await call.closed())[0] == 4403
    await call.over()
    assert isinstance(house.errors.pop(), SocketClosed)
    await house.connect_accepted("/hand/ann")
    call = house.call("/hand/ann")
    assert (await call.closed())[0] == 4409
    await call.over()
    assert isinstance(house.errors.pop(), DuplicateClientError)
    assert house.counted == (1, 0)


async def test_rejected_browser_releases_reservation_before_close(admission_app: Make) -> None:
    """A goodbye may take its time; the place of who gets it is free."""
    house = admission_app(max_connections=1)

    def refuse() -> None:
        call.server.block()
        raise HTTPException(401)

    house.identify = refuse
    call = house.call("/who", headers=BROWSER)
    await eventually(lambda: call.server.offered)
    assert house.counted == (0, 0)


async def test_rejected_handshakes_leave_no_session_or_task(admission_app: Make) -> None:
    """Nothing is kept of ten thousand who found no room: no session, no connection, no task."""
    house = admission_app(max_connections=1)
    await house.connect_accepted()
    tasks = len(asyncio.all_tasks())
    for _ in range(1000):
        call = Call(house, "/path/mallory")
        await call.over()
        assert call.status == 503
    assert len(house.manager._node.sessions) == 0
    assert len(house.manager._node.connections) == 1
    assert len(asyncio.all_tasks()) == tasks
    assert house.refusals == {"max_connections": 1000}


# ── the drain ──


@pytest.mark.parametrize("headers", [[], BROWSER], ids=["program", "browser"])
@pytest.mark.parametrize("reject", ["auto", "close"])
async def test_drain_rejects_new_handshakes_with_503(admission_app: Make, headers: list[Any], reject: str) -> None:
    """Nobody is let in any more, by whatever way."""
    house = admission_app(reject=reject)
    await house.connect_accepted("/path/ann")
    house.manager._node.stop_accepting()
    for path in ("/path/bob", "/who"):
        call = house.call(path, headers=headers)
        assert await call.answered() == 503
        assert int(call.headers["retry-after"]) >= 1
    with pytest.raises(ShutdownError):
        house.manager._node.admission.admit(house.call("/nowhere").server.websocket)


@pytest.mark.parametrize("where", ["hook", "identity", "hello", "auth"])
@pytest.mark.parametrize("headers", [[], BROWSER], ids=["program", "browser"])
async def test_drain_rejects_pending_handshake(admission_app: Make, where: str, headers: list[Any]) -> None:
    """A drain cancels what a handshake waits for, refuses its client, counts it once, and is over soon."""
    house = admission_app(hello_timeout=60)
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

    house.identify = identify
    (house.manager.on_auth if where == "auth" else house.manager.on_handshake)(hook)
    await house.manager.start()
    call = {
        "hook": lambda: house.call("/path/ann", headers=headers),
        "identity": lambda: house.call("/who", headers=headers),
        "hello": lambda: house.numbered("/path/ann", headers=headers),
        "auth": lambda: house.numbered("/path/ann", headers=headers),
    }[where]()
    if where == "auth":
        call.server.feed_text(HELLO)
    await (call.answered() if where == "hello" else with_deadline(entered.wait()))
    await with_deadline(house.manager.drain(30))
    await call.over()
    if where in ("hook", "identity"):
        assert call.status == 503
        assert int(call.headers["retry-after"]) >= 1
    else:
        code, reason = await call.closed()
        assert (code, reason.split("=")[0]) == (1012, "server shutdown; retry")
    assert where == "hello" or cancelled.is_set()
    assert house.refusals == {"1012": 1}
    assert house.served == []
    assert [one.event for one in house.heard.all if one.error is not None] == []


async def test_drain_timeout_ends_uncancellable_handshake(admission_app: Make) -> None:
    """A drain waits for a handshake no longer than its time, and the client is refused when your code goes on."""
    house = admission_app()
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def identify() -> str:
        entered.set()
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue
        return "ann"

    house.identify = identify
    await house.manager.start()
    call = house.call("/who")
    await with_deadline(entered.wait())
    loop = asyncio.get_running_loop()
    since = loop.time()
    await with_deadline(house.manager.drain(0.5))
    assert 0.4 <= loop.time() - since < 2
    go_on.set()
    assert await call.answered() == 503
    await call.over()
    assert house.served == []


async def test_handshake_hook_over_hello_timeout_rejects_with_500(admission_app: Make) -> None:
    """A handshake hook that takes longer than `hello_timeout` is cancelled and reported, and its client gets 500."""
    house = admission_app(hello_timeout=0.1)
    cancelled = asyncio.Event()

    @house.manager.on_handshake
    async def hang(ws: StableSocket) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    call = house.call()
    assert await call.answered() == 500
    await call.over()
    await with_deadline(cancelled.wait())
    (report,) = [one for one in house.heard.all if one.error is not None]
    assert report.event == "handshake_hook_failed"
    assert "hello_timeout" in str(report.error)


async def test_handshake_hook_sets_context_variables_for_endpoint(admission_app: Make) -> None:
    """What a handshake hook sets in a context variable is there in the endpoint."""
    house = admission_app()
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="")
    seen: list[str] = []

    @house.manager.on_handshake
    async def choose(ws: StableSocket) -> None:
        tenant.set("blue")

    @house.app.websocket("/tenant")
    async def endpoint(ws: StableSocketDep) -> None:
        seen.append(tenant.get())

    await house.call("/tenant").over()
    assert seen == ["blue"]


@pytest.mark.parametrize("way", ["/path/ann", "/who"])
async def test_disconnect_cancels_pending_handshake(
    admission_app: Make, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Where the server shows that its client has gone, what a handshake waits for is cancelled, in silence."""
    monkeypatch.setattr(door_module, "WATCH_INTERVAL", 0.01)
    house = admission_app()
    entered, cancelled = asyncio.Event(), asyncio.Event()
    gone = False

    async def hang() -> str:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return "ann"

    @house.manager.on_handshake
    async def hook(ws: StableSocket) -> None:
        await hang()

    house.identify = hang
    monkeypatch.setattr(door_module.ServerTransport, "closing", property(lambda _: gone))
    call = house.call(way)
    await with_deadline(entered.wait())
    await asyncio.sleep(0.05)
    assert not cancelled.is_set()
    gone = True
    await with_deadline(cancelled.wait())
    await call.over()
    assert house.counted == (0, 0)
    assert house.refusals == {}
    assert [one.event for one in house.heard.all if one.error is not None] == []


@pytest.mark.parametrize("path", ["/path/bob", "/who"])
async def test_rejection_after_shutdown_is_counted(admission_app: Make, path: str) -> None:
    """A manager that is shut down refuses as it does while it drains, and tells so once."""
    house = admission_app()
    await house.manager.graceful_shutdown(timeout=0.5)
    call = house.call(path, headers=BROWSER)
    assert await call.answered() == 503
    await call.over()
    assert house.refusals == {"1012": 1}
    assert len(house.heard.of("connection_refused")) == 1


# ── what connect() raises ──


def revoked(house: AdmissionApp) -> str:
    """A token that is validated, and revoked before it is used."""
    token = house.manager.generate_reconnect_token("bob")
    validate = house.manager.validate_reconnect_token

    async def validated(token: str) -> str:
        client_id = await validate(token)
        await house.manager.revoke(client_id)
        return client_id

    house.manager.validate_reconnect_token = validated  # type: ignore[method-assign]
    return f"token={token}"


REJECTED_CONNECTS: dict[str, tuple[dict[str, Any], int, str, Callable[[AdmissionApp], Any]]] = {
    "drain": ({}, 1012, r"server shutdown; retry=\d{4,5}", lambda house: house.manager.drain(0.1)),
    "shut down": ({}, 1012, r"server shutdown; retry=\d{4,5}", lambda house: house.manager.graceful_shutdown(0.1)),
    "full": (
        {"max_connections": 1},
        4503,
        r"the server is full; retry=\d+",
        lambda house: house.connect_accepted("/hand/ann"),
    ),
    "duplicate": (
        {"on_duplicate": "reject"},
        4409,
        "already connected",
        lambda house: house.connect_accepted("/hand/bob"),
    ),
    "revoked token": ({}, 4401, "invalid reconnect token", revoked),
    "memory": ({"max_memory_per_connection": 10_000}, 4503, "memory limit exceeded", lambda house: "much=20000"),
}


@pytest.mark.parametrize("catches_error", [False, True], ids=["raised", "caught"])
@pytest.mark.parametrize("case", REJECTED_CONNECTS)
async def test_rejected_explicit_connect_closes_without_traceback(
    admission_app: Make, case: str, catches_error: bool
) -> None:
    """What `connect()` refuses a client with closes it, whether the endpoint lets it escape or closes by itself."""
    options, code, reason, begin = REJECTED_CONNECTS[case]
    house = admission_app(**options)
    house.catches_error = catches_error
    query = begin(house)
    query = await query if asyncio.iscoroutine(query) else query
    call = house.call("/hand/bob", query=query if isinstance(query, str) else "")
    closed = await call.closed()
    await call.over()  # which raises what the server would log
    if catches_error and case != "duplicate":  # that connection was open already
        assert closed == (4000, "catches_error")
    else:
        assert closed[0] == code
        assert re.fullmatch(reason, closed[1])
    assert len(house.errors) == 1
    assert [one.event for one in house.heard.all if one.error is not None] == []
    expected = 1 if case in ("full", "duplicate") else 0
    assert house.counted == (expected, 0) if "max_connections" in options else house.counted == (0, 0)
    assert len(house.manager._node.connections) == expected


# ── two managers ──


class TwoManagerApp:
    """One route with sockets of two managers."""

    def __init__(self, make: Make, first: dict[str, Any], second: dict[str, Any]) -> None:
        self.first, self.second = make(**first), make(**second)
        self.asked: list[str] = []

        async def who(credential: str | None = Depends(Credential(first_message(), required=False))) -> str:
            self.asked.append(str(credential))
            return "ann"

        @self.first.app.websocket("/both")
        async def both(
            ws: StableSocket = Depends(self.first.manager.socket_for(lambda: "ann")),
            other: StableSocket = Depends(self.second.manager.socket_for(who)),
        ) -> None:
            raise AssertionError("nobody comes so far")

        @self.first.app.websocket("/knocks")
        async def two_handshakes(
            _: None = Depends(self._handshake_dependency(self.first)),
            other: None = Depends(self._handshake_dependency(self.second)),
        ) -> None:
            raise AssertionError("nobody comes so far")

    @staticmethod
    def _handshake_dependency(house: AdmissionApp) -> Callable[..., AsyncIterator[None]]:
        async def knocked(websocket: WebSocket) -> AsyncIterator[None]:
            async with handshake_scope(house.manager._require_node(), websocket):
                yield

        return knocked


FOREIGN = [(b"host", b"testserver"), (b"origin", b"https://evil.example")]


async def test_second_manager_checks_accepted_handshake(admission_app: Make) -> None:
    """A client that one manager has let in is asked at the door of the other one too."""
    houses = TwoManagerApp(admission_app, {"allowed_origins": ["*"]}, {})
    call = houses.first.call("/both", headers=FOREIGN)
    assert await call.closed() == (4403, "origin not allowed")
    await call.over()
    assert houses.asked == []
    assert (houses.first.refusals, houses.second.refusals) == ({}, {"4403": 1})


async def test_handshake_rejected_by_one_manager_skips_other(admission_app: Make) -> None:
    """It hears one answer, and one manager counts it."""
    houses = TwoManagerApp(admission_app, {"allowed_origins": ["*"]}, {})
    call = houses.first.call("/knocks", headers=FOREIGN)
    assert await call.answered() == 403
    await call.over()
    assert [message["type"] for message in call.server.taken] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert (houses.first.refusals, houses.second.refusals) == ({}, {"4403": 1})


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
    """A client of `stabilizer.v1.json` that is turned away is counted and told of as every other one is."""
    options, path, said, code, kind, client_id = NUMBERED[what]
    house = admission_app(**options)

    @house.manager.on_auth
    async def authenticate(ws: StableSocket, _: str | None) -> None:
        if ws.client_id == "mallory":
            raise HTTPException(401)

    await house.connect_accepted("/path/ann")
    call = house.numbered(path)
    if said:
        call.server.feed_text(said)
    assert (await call.closed())[0] == code
    await call.over()
    assert house.refusals == {kind: 1}
    (report,) = house.heard.of("connection_refused")
    assert (report.fields["address"], report.fields["code"]) == ("10.0.0.7", code)
    assert report.fields.get("client_id", "") == client_id
    assert report.fields.get("option", kind) == kind


async def test_rejected_explicit_connect_event_has_client_id(admission_app: Make) -> None:
    """`connect()` knows the client id."""
    house = admission_app(max_connections=1)
    await house.connect_accepted("/path/ann")
    await house.call("/hand/bob").closed()
    assert [one.fields["client_id"] for one in house.heard.of("connection_refused")] == ["bob"]
