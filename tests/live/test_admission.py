"""Admission on real servers: accepted and rejected handshakes, and their answers."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response
from websockets.typing import Origin, Subprotocol

from fastapi_ws_stabilizer.connection.server_transport import CLOSE_HANDSHAKE_TIMEOUT
from fastapi_ws_stabilizer.handshake.hello import MIN_HELLO_WAIT
from fastapi_ws_stabilizer.limits.connections import MIN_PENDING
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.plain_client import received_close
from tests.support.process import UVICORN_REJECTION
from tests.support.raw import RawClient
from tests.support.server import UVICORN, LiveServer, until
from tests.support.wire_client import WireClient, request

SHOWS_TRANSPORT = ("uvicorn-sansio", "uvicorn-stable")
"""Servers on which the library can abort a connection."""

KINDS = ("uvicorn-sansio", "uvicorn-stable", "hypercorn", "granian")

GRANIAN_FLOW_ERROR = "RuntimeError: ASGI flow error: Connection already upgraded"
"""Error that granian logs with a traceback when a client that gets an HTTP status has disconnected."""

SETS: dict[str, dict[str, Any]] = {
    "auto": {},
    "http": {"reject": "http"},
    "close": {"reject": "close"},
    "listed": {
        "allowed_origins": ["https://app.example.com", "https://*.example.org", r"^https://pr-\d+\.example\.net$"]
    },
    "all-origins": {"allowed_origins": ["*"]},
    "origin": {"require_origin": True},
    "two": {"max_connections_per_address": 2},
    "two-unanswered": {"max_connections_per_address": 2},
    "two-proxied": {"max_connections_per_address": 2, "trusted_proxies": ["127.0.0.1"]},
    "two-of-client": {"max_connections_per_client": 2, "on_duplicate": "allow"},
    "rate": {"max_connect_rate": 0.01},
    "rate-address": {"max_connect_rate_per_address": 0.01},
    "max-one": {"max_connections": 1},
    "full": {"max_connections": 1},
    "full-adopt": {"max_connections": 1},
    "half-open-path": {"max_connections": 1},
    "half-open-identity": {"max_connections": 1},
    "half-open-adopt": {"max_connections": 1},
    "half-open-session": {"max_connections": 1},
    "silent": {"max_connections": 1, "hello_timeout": 3},
    "disconnected": {"max_connections": 1},
    "draining": {"max_connections": 5},
}


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """One server of each kind for all tests of this module. uvicorn does not read X-Forwarded-For itself."""
    args = ("--no-proxy-headers",) if request.param.startswith("uvicorn") else ()
    with LiveServer(
        request.param, app="tests.live.limits_app:app", args=args, env={"TEST_LIMITS": json.dumps(SETS)}
    ) as server:
        yield server


@pytest.fixture
def server(shared: LiveServer) -> Iterator[LiveServer]:
    """That server, which must log no crash."""
    before = len(crashes(shared))
    yield shared
    assert crashes(shared)[before:] == [], shared.log[-6000:]


def crashes(server: LiveServer) -> list[str]:
    """Return the errors in the log except those of the server itself."""
    is_other = server.kind != "uvicorn-stable"
    found = [line for line in server.errors() if not (is_other and UVICORN_REJECTION in line)]
    for _ in range(server.log.count(GRANIAN_FLOW_ERROR)):
        for start in ("[ERROR] Application callable raised an exception", "Traceback"):
            found.remove(next(line for line in found if line.startswith(start)))
    return found


def page(server: LiveServer) -> Origin:
    """Return the origin of a page that the server itself serves."""
    return Origin(f"http://127.0.0.1:{server.port}")


async def rejected(server: LiveServer, path: str, **options: Any) -> Response:
    """Connect, and return the HTTP response that rejects the handshake."""
    with pytest.raises(InvalidStatus) as status:
        async with connect(server.url(path), **options):
            pass
    return status.value.response


async def closed(server: LiveServer, path: str, *first: str, **options: Any) -> tuple[int, str]:
    """Connect, send messages, and return the code and reason of the server's close frame."""
    async with connect(server.url(path), **options) as client:
        for message in first:
            await client.send(message)
        return await received_close(client)


