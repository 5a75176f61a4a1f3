"""Tests of credential sources: one dependency for HTTP routes and sockets."""

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
from fastapi_ws_stabilizer.auth.signed_tokens import RECONNECT_TOKEN, SignedTokens

TOKEN = "eyJhbGciOi.J9.x-_~+/="
V1 = "stabilizer.v1.json"


def offered(credential: str) -> str:
    """Return the subprotocol that carries a credential."""
    return "stabilizer.auth." + base64.urlsafe_b64encode(credential.encode()).decode().rstrip("=")


def connection(
    *headers: tuple[str, str],
    query: str = "",
    subprotocols: list[str] | None = None,
    kind: str = "websocket",
    **more: Any,
) -> HTTPConnection:
    """Return a connection as a server creates it."""
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
    """Handshake that has this credential in its first message."""

    def __init__(self, credential: str | None) -> None:
        self._credential = credential
        self.asked = 0

    async def credential(self) -> str | None:
        """Return the credential of the first message."""
        self.asked += 1
        await asyncio.sleep(0)
        return self._credential


# ── one dependency for both kinds of routes ──

FOUR = Credential(bearer(), cookie("session"), query("token"), subprotocol("bearer"))
USERS = {TOKEN: "ann"}


async def current_user(token: str = Depends(FOUR)) -> str:
    """Return the user of a token, as an application does."""
    if token not in USERS:
        raise HTTPException(401, "log in again")
    return USERS[token]


async def optional_user(token: str | None = Depends(Credential(bearer(), required=False))) -> str:
    """Return an optional credential."""
    return token or "anonymous"


app = FastAPI()


@app.get("/me")
async def me(user: str = Depends(current_user)) -> str:
    """Serve HTTP."""
    return user


@app.websocket("/ws")
async def socket(websocket: WebSocket, user: str = Depends(current_user)) -> None:
    """Serve a socket, and select the marker of the credential."""
    await websocket.accept(websocket.scope.get(SUBPROTOCOL_KEY))
    await websocket.send_text(user)
    await websocket.close()


@app.get("/perhaps")
async def optional_me(user: str = Depends(optional_user)) -> str:
    """Serve HTTP without a required credential."""
    return user


@app.websocket("/perhaps")
async def optional_socket(websocket: WebSocket, user: str = Depends(optional_user)) -> None:
    """Serve a socket without a required credential."""
    await websocket.accept()
    await websocket.send_text(user)
    await websocket.close()


@pytest.fixture
def client() -> Iterator[TestClient]:
    """Yield a client of the app."""
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
    """A header, a cookie or a query parameter is found on HTTP routes and on sockets."""
    assert client.get(f"/me{query}", headers=headers).json() == "ann"
    with client.websocket_connect(f"/ws{query}", headers=headers) as ws:
        assert ws.receive_text() == "ann"
        assert ws.accepted_subprotocol is None


def test_marked_subprotocol_is_answered_with_marker_only(client: TestClient) -> None:
    """The handshake is answered with the marker, never with the secret."""
    with client.websocket_connect("/ws", subprotocols=["bearer", TOKEN]) as ws:
        assert ws.receive_text() == "ann"
        assert ws.accepted_subprotocol == "bearer"


def test_credential_subprotocol_is_never_selected(client: TestClient) -> None:
    """A `stabilizer.auth.` subprotocol is never selected."""
    with client.websocket_connect("/ws", subprotocols=[offered(TOKEN)]) as ws:
        assert ws.receive_text() == "ann"
        assert ws.accepted_subprotocol is None


def test_offered_marker_is_selected_with_credential_elsewhere(client: TestClient) -> None:
    """An offered marker is selected although a cookie is used, because a browser fails without a subprotocol."""
    headers = {"Cookie": f"session={TOKEN}"}
    with client.websocket_connect("/ws", subprotocols=["bearer", "x"], headers=headers) as ws:
        assert ws.receive_text() == "ann"
        assert ws.accepted_subprotocol == "bearer"


def test_missing_credential_is_rejected_with_401(client: TestClient) -> None:
    """A missing credential gets 401, with all sources in the detail and `WWW-Authenticate` for a bearer source."""
    answer = client.get("/me")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    for source in ("Authorization: Bearer", "'session'", "'token'", "`bearer, ...`"):
        assert source in answer.json()["detail"]


