"""Who gets in and who does not, and what those who do not are told, on real servers."""

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
"""Servers whose connections can be cut."""

KINDS = ("uvicorn-sansio", "uvicorn-stable", "hypercorn", "granian")

OWN_FLOW = "RuntimeError: ASGI flow error: Connection already upgraded"
"""What granian raises in Starlette's handler when a client that gets an HTTP status is gone already, and its log has
with a traceback."""

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
    "room-for-one": {"max_connections": 1},
    "full": {"max_connections": 1},
    "full-hand": {"max_connections": 1},
    "ghost-path": {"max_connections": 1},
    "ghost-who": {"max_connections": 1},
    "ghost-hand": {"max_connections": 1},
    "ghost-session": {"max_connections": 1},
    "silent": {"max_connections": 1, "hello_timeout": 3},
    "gone": {"max_connections": 1},
    "draining": {"max_connections": 5},
}


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """One server of each kind for all tests of this module; uvicorn does not look at X-Forwarded-For itself."""
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
    """The errors in the log but those that are the server's own."""
    own = server.kind != "uvicorn-stable"
    found = [line for line in server.errors() if not (own and UVICORN_REJECTION in line)]
    for _ in range(server.log.count(OWN_FLOW)):
        for start in ("[ERROR] Application callable raised an exception", "Traceback"):
            found.remove(next(line for line in found if line.startswith(start)))
    return found


def page(server: LiveServer) -> Origin:
    """The origin of a page that the server itself has served."""
    return Origin(f"http://127.0.0.1:{server.port}")


async def refused(server: LiveServer, path: str, **options: Any) -> Response:
    """Dial, and return the HTTP answer that refuses it."""
    with pytest.raises(InvalidStatus) as status:
        async with connect(server.url(path), **options):
            pass
    return status.value.response


async def closed(server: LiveServer, path: str, *first: str, **options: Any) -> tuple[int, str]:
    """Dial, be let in, and return the code and reason with which it is closed."""
    async with connect(server.url(path), **options) as client:
        for message in first:
            await client.send(message)
        return await received_close(client)


async def echoes(client: ClientConnection) -> bool:
    """Whether it is let in and served."""
    await client.send("hi")
    return await asyncio.wait_for(client.recv(), 5) == "hi"


def served(server: LiveServer) -> list[str]:
    """Whom an endpoint has run for."""
    return [event for event in server.get("/events") if event.startswith("served ")]


def counts(server: LiveServer, options: str) -> dict[str, Any]:
    """How many are inside, and so on."""
    found: dict[str, Any] = server.get(f"/{options}/counts")
    return found


async def until_empty(server: LiveServer, options: str) -> None:
    """Wait until nobody is there any more."""
    await until(lambda: all(counts(server, options)[name] == 0 for name in ("inside", "knocking", "unfinished")))


def hello(n: int = 1, token: str | None = None) -> str:
    """The first frame of a client of `stabilizer.v1.json`."""
    resume = {} if token is None else {"resume": {"token": token, "seq": 0}}
    return json.dumps({"type": "hello", "v": 1, "n": n, **resume})


V1 = [Subprotocol(SUBPROTOCOL)]

# ── the page that it comes from ──

FOREIGN = {
    "another site": "https://evil.example",
    "another port": "http://127.0.0.1:1",
    "a name that ends as ours": "http://evil127.0.0.1",
    "nobody": "null",
    "nonsense": "evil",
}


@pytest.mark.parametrize("way", ["path/mallory", "who?token=good-mallory"])
@pytest.mark.parametrize("options", ["auto", "close", "http"])
async def test_foreign_origin_gets_403_before_accept(server: LiveServer, options: str, way: str) -> None:
    """Whatever `reject` says, a page of another site is refused before accept, and no endpoint runs."""
    for origin in FOREIGN.values():
        answer = await refused(server, f"/{options}/{way}", origin=Origin(origin))
        assert answer.status_code == 403
        assert json.loads(answer.body or b"") == {"detail": "origin not allowed"}
    assert "served mallory" not in served(server)
    await until_empty(server, options)


