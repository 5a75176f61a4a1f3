"""Tests of the client id of a connection, and of the expiry of its identity."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import pytest
from fastapi import HTTPException

from fastapi_ws_stabilizer.handshake import client_id as identity_module
from fastapi_ws_stabilizer.handshake.client_id import (
    MAX_TERM,
    client_id_from_identity,
    client_id_from_request,
    fresh_client_id,
    seconds_until_expiry,
)
from tests.support.fake_websocket import FakeServer


@pytest.mark.parametrize(
    ("path_params", "query", "expected"),
    [
        ({"client_id": "ann"}, "", "ann"),
        ({"client_id": "ann"}, "client_id=bob", "ann"),
        ({"client_id": 7}, "", "7"),
        ({}, "client_id=bob", "bob"),
        ({}, "client_id=a.b%40c", "a.b@c"),
    ],
)
def test_client_id_from_path_precedes_query(path_params: Any, query: str, expected: str) -> None:
    """The path parameter precedes the query parameter, and any text is an id."""
    assert client_id_from_request(FakeServer(query=query, path_params=path_params).websocket) == expected


@pytest.mark.parametrize(("path_params", "query"), [({}, ""), ({}, "client_id="), ({"client_id": ""}, "")])
def test_missing_or_empty_client_id_is_none(path_params: Any, query: str) -> None:
    """Without an id in the path or the query the client id is None."""
    assert client_id_from_request(FakeServer(query=query, path_params=path_params).websocket) is None


@pytest.mark.parametrize("client_id", ["x" * 200, "🦊", "ann@example.com", "a.b.c", "x" * 256, "日本", "a b"])
def test_printable_client_id_is_accepted(client_id: str) -> None:
    """Email addresses, emoji, dots and up to 256 characters are accepted."""
    assert client_id_from_request(FakeServer(path_params={"client_id": client_id}).websocket) == client_id
    assert client_id_from_request(FakeServer(query=urlencode({"client_id": client_id})).websocket) == client_id


@pytest.mark.parametrize(
    "client_id",
    ["x" * 257, "x" * (1 << 20), "\r\n[ERROR] fake", "a\x00", "\x1b[2J", "a\x9bm", "a\u2028b"],
    ids=lambda client_id: ascii(client_id[:12]),
)
def test_invalid_client_id_is_rejected_with_400(client_id: str) -> None:
    """A client id with a control character, or above 256 characters, is rejected with 400 before accept."""
    for websocket in (
        FakeServer(path_params={"client_id": client_id}).websocket,
        FakeServer(query=urlencode({"client_id": client_id})).websocket,
    ):
        with pytest.raises(HTTPException) as rejected:
            client_id_from_request(websocket)
        assert rejected.value.status_code == 400
        assert rejected.value.detail == "client_id: at most 256 characters and no control characters"


def test_fresh_client_ids_are_unique() -> None:
    """A client without an id gets a unique one."""
    first, second = fresh_client_id(), fresh_client_id()
    assert first != second
    assert len(first) == 32


@pytest.mark.parametrize(
    ("identity", "expected"), [("ann", "ann"), (7, "7"), (0, "0"), (UUID(int=1), str(UUID(int=1)))]
)
def test_simple_identity_is_its_own_client_id(identity: Any, expected: str) -> None:
    """Identities of type `str`, `int` and `UUID` need no key."""
    assert client_id_from_identity(identity, None) == expected


def test_key_selects_client_id_from_identity() -> None:
    """With a key any object can be the identity."""
    assert client_id_from_identity(SimpleNamespace(id=7), lambda user: user.id) == "7"


INVALID_NAMES = ["\ud800", "a\nb", "x" * 257, "\x1b[2J", "a\u2028b", 10**300]


@pytest.mark.parametrize("identity", INVALID_NAMES, ids=lambda identity: ascii(identity)[:12])
def test_invalid_identity_name_is_rejected_with_401(identity: Any) -> None:
    """A client id from a credential follows the rules of all client ids, with or without a key; else it gets 401."""
    for value, key in ((identity, None), (SimpleNamespace(id=identity), lambda user: user.id)):
        with pytest.raises(HTTPException) as rejected:
            client_id_from_identity(value, key)
        assert (rejected.value.status_code, "at most 256 characters" in rejected.value.detail) == (401, True)


@pytest.mark.parametrize("identity", [None, True, "", 1.5, SimpleNamespace(id=7)], ids=repr)
def test_unsupported_identity_raises_type_error(identity: Any) -> None:
    """An identity without a key is a non-empty `str`, an `int` or a `UUID`, and any other value raises."""
    with pytest.raises(TypeError, match=r"key=lambda identity: identity\.id"):
        client_id_from_identity(identity, None)


@pytest.mark.parametrize("chosen", [None, True, "", object()], ids=["None", "True", "empty", "object"])
def test_unsupported_key_result_raises_type_error(chosen: Any) -> None:
    """The result of a key is checked like an identity."""
    with pytest.raises(TypeError, match=r"the key of manager\.socket_for"):
        client_id_from_identity("ann", lambda _: chosen)


# ── expiry ──


NOW = 1_800_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freeze the wall clock."""
    monkeypatch.setattr(identity_module, "wall", lambda: NOW)


@pytest.mark.parametrize(
    ("moment", "seconds"),
    [
        (None, None),
        (NOW + 60, 60.0),
        (int(NOW) + 2, 2.0),
        (datetime.fromtimestamp(NOW + 60, tz=timezone.utc), 60.0),
        (datetime.fromtimestamp(NOW + 60, tz=timezone(timedelta(hours=9))), 60.0),
        (NOW + MAX_TERM + 1, None),
        (math.inf, None),
    ],
    ids=repr,
)
@pytest.mark.usefixtures("clock")
def test_expiry_is_parsed_from_datetime_and_timestamp(moment: Any, seconds: float | None) -> None:
    """An expiry is a datetime with a time zone or seconds since 1970; beyond ten years it does not apply."""
    assert seconds_until_expiry(moment) == seconds


@pytest.mark.parametrize("moment", [NOW, NOW - 1, 0, -math.inf, datetime.fromtimestamp(NOW - 1, tz=timezone.utc)])
@pytest.mark.usefixtures("clock")
def test_expired_identity_is_rejected_with_401(moment: Any) -> None:
    """An expired identity is rejected with 401."""
    with pytest.raises(HTTPException) as rejected:
        seconds_until_expiry(moment)
    assert rejected.value.status_code == 401


@pytest.mark.parametrize("moment", [datetime(2030, 1, 1), "2030-01-01", True, math.nan, timedelta(seconds=5)], ids=repr)
@pytest.mark.usefixtures("clock")
def test_ambiguous_expiry_raises_type_error(moment: Any) -> None:
    """A datetime without a time zone, or a value of another type, raises, because its meaning is ambiguous."""
    with pytest.raises(TypeError, match="a datetime with a time zone, seconds since 1970"):
        seconds_until_expiry(moment)