def test_optional_credential_may_be_missing(client: TestClient) -> None:
    """An optional credential is None if it is missing, on both kinds of routes."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert client.get("/perhaps").json() == "anonymous"
    assert client.get("/perhaps", headers=headers).json() == TOKEN
    for sent, expected in (({}, "anonymous"), (headers, TOKEN)):
        with client.websocket_connect("/perhaps", headers=sent) as ws:
            assert ws.receive_text() == expected


@pytest.mark.parametrize("source", [cookie("session"), query("token"), subprotocol("bearer"), first_message()], ids=str)
async def test_www_authenticate_is_sent_only_for_bearer_source(source: CredentialSource) -> None:
    """`WWW-Authenticate: Bearer` is sent only if a bearer token is a source."""
    for kind in ("http", "websocket"):
        with pytest.raises(HTTPException) as missing:
            await Credential(source)(connection(kind=kind))
        assert (missing.value.status_code, missing.value.headers) == (401, None)
        assert str(source) in missing.value.detail


# ── bearer ──


@pytest.mark.parametrize("value", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER   {TOKEN}", f"Bearer {TOKEN} "])
async def test_bearer_token_ignores_scheme_case_and_spaces(value: str) -> None:
    """A bearer token ignores the case of its scheme and spaces around the token."""
    assert await Credential(bearer())(connection(("authorization", value))) == TOKEN


@pytest.mark.parametrize(
    "value",
    [
        *("", "Bearer", "Bearer ", TOKEN, f"Bearer{TOKEN}", f"Basic {TOKEN}", f"XBearer {TOKEN}", f"Bearer\t{TOKEN}"),
        *("Bearer a b", "Bearer a, Bearer b", "Bearer a\u00a0b", "Bearer \u00e9", "Bearer a\nb", "Bearer a\n"),
    ],
)
async def test_invalid_bearer_header_is_ignored(value: str) -> None:
    """A header with another scheme, no token or several tokens is ignored."""
    assert await Credential(bearer(), required=False)(connection(("authorization", value))) is None


async def test_repeated_authorization_header_is_ignored() -> None:
    """A repeated header is ignored, because a proxy may have checked the other one."""
    twice = connection(("authorization", "Bearer a"), ("authorization", "Bearer b"))
    assert await Credential(bearer(), required=False)(twice) is None


# ── query and cookie ──


@pytest.mark.parametrize("query_string", ["", "token=", "token", "Token=a", "token=a&token=b", "x=a"])
async def test_repeated_or_empty_query_parameter_is_ignored(query_string: str) -> None:
    """A repeated or empty query parameter is ignored, because it is ambiguous or no credential."""
    assert await Credential(query("token"), required=False)(connection(query=query_string)) is None


async def test_reconnect_token_in_query_is_ignored() -> None:
    """A reconnect token in `?token=` is ignored, and a credential beside it is found."""
    token = SignedTokens(RECONNECT_TOKEN, [], 60).issue("ann")
    find = Credential(query("token"), required=False)
    assert await find(connection(query=f"token={token}")) is None
    assert await find(connection(query=f"token=mine&token={token}")) == "mine"


@pytest.mark.parametrize("value", ["", "session=", "other=a", "Session=a"])
async def test_missing_or_empty_cookie_is_ignored(value: str) -> None:
    """A missing, empty or other cookie is ignored."""
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
    """A credential follows `stabilizer.auth.` or a marker; an offered marker is selected, the credential never."""
    one = connection(subprotocols=offer)
    assert await Credential(subprotocol("bearer"), required=False)(one) == found
    assert one.scope.get(SUBPROTOCOL_KEY) == selected


async def test_unconfigured_marker_carries_no_credential() -> None:
    """A value after a marker that is not configured is no credential."""
    find = Credential(subprotocol(), required=False)
    assert await find(connection(subprotocols=["bearer", TOKEN])) is None
    assert await find(connection(subprotocols=[offered(TOKEN)])) == TOKEN


async def test_subprotocol_source_is_empty_on_http_request() -> None:
    """A subprotocol source finds nothing in an HTTP request."""
    request = connection(kind="http")
    assert await Credential(subprotocol("bearer"), required=False)(request) is None
    assert SUBPROTOCOL_KEY not in request.scope


async def test_first_requested_marker_is_selected() -> None:
    """A later dependency does not change the selected marker."""
    one = connection(subprotocols=["token", "x", "bearer", "y"])
    assert await Credential(subprotocol("bearer"))(one) == "y"
    assert await Credential(subprotocol("token"))(one) == "x"
    assert one.scope[SUBPROTOCOL_KEY] == "bearer"


@pytest.mark.parametrize("marker", ["", "two words", "a,b", "ä", V1, "stabilizer.auth.x"])
def test_invalid_subprotocol_marker_raises(marker: str) -> None:
    """A marker is a valid subprotocol name, and names of the library raise."""
    with pytest.raises(ValueError, match="cannot mark a credential"):
        subprotocol(marker)


# ── first message ──


async def test_first_message_is_read_only_without_other_credential() -> None:
    """The first message is the last source in any order, because reading it accepts the socket."""
    fake_handshake = FakeHandshake("from the hello")
    find = Credential(first_message(), bearer())
    assert await find(connection(("authorization", "Bearer x"), **{HANDSHAKE_SCOPE_KEY: fake_handshake})) == "x"
    assert fake_handshake.asked == 0
    assert await find(connection(**{HANDSHAKE_SCOPE_KEY: fake_handshake})) == "from the hello"
    assert fake_handshake.asked == 1


@pytest.mark.parametrize("credential", [None, "", "x" * (MAX_CREDENTIAL_BYTES + 1)])
async def test_first_message_without_credential_raises(credential: str | None) -> None:
    """A plain client, and a hello without a usable credential, has no credential."""
    with pytest.raises(HTTPException):
        await Credential(first_message())(connection(**{HANDSHAKE_SCOPE_KEY: FakeHandshake(credential)}))


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_first_message_is_none_outside_handshake(kind: str) -> None:
    """On an HTTP route, and on a socket of another library, the first message is None at once."""
    assert await Credential(first_message(), required=False)(connection(kind=kind)) is None


async def test_unreadable_first_message_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """A socket without a handshake is reported once: its dependency runs too early, or the library does not own it."""
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


# ── all sources ──


def all_sources(credential: str) -> Iterator[tuple[Credential, HTTPConnection]]:
    """Yield the same credential in each source."""
    yield Credential(bearer(), required=False), connection(("authorization", f"Bearer {credential}"))
    yield Credential(cookie("c"), required=False), connection(("cookie", f"c={credential}"))
    yield Credential(query("q"), required=False), connection(query=f"q={credential}")
    yield Credential(subprotocol(), required=False), connection(subprotocols=[offered(credential)])
    yield Credential(subprotocol("m"), required=False), connection(subprotocols=["m", credential])
    yield Credential(first_message(), required=False), connection(**{HANDSHAKE_SCOPE_KEY: FakeHandshake(credential)})


async def test_credential_over_8_kib_is_ignored() -> None:
    """The limit is the same for each source."""
    for find, one in all_sources("x" * MAX_CREDENTIAL_BYTES):
        assert await find(one) == "x" * MAX_CREDENTIAL_BYTES, repr(find)
    for find, one in all_sources("x" * (MAX_CREDENTIAL_BYTES + 1)):
        assert await find(one) is None, repr(find)
    wide = connection(subprotocols=[offered("ä" * (MAX_CREDENTIAL_BYTES // 2 + 1))])
    assert await Credential(subprotocol(), required=False)(wide) is None


async def test_credential_sources_are_tried_in_order() -> None:
    """The first source with a credential is used, and a too long or empty one is skipped."""
    both = connection(("authorization", "Bearer a"), ("cookie", "c=b"))
    assert await Credential(bearer(), cookie("c"))(both) == "a"
    assert await Credential(cookie("c"), bearer())(both) == "b"
    long = connection(("authorization", "Bearer " + "x" * 9000), ("cookie", "c=b"))
    assert await Credential(bearer(), cookie("c"))(long) == "b"


async def test_custom_credential_source_is_used() -> None:
    """Any object with `find` can be a source."""

    class Header:
        def find(self, connection: HTTPConnection) -> str | None:
            return connection.headers.get("x-api-key")

        def __str__(self) -> str:
            return "the header `X-Api-Key`"

    assert await Credential(Header())(connection(("x-api-key", "k"))) == "k"
    with pytest.raises(HTTPException, match="X-Api-Key"):
        await Credential(Header())(connection())


def test_credential_without_source_raises() -> None:
    """A credential without a source raises at once."""
    with pytest.raises(TypeError, match="at least one source"):
        Credential()


async def test_credential_is_in_no_repr_log_or_error(caplog: pytest.LogCaptureFixture) -> None:
    """A found credential is in no repr, log or error."""
    with caplog.at_level(logging.DEBUG):
        for find, one in all_sources(TOKEN):
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
    """No request of a client is a server error: a credential is found or not."""
    one = connection(*headers, subprotocols=subprotocols, query=query_string)
    find = Credential(bearer(), cookie("c"), query("q"), subprotocol("m"), first_message(), required=False)
    assert isinstance(await find(one), (str, type(None)))