async def test_connect_closes_foreign_origin_with_4403(server: LiveServer) -> None:
    """`connect()` refuses it too, after the accept that was the application's."""
    ended = await closed(server, "/auto/hand/mallory", origin=Origin("https://evil.example"))
    assert ended == (4403, "origin not allowed")
    assert "served mallory" not in served(server)


async def test_same_origin_and_non_browser_clients_are_accepted(server: LiveServer) -> None:
    """The same host and port, however they are written, and clients that are no browsers."""
    for origin in (page(server), page(server).upper(), f"https://127.0.0.1:{server.port}", None):
        async with connect(server.url("/auto/path/ann"), origin=None if origin is None else Origin(origin)) as client:
            assert await echoes(client)


async def test_default_port_of_origin_is_optional(server: LiveServer) -> None:
    """A page of `http://host` has the port 80, whether it is written or not."""
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
    """Exactly, by a wildcard host, by a regular expression; and what only looks like one of them is not."""
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
        assert (await refused(server, "/listed/path/mallory", origin=Origin(origin))).status_code == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "file://", "https://github.com/gilmaimon/TinyWebsockets", "nonsense"]
)
async def test_asterisk_accepts_any_origin(server: LiveServer, origin: str) -> None:
    """`"*"` is an opt-in to every client, whatever its Origin header says."""
    async with connect(server.url("/all-origins/path/ann"), origin=Origin(origin)) as client:
        assert await echoes(client)


async def test_require_origin_rejects_clients_without_origin(server: LiveServer) -> None:
    """With `require_origin` nobody comes in who is no browser."""
    assert (await refused(server, "/origin/path/mallory")).status_code == 403
    async with connect(server.url("/origin/path/ann"), origin=page(server)) as client:
        assert await echoes(client)


# ── a bad token ──


@pytest.mark.parametrize("token", ["bad", None])
async def test_rejected_browser_reads_4401_and_reason(server: LiveServer, token: str | None) -> None:
    """It is closed 4401 with the reason, and no endpoint ran."""
    path, detail = ("/auto/who?token=bad", "bad token") if token else ("/auto/who", "a credential is wanted")
    code, reason = await closed(server, path, origin=page(server))
    assert code == 4401
    assert reason.startswith(detail)
    assert "served bad" not in served(server)


@pytest.mark.parametrize(("options", "browser"), [("auto", False), ("http", False), ("http", True)])
async def test_rejected_non_browser_gets_http_status(server: LiveServer, options: str, browser: bool) -> None:
    """401 with the detail as JSON for who can read it, and with `reject="http"` for everybody."""
    answer = await refused(server, f"/{options}/who?token=bad", origin=page(server) if browser else None)
    assert answer.status_code == 401
    assert json.loads(answer.body or b"") == {"detail": "bad token"}
    assert "served bad" not in served(server)


@pytest.mark.parametrize("browser", [False, True])
async def test_reject_close_closes_every_client_with_code(server: LiveServer, browser: bool) -> None:
    """With `reject="close"` a program too is closed 4401."""
    ended = await closed(server, "/close/who?token=bad", origin=page(server) if browser else None)
    assert ended == (4401, "bad token")


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["bearer", "bad"], "bearer"),
        ([SUBPROTOCOL, "stabilizer.auth.YmFk"], SUBPROTOCOL),
    ],
)
async def test_rejected_browser_gets_offered_subprotocol(server: LiveServer, offered: list[str], chosen: str) -> None:
    """Without one Chrome takes the answer for a failed handshake and shows 1006; the credential is not sent back."""
    protocols = [Subprotocol(one) for one in offered]
    async with connect(server.url("/auto/who"), origin=page(server), subprotocols=protocols) as client:
        assert client.subprotocol == chosen
        assert (await received_close(client))[0] == 4401


async def test_unknown_subprotocols_are_not_echoed(server: LiveServer) -> None:
    """A browser that offers only what nobody here knows gets the HTTP answer."""
    offered = [Subprotocol("base64url.bearer.authorization.k8s.io.SECRET"), Subprotocol("v4.channel.k8s.io")]
    answer = await refused(server, "/auto/who", origin=page(server), subprotocols=offered)
    assert answer.status_code == 401
    assert "SECRET" not in str(answer)