async def echoes(client: ClientConnection) -> bool:
    """Return whether the endpoint echoes to this client."""
    await client.send("hi")
    return await asyncio.wait_for(client.recv(), 5) == "hi"


def served(server: LiveServer) -> list[str]:
    """Return the clients for which an endpoint ran, one event each."""
    return [event for event in server.get("/events") if event.startswith("served ")]


def counts(server: LiveServer, options: str) -> dict[str, Any]:
    """Return the connection and reservation counts of one manager."""
    found: dict[str, Any] = server.get(f"/{options}/counts")
    return found


async def until_empty(server: LiveServer, options: str) -> None:
    """Wait until a manager has no connections and no reservations."""
    await until(lambda: all(counts(server, options)[name] == 0 for name in ("established", "pending", "unfinished")))


def hello(n: int = 1, token: str | None = None) -> str:
    """Return the first frame of a `stabilizer.v1.json` client."""
    resume = {} if token is None else {"resume": {"token": token, "seq": 0}}
    return json.dumps({"type": "hello", "v": 1, "n": n, **resume})


V1 = [Subprotocol(SUBPROTOCOL)]

# ── origins ──

FOREIGN = {
    "another site": "https://evil.example",
    "another port": "http://127.0.0.1:1",
    "suffix of the own host": "http://evil127.0.0.1",
    "opaque origin": "null",
    "nonsense": "evil",
}


@pytest.mark.parametrize("path", ["path/mallory", "identity?token=good-mallory"])
@pytest.mark.parametrize("options", ["auto", "close", "http"])
async def test_foreign_origin_gets_403_before_accept(server: LiveServer, options: str, path: str) -> None:
    """A page of another site is rejected before accept for each value of `reject`, and no endpoint runs."""
    for origin in FOREIGN.values():
        answer = await rejected(server, f"/{options}/{path}", origin=Origin(origin))
        assert answer.status_code == 403
        assert json.loads(answer.body or b"") == {"detail": "origin not allowed"}
    assert "served mallory" not in served(server)
    await until_empty(server, options)


async def test_connect_closes_foreign_origin_with_4403(server: LiveServer) -> None:
    """`connect()` closes a page of another site with 4403, because the application has accepted it already."""
    ended = await closed(server, "/auto/adopt/mallory", origin=Origin("https://evil.example"))
    assert ended == (4403, "origin not allowed")
    assert "served mallory" not in served(server)


async def test_same_origin_and_non_browser_clients_are_accepted(server: LiveServer) -> None:
    """The same host and port are accepted in any spelling, and so are clients without an Origin header."""
    for origin in (page(server), page(server).upper(), f"https://127.0.0.1:{server.port}", None):
        async with connect(server.url("/auto/path/ann"), origin=None if origin is None else Origin(origin)) as client:
            assert await echoes(client)


async def test_default_port_of_origin_is_optional(server: LiveServer) -> None:
    """An origin of `http://host` has port 80, with or without the number in the header."""
    for host, origin, status in [
        ("a.example", "http://a.example:80", 101),
        ("A.Example:80", "http://a.example", 101),
        ("a.example:443", "https://a.example", 101),
        ("a.example", "http://a.example:8080", 403),
    ]:
        with WireClient(server.port) as client:
            answer = await asyncio.to_thread(client.upgrade, "/auto/path", {"Host": host, "Origin": origin})
            assert answer.status == status


async def test_listed_origins_are_accepted(server: LiveServer) -> None:
    """Exact origins, wildcard hosts and regular expressions match whole origins, and no similar ones."""
    for origin in ("https://app.example.com", "https://a.b.example.org", "https://pr-17.example.net"):
        async with connect(server.url("/listed/path/ann"), origin=Origin(origin)) as client:
            assert await echoes(client)
    for origin in (
        "http://app.example.com",
        "https://app.example.com.evil.example",
        "https://example.org",
        "https://evilexample.org",
        "https://pr-17.example.net.evil.example",
    ):
        assert (await rejected(server, "/listed/path/mallory", origin=Origin(origin))).status_code == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "file://", "https://github.com/gilmaimon/TinyWebsockets", "nonsense"]
)
async def test_asterisk_accepts_any_origin(server: LiveServer, origin: str) -> None:
    """`"*"` accepts every client, whatever its Origin header says."""
    async with connect(server.url("/all-origins/path/ann"), origin=Origin(origin)) as client:
        assert await echoes(client)


