"""Authentication on real servers: one login for HTTP and sockets, tickets, expiry and revocation."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from fastapi_ws_stabilizer.client import Client, ClientClosedError
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.plain_client import received_close
from tests.support.process import UVICORN_REJECTION, no_new_errors
from tests.support.server import LiveServer, until

KINDS = ("uvicorn-sansio", "uvicorn-stable")
APP = "tests.live.identity_app:app"
HELLO_TIMEOUT = 0.5
CONFIG = {"hello_timeout": HELLO_TIMEOUT, "log_level": "DEBUG", "on_duplicate": "allow"}
QUICK_DIALS: dict[str, Any] = {"base_delay": 0.05, "max_delay": 0.3, "min_delay": 0.01}


@pytest.fixture(scope="module", params=KINDS)
def identity_server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """One server for all tests of this module, on uvicorn's own protocol class and on ours."""
    with LiveServer(request.param, app=APP, config=CONFIG) as server:
        yield server


@pytest.fixture
async def server(identity_server: LiveServer) -> AsyncIterator[LiveServer]:
    """That server, which must log no error during the test."""
    with no_new_errors(identity_server, UVICORN_REJECTION):
        yield identity_server


def get_me(server: LiveServer, headers: dict[str, str]) -> str:
    """Return the user that the HTTP route identifies."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/me", headers=headers)
    with urllib.request.urlopen(request, timeout=5) as response:
        return str(json.load(response))


def token_for(seconds: float) -> str:
    """Return a token of Ann that expires in `seconds`."""
    return f"ann~{time.time() + seconds}"


# ── sources of credentials ──


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer ann"}, {"Cookie": "session=ann"}], ids=str)
async def test_one_dependency_serves_http_and_sockets(server: LiveServer, headers: dict[str, str]) -> None:
    """The same `current_user` reads a header and a cookie on an HTTP route and on a socket."""
    assert await asyncio.to_thread(get_me, server, headers) == "ann"
    async with connect(server.url("/me"), additional_headers=headers) as client:
        assert await client.recv() == "ann"


async def test_bearer_subprotocol_is_answered_without_token(server: LiveServer) -> None:
    """For `["bearer", token]`, as browsers offer it, `bearer` is selected and the token is the credential."""
    protocols = [Subprotocol("bearer"), Subprotocol("ann")]
    async with connect(server.url("/me"), subprotocols=protocols) as client:
        assert client.subprotocol == "bearer"
        assert await client.recv() == "ann"
        assert client.response is not None
        assert "ann" not in str(client.response.headers)


@pytest.mark.parametrize("source", ["hello", "subprotocol"])
async def test_v1_client_sends_credential_in_hello_or_subprotocol(server: LiveServer, source: str) -> None:
    """A `stabilizer.v1.json` client sends its credential in its hello, or offers it as a subprotocol."""
    packed = base64.urlsafe_b64encode(b"ann").decode().rstrip("=")
    protocols = [Subprotocol(SUBPROTOCOL)]
    hello: dict[str, Any] = {"type": "hello", "v": 1, "n": 1}
    if source == "hello":
        hello["auth"] = "ann"
    else:
        protocols.append(Subprotocol(f"stabilizer.auth.{packed}"))
    async with connect(server.url("/me"), subprotocols=protocols) as client:
        assert client.subprotocol == SUBPROTOCOL
        await client.send(json.dumps(hello))
        assert json.loads(await asyncio.wait_for(client.recv(), 5))["type"] == "welcome"
        assert json.loads(await asyncio.wait_for(client.recv(), 5))["data"] == "ann"


def endpoint_runs(server: LiveServer) -> int:
    """Return how often an endpoint has run; notes of closes are left out because they may come after a test's end."""
    return sum(str(note).startswith("ran ") for note in server.get("/notes"))


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer mallory"}], ids=["none", "bad"])
async def test_missing_or_invalid_credential_is_rejected(server: LiveServer, headers: dict[str, str]) -> None:
    """A browser gets 4401 with the reason and other clients 401, and the endpoint does not run."""
    before = endpoint_runs(server)
    with pytest.raises(urllib.error.HTTPError) as refused:
        await asyncio.to_thread(get_me, server, headers)
    assert refused.value.code == 401
    refused.value.close()
    with pytest.raises(InvalidStatus) as answer:
        await connect(server.url("/me"), additional_headers=headers)
    assert answer.value.response.status_code == 401
    origin = f"http://127.0.0.1:{server.port}"
    async with connect(server.url("/me"), additional_headers=headers, origin=origin) as page:  # type: ignore[arg-type]
        code, reason = await received_close(page)
    assert code == 4401
    assert reason
    assert endpoint_runs(server) == before


