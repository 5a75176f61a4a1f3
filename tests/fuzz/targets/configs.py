"""Options of any kind, valid and invalid, from Python and from the environment."""

from __future__ import annotations

import math
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

from pydantic import SecretStr, ValidationError

from fastapi_ws_stabilizer.config import (
    CompressionMode,
    DuplicatePolicy,
    HeartbeatType,
    WebSocketConfig,
)
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.servers.uvicorn.options import uvicorn_options
from tests.fuzz.choices import Choices

NAMES: Final = tuple(WebSocketConfig.model_fields)

PRESETS: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63,
    10**400,
    0.0,
    0.001,
    1e-300,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "none",
    "auto",
    "ping",
    "custom",
    "deflate",
    "1e400",
    "9" * 5000,
    "PT5S",
    b"\xff",
    [],
    {},
    (),
    [[[]]],
    {"a": 1},
    object,
    timedelta(0),
    timedelta.max,
    timedelta.min,
    Decimal("NaN"),
    Decimal("1e1000"),
    SecretStr("x" * 32),
    ["a secret that is long enough", b"\xff" * 32],
    HeartbeatType.CUSTOM,
    DuplicatePolicy.ALLOW,
    CompressionMode.NONE,
)


def config(data: bytes) -> None:
    """Use bytes for options with values, and for an environment."""
    choices = Choices(data)
    options: dict[str, Any] = {}
    environ: dict[str, str] = {}
    for _ in range(choices.number() % 8):
        name = choices.pick((*NAMES, "")) or choices.text()
        options[name] = a_value(choices)
    while choices:
        name = choices.pick((*NAMES, "")) or choices.text()
        environ[f"WS_{name}".upper() if choices.number() & 1 else f"ws_{name}"] = choices.text()
    makes_a_config(options)
    reads_an_environment(environ)


def a_value(choices: Choices) -> Any:
    """Return some value, of any type."""
    kind = choices.number() % 7
    if kind == 0:
        return choices.text()
    if kind == 1:
        return choices.number(choices.number() % 12) - choices.number(4)
    if kind == 2:
        return choices.number(4) / (choices.number(2) + 1)
    if kind == 3:
        return choices.take(choices.number())
    if kind == 4:
        return [a_value(choices) for _ in range(choices.number() % 3)]
    return choices.pick(PRESETS)


def makes_a_config(options: dict[str, Any]) -> WebSocketConfig | None:
    """Check that options make a usable config or raise an error with the reason."""
    try:
        made = WebSocketConfig(**options)
    except ValueError as error:
        assert isinstance(error, ValidationError)
        assert str(error)
        return None
    _can_be_used(made)
    copy = made.model_copy(update=options)
    assert {name for name in options if not _same(getattr(copy, name), getattr(made, name))} == set()
    return made


def reads_an_environment(environ: dict[str, str]) -> WebSocketConfig | None:
    """Check the same for an environment."""
    try:
        made = WebSocketConfig.from_env(environ=environ)
    except ValueError as error:
        assert isinstance(error, ValidationError)
        assert str(error)
        return None
    _can_be_used(made)
    return made


def _can_be_used(made: WebSocketConfig) -> None:
    assert made.changed_options() <= set(NAMES)
    for name in NAMES:
        value = getattr(made, name)
        assert name == "heartbeat_payload" or not isinstance(value, float) or math.isfinite(value)
    assert uvicorn_options(made)["timeout_graceful_shutdown"] > 0
    try:
        assert WebSocketConnectionManager(made).config is made
    except MessageEncodeError:  # any object can be the payload; the manager raises at once if it cannot be sent
        assert made.heartbeat_type is HeartbeatType.CUSTOM


def _same(one: Any, other: Any) -> bool:
    return one is other or one == other