async def test_require_origin_rejects_clients_without_origin(server: LiveServer) -> None:
    """With `require_origin` a client without an Origin header gets 403."""
    assert (await rejected(server, "/origin/path/mallory")).status_code == 403
    async with connect(server.url("/origin/path/ann"), origin=page(server)) as client:
        assert await echoes(client)


# ── invalid tokens ──


@pytest.mark.parametrize("token", ["bad", None])
async def test_rejected_browser_reads_4401_and_reason(server: LiveServer, token: str | None) -> None:
    """A browser is closed with 4401 and the reason, and no endpoint runs."""
    path, detail = ("/auto/identity?token=bad", "bad token") if token else ("/auto/identity", "missing credential")
    code, reason = await closed(server, path, origin=page(server))
    assert code == 4401
    assert reason.startswith(detail)
    assert "served bad" not in served(server)


@pytest.mark.parametrize(("options", "browser"), [("auto", False), ("http", False), ("http", True)])
async def test_rejected_non_browser_gets_http_status(server: LiveServer, options: str, browser: bool) -> None:
    """Other clients get 401 with the detail as JSON, and with `reject="http"` browsers too."""
    answer = await rejected(server, f"/{options}/identity?token=bad", origin=page(server) if browser else None)
    assert answer.status_code == 401
    assert json.loads(answer.body or b"") == {"detail": "bad token"}
    assert "served bad" not in served(server)


@pytest.mark.parametrize("browser", [False, True])
async def test_reject_close_closes_every_client_with_code(server: LiveServer, browser: bool) -> None:
    """With `reject="close"` clients without an Origin header are closed with 4401 too."""
    ended = await closed(server, "/close/identity?token=bad", origin=page(server) if browser else None)
    assert ended == (4401, "bad token")


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["bearer", "bad"], "bearer"),
        ([SUBPROTOCOL, "stabilizer.auth.YmFk"], SUBPROTOCOL),
    ],
)
async def test_rejected_browser_gets_offered_subprotocol(server: LiveServer, offered: list[str], chosen: str) -> None:
    """The close is readable in Chrome, because an offered subprotocol is selected; the credential is not sent back."""
    protocols = [Subprotocol(one) for one in offered]
    async with connect(server.url("/auto/identity"), origin=page(server), subprotocols=protocols) as client:
        assert client.subprotocol == chosen
        assert (await received_close(client))[0] == 4401


async def test_unknown_subprotocols_are_not_echoed(server: LiveServer) -> None:
    """A browser that offers only unknown subprotocols gets the HTTP response."""
    offered = [Subprotocol("base64url.bearer.authorization.k8s.io.SECRET"), Subprotocol("v4.channel.k8s.io")]
    answer = await rejected(server, "/auto/identity", origin=page(server), subprotocols=offered)
    assert answer.status_code == 401
    assert "SECRET" not in str(answer)


async def test_valid_token_is_accepted_from_each_source(server: LiveServer) -> None:
    """One dependency reads a token from a header, a query or a subprotocol, on sockets and on HTTP routes."""
    assert server.get("/me?token=good-ann") == "ann"
    for options in (
        {"additional_headers": {"Authorization": "Bearer good-ann"}},
        {"subprotocols": [Subprotocol("bearer"), Subprotocol("good-ann")], "origin": page(server)},
    ):
        async with connect(server.url("/auto/identity"), **options) as client:
            assert await echoes(client)
    assert not any("good-ann" in line for line in server.log.splitlines() if "fastapi_ws_stabilizer" in line)


# ── limits and rates ──