async def test_valid_token_is_accepted_from_each_source(server: LiveServer) -> None:
    """By header, by query, by subprotocol; the same one on an HTTP route."""
    assert server.get("/me?token=good-ann") == "ann"
    for options in (
        {"additional_headers": {"Authorization": "Bearer good-ann"}},
        {"subprotocols": [Subprotocol("bearer"), Subprotocol("good-ann")], "origin": page(server)},
    ):
        async with connect(server.url("/auto/who"), **options) as client:
            assert await echoes(client)
    assert not any("good-ann" in line for line in server.log.splitlines() if "fastapi_ws_stabilizer" in line)


# ── too many ──


async def test_third_connection_from_address_gets_429(server: LiveServer) -> None:
    """With a limit of two the third gets 429 and when to come back, whatever it says where it comes from."""
    async with connect(server.url("/two/path/ann")) as ann, connect(server.url("/two/path/bob")) as bob:
        for spoofed in (None, "1.1.1.1", "2.2.2.2", "127.0.0.1, 3.3.3.3"):
            headers = {} if spoofed is None else {"X-Forwarded-For": spoofed}
            answer = await refused(server, "/two/path/cem", additional_headers=headers)
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


def _dials(server: LiveServer, path: str, stack: ExitStack, **headers: str) -> tuple[int, WireClient]:
    client = stack.enter_context(WireClient(server.port))
    client.write(request(server.port, path, headers))
    return client.answer().status, client


async def test_browser_flood_gets_one_4429_and_then_429(server: LiveServer) -> None:
    """Of many dials one is let in to be told 4429, the others get 429; and who answers nothing does not stay."""
    with ExitStack() as stack:
        for name in ("ann", "bob"):
            assert _dials(server, f"/two-unanswered/path/{name}", stack)[0] == 101
        dials = [_dials(server, "/two-unanswered/path/mallory", stack, Origin=str(page(server))) for _ in range(30)]
        assert Counter(status for status, _ in dials) == {101: 1, 429: 29}
        (told,) = (client for status, client in dials if status == 101)
        assert told.close_frame()[0] == 4429
        if server.kind in SHOWS_TRANSPORT:
            assert await asyncio.to_thread(told.is_cut, CLOSE_HANDSHAKE_TIMEOUT + 1)


async def test_client_not_answering_close_frame_is_aborted(server: LiveServer) -> None:
    """A replaced client that has read why and says nothing holds its connection for no longer than a bad link needs."""
    with ExitStack() as stack:
        _, old = _dials(server, "/auto/path/silent", stack)
        _, new = _dials(server, "/auto/path/silent", stack)
        assert old.close_frame()[0] == 4409
        if server.kind in SHOWS_TRANSPORT:  # the others wait for as long as they like
            assert not await asyncio.to_thread(old.is_cut, CLOSE_HANDSHAKE_TIMEOUT - 1)
            assert await asyncio.to_thread(old.is_cut, 2)
        new.send(1, b"hi")
        assert new.frame() == (1, b"hi")


async def test_trusted_proxy_decides_client_address(server: LiveServer) -> None:
    """Behind a trusted proxy each client has its own limit, and cannot choose another address itself."""

    def by(address: str) -> Any:
        return {"additional_headers": {"X-Forwarded-For": address}}

    url = server.url("/two-proxied/path/")
    async with connect(f"{url}a", **by("1.1.1.1")) as a, connect(f"{url}b", **by("9.9.9.9, 1.1.1.1")) as b:
        assert (await refused(server, "/two-proxied/path/c", **by("8.8.8.8, 1.1.1.1"))).status_code == 429
        async with connect(f"{url}d", **by("1.1.1.1, 2.2.2.2")) as d:
            assert [await echoes(client) for client in (a, b, d)] == [True] * 3