@pytest.mark.parametrize("auth", [None, "mallory"])
async def test_invalid_first_message_credential_closes_with_4401(server: LiveServer, auth: str | None) -> None:
    """An invalid credential in a hello, after the accept, closes with 4401, and no session is left."""
    async with connect(server.url("/me"), subprotocols=[Subprotocol(SUBPROTOCOL)]) as client:
        await client.send(json.dumps({"type": "hello", "v": 1, "n": 1, **({} if auth is None else {"auth": auth})}))
        code, _ = await received_close(client)
    assert code == 4401
    assert server.get("/sessions") == {"sessions": 0, "away": 0, "connections": 0}


async def test_missing_first_message_closes_with_4408(server: LiveServer) -> None:
    """A missing hello closes with 4408 after `hello_timeout`, and until then no connection is counted."""
    started = time.monotonic()
    async with connect(server.url("/me"), subprotocols=[Subprotocol(SUBPROTOCOL)]) as client:
        assert (await asyncio.to_thread(server.get, "/sessions"))["connections"] == 0
        code, _ = await received_close(client)
    assert code == 4408
    assert HELLO_TIMEOUT * 0.9 < time.monotonic() - started < HELLO_TIMEOUT + 1


async def test_credential_is_not_in_log(server: LiveServer) -> None:
    """Credentials of accepted and rejected clients, from each source, are not in the log at level DEBUG."""
    secret = "0neVerySecretWord"
    packed = base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")
    offers = [["bearer", secret], [SUBPROTOCOL, f"stabilizer.auth.{packed}"]]
    for headers in ({"Authorization": f"Bearer {secret}"}, {"Cookie": f"session={secret}"}):
        with pytest.raises(InvalidStatus):
            await connect(server.url("/me"), additional_headers=headers)
    for offer in offers:
        with pytest.raises((InvalidStatus, ConnectionClosed)):
            async with connect(server.url("/me"), subprotocols=[Subprotocol(one) for one in offer]) as client:
                await client.send(json.dumps({"type": "hello", "v": 1, "n": 1}))
                await asyncio.wait_for(client.recv(), 5)
    async with connect(server.url("/me"), subprotocols=[Subprotocol(SUBPROTOCOL)]) as client:
        await client.send(json.dumps({"type": "hello", "v": 1, "n": 1, "auth": secret}))
        await received_close(client)
    expiring = token_for(60)
    async with connect(server.url("/me"), subprotocols=[Subprotocol("bearer"), Subprotocol(expiring)]) as client:
        assert await client.recv() == "ann"
        await client.send(json.dumps({"type": "auth", "token": secret}))
        assert (await received_close(client))[0] == 4401
    log = server.log
    assert "connection_opened" in log or "connection opened" in log
    for text in (secret, packed, expiring):
        assert text not in log


# ── tickets ──


def ticket_of(server: LiveServer, token: str) -> str:
    """Return the ticket that the HTTP route issues to a user."""
    url = f"http://127.0.0.1:{server.port}/tickets"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}, method="POST")
    with urllib.request.urlopen(request, timeout=5) as response:
        return str(json.load(response))


