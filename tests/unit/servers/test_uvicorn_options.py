"""Tests of `uvicorn_options`, with the installed uvicorn and with one that is too old."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
from uvicorn.config import Config

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.servers.uvicorn.options import MODULE, uvicorn_options
from tests.support.versions import HAS_PROTOCOL_CLASS

FOLDER = "fastapi_ws_stabilizer.servers.uvicorn"

PARTS = ("uvicorn.protocols.websockets.websockets_sansio_impl", "websockets.extensions.permessage_deflate")
"""Modules that the protocol class needs, and that an old uvicorn, or one without websockets, does not have."""


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Do nothing."""


def loaded(options: dict[str, Any]) -> Config:
    """Return uvicorn's config for the options."""
    config = Config(application, log_level="critical", **options)
    config.load()
    return config


@pytest.mark.parametrize("options", [{}, {"compression": "none", "heartbeat_interval": 1.5, "max_message_size": 5}])
def test_uvicorn_accepts_options(options: dict[str, Any]) -> None:
    """The options select the protocol class, and pass the manager's limits to uvicorn."""
    manager = WebSocketConnectionManager(WebSocketConfig(**options))
    config = loaded(manager.uvicorn_options())
    assert (getattr(config.ws_protocol_class, "__name__", "") == "StableWebSocketProtocol") == HAS_PROTOCOL_CLASS
    assert config.ws_max_size == manager.config.max_message_size
    assert config.ws_ping_interval == manager.config.heartbeat_interval
    assert config.ws_ping_timeout == manager.config.heartbeat_timeout
    assert config.ws_per_message_deflate == (manager.config.compression == "deflate")
    assert config.timeout_graceful_shutdown is not None


@pytest.mark.parametrize("missing", [*PARTS, MODULE])
def test_missing_protocol_class_falls_back_with_warning(missing: str, caplog: pytest.LogCaptureFixture) -> None:
    """The options still work, and a warning names what is missing."""
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "fastapi_ws_stabilizer"):
        for name in (
            MODULE,
            *(f"{FOLDER}.{part}" for part in ("compat", "deflate", "frame_parser", "paced_parser", "upgrade")),
        ):
            patch.delitem(sys.modules, name, raising=False)
        patch.setitem(sys.modules, missing, None)
        options = uvicorn_options(WebSocketConfig())
    assert options["ws"] == "auto"
    assert loaded(options).ws_protocol_class is not None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.event == "uvicorn_internals_unknown"
    assert missing in record.message or "pip install -U" in record.message
