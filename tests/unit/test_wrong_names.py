"""Tests of the errors for attributes that a manager, a socket or a room does not have."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any
from unittest import mock

import pytest

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wrong_names import OF_MANAGER, OF_ROOM, OF_SOCKET
from tests.support.fake_websocket import FakeServer, eventually, with_deadline

EMPTY_ROOM = Room("lobby", lambda: None)  # type: ignore[arg-type, return-value]
SOCKET = object.__new__(StableSocket)
OWNERS: dict[str, Any] = {"manager": WebSocketConnectionManager(), "ws": SOCKET, "room": EMPTY_ROOM}
CASES = [
    (owner, name) for owner, names in (("manager", OF_MANAGER), ("ws", OF_SOCKET), ("room", OF_ROOM)) for name in names
]


@pytest.mark.parametrize(("owner", "name"), CASES)
def test_wrong_name_error_names_right_one(owner: str, name: str) -> None:
    """A wrong name that people often use raises an `AttributeError` that names existing alternatives."""
    instance = OWNERS[owner]
    assert not hasattr(instance, name)
    with pytest.raises(AttributeError) as caught:
        getattr(instance, name)
    text = str(caught.value)
    assert f"{type(instance).__name__} has no {name!r}: " in text
    kinds = {"manager": WebSocketConnectionManager, "ws": StableSocket, "room": Room}
    for other, right in re.findall(r"\b(manager|ws|room)\.(\w+)", text):
        assert right in dir(kinds[other]), text


@pytest.mark.parametrize(
    ("owner", "name", "right"),
    [
        ("manager", "accept", "StableSocketDep"),
        ("manager", "rooms", "manager.get_rooms()"),
        ("manager", "kick", "manager.disconnect("),
        ("manager", "send", "manager.send_to_client("),
        ("manager", "connections", "manager.get_sockets()"),
        ("manager", "broadcast_to_room", "manager.broadcast(message, room=...)"),
        ("manager", "emit", "manager.broadcast("),
        ("ws", "accept", "delete"),
        ("ws", "kick", "ws.close("),
        ("ws", "emit", "ws.send("),
        ("ws", "broadcast", "manager.broadcast("),
        ("ws", "id", "ws.connection_id"),
    ],
)
def test_common_wrong_guess_names_right_one(owner: str, name: str, right: str) -> None:
    """Names of Starlette, FastAPI's tutorial and Socket.IO lead to those of this library."""
    with pytest.raises(AttributeError, match=re.escape(right)):
        getattr(OWNERS[owner], name)


@pytest.mark.parametrize("owner", list(OWNERS))
def test_unknown_name_raises_ordinary_error(owner: str) -> None:
    """A name that is in no table raises Python's usual error."""
    instance = OWNERS[owner]
    with pytest.raises(AttributeError) as caught:
        _ = instance.nonsense
    assert str(caught.value) == f"{type(instance).__name__!r} object has no attribute 'nonsense'"
    assert (caught.value.name, caught.value.obj) == ("nonsense", instance)
    assert getattr(instance, "nonsense", 5) == 5


def test_error_within_property_is_unchanged() -> None:
    """An `AttributeError` inside a property is not taken for a missing name."""
    with pytest.raises(AttributeError, match="'_connection'"):
        _ = SOCKET.client_id


def test_copy_mock_and_inspect_work_on_socket() -> None:
    """Copies, mocks and inspection of a socket work as without the tables."""
    assert isinstance(copy.copy(SOCKET), StableSocket)
    assert isinstance(copy.copy(EMPTY_ROOM), Room)
    with pytest.raises(AttributeError):
        mock.create_autospec(StableSocket, instance=True).accept  # noqa: B018 (reading it is the test)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        pickle.dumps(EMPTY_ROOM)  # its lambda cannot be pickled; no other error is raised
    assert not set(OF_SOCKET) & set(dir(StableSocket))
    assert inspect.unwrap(WebSocketConnectionManager().broadcast)


async def test_copy_of_open_socket_is_same_connection() -> None:
    """A copy of an open socket is the same connection."""
    manager, server = WebSocketConnectionManager(), FakeServer(path_params={"client_id": "ann"})
    async with manager.serve(server.websocket, "ann") as ws:
        assert copy.copy(ws).connection_id == ws.connection_id
        server.feed_disconnect(1000)
        await with_deadline(ws.wait_closed())
    await eventually(lambda: manager.get_connection_count() == 0)


@pytest.mark.parametrize("options", [{"heartbeat_interval": 5.0}, {}])
def test_manager_with_dict_asks_for_config(options: dict[str, Any]) -> None:
    """Options as a dict are rejected with the correct call."""
    with pytest.raises(TypeError, match=re.escape("WebSocketConnectionManager(WebSocketConfig(**options))")):
        WebSocketConnectionManager(options)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["redis://localhost", 5, WebSocketConfig, object()])
def test_manager_with_wrong_type_names_expected_types(wrong: Any) -> None:
    """A value that is not a config is rejected with its type."""
    with pytest.raises(TypeError, match=r"must be a WebSocketConfig, not"):
        WebSocketConnectionManager(wrong)


def test_manager_with_app_suggests_install() -> None:
    """For an app the error names `install` and the manager's lifespan."""
    from fastapi import FastAPI

    with pytest.raises(TypeError, match=r"manager\.install\(app\)"):
        WebSocketConnectionManager(FastAPI())  # type: ignore[arg-type]
