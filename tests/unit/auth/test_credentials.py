"""Tests of where a credential is found: the same dependency, on HTTP routes and on sockets."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient

from fastapi_ws_stabilizer.auth import Credential, bearer, cookie, first_message, query, subprotocol
from fastapi_ws_stabilizer.auth.credentials import (
    HANDSHAKE_SCOPE_KEY,
    MAX_CREDENTIAL_BYTES,
    SUBPROTOCOL_KEY,
    CredentialSource,
)
from fastapi_ws_stabilizer.auth.signed_tokens import ReconnectTokens

TOKEN = "eyJhbGciOi.J9.x-_~+/="
V1 = "stabilizer.v1.json"


def offered(credential: str) -> str:
    """A credential as the subprotocol that carries it."""
    return "stabilizer.auth." + base64.urlsafe_b64encode(credential.encode()).decode().rstrip("=")


def connection(
    *headers: tuple[str, str],
    query: str = "",
    subprotocols: list[str] | None = None,
    kind: str = "websocket",
    **more: Any,
) -> HTTPConnection:
    """A connection as a server hands it over."""
    scope: dict[str, Any] = {
        "type": kind,
        "path": "/",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        **more,
    }
    if kind == "websocket":
        scope["subprotocols"] = subprotocols or []
    return HTTPConnection(scope)


class FakeHandshake:
    """A door whose client says this in its first message."""

    def __init__(self, credential: str | None) -> None:
        self._credential = credential
        self.asked = 0

    async def credential(self) -> str | None:
        """What the client has said."""
        self.asked += 1
        await asyncio.sleep(0)
        return self._credential


# ── one dependency, two kinds of routes ──

FOUR = Credential(bearer(), cookie("session"), query("token"), subprotocol("bearer"))
USERS = {TOKEN: "ann"}


async def current_user(token: str = Depends(FOUR)) -> str:
    """What an application writes once."""
    if token not in USERS:
        raise HTTPException(401, "log in again")
    return USERS[token]


async def perhaps(token: str | None = Depends(Credential(bearer(), required=False))) -> str:
    """A credential that may be missing."""
    return token or "nobody"


app = FastAPI()


@app.get("/me")
async def me(user: str = Depends(current_user)) -> str:
    """An HTTP route."""
    return user


@app.websocket("/ws")
async def socket(websocket: WebSocket, user: str = Depends(current_user)) -> None:
    """A socket, which selects what the credential's place says."""
    await websocket.accept(websocket.scope.get(SUBPROTOCOL_KEY))
    await websocket.send_text(user)
    await websocket.close()


@app.get("/perhaps")
async def perhaps_me(user: str = Depends(perhaps)) -> str:
    """An HTTP route for everybody."""
    return user


@app.websocket("/perhaps")
async def perhaps_socket(websocket: WebSocket, user: str = Depends(perhaps)) -> None:
    """A socket for everybody."""
    await websocket.accept()
    await websocket.send_text(user)
    await websocket.close()


@pytest.fixture
def client() -> Iterator[TestClient]:
    """A client of the app."""
    with TestClient(app) as client:
        yield client


SOURCES: list[tuple[dict[str, str], str]] = [
    ({"Authorization": f"Bearer {TOKEN}"}, ""),
    ({"Cookie": f"session={TOKEN}"}, ""),
    ({}, "?token=eyJhbGciOi.J9.x-_~%2B/%3D"),
]


@pytest.mark.parametrize(("headers", "query"), SOURCES, ids=["bearer", "cookie", "query"])
def test_credential_is_found_on_http_routes_and_sockets(
    client: TestClient, headers: dict[str, str], query: str
) -> None:
    """A header, a cookie or a query parameter is found on an HTTP route and on a socket alike."""
    assert client.get(f"/me{query}", headers=headers).json() == "ann"
    with client.websocket_connect(f"/ws{query}", headers=headers) as ws:
        assert ws.receive_text() == "ann"
        assert ws.accepted_subprotocol is None


def test_marked_subprotocol_is_answered_with_marker_only(client: TestClient) -> None:
    """A socket is told who it is, and its handshake is answered with the marker and never with the secret."""
    with client.websocket_connect("/ws", subprotocols=["bearer", TOKEN]) as ws:
        assert ws.receive_text() == "ann"
        assert ws.accepted_subprotocol == "bearer"