async def test_ticket_is_valid_once(server: LiveServer) -> None:
    """The HTTP route issues a ticket, a socket uses it, and the second use gets 401."""
    ticket = await asyncio.to_thread(ticket_of, server, "ann")
    async with connect(server.url(f"/ticket?ticket={ticket}")) as client:
        assert await client.recv() == "ann"
    for query in (f"?ticket={ticket}", "?ticket=wst1.nonsense", ""):
        with pytest.raises(InvalidStatus) as refused:
            await connect(server.url(f"/ticket{query}"))
        assert refused.value.response.status_code == 401


# ── expiry ──


async def test_plain_client_gets_renewal_request_then_4401(server: LiveServer) -> None:
    """A client with a token for 2 s is asked for a new one after 1 s, and closed with 4401 after 2 s."""
    started = time.time()
    async with connect(server.url("/me"), additional_headers={"Authorization": f"Bearer {token_for(2)}"}) as client:
        assert await client.recv() == "ann"
        asked = json.loads(await asyncio.wait_for(client.recv(), 5))
        assert (asked["type"], asked["in"]) == ("auth", pytest.approx(1000, abs=20))
        assert time.time() - started == pytest.approx(1.0, abs=0.3)
        code, reason = await received_close(client)
    assert (code, reason) == (4401, "the credential has expired")
    assert time.time() - started == pytest.approx(2.0, abs=0.3)


async def test_plain_client_renews_credential_on_same_connection(server: LiveServer) -> None:
    """A renewed credential extends the same connection, which ends when the new one expires."""
    started = time.time()
    async with connect(server.url("/me"), additional_headers={"Authorization": f"Bearer {token_for(1)}"}) as client:
        assert await client.recv() == "ann"
        assert json.loads(await client.recv())["type"] == "auth"
        await client.send(json.dumps({"type": "auth", "token": token_for(1)}))
        assert json.loads(await client.recv())["ok"] is True
        await client.send("still here")
        assert await client.recv() == "still here"
        assert (await received_close(client))[0] == 4401
    assert time.time() - started == pytest.approx(1.5, abs=0.3)


async def test_expired_credential_is_rejected_with_401(server: LiveServer) -> None:
    """An expired credential gets 401, and the endpoint does not run."""
    with pytest.raises(InvalidStatus) as refused:
        await connect(server.url("/me"), additional_headers={"Authorization": f"Bearer {token_for(-1)}"})
    assert refused.value.response.status_code == 401


async def test_python_client_renews_credential_on_same_connection(server: LiveServer) -> None:
    """The client stays on one connection over many lifetimes of its credential."""
    asked: list[bool] = []
    closes: list[int] = []

    def auth(force: bool) -> str:
        asked.append(force)
        return token_for(1)

    async with Client(server.url("/me"), auth=auth, **QUICK_DIALS) as client:
        client.on_close(lambda code, reason: closes.append(code))
        await asyncio.sleep(2.2)
        assert client.state == "open"
    assert closes == []
    assert asked == [False, True, True, True, True]


async def test_python_client_resumes_with_new_credential_after_4401(server: LiveServer) -> None:
    """A client without a credential to renew gets 4401, and resumes its session with a new one."""
    closes: list[int] = []
    outcomes: list[str] = []
    tokens = iter([token_for(1), None, token_for(60)])

    client = Client(server.url("/me"), auth=lambda force: next(tokens), **QUICK_DIALS)
    client.on_close(lambda code, reason: closes.append(code))
    client.on_open(outcomes.append)
    async with client:
        await until(lambda: outcomes[1:])
    assert closes == [4401]
    assert outcomes == ["none", "full"]


# ── revocation ──


@pytest.mark.parametrize("how", ["revoke", "disconnect"])
async def test_python_client_does_not_reconnect_after_4410(server: LiveServer, how: str) -> None:
    """After a revocation or a disconnect with 4410 the client does not reconnect, its session ends, and calls fail."""
    dials: list[bool] = []

    def auth(force: bool) -> str:
        dials.append(force)
        return "ann"

    async with Client(server.url("/me"), auth=auth, **QUICK_DIALS) as client:
        await asyncio.to_thread(server.post, f"/{how}/ann")
        await until(lambda: client.state == "closed")
        with pytest.raises(ClientClosedError) as closed:
            client.send("more")
        assert closed.value.code == 4410
        await asyncio.sleep(1)
        assert dials == [False]
        assert server.get("/sessions") == {"sessions": 0, "away": 0, "connections": 0}