async def test_third_connection_from_address_gets_429(server: LiveServer) -> None:
    """With a limit of two, the third connection gets 429 and `Retry-After`, whatever `X-Forwarded-For` it sends."""
    async with connect(server.url("/two/path/ann")) as ann, connect(server.url("/two/path/bob")) as bob:
        for spoofed in (None, "1.1.1.1", "2.2.2.2", "127.0.0.1, 3.3.3.3"):
            headers = {} if spoofed is None else {"X-Forwarded-For": spoofed}
            answer = await rejected(server, "/two/path/cem", additional_headers=headers)
            assert answer.status_code == 429
            assert 2 <= int(answer.headers["Retry-After"]) <= 8
            assert json.loads(answer.body or b"") == {"detail": "too many connections"}
        code, reason = await closed(server, "/two/path/cem", origin=page(server))
        assert code == 4429
        assert re.fullmatch(r"too many connections; retry=\d{4}", reason)
        assert await echoes(ann)
        assert await echoes(bob)
    assert "served cem" not in served(server)
    await until_empty(server, "two")
    async with connect(server.url("/two/path/dan")) as dan:
        assert await echoes(dan)


def dial_raw(server: LiveServer, path: str, stack: ExitStack, **headers: str) -> tuple[int, WireClient]:
    client = stack.enter_context(WireClient(server.port))
    client.write(request(server.port, path, headers))
    return client.answer().status, client


async def test_browser_flood_gets_one_4429_and_then_429(server: LiveServer) -> None:
    """Of many handshakes one is accepted and closed with 4429, and the others get 429; no silent client stays."""
    with ExitStack() as stack:
        for name in ("ann", "bob"):
            assert dial_raw(server, f"/two-unanswered/path/{name}", stack)[0] == 101
        dials = [dial_raw(server, "/two-unanswered/path/mallory", stack, Origin=str(page(server))) for _ in range(30)]
        assert Counter(status for status, _ in dials) == {101: 1, 429: 29}
        (accepted,) = (client for status, client in dials if status == 101)
        assert accepted.close_frame()[0] == 4429
        if server.kind in SHOWS_TRANSPORT:
            assert await asyncio.to_thread(accepted.is_cut, CLOSE_HANDSHAKE_TIMEOUT + 1)


async def test_client_not_answering_close_frame_is_aborted(server: LiveServer) -> None:
    """A replaced client that does not answer the close frame is aborted after `CLOSE_HANDSHAKE_TIMEOUT`."""
    with ExitStack() as stack:
        _, old = dial_raw(server, "/auto/path/silent", stack)
        _, new = dial_raw(server, "/auto/path/silent", stack)
        assert old.close_frame()[0] == 4409
        if server.kind in SHOWS_TRANSPORT:  # the other servers set no limit
            assert not await asyncio.to_thread(old.is_cut, CLOSE_HANDSHAKE_TIMEOUT - 1)
            assert await asyncio.to_thread(old.is_cut, 2)
        new.send(1, b"hi")
        assert new.frame() == (1, b"hi")


async def test_trusted_proxy_decides_client_address(server: LiveServer) -> None:
    """Behind a trusted proxy each client has its own limit, and cannot choose another address."""

    def by(address: str) -> Any:
        return {"additional_headers": {"X-Forwarded-For": address}}

    url = server.url("/two-proxied/path/")
    async with connect(f"{url}a", **by("1.1.1.1")) as a, connect(f"{url}b", **by("9.9.9.9, 1.1.1.1")) as b:
        assert (await rejected(server, "/two-proxied/path/c", **by("8.8.8.8, 1.1.1.1"))).status_code == 429
        async with connect(f"{url}d", **by("1.1.1.1, 2.2.2.2")) as d:
            assert [await echoes(client) for client in (a, b, d)] == [True] * 3