def test_credential_subprotocol_is_never_selected(client: TestClient) -> None:
    """`stabilizer.auth.` selects nothing by itself."""
    with client.websocket_connect("/ws", subprotocols=[offered(TOKEN)]) as ws:
        assert ws.receive_text() == "ann"
        assert ws.accepted_subprotocol is None


def test_offered_marker_is_selected_with_credential_elsewhere(client: TestClient) -> None:
    """A browser that sends a cookie by itself, and offers subprotocols, gives up if none of them is selected."""
    headers = {"Cookie": f"session={TOKEN}"}
    with client.websocket_connect("/ws", subprotocols=["bearer", "x"], headers=headers) as ws:
        assert ws.receive_text() == "ann"
        assert ws.accepted_subprotocol == "bearer"


def test_missing_credential_is_rejected_with_401(client: TestClient) -> None:
    """HTTP gets 401, with the scheme where a bearer token is wanted, and all places."""
    answer = client.get("/me")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    for source in ("Authorization: Bearer", "'session'", "'token'", "`bearer, ...`"):
        assert source in answer.json()["detail"]


def test_optional_credential_may_be_missing(client: TestClient) -> None:
    """Then there is `None`, on either kind of route, and what is there is found."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert client.get("/perhaps").json() == "nobody"
    assert client.get("/perhaps", headers=headers).json() == TOKEN
    for sent, said in (({}, "nobody"), (headers, TOKEN)):
        with client.websocket_connect("/perhaps", headers=sent) as ws:
            assert ws.receive_text() == said


@pytest.mark.parametrize("source", [cookie("session"), query("token"), subprotocol("bearer"), first_message()], ids=str)
async def test_www_authenticate_is_sent_only_for_bearer_source(source: CredentialSource) -> None:
    """`WWW-Authenticate: Bearer` would be a lie elsewhere."""
    for kind in ("http", "websocket"):
        with pytest.raises(HTTPException) as missing:
            await Credential(source)(connection(kind=kind))
        assert (missing.value.status_code, missing.value.headers) == (401, None)
        assert str(source) in missing.value.detail


# ── bearer ──


@pytest.mark.parametrize("value", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER   {TOKEN}", f"Bearer {TOKEN} "])
async def test_bearer_token_ignores_scheme_case_and_spaces(value: str) -> None:
    """The scheme's case does not matter, nor do spaces around the token."""
    assert await Credential(bearer())(connection(("authorization", value))) == TOKEN


@pytest.mark.parametrize(
    "value",
    [
        *("", "Bearer", "Bearer ", TOKEN, f"Bearer{TOKEN}", f"Basic {TOKEN}", f"XBearer {TOKEN}", f"Bearer\t{TOKEN}"),
        *("Bearer a b", "Bearer a, Bearer b", "Bearer a\u00a0b", "Bearer \u00e9", "Bearer a\nb", "Bearer a\n"),
    ],
)
async def test_invalid_bearer_header_is_ignored(value: str) -> None:
    """Another scheme, no token, or more than one."""
    assert await Credential(bearer(), required=False)(connection(("authorization", value))) is None


async def test_repeated_authorization_header_is_ignored() -> None:
    """A proxy may have looked at the other one."""
    twice = connection(("authorization", "Bearer a"), ("authorization", "Bearer b"))
    assert await Credential(bearer(), required=False)(twice) is None


# ── query and cookie ──


@pytest.mark.parametrize("query_string", ["", "token=", "token", "Token=a", "token=a&token=b", "x=a"])
async def test_repeated_or_empty_query_parameter_is_ignored(query_string: str) -> None:
    """Which of two was meant nobody can tell, and an empty one is none."""
    assert await Credential(query("token"), required=False)(connection(query=query_string)) is None


async def test_reconnect_token_in_query_is_ignored() -> None:
    """`?token=` is where a plain client that comes back presents one; a credential may stand beside it."""
    token = ReconnectTokens([], 60).issue("ann")
    find = Credential(query("token"), required=False)
    assert await find(connection(query=f"token={token}")) is None
    assert await find(connection(query=f"token=mine&token={token}")) == "mine"