async def test_third_connection_of_client_gets_429(server: LiveServer) -> None:
    """With `on_duplicate="allow"` and a limit of two the third connection of one client gets 429."""
    url = server.url("/two-of-client/path/ann")
    async with connect(url) as first, connect(url) as second:
        assert (await refused(server, "/two-of-client/path/ann")).status_code == 429
        assert (await closed(server, "/two-of-client/hand/ann"))[0] == 4429
        assert (await closed(server, "/two-of-client/path/ann", hello(), subprotocols=V1))[0] == 4429
        assert await echoes(first)
        assert await echoes(second)


@pytest.mark.parametrize(("options", "status"), [("rate", 503), ("rate-address", 429)])
async def test_connection_rate_limit_rejects_with_retry_time(server: LiveServer, options: str, status: int) -> None:
    """One in a hundred seconds is one, and the next is told how long to wait."""
    async with connect(server.url(f"/{options}/path/ann")) as ann:
        answer = await refused(server, f"/{options}/path/bob")
        assert answer.status_code == status
        assert 80 <= int(answer.headers["Retry-After"]) <= 100
        assert await echoes(ann)


# ── no room ──


async def test_full_server_rejects_with_503(server: LiveServer) -> None:
    """A program and a browser alike, by path and with an identity, and those who are inside notice nothing."""
    async with connect(server.url("/room-for-one/path/ann")) as ann:
        for way in ("path/late", "who?token=good-late"):
            for origin in (None, page(server)):
                answer = await refused(server, f"/room-for-one/{way}", origin=origin)
                assert answer.status_code == 503
                assert 2 <= int(answer.headers["Retry-After"]) <= 8
                assert json.loads(answer.body or b"") == {"detail": "the server is full"}
        assert await echoes(ann)
        found = counts(server, "room-for-one")
        assert (found["inside"], found["connections"], found["sessions"]) == (1, 1, 0)
        assert found["refusals"] == {"max_connections": 4}
    assert "served late" not in served(server)
    await until_empty(server, "room-for-one")
    async with connect(server.url("/room-for-one/path/bob")) as bob:
        assert await echoes(bob)


async def test_connect_on_full_server_closes_with_4503(server: LiveServer) -> None:
    """`connect()` raises `ConnectionLimitExceededError`; an endpoint that lets it escape closes, and no more."""
    async with connect(server.url("/full-hand/hand/ann")) as ann:
        assert await echoes(ann)
        code, reason = await closed(server, "/full-hand/hand/bob")
        assert code == 4503
        assert re.fullmatch(r"the server is full; retry=\d{4}", reason)
        assert "by hand: max_connections" in server.get("/events")
        assert await echoes(ann)


async def test_full_server_closes_v1_client_with_4503(server: LiveServer) -> None:
    """A client of `stabilizer.v1.json` might come back to a session: it is told after its hello, and none is made."""
    async with connect(server.url("/full/path/ann")) as ann:
        code, reason = await closed(server, "/full/path/late", hello(), subprotocols=V1)
        assert code == 4503
        assert re.fullmatch(r"the server is full; retry=\d{4}", reason)
        assert await echoes(ann)
        assert counts(server, "full")["sessions"] == 0
    assert "served late" not in served(server)


@pytest.mark.parametrize(
    ("options", "path"),
    [("ghost-path", "path/ann"), ("ghost-who", "who?token=good-ann"), ("ghost-hand", "hand/ann")],
)
async def test_full_server_replaces_half_open_connection_of_client(server: LiveServer, options: str, path: str) -> None:
    """At a full server a client is let in whose old connection is half-open, and it is one connection after that."""
    with RawClient(server.port, f"/{options}/{path}") as old:
        assert " 101 " in await asyncio.to_thread(old.handshake)
        async with connect(server.url(f"/{options}/{path}")) as new:
            assert await echoes(new)
            assert (await asyncio.to_thread(old.close_frame))[0] == 4409
            await until(lambda: counts(server, options)["unfinished"] == 1)
            assert counts(server, options)["inside"] == 1
            assert (await refused(server, f"/{options}/path/bob")).status_code == 503