async def test_third_connection_of_client_gets_429(server: LiveServer) -> None:
    """With `on_duplicate="allow"` and a limit of two, the third connection of one client gets 429."""
    url = server.url("/two-of-client/path/ann")
    async with connect(url) as first, connect(url) as second:
        assert (await rejected(server, "/two-of-client/path/ann")).status_code == 429
        assert (await closed(server, "/two-of-client/adopt/ann"))[0] == 4429
        assert (await closed(server, "/two-of-client/path/ann", hello(), subprotocols=V1))[0] == 4429
        assert await echoes(first)
        assert await echoes(second)


@pytest.mark.parametrize(("options", "status"), [("rate", 503), ("rate-address", 429)])
async def test_connection_rate_limit_rejects_with_retry_time(server: LiveServer, options: str, status: int) -> None:
    """At one connection in 100 s, the second handshake is rejected with the time to wait."""
    async with connect(server.url(f"/{options}/path/ann")) as ann:
        answer = await rejected(server, f"/{options}/path/bob")
        assert answer.status_code == status
        assert 80 <= int(answer.headers["Retry-After"]) <= 100
        assert await echoes(ann)


# ── full servers ──


async def test_full_server_rejects_with_503(server: LiveServer) -> None:
    """A full server rejects browsers and other clients with 503, by each route, while open connections go on."""
    async with connect(server.url("/max-one/path/ann")) as ann:
        for path in ("path/late", "identity?token=good-late"):
            for origin in (None, page(server)):
                answer = await rejected(server, f"/max-one/{path}", origin=origin)
                assert answer.status_code == 503
                assert 2 <= int(answer.headers["Retry-After"]) <= 8
                assert json.loads(answer.body or b"") == {"detail": "the server is full"}
        assert await echoes(ann)
        found = counts(server, "max-one")
        assert (found["established"], found["connections"], found["sessions"]) == (1, 1, 0)
        assert found["refusals"] == {"max_connections": 4}
    assert "served late" not in served(server)
    await until_empty(server, "max-one")
    async with connect(server.url("/max-one/path/bob")) as bob:
        assert await echoes(bob)


async def test_connect_on_full_server_closes_with_4503(server: LiveServer) -> None:
    """`connect()` raises `ConnectionLimitExceededError`; an endpoint that lets it escape closes with 4503."""
    async with connect(server.url("/full-adopt/adopt/ann")) as ann:
        assert await echoes(ann)
        code, reason = await closed(server, "/full-adopt/adopt/bob")
        assert code == 4503
        assert re.fullmatch(r"the server is full; retry=\d{4}", reason)
        assert "adopt: max_connections" in server.get("/events")
        assert await echoes(ann)


async def test_full_server_closes_v1_client_with_4503(server: LiveServer) -> None:
    """A `stabilizer.v1.json` client, which may resume a session, is rejected after its hello; no session is created."""
    async with connect(server.url("/full/path/ann")) as ann:
        code, reason = await closed(server, "/full/path/late", hello(), subprotocols=V1)
        assert code == 4503
        assert re.fullmatch(r"the server is full; retry=\d{4}", reason)
        assert await echoes(ann)
        assert counts(server, "full")["sessions"] == 0
    assert "served late" not in served(server)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ("half-open-path", "path/ann"),
        ("half-open-identity", "identity?token=good-ann"),
        ("half-open-adopt", "adopt/ann"),
    ],
)
async def test_full_server_replaces_half_open_connection_of_client(server: LiveServer, options: str, path: str) -> None:
    """A full server lets a client replace its half-open connection, and counts one connection afterwards."""
    with RawClient(server.port, f"/{options}/{path}") as old:
        assert " 101 " in await asyncio.to_thread(old.handshake)
        async with connect(server.url(f"/{options}/{path}")) as new:
            assert await echoes(new)
            assert (await asyncio.to_thread(old.close_frame))[0] == 4409
            await until(lambda: counts(server, options)["unfinished"] == 1)
            assert counts(server, options)["established"] == 1
            assert (await rejected(server, f"/{options}/path/bob")).status_code == 503


