"""Tests of the names of a client's options."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest

from fastapi_ws_stabilizer.client import Client, connect
from fastapi_ws_stabilizer.client.client import _OPTIONS
from fastapi_ws_stabilizer.client.options import OTHER_NAMES
from fastapi_ws_stabilizer.client.transport import default_options
from tests.support.fake_link import Scene, virtually


@virtually
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_bufferd", "max_buffered"),
        ("connect_timout", "connect_timeout"),
        ("aditional_headers", "additional_headers"),
        ("server_hostnam", "server_hostname"),
        *OTHER_NAMES.items(),
    ],
)
async def test_misspelt_option_raises_with_nearest_name(wrong: str, right: str) -> None:
    """The constructor raises for an option that does not exist, and names the most similar one."""
    with pytest.raises(TypeError) as caught:
        connect("ws://server", **{wrong: 1})
    assert str(caught.value) == f"a client has no option {wrong!r}; did you mean {right!r}?"


@virtually
async def test_unknown_option_without_similar_name_raises() -> None:
    """An option that resembles no other raises without a suggestion."""
    with pytest.raises(TypeError) as caught:
        Client("ws://server", zzz=1)
    assert str(caught.value) == "a client has no option 'zzz'"


@virtually
@pytest.mark.parametrize("option", ["ssl", "additional_headers", "max_bufferd"])
async def test_library_option_beside_own_dial_raises(option: str) -> None:
    """A client with its own `dial` has no options of the library, because nothing would read them."""
    with pytest.raises(TypeError, match=f"a client with `dial` has no option {option!r}"):
        Client("ws://server", dial=Scene()._dial, **{option: None})


def test_suggested_options_exist() -> None:
    """Each suggested name is an option, and no name of another library is one."""
    valid = _OPTIONS | default_options()
    assert set(OTHER_NAMES.values()) <= valid
    assert not OTHER_NAMES.keys() & valid


@virtually
@pytest.mark.parametrize(
    "options",
    [
        {"ssl": None, "additional_headers": {"X-A": "b"}, "compression": None, "max_queue": 4},
        {"host": "127.0.0.1", "port": 1, "local_addr": None, "happy_eyeballs_delay": None, "family": 0},
        {"unix": True, "path": "/tmp/socket"},
        {"create_connection": None, "subprotocols": ["a"], "open_timeout": 1.0},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_options_of_library_and_network_are_valid(options: dict[str, Any]) -> None:
    """The options of `websockets.connect`, and those of the network connection that it passes on, are valid."""
    await connect("ws://server", **options).close()


def test_every_option_of_constructor_is_valid() -> None:
    """The names are read from the signature of the constructor."""
    named = {name for name, one in inspect.signature(Client).parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert named == _OPTIONS


@virtually
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, value) for name in ("connect_timeout", "probe_timeout") for value in (0, -1, "5", None, math.nan)),
        *((name, value) for name in ("max_buffered", "max_buffered_bytes") for value in (0, -1, "5", None)),
        *((name, -1) for name in ("min_delay", "base_delay", "max_delay", "stable_after", "flush_timeout")),
        ("flush_timeout", None),
        ("stable_after", "5"),
        ("first_connect_timeout", 0),
    ],
)
async def test_invalid_number_raises_at_constructor(option: str, value: Any) -> None:
    """A number that is out of range or no number raises where it is written, with the name of the option."""
    with pytest.raises(ValueError, match=rf"^{option} must be a number (above|of at least) 0, not {value!r}$"):
        connect("ws://server", **{option: value})


@virtually
@pytest.mark.parametrize("option", ["min_delay", "base_delay", "max_delay", "stable_after", "flush_timeout"])
async def test_zero_seconds_are_valid(option: str) -> None:
    """A delay of zero and a flush without waiting are valid."""
    await connect("ws://server", **{option: 0}).close()


@virtually
async def test_auth_that_is_no_function_raises_without_value() -> None:
    """A credential in place of the function raises at once, and the error does not contain it."""
    with pytest.raises(TypeError, match="auth must be a function") as caught:
        connect("ws://server", auth="secret")
    assert "secret" not in str(caught.value)