@pytest.mark.parametrize("value", ["", "session=", "other=a", "Session=a"])
async def test_missing_or_empty_cookie_is_ignored(value: str) -> None:
    """It is missing, empty or another one."""
    assert await Credential(cookie("session"), required=False)(connection(("cookie", value))) is None


# ── subprotocols ──


@pytest.mark.parametrize(
    ("offer", "found", "selected"),
    [
        (["bearer", TOKEN], TOKEN, "bearer"),
        ([V1, "bearer", TOKEN], TOKEN, "bearer"),
        (["bearer", TOKEN, V1], TOKEN, "bearer"),
        ([V1, offered("ä")], "ä", None),
        (["bearer", "x", offered("y")], "y", "bearer"),
        (["bearer", V1], None, "bearer"),
        (["bearer", offered("y")], "y", "bearer"),
        (["bearer", "stabilizer.auth.!"], None, "bearer"),
        (["bearer"], None, "bearer"),
        (["Bearer", TOKEN], None, None),
        (["stabilizer.auth."], None, None),
        ([TOKEN], None, None),
        ([], None, None),
    ],
)
async def test_subprotocol_carries_credential_and_selects_marker(
    offer: list[str], found: str | None, selected: str | None
) -> None:
    """Either as ours or behind a marker; the marker is selected wherever it is offered, the credential never."""
    one = connection(subprotocols=offer)
    assert await Credential(subprotocol("bearer"), required=False)(one) == found
    assert one.scope.get(SUBPROTOCOL_KEY) == selected


async def test_unconfigured_marker_carries_no_credential() -> None:
    """What stands behind a word that nobody has agreed on is no credential."""
    find = Credential(subprotocol(), required=False)
    assert await find(connection(subprotocols=["bearer", TOKEN])) is None
    assert await find(connection(subprotocols=[offered(TOKEN)])) == TOKEN


async def test_subprotocol_source_is_empty_on_http_request() -> None:
    """Such a place is as good as empty there."""
    request = connection(kind="http")
    assert await Credential(subprotocol("bearer"), required=False)(request) is None
    assert SUBPROTOCOL_KEY not in request.scope


async def test_first_requested_marker_is_selected() -> None:
    """A dependency that runs later does not change what was chosen."""
    one = connection(subprotocols=["token", "x", "bearer", "y"])
    assert await Credential(subprotocol("bearer"))(one) == "y"
    assert await Credential(subprotocol("token"))(one) == "x"
    assert one.scope[SUBPROTOCOL_KEY] == "bearer"


@pytest.mark.parametrize("marker", ["", "two words", "a,b", "ä", V1, "stabilizer.auth.x"])
def test_invalid_subprotocol_marker_raises(marker: str) -> None:
    """A subprotocol is a word, and ours mean something else."""
    with pytest.raises(ValueError, match="cannot mark a credential"):
        subprotocol(marker)


# ── the first message ──


async def test_first_message_is_read_only_without_other_credential() -> None:
    """Wherever it stands among the places, it is tried last: to hear it, the socket is accepted."""
    fake_handshake = FakeHandshake("from the hello")
    find = Credential(first_message(), bearer())
    assert await find(connection(("authorization", "Bearer x"), **{HANDSHAKE_SCOPE_KEY: fake_handshake})) == "x"
    assert fake_handshake.asked == 0
    assert await find(connection(**{HANDSHAKE_SCOPE_KEY: fake_handshake})) == "from the hello"
    assert fake_handshake.asked == 1


@pytest.mark.parametrize("said", [None, "", "x" * (MAX_CREDENTIAL_BYTES + 1)])
async def test_first_message_without_credential_raises(said: str | None) -> None:
    """A plain client, or a hello without a credential, is one that has none."""
    with pytest.raises(HTTPException):
        await Credential(first_message())(connection(**{HANDSHAKE_SCOPE_KEY: FakeHandshake(said)}))


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_first_message_is_none_outside_handshake(kind: str) -> None:
    """On an HTTP route, and on a socket that this library does not serve, nobody waits for it."""
    assert await Credential(first_message(), required=False)(connection(kind=kind)) is None