async def test_revocation_closes_every_connection_of_client(server: LiveServer) -> None:
    """Plain and session clients get 4410, a detached session ends, and other clients are not affected."""
    bearer = {"Authorization": "Bearer ann"}
    async with (
        connect(server.url("/me"), additional_headers=bearer) as plain,
        connect(server.url("/me"), additional_headers={"Authorization": "Bearer bob"}) as other,
    ):
        numbered = await connect(server.url("/me"), subprotocols=[Subprotocol(SUBPROTOCOL)])
        await numbered.send(json.dumps({"type": "hello", "v": 1, "n": 1, "auth": "ann"}))
        token = json.loads(await numbered.recv())["token"]
        numbered.transport.abort()
        await until(lambda: server.get("/sessions")["away"] == 1)
        assert await asyncio.to_thread(server.post, "/revoke/ann") == 2
        assert await received_close(plain) == (4410, "revoked")
        assert server.get("/sessions") == {"sessions": 0, "away": 0, "connections": 1}
        async with connect(server.url("/me"), subprotocols=[Subprotocol(SUBPROTOCOL)]) as again:
            resume = {"token": token, "seq": 0}
            await again.send(json.dumps({"type": "hello", "v": 1, "n": 2, "auth": "ann", "resume": resume}))
            assert await received_close(again) == (4410, "revoked")  # the detached client reads the code on its return
        async with connect(server.url("/me"), subprotocols=[Subprotocol(SUBPROTOCOL)]) as anew:
            await anew.send(json.dumps({"type": "hello", "v": 1, "n": 3, "auth": "ann"}))
            assert json.loads(await anew.recv())["resume"] == "none"
        assert await other.recv() == "bob"
        await other.send("still here")
        assert await other.recv() == "still here"


async def test_revocation_invalidates_earlier_tokens_and_tickets(server: LiveServer) -> None:
    """Tokens and tickets from before a revocation are invalid, but later ones are valid."""

    async def is_accepted(path: str) -> bool:
        try:
            async with connect(server.url(path)) as client:
                await asyncio.wait_for(client.recv(), 5)
                return True
        except (InvalidStatus, ConnectionClosed):
            return False

    old = server.post("/ticket/carol"), server.post("/token/carol")
    server.post("/revoke/carol")
    new = server.post("/ticket/carol"), server.post("/token/carol")
    assert [await is_accepted(f"/ticket?ticket={one[0]}") for one in (old, new)] == [False, True]
    assert await is_accepted(f"/adopt/x?token={new[1]}")
    assert not await is_accepted(f"/adopt/x?token={old[1]}")


# ── HTTP middleware ──


@pytest.mark.parametrize("kind", KINDS)
async def test_http_middleware_does_not_block_sockets(serve: Callable[..., LiveServer], kind: str) -> None:
    """At the start a warning names the socket that is open; a socket with an identity rejects clients itself."""
    server = serve(kind, app=APP, config=CONFIG, env={"TEST_DENY_ALL": "1"})
    (warning,) = [line for line in server.log.splitlines() if "D17" in line]
    assert "WARNING" in warning
    assert "/open/{client_id}" in warning
    assert "/me" not in warning
    async with connect(server.url("/open/stranger")) as client:
        assert (await received_close(client))[0] == 1000
    assert "open stranger" in server.get("/notes")
    with pytest.raises(InvalidStatus) as refused:
        await connect(server.url("/me"))
    assert refused.value.response.status_code == 401
    origin = f"http://127.0.0.1:{server.port}"
    async with connect(server.url("/me"), origin=origin) as page:  # type: ignore[arg-type]
        assert (await received_close(page))[0] == 4401
    assert not any(str(note).startswith("ran") for note in server.get("/notes"))
