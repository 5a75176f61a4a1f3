"""Tests of who a connection belongs to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from fastapi_ws_stabilizer.routing.identity import client_id_from, client_id_of, fresh_client_id
from tests.unit.fake_websocket import FakeServer


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
def test_the_client_id_comes_from_the_path_or_the_query(path_params: Any, query: str, expected: str) -> None:
    """The path parameter wins over the query parameter; any text is an id."""
    assert client_id_of(FakeServer(query=query, path_params=path_params).websocket) == expected


@pytest.mark.parametrize(("path_params", "query"), [({}, ""), ({}, "client_id="), ({"client_id": ""}, "")])
def test_a_client_may_name_itself_nowhere(path_params: Any, query: str) -> None:
    """Without an id in the path or the query there is none."""
    assert client_id_of(FakeServer(query=query, path_params=path_params).websocket) is None


def test_fresh_client_ids_are_all_different() -> None:
    """A client that names itself nowhere is a client of its own."""
    first, second = fresh_client_id(), fresh_client_id()
    assert first != second
    assert len(first) == 32


@pytest.mark.parametrize(
    ("identity", "expected"), [("ann", "ann"), (7, "7"), (0, "0"), (UUID(int=1), str(UUID(int=1)))]
)
def test_a_simple_identity_is_its_own_client_id(identity: Any, expected: str) -> None:
    """`str`, `int` and `UUID` need no key."""
    assert client_id_from(identity, None) == expected


def test_a_key_says_which_part_of_an_identity_is_the_client_id() -> None:
    """Any identity will do with a key."""
    assert client_id_from(SimpleNamespace(id=7), lambda user: user.id) == "7"


@pytest.mark.parametrize("identity", [None, True, "", 1.5, SimpleNamespace(id=7)], ids=repr)
def test_an_identity_that_is_no_client_id_is_an_error_that_says_how(identity: Any) -> None:
    """There is no guessing who somebody is."""
    with pytest.raises(TypeError, match=r"key=lambda identity: identity\.id"):
        client_id_from(identity, None)


@pytest.mark.parametrize("chosen", [None, True, "", object()], ids=str)
def test_a_key_that_chooses_no_client_id_is_an_error(chosen: Any) -> None:
    """What a key returns is checked like an identity."""
    with pytest.raises(TypeError, match=r"the key of manager\.socket_for"):
        client_id_from("ann", lambda _: chosen)