async def test_full_server_resumes_session_of_half_open_connection(server: LiveServer) -> None:
    """At a full server a session whose connection is half-open is taken over, and resumed."""
    async with connect(server.url("/ghost-session/path/ann"), subprotocols=V1) as old:
        await old.send(hello())
        token = json.loads(await asyncio.wait_for(old.recv(), 5))["token"]
        async with connect(server.url("/ghost-session/path/ann"), subprotocols=V1) as new:
            await new.send(hello(2, token))
            assert json.loads(await asyncio.wait_for(new.recv(), 5))["resume"] == "full"
            assert (await received_close(old))[0] == 4409
            assert counts(server, "ghost-session")["inside"] == 1
            assert (await refused(server, "/ghost-session/path/bob")).status_code == 503


async def test_pending_handshakes_are_bounded(server: LiveServer) -> None:
    """Who says no hello stands in the lobby, and keeps nobody out: whoever comes takes the place of the oldest."""
    async with AsyncExitStack() as stack:
        dials = [connect(server.url(f"/silent/path/{number}"), subprotocols=V1) for number in range(1 + MIN_PENDING)]
        silent = [await stack.enter_async_context(dial) for dial in dials]
        await asyncio.sleep(MIN_HELLO_WAIT)
        async with connect(server.url("/silent/path/bob")) as bob:
            assert await echoes(bob)
            assert (await received_close(silent[0]))[0] == 4408
            assert counts(server, "silent")["knocking"] == MIN_PENDING
        ends = await asyncio.gather(*(received_close(client) for client in silent))
        assert {code for code, _ in ends} == {4408}
    await until_empty(server, "silent")


# ── everything is given back ──


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("token", ["good-ann", "bad"])
async def test_disconnect_during_handshake_leaves_no_reservation(server: LiveServer, how: str, token: str) -> None:
    """A client that is gone while it is found out who it is takes no place, and is no crash in the log."""
    for _ in range(3):
        client = RawClient(server.port, f"/gone/who?slow=0.2&token={token}")
        await until(lambda: counts(server, "gone")["knocking"] == 1)
        getattr(client, how)()
        await until_empty(server, "gone")
    async with connect(server.url("/gone/path/ann")) as ann:
        assert await echoes(ann)
    await until_empty(server, "gone")


# ── the drain ──


async def test_drain_rejects_handshakes_with_503(server: LiveServer) -> None:
    """Room or none: nobody is let in any more, and those who are inside notice nothing of it."""
    async with connect(server.url("/draining/path/ann")) as ann:
        assert await echoes(ann)
        server.post("/draining/drain")
        for way in ("path/bob", "who?token=good-bob"):
            for origin in (None, page(server)):
                answer = await refused(server, f"/draining/{way}", origin=origin)
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) >= 1
        assert await echoes(ann)


# ── a server that reads the headers of proxies too ──


@pytest.mark.parametrize("kind", UVICORN)
async def test_trusted_proxies_work_with_uvicorn_proxy_headers(serve: Callable[..., LiveServer], kind: str) -> None:
    """uvicorn puts the client in the place of a local proxy by default; its hosts and addresses count all the same."""
    sets = {"auto": {}, "two-proxied": SETS["two-proxied"]}
    server = serve(kind, app="tests.live.limits_app:app", env={"TEST_LIMITS": json.dumps(sets)})
    headers = {"X-Forwarded-For": "198.51.100.1, 203.0.113.9", "X-Forwarded-Host": "shop.example"}
    shop = Origin("https://shop.example")
    assert (await refused(server, "/auto/path/ann", origin=shop, additional_headers=headers)).status_code == 403
    assert f" host=127.0.0.1:{server.port}" in server.log
    async with AsyncExitStack() as inside:
        for name in ("ann", "bob"):
            dialled = connect(server.url(f"/two-proxied/path/{name}"), origin=shop, additional_headers=headers)
            await inside.enter_async_context(dialled)
        full = {**headers, "X-Forwarded-For": "198.51.100.2, 203.0.113.9"}
        answer = await refused(server, "/two-proxied/path/cem", additional_headers=full)
        assert answer.status_code == 429
        other = {**headers, "X-Forwarded-For": "203.0.113.9, 198.51.100.2"}
        async with connect(server.url("/two-proxied/path/dan"), origin=shop, additional_headers=other):
            pass