async def test_full_server_resumes_session_of_half_open_connection(server: LiveServer) -> None:
    """On a full server a client takes over its session from a half-open connection, and resumes it."""
    async with connect(server.url("/half-open-session/path/ann"), subprotocols=V1) as old:
        await old.send(hello())
        token = json.loads(await asyncio.wait_for(old.recv(), 5))["token"]
        async with connect(server.url("/half-open-session/path/ann"), subprotocols=V1) as new:
            await new.send(hello(2, token))
            assert json.loads(await asyncio.wait_for(new.recv(), 5))["resume"] == "full"
            assert (await received_close(old))[0] == 4409
            assert counts(server, "half-open-session")["established"] == 1
            assert (await rejected(server, "/half-open-session/path/bob")).status_code == 503


async def test_pending_handshakes_are_bounded(server: LiveServer) -> None:
    """Handshakes without a hello are bounded, and a new client replaces the oldest of them."""
    async with AsyncExitStack() as stack:
        dials = [connect(server.url(f"/silent/path/{number}"), subprotocols=V1) for number in range(1 + MIN_PENDING)]
        silent = [await stack.enter_async_context(dial) for dial in dials]
        await asyncio.sleep(MIN_HELLO_WAIT)
        async with connect(server.url("/silent/path/bob")) as bob:
            assert await echoes(bob)
            assert (await received_close(silent[0]))[0] == 4408
            assert counts(server, "silent")["pending"] == MIN_PENDING
        closes = await asyncio.gather(*(received_close(client) for client in silent))
        assert {code for code, _ in closes} == {4408}
    await until_empty(server, "silent")


# ── released reservations ──


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("token", ["good-ann", "bad"])
async def test_disconnect_during_handshake_leaves_no_reservation(server: LiveServer, how: str, token: str) -> None:
    """A client that disconnects while it is identified leaves no reservation, and no crash in the log."""
    for _ in range(3):
        client = RawClient(server.port, f"/disconnected/identity?slow=0.2&token={token}")
        await until(lambda: counts(server, "disconnected")["pending"] == 1)
        getattr(client, how)()
        await until_empty(server, "disconnected")
    async with connect(server.url("/disconnected/path/ann")) as ann:
        assert await echoes(ann)
    await until_empty(server, "disconnected")


# ── the drain ──


async def test_drain_rejects_handshakes_with_503(server: LiveServer) -> None:
    """A drain rejects all handshakes with 503, while open connections go on."""
    async with connect(server.url("/draining/path/ann")) as ann:
        assert await echoes(ann)
        server.post("/draining/drain")
        for path in ("path/bob", "identity?token=good-bob"):
            for origin in (None, page(server)):
                answer = await rejected(server, f"/draining/{path}", origin=origin)
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) >= 1
        assert await echoes(ann)


# ── servers that read proxy headers too ──


@pytest.mark.parametrize("kind", UVICORN)
async def test_trusted_proxies_work_with_uvicorn_proxy_headers(serve: Callable[..., LiveServer], kind: str) -> None:
    """Trusted proxies decide hosts and addresses, though uvicorn replaces the address of a local proxy by default."""
    sets = {"auto": {}, "two-proxied": SETS["two-proxied"]}
    server = serve(kind, app="tests.live.limits_app:app", env={"TEST_LIMITS": json.dumps(sets)})
    headers = {"X-Forwarded-For": "198.51.100.1, 203.0.113.9", "X-Forwarded-Host": "shop.example"}
    shop = Origin("https://shop.example")
    assert (await rejected(server, "/auto/path/ann", origin=shop, additional_headers=headers)).status_code == 403
    assert f" host=127.0.0.1:{server.port}" in server.log
    async with AsyncExitStack() as connections:
        for name in ("ann", "bob"):
            dialled = connect(server.url(f"/two-proxied/path/{name}"), origin=shop, additional_headers=headers)
            await connections.enter_async_context(dialled)
        full = {**headers, "X-Forwarded-For": "198.51.100.2, 203.0.113.9"}
        answer = await rejected(server, "/two-proxied/path/cem", additional_headers=full)
        assert answer.status_code == 429
        other = {**headers, "X-Forwarded-For": "203.0.113.9, 198.51.100.2"}
        async with connect(server.url("/two-proxied/path/dan"), origin=shop, additional_headers=other):
            pass