async def test_unreadable_first_message_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """A socket without a door is asked before its own, or is none of this library's; an HTTP request has none."""
    find = Credential(first_message(), required=False)
    with caplog.at_level(logging.WARNING, "fastapi_ws_stabilizer"):
        await find(connection(kind="http"))
        await find(connection(**{HANDSHAKE_SCOPE_KEY: FakeHandshake(None)}))
        assert caplog.records == []
        for _ in range(3):
            await find(connection())
    (record,) = caplog.records
    assert record.event == "first_message_not_heard"  # type: ignore[attr-defined]
    assert "put the socket first" in record.message


# ── all of them ──


def everywhere(credential: str) -> Iterator[tuple[Credential, HTTPConnection]]:
    """The same credential in each of the places."""
    yield Credential(bearer(), required=False), connection(("authorization", f"Bearer {credential}"))
    yield Credential(cookie("c"), required=False), connection(("cookie", f"c={credential}"))
    yield Credential(query("q"), required=False), connection(query=f"q={credential}")
    yield Credential(subprotocol(), required=False), connection(subprotocols=[offered(credential)])
    yield Credential(subprotocol("m"), required=False), connection(subprotocols=["m", credential])
    yield Credential(first_message(), required=False), connection(**{HANDSHAKE_SCOPE_KEY: FakeHandshake(credential)})


async def test_credential_over_8_kib_is_ignored() -> None:
    """In whatever place it is, the limit is the same."""
    for find, one in everywhere("x" * MAX_CREDENTIAL_BYTES):
        assert await find(one) == "x" * MAX_CREDENTIAL_BYTES, repr(find)
    for find, one in everywhere("x" * (MAX_CREDENTIAL_BYTES + 1)):
        assert await find(one) is None, repr(find)
    wide = connection(subprotocols=[offered("ä" * (MAX_CREDENTIAL_BYTES // 2 + 1))])
    assert await Credential(subprotocol(), required=False)(wide) is None


async def test_credential_sources_are_tried_in_order() -> None:
    """The first place that has one wins; one that is too long, or empty, is passed over."""
    both = connection(("authorization", "Bearer a"), ("cookie", "c=b"))
    assert await Credential(bearer(), cookie("c"))(both) == "a"
    assert await Credential(cookie("c"), bearer())(both) == "b"
    long = connection(("authorization", "Bearer " + "x" * 9000), ("cookie", "c=b"))
    assert await Credential(bearer(), cookie("c"))(long) == "b"


async def test_custom_credential_source_is_used() -> None:
    """Whatever has `find` can be given."""

    class Header:
        def find(self, connection: HTTPConnection) -> str | None:
            return connection.headers.get("x-api-key")

        def __str__(self) -> str:
            return "the header `X-Api-Key`"

    assert await Credential(Header())(connection(("x-api-key", "k"))) == "k"
    with pytest.raises(HTTPException, match="X-Api-Key"):
        await Credential(Header())(connection())


def test_credential_without_source_raises() -> None:
    """Looking nowhere is a mistake that is told at once."""
    with pytest.raises(TypeError, match="at least one source"):
        Credential()


async def test_credential_is_in_no_repr_log_or_error(caplog: pytest.LogCaptureFixture) -> None:
    """What was found is told to nobody but who has asked."""
    with caplog.at_level(logging.DEBUG):
        for find, one in everywhere(TOKEN):
            assert await find(one) is not None
            assert TOKEN not in repr(find)
        with pytest.raises(HTTPException) as missing:
            await Credential(bearer())(connection(("authorization", f"Basic {TOKEN}"), query=f"token={TOKEN}"))
    assert TOKEN not in f"{missing.value!r} {missing.value} {missing.value.detail} {caplog.text}"


@given(
    headers=st.lists(
        st.tuples(st.sampled_from(["authorization", "cookie"]), st.text('Bearer\x00=;é "\\,%sc')), max_size=3
    ),
    query_string=st.text(max_size=20),
    subprotocols=st.lists(st.one_of(st.text(max_size=20), st.text(max_size=20).map("stabilizer.auth.".__add__))),
)
async def test_arbitrary_request_raises_nothing(
    headers: list[tuple[str, str]], query_string: str, subprotocols: list[str]
) -> None:
    """A credential is found or not: nothing that a stranger sends is an error of the server."""
    one = connection(*headers, subprotocols=subprotocols, query=query_string)
    find = Credential(bearer(), cookie("c"), query("q"), subprotocol("m"), first_message(), required=False)
    assert isinstance(await find(one), (str, type(None)))
