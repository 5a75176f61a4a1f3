"""Tests of who a connection belongs to."""

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
    client_id_from,
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
    """The path parameter wins over the query parameter; any text is an id."""
    assert client_id_from_request(FakeServer(query=query, path_params=path_params).websocket) == expected


@pytest.mark.parametrize(("path_params", "query"), [({}, ""), ({}, "client_id="), ({"client_id": ""}, "")])
def test_missing_or_empty_client_id_is_none(path_params: Any, query: str) -> None:
    """Without an id in the path or the query there is none."""
    assert client_id_from_request(FakeServer(query=query, path_params=path_params).websocket) is None


@pytest.mark.parametrize("client_id", ["x" * 200, "🦊", "ann@example.com", "a.b.c", "x" * 256, "日本", "a b"])
def test_printable_client_id_is_accepted(client_id: str) -> None:
    """Addresses, emoji, dots and 256 characters are taken."""
    assert client_id_from_request(FakeServer(path_params={"client_id": client_id}).websocket) == client_id
    assert client_id_from_request(FakeServer(query=urlencode({"client_id": client_id})).websocket) == client_id


@pytest.mark.parametrize(
    "client_id",
    ["x" * 257, "x" * (1 << 20), "\r\n[ERROR] fake", "a\x00", "\x1b[2J", "a\x9bm", "a\u2028b"],
    ids=lambda client_id: ascii(client_id[:12]),
)
def test_invalid_client_id_is_rejected_with_400(client_id: str) -> None:
    """A client id of a megabyte, or with a line break in it, is refused before accept, and the answer says why."""
    for websocket in (
        FakeServer(path_params={"client_id": client_id}).websocket,
        FakeServer(query=urlencode({"client_id": client_id})).websocket,
    ):
        with pytest.raises(HTTPException) as refused:
            client_id_from_request(websocket)
        assert refused.value.status_code == 400
        assert refused.value.detail == "client_id: at most 256 characters and no control characters"


def test_fresh_client_ids_are_unique() -> None:
    """A client that names itself nowhere is a client of its own."""
    first, second = fresh_client_id(), fresh_client_id()
    assert first != second
    assert len(first) == 32


@pytest.mark.parametrize(
    ("identity", "expected"), [("ann", "ann"), (7, "7"), (0, "0"), (UUID(int=1), str(UUID(int=1)))]
)
def test_simple_identity_is_its_own_client_id(identity: Any, expected: str) -> None:
    """`str`, `int` and `UUID` need no key."""
    assert client_id_from(identity, None) == expected


def test_key_selects_client_id_from_identity() -> None:
    """Any identity will do with a key."""
    assert client_id_from(SimpleNamespace(id=7), lambda user: user.id) == "7"


NO_NAMES = ["\ud800", "a\nb", "x" * 257, "\x1b[2J", "a\u2028b", 10**300]


@pytest.mark.parametrize("identity", NO_NAMES, ids=lambda identity: ascii(identity)[:12])
def test_invalid_identity_name_is_rejected_with_401(identity: Any) -> None:
    """What a credential says of its owner is held to the rule for client ids, with a key and without."""
    for what, key in ((identity, None), (SimpleNamespace(id=identity), lambda user: user.id)):
        with pytest.raises(HTTPException) as refused:
            client_id_from(what, key)
        assert (refused.value.status_code, "at most 256 characters" in refused.value.detail) == (401, True)


@pytest.mark.parametrize("identity", [None, True, "", 1.5, SimpleNamespace(id=7)], ids=repr)
def test_unsupported_identity_raises_type_error(identity: Any) -> None:
    """There is no guessing who somebody is."""
    with pytest.raises(TypeError, match=r"key=lambda identity: identity\.id"):
        client_id_from(identity, None)


@pytest.mark.parametrize("chosen", [None, True, "", object()], ids=["None", "True", "empty", "object"])
def test_unsupported_key_result_raises_type_error(chosen: Any) -> None:
    """What a key returns is checked like an identity."""
    with pytest.raises(TypeError, match=r"the key of manager\.socket_for"):
        client_id_from("ann", lambda _: chosen)


# ── until when ──


NOW = 1_800_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment that does not pass."""
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
    """A moment with its time zone, or a JWT's `exp`; what is ten years away is for ever."""
    assert seconds_until_expiry(moment) == seconds


@pytest.mark.parametrize("moment", [NOW, NOW - 1, 0, -math.inf, datetime.fromtimestamp(NOW - 1, tz=timezone.utc)])
@pytest.mark.usefixtures("clock")
def test_expired_identity_is_rejected_with_401(moment: Any) -> None:
    """Who comes with what has expired is not let in for a moment first."""
    with pytest.raises(HTTPException) as refused:
        seconds_until_expiry(moment)
    assert refused.value.status_code == 401


@pytest.mark.parametrize("moment", [datetime(2030, 1, 1), "2030-01-01", True, math.nan, timedelta(seconds=5)], ids=repr)
@pytest.mark.usefixtures("clock")
def test_ambiguous_expiry_raises_type_error(moment: Any) -> None:
    """A time without its zone would be good for hours too long somewhere: nobody guesses."""
    with pytest.raises(TypeError, match="a datetime with a time zone, seconds since 1970"):
        seconds_until_expiry(moment)
